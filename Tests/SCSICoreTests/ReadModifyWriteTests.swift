// WRITE AND VERIFY, COMPARE AND WRITE, ORWRITE, READ DEFECT DATA.
//
// Must not know: how the core stages what it reads.

import CBackstore
import CoreTestSupport
import SCSICore
import Testing

@Suite("Commands that read and write the same blocks")
struct ReadModifyWriteTests {
    let world = TestTarget()
    private let old: [UInt8] = (0..<512).map { UInt8(truncatingIfNeeded: $0 * 3) }
    private let new: [UInt8] = (0..<512).map { UInt8(truncatingIfNeeded: $0 * 5 + 1) }

    private func compareAndWrite(_ address: UInt64, _ blocks: UInt8, flags: UInt8 = 0) -> [UInt8] {
        [0x89, flags] + CDB.bytes(address, 8) + [0, 0, 0, blocks, 0, 0]
    }

    private func sixteen(_ code: UInt8, _ address: UInt64, _ blocks: UInt64, flags: UInt8 = 0) -> [UInt8] {
        [code, flags] + CDB.bytes(address, 8) + CDB.bytes(blocks, 4) + [0, 0]
    }

    // MARK: COMPARE AND WRITE

    @Test("COMPARE AND WRITE writes the second half if the first is on the medium, whatever the layout of the buffers")
    func comparesAndWrites() {
        for address in 0..<3 as Range<UInt64> { world.backstore.setBlock(address, old) }
        let data = Array([old, old, old, new, new, new].joined())
        let end = world.run(compareAndWrite(0, 3), dataOut: data, outLayout: [7, 1529, 100, 1436])
        #expect(end.summary == "good")
        for address in 0..<3 as Range<UInt64> { #expect(world.backstore.block(address) == new) }
    }

    @Test("COMPARE AND WRITE reports the offset of the first byte that differs, and writes nothing (SBC-4 5.3)")
    func miscompares() {
        for address in 0..<2 as Range<UInt64> { world.backstore.setBlock(address, old) }
        var expected = old + old
        expected[700] ^= 0x80
        let end = world.run(compareAndWrite(0, 2), dataOut: expected + new + new)
        #expect(end.summary == "e/1d00")
        #expect(end.sense?.information == 700)
        #expect(world.backstore.block(0) == old)
        #expect(world.backstore.block(1) == old)
    }

    @Test("COMPARE AND WRITE with FUA is stable when it ends; without, it is what the cache makes of it")
    func forcesUnitAccess() {
        #expect(world.run(compareAndWrite(0, 1), dataOut: Array(repeating: 0, count: 512) + new).summary == "good")
        #expect(world.backstore.unstable.contains(0))
        #expect(world.run(compareAndWrite(0, 1, flags: 8), dataOut: new + old).summary == "good")
        #expect(!world.backstore.unstable.contains(0))
    }

    @Test("COMPARE AND WRITE of no blocks is good; of too few bytes an overrun; beyond the medium LBA OUT OF RANGE")
    func edges() {
        #expect(world.run(compareAndWrite(0, 0)).summary == "good")
        #expect(world.run(compareAndWrite(0, 1), dataOut: old).summary == "overrun")
        #expect(
            world.run(compareAndWrite(4095, 2), dataOut: Array(repeating: 0, count: 2048)).summary == "5/2100 CDB 2")
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("Two COMPARE AND WRITE of one block run one after the other, from whatever nexus: one of them loses")
    func isAtomic() {
        world.backstore.setBlock(5, old)
        let first = world.a.send(compareAndWrite(5, 1), dataOut: old + new)
        let second = world.b.send(compareAndWrite(5, 1), dataOut: old + old.reversed())
        #expect(world.backstore.pending.count == 1)
        world.drain()
        #expect(world.a.completions.last { $0.tag == first }?.summary == "good")
        #expect(world.b.completions.last { $0.tag == second }?.summary == "e/1d00")
        #expect(world.backstore.block(5) == new)
    }

    @Test("HEAD OF QUEUE does not come between the compare and the write, and waits for nothing else")
    func headOfQueue() {
        world.backstore.setBlock(5, old)
        let first = world.a.send(compareAndWrite(5, 1), dataOut: old + new)
        let ordered = world.a.send(CDB.testUnitReady, attribute: .ordered)
        let second = world.b.send(compareAndWrite(5, 1), attribute: .headOfQueue, dataOut: old + old.reversed())
        let write = world.b.send(CDB.write(.ten, 5, 1), attribute: .headOfQueue, dataOut: old)
        #expect(world.backstore.pending.map(\.description) == ["read 2560+512"])
        let elsewhere = world.b.send(CDB.write(.ten, 9, 1), attribute: .headOfQueue, dataOut: new)
        #expect(world.backstore.pending.count == 2)
        world.drain()
        #expect(world.a.completions.last { $0.tag == first }?.summary == "good")
        #expect(world.b.completions.last { $0.tag == second }?.summary == "e/1d00")
        for tag in [write, elsewhere] { #expect(world.b.completions.last { $0.tag == tag }?.summary == "good") }
        #expect(world.a.completions.last { $0.tag == ordered }?.summary == "good")
        #expect(world.backstore.block(5) == old)
    }

    @Test("An error of the medium in either step of COMPARE AND WRITE is reported as such", arguments: [0, 1])
    func mediumError(step: Int) {
        let tag = world.a.send(compareAndWrite(0, 1), dataOut: Array(repeating: 0, count: 512) + new)
        for _ in 0..<step { world.backstore.complete() }
        world.backstore.complete(error: 5, errorOffset: 0)
        #expect(world.a.completions.last { $0.tag == tag }?.summary == (step == 0 ? "3/1100" : "3/0c00"))
    }

    // MARK: WRITE AND VERIFY

    @Test("WRITE AND VERIFY is stable, and reads back what it wrote", arguments: [UInt8(0), 2])
    func writesAndVerifies(byteCheck: UInt8) {
        let end = world.run(sixteen(0x8e, 3, 2, flags: byteCheck), dataOut: old + new)
        #expect(end.summary == "good")
        #expect(world.backstore.block(4) == new)
        #expect(world.backstore.unstable.isEmpty)
        #expect(world.backstore.accepted.last?.description == "read 1536+1024")
    }

    @Test("WRITE AND VERIFY with BYTCHK finds that the medium did not keep what was written")
    func lostWrite() {
        world.backstore.losesWrite = { _ in true }
        #expect(world.run(sixteen(0x8e, 3, 1, flags: 2), dataOut: new).summary == "e/1d00")
    }

    @Test("The reserved BYTCHK values of WRITE AND VERIFY are INVALID FIELD IN CDB")
    func reservedByteCheck() {
        #expect(world.run(sixteen(0x8e, 3, 1, flags: 4), dataOut: new).summary == "5/2400 CDB 1.2")
    }

    // MARK: ORWRITE

    @Test("ORWRITE sets the bits that are one in the data and leaves the others")
    func setsBits() {
        world.backstore.setBlock(8, old)
        #expect(world.run(sixteen(0x8b, 8, 1), dataOut: new, outLayout: [1, 500, 11]).summary == "good")
        #expect(world.backstore.block(8) == zip(old, new).map { $0 | $1 })
    }

    @Test("ORWRITE of more than one piece changes all of it")
    func longOrWrite() {
        let blocks = UInt64(Limits.pieceBytes / 512 + 3)
        let data = [UInt8](repeating: 0x0f, count: Int(blocks) * 512)
        for address in 0..<blocks { world.backstore.setBlock(address, Array(repeating: 0xf0, count: 512)) }
        #expect(world.run(sixteen(0x8b, 0, blocks), dataOut: data).summary == "good")
        for address in 0..<blocks { #expect(world.backstore.block(address).allSatisfy { $0 == 0xff }) }
    }

    // MARK: READ DEFECT DATA

    @Test("READ DEFECT DATA(10) and (12) give the lists that were asked for, empty")
    func defectLists() {
        #expect(world.run([0x37, 0, 0x1d, 0, 0, 0, 0, 0, 255, 0], dataIn: 255).data == [0, 0x1d, 0, 0])
        #expect(
            world.run([0xb7, 0x0d, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0], dataIn: 255).data == [0, 0x0d, 0, 0, 0, 0, 0, 0])
    }
}
