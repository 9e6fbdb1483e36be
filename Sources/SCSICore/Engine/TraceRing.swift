// TraceRing: the last commands of one logical unit, in memory of a fixed size.
//
// Owns: the ring. Called by: LogicalUnit at the end of each command while it is on; the daemon reads. Must not know:
// how it is shown.

import CTarget

/// One command that has ended.
public struct TraceEntry: Sendable, Equatable {
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
    /// When it arrived and when it was answered, in nanoseconds of the shard's clock.
    public let receivedAt: UInt64, endedAt: UInt64
    /// How it ended.
    public let end: CommandEnd
    /// With CHECK CONDITION: the sense key, the additional sense code and its qualifier.
    public let sense: (key: UInt8, code: UInt8, qualifier: UInt8)?
    /// Bytes that were moved.
    public let bytes: UInt64

    /// Two entries are equal if they tell of the same command.
    public static func == (left: Self, right: Self) -> Bool { left.sequence == right.sequence }
}

/// What is kept of one command: plain words.
private struct TraceRecord {
    var sequence: UInt64 = 0, tag: UInt64 = 0, receivedAt: UInt64 = 0, endedAt: UInt64 = 0, bytes: UInt64 = 0
    var cdb: (UInt64, UInt64, UInt64, UInt64) = (0, 0, 0, 0)
    var nexus: UInt16 = 0
    var attribute: UInt8 = 0, end: UInt8 = 0, key: UInt8 = 0, code: UInt8 = 0, qualifier: UInt8 = 0
}

/// The ring. Its memory is taken when it is made and not later.
@safe
final class TraceRing {
    private let records: UnsafeMutablePointer<TraceRecord>
    let capacity: Int
    /// Commands that were recorded; those beyond the capacity are overwritten.
    private(set) var total: UInt64 = 0

    init(capacity: Int) {
        precondition(Limits.traceEntries.contains(capacity))
        self.capacity = capacity
        unsafe records = .allocate(capacity: capacity)
        unsafe records.initialize(repeating: TraceRecord(), count: capacity)
    }

    deinit { unsafe records.deallocate() }

    func record(_ task: TaskHandle, now: UInt64) {
        let record = unsafe records + Int(total % UInt64(capacity))
        total += 1
        unsafe record.pointee.sequence = task.sequence
        unsafe record.pointee.tag = task.command.tag
        unsafe record.pointee.receivedAt = task.receivedAt
        unsafe record.pointee.endedAt = now
        unsafe record.pointee.bytes =
            (task.command.data_in_length &- task.response.data_in_residual)
            &+ (task.command.data_out_length &- task.response.data_out_residual)
        unsafe record.pointee.cdb = UnsafeRawPointer(task.cdbPointer).loadUnaligned(
            as: (UInt64, UInt64, UInt64, UInt64).self)
        unsafe record.pointee.nexus = task.nexus
        unsafe record.pointee.attribute = task.attribute.rawValue
        let end = Measurements.end(task)
        unsafe record.pointee.end = UInt8(end.rawValue)
        guard end == .checkCondition else { return }
        unsafe record.pointee.key = task.sense.key.rawValue
        unsafe record.pointee.code = task.sense.code.code
        unsafe record.pointee.qualifier = task.sense.code.qualifier
    }

    /// The entries, the oldest first.
    var entries: [TraceEntry] {
        let count = min(total, UInt64(capacity))
        return (total - count..<total).map { unsafe Self.entry(records[Int($0 % UInt64(capacity))]) }
    }

    private static func entry(_ record: TraceRecord) -> TraceEntry {
        let end = CommandEnd(rawValue: Int(record.end))!
        var cdb = record.cdb
        let bytes = unsafe withUnsafeBytes(of: &cdb) { unsafe Array($0) }
        return TraceEntry(
            sequence: record.sequence, nexus: Int(record.nexus), tag: record.tag, cdb: CDB.trimmed(bytes),
            attribute: TaskAttribute(rawValue: record.attribute) ?? .simple, receivedAt: record.receivedAt,
            endedAt: record.endedAt, end: end,
            sense: end == .checkCondition ? (record.key, record.code, record.qualifier) : nil, bytes: record.bytes)
    }
}

extension CDB {
    /// A CDB without what follows the length that its operation code stands for (SPC-4: operation code); 32 bytes where
    /// that is not known.
    static func trimmed(_ bytes: [UInt8]) -> [UInt8] {
        switch bytes[0] >> 5 {
        case 0: Array(bytes.prefix(6))
        case 1, 2: Array(bytes.prefix(10))
        case 4: Array(bytes.prefix(16))
        case 5: Array(bytes.prefix(12))
        default: bytes
        }
    }
}
