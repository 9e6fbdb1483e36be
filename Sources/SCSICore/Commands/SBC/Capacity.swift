// READ CAPACITY.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

extension SBC {
    /// READ CAPACITY(10): FFFFFFFFh sends the initiator to READ CAPACITY(16).
    static func readCapacity10(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        guard unit.medium.blocks.value > 0 else { return .failed(SenseData(.notReady, .mediumNotPresent)) }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: 8) { writer in
            writer.uint32(UInt32(clamping: unit.medium.blocks.value - 1))
            writer.uint32(unit.geometry.logical_block_size)
        }
    }

    /// READ CAPACITY(16).
    static func readCapacity16(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        guard unit.medium.blocks.value > 0 else { return .failed(SenseData(.notReady, .mediumNotPresent)) }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(10)) { writer in
            writer.uint64(unit.medium.blocks.value - 1)
            writer.uint32(unit.geometry.logical_block_size)
            writer.byte(0)
            writer.byte(unit.physicalBlockExponent)
            let provisioned = unit.isThinProvisioned
            let readsZeros = unit.geometry.has(SCSI_BACKSTORE_DISCARD_READS_ZEROS)
            writer.uint16(
                (provisioned ? 0x8000 : 0) | (provisioned && readsZeros ? 0x4000 : 0) | unit.lowestAlignedBlock)
            writer.zeros(16)
        }
    }
}

extension LogicalUnit {
    /// LOGICAL BLOCKS PER PHYSICAL BLOCK EXPONENT.
    var physicalBlockExponent: UInt8 {
        let ratio = max(geometry.physical_block_size / geometry.logical_block_size, 1)
        return UInt8(min(ratio.trailingZeroBitCount, 15))
    }

    /// LOWEST ALIGNED LOGICAL BLOCK ADDRESS, 14 bits.
    var lowestAlignedBlock: UInt16 {
        UInt16(geometry.lowest_aligned_offset / geometry.logical_block_size & 0x3fff)
    }

    /// LBPME: UNMAP works.
    var isThinProvisioned: Bool { geometry.has(SCSI_BACKSTORE_CAN_DISCARD) }
}
