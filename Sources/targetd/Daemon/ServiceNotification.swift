// ServiceNotification: tells the service manager how the daemon is (sd_notify(3)).
//
// Owns: the protocol: datagrams of VARIABLE=value lines to the socket that NOTIFY_SOCKET names. Called by: the daemon
// process. Must not know: why a state changes.

import Glibc

/// The service manager's notification socket, if it gave one.
struct ServiceNotification: Sendable {
    private let path: String?
    /// Nanoseconds within which the manager wants to hear from a daemon that is alive; `nil`: it does not watch.
    let watchdogNanoseconds: UInt64?

    /// Reads what the manager put into the environment.
    init(environment: (String) -> String? = Self.variable) {
        let path = environment("NOTIFY_SOCKET")
        // A path, or with @ a name in the abstract name space; anything else is for other kinds of machines.
        self.path = path.flatMap { $0.hasPrefix("/") || $0.hasPrefix("@") ? $0 : nil }
        let isForUs = environment("WATCHDOG_PID").map { $0 == String(getpid()) } ?? true
        watchdogNanoseconds = environment("WATCHDOG_USEC").flatMap { text in
            guard isForUs, let microseconds = UInt64(text), microseconds > 0 else { return nil }
            return microseconds.multipliedReportingOverflow(by: 1000).partialValue
        }
    }

    /// Guests can attach.
    func ready(_ status: String) { send("READY=1\nSTATUS=\(status)") }

    /// A stop has begun.
    func stopping() { send("STOPPING=1\nSTATUS=Stopping") }

    /// The configuration is being read again; `ready` ends it.
    func reloading() {
        var now = timespec()
        unsafe clock_gettime(CLOCK_MONOTONIC, &now)
        send("RELOADING=1\nMONOTONIC_USEC=\(now.tv_sec * 1_000_000 + now.tv_nsec / 1000)\nSTATUS=Reloading")
    }

    /// Every reactor has answered.
    func alive() { send("WATCHDOG=1") }

    private func send(_ text: String) {
        guard let path else { return }
        let descriptor = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard descriptor >= 0 else { return }
        defer { close(descriptor) }
        guard var address = UnixAddress(path) else { return }
        // A manager that does not listen is no reason to stop serving.
        unsafe address.withPointer { pointer, length in
            _ = unsafe sendto(descriptor, text, text.utf8.count, Int32(MSG_NOSIGNAL), pointer, length)
        }
    }

    private static func variable(_ name: String) -> String? {
        guard let value = unsafe getenv(name) else { return nil }
        return unsafe String(cString: value)
    }
}

/// The address of a Unix socket.
struct UnixAddress {
    private var address = sockaddr_un()
    private let length: socklen_t

    /// The address for a path, or with `@` at its front a name of the abstract name space; `nil` if it is too long.
    init?(_ path: String) {
        let bytes = Array(path.utf8)
        guard !bytes.isEmpty, bytes.count <= ConfigurationLimits.socketPathBytes else { return nil }
        address.sun_family = sa_family_t(AF_UNIX)
        let isAbstract = bytes[0] == UInt8(ascii: "@")
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { target in
            unsafe target.copyBytes(from: bytes)
            if isAbstract { unsafe target[0] = 0 }
        }
        // Names of the abstract name space are as long as the length says; paths end with a zero byte.
        let end = bytes.count + (isAbstract ? 0 : 1)
        length = socklen_t(MemoryLayout.offset(of: \sockaddr_un.sun_path)! + end)
    }

    /// Calls `body` with the address as the C library takes it.
    mutating func withPointer<Result>(_ body: (UnsafePointer<sockaddr>, socklen_t) -> Result) -> Result {
        let length = length
        return unsafe withUnsafePointer(to: &address) { pointer in
            unsafe pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) { unsafe body($0, length) }
        }
    }
}
