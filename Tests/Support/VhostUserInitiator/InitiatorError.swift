// InitiatorError: why the front-end could not do what it was asked.
//
// Called by: everything here. Must not know: what the caller wanted.

import CLinux
import Glibc

/// Why the front-end could not do what it was asked.
public enum InitiatorError: Error, Equatable, CustomStringConvertible {
    /// A system call failed: the call, with what it was for, and its errno value.
    case systemCall(String, errno: Int32)
    /// The back-end closed the connection.
    case disconnected
    /// The back-end did not answer in time; what was waited for.
    case timeout(String)
    /// The back-end answered, but not as vhost-user or virtio asks; what was wrong.
    case protocolViolation(String)
    /// The back-end refused a request that it was asked to acknowledge.
    case refused(VhostUserRequest, code: UInt64)

    /// What is wrong, and where.
    public var description: String {
        switch self {
        case .systemCall(let call, let code): unsafe "\(call): \(String(cString: strerror(code)))"
        case .disconnected: "the back-end closed the connection"
        case .timeout(let what): "the back-end did not answer within \(Deadline.seconds) seconds: \(what)"
        case .protocolViolation(let text): "the back-end broke the protocol: \(text)"
        case .refused(let request, let code): "the back-end refused \(request) with \(code)"
        }
    }
}

/// How long to wait for a back-end before it counts as dead. Nothing passes or fails by how fast it is within this.
enum Deadline {
    static let seconds = 30

    /// Seconds of the monotonic clock.
    static func now() -> Int {
        var time = timespec()
        _ = unsafe clock_gettime(CLOCK_MONOTONIC, &time)
        return time.tv_sec
    }

    /// Waits until the descriptor can be read; throws when the deadline has passed.
    static func waitForInput(_ descriptor: Int32, _ what: @autoclosure () -> String) throws(InitiatorError) {
        try waitForInput(anyOf: [descriptor], what())
    }

    /// Waits until one of the descriptors can be read; throws when the deadline has passed.
    static func waitForInput(anyOf descriptors: [Int32], _ what: @autoclosure () -> String) throws(InitiatorError) {
        let end = now() + seconds
        var entries = descriptors.map { pollfd(fd: $0, events: Int16(POLLIN), revents: 0) }
        while true {
            let count = unsafe poll(&entries, UInt(entries.count), Int32(max(0, end - now()) * 1000))
            if count > 0 { return }
            if count < 0, errno != EINTR { throw .systemCall("poll", errno: errno) }
            if now() >= end { throw .timeout(what()) }
        }
    }
}
