// ControlClient: one request over the control socket, and its answer.
//
// Owns: as much of HTTP/1.1 as our own daemon needs to be asked. Called by: targetctl, tests. Must not know: what is
// asked.

public import Foundation
import Glibc

/// Asks a daemon at its control socket; a connection for each request.
public struct ControlClient: Sendable {
    /// Why there is no answer.
    public enum ClientError: Error, Equatable, CustomStringConvertible {
        /// The path is longer than a Unix socket address can hold.
        case pathTooLong(String)
        /// Nobody answers at the socket.
        case unreachable(String, reason: String)
        /// The connection ended, or what came is not an answer of targetd.
        case badAnswer(String)

        /// The error in words, with what to do next.
        public var description: String {
            switch self {
            case .pathTooLong(let path): "The socket path \(path) is longer than 107 bytes; choose a shorter one."
            case .unreachable(let path, let reason):
                "targetd does not answer at \(path): \(reason). Is it running, and is this the socket: of its control:?"
            case .badAnswer(let what): "The answer is not one of targetd: \(what)."
            }
        }
    }

    /// What came back.
    public struct Answer: Sendable {
        /// The HTTP status.
        public var status: Int
        /// Header fields by name in small letters.
        public var fields: [String: String]
        /// The body.
        public var body: Data
    }

    /// The path of the socket.
    public let socket: String

    /// A client for the daemon at this socket.
    public init(socket: String) { self.socket = socket }

    /// Sends one request and waits for its answer, however long the operation takes.
    ///
    /// - Parameters:
    ///   - method: The method.
    ///   - target: The path, with its query.
    ///   - type: The media type of the body.
    ///   - body: The body, if the operation takes one.
    public func exchange(_ method: String, _ target: String, type: String = "application/json", body: Data? = nil)
        throws -> Answer
    {
        var head = "\(method) \(target) HTTP/1.1\r\nHost: targetd\r\nConnection: close\r\n"
        if let body { head += "Content-Type: \(type)\r\nContent-Length: \(body.count)\r\n" }
        return try Self.parse(exchange(raw: Data((head + "\r\n").utf8) + (body ?? Data())))
    }

    /// Asks for something that goes on, and hands out its lines as they come, until `body` returns `false` or the
    /// daemon ends it.
    ///
    /// - Returns: The answer, if it is another one than 200.
    public func follow(_ target: String, _ body: (String) throws -> Bool) throws -> Answer? {
        let descriptor = try connect()
        defer { close(descriptor) }
        try Self.send(
            Data("GET \(target) HTTP/1.1\r\nHost: targetd\r\nConnection: close\r\n\r\n".utf8), to: descriptor)
        var received = Data()
        var chunks = ChunkReader()
        var hasHead = false
        var chunk = [UInt8](repeating: 0, count: 64 << 10)
        while true {
            let count = unsafe recv(descriptor, &chunk, chunk.count, 0)
            if count < 0 && errno == EINTR { continue }
            if count <= 0 {
                if hasHead { return nil }
                throw ClientError.badAnswer("the connection ended without one")
            }
            received += chunk.prefix(count)
            if !hasHead {
                guard let end = received.firstRange(of: Data("\r\n\r\n".utf8)) else { continue }
                guard received.starts(with: Data("HTTP/1.1 200".utf8)) else {
                    return try Self.parse(received + receive(descriptor))
                }
                hasHead = true
                received = Data(received[end.upperBound...])
            }
            for line in try chunks.lines(&received) where try !body(line) { return nil }
            if chunks.isAtEnd { return nil }
        }
    }

    /// Takes the chunks of a body apart (RFC 9112 7.1), and their text into lines.
    private struct ChunkReader {
        private var text = Data()
        private(set) var isAtEnd = false

        /// The lines that are complete; what is left stays in `bytes`.
        mutating func lines(_ bytes: inout Data) throws -> [String] {
            while !isAtEnd, let end = bytes.firstRange(of: Data("\r\n".utf8)) {
                let digits = String(decoding: bytes[..<end.lowerBound], as: UTF8.self)
                guard let size = Int(digits, radix: 16), size >= 0, size <= 1 << 20 else {
                    throw ClientError.badAnswer("\"\(digits)\" where a chunk begins")
                }
                guard bytes.distance(from: end.upperBound, to: bytes.endIndex) >= size + 2 else { break }
                let content = bytes[end.upperBound..<bytes.index(end.upperBound, offsetBy: size)]
                text += content
                bytes = Data(bytes[bytes.index(content.endIndex, offsetBy: 2)...])
                if size == 0 { isAtEnd = true }
            }
            var lines: [String] = []
            while let end = text.firstIndex(of: UInt8(ascii: "\n")) {
                lines.append(String(decoding: text[..<end], as: UTF8.self))
                text = Data(text[text.index(after: end)...])
            }
            return lines
        }
    }

    /// Sends bytes, then reads to the end of the connection.
    public func exchange(raw bytes: Data) throws -> Data {
        let descriptor = try connect()
        defer { close(descriptor) }
        try Self.send(bytes, to: descriptor)
        return try receive(descriptor)
    }

    /// A connection to the socket, to be closed by the caller.
    public func connect() throws -> Int32 {
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let path = Array(socket.utf8)
        guard path.count < MemoryLayout.size(ofValue: address.sun_path) else { throw ClientError.pathTooLong(socket) }
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: path) }
        let descriptor = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        let connected = unsafe withUnsafePointer(to: &address) {
            unsafe Glibc.connect(
                descriptor, UnsafeRawPointer($0).assumingMemoryBound(to: sockaddr.self),
                socklen_t(MemoryLayout<sockaddr_un>.size))
        }
        guard connected == 0 else {
            let reason = unsafe String(cString: strerror(errno))
            close(descriptor)
            throw ClientError.unreachable(socket, reason: reason)
        }
        return descriptor
    }

    /// Writes all bytes, as far as the peer takes them: one that has answered early and closed is heard all the same.
    public static func send(_ bytes: Data, to descriptor: Int32) throws {
        var rest = bytes[...]
        while !rest.isEmpty {
            let sent = unsafe rest.withUnsafeBytes {
                unsafe Glibc.send(descriptor, $0.baseAddress, $0.count, Int32(MSG_NOSIGNAL))
            }
            if sent < 0 && errno == EINTR { continue }
            guard sent > 0 else { return }
            rest = rest.dropFirst(sent)
        }
    }

    private func receive(_ descriptor: Int32) throws -> Data {
        var result = Data()
        var chunk = [UInt8](repeating: 0, count: 64 << 10)
        while true {
            let count = unsafe recv(descriptor, &chunk, chunk.count, 0)
            if count < 0 && errno == EINTR { continue }
            // A peer that closes while we still have something to say resets; what it said before is there.
            if count <= 0 { return result }
            result += chunk.prefix(count)
        }
    }

    /// Takes an answer apart.
    public static func parse(_ bytes: Data) throws -> Answer {
        guard let end = bytes.firstRange(of: Data("\r\n\r\n".utf8)),
            let head = String(data: bytes[..<end.lowerBound], encoding: .utf8)
        else {
            throw ClientError.badAnswer(bytes.isEmpty ? "the connection ended without one" : "it has no header")
        }
        let lines = head.components(separatedBy: "\r\n")
        let first = lines[0].split(separator: " ")
        guard first.count >= 2, first[0] == "HTTP/1.1", let status = Int(first[1]) else {
            throw ClientError.badAnswer("it begins with \"\(lines[0])\"")
        }
        var fields: [String: String] = [:]
        for line in lines.dropFirst() {
            guard let colon = line.firstIndex(of: ":") else { throw ClientError.badAnswer("\"\(line)\" in its header") }
            fields[line[..<colon].lowercased()] = line[line.index(after: colon)...].trimmingCharacters(in: .whitespaces)
        }
        let body = Data(bytes[end.upperBound...])
        if let length = fields["content-length"], length != "\(body.count)" {
            throw ClientError.badAnswer("\(length) bytes were announced, \(body.count) came")
        }
        return Answer(status: status, fields: fields, body: body)
    }
}
