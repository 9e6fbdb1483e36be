// RingGuest: the front end's side of one ring in memory, its granted pages, and a core whose answers the test chooses.
//
// Called by: the tests of the ring. Must not know: what they show.

import CTarget
import CXen
import Glibc
@testable import SCSICore
import Testing

@testable import XenFront
@testable import Xenbus

/// A nexus that keeps what it receives until the test answers.
final class ScriptedNexus: TargetNexus {
    /// What is done with each command at once; `nil`: it is kept.
    var immediately: ((TaskHandle) -> Void)?
    private(set) var tasks: [TaskHandle] = []
    private(set) var functions: [scsi_task_management_request] = []
    private(set) var isLost = false
    unowned let port: XenPort

    init(_ port: XenPort) { self.port = port }

    override func receive(_ task: TaskHandle) {
        precondition(!isLost)
        task.response = scsi_response()
        if let immediately { immediately(task) } else { tasks.append(task) }
    }

    override func receive(_ request: scsi_task_management_request) { functions.append(request) }

    override func lose() {
        isLost = true
        let ended = tasks
        tasks = []
        for task in ended { complete(task, service: SCSI_SERVICE_ABORTED) }
    }

    func complete(_ task: TaskHandle, service: Int = Int(SCSI_SERVICE_COMMAND_COMPLETE), status: UInt8 = 0) {
        tasks.removeAll { $0 == task }
        task.response.service_response = UInt8(service)
        task.response.status = status
        port.completeTask(task)
    }

    func answer(_ request: scsi_task_management_request, _ response: Int = Int(SCSI_FUNCTION_COMPLETE)) {
        functions.removeAll { $0.cookie == request.cookie && $0.lun.1 == request.lun.1 }
        port.completeManagement(cookie: request.cookie, response: UInt8(response))
    }
}

/// A guest with one vhost, one ring and as many pages as the test grants.
@safe
final class RingGuest {
    static let domain: UInt16 = 7
    let port: XenPort
    let staging: StagingPool
    let grants: Grants
    let page: UnsafeMutableRawPointer
    let recordMemory: UnsafeMutableRawPointer
    private var pages: [UInt32: UnsafeMutableRawPointer] = unsafe [:]
    private var readOnly: Set<UInt32> = []
    private var nextReference: UInt32 = 100
    private(set) var notifications = 0
    /// Calls of the grant copy hypercall.
    private(set) var hypercalls = 0
    /// The whole hypercall fails.
    var copyIsBroken = false

    private var requestProducer: UInt32 = 0
    private var responseConsumer: UInt32 = 0
    static let ring = RingParameters(ringReference: 8, eventChannel: 3)

    init(wholeTarget: Bool = false, stagingBytes: Int = 16 << 20) {
        unsafe page = .allocate(byteCount: 4096, alignment: 4096)
        unsafe page.initializeMemory(as: UInt8.self, repeating: 0, count: 4096)
        unsafe recordMemory = .allocate(byteCount: InflightRecord.bytes, alignment: 64)
        unsafe recordMemory.initializeMemory(as: UInt8.self, repeating: 0, count: InflightRecord.bytes)
        unsafe cxen_init_shared_ring(page)
        staging = StagingPool(bytes: stagingBytes)
        unsafe grantContext = .allocate(capacity: 1)
        grants = unsafe Grants(operations: Self.grantOperations, context: UnsafeMutableRawPointer(grantContext))
        port = XenPort(
            domain: Self.domain, wholeTarget: wholeTarget, grants: grants, staging: staging, batch: GrantBatch())
        unsafe grantContext.initialize(to: Unmanaged.passUnretained(self))
        let record = unsafe InflightRecord(memory: recordMemory)
        record.reset(Self.ring, requestConsumer: 0)
        port.connect(
            unsafe VSCSIIFRing(page: page, requestConsumer: 0, responseProducer: 0), channel: channel, record: record,
            recovered: [])
    }

    private let grantContext: UnsafeMutablePointer<Unmanaged<RingGuest>>

    var channel: EventChannel {
        unsafe EventChannel(
            operations: Self.channelOperations, context: UnsafeMutableRawPointer(grantContext), descriptor: -1)
    }

    deinit {
        unsafe page.deallocate()
        unsafe recordMemory.deallocate()
        unsafe pages.values.forEach { unsafe $0.deallocate() }
        unsafe grantContext.deallocate()
    }

    // MARK: Memory

    /// Grants a page that holds these bytes.
    func grant(_ bytes: [UInt8] = [], readOnly isReadOnly: Bool = false) -> UInt32 {
        let page = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
        unsafe page.initializeMemory(as: UInt8.self, repeating: 0xee, count: 4096)
        for (offset, byte) in bytes.enumerated() {
            unsafe page.storeBytes(of: byte, toByteOffset: offset, as: UInt8.self)
        }
        nextReference += 1
        unsafe pages[nextReference] = page
        if isReadOnly { readOnly.insert(nextReference) }
        return nextReference
    }

    func bytes(_ reference: UInt32, _ range: Range<Int> = 0..<4096) -> [UInt8] {
        let page = unsafe pages[reference]!
        return range.map { unsafe page.load(fromByteOffset: $0, as: UInt8.self) }
    }

    func set(_ reference: UInt32, _ bytes: [UInt8]) {
        for (offset, byte) in bytes.enumerated() {
            unsafe pages[reference]!.storeBytes(of: byte, toByteOffset: offset, as: UInt8.self)
        }
    }

    func revoke(_ reference: UInt32) { unsafe pages.removeValue(forKey: reference)?.deallocate() }

    /// As the hypervisor does it: each copy by itself, each with its own status.
    fileprivate func copy(_ segments: UnsafeMutablePointer<xengnttab_grant_copy_segment_t>, _ count: Int) -> Int32 {
        hypercalls += 1
        if copyIsBroken { return -1 }
        for index in 0..<count {
            let segment = unsafe segments + index
            precondition(unsafe cxen_copy_domain(segment) == Self.domain)
            let offset = unsafe Int(cxen_copy_offset(segment))
            let length = unsafe Int(segment.pointee.len)
            let reference = unsafe cxen_copy_reference(segment)
            let toGuest = unsafe cxen_copy_is_to_guest(segment)
            guard let page = unsafe pages[reference] else {
                unsafe segment.pointee.status = Int16(GNTST_bad_gntref)
                continue
            }
            guard offset + length <= 4096 else {
                unsafe segment.pointee.status = Int16(GNTST_bad_copy_arg)
                continue
            }
            guard !toGuest || !readOnly.contains(reference) else {
                unsafe segment.pointee.status = Int16(GNTST_permission_denied)
                continue
            }
            if toGuest {
                unsafe memcpy(page + offset, cxen_copy_local(segment), length)
            } else {
                unsafe memcpy(cxen_copy_local(segment), page + offset, length)
            }
            unsafe segment.pointee.status = Int16(GNTST_okay)
        }
        return 0
    }

    nonisolated(unsafe) private static let grantOperations: UnsafePointer<GrantOperations> = {
        let operations = UnsafeMutablePointer<GrantOperations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: GrantOperations(
                map: { _, _, _ in nil }, unmap: { _, _ in },
                copy: { context, segments, count in
                    unsafe context.load(as: Unmanaged<RingGuest>.self).takeUnretainedValue().copy(segments, count)
                }))
        return unsafe UnsafePointer(operations)
    }()

    nonisolated(unsafe) private static let channelOperations: UnsafePointer<EventChannelOperations> = {
        let operations = UnsafeMutablePointer<EventChannelOperations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: EventChannelOperations(
                notify: { unsafe $0.load(as: Unmanaged<RingGuest>.self).takeUnretainedValue().notifications += 1 },
                acknowledge: { _ in }, close: { _ in }))
        return unsafe UnsafePointer(operations)
    }()

    // MARK: Ring

    /// Puts a request in the ring.
    func put(_ request: vscsiif_request) {
        var request = request
        unsafe cxen_write_request(page, requestProducer, &request)
        requestProducer &+= 1
        unsafe cxen_set_request_producer(page, requestProducer)
    }

    func setRequestProducer(_ index: UInt32) { unsafe cxen_set_request_producer(page, index) }
    func setResponseProducer(_ index: UInt32) { unsafe cxen_set_response_producer(page, index) }

    /// Takes the answers that are there.
    func responses() -> [vscsiif_response] {
        var responses: [vscsiif_response] = []
        while unsafe cxen_response_producer(page) != responseConsumer {
            var response = vscsiif_response()
            unsafe cxen_copy_response(page, responseConsumer, &response)
            responses.append(response)
            responseConsumer &+= 1
        }
        unsafe cxen_set_response_event(page, responseConsumer &+ 1)
        return responses
    }

    /// One turn of the reactor.
    func turn() {
        _ = port.poll()
        port.flush()
    }

    /// Attaches a scripted device.
    func attach(_ device: VirtualDevice, unit: Int = 0, nexus: ScriptedNexus? = nil) -> ScriptedNexus {
        let nexus = nexus ?? ScriptedNexus(port)
        #expect(port.attach(device, unit: LUN(unit)!, nexus: nexus))
        return nexus
    }
}

/// A request with a CDB and direct segments.
func command(
    _ rqid: UInt16, cdb: [UInt8] = [0, 0, 0, 0, 0, 0], direction: UInt8 = 3, channel: UInt16 = 0, target: UInt16 = 0,
    lun: UInt16 = 0, segments: [(UInt32, UInt16, UInt16)] = [], indirect: Bool = false, timeout: UInt16 = 30
) -> vscsiif_request {
    var request = vscsiif_request()
    request.rqid = rqid
    request.act = UInt8(VSCSIIF_ACT_SCSI_CDB)
    request.cmd_len = UInt8(cdb.count)
    unsafe withUnsafeMutableBytes(of: &request.cmnd) { unsafe $0.copyBytes(from: cdb.prefix(16)) }
    request.timeout_per_command = timeout
    request.channel = channel
    request.id = target
    request.lun = lun
    request.sc_data_direction = direction
    request.nr_segments = UInt8(segments.count) | (indirect ? UInt8(VSCSIIF_SG_GRANT) : 0)
    unsafe withUnsafeMutableBytes(of: &request.seg) { seg in
        let list = unsafe seg.bindMemory(to: vscsiif_segment_t.self)
        for (index, segment) in segments.prefix(26).enumerated() {
            unsafe list[index] = vscsiif_segment_t(gref: segment.0, offset: segment.1, length: segment.2)
        }
    }
    return request
}

/// An ABORT or RESET request.
func function(
    _ rqid: UInt16, _ action: Int32, reference: UInt16 = 0, channel: UInt16 = 0, target: UInt16 = 0, lun: UInt16 = 0
) -> vscsiif_request {
    var request = command(rqid, channel: channel, target: target, lun: lun)
    request.act = UInt8(action)
    request.ref_rqid = reference
    return request
}

/// The bytes of a table of segments.
func segmentTable(_ segments: [(UInt32, UInt16, UInt16)]) -> [UInt8] {
    segments.flatMap { reference, offset, length -> [UInt8] in
        (0..<4).map { UInt8(truncatingIfNeeded: reference >> (8 * UInt32($0))) }
            + [UInt8(offset & 0xff), UInt8(offset >> 8), UInt8(length & 0xff), UInt8(length >> 8)]
    }
}

extension vscsiif_response {
    var host: Int32 { (rslt >> 16) & 0xff }
    var status: Int32 { rslt & 0xff }
}

extension TaskHandle {
    /// The bytes that a command brings.
    var dataOut: [UInt8] {
        let command = unsafe self.command
        return unsafe (0..<Int(command.data_out_count)).flatMap { index in
            let segment = unsafe command.data_out[index]
            return unsafe [UInt8](UnsafeRawBufferPointer(start: segment.iov_base, count: segment.iov_len))
        }
    }

    /// Fills the beginning of the buffer, and sets the residual.
    func fillDataIn(_ bytes: [UInt8]) {
        let command = unsafe self.command
        let count = unsafe min(bytes.count, Int(command.data_in_length))
        if count > 0 { unsafe command.data_in[0].iov_base.copyMemory(from: bytes, byteCount: count) }
        unsafe response.data_in_residual = command.data_in_length - UInt64(count)
    }

    var cdb: [UInt8] { unsafe withUnsafeBytes(of: command.cdb) { unsafe [UInt8]($0.prefix(Int(command.cdb_length))) } }
}
