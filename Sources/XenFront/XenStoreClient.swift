// XenStoreClient: xenstore through libxenstore.
//
// Owns: one connection to xenstored. Called by: the control thread, which is the only one that uses the connection.
// Must not know: vscsi.

import CXen
import Glibc

/// A connection to xenstored.
@safe
final class XenStoreClient: XenStore {
    private let connection: OpaquePointer

    /// Connects.
    init() throws(XenStoreError) {
        guard let connection = unsafe xs_open(0) else {
            throw XenStoreError(operation: "open", path: "xenstored", code: errno)
        }
        unsafe self.connection = connection
    }

    deinit { unsafe xs_close(connection) }

    /// Readable when there is a watch event.
    var descriptor: Int32 { unsafe xs_fileno(connection) }

    func read(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> String? {
        var length: UInt32 = 0
        guard let value = unsafe xs_read(connection, transaction.identifier, path, &length) else {
            return try absent("read", path)
        }
        defer { unsafe free(value) }
        return unsafe String(decoding: UnsafeRawBufferPointer(start: value, count: Int(length)), as: UTF8.self)
    }

    func exists(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> Bool {
        var length: UInt32 = 0
        guard let value = unsafe xs_read(connection, transaction.identifier, path, &length) else {
            if errno == EACCES { return true }
            let none: Bool? = try absent("read", path)
            return none ?? false
        }
        unsafe free(value)
        return true
    }

    func children(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> [String]? {
        var count: UInt32 = 0
        guard let names = unsafe xs_directory(connection, transaction.identifier, path, &count) else {
            return try absent("directory", path)
        }
        defer { unsafe free(names) }
        return (0..<Int(count)).compactMap { unsafe names[$0].map { unsafe String(cString: $0) } }
    }

    func write(_ path: String, _ value: String, _ transaction: XenTransaction) throws(XenStoreError) {
        let length = UInt32(value.utf8.count)
        try check(unsafe xs_write(connection, transaction.identifier, path, value, length), "write", path)
    }

    func remove(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) {
        let removed = unsafe xs_rm(connection, transaction.identifier, path)
        if !removed && errno == ENOENT { return }
        try check(removed, "rm", path)
    }

    func setPermissions(_ path: String, owner: UInt16, reader: UInt16, _ transaction: XenTransaction)
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

    func begin() throws(XenStoreError) -> XenTransaction {
        let identifier = unsafe xs_transaction_start(connection)
        try check(identifier != 0, "transaction start", "")
        return XenTransaction(identifier: identifier)
    }

    func commit(_ transaction: XenTransaction) throws(XenStoreError) -> Bool {
        if unsafe xs_transaction_end(connection, transaction.identifier, false) { return true }
        if errno == EAGAIN { return false }
        throw XenStoreError(operation: "transaction end", path: "", code: errno)
    }

    func abandon(_ transaction: XenTransaction) {
        _ = unsafe xs_transaction_end(connection, transaction.identifier, true)
    }

    func watch(_ path: String, token: String) throws(XenStoreError) {
        try check(unsafe xs_watch(connection, path, token), "watch", path)
    }

    func unwatch(_ path: String, token: String) { _ = unsafe xs_unwatch(connection, path, token) }

    func nextEvent() -> XenWatchEvent? {
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
