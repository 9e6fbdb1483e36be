// ControlSocket: the listening Unix socket of the control API, and who may use it.
//
// Owns: the file of the socket, its permissions, and the rule about peers. Called by: ControlServer. Must not know:
// HTTP.

import Glibc

/// A Unix socket that listens.
struct ControlSocket: Sendable {
    let descriptor: Int32
    private let path: String
    private let identity: FileStatus.Identity

    /// Makes the socket. The file of a dead process is replaced; before anybody can connect, the file has its group and
    /// permissions.
    init(_ configuration: ControlConfiguration) throws(ChangeError) {
        let path = configuration.socket
        do throws(SystemError) {
            guard var address = UnixAddress(path) else { throw SystemError(number: ENAMETOOLONG) }
            let type = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)
            try Self.removeStale(path, &address)
            let listener = try Self.check(socket(AF_UNIX, type, 0))
            do throws(SystemError) {
                // The file gets the permissions of the descriptor, so nobody can use it before they are right.
                try Self.check(fchmod(listener, 0))
                try Self.check(unsafe address.withPointer { unsafe bind(listener, $0, $1) })
                if let group = configuration.group.flatMap(GroupDatabase.identifier) {
                    try Self.check(unsafe chown(path, uid_t.max, group))
                }
                try Self.check(unsafe chmod(path, mode_t(configuration.effectiveMode)))
                try Self.check(listen(listener, 16))
                identity = try FileStatus.of(path).get().identity
            } catch {
                close(listener)
                throw error
            }
            descriptor = listener
            self.path = path
        } catch {
            throw ChangeError(
                text: error.number == EADDRINUSE
                    ? "Another process listens at the control socket \(path); stop it, or choose another path."
                    : "The control socket \(path) cannot be made: \(error.text).")
        }
    }

    /// Removes the file, unless somebody has put another one there.
    func removeFile() {
        guard case .success(let status) = FileStatus.of(path), status.identity == identity else { return }
        unsafe unlink(path)
    }

    private static func removeStale(_ path: String, _ address: inout UnixAddress) throws(SystemError) {
        guard case .success(let status) = FileStatus.of(path) else { return }
        guard status.kind == .socket else { throw SystemError(number: ENOTSOCK) }
        let probe = try check(socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0))
        defer { close(probe) }
        let connected = unsafe address.withPointer { unsafe connect(probe, $0, $1) } == 0
        guard !connected, errno == ECONNREFUSED else { throw SystemError(number: EADDRINUSE) }
        unsafe unlink(path)
    }

    @discardableResult
    private static func check(_ result: Int32) throws(SystemError) -> Int32 {
        if result < 0 { throw .last }
        return result
    }
}

/// Who is at the other end of a Unix socket, by the kernel's word.
struct PeerCredentials: Equatable, Sendable {
    var user: uid_t
    /// The peer's own group and those that it is in beside it.
    var groups: [gid_t]

    /// The peer of a connected socket; `nil` if the kernel does not say.
    init?(descriptor: Int32) {
        // struct ucred of <sys/socket.h>, which Swift does not import.
        var credentials: (process: Int32, user: UInt32, group: UInt32) = (0, 0, 0)
        var length = socklen_t(MemoryLayout.size(ofValue: credentials))
        guard unsafe getsockopt(descriptor, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0 else { return nil }
        user = credentials.user
        groups = [credentials.group] + Self.moreGroups(descriptor)
    }

    init(user: uid_t, groups: [gid_t]) {
        self.user = user
        self.groups = groups
    }

    private static func moreGroups(_ descriptor: Int32) -> [gid_t] {
        // NGROUPS_MAX of Linux.
        var groups = [gid_t](repeating: 0, count: 65_536)
        let size = MemoryLayout<gid_t>.stride
        var length = socklen_t(groups.count * size)
        let peerGroups: Int32 = 59  // SO_PEERGROUPS of <asm/socket.h>
        guard unsafe getsockopt(descriptor, SOL_SOCKET, peerGroups, &groups, &length) == 0 else { return [] }
        return Array(groups.prefix(Int(length) / size))
    }

    /// Whether the peer may manage this daemon: root, the daemon's own user, and members of the configured group.
    func mayManage(owner: uid_t, group: gid_t?) -> Bool {
        user == 0 || user == owner || group.map(groups.contains) ?? false
    }
}
