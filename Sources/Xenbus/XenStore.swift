// XenStore: what the control plane needs of xenstore, whoever answers.
//
// Called by: the Xen front and the toolstack, on a control thread: every call may block.
// Must not know: vscsi. The implementation over libxenstore is XenStoreClient; tests have one in memory.

import Glibc

/// A transaction of a `XenStore`, or none.
package struct XenTransaction: Hashable, Sendable {
    package let identifier: UInt32

    package init(identifier: UInt32) { self.identifier = identifier }

    /// Outside any transaction.
    package static let none = XenTransaction(identifier: 0)
}

/// A change under a watched path.
package struct XenWatchEvent: Equatable, Sendable {
    /// The node that changed: the watched one or one below it.
    package let path: String
    /// What the watch was set with.
    package let token: String

    package init(path: String, token: String) {
        self.path = path
        self.token = token
    }
}

/// Why xenstore did not do something.
package struct XenStoreError: Error, Equatable, CustomStringConvertible {
    /// What was asked.
    package let operation: String
    /// The node.
    package let path: String
    /// errno.
    package let code: Int32

    package init(operation: String, path: String, code: Int32) {
        self.operation = operation
        self.path = path
        self.code = code
    }

    package var description: String {
        let place = path.isEmpty ? "" : " of \(path)"
        return unsafe "xenstore: \(operation)\(place) failed: \(String(cString: strerror(code)))"
    }
}

/// A tree of small strings that the domains of a host share, with transactions and watches.
package protocol XenStore: AnyObject {
    /// The value of a node; `nil` if there is none or it may not be read.
    func read(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> String?
    /// Whether there is a node, readable or not.
    func exists(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> Bool
    /// The names below a node; `nil` if there is no such node or it may not be read.
    func children(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> [String]?
    /// Sets a node, and creates it and its parents where they do not exist.
    func write(_ path: String, _ value: String, _ transaction: XenTransaction) throws(XenStoreError)
    /// Removes a node and all below it; no error if there is none.
    func remove(_ path: String, _ transaction: XenTransaction) throws(XenStoreError)
    /// Makes `owner` the owner of a node and lets `reader` read it.
    func setPermissions(_ path: String, owner: UInt16, reader: UInt16, _ transaction: XenTransaction)
        throws(XenStoreError)
    func begin() throws(XenStoreError) -> XenTransaction
    /// Makes the changes visible, all at once.
    ///
    /// - Returns: `false` if somebody changed what the transaction has read: nothing was done, do it all again.
    func commit(_ transaction: XenTransaction) throws(XenStoreError) -> Bool
    func abandon(_ transaction: XenTransaction)
    /// Reports each change at or below `path` from now on, and one event at once.
    func watch(_ path: String, token: String) throws(XenStoreError)
    func unwatch(_ path: String, token: String)
    /// The next event, if one is there.
    func nextEvent() -> XenWatchEvent?
}

extension XenStore {
    /// Runs `body` in a transaction, again while somebody interferes.
    package func transact(_ body: (XenTransaction) throws(XenStoreError) -> Void) throws(XenStoreError) {
        while true {
            let transaction = try begin()
            do throws(XenStoreError) { try body(transaction) } catch {
                abandon(transaction)
                throw error
            }
            if try commit(transaction) { return }
        }
    }
}
