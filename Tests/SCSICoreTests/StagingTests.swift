// VERIFY, WRITE SAME, UNMAP: the commands whose data or lists the core looks at, in steps and with few staging buffers.

import CBackstore
import CoreTestSupport
import SCSICore
import Testing

@Suite("VERIFY")
struct VerifyTests {
    let world = TestTarget(blocks: 16_384)
    /// Two pieces of a staging buffer and a part of a third.
    private static let several = UInt64(Limits.pieceBytes / 512 * 2 + 176)
    private let block: [UInt8] = (0..<512).map { UInt8(truncatingIfNeeded: $0 * 3) }

    init() { for address in 0..<Self.several { world.backstore.setBlock(address, block) } }

    @Test("BYTCHK 00b reads the medium and takes no data", arguments: [CDB.Form.ten, .twelve, .sixteen])
    func readOnly(form: CDB.Form) {
        #expect(world.run(CDB.verify(form, 3, 2)).summary == "good")
        #expect(world.backstore.accepted.map(\.description) == ["read 1536+1024"])
    }

    @Test("BYTCHK 00b reports an unreadable block")
    func unreadable() {
        let tag = world.a.send(CDB.verify(.ten, 3, 2))
        world.backstore.complete(error: 5, errorOffset: 4 * 512)
        let end = world.a.completions.last { $0.tag == tag }
        #expect(end?.summary == "3/1100")
        #expect(end?.sense?.information == 4)
    }

    @Test("BYTCHK 01b compares with as much data, in pieces through the staging buffer")
    func compares() {
        let data = (0..<Self.several).flatMap { _ in block }
        let end = world.run(
            CDB.verify(.sixteen, 0, Self.several, byteCheck: 1), dataOut: data,
            outLayout: [1, 300_000, 0, data.count - 300_001])
        #expect(end.summary == "good")
        #expect(world.backstore.accepted.count == 3)
    }

    @Test(
        "BYTCHK 01b finds a byte that differs, in any piece",
        arguments: [0, 512, Limits.pieceBytes - 1, Limits.pieceBytes, Int(several) * 512 - 1])
    func miscompare(offset: Int) {
        var data = (0..<Self.several).flatMap { _ in block }
        data[offset] ^= 1
        #expect(world.run(CDB.verify(.sixteen, 0, Self.several, byteCheck: 1), dataOut: data).summary == "e/1d00")
    }

    @Test("BYTCHK 11b compares each block with the one block sent")
    func comparesOneBlock() {
        #expect(world.run(CDB.verify(.sixteen, 0, Self.several, byteCheck: 3), dataOut: block).summary == "good")
        world.backstore.setBlock(Self.several - 1, Array(repeating: 0, count: 512))
        #expect(world.run(CDB.verify(.sixteen, 0, Self.several, byteCheck: 3), dataOut: block).summary == "e/1d00")
        #expect(world.run(CDB.verify(.sixteen, 0, Self.several - 1, byteCheck: 3), dataOut: block).summary == "good")
    }

    @Test("BYTCHK 10b is reserved: INVALID FIELD IN CDB at byte 1 bit 2")
    func reservedByteCheck() {
        #expect(world.run(CDB.verify(.ten, 0, 1, byteCheck: 2)).summary == "5/2400 CDB 1.2")
    }

    @Test("BYTCHK 01b and 11b with too short buffers are overruns")
    func overrun() {
        #expect(world.run(CDB.verify(.ten, 0, 2, byteCheck: 1), dataOut: block).summary == "overrun")
        #expect(world.run(CDB.verify(.ten, 0, 2, byteCheck: 3), dataOut: [1]).summary == "overrun")
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("Data beyond what is compared is residual")
    func residual() {
        let end = world.run(CDB.verify(.ten, 0, 1, byteCheck: 1), dataOut: block + block)
        #expect(end.summary == "good")
        #expect(end.dataOutResidual == 512)
    }

    @Test("Zero blocks verify nothing; an extent beyond the medium is LBA OUT OF RANGE")
    func edges() {
        #expect(world.run(CDB.verify(.ten, 5, 0, byteCheck: 1)).summary == "good")
        #expect(world.run(CDB.verify(.ten, 16_384, 1)).summary == "5/2100 CDB 2")
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("Pieces are no longer than the backstore's maximum transfer")
    func smallTransfers() {
        world.backstore.geometry.maximum_transfer = 8192
        world.unit.backstoreGeometryChanged()
        _ = world.run(CDB.requestSense(), dataIn: 18)
        #expect(world.run(CDB.verify(.sixteen, 0, 40)).summary == "good")
        #expect(world.backstore.accepted.count == 3)
    }

    @Test("More VERIFY commands than staging buffers all end, whatever order the backstore takes")
    func moreThanStaging() {
        let count = Limits.stagingBuffers * 3
        for index in 0..<count { world.a.send(CDB.verify(.sixteen, UInt64(index), 600)) }
        #expect(world.backstore.pending.count == Limits.stagingBuffers)
        while !world.backstore.pending.isEmpty { world.backstore.complete(world.backstore.pending.count - 1) }
        #expect(world.a.tagsInFlight.isEmpty)
        #expect(world.a.completions.suffix(count).allSatisfy { $0.summary == "good" })
    }

    @Test("More VERIFY commands than staging buffers all end although the backstore is full")
    func moreThanStagingAndFull() {
        world.backstore.capacity = 1
        for index in 0..<10 { world.a.send(CDB.verify(.sixteen, UInt64(index), 600)) }
        while !world.backstore.pending.isEmpty { world.backstore.complete() }
        #expect(world.a.tagsInFlight.isEmpty)
        #expect(!world.shard.hasWaiting)
    }

    @Test("ABORT TASK of a command that waits for a staging buffer ends it; the others go on")
    func abortWaitingForStaging() {
        for index in 0..<Limits.stagingBuffers { world.a.send(CDB.verify(.sixteen, UInt64(index), 1)) }
        let tag = world.a.send(CDB.verify(.sixteen, 50, 1))
        let last = world.a.send(CDB.verify(.sixteen, 51, 1))
        world.a.manage(.abortTask, tag: tag, cookie: 5)
        #expect(world.journal.lines == ["A \(tag) aborted", "A function 5 functionComplete"])
        world.drain()
        #expect(world.a.completions.last { $0.tag == last }?.summary == "good")
        #expect(world.backstore.accepted.count == Limits.stagingBuffers + 1)
    }
}

@Suite("WRITE SAME")
struct WriteSameTests {
    let world = TestTarget()
    private let block: [UInt8] = (0..<512).map { UInt8(truncatingIfNeeded: $0 * 5 + 1) }

    @Test("The block is written to each LBA of the extent and nowhere else", arguments: [CDB.Form.ten, .sixteen])
    func writes(form: CDB.Form) {
        #expect(world.run(CDB.writeSame(form, 10, 1200), dataOut: block, outLayout: [5, 507]).summary == "good")
        #expect((10..<1210).allSatisfy { world.backstore.block($0) == block })
        #expect(world.backstore.block(9).allSatisfy { $0 == 0 })
        #expect(world.backstore.block(1210).allSatisfy { $0 == 0 })
    }

    @Test("A block of zeros is written by WRITE ZEROES, in pieces that the backstore takes")
    func zeroes() {
        world.backstore.geometry.maximum_write_zeroes = 4096
        world.unit.backstoreGeometryChanged()
        #expect(world.run(CDB.writeSame(.ten, 0, 20), dataOut: Array(repeating: 0, count: 512)).summary == "good")
        #expect(
            world.backstore.accepted.map(\.description) == [
                "writeZeroes 0+4096", "writeZeroes 4096+4096", "writeZeroes 8192+2048",
            ])
    }

    @Test("NDOB writes zeros and takes no data")
    func noDataOut() {
        world.backstore.setBlock(3, block)
        #expect(world.run(CDB.writeSame(.sixteen, 3, 1, flags: 1)).summary == "good")
        #expect(world.backstore.block(3).allSatisfy { $0 == 0 })
    }

    @Test("UNMAP with zeros deallocates where deallocated blocks read as zeros")
    func unmap() {
        #expect(world.run(CDB.writeSame(.sixteen, 3, 8, flags: 9)).summary == "good")
        #expect(world.backstore.accepted.map(\.description) == ["discard 1536+4096"])
    }

    @Test("UNMAP with zeros writes zeros where deallocated blocks may hold anything")
    func unmapWithoutZeros() {
        let world = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_DISCARD_READS_ZEROS) }
        #expect(world.run(CDB.writeSame(.sixteen, 3, 8, flags: 9)).summary == "good")
        #expect(world.backstore.accepted.map(\.operation) == [.writeZeroes])
    }

    @Test("UNMAP with another block than zeros writes it")
    func unmapWithData() {
        #expect(world.run(CDB.writeSame(.sixteen, 3, 8, flags: 8), dataOut: block).summary == "good")
        #expect((3..<11).allSatisfy { world.backstore.block($0) == block })
    }

    @Test("A backstore without WRITE ZEROES gets the zeros as data")
    func zeroesAsData() {
        let world = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_CAN_WRITE_ZEROES) }
        world.backstore.setBlock(2, block)
        #expect(world.run(CDB.writeSame(.ten, 2, 1), dataOut: Array(repeating: 0, count: 512)).summary == "good")
        #expect(world.backstore.accepted.map(\.operation) == [.write])
        #expect(world.backstore.block(2).allSatisfy { $0 == 0 })
    }

    @Test("A number of blocks of zero is refused, because WSNZ is one", arguments: [CDB.Form.ten, .sixteen])
    func zeroBlocks(form: CDB.Form) {
        let end = world.run(CDB.writeSame(form, 0, 0), dataOut: block)
        #expect(end.summary == "5/2400 CDB \(form == .ten ? 7 : 10)")
    }

    @Test("An extent beyond the medium is LBA OUT OF RANGE; data that is not one block is INVALID FIELD IN CDB")
    func edges() {
        #expect(world.run(CDB.writeSame(.ten, 4095, 2), dataOut: block).summary == "5/2100 CDB 2")
        #expect(world.run(CDB.writeSame(.ten, 0, 1), dataOut: [1]).summary == "5/2400")
        #expect(world.run(CDB.writeSame(.ten, 0, 1), dataOut: block + block).summary == "5/2400")
        #expect(world.run(CDB.writeSame(.sixteen, .max, 2), dataOut: block).summary == "5/2100 CDB 2")
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("More than MAXIMUM WRITE SAME LENGTH is INVALID FIELD IN CDB at the length field")
    func tooLong() {
        let world = TestTarget(blocks: 1 << 30)
        let blocks = Limits.writeSameBytes / 512
        #expect(world.run(CDB.writeSame(.sixteen, 0, blocks + 1), dataOut: block).summary == "5/2400 CDB 10")
        #expect(world.run(CDB.writeSame(.sixteen, 0, blocks, flags: 1)).summary == "good")
    }

    @Test("With WCE zero the pieces are stable before the status")
    func writeThrough() {
        let page = Array(world.run(CDB.modeSense6(0x08), dataIn: 255).data[4...])
        let list = [0, 0, 0, 0] + page[..<2] + [page[2] & ~4] + page[3...]
        _ = world.run(CDB.modeSelect6(listLength: list.count), dataOut: Array(list))
        _ = world.run(CDB.writeSame(.ten, 0, 1), dataOut: block)
        #expect(world.backstore.accepted.last?.description == "write fua 0+512")
    }

    @Test("ABORT TASK between two pieces stops it there; it is answered after the piece has ended")
    func abortBetweenPieces() {
        let tag = world.a.send(CDB.writeSame(.sixteen, 0, UInt64(Limits.pieceBytes / 512 + 100)), dataOut: block)
        world.backstore.complete()
        world.a.manage(.abortTask, tag: tag, cookie: 5)
        #expect(world.journal.lines.isEmpty)
        world.backstore.complete()
        #expect(world.journal.lines == ["A \(tag) aborted", "A function 5 functionComplete"])
        #expect(world.backstore.pending.isEmpty)
    }
}

@Suite("UNMAP")
struct UnmapTests {
    let world = TestTarget()

    private func unmap(_ extents: [(address: UInt64, blocks: UInt64)], world: TestTarget? = nil) -> Completion {
        let list = CDB.unmapList(extents)
        return (world ?? self.world).run(CDB.unmap(listLength: list.count), dataOut: list)
    }

    @Test("Each extent of the list is deallocated, empty ones are passed over")
    func extents() {
        #expect(unmap([(4, 8), (100, 0), (4095, 1)]).summary == "good")
        #expect(world.backstore.accepted.map(\.description) == ["discard 2048+4096", "discard 2096640+512"])
    }

    @Test("Extents are cut into pieces that the backstore takes")
    func pieces() {
        world.backstore.geometry.maximum_discard = 1024
        world.unit.backstoreGeometryChanged()
        #expect(unmap([(0, 5), (9, 1)]).summary == "good")
        #expect(
            world.backstore.accepted.map(\.description) == [
                "discard 0+1024", "discard 1024+1024", "discard 2048+512", "discard 4608+512",
            ])
    }

    @Test("The whole list is checked before any of it is done")
    func checkedFirst() {
        let end = unmap([(0, 8), (4095, 2)])
        #expect(end.sense?.key == 5)
        #expect(end.sense?.code == 0x2100)
        #expect(end.sense?.information == 4095)
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("An LBA near 2^64 is LBA OUT OF RANGE", arguments: [UInt64.max, UInt64.max - 7, 1 << 55] as [UInt64])
    func hugeAddress(address: UInt64) {
        #expect(unmap([(address, 16)]).sense?.code == 0x2100)
    }

    @Test("An empty list is no error; a list shorter than its header is PARAMETER LIST LENGTH ERROR")
    func shortLists() {
        #expect(world.run(CDB.unmap(listLength: 0)).summary == "good")
        #expect(world.run(CDB.unmap(listLength: 7), dataOut: Array(repeating: 0, count: 7)).summary == "5/1a00")
        #expect(world.run(CDB.unmap(listLength: 8), dataOut: Array(repeating: 0, count: 8)).summary == "good")
        #expect(world.run(CDB.unmap(listLength: 24), dataOut: Array(repeating: 0, count: 8)).summary == "overrun")
    }

    @Test("A descriptor that the list does not hold in full is ignored")
    func partialDescriptor() {
        let list = CDB.unmapList([(1, 1), (2, 1)])
        #expect(world.run(CDB.unmap(listLength: 39), dataOut: Array(list[..<39])).summary == "good")
        #expect(world.backstore.accepted.count == 1)
    }

    @Test("More descriptors than MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT are INVALID FIELD IN PARAMETER LIST")
    func tooManyDescriptors() {
        #expect(unmap(Array(repeating: (1, 1), count: Limits.unmapDescriptors)).summary == "good")
        #expect(unmap(Array(repeating: (1, 1), count: Limits.unmapDescriptors + 1)).summary == "5/2600 list 2")
    }

    @Test("More blocks than MAXIMUM UNMAP LBA COUNT are INVALID FIELD IN PARAMETER LIST")
    func tooManyBlocks() {
        let world = TestTarget(blocks: 1 << 40)
        #expect(unmap([(0, 0xffff_ffff)], world: world).summary == "good")
        #expect(unmap([(0, 0xffff_ffff), (0, 1)], world: world).summary == "5/2600 list 32")
    }

    @Test("A backstore that cannot discard has no UNMAP")
    func unsupported() {
        let world = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_CAN_DISCARD) }
        #expect(unmap([(0, 1)], world: world).summary == "5/2000 CDB 0")
        #expect(world.run(CDB.writeSame(.sixteen, 0, 1, flags: 9)).summary == "5/2400 CDB 1.3")
        #expect(world.run(CDB.inquiry(page: 0xb2), dataIn: 64).data == [0, 0xb2, 0, 4, 0, 0, 0, 0])
    }

    @Test("An UNMAP holds up reads and writes behind it until it has ended")
    func hazard() {
        let list = CDB.unmapList([(4, 8), (100, 8)])
        world.a.send(CDB.unmap(listLength: list.count), dataOut: list)
        world.b.send(CDB.read(.ten, 100, 1), dataIn: 512)
        #expect(world.backstore.pending.map(\.operation) == [.discard])
        world.backstore.complete()
        #expect(world.backstore.pending.map(\.operation) == [.discard])
        world.backstore.complete()
        #expect(world.backstore.pending.map(\.operation) == [.read])
    }
}
