// VirtioSCSIRequest: the structures of virtio-scsi (virtio 1.2 clause 5.6.6) as bytes: request headers copied out of a
// chain, responses into it, and the two ways to write a LUN.
//
// Called by: VirtioSCSIDevice. Must not know: rings, SCSI commands.

import CLinux
import CTarget
import SCSICore

/// A response code (5.6.6.1, 5.6.6.2), by the names of linux/virtio_scsi.h.
enum VirtioSCSIResponse: UInt8 {
    case ok = 0, overrun, aborted, badTarget, reset, busy, transportFailure, targetFailure, nexusFailure, failure
    case functionSucceeded, functionRejected, incorrectLUN

    /// FUNCTION COMPLETE has the value of OK.
    static let functionComplete = Self.ok
}

/// What the driver may set in the configuration space (5.6.4), where the front-end leaves that to us; QEMU does not,
/// and gives the defaults.
struct VirtioSCSISizes: Equatable {
    /// Bytes of the CDB field; a CDB that is longer than the core's is cut there, and no command has one.
    var cdb = Int(VIRTIO_SCSI_CDB_DEFAULT_SIZE)
    /// Bytes of the sense field; longer sense data is cut.
    var sense = Int(VIRTIO_SCSI_SENSE_DEFAULT_SIZE)

    /// What is accepted: a CDB of 6 to 260 bytes, the longest that SPC-6 knows; sense data of up to its longest, 252.
    static let cdbs = 6...260
    static let senses = 0...252
    static let requestCapacity = 19 + 260
    static let responseCapacity = 12 + 252

    /// lun, id, task_attr, prio, crn, cdb.
    @inline(__always) var requestHeader: Int { 19 + cdb }
    @inline(__always) var response: Int { VirtioSCSILayout.responseHeader + sense }
}

/// Events that a driver can subscribe to (5.6.6.2): those that the core has something to say of.
enum AsynchronousEvent {
    static let operationalChange = UInt32(2)
    static let mediaChange = UInt32(16)
    static let supported = operationalChange | mediaChange

    /// The event of a unit attention with this additional sense code: 28h and 3Ah are about the medium, 2Ah
    /// (parameters) and 3Fh (operating conditions) about the unit.
    static func reason(_ code: UInt8) -> UInt32 {
        switch code {
        case 0x28, 0x3a: mediaChange
        case 0x2a, 0x3f: operationalChange
        default: 0
        }
    }
}

/// Sizes in bytes that are fixed.
enum VirtioSCSILayout {
    /// sense_len, residual, status_qualifier, status, response.
    static let responseHeader = 12
    static let controlType = 4
    static let taskManagementRest = 20
    static let asynchronousNotificationRest = 12
    static let event = 16
}

/// The eight bytes of a LUN field of virtio-scsi, most significant first.
struct VirtioSCSILUN {
    let bytes: UInt64

    /// Which target it addresses: format {1, target, LUN, 0}; the REPORT LUNS well-known unit has no target of its own.
    var target: UInt8? { bytes >> 56 == 1 ? UInt8(truncatingIfNeeded: bytes >> 48) : nil }

    /// {C1h, 01h, 0 …}: the REPORT LUNS well-known unit.
    var isReportLUNsWellKnown: Bool { bytes == 0xc101 << 48 }

    /// The single level LUN structure as SAM-6 4.7 writes it.
    var samField: UInt64 { isReportLUNsWellKnown ? bytes : bytes << 16 }

    /// The bytes that address a unit of a target, in the encoding of REPORT LUNS: Linux looks a unit up by them.
    static func bytes(target: UInt8, samField: UInt64) -> UInt64 {
        1 << 56 | UInt64(target) << 48 | (samField >> 48) << 32
    }
}

/// The request header of a command, copied out of the chain.
@safe
struct VirtioSCSICommandHeader {
    /// Fills the command of a task from the header's bytes. A CDB field that is longer than the core's CDB ends there.
    @inline(__always)
    static func fill(_ command: inout scsi_command, from header: UnsafeRawBufferPointer, cdbSize: Int) {
        let size = unsafe min(cdbSize, MemoryLayout.size(ofValue: command.cdb))
        let lun = unsafe VirtioSCSILUN(bytes: UInt64(bigEndian: header.loadUnaligned(as: UInt64.self)))
        unsafe withUnsafeMutableBytes(of: &command.lun) {
            unsafe $0.storeBytes(of: lun.samField.bigEndian, as: UInt64.self)
        }
        unsafe command.tag = UInt64(littleEndian: header.loadUnaligned(fromByteOffset: 8, as: UInt64.self))
        unsafe command.attribute = header[16]
        unsafe command.priority = header[17] & 0x0f
        unsafe withUnsafeMutableBytes(of: &command.cdb) {
            unsafe $0.copyMemory(from: UnsafeRawBufferPointer(rebasing: header[19..<19 + size]))
        }
        unsafe command.cdb_length = UInt8(size)
        unsafe command.timeout_milliseconds = 0
    }
}

extension ResponsePieces {
    /// Writes the response of a command without sense data.
    @inline(__always)
    func writeCommand(
        _ response: VirtioSCSIResponse, status: UInt8, qualifier: UInt16, residual: UInt32, senseSize: Int
    ) {
        unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSISizes.responseCapacity, alignment: 8) { whole in
            let size = VirtioSCSILayout.responseHeader + senseSize
            let bytes = unsafe UnsafeMutableRawBufferPointer(rebasing: whole[..<size])
            unsafe bytes.initializeMemory(as: UInt8.self, repeating: 0)
            unsafe Self.header(
                bytes, response, status: status, qualifier: qualifier, residual: residual, senseLength: 0)
            unsafe write(UnsafeRawBufferPointer(bytes))
        }
    }

    /// Writes the response of a command with the sense data of its task.
    func writeCommand(_ task: TaskHandle, status: UInt8, qualifier: UInt16, residual: UInt32, senseSize: Int) {
        unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSISizes.responseCapacity, alignment: 8) { whole in
            let size = VirtioSCSILayout.responseHeader + senseSize
            let bytes = unsafe UnsafeMutableRawBufferPointer(rebasing: whole[..<size])
            unsafe bytes.initializeMemory(as: UInt8.self, repeating: 0)
            let sense = unsafe UnsafeMutableRawBufferPointer(rebasing: bytes[VirtioSCSILayout.responseHeader...])
            let length = unsafe task.copySense(into: sense)
            unsafe Self.header(
                bytes, .ok, status: status, qualifier: qualifier, residual: residual, senseLength: UInt32(length))
            unsafe write(UnsafeRawBufferPointer(bytes))
        }
    }

    @inline(__always)
    private static func header(
        _ bytes: UnsafeMutableRawBufferPointer, _ response: VirtioSCSIResponse, status: UInt8, qualifier: UInt16,
        residual: UInt32, senseLength: UInt32
    ) {
        unsafe bytes.storeBytes(of: senseLength.littleEndian, as: UInt32.self)
        unsafe bytes.storeBytes(of: residual.littleEndian, toByteOffset: 4, as: UInt32.self)
        unsafe bytes.storeBytes(of: qualifier.littleEndian, toByteOffset: 8, as: UInt16.self)
        unsafe bytes[10] = status
        unsafe bytes[11] = response.rawValue
    }
}

extension VirtioSCSIResponse {
    /// What a task's service response is in virtio's words.
    @inline(__always)
    init(_ service: UInt8) {
        switch ServiceResponse(rawValue: service) {
        case .commandComplete: self = .ok
        case .aborted: self = .aborted
        case .reset: self = .reset
        case .overrun: self = .overrun
        case .targetFailure: self = .targetFailure
        // Its ring stops, has to be drained, and could not wait: once it runs again, the same request will do.
        case .suspended: self = .busy
        case nil: self = .failure
        }
    }

    /// What a task management function's service response is in virtio's words.
    init(function response: UInt8) {
        switch TaskManagementResponse(rawValue: response) {
        case .functionComplete: self = .functionComplete
        case .functionSucceeded: self = .functionSucceeded
        case .functionRejected: self = .functionRejected
        case .incorrectLogicalUnitNumber: self = .incorrectLUN
        case nil: self = .failure
        }
    }

    /// What a task management subtype (5.6.6.2) is in SAM's words.
    static func function(subtype: UInt32) -> TaskManagementFunction? {
        switch Int32(bitPattern: subtype) {
        case VIRTIO_SCSI_T_TMF_ABORT_TASK: .abortTask
        case VIRTIO_SCSI_T_TMF_ABORT_TASK_SET: .abortTaskSet
        case VIRTIO_SCSI_T_TMF_CLEAR_ACA: .clearACA
        case VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET: .clearTaskSet
        case VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET: .nexusReset
        case VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET: .logicalUnitReset
        case VIRTIO_SCSI_T_TMF_QUERY_TASK: .queryTask
        case VIRTIO_SCSI_T_TMF_QUERY_TASK_SET: .queryTaskSet
        default: nil
        }
    }
}
