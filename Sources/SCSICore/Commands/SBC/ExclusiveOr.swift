// XDWRITEREAD: the command that moves data both ways. It reads blocks, gives the initiator their exclusive or with the
// data it sent, and writes that data in their place. Nothing else touches these blocks meanwhile.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

extension SBC {
    // What the request that has completed did.
    private static let flushed: UInt8 = 1
    private static let read: UInt8 = 2
    private static let written: UInt8 = 3

    /// XDWRITEREAD(10), (32) (SBC-3). DISABLE WRITE leaves the blocks as they are: then it is no write, on a write
    /// protected medium either, and FUA is of the read. XORPINFO, like WRPROTECT, would say something of protection
    /// information, of which there is none: the table refuses it.
    static func xdWriteRead(_ task: TaskHandle, _ cdb: CDB, _ row: CommandRow, on unit: LogicalUnit) -> Outcome {
        if let sense = CommandTable.validateVariableLength(cdb, against: row) { return .failed(sense) }
        let writes = !disablesWrite(cdb, row.extent)
        if writes, unit.isWriteProtected { return .failed(SenseData(.dataProtect, .writeProtected)) }
        if let refusal = checkExtent(task, row.extent, on: unit) { return refusal }
        let length = unit.medium.bytes(BlockCount(task.blocks)).value
        guard unsafe length <= task.command.data_out_length, unsafe length <= task.command.data_in_length else {
            return .overrun
        }
        if length == 0 { return .done(.good) }
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        if !writes, unit.cachesWrites, cdb.bit(row.extent.flagsByte, 3) {
            task.step = flushed
            DeviceServer.fillFlush(task)
            return .submit
        }
        return exclusiveOrRead(task, on: unit)
    }

    /// The pieces are as long as those of ORWRITE; `progress` counts the bytes that are given to the initiator. What it
    /// sent is copied before it is used, so that the blocks and what it gets belong together whatever it does with its
    /// buffers meanwhile.
    static func xdWriteReadStep(
        _ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit
    ) -> Outcome {
        if task.step == flushed { return exclusiveOrRead(task, on: unit) }
        let length = unsafe task.request.pointee.length
        let staging = unsafe unit.shard.staging(task)
        let result = unsafe UnsafeMutableRawBufferPointer(rebasing: staging[..<Int(length)])
        if task.step == read {
            let sent = unsafe UnsafeMutableRawBufferPointer(rebasing: staging[Limits.pieceBytes...].prefix(Int(length)))
            unsafe task.gather(into: sent, from: task.progress)
            unsafe task.response.data_out_residual = task.command.data_out_length - task.progress - length
            unsafe BitwiseOperation.exclusiveOr.combine(UnsafeRawBufferPointer(sent), into: result)
            if !disablesWrite(cdb, field) {
                task.step = written
                DeviceServer.fillStaging(
                    task, unit.shard, SCSI_BACKSTORE_WRITE, fua: mustBeStable(cdb, field, on: unit),
                    offset: unsafe ByteOffset(task.request.pointee.offset), length: ByteCount(length),
                    start: Limits.pieceBytes)
                return .submit
            }
        }
        unsafe task.scatter(UnsafeRawBufferPointer(result), at: task.progress)
        task.progress += length
        unsafe task.response.data_in_residual = task.command.data_in_length - task.progress
        if task.progress == unit.medium.bytes(BlockCount(task.blocks)).value { return .done(.good) }
        return exclusiveOrRead(task, on: unit)
    }

    private static func exclusiveOrRead(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        task.step = read
        return verifyNext(task, on: unit)
    }

    private static func disablesWrite(_ cdb: CDB, _ field: ExtentField) -> Bool { cdb.bit(field.flagsByte, 2) }
}
