// PERSISTENT RESERVE IN.
//
// Called by: DeviceServer. Must not know: what the services change (ReservationTable).

import CTarget

extension SPC {
    /// PERSISTENT RESERVE IN (SPC-4 6.15). While an SPC-2 reservation is there, nobody may use the other method
    /// (SPC-2 5.5.1).
    static func persistentReserveIn(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        if unit.reservations.reserved != nil { return .done(.reservationConflict) }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint16(7)) { writer in
            let table = unit.reservations.table
            switch cdb[1] & 0x1f {
            case 0x00: readKeys(table, &writer)
            case 0x01: readReservation(table, &writer)
            case 0x02: reportCapabilities(unit, &writer)
            default: readFullStatus(table, &writer)
            }
        }
    }

    private static func readKeys(_ table: ReservationTable, _ writer: inout ParameterWriter) {
        writer.uint32(table.generation)
        writer.uint32(UInt32(table.registrations.count * 8))
        for registration in table.registrations { writer.uint64(registration.key) }
    }

    /// READ RESERVATION (SPC-4 6.15.3.4). An all registrants reservation has no key.
    private static func readReservation(_ table: ReservationTable, _ writer: inout ParameterWriter) {
        writer.uint32(table.generation)
        guard let type = table.type else { return writer.uint32(0) }
        writer.uint32(16)
        writer.uint64(table.holder.flatMap(table.registration)?.key ?? 0)
        writer.zeros(5)
        writer.byte(type.rawValue)
        writer.zeros(2)
    }

    /// REPORT CAPABILITIES (SPC-4 6.15.4).
    private static func reportCapabilities(_ unit: LogicalUnit, _ writer: inout ParameterWriter) {
        let canPersist = unit.persistentState.canSave
        writer.uint16(8)
        // RLR_C, CRH, SIP_C, ATP_C, PTPL_C. What nothing keeps is not lost either.
        writer.byte(0x1c | (canPersist ? 0x81 : 0x00))
        // TMV; ALLOW COMMANDS 011b: TEST UNIT READY under every type, MODE SENSE and its like under write exclusive
        // types; PTPL_A.
        writer.byte(0x80 | 0x30 | (unit.reservations.table.persists ? 0x01 : 0x00))
        var mask: UInt16 = 0
        for type in ReservationType.allCases { mask |= typeBit(type) }
        writer.uint16(mask)
        writer.zeros(2)
    }

    /// The bit of a type in the PERSISTENT RESERVATION TYPE MASK.
    private static func typeBit(_ type: ReservationType) -> UInt16 {
        switch type {
        case .writeExclusive: 0x0200
        case .exclusiveAccess: 0x0800
        case .writeExclusiveRegistrantsOnly: 0x2000
        case .exclusiveAccessRegistrantsOnly: 0x4000
        case .writeExclusiveAllRegistrants: 0x8000
        case .exclusiveAccessAllRegistrants: 0x0001
        }
    }

    /// READ FULL STATUS (SPC-4 6.15.5): one descriptor for each registered I_T nexus, so ALL_TG_PT is zero.
    private static func readFullStatus(_ table: ReservationTable, _ writer: inout ParameterWriter) {
        writer.uint32(table.generation)
        writer.uint32(UInt32(table.registrations.count * (24 + TransportIdentifier.length)))
        for registration in table.registrations {
            let isHolder = table.isHolder(registration.nexus)
            writer.uint64(registration.key)
            writer.zeros(4)
            writer.byte(isHolder ? 0x01 : 0x00)
            writer.byte(isHolder ? table.type?.rawValue ?? 0 : 0)
            writer.zeros(4)
            writer.uint16(registration.nexus.targetPort)
            writer.uint32(UInt32(TransportIdentifier.length))
            TransportIdentifier.write(registration.nexus.initiatorPort, to: &writer)
        }
    }
}
