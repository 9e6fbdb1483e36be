// XenStore: what the control plane needs of xenstore, whoever answers.
//
// Called by: XenControl and the toolstack commands, on a control thread: every call may block.
// Must not know: vscsi. The implementation over libxenstore is XenStoreClient; tests have one in memory.

/// A transaction of a `XenStore`, or none.
struct XenTransaction: Hashable, Sendable {
    let identifier: UInt32

    /// Outside any transaction.
    static let none = XenTransaction(identifier: 0)
}

/// A change under a watched path.
struct XenWatchEvent: Equatable, Sendable {
    /// The node that changed: the watched one or one below it.
    let path: String
    /// What the watch was set with.
    let token: String
}

/// Why xenstore did not do something.
struct XenStoreError: Error, Equatable, CustomStringConvertible {
    /// What was asked.
    let operation: String
    /// The node.
    let path: String
    /// errno.
    let code: Int32

    var description: String { "xenstore \(operation) of \(path) failed: errno \(code)" }
}

/// A tree of small strings that the domains of a host share, with transactions and watches.
protocol XenStore: AnyObject {
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
    func transact(_ body: (XenTransaction) throws(XenStoreError) -> Void) throws(XenStoreError) {
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
