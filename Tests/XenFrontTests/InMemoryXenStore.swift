// InMemoryXenStore: xenstore as a dictionary, with transactions that conflict, watches that fire once at once and then
// for each change at or below their node, and permissions that are kept.
//
// Called by: the tests. Must not know: vscsi.

@testable import XenFront
@testable import Xenbus

/// What a store holds: the value of each node by its path.
struct StoreTree: Hashable {
    var nodes: [String: String] = [:]

    subscript(path: String) -> String? { nodes[path] }

    mutating func write(_ path: String, _ value: String) {
        nodes[path] = value
        var parent = path
        while let slash = parent.lastIndex(of: "/"), slash != parent.startIndex {
            parent = String(parent[..<slash])
            if nodes[parent] == nil { nodes[parent] = "" }
        }
    }

    mutating func remove(_ path: String) {
        nodes = nodes.filter { $0.key != path && !$0.key.hasPrefix(path + "/") }
    }

    func children(_ path: String) -> [String]? {
        guard nodes[path] != nil else { return nil }
        let prefix = path + "/"
        var names: Set<String> = []
        for key in nodes.keys where key.hasPrefix(prefix) {
            names.insert(String(key.dropFirst(prefix.count).prefix { $0 != "/" }))
        }
        return names.sorted()
    }
}

final class InMemoryXenStore: XenStore {
    private struct OpenTransaction {
        let began: StoreTree
        var tree: StoreTree
        var changes: [(path: String, value: String?)] = []
        /// Whether somebody else has changed anything since.
        var overtaken = false
    }

    private(set) var tree: StoreTree
    private(set) var permissions: [String: (owner: UInt16, reader: UInt16)] = [:]
    private(set) var watches: [(path: String, token: String)] = []
    private var events: [XenWatchEvent] = []
    private var transactions: [UInt32: OpenTransaction] = [:]
    private var nextIdentifier: UInt32 = 1
    /// Nodes that may not be read.
    var unreadable: Set<String> = []
    /// Called when a transaction is about to be committed: what another client does at that moment.
    var interference: (() -> Void)?

    init(_ tree: StoreTree = StoreTree()) { self.tree = tree }

    private func view(_ transaction: XenTransaction) -> StoreTree {
        transaction == .none ? tree : transactions[transaction.identifier]!.tree
    }

    func read(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> String? {
        unreadable.contains(path) ? nil : view(transaction)[path]
    }

    func exists(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> Bool {
        view(transaction)[path] != nil
    }

    func children(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) -> [String]? {
        view(transaction).children(path)
    }

    func write(_ path: String, _ value: String, _ transaction: XenTransaction) throws(XenStoreError) {
        change(path, value, transaction)
    }

    func remove(_ path: String, _ transaction: XenTransaction) throws(XenStoreError) {
        if view(transaction)[path] != nil { change(path, nil, transaction) }
    }

    func setPermissions(_ path: String, owner: UInt16, reader: UInt16, _ transaction: XenTransaction)
        throws(XenStoreError)
    {
        guard view(transaction)[path] != nil else {
            throw XenStoreError(operation: "set permissions", path: path, code: 2)
        }
        permissions[path] = (owner, reader)
    }

    private func change(_ path: String, _ value: String?, _ transaction: XenTransaction) {
        guard transaction != .none else {
            apply(path, value)
            for identifier in transactions.keys { transactions[identifier]!.overtaken = true }
            return
        }
        transactions[transaction.identifier]!.changes.append((path, value))
        if let value {
            transactions[transaction.identifier]!.tree.write(path, value)
        } else {
            transactions[transaction.identifier]!.tree.remove(path)
        }
    }

    private func apply(_ path: String, _ value: String?) {
        if let value { tree.write(path, value) } else { tree.remove(path) }
        for watch in watches {
            if path == watch.path || path.hasPrefix(watch.path + "/") {
                events.append(XenWatchEvent(path: path, token: watch.token))
            } else if value == nil && watch.path.hasPrefix(path + "/") {
                // The watched node went away with its parent.
                events.append(XenWatchEvent(path: watch.path, token: watch.token))
            }
        }
    }

    func begin() throws(XenStoreError) -> XenTransaction {
        let identifier = nextIdentifier
        nextIdentifier += 1
        transactions[identifier] = OpenTransaction(began: tree, tree: tree)
        return XenTransaction(identifier: identifier)
    }

    func commit(_ transaction: XenTransaction) throws(XenStoreError) -> Bool {
        if let interference {
            self.interference = nil
            interference()
        }
        let open = transactions.removeValue(forKey: transaction.identifier)!
        if open.overtaken { return false }
        for (path, value) in open.changes { apply(path, value) }
        if !open.changes.isEmpty { for identifier in transactions.keys { transactions[identifier]!.overtaken = true } }
        return true
    }

    func abandon(_ transaction: XenTransaction) { transactions[transaction.identifier] = nil }

    func watch(_ path: String, token: String) throws(XenStoreError) {
        watches.append((path, token))
        events.append(XenWatchEvent(path: path, token: token))
    }

    func unwatch(_ path: String, token: String) { watches.removeAll { $0.path == path && $0.token == token } }

    func nextEvent() -> XenWatchEvent? { events.isEmpty ? nil : events.removeFirst() }

    /// Removes nodes without an event, as if nobody had been allowed to watch them.
    func removeSilently(_ path: String) { tree.remove(path) }

    /// Fires a special watch such as @releaseDomain.
    func fire(_ special: String) {
        for watch in watches where watch.path == special {
            events.append(XenWatchEvent(path: special, token: watch.token))
        }
    }
}
