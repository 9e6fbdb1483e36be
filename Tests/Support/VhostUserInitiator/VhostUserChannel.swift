// VhostUserChannel: one connection to a vhost-user back-end: bytes and file descriptors out, replies in.
//
// Owns: the socket. Called by: VhostUserFrontEnd; tests that send what no honest front-end would. Must not know: what
// the messages mean, or their order.

import CLinux
import Glibc

/// A reply, or any message that came from the back-end.
public struct VhostUserReply: Equatable, Sendable {
    /// The request that it answers.
    public let request: UInt32
    /// Version and flags as they came.
    public let flags: UInt32
    /// What follows the header.
    public let payload: [UInt8]

    /// The payload, if it is one number of 64 bits.
    public var number: UInt64? { payload.count == 8 ? WireBytes.read(UInt64.self, payload, at: 0) : nil }
}

/// What was sent once: for tests that send it again, or a part of it.
public struct SentBytes: Sendable {
    /// The bytes of one message.
    public let bytes: [UInt8]
    /// The descriptors that went along. They are still the sender's.
    public let descriptors: [Int32]
    /// Whether the sender then waited for a reply.
    public var awaitedReply = false
}

/// One connection to a vhost-user back-end.
public final class VhostUserChannel {
    /// Version 1, in the flags of each message.
    public static let version: UInt32 = 1
    /// The flag of a reply.
    public static let replyFlag: UInt32 = 1 << 2
    /// The flag that asks for an acknowledgement.
    public static let needReplyFlag: UInt32 = 1 << 3
    /// Payloads that are read at most: more is a broken back-end.
    private static let longestPayload = 65_536

    /// The socket.
    public let descriptor: Int32
    /// Descriptors that came with messages, the oldest first. Whoever takes one closes it.
    public var receivedDescriptors: [Int32] = []
    /// What was sent so far.
    public private(set) var sent: [SentBytes] = []

    /// Connects to a Unix socket.
    public init(path: String) throws(InitiatorError) {
        descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { throw .systemCall("socket", errno: errno) }
        let code = Self.connect(descriptor, path)
        if code != 0 { throw .systemCall("connecting to \(path)", errno: code) }
    }

    deinit {
        for descriptor in receivedDescriptors { close(descriptor) }
        close(descriptor)
    }

    private static func connect(_ descriptor: Int32, _ path: String) -> Int32 {
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let bytes = Array(path.utf8)
        guard bytes.count < MemoryLayout.size(ofValue: address.sun_path) else { return ENAMETOOLONG }
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: bytes) }
        let result = unsafe withUnsafePointer(to: &address) {
            unsafe $0.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                unsafe Glibc.connect(descriptor, $0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
        return result == 0 ? 0 : errno
    }

    /// Sends bytes as they are, with file descriptors, which stay the caller's.
    public func sendRaw(_ bytes: [UInt8], descriptors: [Int32] = []) throws(InitiatorError) {
        precondition(descriptors.count <= Int(CLINUX_PEER_DESCRIPTORS))
        sent.append(SentBytes(bytes: bytes, descriptors: descriptors))
        var count = 0
        while count < bytes.count {
            let result = unsafe bytes.withUnsafeBytes { buffer in
                unsafe descriptors.withUnsafeBufferPointer { list in
                    unsafe clinux_peer_send(
                        descriptor, buffer.baseAddress.map { unsafe $0 + count }, buffer.count - count,
                        list.baseAddress, count == 0 ? Int32(list.count) : 0)
                }
            }
            if result < 0, errno == EINTR { continue }
            if result < 0, errno == EPIPE || errno == ECONNRESET { throw .disconnected }
            guard result > 0 else { throw .systemCall("sendmsg", errno: errno) }
            count += result
        }
    }

    /// The bytes of a message.
    public static func message(_ request: VhostUserRequest, _ payload: [UInt8], needReply: Bool = false) -> [UInt8] {
        WireBytes.of(request.rawValue, version | (needReply ? needReplyFlag : 0), UInt32(payload.count)) + payload
    }

    /// Sends a message.
    public func send(
        _ request: VhostUserRequest, _ payload: [UInt8] = [], descriptors: [Int32] = [], needReply: Bool = false
    ) throws(InitiatorError) {
        try sendRaw(Self.message(request, payload, needReply: needReply), descriptors: descriptors)
    }

    /// Receives the next message of the back-end.
    public func receive() throws(InitiatorError) -> VhostUserReply {
        if !sent.isEmpty { sent[sent.count - 1].awaitedReply = true }
        let header = try receiveBytes(12)
        let size = Int(WireBytes.read(UInt32.self, header, at: 8) ?? 0)
        guard size <= Self.longestPayload else { throw .protocolViolation("a reply with \(size) bytes of payload") }
        let payload = try receiveBytes(size)
        return VhostUserReply(
            request: WireBytes.read(UInt32.self, header, at: 0) ?? 0,
            flags: WireBytes.read(UInt32.self, header, at: 4) ?? 0, payload: payload)
    }

    private func receiveBytes(_ count: Int) throws(InitiatorError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var received = 0
        while received < count {
            try Deadline.waitForInput(descriptor, "a message of \(count) bytes")
            var descriptors = [Int32](repeating: -1, count: 8)
            var descriptorCount: Int32 = 0
            let result = unsafe bytes.withUnsafeMutableBytes { buffer in
                unsafe clinux_receive(
                    descriptor, buffer.baseAddress.map { unsafe $0 + received }, count - received, &descriptors, 8,
                    &descriptorCount)
            }
            receivedDescriptors += descriptors[..<Int(descriptorCount)]
            if result < 0, errno == EINTR || errno == EAGAIN { continue }
            if result == 0 || errno == ECONNRESET && result < 0 { throw .disconnected }
            guard result > 0 else { throw .systemCall("recv", errno: errno) }
            received += result
        }
        return bytes
    }

    /// Whether the back-end still has the connection open.
    public var isOpen: Bool {
        var byte: UInt8 = 0
        let count = unsafe recv(descriptor, &byte, 1, Int32(MSG_DONTWAIT) | Int32(MSG_PEEK))
        return count > 0 || count < 0 && (errno == EAGAIN || errno == EINTR)
    }

    /// Waits until the back-end closes the connection; throws if it sends anything instead.
    public func waitForClose() throws(InitiatorError) {
        let reply: VhostUserReply
        do {
            reply = try receive()
        } catch .disconnected {
            return
        }
        throw .protocolViolation("it answered request \(reply.request) instead of closing the connection")
    }

    /// Closes this side of the connection; the back-end sees the end of the stream.
    public func shutDown() { _ = shutdown(descriptor, Int32(SHUT_RDWR)) }
}
