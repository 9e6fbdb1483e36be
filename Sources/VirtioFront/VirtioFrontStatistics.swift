// VirtioFrontStatistics: what a front has done, for whoever watches it. Called by: VirtioSCSIDevice (counts), embedders
// and the daemon (read). Must not know: where the counts are made.

/// What a front has done since it was created. Monotonic counters.
public struct VirtioFrontStatistics: Sendable {
    /// Commands that were handed to a target, or refused before.
    public var commands: UInt64 = 0
    /// Task management functions.
    public var taskManagementFunctions: UInt64 = 0
    /// Notifications that were sent to the guest.
    public var notifications: UInt64 = 0
    /// Events that were given to the guest, and those for which there was no room (EVENTS_MISSED).
    public var events: UInt64 = 0, eventsMissed: UInt64 = 0
    /// Virtqueues that were taken out of service because the driver broke the rules.
    public var brokenQueues: UInt64 = 0
    /// Front-ends that have connected.
    public var connections: UInt64 = 0

    /// The sums, of the same front on different threads.
    func adding(_ other: Self) -> Self {
        var sum = self
        sum.commands += other.commands
        sum.taskManagementFunctions += other.taskManagementFunctions
        sum.notifications += other.notifications
        sum.events += other.events
        sum.eventsMissed += other.eventsMissed
        sum.brokenQueues += other.brokenQueues
        sum.connections += other.connections
        return sum
    }
}
