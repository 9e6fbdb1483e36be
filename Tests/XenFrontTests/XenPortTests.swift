// XenPortTests: each request of the ring gets its one answer, and the answer is right.

import CTarget
import CXen
@testable import SCSICore
import Testing

@testable import XenFront
@testable import Xenbus

private let disk = VirtualDevice(channel: 0, target: 0, lun: 0)

@Suite("The vscsiif ring: commands")
struct XenPortCommandTests {
    @Test("A command without data reaches the core with its fields and is answered with its status")
    func noData() {
        let guest = RingGuest()
        let nexus = guest.attach(VirtualDevice(channel: 1, target: 2, lun: 3), unit: 5)
        let cdb: [UInt8] = [0x1b, 1, 2, 3, 4, 5]
        guest.put(command(77, cdb: cdb, channel: 1, target: 2, lun: 3, timeout: 60))
        guest.turn()
        #expect(nexus.tasks.count == 1)
        let task = nexus.tasks[0]
        #expect(task.cdb == cdb)
        #expect(unsafe lunField(task.command.lun) == LUN(5)!.field)
        #expect(unsafe task.command.timeout_milliseconds == 60_000)
        #expect(unsafe task.command.data_in_length == 0 && task.command.data_out_length == 0)
        #expect(guest.responses().isEmpty)
        nexus.complete(task, status: SCSIStatus.reservationConflict.rawValue)
        guest.turn()
        let responses = guest.responses()
        #expect(responses.map(\.rqid) == [77])
        #expect(responses[0].rslt == 0x18)
        #expect(guest.notifications == 1)
    }

    @Test("The SCSI-2 unit number that Linux puts into INQUIRY is taken out, other reserved bits are not")
    func unitNumberInInquiry() {
        let guest = RingGuest()
        let nexus = guest.attach(VirtualDevice(channel: 0, target: 0, lun: 11))
        guest.put(command(1, cdb: [0x12, 0x61, 0x80, 0, 36, 0], lun: 11))
        guest.put(command(2, cdb: [0x12, 0x40, 0, 0, 36, 0], lun: 11))
        guest.put(command(3, cdb: [0x00, 0x60, 0, 0, 0, 0], lun: 11))
        guest.turn()
        #expect(nexus.tasks.map { $0.cdb[1] } == [0x01, 0x40, 0x60])
        for task in nexus.tasks { nexus.complete(task) }
    }

    @Test("A timeout of 0 becomes the default deadline")
    func defaultTimeout() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(command(1, timeout: 0))
        guest.turn()
        #expect(unsafe nexus.tasks[0].command.timeout_milliseconds == VSCSIIFLimits.defaultTimeout * 1000)
        nexus.complete(nexus.tasks[0])
    }

    @Test("Data of a write comes from all its direct segments, in their order", arguments: [1, 2, 26])
    func directWrite(count: Int) {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        var segments: [(UInt32, UInt16, UInt16)] = []
        var expected: [UInt8] = []
        for index in 0..<count {
            let bytes = (0..<4096).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ index) }
            let offset = UInt16(index * 16)
            let length = UInt16(512 + index)
            segments.append((guest.grant(bytes, readOnly: true), offset, length))
            expected += bytes[Int(offset)..<Int(offset + length)]
        }
        guest.put(command(1, cdb: [0x2a] + [UInt8](repeating: 0, count: 9), direction: 1, segments: segments))
        guest.turn()
        #expect(nexus.tasks[0].dataOut == expected)
        nexus.complete(nexus.tasks[0])
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [0])
    }

    @Test("Data of a read goes to the segments and nowhere else; the residual is what was not filled")
    func directRead() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        let first = guest.grant()
        let second = guest.grant()
        guest.put(command(1, direction: 2, segments: [(first, 4000, 96), (second, 8, 100)]))
        guest.turn()
        let data = (0..<150).map { UInt8($0) }
        nexus.tasks[0].fillDataIn(data)
        nexus.complete(nexus.tasks[0])
        guest.turn()
        let response = guest.responses()[0]
        #expect(response.rslt == 0 && response.residual_len == 46)
        #expect(guest.bytes(first, 4000..<4096) == [UInt8](data[..<96]))
        #expect(guest.bytes(second, 8..<62) == [UInt8](data[96...]))
        #expect(guest.bytes(first, 0..<4000).allSatisfy { $0 == 0xee })
        #expect(guest.bytes(second, 62..<4096).allSatisfy { $0 == 0xee })
    }

    @Test("Indirect tables are one array, however they are cut", arguments: [1, 3, 5])
    func indirect(pieces: Int) {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        var segments: [(UInt32, UInt16, UInt16)] = []
        var expected: [UInt8] = []
        for index in 0..<128 {
            let bytes = [UInt8](repeating: UInt8(index), count: 4096)
            segments.append((guest.grant(bytes, readOnly: true), 0, 4096))
            expected += bytes
        }
        let table = segmentTable(segments)
        var tables: [(UInt32, UInt16, UInt16)] = []
        // Cuts that are no multiple of a segment's size.
        let cut = table.count / pieces / 2 * 2 + 1
        for start in stride(from: 0, to: table.count, by: pieces == 1 ? table.count : cut) {
            let piece = [UInt8](table[start..<min(start + (pieces == 1 ? table.count : cut), table.count)])
            tables.append((guest.grant([0, 0] + piece, readOnly: true), 2, UInt16(piece.count)))
        }
        guest.put(command(1, direction: 1, segments: tables, indirect: true))
        guest.turn()
        #expect(nexus.tasks.first?.dataOut == expected)
        nexus.complete(nexus.tasks[0])
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [0])
    }

    @Test("Direct and indirect requests mix; a turn needs one copy in each direction for all")
    func mixed() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        for rqid in 0..<UInt16(8) {
            let data = guest.grant([UInt8](repeating: UInt8(rqid), count: 4096))
            let table = guest.grant(segmentTable([(data, 0, 512), (data, 1024, 512)]))
            let isIndirect = rqid % 2 == 0
            guest.put(
                command(
                    rqid, direction: rqid < 4 ? 1 : 2,
                    segments: isIndirect ? [(table, 0, 16)] : [(data, 0, 512), (data, 1024, 512)],
                    indirect: isIndirect))
        }
        guest.turn()
        #expect(guest.hypercalls == 2)
        #expect(nexus.tasks.count == 8)
        for task in nexus.tasks {
            if unsafe task.command.data_in_length > 0 { task.fillDataIn([UInt8](repeating: 9, count: 1024)) }
            nexus.complete(task)
        }
        guest.turn()
        #expect(guest.hypercalls == 3)
        #expect(guest.responses().map(\.rqid) == [0, 1, 2, 3, 4, 5, 6, 7])
        #expect(guest.notifications == 1)
    }

    @Test("CHECK CONDITION brings its sense data, at most 96 bytes, and no data of other commands")
    func checkCondition() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        let page = guest.grant()
        guest.put(command(1, direction: 2, segments: [(page, 0, 4096)]))
        guest.turn()
        let task = nexus.tasks[0]
        unsafe task.pointer.pointee.sense = .invalidField(inCDB: 2, bit: 7)
        nexus.complete(task, status: SCSIStatus.checkCondition.rawValue)
        guest.turn()
        let response = guest.responses()[0]
        #expect(response.status == 2 && response.host == 0)
        #expect(response.sense_len == 18)
        #expect(response.sense_buffer.0 == 0x70 && response.sense_buffer.2 == 5 && response.sense_buffer.12 == 0x24)
        #expect(response.residual_len == 4096)
        #expect(guest.bytes(page).allSatisfy { $0 == 0xee })
    }

    @Test("Sixteen commands at once, answered out of order, each once")
    func fullRing() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        for rqid in 0..<UInt16(16) { guest.put(command(rqid)) }
        guest.turn()
        let order = [7, 3, 15, 0, 1, 2, 4, 5, 6, 8, 14, 13, 12, 11, 10, 9]
        let tasks = nexus.tasks
        for index in order { nexus.complete(tasks[index]) }
        guest.turn()
        #expect(guest.responses().map { Int($0.rqid) } == order)
    }

    @Test("The ring goes on past the end of its indices' range and for many turns")
    func manyTurns() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        nexus.immediately = { [unowned nexus] task in nexus.complete(task) }
        for round in 0..<500 {
            for offset in 0..<(round % 16 + 1) { guest.put(command(UInt16(offset))) }
            guest.turn()
            #expect(guest.responses().count == round % 16 + 1)
        }
    }

    @Test("The indices of the ring wrap")
    func wrap() {
        let page = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
        defer { unsafe page.deallocate() }
        unsafe cxen_init_shared_ring(page)
        let start = UInt32.max - 2
        unsafe cxen_set_request_producer(page, start &+ 6)
        unsafe cxen_set_response_producer(page, start)
        var ring = unsafe VSCSIIFRing(page: page, requestConsumer: start, responseProducer: start)
        #expect(ring.available() == 6)
        var request = vscsiif_request()
        var response = vscsiif_response()
        for _ in 0..<6 { unsafe ring.take(into: &request) }
        #expect(ring.available() == 0)
        unsafe cxen_set_response_event(page, 1)
        for _ in 0..<6 { unsafe ring.put(&response) }
        let notify = ring.publish()
        #expect(notify)
        unsafe cxen_set_request_producer(page, start &+ 6 &+ 17)
        #expect(ring.available() == nil)
        unsafe cxen_set_request_producer(page, start &+ 5)
        #expect(ring.available() == nil)
    }
}

@Suite("The vscsiif ring: what a guest can do wrong")
struct XenPortRefusalTests {
    /// The one answer to one request, which never reaches the core.
    func refusal(
        _ request: vscsiif_request, wholeTarget: Bool = false, sourceLocation: SourceLocation = #_sourceLocation
    )
        -> Int32
    {
        let guest = RingGuest(wholeTarget: wholeTarget)
        let nexus = guest.attach(disk)
        guest.put(request)
        guest.turn()
        #expect(nexus.tasks.isEmpty, sourceLocation: sourceLocation)
        let responses = guest.responses()
        #expect(responses.map(\.rqid) == [request.rqid], sourceLocation: sourceLocation)
        return responses.first.map { $0.host << 16 | $0.rslt & 0xffff } ?? -1
    }

    static let error = Int32(XEN_VSCSIIF_RSLT_HOST_ERROR) << 16

    @Test("No device: NO_CONNECT for a number, BAD_TARGET for a target")
    func noDevice() {
        #expect(refusal(command(5, lun: 1)) == Int32(XEN_VSCSIIF_RSLT_HOST_NO_CONNECT) << 16)
        #expect(refusal(command(5, target: 1)) == Int32(XEN_VSCSIIF_RSLT_HOST_BAD_TARGET) << 16)
        #expect(refusal(command(5, channel: 1)) == Int32(XEN_VSCSIIF_RSLT_HOST_BAD_TARGET) << 16)
        #expect(
            refusal(command(5, lun: 0xffff), wholeTarget: true) == Int32(XEN_VSCSIIF_RSLT_HOST_NO_CONNECT) << 16)
    }

    @Test("Lengths of CDBs: 0 and 17 are errors")
    func cdbLength() {
        var request = command(1)
        request.cmd_len = 0
        #expect(refusal(request) == Self.error)
        request.cmd_len = 17
        #expect(refusal(request) == Self.error)
        request.cmd_len = 255
        #expect(refusal(request) == Self.error)
    }

    @Test("A data direction that there is not")
    func direction() {
        #expect(refusal(command(1, direction: 4)) == Self.error)
        #expect(refusal(command(1, direction: 255)) == Self.error)
    }

    @Test("Both directions at once have one list of segments: refused, but fine without data")
    func bidirectional() {
        #expect(refusal(command(1, direction: 0, segments: [(1, 0, 512)])) == Self.error)
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(command(1, direction: 0))
        guest.turn()
        #expect(nexus.tasks.count == 1)
        nexus.complete(nexus.tasks[0])
    }

    @Test("More than 26 direct segments, or more than 26 tables")
    func segmentCount() {
        var request = command(1, direction: 2)
        request.nr_segments = 27
        #expect(refusal(request) == Self.error)
        request.nr_segments = 27 | UInt8(VSCSIIF_SG_GRANT)
        #expect(refusal(request) == Self.error)
        request.nr_segments = 0xff
        #expect(refusal(request) == Self.error)
    }

    @Test("A segment that reaches over the end of its page", arguments: [(4096, 1), (1, 4096), (65535, 65535)])
    func segmentRange(offset: Int, length: Int) {
        let segment = [(UInt32(1), UInt16(offset), UInt16(length))]
        #expect(refusal(command(1, direction: 1, segments: segment)) == Self.error)
        #expect(refusal(command(1, direction: 1, segments: segment, indirect: true)) == Self.error)
    }

    @Test("Tables with more segments than feature-sg-grant, or with a part of one")
    func tableLength() {
        #expect(refusal(command(1, direction: 1, segments: [(1, 0, 129 * 8)], indirect: true)) == Self.error)
        #expect(refusal(command(1, direction: 1, segments: [(1, 0, 15)], indirect: true)) == Self.error)
    }

    @Test("A segment inside a table that reaches over the end of its page")
    func tableContents() {
        let guest = RingGuest()
        _ = guest.attach(disk)
        let table = guest.grant(segmentTable([(1, 4090, 100)]))
        guest.put(command(1, direction: 1, segments: [(table, 0, 8)], indirect: true))
        guest.turn()
        #expect(guest.responses().map(\.host) == [Int32(XEN_VSCSIIF_RSLT_HOST_ERROR)])
    }

    @Test("A bad grant fails its own request and no other", arguments: [1, 2])
    func badGrant(direction: UInt8) {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        nexus.immediately = { [unowned nexus] task in
            task.fillDataIn([UInt8](repeating: 1, count: 1024))
            nexus.complete(task)
        }
        let good = guest.grant()
        guest.put(command(1, direction: direction, segments: [(good, 0, 512)]))
        guest.put(command(2, direction: direction, segments: [(good, 0, 512), (4242, 0, 512)]))
        guest.put(command(3, direction: direction, segments: [(4242, 0, 16)], indirect: true))
        guest.put(command(4, direction: direction, segments: [(good, 512, 512)]))
        guest.turn()
        let responses = guest.responses().sorted { $0.rqid < $1.rqid }
        let error = Int32(XEN_VSCSIIF_RSLT_HOST_ERROR)
        #expect(responses.map(\.host) == [0, error, error, 0])
        #expect(guest.staging.freePages == (16 << 20) / 4096)
    }

    @Test("A read into a page that may only be read fails alone")
    func readOnlyGrant() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        let page = guest.grant(readOnly: true)
        guest.put(command(1, direction: 2, segments: [(page, 0, 512)]))
        guest.turn()
        nexus.tasks[0].fillDataIn([UInt8](repeating: 1, count: 512))
        nexus.complete(nexus.tasks[0])
        guest.turn()
        let response = guest.responses()[0]
        #expect(response.host == Int32(XEN_VSCSIIF_RSLT_HOST_ERROR) && response.residual_len == 512)
    }

    @Test("A hypercall that fails altogether fails what it was for")
    func brokenCopy() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.copyIsBroken = true
        guest.put(command(1, direction: 1, segments: [(guest.grant(), 0, 512)]))
        guest.put(command(2))
        guest.turn()
        #expect(nexus.tasks.count == 1)
        nexus.complete(nexus.tasks[0])
        guest.turn()
        #expect(guest.responses().map(\.host) == [Int32(XEN_VSCSIIF_RSLT_HOST_ERROR), 0])
    }

    @Test("SG_PRESET and unknown actions are answered with ERROR", arguments: [0, 4, 5, 255])
    func unknownAction(action: UInt8) {
        var request = command(9)
        request.act = action
        #expect(refusal(request) == Self.error)
    }

    @Test("A producer index that cannot be ends the service of the ring", arguments: [17, 0x8000_0000, UInt32.max])
    func producerOverflow(producer: UInt32) {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(command(1))
        guest.turn()
        guest.setRequestProducer(producer)
        guest.turn()
        #expect(guest.port.fault != nil)
        #expect(nexus.isLost)
        #expect(guest.port.isIdle)
        #expect(guest.responses().isEmpty)
        #expect(!guest.port.prepareToSleep())
    }

    @Test("The same request number twice: both are answered")
    func duplicateNumber() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(command(1))
        guest.put(command(1))
        guest.turn()
        for task in nexus.tasks { nexus.complete(task) }
        guest.turn()
        #expect(guest.responses().map(\.rqid) == [1, 1])
    }

    @Test("A guest that rewrites its request after it was taken changes nothing")
    func mutation() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(command(1, cdb: [0x12, 0, 0, 0, 36, 0]))
        guest.turn()
        var other = command(2, cdb: [0x2a, 1, 1, 1, 1, 1])
        unsafe cxen_write_request(guest.page, 0, &other)
        #expect(nexus.tasks[0].cdb == [0x12, 0, 0, 0, 36, 0])
        nexus.complete(nexus.tasks[0])
        guest.turn()
        #expect(guest.responses().map(\.rqid) == [1])
    }
}

@Suite("The vscsiif ring: service responses")
struct XenPortServiceTests {
    @Test(
        "What the core answers without a status becomes a host code",
        arguments: [
            (Int(SCSI_SERVICE_ABORTED), XEN_VSCSIIF_RSLT_HOST_TIME_OUT),
            (Int(SCSI_SERVICE_RESET), XEN_VSCSIIF_RSLT_HOST_RESET),
            (Int(SCSI_SERVICE_OVERRUN), XEN_VSCSIIF_RSLT_HOST_ERROR),
            (Int(SCSI_SERVICE_TARGET_FAILURE), XEN_VSCSIIF_RSLT_HOST_SOFT_ERROR),
        ])
    func serviceResponse(service: Int, host: Int32) {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        let page = guest.grant()
        guest.put(command(1, direction: 2, segments: [(page, 0, 512)]))
        guest.turn()
        nexus.complete(nexus.tasks[0], service: service)
        guest.turn()
        let response = guest.responses()[0]
        #expect(response.host == host && response.status == 0 && response.residual_len == 512)
        #expect(guest.bytes(page).allSatisfy { $0 == 0xee })
    }

    @Test("A device that is removed while its command runs: TRANSPORT_DISRUPTED, then NO_CONNECT")
    func detached() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        _ = guest.attach(VirtualDevice(channel: 0, target: 0, lun: 1))
        guest.put(command(1))
        guest.turn()
        guest.port.detach(disk)
        #expect(nexus.isLost)
        guest.put(command(2))
        guest.turn()
        #expect(
            guest.responses().map(\.host) == [
                XEN_VSCSIIF_RSLT_HOST_TRANSPORT_DISRUPTED, XEN_VSCSIIF_RSLT_HOST_NO_CONNECT,
            ])
    }

    @Test("A nexus is lost with the last of its devices, not before")
    func sharedNexus() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        let second = VirtualDevice(channel: 0, target: 1, lun: 0)
        _ = guest.attach(second, unit: 1, nexus: nexus)
        guest.port.detach(disk)
        #expect(!nexus.isLost)
        guest.port.detach(second)
        #expect(nexus.isLost)
    }

    @Test("After the ring was stopped nothing is answered, and all memory comes back")
    func stopped() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        let page = guest.grant()
        for rqid in 0..<UInt16(5) { guest.put(command(rqid, direction: 1, segments: [(page, 0, 512)])) }
        guest.put(function(9, VSCSIIF_ACT_SCSI_ABORT, reference: 1))
        guest.turn()
        nexus.complete(nexus.tasks[0])
        let cookie = nexus.functions[0].cookie
        guest.port.stop()
        #expect(guest.port.isIdle)
        guest.port.completeManagement(cookie: cookie, response: 0)
        guest.port.flush()
        #expect(guest.responses().isEmpty)
        #expect(guest.staging.freePages == (16 << 20) / 4096)
        guest.port.disconnect()
    }
}

@Suite("The vscsiif ring: task management")
struct XenPortManagementTests {
    @Test("ABORT: the command is answered first, then 0x2002")
    func abort() {
        let guest = RingGuest()
        let nexus = guest.attach(disk, unit: 3)
        guest.put(command(4))
        guest.put(command(5))
        guest.put(function(6, VSCSIIF_ACT_SCSI_ABORT, reference: 5))
        guest.turn()
        #expect(nexus.functions.count == 1)
        let abort = nexus.functions[0]
        #expect(abort.function == UInt8(SCSI_ABORT_TASK))
        #expect(unsafe abort.tag == nexus.tasks[1].command.tag)
        #expect(lunField(abort.lun) == LUN(3)!.field)
        #expect(guest.responses().isEmpty)
        nexus.complete(nexus.tasks[1], service: Int(SCSI_SERVICE_ABORTED))
        nexus.answer(abort)
        guest.turn()
        let responses = guest.responses()
        #expect(responses.map(\.rqid) == [5, 6])
        #expect(responses.map(\.rslt) == [XEN_VSCSIIF_RSLT_HOST_ABORT << 16, XEN_VSCSIIF_RSLT_RESET_SUCCESS])
        nexus.complete(nexus.tasks[0])
    }

    @Test("ABORT of a request that is not there any more has nothing to do: 0x2002")
    func abortAnswered() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(function(6, VSCSIIF_ACT_SCSI_ABORT, reference: 5))
        guest.turn()
        #expect(nexus.functions.isEmpty)
        #expect(guest.responses().map(\.rslt) == [XEN_VSCSIIF_RSLT_RESET_SUCCESS])
    }

    @Test("ABORT does not hit a later request that uses the number again")
    func abortGeneration() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(function(6, VSCSIIF_ACT_SCSI_ABORT, reference: 5))
        guest.put(command(5))
        guest.turn()
        #expect(nexus.functions.isEmpty)
        #expect(nexus.tasks.count == 1)
        nexus.complete(nexus.tasks[0])
    }

    @Test("ABORT names a device too: another device's request with that number goes on")
    func abortAddress() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(command(5))
        guest.put(function(6, VSCSIIF_ACT_SCSI_ABORT, reference: 5, lun: 1))
        guest.turn()
        #expect(nexus.functions.isEmpty)
        nexus.complete(nexus.tasks[0])
    }

    @Test("An ABORT that the core refuses: 0x2003")
    func abortFailed() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(command(5))
        guest.put(function(6, VSCSIIF_ACT_SCSI_ABORT, reference: 5))
        guest.turn()
        nexus.answer(nexus.functions[0], Int(SCSI_FUNCTION_REJECTED))
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [XEN_VSCSIIF_RSLT_RESET_FAILED])
        nexus.complete(nexus.tasks[0])
    }

    @Test("An answer to a function of an earlier request in the same slot is ignored")
    func staleAnswer() {
        let guest = RingGuest()
        let nexus = guest.attach(disk)
        guest.put(function(6, VSCSIIF_ACT_SCSI_RESET))
        guest.turn()
        let stale = nexus.functions[0].cookie
        nexus.answer(nexus.functions[0])
        guest.turn()
        #expect(guest.responses().count == 1)
        guest.put(function(7, VSCSIIF_ACT_SCSI_RESET))
        guest.turn()
        guest.port.completeManagement(cookie: stale, response: 0)
        guest.port.completeManagement(cookie: 0xffff_ffff_ffff_ffff, response: 0)
        guest.turn()
        #expect(guest.responses().isEmpty)
        nexus.answer(nexus.functions[0])
        guest.turn()
        #expect(guest.responses().map(\.rqid) == [7])
    }

    @Test("RESET resets each unit of the virtual target and waits for all")
    func reset() {
        let guest = RingGuest()
        let nexus = guest.attach(disk, unit: 0)
        _ = guest.attach(VirtualDevice(channel: 0, target: 0, lun: 1), unit: 7, nexus: nexus)
        _ = guest.attach(VirtualDevice(channel: 0, target: 1, lun: 0), unit: 9, nexus: nexus)
        guest.put(command(1))
        guest.put(function(2, VSCSIIF_ACT_SCSI_RESET))
        guest.turn()
        #expect(nexus.functions.map { lunField($0.lun) } == [LUN(0)!.field, LUN(7)!.field])
        #expect(nexus.functions.allSatisfy { $0.function == UInt8(SCSI_LOGICAL_UNIT_RESET) })
        nexus.complete(nexus.tasks[0], service: Int(SCSI_SERVICE_RESET))
        let functions = nexus.functions
        nexus.answer(functions[0])
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [XEN_VSCSIIF_RSLT_HOST_RESET << 16])
        nexus.answer(functions[1])
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [XEN_VSCSIIF_RSLT_RESET_SUCCESS])
    }

    @Test("RESET of a target that is not there: 0x2003")
    func resetNothing() {
        let guest = RingGuest()
        _ = guest.attach(disk)
        guest.put(function(2, VSCSIIF_ACT_SCSI_RESET, target: 9))
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [XEN_VSCSIIF_RSLT_RESET_FAILED])
    }

    @Test("With a whole target RESET is TARGET RESET")
    func targetReset() {
        let guest = RingGuest(wholeTarget: true)
        let nexus = guest.attach(disk)
        guest.put(function(2, VSCSIIF_ACT_SCSI_RESET, lun: 4))
        guest.turn()
        #expect(nexus.functions.map(\.function) == [UInt8(SCSI_TARGET_RESET)])
        nexus.answer(nexus.functions[0])
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [XEN_VSCSIIF_RSLT_RESET_SUCCESS])
    }
}

@Suite("The vscsiif ring: staging memory")
struct XenPortStagingTests {
    /// Sixteen requests of 512 KiB, one of which fits at a time.
    func pressed() -> (RingGuest, ScriptedNexus) {
        let guest = RingGuest(stagingBytes: 512 << 10)
        let nexus = guest.attach(disk)
        let page = guest.grant()
        let table = guest.grant(segmentTable([(UInt32, UInt16, UInt16)](repeating: (page, 0, 4096), count: 128)))
        for rqid in 0..<UInt16(14) {
            guest.put(command(rqid, direction: 2, segments: [(table, 0, 1024)], indirect: true))
        }
        guest.turn()
        return (guest, nexus)
    }

    @Test("Requests that find no memory wait, in their order, and all are answered")
    func waits() {
        let (guest, nexus) = pressed()
        for rqid in 0..<UInt16(14) {
            #expect(nexus.tasks.count == 1)
            nexus.tasks[0].fillDataIn([1])
            nexus.complete(nexus.tasks[0])
            guest.port.flush()
            #expect(guest.port.prepareToSleep() == (rqid < 13))
            guest.turn()
            #expect(guest.responses().map(\.rqid) == [rqid])
        }
        #expect(guest.staging.freePages == 128)
    }

    @Test("A request that finds no memory within its time-out is answered with BUS_BUSY; the others wait on")
    func waitsTooLong() {
        let (guest, nexus) = pressed()
        let second: UInt64 = 1_000_000_000
        let page = guest.grant()
        guest.put(command(14, direction: 2, segments: [(page, 0, 512)], timeout: 100))
        guest.turn()
        #expect(guest.port.expireWaiting(now: second) == 31 * second)
        #expect(guest.port.expireWaiting(now: 31 * second - 1) == 31 * second)
        guest.turn()
        #expect(guest.responses().isEmpty)
        #expect(guest.port.expireWaiting(now: 31 * second) == 101 * second)
        guest.turn()
        let responses = guest.responses()
        #expect(responses.map(\.rqid) == [UInt16](1..<14))
        #expect(responses.allSatisfy { $0.rslt == XEN_VSCSIIF_RSLT_HOST_BUS_BUSY << 16 })
        #expect(guest.port.isShortOfMemory && nexus.tasks.count == 1)
        guest.port.stop()
    }

    @Test("A command without data does not wait for memory")
    func noData() {
        let (guest, nexus) = pressed()
        guest.put(command(20))
        guest.turn()
        #expect(nexus.tasks.count == 2)
        guest.port.stop()
    }

    @Test("ABORT of a request that waits for memory answers it, then 0x2002")
    func abortWaiting() {
        let (guest, nexus) = pressed()
        guest.put(function(20, VSCSIIF_ACT_SCSI_ABORT, reference: 5))
        guest.turn()
        let responses = guest.responses()
        #expect(responses.map(\.rqid) == [5, 20])
        #expect(responses.map(\.rslt) == [XEN_VSCSIIF_RSLT_HOST_ABORT << 16, XEN_VSCSIIF_RSLT_RESET_SUCCESS])
        #expect(nexus.tasks.count == 1)
        guest.port.stop()
    }

    @Test("RESET ends the requests that wait for memory")
    func resetWaiting() {
        let (guest, nexus) = pressed()
        guest.put(function(20, VSCSIIF_ACT_SCSI_RESET))
        guest.turn()
        #expect(guest.responses().map(\.rqid) == [UInt16](1..<14))
        nexus.complete(nexus.tasks[0], service: Int(SCSI_SERVICE_RESET))
        nexus.answer(nexus.functions[0])
        guest.turn()
        #expect(guest.responses().map(\.rqid) == [0, 20])
    }

    @Test("The pool gives disjoint runs and heals completely", arguments: [1, 2, 3])
    func pool(seed: UInt64) {
        var random = SeededGenerator(seed: seed)
        let pool = StagingPool(bytes: 4 << 20)
        var runs: [(Int32, Int)] = []
        for _ in 0..<5000 {
            if Bool.random(using: &random), !runs.isEmpty {
                let (run, bytes) = runs.remove(at: Int.random(in: 0..<runs.count, using: &random))
                pool.free(run, bytes: bytes)
            } else {
                let bytes = Int.random(in: 1...(512 << 10), using: &random)
                let could = pool.canAllocate(bytes: bytes)
                let run = pool.allocate(bytes: bytes)
                #expect(could == (run >= 0))
                if run >= 0 {
                    let pages = Int32((bytes + 4095) / 4096)
                    #expect(run + pages <= 1024)
                    for (other, otherBytes) in runs {
                        #expect(run + pages <= other || other + Int32((otherBytes + 4095) / 4096) <= run)
                    }
                    runs.append((run, bytes))
                }
            }
        }
        for (run, bytes) in runs { pool.free(run, bytes: bytes) }
        #expect(pool.freePages == 1024)
        #expect((0..<8).allSatisfy { _ in pool.allocate(bytes: 512 << 10) >= 0 })
    }
}

@Suite("The vscsiif ring: the map of devices")
struct XenPortMapTests {
    /// REPORT LUNS parameter data as a guest gets it, and the residual.
    func reportLUNs(
        _ guest: RingGuest, _ nexus: ScriptedNexus, allocation: UInt8, buffer: UInt16 = 256, select: UInt8 = 0
    )
        -> ([UInt8], UInt32)
    {
        let page = guest.grant()
        let cdb: [UInt8] = [0xa0, 0, select, 0, 0, 0, 0, 0, 0, allocation, 0, 0]
        guest.put(command(1, cdb: cdb, direction: 2, target: 4, lun: 1, segments: [(page, 0, buffer)]))
        guest.turn()
        // The core's own list is longer.
        nexus.tasks[0].fillDataIn([0, 0, 0, 80] + [UInt8](repeating: 0x77, count: min(84, Int(allocation) - 4)))
        nexus.complete(nexus.tasks[0])
        guest.turn()
        let response = guest.responses()[0]
        return (guest.bytes(page, 0..<Int(buffer)), response.residual_len)
    }

    func guestWithMap() -> (RingGuest, ScriptedNexus) {
        let guest = RingGuest()
        let nexus = guest.attach(VirtualDevice(channel: 0, target: 4, lun: 1), unit: 30)
        _ = guest.attach(VirtualDevice(channel: 0, target: 5, lun: 2), unit: 31, nexus: nexus)
        _ = guest.attach(VirtualDevice(channel: 0, target: 4, lun: 300), unit: 32, nexus: nexus)
        return (guest, nexus)
    }

    @Test("REPORT LUNS shows exactly the map of the addressed target")
    func exactMap() {
        let (guest, nexus) = guestWithMap()
        let (bytes, residual) = reportLUNs(guest, nexus, allocation: 255)
        #expect(
            [UInt8](bytes[..<24]) == [0, 0, 0, 16, 0, 0, 0, 0] + [0, 1] + [0, 0, 0, 0, 0, 0] + [
                0x41, 0x2c, 0, 0, 0, 0, 0, 0,
            ])
        #expect(bytes[24...].allSatisfy { $0 == 0xee })
        #expect(residual == 256 - 24)
    }

    @Test("REPORT LUNS is cut to the allocation length, and its length field is not")
    func truncated() {
        let (guest, nexus) = guestWithMap()
        let (bytes, residual) = reportLUNs(guest, nexus, allocation: 16)
        #expect([UInt8](bytes[..<16]) == [0, 0, 0, 16, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
        #expect(bytes[16...].allSatisfy { $0 == 0xee })
        #expect(residual == 256 - 16)
    }

    @Test("SELECT REPORT 01h, well-known units only, is empty")
    func wellKnown() {
        let (guest, nexus) = guestWithMap()
        let (bytes, residual) = reportLUNs(guest, nexus, allocation: 255, select: 1)
        #expect([UInt8](bytes[..<8]) == [0, 0, 0, 0, 0, 0, 0, 0])
        #expect(residual == 256 - 8)
    }

    @Test("REPORT LUNS that the core refuses stays refused")
    func refused() {
        let (guest, nexus) = guestWithMap()
        let page = guest.grant()
        guest.put(command(1, cdb: [0xa0], direction: 2, target: 4, lun: 1, segments: [(page, 0, 64)]))
        guest.turn()
        unsafe nexus.tasks[0].pointer.pointee.sense = .invalidField(inCDB: 2)
        nexus.complete(nexus.tasks[0], status: 2)
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [2])
        #expect(guest.bytes(page).allSatisfy { $0 == 0xee })
    }

    @Test("With a whole target REPORT LUNS is the core's, and each number leads through")
    func wholeTarget() {
        let guest = RingGuest(wholeTarget: true)
        let nexus = guest.attach(VirtualDevice(channel: 0, target: 4, lun: 1), unit: 30)
        let (bytes, residual) = reportLUNs(guest, nexus, allocation: 88)
        #expect(bytes[3] == 80 && bytes[4] == 0x77)
        #expect(residual == 256 - 88)
        guest.put(command(2, target: 4, lun: 300))
        guest.turn()
        #expect(unsafe lunField(nexus.tasks[0].command.lun) == LUN(300)!.field)
        nexus.complete(nexus.tasks[0])
    }

    @Test("Two devices at one address, or more than fit, are refused")
    func limits() {
        let guest = RingGuest()
        let nexus = ScriptedNexus(guest.port)
        for lun in 0..<UInt16(VSCSIIFLimits.devices) {
            #expect(guest.port.attach(VirtualDevice(channel: 0, target: 0, lun: lun), unit: LUN(0)!, nexus: nexus))
        }
        #expect(!guest.port.attach(disk, unit: LUN(0)!, nexus: nexus))
        #expect(!guest.port.attach(VirtualDevice(channel: 0, target: 1, lun: 0), unit: LUN(0)!, nexus: nexus))
        guest.port.detach(disk)
        #expect(guest.port.attach(disk, unit: LUN(0)!, nexus: nexus))
    }
}

/// A small generator of numbers with a seed, so that a failure can be done again.
struct SeededGenerator: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed &* 0x9e37_79b9_7f4a_7c15 | 1 }
    mutating func next() -> UInt64 {
        state ^= state << 13
        state ^= state >> 7
        state ^= state << 17
        return state &* 0x2545_f491_4f6c_dd1d
    }
}
