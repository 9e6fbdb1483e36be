// GET LBA STATUS: which blocks are mapped, deallocated or anchored, as the backstore tells.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

/// What a CDB asks for, in either form.
struct LBAStatusFields {
    /// STARTING LOGICAL BLOCK ADDRESS, and the byte of the CDB where it is.
    let address: LogicalBlockAddress
    let addressByte: Int
    /// SCAN LENGTH; `nil`: up to the end of the medium.
    let blocks: BlockCount?
    /// ALLOCATION LENGTH.
    let allocationLength: UInt32

    /// GET LBA STATUS(16) (SBC-4 5.6).
    init(sixteen cdb: CDB) {
        address = LogicalBlockAddress(cdb.uint64(2))
        addressByte = 2
        blocks = nil
        allocationLength = cdb.uint32(10)
    }

    /// GET LBA STATUS(32) (SBC-4 5.7).
    init(thirtyTwo cdb: CDB) {
        address = LogicalBlockAddress(cdb.uint64(12))
        addressByte = 12
        blocks = cdb.uint32(20) == 0 ? nil : BlockCount(UInt64(cdb.uint32(20)))
        allocationLength = cdb.uint32(28)
    }

    /// Where what is asked for ends, on a medium of so many blocks.
    func end(_ medium: UInt64) -> UInt64 {
        guard let blocks, address.value < medium else { return medium }
        return address.value + min(blocks.value, medium - address.value)
    }
}

extension SBC {
    private static let lbaStatusHeader = 8
    private static let lbaStatusDescriptor = 16

    /// GET LBA STATUS(32), a variable length CDB. There are no physical elements, so ELEMENT IDENTIFIER can only be
    /// zero: all of them.
    static func getLBAStatus32(_ task: TaskHandle, _ cdb: CDB, _ row: CommandRow, on unit: LogicalUnit) -> Outcome {
        if let sense = CommandTable.validateVariableLength(cdb, against: row) { return .failed(sense) }
        return getLBAStatus(task, LBAStatusFields(thirtyTwo: cdb), on: unit)
    }

    /// GET LBA STATUS. The answer lies in the staging buffer; how far one command looks is the backstore's choice, and
    /// the answer says how far that was. REPORT TYPE can only be zero: all blocks.
    static func getLBAStatus(_ task: TaskHandle, _ fields: LBAStatusFields, on unit: LogicalUnit) -> Outcome {
        let address = fields.address
        guard address < LogicalBlockAddress(unit.medium.blocks.value) else {
            return .failed(.lbaOutOfRange(address, field: fields.addressByte))
        }
        let rest = BlockCount(fields.end(unit.medium.blocks.value) - address.value)
        guard unit.geometry.has(SCSI_BACKSTORE_CAN_REPORT_EXTENTS) else {
            return lbaStatus(task, fields, on: unit) { descriptors in
                descriptors.add(SCSI_BACKSTORE_MAPPED, rest.value)
            }
        }
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        let wanted = (max(Int(fields.allocationLength), lbaStatusHeader) - lbaStatusHeader) / lbaStatusDescriptor
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
    static func getLBAStatusDone(_ task: TaskHandle, _ fields: LBAStatusFields, on unit: LogicalUnit) -> Outcome {
        let answer = unsafe UnsafeRawBufferPointer(unit.shard.staging(task))
        let room = unsafe task.stagingSegment.pointee.iov_len / MemoryLayout<scsi_backstore_extent>.stride
        return lbaStatus(task, fields, on: unit) { descriptors in
            for index in 0..<room {
                let extent = unsafe answer.load(
                    fromByteOffset: index * MemoryLayout<scsi_backstore_extent>.stride, as: scsi_backstore_extent.self)
                if extent.length == 0 { break }
                descriptors.add(Int(extent.state), extent.length >> unit.medium.blockShift)
            }
        }
    }

    private static func lbaStatus(
        _ task: TaskHandle, _ fields: LBAStatusFields, on unit: LogicalUnit,
        _ body: (inout LBAStatusDescriptors) -> Void
    ) -> Outcome {
        var descriptors = LBAStatusDescriptors(
            address: fields.address.value, end: fields.end(unit.medium.blocks.value))
        body(&descriptors)
        // A backstore that told nothing, or the medium has become smaller meanwhile.
        guard !descriptors.list.isEmpty else { return .failed(SenseData(.hardwareError, .internalTargetFailure)) }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: fields.allocationLength) { writer in
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
    /// Where the stretches end at the latest.
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
