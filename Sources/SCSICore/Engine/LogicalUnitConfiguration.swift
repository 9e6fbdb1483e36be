// LogicalUnitConfiguration: what a logical unit is made of, and what it counts.
//
// Called by: LogicalUnit, embedders and the daemon. Must not know: the control flow of a task.

/// What makes a logical unit what it is, over restarts and through every front.
public struct LogicalUnitConfiguration: Sendable {
    /// The unit's NAA designator (SPC-4 7.8.6): 64 bits that begin with 3h (locally assigned) or 5h (IEEE
    /// registered).
    public var name: UInt64
    /// T10 VENDOR IDENTIFICATION, at most 8 ASCII characters.
    public var vendor = "TARGETD"
    /// PRODUCT IDENTIFICATION, at most 16 ASCII characters.
    public var product = "VIRTUAL DISK"
    /// PRODUCT REVISION LEVEL, at most 4 ASCII characters.
    public var revision = "1"
    /// The unit serial number, ASCII (VPD page 80h).
    public var serial: String
    /// Whether the medium is write protected for all initiators, whatever the backstore could do.
    public var readOnly = false
    /// Whether the medium can be ejected and another put in (RMB).
    public var removable = false
    /// The deadline of a command for which the transport gives none, in nanoseconds from its arrival; 0: none.
    public var commandTimeout: UInt64 = 0
    /// Tasks in the task set, up to `Limits.tasksPerLogicalUnit`.
    public var maximumTasks = Limits.tasksPerLogicalUnit
    /// What becomes of a command whose request the backstore could not carry out.
    public var errorPolicy = ErrorPolicy.report

    /// A unit with a name and a serial number, and defaults for the rest.
    public init(name: UInt64, serial: String) {
        self.name = name
        self.serial = serial
    }
}

/// Errors of the medium that one kind of access met.
public struct MediumErrorCounters: Sendable, Equatable {
    /// Requests that failed first and succeeded when they were tried again (`ErrorPolicy.retry`).
    public var corrected: UInt64 = 0
    /// Requests that were given up: their command ended with MEDIUM ERROR.
    public var uncorrected: UInt64 = 0

    /// These counts.
    public init(corrected: UInt64 = 0, uncorrected: UInt64 = 0) {
        self.corrected = corrected
        self.uncorrected = uncorrected
    }
}

/// What a logical unit has done since it was created. Monotonic counters.
public struct LogicalUnitStatistics: Sendable {
    /// Commands that ended, by what they do: READ; WRITE and WRITE AND VERIFY; VERIFY; UNMAP; all others.
    public var reads: UInt64 = 0, writes: UInt64 = 0, verifies: UInt64 = 0, unmaps: UInt64 = 0, others: UInt64 = 0
    /// Bytes that READ, WRITE and WRITE AND VERIFY commands moved.
    public var bytesRead: UInt64 = 0, bytesWritten: UInt64 = 0
    /// Bytes of the medium that VERIFY and WRITE AND VERIFY commands with GOOD status have verified.
    public var bytesVerified: UInt64 = 0
    /// Nanoseconds from the arrival of the commands counted in `reads` and `writes` to their end, added up.
    public var readNanoseconds: UInt64 = 0, writeNanoseconds: UInt64 = 0
    /// Nanoseconds in which the task set was empty, up to the last command that arrived.
    public var idleNanoseconds: UInt64 = 0
    /// When the task set became empty the last time, in nanoseconds of the shard's clock.
    var idleSince: UInt64 = 0
    /// Errors of the medium when it was read, written and verified.
    public var readErrors = MediumErrorCounters(), writeErrors = MediumErrorCounters()
    /// Errors of the medium when it was verified.
    public var verifyErrors = MediumErrorCounters()
    /// How often the unit was stopped and started again, and how often a medium was ejected.
    public var startStopCycles: UInt32 = 0, loadUnloadCycles: UInt32 = 0
    /// Commands that ended with another status than GOOD or CONDITION MET.
    public var notGood: UInt64 = 0
    /// Commands that a task management function or a lost nexus ended.
    public var aborted: UInt64 = 0
    /// Requests that the backstore ended with an error.
    public var backstoreErrors: UInt64 = 0
    /// Commands whose deadline passed.
    public var expired: UInt64 = 0
}
