// VERIFY: reads the medium in pieces through a staging buffer, and compares with what the initiator sent if BYTCHK
// says so.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

extension SBC {
    /// VERIFY(10), (12), (16) with BYTCHK 00b (read only), 01b (compare with as much data), 11b (compare each block
    /// with one block of data).
    static func verify(_ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit) -> Outcome {
        let byteCheck = cdb[1] >> 1 & 3
        if byteCheck == 2 { return .failed(.invalidField(inCDB: 1, bit: 2)) }
        let address = LogicalBlockAddress(task.address)
        guard unit.medium.contains(address, BlockCount(task.blocks)) else {
            return .failed(.lbaOutOfRange(address, field: field.addressByte))
        }
        if task.blocks == 0 { return .done(.good) }
        if byteCheck == 1, task.blocks > unit.maximumTransferBlocks {
            return .failed(.invalidField(inCDB: field.countByte))
        }
        let sent = verifyDataLength(task, byteCheck, unit)
        guard unsafe sent <= task.command.data_out_length else { return .overrun }
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        unsafe task.response.data_out_residual = task.command.data_out_length - sent
        task.step = 1
        return verifyNext(task, on: unit)
    }

    private static func verifyDataLength(_ task: TaskHandle, _ byteCheck: UInt8, _ unit: LogicalUnit) -> UInt64 {
        switch byteCheck {
        case 1: unit.medium.bytes(BlockCount(task.blocks)).value
        case 3: unit.medium.bytes(BlockCount(1)).value
        default: 0
        }
    }

    /// The piece at `progress` bytes has been read.
    static func verifyChunk(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let length = unsafe Int(task.request.pointee.length)
        let read = unsafe UnsafeRawBufferPointer(rebasing: unit.shard.staging(task)[..<length])
        let same: Bool
        switch cdb[1] >> 1 & 3 {
        case 1: same = unsafe task.firstDifference(from: read, offset: task.progress) == nil
        case 3:
            let block = Int(unit.medium.bytes(BlockCount(1)).value)
            same = stride(from: 0, to: length, by: block).allSatisfy {
                unsafe task.firstDifference(from: UnsafeRawBufferPointer(rebasing: read[$0..<$0 + block]), offset: 0)
                    == nil
            }
        default: same = true
        }
        guard same else { return .failed(SenseData(.miscompare, .miscompareDuringVerifyOperation)) }
        task.progress += UInt64(length)
        if task.progress == unit.medium.bytes(BlockCount(task.blocks)).value { return .done(.good) }
        return verifyNext(task, on: unit)
    }

    /// Fills the request that reads the next piece of the task's extent into its staging buffer.
    static func verifyNext(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        let left = unit.medium.bytes(BlockCount(task.blocks)).value - task.progress
        DeviceServer.fillStaging(
            task, unit.shard, SCSI_BACKSTORE_READ,
            offset: ByteOffset(unit.medium.offset(of: LogicalBlockAddress(task.address)).value + task.progress),
            length: ByteCount(min(left, unit.maximumStagingTransfer)))
        return .submit
    }
}
