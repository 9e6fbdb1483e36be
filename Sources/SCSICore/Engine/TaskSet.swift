// TaskSet: the tasks of one logical unit in order of arrival, and which of them may be enabled (SAM-6 clause 8).
//
// Owns: the order and the counters. Called by: LogicalUnit, TaskManager. Must not know: what enabling means, who asks.

/// One task set. Pure: it returns verdicts and calls nobody.
struct TaskSet: ~Copyable {
    private(set) var first: TaskHandle?
    private var last: TaskHandle?
    /// Tasks in the set.
    private(set) var count = 0
    /// Of them, those that wait for older ones.
    private(set) var dormant = 0
    private var ordered = 0
    private var headOfQueue = 0
    private var filter = ExtentFilter()

    /// Puts a task at the end.
    ///
    /// - Returns: Whether it may be enabled at once; otherwise it is dormant until `nextEnabled` finds it.
    @inline(__always)
    mutating func insert(_ task: TaskHandle) -> Bool {
        let mayRun =
            switch task.attribute {
            case .headOfQueue: true
            case .simple, .aca: ordered == 0 && headOfQueue == 0 && !hazard(task)
            case .ordered: count == 0
            }
        append(task)
        if !mayRun { dormant += 1 }
        return mayRun
    }

    /// Takes a task out, wherever it is.
    @inline(__always)
    mutating func remove(_ task: TaskHandle, wasDormant: Bool) {
        if let previous = task.previous { previous.next = task.next } else { first = task.next }
        if let next = task.next { next.previous = task.previous } else { last = task.previous }
        task.next = nil
        task.previous = nil
        count -= 1
        if wasDormant { dormant -= 1 }
        switch task.attribute {
        case .ordered: ordered -= 1
        case .headOfQueue: headOfQueue -= 1
        case .simple, .aca: break
        }
        if let row = task.row { filter.count(row.serialization, task.address, task.blocks, by: -1) }
    }

    /// The oldest task that waits for others and need not any more; it counts as enabled from now on.
    mutating func nextEnabled() -> TaskHandle? {
        guard dormant > 0 else { return nil }
        var cursor = first
        while let task = cursor {
            if task.state == .dormant, task.waitsFor == .order, mayRun(task) {
                dormant -= 1
                return task
            }
            // Nothing younger than an ORDERED task is enabled before it, save HEAD OF QUEUE, which never waits.
            if task.attribute == .ordered { return nil }
            cursor = task.next
        }
        return nil
    }

    @inline(__always)
    private mutating func append(_ task: TaskHandle) {
        task.previous = last
        task.next = nil
        if let last { last.next = task } else { first = task }
        last = task
        count += 1
        switch task.attribute {
        case .ordered: ordered += 1
        case .headOfQueue: headOfQueue += 1
        case .simple, .aca: break
        }
        if let row = task.row { filter.count(row.serialization, task.address, task.blocks, by: 1) }
    }

    /// Whether an older task's extent stands in the way of a task that is not in the set yet.
    @inline(__always)
    private func hazard(_ task: TaskHandle) -> Bool {
        guard let row = task.row, filter.mayConflict(row.serialization, task.address, task.blocks) else { return false }
        return hazard(task, before: nil)
    }

    private func hazard(_ task: TaskHandle, before end: TaskHandle?) -> Bool {
        var cursor = first
        while let older = cursor, older != end {
            if Serialization.conflicts(younger: task, older: older) { return true }
            cursor = older.next
        }
        return false
    }

    /// SAM-6 8.7: a dormant SIMPLE task is enabled when no HEAD OF QUEUE and no older ORDERED task is left, an
    /// ORDERED one when no HEAD OF QUEUE and no older task at all is left.
    private func mayRun(_ task: TaskHandle) -> Bool {
        guard headOfQueue == 0 else { return false }
        return task.attribute == .ordered ? task.previous == nil : !hazard(task, before: task)
    }
}
