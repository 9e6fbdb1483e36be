public import CTarget

/// One of a target's I_T nexuses.
public struct NexusIdentifier: Equatable, Sendable {
    let index: UInt16
}
public final class TargetDevice {
    public let name: UInt64
    public init(name: UInt64, shard: Shard) { self.name = name }
    /// Adds a unit; false if the number is taken. Every nexus gets REPORTED LUNS DATA HAS CHANGED and an event.
    public func add(_ unit: LogicalUnit, at lun: LUN) -> Bool { false }
    /// Ends the unit's tasks and removes it; `done` is called when the last of them has completed.
    public func remove(at lun: LUN) -> LogicalUnit? { nil }
    /// Nil: the table is full. `initiatorPort`: name of the initiator port, stable over reconnections.
    public func establishNexus(initiatorPort: String, port: TargetPortHandle) -> NexusIdentifier? { nil }
    /// Ends all tasks of the nexus (they are still completed to the port), then forgets it. (SAM-6 I_T nexus loss).
    public func loseNexus(_ nexus: NexusIdentifier) {}
    /// Takes a free task whose command is filled. Completion by TargetPortHandle, maybe before this returns.
    public func receive(_ task: TaskHandle, nexus: NexusIdentifier) {}
    /// Takes a task management function; the answer comes by TargetPortHandle, maybe before this returns.
    public func receive(_ request: scsi_task_management_request, nexus: NexusIdentifier) {}
}
