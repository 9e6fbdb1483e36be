// FuzzedXenGuest: a Xen guest's ring page, its grants, and its event channel, which the input fills.
//
// Owns: the pages. Called by: XenRingFuzzer; the front, through the seams of grants and event channels. Must not know:
// how the front reads any of it.

import CFuzzer
import CXen
import Glibc

@testable import XenFront
@testable import Xenbus

@safe
final class FuzzedXenGuest {
    static let domain: UInt16 = 7
    static let ring = RingParameters(ringReference: 8, eventChannel: 3)
    static let pages = 16, pageBytes = 4096, firstReference: UInt32 = 100

    let page: UnsafeMutableRawPointer
    /// What outlives the daemon.
    let recordMemory: UnsafeMutableRawPointer
    private let memory: UnsafeMutableRawPointer
    private let context: UnsafeMutablePointer<Unmanaged<FuzzedXenGuest>>
    /// Which pages are granted, and which for reading only, a bit each.
    var granted: UInt16 = .max, readOnly: UInt16 = 0
    /// The next hypercalls fail as a whole.
    var failures = 0
    /// Whether memory was written that no honest guest would write to: then nothing is known about the answers.
    private(set) var isHostile = false
    private var producer: UInt32 = 0, consumer: UInt32 = 0
    private var nextNumber: UInt16 = 0
    /// Requests that were not answered, by number: numbers grow, so that of two the later one has the greater.
    private(set) var outstanding: [UInt16: vscsiif_request] = [:]
    /// Commands of a device that is gone come back by themselves, after a reset of what is at its place.
    var hasLostDevices = false

    init() {
        unsafe page = .allocate(byteCount: Self.pageBytes, alignment: Self.pageBytes)
        unsafe recordMemory = .allocate(byteCount: InflightRecord.bytes, alignment: 64)
        unsafe memory = .allocate(byteCount: Self.pages * Self.pageBytes, alignment: Self.pageBytes)
        unsafe context = .allocate(capacity: 1)
        unsafe page.initializeMemory(as: UInt8.self, repeating: 0, count: Self.pageBytes)
        unsafe recordMemory.initializeMemory(as: UInt8.self, repeating: 0, count: InflightRecord.bytes)
        unsafe memory.initializeMemory(as: UInt8.self, repeating: 0, count: Self.pages * Self.pageBytes)
        unsafe cxen_init_shared_ring(page)
        unsafe context.initialize(to: Unmanaged.passUnretained(self))
    }

    deinit {
        unsafe page.deallocate()
        unsafe recordMemory.deallocate()
        unsafe memory.deallocate()
        unsafe context.deallocate()
    }

    // MARK: The seams

    var grants: Grants { unsafe Grants(operations: Self.grantOperations, context: context) }
    var channel: EventChannel {
        unsafe EventChannel(operations: Self.channelOperations, context: context, descriptor: -1)
    }

    nonisolated(unsafe) private static let grantOperations: UnsafePointer<GrantOperations> = {
        let operations = UnsafeMutablePointer<GrantOperations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: GrantOperations(
                map: { _, _, _ in nil }, unmap: { _, _ in },
                copy: { context, segments, count in
                    unsafe context.load(as: Unmanaged<FuzzedXenGuest>.self).takeUnretainedValue().copy(segments, count)
                }))
        return unsafe UnsafePointer(operations)
    }()

    nonisolated(unsafe) private static let channelOperations: UnsafePointer<EventChannelOperations> = {
        let operations = UnsafeMutablePointer<EventChannelOperations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: EventChannelOperations(notify: { _ in }, acknowledge: { _ in }, close: { _ in }))
        return unsafe UnsafePointer(operations)
    }()

    /// As the hypervisor does it: each copy by itself, each with its own status.
    private func copy(_ segments: UnsafeMutablePointer<xengnttab_grant_copy_segment_t>, _ count: Int) -> Int32 {
        if failures > 0 {
            failures -= 1
            return -1
        }
        for index in 0..<count {
            let segment = unsafe segments + index
            precondition(unsafe cxen_copy_domain(segment) == Self.domain, "a copy of another domain's memory")
            let number = unsafe Int(cxen_copy_reference(segment)) - Int(Self.firstReference)
            let (offset, length) = unsafe (Int(cxen_copy_offset(segment)), Int(segment.pointee.len))
            let toGuest = unsafe cxen_copy_is_to_guest(segment)
            guard number >= 0, number < Self.pages, granted & 1 << UInt16(number) != 0 else {
                unsafe segment.pointee.status = Int16(GNTST_bad_gntref)
                continue
            }
            guard offset + length <= Self.pageBytes else {
                unsafe segment.pointee.status = Int16(GNTST_bad_copy_arg)
                continue
            }
            guard !toGuest || readOnly & 1 << UInt16(number) == 0 else {
                unsafe segment.pointee.status = Int16(GNTST_permission_denied)
                continue
            }
            let place = unsafe memory + number * Self.pageBytes + offset
            let local = unsafe cxen_copy_local(segment)!
            if toGuest { unsafe memcpy(place, local, length) } else { unsafe memcpy(local, place, length) }
            unsafe segment.pointee.status = Int16(GNTST_okay)
        }
        return 0
    }

    // MARK: The ring

    /// Puts a request of the input in the ring, if there is room.
    func put(_ input: inout FuzzInput) {
        guard outstanding.count < 16 else { return }
        nextNumber &+= 1
        var request = makeRequest(nextNumber, &input)
        outstanding[nextNumber] = request
        Trace.note("request \(request)")
        unsafe cxen_write_request(page, producer, &request)
        producer &+= 1
        unsafe cxen_set_request_producer(page, producer)
    }

    private func makeRequest(_ number: UInt16, _ input: inout FuzzInput) -> vscsiif_request {
        var request = vscsiif_request()
        request.rqid = number
        request.act = input.rarely(8) ? input.byte() : [1, 1, 1, 1, 1, 1, 2, 3][input.below(8)]
        let code: UInt8 = input.rarely(8) ? input.byte() : Self.operationCodes[input.below(Self.operationCodes.count)]
        var cdb = [code] + input.exactly(9)
        if code == 0x28 || code == 0x2a { cdb = [code, 0, 0, 0, 0, cdb[1] & 0x3f, 0, 0, cdb[2] & 0x0f, 0] }
        if code == 0xa0 { cdb = [code, 0, cdb[1] & 0x13, 0, 0, 0, 0, 0, cdb[2], cdb[3], 0, 0] }
        request.cmd_len = input.rarely(16) ? input.byte() : UInt8(cdb.count)
        unsafe withUnsafeMutableBytes(of: &request.cmnd) { unsafe $0.copyBytes(from: cdb) }
        request.timeout_per_command = input.rarely(8) ? input.number() : 0
        request.channel = input.rarely(16) ? input.number() : 0
        request.id = UInt16(input.rarely(4) ? input.below(3) : 0)
        request.lun = input.rarely(16) ? input.number() : 0
        request.sc_data_direction = input.rarely(16) ? input.byte() : UInt8(input.below(4))
        request.ref_rqid = number &- UInt16(input.below(16))
        // READ(10) and WRITE(10) have what they ask for, mostly: the medium shall have something to do.
        if code == 0x28 || code == 0x2a, !input.rarely(4) {
            request.sc_data_direction = code == 0x2a ? 1 : 2
            fillSegments(&request, Int(cdb[8]), &input)
        } else {
            fillSegments(&request, input.below(27), &input)
        }
        return request
    }

    private static let operationCodes: [UInt8] = [
        0x28, 0x2a, 0x28, 0x2a, 0x00, 0x12, 0xa0, 0x25, 0x1a, 0x35, 0x2f, 0x42, 0x41, 0x89, 0x5f, 0x1b,
    ]

    private func fillSegments(_ request: inout vscsiif_request, _ count: Int, _ input: inout FuzzInput) {
        var list = (0..<count).map { _ in segment(&input) }
        var flags: UInt8 = 0
        if input.rarely(4) {
            // A table of them in a page, which may be cut into pieces.
            let page = input.below(Self.pages), repeats = 1 + input.below(6)
            let table = Array(repeatElement(list, count: repeats).joined())
            for (index, segment) in table.enumerated() where index < 512 {
                unsafe (memory + page * Self.pageBytes).storeBytes(
                    of: segment, toByteOffset: index * 8, as: vscsiif_segment_t.self)
            }
            let bytes = min(table.count * 8, 4096), first = input.rarely(3) ? input.below(256) & ~7 : 0
            let reference = Self.firstReference + UInt32(page)
            list = [vscsiif_segment_t(gref: reference, offset: 0, length: UInt16(min(first, bytes)))]
            list.append(
                vscsiif_segment_t(
                    gref: reference, offset: UInt16(min(first, bytes)), length: UInt16(bytes - min(first, bytes))))
            if input.rarely(8) { list[0] = segment(&input) }
            flags = UInt8(VSCSIIF_SG_GRANT)
        }
        request.nr_segments = (input.rarely(16) ? input.byte() : UInt8(list.count)) | flags
        unsafe withUnsafeMutableBytes(of: &request.seg) { bytes in
            for (index, segment) in list.prefix(26).enumerated() {
                unsafe bytes.storeBytes(of: segment, toByteOffset: index * 8, as: vscsiif_segment_t.self)
            }
        }
    }

    private func segment(_ input: inout FuzzInput) -> vscsiif_segment_t {
        let choice = input.byte()
        let page = Self.firstReference + UInt32(choice & 15)
        guard choice & 0xe0 == 0xe0 else { return vscsiif_segment_t(gref: page, offset: 0, length: 512) }
        return vscsiif_segment_t(
            gref: input.rarely(4) ? input.number() : page, offset: input.number(), length: input.number())
    }

    /// Takes the answers that are there.
    func takeAnswers() {
        let answered = unsafe cxen_response_producer(page)
        var budget = 64
        while answered != consumer, budget > 0 {
            budget -= 1
            var response = vscsiif_response()
            unsafe cxen_copy_response(page, consumer, &response)
            Trace.note("answer \(response.rqid) \(String(response.rslt, radix: 16))")
            let request = outstanding.removeValue(forKey: response.rqid)
            precondition(request != nil || isHostile, "an answer to nothing")
            if let request, !isHostile { check(request, response) }
            consumer &+= 1
        }
        if isHostile { consumer = answered }
        unsafe cxen_set_response_event(page, consumer &+ 1)
    }

    /// What a function has ended is answered before it is; a command with more segments than there are is refused.
    private func check(_ function: vscsiif_request, _ response: vscsiif_response) {
        let action = Int32(function.act)
        let segments = Int32(function.nr_segments & ~UInt8(VSCSIIF_SG_GRANT))
        if action == VSCSIIF_ACT_SCSI_CDB, segments > VSCSIIF_SG_TABLESIZE {
            precondition(response.rslt >> 16 != 0, "a request with \(segments) segments is carried out")
        }
        guard action == VSCSIIF_ACT_SCSI_ABORT || action == VSCSIIF_ACT_SCSI_RESET,
            response.rslt == XEN_VSCSIIF_RSLT_RESET_SUCCESS
        else { return }
        for (number, request) in outstanding where number < function.rqid {
            guard request.act == UInt8(VSCSIIF_ACT_SCSI_CDB), request.channel == function.channel,
                request.id == function.id, request.lun == function.lun
            else { continue }
            let isEnded = action == VSCSIIF_ACT_SCSI_ABORT ? number == function.ref_rqid : !hasLostDevices
            precondition(!isEnded, "a function is answered before a command that it has ended")
        }
    }

    /// What the front has in its own memory where nobody has written, eight bytes of it: no guest may ever see them.
    static let secret: UInt64 = 0x5ec2_e75e_c2e7_5ec2

    /// Nothing that is not the guest's has come to it.
    func checkSecrets() {
        for offset in stride(from: 0, to: Self.pages * Self.pageBytes, by: 8) {
            let word = unsafe (memory + offset).load(as: UInt64.self)
            precondition(word != Self.secret, "memory of the daemon was copied to the guest")
        }
    }

    /// Writes into the ring or a granted page.
    func poke(_ input: inout FuzzInput) {
        let mutation = Mutation(&input)
        _ = exchange(mutation, mutation.value)
    }
}

extension FuzzedXenGuest: SharedWithMutator {
    func exchange(_ mutation: Mutation, _ value: UInt64) -> UInt64 {
        isHostile = true
        let place =
            unsafe mutation.place & 3 != 0
            ? page + mutation.offset % Self.pageBytes
            : memory + mutation.offset * 8 % (Self.pages * Self.pageBytes)
        let aligned = unsafe UnsafeMutableRawPointer(bitPattern: UInt(bitPattern: place) & ~7)!
        switch mutation.width {
        case 1: return unsafe UInt64(exchange(UInt8(truncatingIfNeeded: value), at: aligned))
        case 2: return unsafe UInt64(exchange(UInt16(truncatingIfNeeded: value), at: aligned))
        case 4: return unsafe UInt64(exchange(UInt32(truncatingIfNeeded: value), at: aligned))
        default: return unsafe exchange(value, at: aligned)
        }
    }

    private func exchange<Value: FixedWidthInteger>(_ value: Value, at place: UnsafeMutableRawPointer) -> Value {
        let old = unsafe place.load(as: Value.self)
        unsafe place.storeBytes(of: value, as: Value.self)
        return old
    }
}
