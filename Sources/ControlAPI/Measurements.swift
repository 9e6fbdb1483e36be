// Measurements: what the control API tells of what was done and how long it took.
//
// Owns: the names and units of what is told. Called by: targetd, targetctl. Must not know: how it is found out or
// shown.

/// All counters of all logical units at one moment.
public struct StatisticsReport: Codable, Equatable, Sendable {
    /// When, in nanoseconds of a clock that only this daemon has: for differences between two reports.
    public var time: UInt64
    /// The logical units, by target and number.
    public var units: [UnitStatistics]
    /// The I_T nexuses, by target and initiator.
    public var nexuses: [NexusReport]

    /// A report of these parts.
    public init(time: UInt64, units: [UnitStatistics], nexuses: [NexusReport]) {
        self.time = time
        self.units = units
        self.nexuses = nexuses
    }
}

/// What one logical unit has done. Counters count from the moment at which it was made.
public struct UnitStatistics: Codable, Equatable, Sendable {
    /// The name of its target.
    public var target: String
    /// The logical unit number.
    public var lun: Int
    /// The name of its backstore.
    public var backstore: String
    /// Commands received and not completed.
    public var inFlight: Int
    /// How long the oldest of them has been there, in nanoseconds; 0 if there is none.
    public var oldestNanoseconds: UInt64
    /// How long commands took: read, write, other.
    public var latencies: [LatencyReport]
    /// What each initiator did.
    public var initiators: [InitiatorReport]

    /// A unit that has done nothing yet.
    public init(target: String, lun: Int, backstore: String) {
        self.target = target
        self.lun = lun
        self.backstore = backstore
        (inFlight, oldestNanoseconds, latencies, initiators) = (0, 0, [], [])
    }
}

/// How long commands of one class took, from their arrival to their response.
public struct LatencyReport: Codable, Equatable, Sendable {
    /// `read`, `write` or `other`.
    public var operation: String
    /// All times together, in nanoseconds.
    public var sumNanoseconds: UInt64
    /// The buckets that are not empty, the shortest times first.
    public var buckets: [LatencyBucket]

    /// A report of these values.
    public init(operation: String, sumNanoseconds: UInt64, buckets: [LatencyBucket]) {
        self.operation = operation
        self.sumNanoseconds = sumNanoseconds
        self.buckets = buckets
    }
}

/// Commands that took between two times.
public struct LatencyBucket: Codable, Equatable, Sendable {
    /// The least time, in nanoseconds.
    public var from: UInt64
    /// What all are less than, in nanoseconds.
    public var to: UInt64
    /// Commands.
    public var count: UInt64

    /// A bucket of these values.
    public init(from: UInt64, to: UInt64, count: UInt64) {
        self.from = from
        self.to = to
        self.count = count
    }
}

/// What one initiator did at one logical unit.
public struct InitiatorReport: Codable, Equatable, Sendable {
    /// The name of the initiator port; empty for all those that the target has forgotten.
    public var initiator: String
    /// Commands that ended, by class and status.
    public var commands: [CommandCount]
    /// Bytes that READ commands moved.
    public var bytesRead: UInt64
    /// Bytes that WRITE commands moved.
    public var bytesWritten: UInt64
    /// Unit attention conditions that were reported.
    public var unitAttentions: UInt64
    /// How long the oldest of its commands has been there, in nanoseconds; 0 if there is none.
    public var oldestNanoseconds: UInt64 = 0
    /// How long its commands took: read, write, other; empty for those that the target has forgotten.
    public var latencies: [LatencyReport] = []

    /// A report of these values.
    public init(
        initiator: String, commands: [CommandCount], bytesRead: UInt64, bytesWritten: UInt64, unitAttentions: UInt64
    ) {
        self.initiator = initiator
        self.commands = commands
        self.bytesRead = bytesRead
        self.bytesWritten = bytesWritten
        self.unitAttentions = unitAttentions
    }
}

/// Commands of one class that ended in one way.
public struct CommandCount: Codable, Equatable, Sendable {
    /// `read`, `write` or `other`.
    public var operation: String
    /// `good`, `check-condition`, …, `without-status` for those that were aborted, `overrun`.
    public var status: String
    /// Commands.
    public var count: UInt64

    /// A count of these values.
    public init(operation: String, status: String, count: UInt64) {
        self.operation = operation
        self.status = status
        self.count = count
    }
}

/// An I_T nexus: an initiator port at a target.
public struct NexusReport: Codable, Equatable, Sendable {
    /// The name of the target.
    public var target: String
    /// The name of the initiator port.
    public var initiator: String
    /// Whether it is connected.
    public var connected: Bool
    /// Commands received and not completed, at all units of the target.
    public var inFlight: Int
    /// Times it connected.
    public var connections: UInt64
    /// Task management functions, by name, that were asked for.
    public var functions: [FunctionCount]

    /// A report of these values.
    public init(
        target: String, initiator: String, connected: Bool, inFlight: Int, connections: UInt64,
        functions: [FunctionCount]
    ) {
        self.target = target
        self.initiator = initiator
        self.connected = connected
        self.inFlight = inFlight
        self.connections = connections
        self.functions = functions
    }
}

/// How often a task management function was asked for.
public struct FunctionCount: Codable, Equatable, Sendable {
    /// `abort-task`, `logical-unit-reset`, …
    public var function: String
    /// Times.
    public var count: UInt64

    /// A count of these values.
    public init(function: String, count: UInt64) {
        self.function = function
        self.count = count
    }
}
