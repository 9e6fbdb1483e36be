// PRE-FETCH: what is going to be read is brought into the medium's cache, if it has one.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

extension SBC {
    /// PRE-FETCH(10), (16). CONDITION MET: all of the extent is in the cache, or on its way there with IMMED; GOOD: not
    /// all of it. No length is the extent up to the end of the medium.
    static func preFetch(_ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit) -> Outcome {
        let address = LogicalBlockAddress(task.address)
        guard unit.medium.contains(address, BlockCount(task.blocks)) else {
            return .failed(.lbaOutOfRange(address, field: field.addressByte))
        }
        let blocks = task.blocks == 0 ? unit.medium.blocks.value - address.value : task.blocks
        if blocks == 0 { return .done(.conditionMet) }
        guard unit.geometry.has(SCSI_BACKSTORE_CAN_PREFETCH) else { return .done(.good) }
        let some = min(blocks, Limits.prefetchBytes >> unit.medium.blockShift)
        task.step = some == blocks ? PreFetchStep.all.rawValue : PreFetchStep.part.rawValue
        unsafe DeviceServer.fill(
            task, SCSI_BACKSTORE_PREFETCH, offset: unit.medium.offset(of: address),
            length: unit.medium.bytes(BlockCount(some)))
        if cdb.bit(1, 1) { DeviceServer.add(SCSI_BACKSTORE_IMMEDIATE, to: task) }
        return .submit
    }

    /// How much the request fetches; kept in the task's step.
    private enum PreFetchStep: UInt8 {
        case all = 1, part
    }

    static func preFetchDone(_ task: TaskHandle) -> Outcome {
        .done(task.step == PreFetchStep.all.rawValue ? .conditionMet : .good)
    }
}
