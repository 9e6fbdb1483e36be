// WRITE AND VERIFY, COMPARE AND WRITE, ORWRITE, XPWRITE: commands that read and write the same blocks. Nothing else
// touches these blocks meanwhile: to the hazard matrix they are writes, whatever front the other command comes from.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

extension SBC {
    // MARK: WRITE AND VERIFY

    /// WRITE AND VERIFY(10), (12), (16): the data is made stable, then read back (BYTCHK 00b) and compared with what
    /// was sent (BYTCHK 01b). The other values are reserved.
    static func writeAndVerify(_ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit) -> Outcome {
        if let refusal = checkExtent(task, field, on: unit) { return refusal }
        let length = unit.medium.bytes(BlockCount(task.blocks))
        guard unsafe length.value <= task.command.data_out_length else { return .overrun }
        if length.value == 0 { return .done(.good) }
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        task.step = 1
        fillWrite(task, length, stable: true, on: unit)
        return .submit
    }

    static func writeAndVerifyStep(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        guard task.step == 1 else { return verifyChunk(task, cdb, on: unit) }
        task.step = 2
        return verifyNext(task, on: unit)
    }

    // MARK: COMPARE AND WRITE

    /// COMPARE AND WRITE (SBC-4 5.3): the first half of the data is compared with the medium, the second is written if
    /// they are equal.
    static func compareAndWrite(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        let address = LogicalBlockAddress(task.address)
        guard unit.medium.contains(address, BlockCount(task.blocks)) else { return .failed(.lbaOutOfRange(address)) }
        guard task.blocks <= unit.maximumCompareAndWriteBlocks else { return .failed(.invalidField(inCDB: 13)) }
        let length = unit.medium.bytes(BlockCount(task.blocks))
        guard unsafe 2 * length.value <= task.command.data_out_length else { return .overrun }
        if length.value == 0 { return .done(.good) }
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        unsafe task.response.data_out_residual = task.command.data_out_length - 2 * length.value
        task.step = 1
        DeviceServer.fillStaging(
            task, unit.shard, SCSI_BACKSTORE_READ, offset: unit.medium.offset(of: address), length: length)
        return .submit
    }

    static func compareAndWriteStep(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let length = unit.medium.bytes(BlockCount(task.blocks))
        let medium = unsafe UnsafeRawBufferPointer(rebasing: unit.shard.staging(task)[..<Int(length.value)])
        if let difference = unsafe task.firstDifference(from: medium, offset: 0) {
            // INFORMATION: the offset of the first byte that differs (SBC-4 5.3).
            return .failed(
                SenseData(.miscompare, .miscompareDuringVerifyOperation, information: UInt64(difference)))
        }
        task.step = 0
        let rest = unsafe task.dropDataOut(length.value)
        let count = unsafe TaskHandle.shorten(rest.segments, to: length.value)
        unsafe DeviceServer.fill(
            task, SCSI_BACKSTORE_WRITE, fua: unit.cachesWrites && (unit.mustWriteThrough || cdb.bit(1, 3)),
            offset: unit.medium.offset(of: LogicalBlockAddress(task.address)), length: length,
            segments: rest.segments, count: count)
        return .submit
    }

    // MARK: ORWRITE, XPWRITE

    /// ORWRITE(16): each bit that is one in the data becomes one on the medium. XPWRITE(10), (32) (SBC-3): each such
    /// bit is inverted. Read, changed and written back in pieces; `progress` counts the bytes that are written.
    static func combine(_ task: TaskHandle, _ cdb: CDB, _ row: CommandRow, on unit: LogicalUnit) -> Outcome {
        if let sense = CommandTable.validateVariableLength(cdb, against: row) { return .failed(sense) }
        if let refusal = checkExtent(task, row.extent, on: unit) { return refusal }
        let length = unit.medium.bytes(BlockCount(task.blocks)).value
        guard unsafe length <= task.command.data_out_length else { return .overrun }
        if length == 0 { return .done(.good) }
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        unsafe task.response.data_out_residual = task.command.data_out_length - length
        return combineRead(task, on: unit)
    }

    static func combineStep(
        _ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, _ operation: BitwiseOperation, on unit: LogicalUnit
    ) -> Outcome {
        let length = unsafe task.request.pointee.length
        if task.step == 1 {
            let staging = unsafe UnsafeMutableRawBufferPointer(rebasing: unit.shard.staging(task)[..<Int(length)])
            unsafe task.combineDataOut(into: staging, from: task.progress, operation)
            task.step = 2
            DeviceServer.fillStaging(
                task, unit.shard, SCSI_BACKSTORE_WRITE, fua: mustBeStable(cdb, field, on: unit),
                offset: unsafe ByteOffset(task.request.pointee.offset), length: ByteCount(length))
            return .submit
        }
        task.progress += length
        if task.progress == unit.medium.bytes(BlockCount(task.blocks)).value { return .done(.good) }
        return combineRead(task, on: unit)
    }

    private static func combineRead(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        task.step = 1
        return verifyNext(task, on: unit)
    }

    /// Whether what is written for a command must be stable before its status.
    static func mustBeStable(_ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit) -> Bool {
        unit.cachesWrites && (unit.mustWriteThrough || cdb.bit(field.flagsByte, 3))
    }
}

extension LogicalUnit {
    /// MAXIMUM COMPARE AND WRITE LENGTH: what the CDB can say and a staging buffer can hold.
    var maximumCompareAndWriteBlocks: UInt64 { min(255, UInt64(Limits.stagingBytes) >> medium.blockShift) }
}
