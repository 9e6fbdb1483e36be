// TaskView: the tasks in flight of one logical unit, for people.
//
// Called by: the daemon, when somebody asks. Must not know: how it is shown.

/// One task at one moment.
public struct TaskView: Sendable {
    /// Its place in the order of arrival at the shard.
    public let sequence: UInt64
    /// Which of the target's nexuses sent it: an index of `TargetDevice.nexusStatus`.
    public let nexus: Int
    /// The command identifier.
    public let tag: UInt64
    /// The CDB, as long as its operation code says that it is.
    public let cdb: [UInt8]
    /// The task attribute.
    public let attribute: TaskAttribute
    /// When it arrived, in nanoseconds of the shard's clock.
    public let receivedAt: UInt64
    /// `transferring` while the medium has it, `dormant` while it waits.
    public let state: String
    /// What a dormant task waits for.
    public let waitsFor: String?
    /// Whether it was aborted, and only the medium has not let go of it.
    public let isAborted: Bool
}

extension TaskView {
    init(_ task: TaskHandle) {
        sequence = task.sequence
        nexus = Int(task.nexus)
        tag = task.tag
        cdb = CDB.trimmed(unsafe Array(UnsafeBufferPointer(start: task.cdbPointer, count: 32)))
        attribute = task.attribute
        receivedAt = task.receivedAt
        state = "\(task.state)"
        waitsFor = task.state == .dormant ? "\(task.waitsFor)" : nil
        isAborted = task.disposition.isAbort
    }
}
