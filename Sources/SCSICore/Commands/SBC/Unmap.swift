// UNMAP: a list of extents to deallocate, or to anchor.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

extension SBC {
    private static let unmapHeader = 8
    private static let unmapDescriptor = 16

    /// UNMAP: the whole list is checked before any of it is done. The list lies in the staging buffer;
    /// `progress` counts descriptors in the upper 16 bits and the blocks done of the current one in the lower 48.
    static func unmap(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let length = Int(cdb.uint16(7))
        if length == 0 { return .done(.good) }
        if length < unmapHeader { return .failed(.parameterListLengthError) }
        guard unsafe UInt64(length) <= task.command.data_out_length else { return .overrun }
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        guard let list = unsafe DeviceServer.parameterList(task, length: length, into: unit.shard.staging(task)) else {
            return .overrun
        }
        let descriptors = (min(Int(list.uint16(2)), length - unmapHeader)) / unmapDescriptor
        if descriptors > Limits.unmapDescriptors { return .failed(.invalidField(inParameterList: 2)) }
        var total: UInt64 = 0
        for index in 0..<descriptors {
            let extent = unmapExtent(list, index)
            guard unit.medium.contains(extent.address, extent.blocks) else {
                return .failed(
                    SenseData(
                        .illegalRequest, .logicalBlockAddressOutOfRange,
                        information: extent.address.value))
            }
            total += extent.blocks.value
            if total > Limits.unmapBlocks {
                return .failed(.invalidField(inParameterList: unmapHeader + index * unmapDescriptor + 8))
            }
        }
        task.step = UInt8(1)
        task.progress = 0
        return unmapNext(task, list, descriptors, on: unit)
    }

    private static func unmapExtent(
        _ list: ParameterReader, _ index: Int
    ) -> (address: LogicalBlockAddress, blocks: BlockCount) {
        let offset = unmapHeader + index * unmapDescriptor
        return (LogicalBlockAddress(list.uint64(offset)), BlockCount(UInt64(list.uint32(offset + 8))))
    }

    /// The piece that the request named is done.
    static func unmapChunk(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        unsafe task.progress += task.request.pointee.length >> unit.medium.blockShift
        let list = unsafe ParameterReader(UnsafeRawBufferPointer(unit.shard.staging(task)))
        let length = Int(CDB(task).uint16(7))
        return unmapNext(
            task, list, min(Int(list.uint16(2)), length - unmapHeader) / unmapDescriptor, on: unit)
    }

    private static func unmapNext(
        _ task: TaskHandle, _ list: ParameterReader, _ descriptors: Int, on unit: LogicalUnit
    ) -> Outcome {
        while task.progress >> 48 < UInt64(descriptors) {
            let extent = unmapExtent(list, Int(task.progress >> 48))
            let done = task.progress & (1 << 48 - 1)
            if done == extent.blocks.value {
                task.progress = (task.progress >> 48 + 1) << 48
                continue
            }
            let left = unit.medium.bytes(BlockCount(extent.blocks.value - done)).value
            unsafe DeviceServer.fill(
                task, CDB(task).bit(1, 0) ? SCSI_BACKSTORE_ANCHOR : SCSI_BACKSTORE_DISCARD, fua: unit.mustWriteThrough,
                offset: unit.medium.offset(of: LogicalBlockAddress(extent.address.value + done)),
                length: ByteCount(min(left, unit.limit(unit.geometry.maximum_discard))))
            return .submit
        }
        return .done(.good)
    }
}
