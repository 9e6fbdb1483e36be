// REPORT TIMESTAMP and SET TIMESTAMP: the clock of a logical unit.
//
// Called by: DeviceServer. Must not know: what time it is anywhere else.

import CTarget

/// A unit's clock: milliseconds, from zero when the unit was created, or from what SET TIMESTAMP has set.
struct UnitClock {
    /// TIMESTAMP ORIGIN (SPC-6, device clocks).
    enum Origin: UInt8 {
        case powerOn = 0b000
        case setTimestamp = 0b010
    }

    private(set) var origin = Origin.powerOn
    private var base: UInt64 = 0
    /// When the clock stood at `base`, in nanoseconds of the shard's clock.
    private var setAt: UInt64

    init(now: UInt64) { setAt = now }

    /// The timestamp, 48 bits.
    func timestamp(now: UInt64) -> UInt64 { (base &+ (now &- setAt) / 1_000_000) & (1 << 48 - 1) }

    mutating func set(_ timestamp: UInt64, now: UInt64) {
        origin = .setTimestamp
        base = timestamp
        setAt = now
    }
}

extension SPC {
    private static let timestampParameters = 12

    /// REPORT TIMESTAMP (SPC-6).
    static func reportTimestamp(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(6)) { writer in
            let timestamp = unit.clock.timestamp(now: unit.shard.clock)
            writer.uint16(10)
            writer.byte(unit.clock.origin.rawValue)
            writer.byte(0)
            writer.uint16(UInt16(truncatingIfNeeded: timestamp >> 32))
            writer.uint32(UInt32(truncatingIfNeeded: timestamp))
            writer.zeros(2)
        }
    }

    /// SET TIMESTAMP (SPC-6). The other nexuses learn that the clock has changed.
    static func setTimestamp(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let length = cdb.uint32(6)
        if length == 0 { return .done(.good) }
        guard unsafe UInt64(length) <= task.command.data_out_length else { return .overrun }
        guard length >= UInt32(timestampParameters) else { return .failed(.parameterListLengthError) }
        guard
            let list = unsafe DeviceServer.parameterList(
                task, length: timestampParameters, into: unit.shard.parameters)
        else { return .overrun }
        unit.clock.set(UInt64(list.uint16(4)) << 32 | UInt64(list.uint32(6)), now: unit.shard.clock)
        unit.establish(.timestampChanged, exceptFor: task.nexus)
        return .done(.good)
    }
}
