// PRE-FETCH, GET LBA STATUS, WRITE ATOMIC, and anchoring by UNMAP and WRITE SAME.
//
// Must not know: how a medium keeps what it tells.

import CBackstore
import CoreTestSupport
import SCSICore
import Testing

@Suite("PRE-FETCH")
struct PreFetchTests {
    let world = TestTarget()

    @Test("CONDITION MET: all of the extent is in the cache", arguments: [CDB.Form.ten, .sixteen])
    func conditionMet(form: CDB.Form) {
        #expect(world.run(CDB.preFetch(form, 16, 8)).summary == "conditionMet")
        #expect(world.backstore.accepted.map(\.description) == ["prefetch 8192+4096"])
    }

    @Test("IMMED lets the backstore go on alone", arguments: [CDB.Form.ten, .sixteen])
    func immediate(form: CDB.Form) {
        #expect(world.run(CDB.preFetch(form, 16, 8, immediate: true)).summary == "conditionMet")
        #expect(world.backstore.accepted.map(\.description) == ["prefetch immediate 8192+4096"])
    }

    @Test("No length is the extent up to the end of the medium, which may be empty")
    func toTheEnd() {
        #expect(world.run(CDB.preFetch(.ten, 4000, 0)).summary == "conditionMet")
        #expect(world.run(CDB.preFetch(.ten, 4096, 0)).summary == "conditionMet")
        #expect(world.backstore.accepted.map(\.description) == ["prefetch 2048000+49152"])
    }

    @Test("A backstore without a cache: GOOD, because not all is in the cache; it is asked if it may have one")
    func withoutCache() {
        let tag = world.a.send(CDB.preFetch(.ten, 0, 8))
        world.backstore.complete(error: 105)
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "good")
        let plain = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_CAN_PREFETCH) }
        #expect(plain.run(CDB.preFetch(.ten, 0, 8)).summary == "good")
        #expect(plain.backstore.accepted.isEmpty)
    }

    @Test("One command fetches no more than its limit, and then says GOOD")
    func limited() {
        let world = TestTarget(blocks: 1 << 20)
        #expect(world.run(CDB.preFetch(.sixteen, 0, 1 << 20)).summary == "good")
        #expect(world.backstore.accepted.map(\.length) == [Limits.prefetchBytes])
    }

    @Test("An extent that is not on the medium is LBA OUT OF RANGE, and so are sums that wrap")
    func outOfRange() {
        #expect(world.run(CDB.preFetch(.ten, 4090, 7)).summary == "5/2100 CDB 2")
        #expect(world.run(CDB.preFetch(.ten, 4097, 0)).summary == "5/2100 CDB 2")
        #expect(world.run(CDB.preFetch(.sixteen, .max, 0)).summary == "5/2100 CDB 2")
        #expect(world.run(CDB.preFetch(.sixteen, .max - 1, 0xffff_ffff)).summary == "5/2100 CDB 2")
    }

    @Test("An error of the medium is reported")
    func mediumError() {
        let tag = world.a.send(CDB.preFetch(.ten, 0, 8))
        world.backstore.complete(error: 5)
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "3/1100")
    }

    @Test("CONDITION MET does not count as a command that went wrong")
    func statistics() {
        let before = world.unit.statistics.notGood
        _ = world.run(CDB.preFetch(.ten, 16, 8))
        #expect(world.unit.statistics.notGood == before)
    }
}

@Suite("GET LBA STATUS")
struct LBAStatusTests {
    private let block = [UInt8](repeating: 7, count: 512)

    /// The descriptors of an answer in words: "0+8 mapped".
    private func stretches(_ data: [UInt8]) -> [String] {
        guard data.count >= 8, (data.count - 8) % 16 == 0 else { return ["malformed"] }
        let length = data[..<4].reduce(0) { $0 << 8 | Int($1) }
        guard data[4..<8].allSatisfy({ $0 == 0 }), length == data.count - 4 else { return ["malformed"] }
        return stride(from: 8, to: data.count, by: 16).map { offset in
            let address = data[offset..<offset + 8].reduce(0) { $0 << 8 | UInt64($1) }
            let blocks = data[(offset + 8)..<(offset + 12)].reduce(0) { $0 << 8 | UInt64($1) }
            return "\(address)+\(blocks) \(["mapped", "deallocated", "anchored"][Int(data[offset + 12])])"
        }
    }

    @Test("Each stretch of the medium from the starting LBA on, in order, in its state")
    func states() {
        let world = TestTarget()
        for address in 8..<12 as Range<UInt64> { world.backstore.setBlock(address, block) }
        let list = CDB.unmapList([(address: 100, blocks: 4)])
        #expect(world.run(CDB.unmap(listLength: list.count, anchor: true), dataOut: list).summary == "good")
        let answer = world.run(CDB.getLBAStatus(0), dataIn: 4096)
        #expect(
            stretches(answer.data) == [
                "0+8 deallocated", "8+4 mapped", "12+88 deallocated", "100+4 anchored", "104+3992 deallocated",
            ])
        #expect(stretches(world.run(CDB.getLBAStatus(10), dataIn: 4096).data).first == "10+2 mapped")
        #expect(stretches(world.run(CDB.getLBAStatus(4095), dataIn: 4096).data) == ["4095+1 deallocated"])
    }

    @Test("An allocation length for one descriptor asks the backstore for one; shorter ones cut the answer")
    func allocationLength() {
        let world = TestTarget()
        world.backstore.setBlock(8, block)
        #expect(stretches(world.run(CDB.getLBAStatus(0, allocation: 24), dataIn: 24).data) == ["0+8 deallocated"])
        for length in [0, 1, 8, 23] {
            let end = world.run(CDB.getLBAStatus(0, allocation: UInt32(length)), dataIn: length)
            #expect(end.summary == "good")
            #expect(end.data.count == length)
            if length >= 4 { #expect(Array(end.data[..<4]) == [0, 0, 0, 20]) }
        }
        #expect(world.run(CDB.getLBAStatus(0, allocation: 4096), dataIn: 16).summary == "overrun")
    }

    @Test("The largest allocation length does not make the answer longer than its limit")
    func bounded() {
        let world = TestTarget()
        for address in stride(from: 0 as UInt64, to: 2048, by: 2) { world.backstore.setBlock(address, block) }
        let data = world.run(CDB.getLBAStatus(0, allocation: .max), dataIn: 65536).data
        #expect(stretches(data).count == Limits.lbaStatusDescriptors)
        #expect(stretches(data).last == "255+1 deallocated")
    }

    @Test("A stretch that 32 bits cannot count is several descriptors")
    func longStretch() {
        let world = TestTarget(blocks: 1 << 34)
        #expect(
            stretches(world.run(CDB.getLBAStatus(5), dataIn: 4096).data) == [
                "5+4294967295 deallocated", "4294967300+4294967295 deallocated", "8589934595+4294967295 deallocated",
                "12884901890+4294967294 deallocated",
            ])
    }

    @Test("Without extents from the backstore everything is mapped or unknown")
    func withoutExtents() {
        let world = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_CAN_REPORT_EXTENTS) }
        #expect(stretches(world.run(CDB.getLBAStatus(96), dataIn: 4096).data) == ["96+4000 mapped"])
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("A starting LBA behind the last block is LBA OUT OF RANGE", arguments: [UInt64(4096), 4097, .max])
    func outOfRange(address: UInt64) {
        #expect(TestTarget().run(CDB.getLBAStatus(address), dataIn: 24).summary == "5/2100 CDB 2")
    }

    /// GET LBA STATUS(32).
    private func status32(_ address: UInt64, scan: UInt64 = 0, allocation: UInt64 = 4096) -> [UInt8] {
        [0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 0x12, 0, 0] + CDB.bytes(address, 8) + CDB.bytes(scan, 4)
            + [0, 0, 0, 0] + CDB.bytes(allocation, 4)
    }

    @Test("GET LBA STATUS(32) answers as (16) does, up to the end of SCAN LENGTH")
    func variableLength() {
        let world = TestTarget()
        for address in 8..<12 as Range<UInt64> { world.backstore.setBlock(address, block) }
        let long = world.run(CDB.getLBAStatus(0), dataIn: 4096).data
        #expect(world.run(status32(0), dataIn: 4096).data == long)
        #expect(
            stretches(world.run(status32(4, scan: 6), dataIn: 4096).data) == ["4+4 deallocated", "8+2 mapped"])
        #expect(stretches(world.run(status32(4000, scan: 0xffff_ffff), dataIn: 4096).data) == ["4000+96 deallocated"])
        #expect(stretches(world.run(status32(0, allocation: 24), dataIn: 24).data) == ["0+8 deallocated"])
        #expect(world.run(status32(4096), dataIn: 24).summary == "5/2100 CDB 12")
        #expect(world.run(status32(.max, scan: .max >> 32), dataIn: 24).summary == "5/2100 CDB 12")
        var short = status32(0)
        short[7] = 0x10
        #expect(world.run(short, dataIn: 4096).summary == "5/2400 CDB 7")
        #expect(world.run(Array(status32(0)[..<16]), dataIn: 4096).summary == "5/2400 CDB 16")
    }

    @Test("An error of the backstore is reported, and the staging buffer is free again")
    func error() {
        let world = TestTarget()
        for _ in 0..<Limits.stagingBuffers + 1 {
            let tag = world.a.send(CDB.getLBAStatus(0), dataIn: 4096)
            world.backstore.complete(error: 5)
            #expect(world.a.completions.last { $0.tag == tag }?.summary == "3/1100")
        }
    }
}

@Suite("WRITE ATOMIC")
struct WriteAtomicTests {
    private let data = (0..<4096).map { UInt8(truncatingIfNeeded: $0 &* 11) }

    @Test("WRITE ATOMIC asks the backstore for an atomic write, and FUA for a stable one")
    func writes() {
        let world = TestTarget()
        #expect(world.run(CDB.writeAtomic(24, 8), dataOut: data, outLayout: [100, 3996]).summary == "good")
        #expect(world.run(CDB.writeAtomic(24, 8, flags: 0x18), dataOut: data).summary == "good")
        #expect(
            world.backstore.accepted.map(\.description) == ["write atomic 12288+4096", "write atomic fua 12288+4096"])
        #expect(world.backstore.block(31) == Array(data[3584...]))
        #expect(world.run(CDB.writeAtomic(24, 0)).summary == "good")
        #expect(world.run(CDB.writeAtomic(24, 8), dataOut: Array(data[..<4095])).summary == "overrun")
    }

    @Test("The limits are those of the Block Limits VPD page; what breaks them is INVALID FIELD IN CDB at its field")
    func limits() {
        let world = TestTarget {
            $0.geometry.atomic_write_maximum = 16 * 512
            $0.geometry.atomic_write_granularity = 4 * 512
            $0.geometry.atomic_write_alignment = 8 * 512
        }
        let page = world.run(CDB.inquiry(page: 0xb0), dataIn: 255).data
        #expect(Array(page[44..<64]) == [0, 0, 0, 16, 0, 0, 0, 8, 0, 0, 0, 4] + [UInt8](repeating: 0, count: 8))
        let many = [UInt8](repeating: 1, count: 64 * 512)
        #expect(world.run(CDB.writeAtomic(8, 16), dataOut: many).summary == "good")
        #expect(world.run(CDB.writeAtomic(8, 20), dataOut: many).summary == "5/2400 CDB 12")
        #expect(world.run(CDB.writeAtomic(8, 6), dataOut: many).summary == "5/2400 CDB 12")
        #expect(world.run(CDB.writeAtomic(12, 8), dataOut: many).summary == "5/2400 CDB 2")
        #expect(world.run(CDB.writeAtomic(8, 8, boundary: 4), dataOut: many).summary == "5/2400 CDB 11.2")
        #expect(world.run(CDB.writeAtomic(4090, 8), dataOut: many).summary == "5/2100 CDB 2")
        #expect(world.run(CDB.writeAtomic(.max, 0xffff), dataOut: many).summary == "5/2100 CDB 2")
        #expect(world.backstore.accepted.count == 1)
    }

    @Test("No limit is above MAXIMUM TRANSFER LENGTH")
    func transferLimit() {
        let world = TestTarget(blocks: 1 << 20) { $0.geometry.atomic_write_maximum = .max / 512 * 512 }
        let page = world.run(CDB.inquiry(page: 0xb0), dataIn: 255).data
        #expect(Array(page[44..<48]) == Array(page[8..<12]))
    }

    @Test("A unit whose backstore promises nothing does not have the command")
    func absent() {
        let world = TestTarget { $0.geometry.atomic_write_maximum = 0 }
        #expect(world.run(CDB.writeAtomic(0, 8), dataOut: data).summary == "5/2000 CDB 0")
        #expect(Array(world.run(CDB.inquiry(page: 0xb0), dataIn: 255).data[44..<64]).allSatisfy { $0 == 0 })
        let asked = world.run(CDB.reportSupportedOperationCodes(options: 1, code: 0x9c), dataIn: 64)
        #expect(asked.data == [0, 1, 0, 0])
    }

    @Test("An error leaves nothing of it on the medium, and a read never sees a part of it")
    func allOrNothing() {
        let world = TestTarget()
        let write = world.a.send(CDB.writeAtomic(0, 8), dataOut: data)
        let read = world.b.send(CDB.read(.ten, 4, 8), dataIn: 4096)
        #expect(world.backstore.pending.map(\.operation) == [.write])
        world.backstore.complete(error: 5, partial: 2048)
        world.drain()
        #expect(world.a.completions.last { $0.tag == write }?.summary == "3/0c00")
        #expect(world.b.completions.last { $0.tag == read }?.data.allSatisfy { $0 == 0 } == true)
        #expect(world.backstore.block(0).allSatisfy { $0 == 0 })
    }
}

@Suite("Anchoring")
struct AnchorTests {
    let world = TestTarget()
    private let zeros = [UInt8](repeating: 0, count: 512)

    @Test("UNMAP with ANCHOR anchors each extent instead of deallocating it")
    func unmap() {
        let list = CDB.unmapList([(address: 8, blocks: 8), (address: 64, blocks: 1)])
        #expect(world.run(CDB.unmap(listLength: list.count, anchor: true), dataOut: list).summary == "good")
        #expect(world.backstore.accepted.map(\.description) == ["anchor 4096+4096", "anchor 32768+512"])
    }

    @Test("WRITE SAME with UNMAP and ANCHOR anchors what is zeros, and writes what is not", arguments: [0x41, 0x93])
    func writeSame(code: Int) {
        let form: CDB.Form = code == 0x41 ? .ten : .sixteen
        #expect(world.run(CDB.writeSame(form, 8, 16, flags: 0x18), dataOut: zeros).summary == "good")
        let pattern = [UInt8](repeating: 3, count: 512)
        #expect(world.run(CDB.writeSame(form, 64, 2, flags: 0x18), dataOut: pattern).summary == "good")
        #expect(world.backstore.accepted.map(\.description) == ["anchor 4096+8192", "write 32768+1024"])
    }

    @Test("WRITE SAME with NDOB, UNMAP and ANCHOR needs no data")
    func withoutData() {
        #expect(world.run(CDB.writeSame(.sixteen, 8, 16, flags: 0x19)).summary == "good")
        #expect(world.backstore.accepted.map(\.description) == ["anchor 4096+8192"])
    }

    @Test("ANCHOR without UNMAP is INVALID FIELD IN CDB at ANCHOR", arguments: [CDB.Form.ten, .sixteen])
    func anchorAlone(form: CDB.Form) {
        #expect(world.run(CDB.writeSame(form, 8, 16, flags: 0x10), dataOut: zeros).summary == "5/2400 CDB 1.4")
    }

    @Test("A medium that is full cannot anchor: SPACE ALLOCATION FAILED WRITE PROTECT")
    func full() {
        let list = CDB.unmapList([(address: 8, blocks: 8)])
        let tag = world.a.send(CDB.unmap(listLength: list.count, anchor: true), dataOut: list)
        world.backstore.complete(error: 28)
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "7/2707")
    }

    @Test("A unit that cannot anchor refuses the bit and says so in page B2h")
    func absent() {
        let world = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_CAN_ANCHOR) }
        let list = CDB.unmapList([(address: 8, blocks: 8)])
        let end = world.run(CDB.unmap(listLength: list.count, anchor: true), dataOut: list)
        #expect(end.summary == "5/2400 CDB 1.0")
        #expect(world.run(CDB.writeSame(.ten, 8, 16, flags: 0x18), dataOut: zeros).summary == "5/2400 CDB 1.4")
        #expect(world.run(CDB.inquiry(page: 0xb2), dataIn: 255).data[5] == 0xe4)
        #expect(world.run(CDB.unmap(listLength: list.count), dataOut: list).summary == "good")
    }

    @Test("What is anchored in pieces is anchored whole")
    func pieces() {
        let world = TestTarget { $0.geometry.maximum_discard = 2048 }
        #expect(world.run(CDB.writeSame(.sixteen, 0, 10, flags: 0x19)).summary == "good")
        let expected = ["anchor 0+2048", "anchor 2048+2048", "anchor 4096+1024"]
        #expect(world.backstore.accepted.map(\.description) == expected)
    }
}
