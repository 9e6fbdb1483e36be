// XenStoreClient: xenstore through libxenstore.
//
// Owns: one connection to xenstored. Called by: the thread that made it, which is the only one that uses it.
// Must not know: vscsi.

import CXenStore
import Glibc

/// A connection to xenstored.
@safe
package final class XenStoreClient: XenStore {
    private let connection: OpaquePointer

    /// Connects. In the domain that has xenstored, only if it answers at its socket: the library would go on to the
    /// kernel's way, and wait there, for ever if need be, until there is a xenstored.
    package init() throws(XenStoreError) {
        if Self.isControlDomain { try Self.probe() }
        guard let connection = unsafe xs_open(0) else {
            throw XenStoreError(operation: "connect", path: "", code: errno)
        }
        unsafe self.connection = connection
    }

    deinit { unsafe xs_close(connection) }

    private static var isControlDomain: Bool {
        let file = unsafe open("/proc/xen/capabilities", O_RDONLY | O_CLOEXEC)
        guard file >= 0 else { return false }
        defer { close(file) }
        var bytes = [UInt8](repeating: 0, count: 64)
        let count = unsafe Glibc.read(file, &bytes, bytes.count)
        return count > 0 && String(decoding: bytes.prefix(count), as: UTF8.self).contains("control_d")
    }

    /// Tries whether anybody listens at xenstored's socket.
    private static func probe() throws(XenStoreError) {
        let path = unsafe String(cString: xs_daemon_socket())
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        unsafe withUnsafeMutableBytes(of: &address.sun_path) {
            unsafe $0.copyBytes(from: path.utf8.prefix($0.count - 1))
        }
        let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        defer { close(descriptor) }
        let connected = unsafe withUnsafePointer(to: &address) {
            unsafe connect(
                descriptor, UnsafeRawPointer($0).assumingMemoryBound(to: sockaddr.self),
                socklen_t(MemoryLayout<sockaddr_un>.size))
        }
        let code = errno
        if connected != 0 { throw XenStoreError(operation: "connect", path: path, code: code) }
    }

    /// The domain that this program runs in.
    package func ownDomain() throws(XenStoreError) -> UInt16 {
        let node = try read("domid", .none)
        guard let domain = node.flatMap({ decimal($0) }).flatMap({ UInt16(exactly: $0) }) else {
            throw XenStoreError(operation: "reading our domain's number", path: "domid", code: ENOENT)
        }
        return domain
    }

    /// Whether xenstored still answers.
    package var isAlive: Bool {
        do throws(XenStoreError) {
            _ = try read("domid", .none)
            return true
        } catch {
            return false
        }
    }

    /// Waits for a watch event.
    ///
    /// - Returns: Whether there is one, or the connection has ended.
    package func waitForEvent(milliseconds: Int32) -> Bool {
        var waited = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        return unsafe poll(&waited, 1, milliseconds) > 0
    }

    /// Readable when there is a watch event.
    package var descriptor: Int32 { unsafe xs_fileno(connection) }

    package func read(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> String? {
        var length: UInt32 = 0
        guard let value = unsafe xs_read(connection, transaction.identifier, path, &length) else {
            return try absent("read", path)
        }
        defer { unsafe free(value) }
        return unsafe String(decoding: UnsafeRawBufferPointer(start: value, count: Int(length)), as: UTF8.self)
    }

    package func exists(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> Bool {
        var length: UInt32 = 0
        guard let value = unsafe xs_read(connection, transaction.identifier, path, &length) else {
            if errno == EACCES { return true }
            let none: Bool? = try absent("read", path)
            return none ?? false
        }
        unsafe free(value)
        return true
    }

    package func children(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> [String]? {
        var count: UInt32 = 0
        guard let names = unsafe xs_directory(connection, transaction.identifier, path, &count) else {
            return try absent("directory", path)
        }
        defer { unsafe free(names) }
        return (0..<Int(count)).compactMap { unsafe names[$0].map { unsafe String(cString: $0) } }
    }

    package func write(_ path: String, _ value: String, _ transaction: XenTransaction) throws(XenStoreError) {
        let length = UInt32(value.utf8.count)
        try check(unsafe xs_write(connection, transaction.identifier, path, value, length), "write", path)
    }

    package func remove(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) {
        let removed = unsafe xs_rm(connection, transaction.identifier, path)
        if !removed && errno == ENOENT { return }
        try check(removed, "rm", path)
    }

    package func setPermissions(_ path: String, owner: UInt16, reader: UInt16, _ transaction: XenTransaction)
        throws(XenStoreError)
    {
        var permissions = [xs_permissions(), xs_permissions()]
        permissions[0].id = UInt32(owner)
        permissions[0].perms = UInt32(XS_PERM_NONE)
        permissions[1].id = UInt32(reader)
        permissions[1].perms = UInt32(XS_PERM_READ)
        let set = unsafe xs_set_permissions(connection, transaction.identifier, path, &permissions, 2)
        try check(set, "set permissions", path)
    }

    package func begin() throws(XenStoreError) -> XenTransaction {
        let identifier = unsafe xs_transaction_start(connection)
        try check(identifier != 0, "transaction start", "")
        return XenTransaction(identifier: identifier)
    }

    package func commit(_ transaction: XenTransaction) throws(XenStoreError) -> Bool {
        if unsafe xs_transaction_end(connection, transaction.identifier, false) { return true }
        if errno == EAGAIN { return false }
        throw XenStoreError(operation: "transaction end", path: "", code: errno)
    }

    package func abandon(_ transaction: XenTransaction) {
        _ = unsafe xs_transaction_end(connection, transaction.identifier, true)
    }

    package func watch(_ path: String, token: String) throws(XenStoreError) {
        try check(unsafe xs_watch(connection, path, token), "watch", path)
    }

    package func unwatch(_ path: String, token: String) { _ = unsafe xs_unwatch(connection, path, token) }

    package func nextEvent() -> XenWatchEvent? {
        guard let strings = unsafe xs_check_watch(connection) else { return nil }
        defer { unsafe free(strings) }
        guard let path = unsafe strings[0], let token = unsafe strings[1] else { return nil }
        return unsafe XenWatchEvent(path: String(cString: path), token: String(cString: token))
    }

    /// `nil` for a node that does not exist or may not be read; anything else is an error.
    private func absent<Value>(_ operation: String, _ path: String) throws(XenStoreError) -> Value? {
        let code = errno
        if code == ENOENT || code == EACCES || code == EINVAL { return nil }
        throw XenStoreError(operation: operation, path: path, code: code)
    }

    private func check(_ succeeded: Bool, _ operation: String, _ path: String) throws(XenStoreError) {
        if !succeeded { throw XenStoreError(operation: operation, path: path, code: errno) }
    }
}
