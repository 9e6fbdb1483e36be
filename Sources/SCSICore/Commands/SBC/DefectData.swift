// READ DEFECT DATA: a medium of this target has no defects that an initiator could do anything about.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CTarget

extension SBC {
    /// READ DEFECT DATA(10): the requested lists in the requested format, empty.
    static func readDefectData10(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint16(7)) { writer in
            writer.byte(0)
            writer.byte(cdb[2] & 0x1f)  // PLISTV, GLISTV, DEFECT LIST FORMAT
            writer.uint16(0)
        }
    }

    /// READ DEFECT DATA(12).
    static func readDefectData12(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(6)) { writer in
            writer.byte(0)
            writer.byte(cdb[1] & 0x1f)
            writer.uint16(0)  // GENERATION CODE: the lists never change
            writer.uint32(0)
        }
    }
}
