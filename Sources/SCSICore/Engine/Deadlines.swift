// Deadlines: commands that take too long: when that is, what becomes of them, and which is the oldest.
//
// Called by: LogicalUnit (a task arrives), the driver of the shard (time has passed), the control plane (what is
// stuck). Must not know: transports, backstores, timers.
//
// A task's deadline is its transport's (scsi_command.timeout_milliseconds), else the logical unit's. Nothing is set up
// for a task but one comparison: the unit keeps the earliest deadline there may be, and looks at its tasks when that
// has come. Docs/decisions/0006 says why a task whose data is under way ends only when the backstore lets go of it.

import CTarget

/// A task that has not been completed, as people look for what is stuck.
public struct TaskInFlight: Sendable, Equatable {
    /// Where it is.
    public enum Place: String, Sendable {
        /// It waits for others: task attributes, or an overlapping extent; or an ACA condition blocks it.
        case waiting
        /// It waits for a staging buffer or for room in the backstore.
        case waitingForResource
        /// The backstore has its request.
        case backstore
        /// What it changes of the unit's persistent state is being saved.
        case stateStore
    }

    /// Nanoseconds since it arrived.
    public let age: UInt64
    /// The name of the initiator port that sent it.
    public let initiatorPort: String
    /// Its command identifier.
    public let tag: UInt64
    /// The first byte of its CDB.
    public let operationCode: UInt8
    /// The first logical block that it names; 0 if it names none.
    public let address: UInt64
    /// How many logical blocks it names.
    public let blocks: UInt64
    /// Where it is.
    public let place: Place
    /// Whether its deadline has passed: it was cancelled, and the backstore has not let go of it.
    public let hasExpired: Bool

    /// A description of these values.
    public init(
        age: UInt64, initiatorPort: String, tag: UInt64, operationCode: UInt8, address: UInt64, blocks: UInt64,
        place: Place, hasExpired: Bool
    ) {
        self.age = age
        self.initiatorPort = initiatorPort
        self.tag = tag
        self.operationCode = operationCode
        self.address = address
        self.blocks = blocks
        self.place = place
        self.hasExpired = hasExpired
    }
}

extension SenseData {
    /// A command that missed its deadline: LOGICAL UNIT COMMUNICATION TIME-OUT. Not COMMAND TIMEOUT DURING PROCESSING
    /// (2E/02), which answers a command duration limit that the initiator asked for (SPC-6: command duration limits),
    /// and for which Linux gives the command up without a retry.
    static var commandTimeout: SenseData { SenseData(.abortedCommand, .logicalUnitCommunicationTimeOut) }
}

extension TaskHandle {
    /// When the task is too late, in nanoseconds of the shard's clock; `nil`: never.
    @inline(__always)
    func deadline(commandTimeout: UInt64) -> UInt64? {
        let own = unsafe UInt64(command.timeout_milliseconds) &* 1_000_000
        let timeout = own != 0 ? own : commandTimeout
        return timeout == 0 ? nil : receivedAt &+ timeout
    }
}

/// What a logical unit keeps of the deadlines of its tasks.
struct UnitDeadlines {
    /// The deadline of a command for which the transport gives none, in nanoseconds from its arrival; 0: none.
    var commandTimeout: UInt64
    /// No deadline of a task in the set is before this; `.max` if none has one.
    var earliest = UInt64.max

    @inline(__always)
    mutating func arrived(_ task: TaskHandle) {
        guard let deadline = task.deadline(commandTimeout: commandTimeout) else { return }
        if deadline < earliest { earliest = deadline }
    }
}

extension LogicalUnit {
    /// The deadline of a command for which the transport gives none, in nanoseconds from its arrival; 0: none. A new
    /// value holds for the commands that are here already, too.
    public var commandTimeout: UInt64 {
        get { unsafe deadlines.pointee.commandTimeout }
        set {
            // The next look at the tasks finds out what their deadlines are now.
            unsafe deadlines.pointee = UnitDeadlines(commandTimeout: newValue, earliest: 0)
        }
    }

    /// Ends what is too late: a task that waits at once, one that the backstore has when the backstore lets go of it,
    /// for which it is asked. What an ACA condition blocks is left until the initiator has cleared that.
    func expireDeadlines() {
        let now = shard.clock
        guard unsafe deadlines.pointee.earliest <= now else { return }
        var earliest = UInt64.max
        var waits = false
        var cursor = unsafe tasks.pointee.first
        while let task = cursor {
            cursor = task.next
            guard let deadline = openDeadline(of: task) else { continue }
            if deadline > now {
                earliest = min(earliest, deadline)
            } else if task.state == .dormant || task.state == .blocked {
                waits = true
            } else {
                expire(task)
                if task.state == .transferring { unsafe backstore.cancel(unsafe task.request) }
            }
        }
        unsafe deadlines.pointee.earliest = earliest
        let nextRetry = min(retryFailed(), retryFlush())
        unsafe deadlines.pointee.earliest = min(deadlines.pointee.earliest, nextRetry)
        if waits { expireWaiting(now) }
    }

    /// Ends the waiting tasks whose deadline has come. One of them may establish an ACA condition, which blocks the
    /// others (SAM-6 5.9.2: a blocked command does not end).
    private func expireWaiting(_ now: UInt64) {
        endDormant(.failed(.commandTimeout)) { task in
            guard let deadline = openDeadline(of: task), deadline <= now, unsafe !tasks.pointee.isBlocked(task) else {
                return false
            }
            expire(task)
            return true
        }
        if unsafe tasks.pointee.faulted != 0 {
            unsafe deadlines.pointee.earliest = min(deadlines.pointee.earliest, now &+ Self.blockedLookInterval)
        }
    }

    /// How long a blocked task that is late is left alone before the next look: nanoseconds.
    private static var blockedLookInterval: UInt64 { 1_000_000_000 }

    private func expire(_ task: TaskHandle) {
        task.hasExpired = true
        unsafe counters.pointee.expired += 1
    }

    /// The deadline of a task of which it is not decided yet how it ends.
    private func openDeadline(of task: TaskHandle) -> UInt64? {
        task.hasExpired || task.disposition.isAbort ? nil : task.deadline(commandTimeout: commandTimeout)
    }

    /// What has been here longest; `nil` if there is no task. `shard.now` is the moment.
    public var oldestTask: TaskInFlight? {
        var oldest: TaskHandle?
        var cursor = unsafe tasks.pointee.first
        while let task = cursor {
            if oldest == nil || task.receivedAt < oldest!.receivedAt { oldest = task }
            cursor = task.next
        }
        return oldest.map(describe)
    }

    private func describe(_ task: TaskHandle) -> TaskInFlight {
        let place: TaskInFlight.Place =
            switch (task.state, task.waitsFor) {
            case (.dormant, .order), (.blocked, _): .waiting
            case (.dormant, _): .waitingForResource
            case (.settling, _): .stateStore
            default: .backstore
            }
        return TaskInFlight(
            age: shard.clock &- task.receivedAt, initiatorPort: target?.initiatorPort(task.nexus) ?? "", tag: task.tag,
            operationCode: unsafe task.cdbPointer[0], address: task.address, blocks: task.blocks, place: place,
            hasExpired: task.hasExpired)
    }
}

extension TargetDevice {
    /// What has been here longest, and the number of its unit; `nil` if no unit has a task. Tasks of units that were
    /// removed are among them, with the unit's number of then missing.
    public var oldestTask: (lun: LUN?, task: TaskInFlight)? {
        let oldest = allUnits.compactMap { unit in unit.oldestTask.map { (lun: unit.lun, task: $0) } }
        return oldest.max { $0.task.age < $1.task.age }
    }
}

extension Shard {
    /// Ends what is too late. The driver sets `now` and calls it when `nextDeadline` has come, or now and then.
    public func expireDeadlines() {
        for unit in logicalUnits { unit.expireDeadlines() }
    }

    /// No task is too late before this; `nil` if no task has a deadline. A task that arrives later may have an earlier
    /// one.
    public var nextDeadline: UInt64? {
        let earliest = logicalUnits.map { unsafe $0.deadlines.pointee.earliest }.min() ?? .max
        return earliest == .max ? nil : earliest
    }
}
