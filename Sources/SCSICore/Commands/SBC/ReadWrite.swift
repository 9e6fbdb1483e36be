// READ, WRITE, SYNCHRONIZE CACHE: the commands whose data the backstore moves.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

/// The commands of SBC-5.
enum SBC {
    /// READ(6), (10), (12), (16). DPO is a hint that we need not follow; FUA makes what is cached stable first, so that
    /// what is read is what the medium holds (SBC-5: FUA).
    @inline(__always)
    static func read(_ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit) -> Outcome {
        if let refusal = checkExtent(task, field, on: unit) { return refusal }
        let length = unit.medium.bytes(BlockCount(task.blocks))
        guard unsafe length.value <= task.command.data_in_length else { return .overrun }
        if length.value == 0 { return .done(.good) }
        if field.forcesUnitAccess(cdb), unit.cachesWrites {
            task.step = 1
            DeviceServer.fillFlush(task)
            return .submit
        }
        return fillRead(task, length, on: unit)
    }

    static func readAfterFlush(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        task.step = 0
        return fillRead(task, unit.medium.bytes(BlockCount(task.blocks)), on: unit)
    }

    @inline(__always)
    private static func fillRead(_ task: TaskHandle, _ length: ByteCount, on unit: LogicalUnit) -> Outcome {
        var count = unsafe task.command.data_in_count
        let residual = unsafe task.command.data_in_length &- length.value
        if residual != 0 { count = unsafe TaskHandle.shorten(task.command.data_in, to: length.value) }
        task.response.data_in_residual = residual
        unsafe DeviceServer.fill(
            task, SCSI_BACKSTORE_READ, offset: unit.medium.offset(of: LogicalBlockAddress(task.address)),
            length: length, segments: task.command.data_in, count: count)
        return .submit
    }

    /// WRITE(6), (10), (12), (16). Without a write cache (WCE = 0) each write is stable before its status.
    @inline(__always)
    static func write(_ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit) -> Outcome {
        if let refusal = checkExtent(task, field, on: unit) { return refusal }
        let length = unit.medium.bytes(BlockCount(task.blocks))
        guard unsafe length.value <= task.command.data_out_length else { return .overrun }
        if length.value == 0 { return .done(.good) }
        fillWrite(
            task, length, stable: unit.mustWriteThrough || field.forcesUnitAccess(cdb) && unit.cachesWrites, on: unit)
        return .submit
    }

    /// Fills the request that writes the data-out buffers to the task's extent.
    @inline(__always)
    static func fillWrite(_ task: TaskHandle, _ length: ByteCount, stable: Bool, on unit: LogicalUnit) {
        var count = unsafe task.command.data_out_count
        let residual = unsafe task.command.data_out_length &- length.value
        if residual != 0 { count = unsafe TaskHandle.shorten(task.command.data_out, to: length.value) }
        task.response.data_out_residual = residual
        unsafe DeviceServer.fill(
            task, SCSI_BACKSTORE_WRITE, fua: stable,
            offset: unit.medium.offset(of: LogicalBlockAddress(task.address)), length: length,
            segments: task.command.data_out, count: count)
    }

    /// Refuses an extent that is not on the medium, or longer than the Block Limits VPD page allows.
    @inline(__always)
    static func checkExtent(_ task: TaskHandle, _ field: ExtentField, on unit: LogicalUnit) -> Outcome? {
        let address = LogicalBlockAddress(task.address)
        guard unit.medium.contains(address, BlockCount(task.blocks)) else {
            return .failed(.lbaOutOfRange(address, field: field.addressByte))
        }
        guard task.blocks <= unit.maximumTransferBlocks else { return .failed(.invalidField(inCDB: field.countByte)) }
        return nil
    }

    /// SYNCHRONIZE CACHE(10), (16) (SBC-4 5.33): the whole cache, whatever extent is named; the extent has to exist.
    /// With IMMED the flush goes on after the status, and an error of it is a deferred one.
    static func synchronizeCache(_ task: TaskHandle, _ cdb: CDB, _ field: ExtentField, on unit: LogicalUnit) -> Outcome
    {
        let address = LogicalBlockAddress(task.address)
        guard unit.medium.contains(address, BlockCount(task.blocks)) else {
            return .failed(.lbaOutOfRange(address, field: field.addressByte))
        }
        guard unit.cachesWrites else { return .done(.good) }
        if cdb.bit(1, 1) {
            unit.flushLater()
            return .done(.good)
        }
        task.step = 1
        DeviceServer.fillFlush(task)
        return .submit
    }

    /// A medium tells of data that it has lost once. If a flush that went on beside this one was told, this one has
    /// lost that data, too, whatever it was told itself: the error is its own then.
    static func synchronized(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        guard var error = unit.takeDeferredError(for: task.nexus) else { return .done(.good) }
        error.isDeferred = false
        return .failed(error)
    }
}

extension ExtentField {
    /// Where the LOGICAL BLOCK ADDRESS field begins.
    var addressByte: Int {
        switch self {
        case .six: 1
        case .thirtyTwo: 12
        default: 2
        }
    }

    /// The byte with DPO, FUA and what else says how blocks are accessed.
    var flagsByte: Int { self == .thirtyTwo ? 10 : 1 }

    /// Where the length field begins.
    var countByte: Int {
        switch self {
        case .none: 0
        case .six: 4
        case .ten: 7
        case .twelve: 6
        case .sixteen: 10
        case .compareAndWrite: 13
        case .writeAtomic: 12
        case .thirtyTwo: 28
        }
    }

    /// The FUA bit of READ and WRITE; READ(6) and WRITE(6) have none.
    @inline(__always)
    func forcesUnitAccess(_ cdb: CDB) -> Bool { self != .six && cdb.bit(1, 3) }
}
