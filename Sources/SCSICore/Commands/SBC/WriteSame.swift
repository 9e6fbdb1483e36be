// WRITE SAME: one block many times, as zeros or as a deallocation where that is the same, else from a staging buffer.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

extension SBC {
    /// What a WRITE SAME does; kept in the task's step.
    private enum WriteSameStep: UInt8 {
        case pattern = 1, zeroes, discard, anchor
    }

    /// WRITE SAME(10), (16) with UNMAP, ANCHOR and, in (16), NDOB. WSNZ is one: a count of zero is refused.
    static func writeSame(_ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit) -> Outcome {
        let noDataOut = field == .sixteen && cdb.bit(1, 0)
        let block = unit.medium.bytes(BlockCount(1))
        // Only what is unmapped can be anchored (SBC-4, WRITE SAME(10): the ANCHOR bit).
        if cdb.bit(1, 4), !cdb.bit(1, 3) { return .failed(.invalidField(inCDB: 1, bit: 4)) }
        guard task.blocks > 0, task.blocks <= unit.maximumWriteSameBlocks else {
            return .failed(.invalidField(inCDB: field.countByte))
        }
        let address = LogicalBlockAddress(task.address)
        guard unit.medium.contains(address, BlockCount(task.blocks)) else {
            return .failed(.lbaOutOfRange(address, field: field.addressByte))
        }
        // The data-out buffer is one block by definition, not by a field of the CDB. Another length means that the
        // initiator takes the blocks for longer or shorter than they are, and would have the wrong pattern written.
        guard unsafe noDataOut || block.value == task.command.data_out_length else {
            return .failed(SenseData(.illegalRequest, .invalidFieldInCDB))
        }
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        let staging = unsafe UnsafeMutableRawBufferPointer(rebasing: unit.shard.staging(task)[..<Int(block.value)])
        if noDataOut {
            unsafe staging.initializeMemory(as: UInt8.self, repeating: 0)
        } else {
            unsafe task.gather(into: staging, from: 0)
            task.response.data_out_residual = 0
        }
        let isZero = unsafe isAllZero(UnsafeRawBufferPointer(staging))
        task.step = step(isZero: isZero, unmap: cdb.bit(1, 3), anchor: cdb.bit(1, 4), unit).rawValue
        if task.step == WriteSameStep.pattern.rawValue {
            unsafe repeatPattern(
                UnsafeMutableRawBufferPointer(rebasing: unit.shard.staging(task)[..<Limits.pieceBytes]),
                Int(block.value))
        }
        return writeSameNext(task, on: unit)
    }

    private static func step(isZero: Bool, unmap: Bool, anchor: Bool, _ unit: LogicalUnit) -> WriteSameStep {
        guard isZero else { return .pattern }
        if anchor { return .anchor }
        if unmap, unit.geometry.has(SCSI_BACKSTORE_DISCARD_READS_ZEROS) { return .discard }
        return unit.geometry.has(SCSI_BACKSTORE_CAN_WRITE_ZEROES) ? .zeroes : .pattern
    }

    private static func isAllZero(_ bytes: UnsafeRawBufferPointer) -> Bool { unsafe bytes.allSatisfy { $0 == 0 } }

    /// Fills the staging buffer with copies of its first block.
    private static func repeatPattern(_ staging: UnsafeMutableRawBufferPointer, _ block: Int) {
        var filled = block
        while filled < staging.count {
            let count = min(filled, staging.count - filled)
            unsafe (staging.baseAddress! + filled).copyMemory(from: staging.baseAddress!, byteCount: count)
            filled += count
        }
    }

    /// The piece that ended at `progress` bytes is done.
    static func writeSameChunk(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        unsafe task.progress += task.request.pointee.length
        if task.progress == unit.medium.bytes(BlockCount(task.blocks)).value { return .done(.good) }
        return writeSameNext(task, on: unit)
    }

    private static func writeSameNext(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        let left = unit.medium.bytes(BlockCount(task.blocks)).value - task.progress
        let offset = ByteOffset(unit.medium.offset(of: LogicalBlockAddress(task.address)).value + task.progress)
        let fua = unit.mustWriteThrough
        switch WriteSameStep(rawValue: task.step)! {
        case .pattern:
            DeviceServer.fillStaging(
                task, unit.shard, SCSI_BACKSTORE_WRITE, fua: fua, offset: offset,
                length: ByteCount(min(left, unit.maximumStagingTransfer)))
        case .zeroes:
            let length = ByteCount(min(left, unit.limit(unit.geometry.maximum_write_zeroes)))
            unsafe DeviceServer.fill(task, SCSI_BACKSTORE_WRITE_ZEROES, fua: fua, offset: offset, length: length)
        case .discard:
            let length = ByteCount(min(left, unit.limit(unit.geometry.maximum_discard)))
            unsafe DeviceServer.fill(task, SCSI_BACKSTORE_DISCARD, fua: fua, offset: offset, length: length)
        case .anchor:
            let length = ByteCount(min(left, unit.limit(unit.geometry.maximum_discard)))
            unsafe DeviceServer.fill(task, SCSI_BACKSTORE_ANCHOR, fua: fua, offset: offset, length: length)
        }
        return .submit
    }
}

extension LogicalUnit {
    /// MAXIMUM WRITE SAME LENGTH in blocks.
    var maximumWriteSameBlocks: UInt64 { Limits.writeSameBytes >> medium.blockShift }

    /// Bytes of one READ or WRITE through a staging buffer: what the buffer holds and the backstore takes.
    var maximumStagingTransfer: UInt64 { min(UInt64(Limits.pieceBytes), maximumTransferBlocks << medium.blockShift) }

    /// A limit of the backstore in bytes, where 0 means none, in whole logical blocks.
    func limit(_ bytes: UInt64) -> UInt64 {
        bytes == 0 ? .max : max(bytes >> medium.blockShift, 1) << medium.blockShift
    }
}
