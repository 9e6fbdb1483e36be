// TaskSet: the tasks of one logical unit in order of arrival, which of them may be enabled (SAM-6 clause 8), and the
// auto contingent allegiance conditions that block them (SAM-6 5.9).
//
// Owns: the order, the counters, which nexuses are faulted. Called by: LogicalUnit, TaskManager. Must not know: what
// enabling means, who asks.

import CTarget

/// Where a task that has just arrived stands.
enum TaskSetEntry {
    /// It may be carried out at once.
    case enabled
    /// It is dormant until `nextEnabled` finds it.
    case dormant
    /// It ends: it must not be repeated (`TaskHandle.mustNotBeRepeated`), or has the ACA attribute, and there is no ACA
    /// condition on its nexus (SAM-6 8.6.5).
    case unwanted
}

/// The tasks of one logical unit: one task set, or one for each I_T nexus (TST). Pure: it returns verdicts and calls
/// nobody.
struct TaskSet: ~Copyable {
    private(set) var first: TaskHandle?
    private var last: TaskHandle?
    /// Tasks in the set.
    private(set) var count = 0
    /// How many tasks may be in the set for `insert` to be the way in: 0 while one task more needs a closer look
    /// (`insertWithCare`).
    private(set) var ordinaryLimit: Int
    private let limit: Int
    /// Tasks that wait for older ones or for an ACA condition to be cleared.
    private(set) var waiting = 0
    /// Of them, the blocked ones.
    private var blocked = 0
    private var ordered = 0
    private var headOfQueue = 0
    private var filter = ExtentFilter()

    /// TST is 001b: each nexus has a task set of its own (SPC-4 7.5.8). Set by the unit's mode pages.
    var isSeparate = false { didSet { refreshLimit() } }
    /// QUEUE ALGORITHM MODIFIER is zero.
    var isRestricted = true
    /// The faulted nexuses: on which an ACA condition is in effect, as a bit mask by index (there are
    /// `Limits.nexusesPerTarget`, 64). Several only if each nexus has its own task set, or had.
    private(set) var faulted: UInt64 = 0

    /// - Parameter limit: How many tasks come in without a closer look.
    init(limit: Int) {
        self.limit = limit
        ordinaryLimit = limit
    }

    private mutating func refreshLimit() {
        ordinaryLimit = isSeparate || faulted != 0 ? 0 : limit
    }

    // MARK: In and out

    /// Puts a task at the end. For a set below `ordinaryLimit`.
    @inline(__always)
    mutating func insert(_ task: TaskHandle) -> TaskSetEntry {
        let entry: TaskSetEntry =
            switch task.attribute {
            case .headOfQueue: interrupts(task) ? .dormant : .enabled
            case .simple: ordered == 0 && headOfQueue == 0 && !hazard(task) ? .enabled : .dormant
            case .ordered: count == 0 ? .enabled : .dormant
            case .aca: .unwanted
            }
        append(task)
        if case .dormant = entry { waiting += 1 }
        return entry
    }

    /// The same when an ACA condition is in effect, when each nexus has a task set of its own, when few places are
    /// left, or for a task with flags.
    mutating func insertWithCare(_ task: TaskHandle) -> TaskSetEntry {
        append(task)
        if task.mustNotBeRepeated || task.attribute == .aca && !isFaulted(task.nexus) { return .unwanted }
        if !isBlocked(task), mayRun(task) { return .enabled }
        waiting += 1
        return .dormant
    }

    /// Takes a task out, wherever it is. A waiting one is first said not to wait any more.
    @inline(__always)
    mutating func remove(_ task: TaskHandle) {
        if let previous = task.previous { previous.next = task.next } else { first = task.next }
        if let next = task.next { next.previous = task.previous } else { last = task.previous }
        task.next = nil
        task.previous = nil
        count -= 1
        switch task.attribute {
        case .ordered: ordered -= 1
        case .headOfQueue: headOfQueue -= 1
        case .simple, .aca: break
        }
        if let row = task.row { filter.count(row.serialization, task.address, task.blocks, by: -1) }
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

    // MARK: Waiting

    /// A task that was enabled is blocked.
    mutating func block() {
        waiting += 1
        blocked += 1
    }

    /// A dormant or blocked task is about to leave that state.
    mutating func stopWaiting(_ task: TaskHandle) {
        waiting -= 1
        if task.state == .blocked { blocked -= 1 }
    }

    /// The oldest task that waited and need not any more; it does not count as waiting from now on. Those whose
    /// response an ACA condition has withheld are before all others: one of them may establish the next condition.
    mutating func nextEnabled() -> TaskHandle? {
        guard waiting > 0 else { return nil }
        if blocked > 0, let task = firstWithheld() {
            stopWaiting(task)
            return task
        }
        let isOrdinary = ordinaryLimit > 0
        var cursor = first
        while let task = cursor {
            if mayGoOn(task) {
                stopWaiting(task)
                return task
            }
            // Nothing younger than an ORDERED task is enabled before it, save HEAD OF QUEUE, and what an ACA
            // condition had blocked.
            if isOrdinary, blocked == 0, headOfQueue == 0, task.attribute == .ordered { return nil }
            cursor = task.next
        }
        return nil
    }

    /// The oldest task that has only its response to give and may give it.
    private func firstWithheld() -> TaskHandle? {
        var cursor = first
        while let task = cursor {
            if task.state == .blocked, task.waitsFor == .response, !isBlocked(task) { return task }
            cursor = task.next
        }
        return nil
    }

    private func mayGoOn(_ task: TaskHandle) -> Bool {
        switch task.state {
        case .blocked: !isBlocked(task) && !meetsOtherSets(task)
        case .dormant: task.waitsFor == .order && !isBlocked(task) && mayRun(task)
        default: false
        }
    }

    // MARK: Order

    /// Whether an older task's extent stands in the way of a task that is not in the set yet.
    @inline(__always)
    private func hazard(_ task: TaskHandle) -> Bool {
        guard let row = task.row, filter.mayConflict(row.serialization, task.address, task.blocks) else { return false }
        return hazard(task, before: nil)
    }

    private func hazard(_ task: TaskHandle, before end: TaskHandle?) -> Bool {
        var cursor = first
        while let older = cursor, older != end {
            if Serialization.conflicts(younger: task, older: older, restricted: isRestricted) { return true }
            cursor = older.next
        }
        return false
    }

    /// SAM-6 8.6: a dormant SIMPLE task is enabled when no HEAD OF QUEUE and no older ORDERED task is left, an
    /// ORDERED one when no HEAD OF QUEUE and no older task at all is left. What never waits: HEAD OF QUEUE and ACA (but
    /// for what `interrupts` says), and what another nexus may do in spite of an ACA condition.
    private func mayRun(_ task: TaskHandle) -> Bool {
        switch task.attribute {
        case .headOfQueue, .aca: return !interrupts(task)
        case .simple, .ordered:
            if faulted != 0, passesACA(task) { return true }
            if isSeparate { return mayRunInOwnSet(task) }
            guard headOfQueue == 0 else { return false }
            if task.attribute == .ordered { return task.previous == nil }
            return !hasOlderOrdered(task) && !hazard(task, before: task)
        }
    }

    /// Whether a HEAD OF QUEUE or ACA task would come between the steps of a command that is at work on the same blocks
    /// and must not be interrupted, or such a command would be interrupted by what is at work. It waits for that, and
    /// for nothing that waits itself: what has begun goes on to its last step, in spite of an ACA condition, too.
    private func interrupts(_ task: TaskHandle) -> Bool {
        guard let row = task.row, filter.mayConflict(row.serialization, task.address, task.blocks) else { return false }
        let isWhole = row.flags.contains(.uninterrupted)
        var cursor = first
        while let other = cursor {
            if other != task, other.isAtWork, isWhole || other.row?.flags.contains(.uninterrupted) == true,
                Serialization.conflicts(younger: task, older: other, restricted: false)
            {
                return true
            }
            cursor = other.next
        }
        return false
    }

    private func hasOlderOrdered(_ task: TaskHandle) -> Bool {
        guard ordered > 0 else { return false }
        var cursor = task.previous
        while let older = cursor {
            if older.attribute == .ordered { return true }
            cursor = older.previous
        }
        return false
    }

    /// The same among the tasks of the task's nexus only. Tasks of other nexuses have no order to it, but on
    /// overlapping extents no two are at work at once: COMPARE AND WRITE is not interrupted by another nexus (SBC-5
    /// 5.3).
    private func mayRunInOwnSet(_ task: TaskHandle) -> Bool {
        var isOlder = true
        var cursor = first
        while let other = cursor {
            if other == task {
                isOlder = false
            } else if other.nexus == task.nexus {
                if other.attribute == .headOfQueue { return false }
                if isOlder, task.attribute == .ordered || other.attribute == .ordered { return false }
                if isOlder, Serialization.conflicts(younger: task, older: other, restricted: isRestricted) {
                    return false
                }
            }
            cursor = other.next
        }
        return !meetsOtherSets(task)
    }

    /// Whether a task of another nexus, with a task set of its own, is at work on the task's blocks.
    private func meetsOtherSets(_ task: TaskHandle) -> Bool {
        guard isSeparate else { return false }
        var cursor = first
        while let other = cursor {
            if other.nexus != task.nexus, other.isAtWork,
                Serialization.conflicts(younger: task, older: other, restricted: false)
            {
                return true
            }
            cursor = other.next
        }
        return false
    }

    // MARK: Auto contingent allegiance

    /// Whether an ACA condition is in effect on a nexus.
    func isFaulted(_ nexus: UInt16) -> Bool { faulted & Self.bit(nexus) != 0 }

    mutating func establishACA(_ nexus: UInt16) {
        faulted |= Self.bit(nexus)
        refreshLimit()
    }

    mutating func clearACA(_ nexus: UInt16) {
        faulted &= ~Self.bit(nexus)
        refreshLimit()
    }

    mutating func clearAllACA() {
        faulted = 0
        refreshLimit()
    }

    private static func bit(_ nexus: UInt16) -> UInt64 { 1 << UInt64(nexus) }

    /// Whether an ACA condition keeps a task from starting and from ending (SAM-6 5.9.2): all tasks of the task set
    /// but those that recover from it.
    func isBlocked(_ task: TaskHandle) -> Bool {
        guard faulted & (isSeparate ? Self.bit(task.nexus) : .max) != 0 else { return false }
        return !(task.attribute == .aca && isFaulted(task.nexus) || passesACA(task))
    }

    private func passesACA(_ task: TaskHandle) -> Bool {
        task.row?.flags.contains(.passesACA) == true && !isFaulted(task.nexus)
    }

    /// With what status an ACA condition keeps a task out of the task set (SAM-6 5.9.3, 5.9.4); `nil` if it does not.
    ///
    /// - Parameter functionsOnly: TMF_ONLY of the control mode page.
    func refusal(of task: TaskHandle, functionsOnly: Bool) -> SCSIStatus? {
        guard faulted != 0 else { return nil }
        if isFaulted(task.nexus) {
            let admitted = task.attribute == .aca && !functionsOnly && !hasACATask(of: task.nexus)
            return admitted ? nil : .acaActive
        }
        if isSeparate || passesACA(task) { return nil }
        return task.attribute == .aca || task.hasNACA ? .acaActive : .busy
    }

    private func hasACATask(of nexus: UInt16) -> Bool {
        var cursor = first
        while let task = cursor {
            if task.nexus == nexus, task.attribute == .aca { return true }
            cursor = task.next
        }
        return false
    }
}

extension TaskHandle {
    /// Whether the task's command is being carried out, so that another one on the same blocks would meet it.
    fileprivate var isAtWork: Bool {
        switch state {
        case .enabled, .transferring, .settling: true
        case .dormant: waitsFor != .order
        case .blocked, .free, .received, .completing: false
        }
    }

    /// The bit of the CONTROL byte that asks for an ACA condition (SAM-6 5.2).
    static var nacaBit: UInt8 { 0x04 }

    /// NACA of the command's CONTROL byte, whose place the operation code tells (SPC-4: CDB formats).
    var hasNACA: Bool {
        let cdb = CDB(self)
        let offset: Int
        switch cdb[0] >> 5 {
        case 0: offset = 5
        case 1, 2: offset = 9
        case 3 where cdb[0] == 0x7f: offset = 1
        case 4: offset = 15
        case 5: offset = 11
        default: return false
        }
        // Behind what the initiator has sent lies what an earlier command has left.
        return unsafe offset < Int(command.cdb_length) && cdb[offset] & Self.nacaBit != 0
    }
}
