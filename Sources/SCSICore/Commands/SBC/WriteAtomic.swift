// WRITE ATOMIC: all of the data or none of it, whatever happens.
//
// Called by: DeviceServer. Must not know: the task set, transports.
//
// Against other commands the hazard matrix makes every write atomic. Against errors, aborts and the loss of power the
// medium has to: a unit whose backstore does not promise it does not have the command.

import CBackstore
import CTarget

extension SBC {
    /// WRITE ATOMIC(16) without ATOMIC BOUNDARY, within the limits of the Block Limits VPD page.
    static func writeAtomic(_ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit) -> Outcome {
        let address = LogicalBlockAddress(task.address)
        guard unit.medium.contains(address, BlockCount(task.blocks)) else {
            return .failed(.lbaOutOfRange(address, field: field.addressByte))
        }
        let length = unit.medium.bytes(BlockCount(task.blocks))
        let granularity = UInt64(max(unit.geometry.atomic_write_granularity, 1))
        guard task.blocks <= unit.maximumAtomicBlocks, length.value % granularity == 0 else {
            return .failed(.invalidField(inCDB: field.countByte))
        }
        let alignment = UInt64(max(unit.geometry.atomic_write_alignment, 1))
        guard unit.medium.offset(of: address).value % alignment == 0 else {
            return .failed(.invalidField(inCDB: field.addressByte))
        }
        guard unsafe length.value <= task.command.data_out_length else { return .overrun }
        if length.value == 0 { return .done(.good) }
        fillWrite(task, length, stable: unit.mustWriteThrough || cdb.bit(1, 3) && unit.cachesWrites, on: unit)
        DeviceServer.add(SCSI_BACKSTORE_ATOMIC, to: task)
        return .submit
    }
}

extension LogicalUnit {
    /// MAXIMUM ATOMIC TRANSFER LENGTH in blocks; 0 if the backstore has no atomic writes.
    var maximumAtomicBlocks: UInt64 {
        min(UInt64(geometry.atomic_write_maximum) >> medium.blockShift, maximumTransferBlocks)
    }
}
