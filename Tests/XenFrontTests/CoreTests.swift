// CoreTests: the port with the real core behind it.

import CoreTestSupport
import CTarget
import CXen
@testable import SCSICore
import Testing

@testable import XenFront
@testable import Xenbus

@Suite("The Xen port on the core")
struct CoreTests {
    private let bench = TestTarget()
    private let guest = RingGuest()

    private init() {
        let nexus = CoreNexus(target: bench.target, initiatorPort: "xen", port: guest.port.handle)!
        #expect(guest.port.attach(VirtualDevice(channel: 0, target: 0, lun: 0), unit: LUN(0)!, nexus: nexus))
        // The unit attention condition of the new nexus.
        guest.put(command(0))
        guest.turn()
        let response = guest.responses()[0]
        #expect(response.status == 2 && response.sense_buffer.2 == 6 && response.sense_buffer.12 == 0x29)
    }

    private func end() {
        guest.port.stop()
        bench.backstore.completeAll()
        #expect(guest.port.isIdle)
    }

    @Test("A block that was written is read back")
    func writeRead() {
        let data = (0..<512).map { UInt8(truncatingIfNeeded: $0 &* 5) }
        let source = guest.grant(data, readOnly: true)
        let sink = guest.grant()
        guest.put(command(1, cdb: [0x2a, 0, 0, 0, 0, 9, 0, 0, 1, 0], direction: 1, segments: [(source, 0, 512)]))
        guest.turn()
        bench.backstore.completeAll()
        guest.turn()
        guest.put(
            command(
                2, cdb: [0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0], direction: 2, segments: [(sink, 0, 300), (sink, 300, 212)]))
        guest.turn()
        bench.backstore.completeAll()
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [0, 0])
        #expect(guest.bytes(sink, 0..<512) == data)
        end()
    }

    @Test("XDWRITEREAD, which needs two buffers, gets an error in each direction; XPWRITE is carried out")
    func bidirectional() {
        bench.backstore.setBlock(9, Array(repeating: 0x0f, count: 512))
        let page = guest.grant([UInt8](repeating: 0x3c, count: 512))
        let writeRead: [UInt8] = [0x53, 0, 0, 0, 0, 9, 0, 0, 1, 0]
        for direction in 0...3 as ClosedRange<UInt8> {
            guest.put(
                command(
                    UInt16(direction), cdb: writeRead, direction: direction,
                    segments: direction == 3 ? [] : [(page, 0, 512)]))
        }
        guest.put(command(4, cdb: [0x51, 0, 0, 0, 0, 9, 0, 0, 1, 0], direction: 1, segments: [(page, 0, 512)]))
        guest.turn()
        bench.backstore.completeAll()
        guest.turn()
        let responses = guest.responses().sorted { $0.rqid < $1.rqid }
        #expect(responses.map(\.rslt) == Array(repeating: XEN_VSCSIIF_RSLT_HOST_ERROR << 16, count: 4) + [0])
        #expect(guest.bytes(page, 0..<512) == Array(repeating: 0x3c, count: 512))
        #expect(bench.backstore.block(9) == Array(repeating: 0x33, count: 512))
        end()
    }

    @Test("RESET beside running commands: they are answered with RESET, then 0x2002")
    func reset() {
        let page = guest.grant()
        guest.put(command(1, cdb: [0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0], direction: 2, segments: [(page, 0, 512)]))
        guest.put(function(2, VSCSIIF_ACT_SCSI_RESET))
        guest.turn()
        bench.backstore.completeAll()
        guest.turn()
        let responses = guest.responses()
        #expect(responses.map(\.rqid) == [1, 2])
        #expect(responses.map(\.rslt) == [XEN_VSCSIIF_RSLT_HOST_RESET << 16, XEN_VSCSIIF_RSLT_RESET_SUCCESS])
        #expect(guest.bytes(page).allSatisfy { $0 == 0xee })
        end()
    }

    @Test("RESET with nothing running: 0x2002")
    func resetIdle() {
        guest.put(function(2, VSCSIIF_ACT_SCSI_RESET))
        guest.turn()
        #expect(guest.responses().map(\.rslt) == [XEN_VSCSIIF_RSLT_RESET_SUCCESS])
        end()
    }

    @Test("ABORT of a running command: ABORT, then 0x2002")
    func abort() {
        let page = guest.grant()
        guest.put(command(1, cdb: [0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0], direction: 2, segments: [(page, 0, 512)]))
        guest.put(function(2, VSCSIIF_ACT_SCSI_ABORT, reference: 1))
        guest.turn()
        bench.backstore.completeAll()
        guest.turn()
        let responses = guest.responses()
        #expect(responses.map(\.rqid) == [1, 2])
        #expect(responses.map(\.rslt) == [XEN_VSCSIIF_RSLT_HOST_ABORT << 16, XEN_VSCSIIF_RSLT_RESET_SUCCESS])
        end()
    }

    @Test("A ring that stops with commands at the medium waits for them, and the target is free of them")
    func stop() {
        let page = guest.grant()
        for rqid in 0..<UInt16(8) {
            guest.put(
                command(rqid, cdb: [0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0], direction: 2, segments: [(page, 0, 512)]))
        }
        guest.turn()
        guest.port.stop()
        #expect(!guest.port.isIdle)
        bench.backstore.completeAll()
        #expect(guest.port.isIdle)
        #expect(guest.responses().isEmpty)
    }
}
