// OperationLog: the operations that wait, those that are under way, and those that have ended lately.
//
// Called by: the daemon. Must not know: what an operation does.

import ControlAPI

/// What can be told of operations.
struct OperationLog {
    /// Operations that have ended and are kept.
    static let kept = 64

    private(set) var operations: [OperationStatus] = []
    private var last: UInt64 = 0
    /// The one whose turn it is, if any: only it makes changes one after another.
    private var current: UInt64?

    /// A new operation, which waits for its turn.
    mutating func add(_ what: String) -> UInt64 {
        last += 1
        operations.append(OperationStatus(id: last, what: what))
        return last
    }

    /// - Parameter hasTurn: Whether it is the only one that does; others act beside it.
    mutating func begin(_ id: UInt64, hasTurn: Bool) {
        if hasTurn { current = id }
        update(id) { $0.state = "running" }
    }

    /// The operation whose turn it is has made so many of its changes.
    mutating func progress(_ done: Int, of total: Int) {
        guard let current else { return }
        update(current) { ($0.done, $0.total) = (done, total) }
    }

    mutating func end(_ id: UInt64, failure: String?) {
        if current == id { current = nil }
        update(id) {
            $0.state = failure == nil ? "done" : "failed"
            $0.message = failure
        }
        let ended = operations.indices.filter { ["done", "failed"].contains(operations[$0].state) }
        if ended.count > Self.kept { operations.remove(at: ended[0]) }
    }

    private mutating func update(_ id: UInt64, _ change: (inout OperationStatus) -> Void) {
        guard let index = operations.firstIndex(where: { $0.id == id }) else { return }
        change(&operations[index])
    }
}
