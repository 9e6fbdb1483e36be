// VhostUserConnection: one connected socket: whole messages in, replies out, never blocking.
//
// Owns: the socket and what has been read of the next message. Called by: VhostUserSession. Must not know: what the
// messages do.

import CLinux
import Glibc

/// Why a connection ended.
enum ConnectionEnd: Error {
    /// The front-end closed it.
    case closed
    /// What came was no vhost-user message.
    case malformed(String)
}

final class VhostUserConnection {
    private(set) var socket: Int32
    private var buffer: [UInt8] = []
    private var descriptors: [Int32] = []

    init(socket: Int32) { self.socket = socket }

    deinit { end() }

    /// Closes the socket, and what came over it and belongs to no message yet.
    func end() {
        for descriptor in descriptors { close(descriptor) }
        descriptors = []
        if socket >= 0 { close(socket) }
        socket = -1
    }

    /// The next whole message, or `nil` if there is none yet. Reads no further than that message, because descriptors
    /// belong to the message that they came with.
    func nextMessage() throws(ConnectionEnd) -> VhostUserMessage? {
        guard try fill(VhostUserMessage.headerSize) else { return nil }
        let header = Array(buffer[..<VhostUserMessage.headerSize])
        guard var message = VhostUserMessage(header: header) else {
            throw .malformed("a message header with wrong version or flags")
        }
        let size = VhostUserMessage.payloadSize(header: header)
        guard size <= VhostUserMessage.payloadCapacity else { throw .malformed("a payload of \(size) bytes") }
        guard try fill(VhostUserMessage.headerSize + size) else { return nil }
        message.payload = Array(buffer[VhostUserMessage.headerSize...])
        message.descriptors = descriptors
        buffer.removeAll(keepingCapacity: true)
        descriptors.removeAll()
        return message
    }

    /// Reads until `count` bytes of the message are there; `false` if they are not there yet.
    private func fill(_ count: Int) throws(ConnectionEnd) -> Bool {
        while buffer.count < count {
            var bytes = [UInt8](repeating: 0, count: count - buffer.count)
            var received = [Int32](repeating: -1, count: VhostUserMessage.descriptorCapacity)
            var receivedCount: Int32 = 0
            let length = unsafe clinux_receive(
                socket, &bytes, bytes.count, &received, Int32(received.count), &receivedCount)
            descriptors += received[..<Int(receivedCount)]
            if length > 0 {
                buffer += bytes[..<length]
                guard descriptors.count <= VhostUserMessage.descriptorCapacity else {
                    throw .malformed("too many file descriptors in one message")
                }
                continue
            }
            if length < 0, errno == EAGAIN || errno == EINTR { return false }
            throw .closed
        }
        return true
    }

    /// Sends a reply. A front-end that does not read its replies loses the connection.
    func send(_ bytes: [UInt8], descriptor: Int32 = -1) throws(ConnectionEnd) {
        let sent = unsafe clinux_send(socket, bytes, bytes.count, descriptor)
        guard sent == bytes.count else { throw .closed }
    }
}
