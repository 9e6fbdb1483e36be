// MissingLogicalUnit: what a target answers for a LUN that addresses no logical unit, and for the REPORT LUNS
// well-known logical unit.
//
// Called by: TargetDevice. Must not know: logical units, transports.

import CTarget

enum MissingLogicalUnit {
    /// INQUIRY, REQUEST SENSE and REPORT LUNS are answered (SAM-6 5.11, SPC-4 6.6.2); the rest is refused with LOGICAL
    /// UNIT NOT SUPPORTED. The well-known unit (SPC-6 clause 8) also has TEST UNIT READY.
    static func execute(_ task: TaskHandle, on target: TargetDevice) -> Outcome {
        let wellKnown = LUN.parse(task.lunField) == .reportLUNsWellKnown
        let cdb = CDB(task)
        guard case .row(let row) = target.shard.table([]).match(cdb) else {
            return .failed(wellKnown ? .invalidOperationCode : notSupported)
        }
        let answered = row.flags.contains(.worksWithoutUnit) || wellKnown && row.handler == .testUnitReady
        guard answered else { return .failed(wellKnown ? .invalidOperationCode : notSupported) }
        if let sense = unsafe CommandTable.validate(cdb, length: Int(task.command.cdb_length), against: row) {
            return .failed(sense)
        }
        // There is no task set that an ACA condition could be in: NORMACA is zero in the INQUIRY data.
        if task.hasNACA { return .failed(.invalidField(inCDB: row.length - 1, bit: 2)) }
        switch row.handler {
        case .inquiry: return inquiry(task, cdb, wellKnown: wellKnown, on: target)
        case .reportLUNs: return SPC.reportLUNs(task, cdb, of: target)
        case .requestSense:
            let sense = wellKnown ? SenseData.none : notSupported
            return DeviceServer.parameterData(task, target.shard, allocationLength: cdb[4]) {
                sense.write(descriptorFormat: cdb.bit(1, 0), to: &$0)
            }
        default: return .done(.good)
        }
    }

    private static var notSupported: SenseData { SenseData(.illegalRequest, .logicalUnitNotSupported) }

    /// Peripheral qualifier 011b and device type 1Fh: no device can be here; 1Eh for the well-known unit.
    private static func inquiry(_ task: TaskHandle, _ cdb: CDB, wellKnown: Bool, on target: TargetDevice) -> Outcome {
        if cdb.bit(1, 0) || cdb[2] != 0 { return .failed(.invalidField(inCDB: cdb.bit(1, 0) ? 1 : 2)) }
        let defaults = LogicalUnitConfiguration(name: 0, serial: "")
        return DeviceServer.parameterData(task, target.shard, allocationLength: cdb.uint16(3)) { writer in
            SPC.standardInquiry(
                peripheral: wellKnown ? 0x1e : 0x7f, defaults.vendor, defaults.product, defaults.revision, &writer)
        }
    }
}
