// DeviceServer: from a row's handler to the code that carries the command out, and what all commands share: parameter
// data and lists, and the requests to the backstore.
//
// Called by: LogicalUnit. Must not know: transports, the task set.

import CBackstore
import CTarget

/// The device server.
enum DeviceServer {
    /// Starts a command whose bits the table has checked.
    @inline(__always)
    static func execute(_ task: TaskHandle, _ cdb: CDB, _ row: CommandRow, on unit: LogicalUnit) -> Outcome {
        switch row.handler {
        case .read: SBC.read(task, cdb, row.extent, on: unit)
        case .write: SBC.write(task, cdb, row.extent, on: unit)
        default: executeOther(task, cdb, row, on: unit)
        }
    }

    @inline(never)
    private static func executeOther(
        _ task: TaskHandle, _ cdb: CDB, _ row: CommandRow, on unit: LogicalUnit
    ) -> Outcome {
        switch row.handler {
        case .read, .write: preconditionFailure("handled by execute")
        case .testUnitReady: .done(.good)
        case .requestSense: SPC.requestSense(task, cdb, on: unit)
        case .inquiry: SPC.inquiry(task, cdb, on: unit)
        case .modeSelect: SPC.modeSelect(task, cdb, on: unit)
        case .modeSense: SPC.modeSense(task, cdb, on: unit)
        case .logSelect: SPC.logSelect(task, cdb, on: unit)
        case .logSense: SPC.logSense(task, cdb, on: unit)
        case .reportLUNs: SPC.reportLUNs(task, cdb, on: unit)
        case .reportSupportedOperationCodes: SPC.reportSupportedOperationCodes(task, cdb, on: unit)
        case .reportSupportedTaskManagementFunctions: SPC.reportSupportedTaskManagementFunctions(task, cdb, on: unit)
        case .persistentReserveIn: SPC.persistentReserveIn(task, cdb, on: unit)
        case .persistentReserveOut: SPC.persistentReserveOut(task, cdb, on: unit)
        case .reserve: SPC.reserve(task, on: unit)
        case .release: SPC.release(task, on: unit)
        case .reportTargetPortGroups: SPC.reportTargetPortGroups(task, cdb, on: unit)
        case .setTargetPortGroups: SPC.setTargetPortGroups(task, cdb, on: unit)
        case .readBufferData: SPC.readBufferData(task, cdb, on: unit)
        case .readBufferDescriptor: SPC.readBufferDescriptor(task, cdb, on: unit)
        case .readEchoBuffer: SPC.readEchoBuffer(task, cdb, on: unit)
        case .readEchoBufferDescriptor: SPC.readEchoBufferDescriptor(task, cdb, on: unit)
        case .writeBufferData: SPC.writeBufferData(task, cdb, on: unit)
        case .writeEchoBuffer: SPC.writeEchoBuffer(task, cdb, on: unit)
        case .sendDiagnostic: SPC.sendDiagnostic(task, cdb, on: unit)
        case .receiveDiagnosticResults: SPC.receiveDiagnosticResults(task, cdb, on: unit)
        case .reportTimestamp: SPC.reportTimestamp(task, cdb, on: unit)
        case .setTimestamp: SPC.setTimestamp(task, cdb, on: unit)
        case .reportIdentifyingInformation: SPC.reportIdentifyingInformation(task, cdb, on: unit)
        case .setIdentifyingInformation: SPC.setIdentifyingInformation(task, cdb, on: unit)
        case .startStopUnit: SBC.startStopUnit(task, cdb, on: unit)
        case .preventAllowMediumRemoval: SBC.preventAllowMediumRemoval(task, cdb, on: unit)
        case .readCapacity10: SBC.readCapacity10(task, on: unit)
        case .readCapacity16: SBC.readCapacity16(task, cdb, on: unit)
        case .verify: SBC.verify(task, cdb, row.extent, on: unit)
        case .writeAndVerify: SBC.writeAndVerify(task, cdb, row.extent, on: unit)
        case .compareAndWrite: SBC.compareAndWrite(task, on: unit)
        case .orWrite, .xpWrite: SBC.combine(task, cdb, row, on: unit)
        case .xdWriteRead: SBC.xdWriteRead(task, cdb, row, on: unit)
        case .readDefectData10: SBC.readDefectData10(task, cdb, on: unit)
        case .readDefectData12: SBC.readDefectData12(task, cdb, on: unit)
        case .synchronizeCache: SBC.synchronizeCache(task, cdb, row.extent, on: unit)
        case .writeSame: SBC.writeSame(task, cdb, row.extent, on: unit)
        case .unmap: SBC.unmap(task, cdb, on: unit)
        case .preFetch: SBC.preFetch(task, cdb, row.extent, on: unit)
        case .writeAtomic: SBC.writeAtomic(task, cdb, row.extent, on: unit)
        case .getLBAStatus: SBC.getLBAStatus(task, LBAStatusFields(sixteen: cdb), on: unit)
        case .getLBAStatus32: SBC.getLBAStatus32(task, cdb, row, on: unit)
        }
    }

    /// Goes on with a command after its request has completed without error.
    @inline(__always)
    static func resume(_ task: TaskHandle, _ cdb: CDB, _ row: CommandRow, on unit: LogicalUnit) -> Outcome {
        task.step == 0 ? .done(.good) : resumeSteps(task, cdb, row, on: unit)
    }

    @inline(never)
    private static func resumeSteps(_ task: TaskHandle, _ cdb: CDB, _ row: CommandRow, on unit: LogicalUnit) -> Outcome
    {
        if task.hasExpired { return .failed(.commandTimeout) }
        let outcome = nextStep(task, cdb, row, on: unit)
        // The medium may have become smaller since the command began.
        if case .submit = outcome, let sense = unit.outOfRange(task) { return .failed(sense) }
        return outcome
    }

    private static func nextStep(_ task: TaskHandle, _ cdb: CDB, _ row: CommandRow, on unit: LogicalUnit) -> Outcome {
        switch row.handler {
        case .read: SBC.readAfterFlush(task, on: unit)
        case .verify: SBC.verifyChunk(task, cdb, on: unit)
        case .writeAndVerify: SBC.writeAndVerifyStep(task, cdb, on: unit)
        case .compareAndWrite: SBC.compareAndWriteStep(task, cdb, on: unit)
        case .orWrite: SBC.combineStep(task, cdb, row.extent, .or, on: unit)
        case .xpWrite: SBC.combineStep(task, cdb, row.extent, .exclusiveOr, on: unit)
        case .xdWriteRead: SBC.xdWriteReadStep(task, cdb, row.extent, on: unit)
        case .writeSame: SBC.writeSameChunk(task, on: unit)
        case .unmap: SBC.unmapChunk(task, on: unit)
        case .startStopUnit: SBC.startStopAfterFlush(task, cdb, on: unit)
        case .synchronizeCache: SBC.synchronized(task, on: unit)
        case .preventAllowMediumRemoval: SBC.allowAfterFlush(task, on: unit)
        case .persistentReserveOut: SPC.abortPreempted(task, on: unit)
        case .sendDiagnostic: SPC.selfTestStep(task, on: unit)
        case .preFetch: SBC.preFetchDone(task)
        case .getLBAStatus: SBC.getLBAStatusDone(task, LBAStatusFields(sixteen: cdb), on: unit)
        case .getLBAStatus32: SBC.getLBAStatusDone(task, LBAStatusFields(thirtyTwo: cdb), on: unit)
        case .modeSelect: SPC.flushBeforeStatus(task)
        case .logSense: SPC.logSenseMeasured(task, cdb, on: unit)
        case .readBufferData, .readBufferDescriptor, .readEchoBuffer, .readEchoBufferDescriptor, .writeBufferData,
            .writeEchoBuffer, .receiveDiagnosticResults, .reportTimestamp, .setTimestamp,
            .reportIdentifyingInformation, .setIdentifyingInformation, .reportTargetPortGroups, .setTargetPortGroups,
            .write, .writeAtomic, .testUnitReady, .requestSense, .inquiry, .modeSense, .logSelect, .reportLUNs,
            .reportSupportedOperationCodes, .reportSupportedTaskManagementFunctions, .readCapacity10,
            .readCapacity16, .readDefectData10, .readDefectData12, .persistentReserveIn, .reserve,
            .release:
            preconditionFailure("a command without steps")
        }
    }

    /// Reads the extent that a CDB names into the task, where hazards and the handler look for it.
    @inline(__always)
    static func decodeExtent(_ task: TaskHandle, _ cdb: CDB, _ field: ExtentField) {
        switch field {
        case .none: break
        case .six:
            task.address = UInt64(cdb.uint24(1) & 0x1f_ffff)
            task.blocks = cdb[4] == 0 ? 256 : UInt64(cdb[4])
        case .ten:
            task.address = UInt64(cdb.uint32(2))
            task.blocks = UInt64(cdb.uint16(7))
        case .twelve:
            task.address = UInt64(cdb.uint32(2))
            task.blocks = UInt64(cdb.uint32(6))
        case .sixteen:
            task.address = cdb.uint64(2)
            task.blocks = UInt64(cdb.uint32(10))
        case .compareAndWrite:
            task.address = cdb.uint64(2)
            task.blocks = UInt64(cdb[13])
        case .writeAtomic:
            task.address = cdb.uint64(2)
            task.blocks = UInt64(cdb.uint16(12))
        case .thirtyTwo:
            task.address = cdb.uint64(12)
            task.blocks = UInt64(cdb.uint32(28))
        }
    }

    // MARK: Parameter data and lists

    /// Builds parameter data and transfers it, cut to the allocation length (SPC-4 4.2.5.6).
    static func parameterData(
        _ task: TaskHandle, _ shard: Shard, allocationLength: some BinaryInteger,
        _ build: (inout ParameterWriter) -> Void
    ) -> Outcome {
        var writer = unsafe ParameterWriter(shard.parameters)
        build(&writer)
        let count = min(writer.written, Int(allocationLength))
        guard unsafe UInt64(count) <= task.command.data_in_length else { return .overrun }
        unsafe task.scatter(UnsafeRawBufferPointer(rebasing: shard.parameters[..<count]))
        unsafe task.response.data_in_residual = task.command.data_in_length - UInt64(count)
        return .done(.good)
    }

    /// Copies a parameter list out of the initiator's buffers, once.
    ///
    /// - Returns: `nil` if the buffers hold less than `length` bytes.
    static func parameterList(
        _ task: TaskHandle, length: Int, into buffer: UnsafeMutableRawBufferPointer
    ) -> ParameterReader? {
        guard unsafe UInt64(length) <= task.command.data_out_length else { return nil }
        let target = unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[..<length])
        unsafe task.gather(into: target, from: 0)
        unsafe task.response.data_out_residual = task.command.data_out_length - UInt64(length)
        return unsafe ParameterReader(UnsafeRawBufferPointer(target))
    }

    // MARK: Requests

    /// Fills the task's request. The caller returns `.submit`.
    @inline(__always)
    static func fill(
        _ task: TaskHandle, _ operation: some BinaryInteger, fua: Bool = false, offset: ByteOffset, length: ByteCount,
        segments: UnsafeMutablePointer<iovec>? = nil, count: UInt32 = 0
    ) {
        let request = unsafe task.request
        unsafe request.pointee.operation = UInt8(truncatingIfNeeded: operation)
        unsafe request.pointee.flags = fua ? UInt16(SCSI_BACKSTORE_FUA) : 0
        unsafe request.pointee.offset = offset.value
        unsafe request.pointee.length = length.value
        unsafe request.pointee.segments = unsafe UnsafePointer(segments)
        unsafe request.pointee.segment_count = count
        unsafe request.pointee.error_offset = .max
    }

    /// Adds a flag of scsi_backstore.h to the task's request, which is filled.
    static func add(_ flag: some BinaryInteger, to task: TaskHandle) {
        unsafe task.request.pointee.flags |= UInt16(flag)
    }

    /// The same for a request that reads or writes the task's staging buffer, from its byte `start` on.
    static func fillStaging(
        _ task: TaskHandle, _ shard: Shard, _ operation: some BinaryInteger, fua: Bool = false, offset: ByteOffset,
        length: ByteCount, start: Int = 0
    ) {
        let segment = unsafe task.stagingSegment
        unsafe segment.pointee = unsafe iovec(
            iov_base: shard.staging(task).baseAddress! + start, iov_len: Int(length.value))
        unsafe fill(task, operation, fua: fua, offset: offset, length: length, segments: segment, count: 1)
    }

    /// Asks the backstore to make what it has completed stable.
    static func fillFlush(_ task: TaskHandle) {
        unsafe fill(task, SCSI_BACKSTORE_FLUSH, offset: ByteOffset(0), length: ByteCount(0))
    }
}
