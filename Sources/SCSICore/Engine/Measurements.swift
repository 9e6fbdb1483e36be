// Measurements: what a logical unit has done and how long it took: counters by initiator, histograms of latency.
//
// Owns: the counters of one unit. Called by: LogicalUnit, once for each command; the daemon reads. Must not know: how
// they are shown.

import CTarget

/// What commands are told apart by in counters and histograms.
public enum CommandClass: Int, CaseIterable, Sendable {
    /// READ, in all its forms.
    case read
    /// WRITE, WRITE AND VERIFY, WRITE ATOMIC, in all their forms.
    case write
    /// All others.
    case other
}

/// How a command ended, for counters.
public enum CommandEnd: Int, CaseIterable, Sendable {
    case good, checkCondition, conditionMet, busy, reservationConflict, taskSetFull, acaActive, taskAborted
    /// By a task management function, a reset or a lost nexus: no status was returned.
    case withoutStatus
    /// The command asked for more data than its buffers held.
    case overrun
}

/// What one initiator did at one logical unit, or all of them. Monotonic counters.
public struct CommandStatistics: Sendable, Equatable {
    private var commands = Array(repeating: UInt64(0), count: NexusCounters.commandWords)
    /// Bytes that READ and WRITE commands moved.
    public private(set) var bytesRead: UInt64 = 0, bytesWritten: UInt64 = 0
    /// Unit attention conditions that were reported.
    public private(set) var unitAttentions: UInt64 = 0

    /// No commands.
    init() {}

    /// Commands of a class that ended in a way.
    public subscript(kind: CommandClass, end: CommandEnd) -> UInt64 {
        commands[kind.rawValue * CommandEnd.allCases.count + end.rawValue]
    }

    /// Commands of a class that ended.
    public func count(_ kind: CommandClass) -> UInt64 { CommandEnd.allCases.reduce(0) { $0 + self[kind, $1] } }

    /// Commands of all classes that ended in a way.
    public func count(_ end: CommandEnd) -> UInt64 { CommandClass.allCases.reduce(0) { $0 + self[$1, end] } }

    mutating func add(_ words: UnsafeMutablePointer<UInt64>) {
        for index in commands.indices { commands[index] += unsafe words[index] }
        bytesRead += unsafe words[NexusCounters.bytesRead]
        bytesWritten += unsafe words[NexusCounters.bytesWritten]
        unitAttentions += unsafe words[NexusCounters.unitAttentions]
    }
}

/// How long commands of one class took, from their arrival to their response. The resolution is a turn of the reactor.
public struct LatencyStatistics: Sendable, Equatable {
    /// All times together, in nanoseconds.
    public let sum: UInt64
    /// Commands by bucket, `LatencyHistogram.lowerBound` of which says from how many nanoseconds on.
    public let buckets: [UInt64]

    /// Commands in all buckets.
    public var count: UInt64 { buckets.reduce(0, +) }

    /// What two have done together.
    public static func + (a: LatencyStatistics, b: LatencyStatistics) -> LatencyStatistics {
        LatencyStatistics(sum: a.sum &+ b.sum, buckets: zip(a.buckets, b.buckets).map(&+))
    }
}

/// The buckets of latency: four for each doubling, so that what is read from them is at most a quarter off.
public enum LatencyHistogram {
    /// Buckets: from 0 to 549 s, in which the last one has no end.
    public static let count = 120
    /// The first four buckets are this many nanoseconds wide each, as a power of two.
    private static let shift: UInt64 = 8

    /// The bucket of a time in nanoseconds.
    @inline(__always)
    static func bucket(_ nanoseconds: UInt64) -> Int {
        let units = nanoseconds >> shift
        if units < 4 { return Int(truncatingIfNeeded: units) }
        let exponent = 63 &- units.leadingZeroBitCount
        let index = (exponent &- 1) << 2 &+ Int(truncatingIfNeeded: (units &>> (exponent &- 2)) & 3)
        return min(index, count &- 1)
    }

    /// The least time of a bucket, in nanoseconds.
    public static func lowerBound(_ bucket: Int) -> UInt64 {
        precondition((0...count).contains(bucket))
        if bucket < 4 { return UInt64(bucket) << shift }
        return (UInt64(4 | bucket & 3) << UInt64(bucket >> 2 - 1)) << shift
    }
}

/// The layout of one nexus's counters: words.
enum NexusCounters {
    static var commandWords: Int { CommandClass.allCases.count * CommandEnd.allCases.count }
    static var bytesRead: Int { 30 }
    static var bytesWritten: Int { 31 }
    static var unitAttentions: Int { 32 }
    /// Buckets of each class, then the sum of each class.
    static var latencies: Int { 33 }
    static var latencySums: Int { latencies + CommandClass.allCases.count * LatencyHistogram.count }
    static var words: Int { latencySums + CommandClass.allCases.count }
}

/// The counters of one logical unit. A handle of pointers, so that counting costs no exclusivity check; the unit frees
/// them.
@safe
struct Measurements {
    /// The counters of each nexus, made at its first command.
    private let nexuses: UnsafeMutablePointer<UnsafeMutablePointer<UInt64>?>
    /// What initiators did whose places in the nexus table others have now.
    private let retired: UnsafeMutablePointer<UInt64>

    /// Where the sums are, in a form that costs a command nothing.
    private static var sums: Int { 33 + 3 * LatencyHistogram.count }

    init() {
        precondition(NexusCounters.commandWords == NexusCounters.bytesRead)
        precondition(Self.sums == NexusCounters.latencySums)
        unsafe nexuses = .allocate(capacity: Limits.nexusesPerTarget)
        unsafe nexuses.initialize(repeating: nil, count: Limits.nexusesPerTarget)
        unsafe retired = Self.zeros(NexusCounters.words)
    }

    func deallocate() {
        for index in 0..<Limits.nexusesPerTarget { unsafe nexuses[index]?.deallocate() }
        unsafe nexuses.deallocate()
        unsafe retired.deallocate()
    }

    private static func zeros(_ count: Int) -> UnsafeMutablePointer<UInt64> {
        let words = UnsafeMutablePointer<UInt64>.allocate(capacity: count)
        unsafe words.initialize(repeating: 0, count: count)
        return unsafe words
    }

    // MARK: Counting

    /// Counts a command that has its response.
    @inline(__always)
    func count(_ task: TaskHandle, now: UInt64) {
        let counters = unsafe counters(Int(task.nexus))
        var kind = CommandClass.other
        switch task.row?.handler {
        case .read:
            kind = .read
            unsafe counters[NexusCounters.bytesRead] &+= task.command.data_in_length &- task.response.data_in_residual
        case .write, .writeAndVerify, .writeAtomic:
            kind = .write
            unsafe counters[NexusCounters.bytesWritten] &+=
                task.command.data_out_length &- task.response.data_out_residual
        default: break
        }
        // GOOD and COMMAND COMPLETE are zero both.
        let isGood = task.response.status | task.response.service_response == 0
        let end = isGood ? CommandEnd.good : Self.end(task)
        unsafe counters[kind.rawValue &* 10 &+ end.rawValue] &+= 1
        let time = now &- task.receivedAt
        let bucket = kind.rawValue &* LatencyHistogram.count &+ LatencyHistogram.bucket(time)
        unsafe counters[NexusCounters.latencies &+ bucket] &+= 1
        unsafe counters[Self.sums &+ kind.rawValue] &+= time
    }

    /// Counts a command that was refused when it arrived.
    func countRefused(_ task: TaskHandle) {
        unsafe counters(Int(task.nexus))[CommandClass.other.rawValue * 10 + Self.end(task).rawValue] += 1
    }

    func countUnitAttention(nexus: UInt16) { unsafe counters(Int(nexus))[NexusCounters.unitAttentions] += 1 }

    /// The nexus's place in the table is another initiator's from now on.
    func retire(nexus: UInt16) {
        guard let counters = unsafe nexuses[Int(nexus)] else { return }
        for index in 0..<NexusCounters.words { unsafe retired[index] += counters[index] }
        unsafe counters.update(repeating: 0, count: NexusCounters.words)
    }

    @inline(__always)
    private func counters(_ nexus: Int) -> UnsafeMutablePointer<UInt64> {
        if let counters = unsafe nexuses[nexus] { return unsafe counters }
        return unsafe makeCounters(nexus)
    }

    /// At the first command of a nexus only.
    @inline(never)
    private func makeCounters(_ nexus: Int) -> UnsafeMutablePointer<UInt64> {
        let counters = unsafe Self.zeros(NexusCounters.words)
        unsafe nexuses[nexus] = unsafe counters
        return unsafe counters
    }

    @inline(never)
    static func end(_ task: TaskHandle) -> CommandEnd {
        switch ServiceResponse(rawValue: task.response.service_response) {
        case .overrun: return .overrun
        case .commandComplete: break
        default: return .withoutStatus
        }
        return switch SCSIStatus(rawValue: task.response.status) {
        case .good: .good
        case .checkCondition: .checkCondition
        case .conditionMet: .conditionMet
        case .busy: .busy
        case .reservationConflict: .reservationConflict
        case .taskSetFull: .taskSetFull
        case .acaActive: .acaActive
        case .taskAborted: .taskAborted
        case nil: preconditionFailure("a status that is none of SAM-6")
        }
    }

    // MARK: Reading

    /// What a nexus did, if it has done anything.
    func commands(nexus: Int) -> CommandStatistics? {
        guard let counters = unsafe nexuses[nexus] else { return nil }
        var result = CommandStatistics()
        unsafe result.add(counters)
        return result
    }

    /// What initiators did that the target has forgotten.
    var forgotten: CommandStatistics {
        var result = CommandStatistics()
        unsafe result.add(retired)
        return result
    }

    /// The statistics with what is counted here.
    func fill(_ statistics: LogicalUnitStatistics) -> LogicalUnitStatistics {
        var total = forgotten
        for index in 0..<Limits.nexusesPerTarget {
            if let counters = unsafe nexuses[index] { unsafe total.add(counters) }
        }
        var result = statistics
        (result.reads, result.writes) = (total.count(.read), total.count(.write))
        result.others = total.count(.other) - result.verifies - result.unmaps
        result.readNanoseconds = latency(.read).sum
        result.writeNanoseconds = latency(.write).sum
        (result.bytesRead, result.bytesWritten) = (total.bytesRead, total.bytesWritten)
        let refusals: [CommandEnd] = [
            .checkCondition, .busy, .reservationConflict, .taskSetFull, .acaActive, .taskAborted,
        ]
        result.notGood = refusals.reduce(0) { $0 + total.count($1) }
        result.aborted = total.count(.withoutStatus) + total.count(.taskAborted)
        return result
    }

    /// Of all initiators, those that are forgotten too.
    func latency(_ kind: CommandClass) -> LatencyStatistics {
        (0..<Limits.nexusesPerTarget).reduce(unsafe Self.latency(kind, retired)) { sum, index in
            latency(kind, nexus: index).map { sum + $0 } ?? sum
        }
    }

    /// Of one nexus, if it has done anything.
    func latency(_ kind: CommandClass, nexus: Int) -> LatencyStatistics? {
        guard let counters = unsafe nexuses[nexus] else { return nil }
        return unsafe Self.latency(kind, counters)
    }

    private static func latency(_ kind: CommandClass, _ words: UnsafeMutablePointer<UInt64>) -> LatencyStatistics {
        let first = NexusCounters.latencies + kind.rawValue * LatencyHistogram.count
        return unsafe LatencyStatistics(
            sum: words[sums + kind.rawValue],
            buckets: (first..<first + LatencyHistogram.count).map { unsafe words[$0] })
    }
}
