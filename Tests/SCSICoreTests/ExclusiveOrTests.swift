// XDWRITEREAD and XPWRITE (SBC-3): exclusive or of what the medium holds and what the initiator sends; the first of
// them moves data both ways.
//
// Must not know: how the core stages what it reads.

import CBackstore
import CoreTestSupport
import SCSICore
import Testing

@Suite("Exclusive or commands")
struct ExclusiveOrTests {
    let world = TestTarget()
    private static let old: [UInt8] = (0..<512).map { UInt8(truncatingIfNeeded: $0 * 3 + 1) }
    private static let new: [UInt8] = (0..<512).map { UInt8(truncatingIfNeeded: $0 * 5 + 2) }
    private var old: [UInt8] { Self.old }
    private var new: [UInt8] { Self.new }
    private var difference: [UInt8] { zip(old, new).map { $0 ^ $1 } }
    /// Blocks of a piece, in which the core works on longer commands.
    private static let piece = UInt64(Limits.pieceBytes / 512)

    private func fill(_ addresses: Range<UInt64>, _ world: TestTarget? = nil) {
        for address in addresses { (world ?? self.world).backstore.setBlock(address, old) }
    }

    private func repeated(_ block: [UInt8], _ count: UInt64) -> [UInt8] {
        Array(repeatElement(block, count: Int(count)).joined())
    }

    // MARK: What they do

    @Test(
        "XDWRITEREAD returns the exclusive or of the blocks and the data, and writes the data, whatever the layout",
        arguments: [false, true])
    func readsAndWrites(isLong: Bool) {
        fill(7..<10)
        let end = world.run(
            CDB.xdWriteRead(7, 3, isLong: isLong), dataOut: repeated(new, 3), outLayout: [7, 0, 1529], dataIn: 1536,
            inLayout: [511, 2, 0, 1023])
        #expect(end.summary == "good")
        #expect((end.dataInResidual, end.dataOutResidual) == (0, 0))
        #expect(end.data == repeated(difference, 3))
        for address in 7..<10 as Range<UInt64> { #expect(world.backstore.block(address) == new) }
    }

    @Test("XDWRITEREAD with DISABLE WRITE returns the same and leaves the blocks alone", arguments: [false, true])
    func disablesWrite(isLong: Bool) {
        fill(7..<9)
        let end = world.run(
            CDB.xdWriteRead(7, 2, flags: 4, isLong: isLong), dataOut: repeated(new, 2), dataIn: 1024)
        #expect(end.summary == "good")
        #expect(end.data == repeated(difference, 2))
        for address in 7..<9 as Range<UInt64> { #expect(world.backstore.block(address) == old) }
        #expect(world.backstore.accepted.map(\.description) == ["read 3584+1024"])
    }

    @Test("XPWRITE writes the exclusive or of the blocks and the data", arguments: [false, true])
    func writesExclusiveOr(isLong: Bool) {
        fill(7..<9)
        let end = world.run(
            CDB.xpWrite(7, 2, isLong: isLong), dataOut: repeated(new, 2), outLayout: [3, 1000, 21])
        #expect(end.summary == "good")
        #expect(end.dataOutResidual == 0)
        for address in 7..<9 as Range<UInt64> { #expect(world.backstore.block(address) == difference) }
    }

    @Test("A command of more than one piece is the same as one of one piece", arguments: [false, true])
    func severalPieces(isBidirectional: Bool) {
        let blocks = Self.piece * 2 + 3
        fill(0..<blocks)
        let data = repeated(new, blocks)
        let end =
            isBidirectional
            ? world.run(
                CDB.xdWriteRead(0, blocks, isLong: true), dataOut: data, outLayout: [5, data.count - 5],
                dataIn: data.count, inLayout: [data.count - 600, 600])
            : world.run(CDB.xpWrite(0, blocks, isLong: true), dataOut: data)
        #expect(end.summary == "good")
        if isBidirectional { #expect(end.data == repeated(difference, blocks)) }
        let expected = isBidirectional ? new : difference
        #expect((0..<blocks).allSatisfy { world.backstore.block($0) == expected })
        // Nothing beyond was touched.
        #expect(world.backstore.block(blocks) == Array(repeating: 0, count: 512))
    }

    // MARK: Buffers

    @Test("What the command does not need of either buffer is its residual, and is left alone")
    func residuals() {
        let end = world.run(CDB.xdWriteRead(3, 1), dataOut: repeated(new, 3), dataIn: 1000)
        #expect(end.summary == "good")
        #expect((end.dataInResidual, end.dataOutResidual) == (488, 1024))
        #expect(end.data == new)
        let write = world.run(CDB.xpWrite(3, 1), dataOut: repeated(new, 3), dataIn: 100)
        #expect((write.dataInResidual, write.dataOutResidual) == (100, 1024))
    }

    @Test(
        "A buffer that is too short, either of them, is an overrun, and nothing is done",
        arguments: [(511, 512), (512, 511), (0, 512), (512, 0), (0, 0)])
    func overrun(out: Int, into: Int) {
        let end = world.run(CDB.xdWriteRead(3, 1), dataOut: Array(new.prefix(out)), dataIn: into)
        #expect(end.summary == "overrun")
        #expect((end.dataInResidual, end.dataOutResidual) == (into, out))
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("XPWRITE with too few bytes is an overrun")
    func shortParity() {
        #expect(world.run(CDB.xpWrite(3, 1), dataOut: Array(new.dropLast())).summary == "overrun")
        #expect(world.backstore.accepted.isEmpty)
    }

    // MARK: CDB

    @Test("No blocks are no error, and nothing is moved", arguments: [false, true])
    func noBlocks(isLong: Bool) {
        let end = world.run(CDB.xdWriteRead(0, 0, isLong: isLong), dataOut: new, dataIn: 512)
        #expect(end.summary == "good")
        #expect((end.dataInResidual, end.dataOutResidual) == (512, 512))
        #expect(world.run(CDB.xpWrite(4096, 0, isLong: isLong)).summary == "good")
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("Blocks beyond the medium are LBA OUT OF RANGE, with the field that says so", arguments: [false, true])
    func outOfRange(isLong: Bool) {
        let expected = "5/2100 CDB \(isLong ? 12 : 2)"
        let end = world.run(
            CDB.xdWriteRead(4095, 2, isLong: isLong), dataOut: repeated(new, 2), dataIn: 1024)
        #expect(end.summary == expected)
        #expect(world.run(CDB.xpWrite(4096, 1, isLong: isLong), dataOut: new).summary == expected)
        if isLong {
            #expect(world.run(CDB.xpWrite(.max, .max, isLong: true), dataOut: new).summary == expected)
        }
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("More blocks than MAXIMUM TRANSFER LENGTH are INVALID FIELD IN CDB at TRANSFER LENGTH")
    func tooLong() {
        let world = TestTarget { $0.geometry.maximum_transfer = 4096 }
        let data = repeated(new, 9)
        for isLong in [false, true] {
            let expected = "5/2400 CDB \(isLong ? 28 : 7)"
            #expect(
                world.run(CDB.xdWriteRead(0, 9, isLong: isLong), dataOut: data, dataIn: data.count).summary == expected)
            #expect(world.run(CDB.xpWrite(0, 9, isLong: isLong), dataOut: data).summary == expected)
            #expect(world.run(CDB.xpWrite(0, 8, isLong: isLong), dataOut: data).summary == "good")
        }
    }

    @Test("XORPINFO and WRPROTECT speak of protection information, of which there is none")
    func protectionInformation() {
        for (flags, bit) in [(1, 0), (0x20, 5)] as [(UInt8, Int)] {
            #expect(world.run(CDB.xdWriteRead(0, 1, flags: flags)).summary == "5/2400 CDB 1.\(bit)")
            #expect(world.run(CDB.xpWrite(0, 1, flags: flags)).summary == "5/2400 CDB 1.\(bit)")
            #expect(world.run(CDB.xdWriteRead(0, 1, flags: flags, isLong: true)).summary == "5/2400 CDB 10.\(bit)")
            #expect(world.run(CDB.xpWrite(0, 1, flags: flags, isLong: true)).summary == "5/2400 CDB 10.\(bit)")
        }
    }

    @Test(
        "ADDITIONAL CDB LENGTH has one right value",
        arguments: [CDB.xdWriteRead(0, 0, isLong: true), CDB.xpWrite(0, 0, isLong: true)])
    func additionalLength(cdb: [UInt8]) {
        for length in [0, 8, 0x10] as [UInt8] {
            var wrong = cdb
            wrong[7] = length
            #expect(world.run(wrong).summary == "5/2400 CDB 7")
        }
    }

    // MARK: The cache

    @Test("What is written with FUA is stable when the command ends; without, it is what the cache makes of it")
    func forcesUnitAccess() {
        #expect(world.run(CDB.xpWrite(0, 1), dataOut: new).summary == "good")
        #expect(world.run(CDB.xdWriteRead(1, 1), dataOut: new, dataIn: 512).summary == "good")
        #expect(world.backstore.unstable == [0, 1])
        for isLong in [false, true] {
            #expect(world.run(CDB.xpWrite(0, 1, flags: 8, isLong: isLong), dataOut: new).summary == "good")
            let end = world.run(CDB.xdWriteRead(1, 1, flags: 0x18, isLong: isLong), dataOut: new, dataIn: 512)
            #expect(end.summary == "good")
        }
        #expect(world.backstore.unstable.isEmpty)
    }

    @Test("With DISABLE WRITE FUA is of the read: what is cached is made stable first, once for the whole command")
    func forcesUnitAccessOfTheRead() {
        let blocks = Self.piece + 1
        let data = repeated(new, blocks)
        let end = world.run(
            CDB.xdWriteRead(0, blocks, flags: 0x0c), dataOut: data, dataIn: data.count)
        #expect(end.summary == "good")
        #expect(end.data == data)
        #expect(world.backstore.accepted.map(\.operation) == [.flush, .read, .read])
    }

    @Test("Without a write cache (WCE zero) what is written is stable")
    func writesThrough() {
        let page: [UInt8] = [0, 0, 0, 0, 0x08, 18, 0] + Array(repeating: 0, count: 17)
        #expect(world.run(CDB.modeSelect6(listLength: page.count), dataOut: page).summary == "good")
        #expect(world.run(CDB.xdWriteRead(1, 1), dataOut: new, dataIn: 512).summary == "good")
        #expect(world.run(CDB.xpWrite(0, 1), dataOut: new).summary == "good")
        #expect(world.backstore.unstable.isEmpty)
    }

    // MARK: Write protection

    @Test("On a write protected medium only XDWRITEREAD with DISABLE WRITE is carried out")
    func writeProtected() {
        world.unit.setReadOnly(true)
        for port in [world.a, world.b] { _ = world.run(CDB.requestSense(), dataIn: 252, on: port) }
        for isLong in [false, true] {
            #expect(world.run(CDB.xpWrite(0, 1, isLong: isLong), dataOut: new).summary == "7/2700")
            #expect(
                world.run(CDB.xdWriteRead(0, 1, isLong: isLong), dataOut: new, dataIn: 512).summary == "7/2700")
            let read = world.run(CDB.xdWriteRead(0, 1, flags: 4, isLong: isLong), dataOut: new, dataIn: 512)
            #expect(read.summary == "good")
            #expect(read.data == new)
        }
        #expect(world.backstore.accepted.allSatisfy { $0.operation == .read })
    }

    // MARK: Errors and ends in the middle

    @Test(
        "An error of the medium in any step is reported as such; what was done before stays",
        arguments: 0..<4, [false, true])
    func mediumError(step: Int, isBidirectional: Bool) {
        let blocks = Self.piece + 1
        fill(0..<blocks)
        let data = repeated(new, blocks)
        let tag =
            isBidirectional
            ? world.a.send(CDB.xdWriteRead(0, blocks), dataOut: data, dataIn: data.count)
            : world.a.send(CDB.xpWrite(0, blocks), dataOut: data)
        for _ in 0..<step { world.backstore.complete() }
        world.backstore.complete(error: 5)
        let end = world.a.completions.last { $0.tag == tag }
        #expect(end?.summary == (step % 2 == 0 ? "3/1100" : "3/0c00"))
        if isBidirectional { #expect(end?.dataInResidual == data.count) }
        let changed = isBidirectional ? new : difference
        #expect(world.backstore.block(0) == (step < 2 ? old : changed))
        #expect(world.backstore.block(blocks - 1) == old)
        #expect(world.backstore.pending.isEmpty)
    }

    @Test(
        "An abort in any step ends the command there; no more bytes are claimed than were written",
        arguments: 0..<4)
    func abort(step: Int) {
        let blocks = Self.piece + 1
        fill(0..<blocks)
        let data = repeated(new, blocks)
        let tag = world.a.send(CDB.xdWriteRead(0, blocks), dataOut: data, dataIn: data.count)
        for _ in 0..<step { world.backstore.complete() }
        world.b.manage(.clearTaskSet)
        #expect(world.backstore.cancellations == 1)
        #expect(world.a.completions.allSatisfy { $0.tag != tag })
        let accepted = world.backstore.accepted.count
        world.drain()
        let end = world.a.completions.last { $0.tag == tag }
        #expect(end?.summary == "aborted")
        #expect(end?.data == (step < 2 ? [] : repeated(difference, Self.piece)))
        #expect(world.backstore.accepted.count == accepted)
        #expect(world.backstore.block(0) == (step < 2 ? old : new))
        #expect(world.backstore.block(blocks - 1) == old)
    }

    @Test("A medium that becomes smaller between the pieces ends the command with LBA OUT OF RANGE")
    func shrinks() {
        let blocks = Self.piece + 1
        let data = repeated(new, blocks)
        let tag = world.a.send(CDB.xdWriteRead(0, blocks), dataOut: data, dataIn: data.count)
        world.backstore.complete()
        world.backstore.geometry.size = Self.piece * 512
        world.unit.backstoreGeometryChanged()
        world.backstore.complete()
        let end = world.a.completions.last { $0.tag == tag }
        #expect(end?.sense?.code == 0x2100)
        #expect(end?.dataInResidual == data.count)
        #expect(world.backstore.pending.isEmpty)
    }

    @Test("A command goes no further after its deadline, whatever its step was")
    func deadline() {
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "DEADLINE")
        configuration.commandTimeout = 1_000_000_000
        let world = TestTarget(configuration: configuration)
        fill(0..<1, world)
        world.backstore.honoursCancel = false
        let tag = world.a.send(CDB.xdWriteRead(0, 1), dataOut: new, dataIn: 512)
        world.shard.now = 2_000_000_000
        world.shard.expireDeadlines()
        world.backstore.complete()
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "b/0801")
        #expect(world.backstore.block(0) == old)
    }

    @Test("More commands than there are staging buffers wait for one, and all are carried out")
    func stagingShortage() {
        let count = UInt64(Limits.stagingBuffers + 2)
        fill(0..<count)
        let tags = (0..<count).map { world.a.send(CDB.xdWriteRead($0, 1), dataOut: new, dataIn: 512) }
        #expect(world.backstore.pending.count == Limits.stagingBuffers)
        world.drain()
        for tag in tags {
            let end = world.a.completions.last { $0.tag == tag }
            #expect(end?.summary == "good")
            #expect(end?.data == difference)
        }
    }

    @Test("A unit that is frozen between the steps goes on when it is thawed")
    func freeze() {
        fill(0..<1)
        let tag = world.a.send(CDB.xdWriteRead(0, 1), dataOut: new, dataIn: 512)
        world.unit.freeze()
        world.backstore.complete()
        #expect(world.backstore.pending.isEmpty)
        world.unit.thaw()
        world.drain()
        let end = world.a.completions.last { $0.tag == tag }
        #expect(end?.summary == "good")
        #expect(end?.data == difference)
        #expect(world.backstore.block(0) == new)
    }

    // MARK: Other commands

    @Test("Nothing comes between the read and the write: not HEAD OF QUEUE of another nexus either")
    func isUninterrupted() {
        fill(5..<6)
        let first = world.a.send(CDB.xdWriteRead(5, 1), dataOut: new, dataIn: 512)
        let second = world.b.send(CDB.xdWriteRead(5, 1), attribute: .headOfQueue, dataOut: old, dataIn: 512)
        let write = world.b.send(CDB.write(.ten, 5, 1), attribute: .headOfQueue, dataOut: old)
        let read = world.b.send(CDB.read(.ten, 5, 1), attribute: .headOfQueue, dataIn: 512)
        #expect(world.backstore.pending.map(\.description) == ["read 2560+512"])
        world.drain()
        #expect(world.a.completions.last { $0.tag == first }?.data == difference)
        #expect(world.b.completions.last { $0.tag == second }?.data == difference)
        for tag in [write, read] { #expect(world.b.completions.last { $0.tag == tag }?.summary == "good") }
    }

    @Test("Two XPWRITE of the same blocks are both in what the medium holds, from whatever nexus")
    func bothParities() {
        fill(5..<6)
        world.a.send(CDB.xpWrite(5, 1), dataOut: new)
        world.b.send(CDB.xpWrite(5, 1, isLong: true), dataOut: difference)
        #expect(world.backstore.pending.count == 1)
        world.drain()
        // old ^ new ^ old ^ new
        #expect(world.backstore.block(5) == Array(repeating: 0, count: 512))
    }

    @Test("Blocks that do not overlap, told by the fields of the long CDB, are worked on side by side")
    func besideOthers() {
        world.a.send(CDB.xdWriteRead(5, 1, isLong: true), dataOut: new, dataIn: 512)
        world.a.send(CDB.xpWrite(6, 1, isLong: true), dataOut: new)
        world.b.send(CDB.write(.ten, 7, 1), dataOut: new)
        #expect(world.backstore.pending.count == 3)
        world.b.send(CDB.write(.ten, 6, 1), dataOut: new)
        #expect(world.backstore.pending.count == 3)
        world.drain()
    }
}
