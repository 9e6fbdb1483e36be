// PortSlot: one request of a ring, from its copy to its answer.
//
// Owns: the layout of the slot and access to the fields of the request. Called by: XenPort. Must not know: the core.

import CTarget
import CXen
import Xenbus

/// Where a slot's request is; see XenPort.
enum SlotState: UInt8 {
    case free, fresh, waiting, executing, managing, answered
}

/// A request in flight.
@unsafe
struct PortSlot {
    var state = SlotState.free
    var toDevice = false
    var fromDevice = false
    /// Taken by an earlier process, which may have started it.
    var recovered = false
    /// A function of this ring has asked for the command's end.
    var abortRequested = false
    /// The answer is REPORT LUNS parameter data, to be replaced by the map's.
    var reportsMap = false
    /// Of a task management function: one of its parts was not done.
    var functionFailed = false
    /// Of a task management function: parts that are not answered yet.
    var functionsPending: UInt32 = 0
    /// Grows with each request, so that an answer to an earlier one can be told.
    var generation: UInt32 = 0
    /// The request's index in the ring.
    var order: UInt32 = 0
    var segmentCount: Int = 0
    /// Bytes of all segments.
    var dataLength: Int = 0
    /// The run of staging memory, or -1.
    var staging: Int32 = -1
    /// Of a request that waits for staging memory: until when, in the reactor's nanoseconds; 0: not set yet.
    var deadline: UInt64 = 0
    /// Bytes of the staging memory that go to the guest.
    var copyBack: Int = 0
    /// The nexus of a command in the core's hands; `nil` once it is lost.
    var nexus: Unmanaged<TargetNexus>?
    var request = vscsiif_request()
    var response = vscsiif_response()
}

extension UnsafeMutablePointer where Pointee == PortSlot {
    /// Makes the slot hold a new request, which the caller then copies in.
    @inline(__always)
    func begin(order: UInt32) {
        let generation = unsafe pointee.generation &+ 1
        unsafe pointee = unsafe PortSlot()
        unsafe pointee.generation = generation
        unsafe pointee.order = order
        unsafe pointee.state = .fresh
    }

    /// Names this request among all that its ring ever has: the slot's number and the generation.
    @inline(__always)
    func tag(_ index: Int) -> UInt64 { unsafe UInt64(pointee.generation) << 8 | UInt64(index) }

    @inline(__always)
    var channel: UInt16 { unsafe pointee.request.channel }
    @inline(__always)
    var target: UInt16 { unsafe pointee.request.id }
    @inline(__always)
    var lun: UInt16 { unsafe pointee.request.lun }

    /// Channel, target and logical unit.
    @inline(__always)
    var address: UInt64 { unsafe VirtualDevice.key(channel: channel, target: target, lun: lun) }

    /// `timeout_per_command`, or what stands for 0.
    @inline(__always)
    var timeoutSeconds: UInt32 {
        let seconds = unsafe UInt32(pointee.request.timeout_per_command)
        return seconds == 0 ? VSCSIIFLimits.defaultTimeout : seconds
    }

    /// Whether it asks for ABORT or RESET.
    @inline(__always)
    var isFunction: Bool {
        let action = unsafe Int32(pointee.request.act)
        return action == VSCSIIF_ACT_SCSI_ABORT || action == VSCSIIF_ACT_SCSI_RESET
    }

    /// Sixteen bytes of CDB.
    @inline(__always)
    var cdb: UnsafePointer<UInt8> {
        unsafe (UnsafeRawPointer(self) + PortSlotLayout.cdb).assumingMemoryBound(to: UInt8.self)
    }

    /// The 26 segments inside the request.
    @inline(__always)
    var segments: UnsafePointer<vscsiif_segment_t> {
        unsafe (UnsafeRawPointer(self) + PortSlotLayout.segments).assumingMemoryBound(to: vscsiif_segment_t.self)
    }

    /// The 96 bytes of sense data inside the response.
    var sense: UnsafeMutableRawBufferPointer {
        unsafe UnsafeMutableRawBufferPointer(
            start: UnsafeMutableRawPointer(self) + PortSlotLayout.sense, count: Int(VSCSIIF_SENSE_BUFFERSIZE))
    }

    /// Prepares the parts of the response that each has.
    @inline(__always)
    func respond(result: Int32, residual: Int) {
        unsafe pointee.response.rqid = pointee.request.rqid
        unsafe pointee.response.act = pointee.request.act
        unsafe pointee.response.rslt = result
        unsafe pointee.response.residual_len = UInt32(truncatingIfNeeded: residual)
    }

    /// Prepares a response without a status: a host code, nothing transferred.
    func fail(_ host: UInt8) {
        unsafe pointee.copyBack = 0
        unsafe pointee.response.sense_len = 0
        unsafe respond(result: Int32(host) << 16, residual: pointee.dataLength)
    }
}

private enum PortSlotLayout {
    static let request = unsafe MemoryLayout<PortSlot>.offset(of: \.request)!
    static let cdb = request + MemoryLayout<vscsiif_request>.offset(of: \.cmnd)!
    static let segments = request + MemoryLayout<vscsiif_request>.offset(of: \.seg)!
    static let sense =
        unsafe MemoryLayout<PortSlot>.offset(of: \.response)!
        + MemoryLayout<vscsiif_response>.offset(of: \.sense_buffer)!
}

/// Eight bytes of a LUN field as a number, most significant first.
@inline(__always)
func lunField(_ bytes: (UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8)) -> UInt64 {
    unsafe withUnsafeBytes(of: bytes) { unsafe UInt64(bigEndian: $0.loadUnaligned(as: UInt64.self)) }
}

/// A LUN field of eight bytes.
@inline(__always)
func lunBytes(_ field: UInt64) -> (UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8) {
    unsafe unsafeBitCast(field.bigEndian, to: (UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8).self)
}
