// TaskSetBounds: how many tasks a task set takes, and what one that finds no room is told.
//
// Called by: LogicalUnit, when a task arrives. Must not know: transports, commands.

import CTarget

/// The bounds of one task set.
///
/// The last places are for initiators that have no command in the set: one that fills the set with its own commands
/// does not keep the others from getting one in.
struct TaskSetBounds {
    /// A nexus that has a task in the set gets another one in while there are fewer than this.
    let shared: Int
    /// A nexus that has none gets one in while there are fewer than this.
    let all: Int

    init(_ maximum: Int) {
        precondition(maximum > 0 && maximum <= Limits.tasksPerLogicalUnit, "a task set that is too small or too large")
        all = maximum
        shared = maximum - min(Limits.tasksForIdleNexuses, maximum / 4)
    }
}

extension LogicalUnit {
    /// Whether a task still gets in, where the shared places are taken.
    func hasRoom(for task: TaskHandle) -> Bool {
        unsafe tasks.pointee.count < taskSetBounds.all && !hasTask(of: task.nexus)
    }

    /// SAM-6 5.3.1: TASK SET FULL for a nexus that has a command in the task set, which will end and make room; BUSY
    /// for one that has none.
    func fullStatus(_ task: TaskHandle) -> SCSIStatus { hasTask(of: task.nexus) ? .taskSetFull : .busy }

    private func hasTask(of nexus: UInt16) -> Bool { contains { $0.nexus == nexus } }
}
