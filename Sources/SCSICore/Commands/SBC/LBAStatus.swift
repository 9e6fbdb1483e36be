// GET LBA STATUS: which blocks are mapped, deallocated or anchored, as the backstore tells.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

extension SBC {
    private static let lbaStatusHeader = 8
    private static let lbaStatusDescriptor = 16

    /// GET LBA STATUS(16). The answer lies in the staging buffer; how far one command looks is the backstore's choice,
    /// and the answer says how far that was.
    static func getLBAStatus(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let address = LogicalBlockAddress(cdb.uint64(2))
        guard address < LogicalBlockAddress(unit.medium.blocks.value) else { return .failed(.lbaOutOfRange(address)) }
        let rest = BlockCount(unit.medium.blocks.value - address.value)
        guard unit.geometry.has(SCSI_BACKSTORE_CAN_REPORT_EXTENTS) else {
            return lbaStatus(task, cdb, on: unit) { descriptors in
                descriptors.add(SCSI_BACKSTORE_MAPPED, rest.value)
            }
        }
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        let wanted = (max(Int(cdb.uint32(10)), lbaStatusHeader) - lbaStatusHeader) / lbaStatusDescriptor
        let count = min(max(wanted, 1), Limits.lbaStatusDescriptors)
        let bytes = UInt64(count * MemoryLayout<scsi_backstore_extent>.stride)
        let answer = unsafe UnsafeMutableRawBufferPointer(rebasing: unit.shard.staging(task)[..<Int(bytes)])
        unsafe answer.initializeMemory(as: UInt8.self, repeating: 0)
        DeviceServer.fillStaging(
            task, unit.shard, SCSI_BACKSTORE_EXTENTS, offset: unit.medium.offset(of: address), length: ByteCount(bytes))
        unsafe task.request.pointee.length = unit.medium.bytes(rest).value
        task.step = 1
        return .submit
    }

    /// The backstore has answered.
    static func getLBAStatusDone(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let answer = unsafe UnsafeRawBufferPointer(unit.shard.staging(task))
        let room = unsafe task.stagingSegment.pointee.iov_len / MemoryLayout<scsi_backstore_extent>.stride
        return lbaStatus(task, cdb, on: unit) { descriptors in
            for index in 0..<room {
                let extent = unsafe answer.load(
                    fromByteOffset: index * MemoryLayout<scsi_backstore_extent>.stride, as: scsi_backstore_extent.self)
                if extent.length == 0 { break }
                descriptors.add(Int(extent.state), extent.length >> unit.medium.blockShift)
            }
        }
    }

    private static func lbaStatus(
        _ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit, _ body: (inout LBAStatusDescriptors) -> Void
    ) -> Outcome {
        var descriptors = LBAStatusDescriptors(address: cdb.uint64(2), end: unit.medium.blocks.value)
        body(&descriptors)
        // A backstore that told nothing, or the medium has become smaller meanwhile.
        guard !descriptors.list.isEmpty else { return .failed(SenseData(.hardwareError, .internalTargetFailure)) }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(10)) { writer in
            writer.zeros(lbaStatusHeader)
            for descriptor in descriptors.list {
                writer.uint64(descriptor.address)
                writer.uint32(descriptor.blocks)
                writer.byte(descriptor.status)
                writer.zeros(3)
            }
            writer.patch32(UInt32(writer.length - 4), at: 0)
        }
    }
}

/// The LBA status descriptors of one answer: stretches that follow each other, in pieces that 32 bits can count.
private struct LBAStatusDescriptors {
    private(set) var list: [(address: UInt64, blocks: UInt32, status: UInt8)] = []
    private var address: UInt64
    /// The size of the medium in blocks.
    private let end: UInt64

    init(address: UInt64, end: UInt64) {
        self.address = address
        self.end = end
    }

    /// Adds a stretch in a state of scsi_backstore.h, whose values are those of PROVISIONING STATUS.
    mutating func add(_ state: Int, _ blocks: UInt64) {
        precondition(state <= SCSI_BACKSTORE_ANCHORED, "a backstore with a state that scsi_backstore.h does not have")
        var left = min(blocks, end - min(address, end))
        while left > 0, list.count < Limits.lbaStatusDescriptors {
            let piece = UInt32(clamping: left)
            list.append((address: address, blocks: piece, status: UInt8(state)))
            address += UInt64(piece)
            left -= UInt64(piece)
        }
    }
}
