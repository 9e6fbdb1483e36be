// READ, WRITE, SYNCHRONIZE CACHE: data, residuals, errors, cache control.

import CBackstore
import CoreTestSupport
import SCSICore
import Testing

@Suite("READ, WRITE, SYNCHRONIZE CACHE")
struct ReadWriteTests {
    let world = TestTarget()

    private func pattern(_ blocks: Int, _ seed: Int = 1) -> [UInt8] {
        (0..<blocks * 512).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ $0 / 512 &+ seed) }
    }

    @Test("What each form of WRITE wrote, each form of READ returns", arguments: CDB.Form.allCases, CDB.Form.allCases)
    func forms(write: CDB.Form, read: CDB.Form) {
        let data = pattern(3)
        #expect(world.run(CDB.write(write, 100, 3), dataOut: data).summary == "good")
        let end = world.run(CDB.read(read, 100, 3), dataIn: data.count)
        #expect(end.summary == "good")
        #expect(end.data == data)
    }

    @Test("READ(6) and WRITE(6) with a length of zero move 256 blocks (SBC-5: TRANSFER LENGTH)")
    func sixWithZero() {
        let data = pattern(256)
        #expect(world.run(CDB.write(.six, 0, 0), dataOut: data).summary == "good")
        #expect(world.run(CDB.read(.six, 0, 0), dataIn: data.count).data == data)
    }

    @Test("READ(6) takes 21 bits of LBA")
    func sixAddress() {
        let world = TestTarget(blocks: 1 << 22)
        world.backstore.setBlock(0x1f_ffff, pattern(1))
        #expect(world.run(CDB.read(.six, 0x1f_ffff, 1), dataIn: 512).data == pattern(1))
    }

    @Test(
        "Segments of any length and alignment carry the data",
        arguments: [
            [1024], [1, 1023], [511, 513], [0, 1024], [1024, 0], [0, 0, 1, 0, 1023, 0], Array(repeating: 32, count: 32),
        ])
    func segments(layout: [Int]) {
        let data = pattern(2)
        #expect(world.run(CDB.write(.ten, 7, 2), dataOut: data, outLayout: layout).summary == "good")
        #expect(world.backstore.block(7) + world.backstore.block(8) == data)
        #expect(world.run(CDB.read(.ten, 7, 2), dataIn: 1024, inLayout: layout).data == data)
    }

    @Test("READ into buffers longer than the data leaves the rest alone and reports it as residual")
    func readResidual() {
        let end = world.run(CDB.read(.ten, 0, 1), dataIn: 1000, inLayout: [300, 400, 300])
        #expect(end.summary == "good")
        #expect(end.dataInResidual == 488)
        #expect(end.buffer.suffix(488).allSatisfy { $0 == MockPort.untouched })
    }

    @Test("WRITE from buffers longer than the data uses the first bytes and reports the rest as residual")
    func writeResidual() {
        let data = pattern(3)
        let end = world.run(CDB.write(.ten, 0, 1), dataOut: data, outLayout: [100, 500, 936])
        #expect(end.dataOutResidual == 1024)
        #expect(world.backstore.block(0) == Array(data[..<512]))
        #expect(world.backstore.block(1).allSatisfy { $0 == 0 })
    }

    @Test("READ for more data than the buffers hold is an overrun and reads nothing")
    func readOverrun() {
        let end = world.run(CDB.read(.ten, 0, 2), dataIn: 1023)
        #expect(end.summary == "overrun")
        #expect(end.dataInResidual == 1023)
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("WRITE for more data than the buffers hold is an overrun and writes nothing")
    func writeOverrun() {
        let end = world.run(CDB.write(.ten, 0, 2), dataOut: pattern(1))
        #expect(end.summary == "overrun")
        #expect(end.dataOutResidual == 512)
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("A transfer length of zero moves nothing and is no error", arguments: [CDB.Form.ten, .twelve, .sixteen])
    func zeroBlocks(form: CDB.Form) {
        #expect(world.run(CDB.read(form, 5, 0), dataIn: 512).summary == "good")
        #expect(world.run(CDB.write(form, 5, 0), dataOut: pattern(1)).dataOutResidual == 512)
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("An extent that ends at the last block is carried out; one block further is LBA OUT OF RANGE")
    func capacityEdge() {
        #expect(world.run(CDB.read(.ten, 4095, 1), dataIn: 512).summary == "good")
        #expect(world.run(CDB.read(.ten, 4095, 2), dataIn: 1024).summary == "5/2100 CDB 2")
        #expect(world.run(CDB.read(.ten, 4096, 1), dataIn: 512).summary == "5/2100 CDB 2")
        #expect(world.run(CDB.write(.sixteen, 4096, 1), dataOut: pattern(1)).summary == "5/2100 CDB 2")
        #expect(world.run(CDB.read(.six, 4096, 1), dataIn: 512).summary == "5/2100 CDB 1")
        #expect(world.run(CDB.read(.ten, 4097, 0), dataIn: 512).summary == "5/2100 CDB 2")
    }

    @Test(
        "An LBA near 2^64 is LBA OUT OF RANGE and no sum wraps",
        arguments: [UInt64.max, UInt64.max - 1, 1 << 63, 1 << 55, UInt64.max / 512] as [UInt64])
    func hugeAddress(address: UInt64) {
        let end = world.run(CDB.read(.sixteen, address, 2), dataIn: 1024)
        #expect(end.summary == "5/2100 CDB 2")
        #expect(end.sense?.information == (address > UInt64(UInt32.max) ? nil : address))
    }

    @Test("LBA OUT OF RANGE carries the LBA in the INFORMATION field (SPC-4: INFORMATION field)")
    func information() {
        #expect(world.run(CDB.read(.ten, 5000, 1), dataIn: 512).sense?.information == 5000)
    }

    @Test("A transfer longer than MAXIMUM TRANSFER LENGTH is INVALID FIELD IN CDB at the length field")
    func tooLong() {
        let world = TestTarget(blocks: 1 << 24)
        let blocks = Limits.transferBytes / 512
        #expect(world.run(CDB.read(.sixteen, 0, blocks + 1)).summary == "5/2400 CDB 10")
        #expect(world.run(CDB.read(.twelve, 0, blocks + 1)).summary == "5/2400 CDB 6")
        #expect(world.run(CDB.write(.sixteen, 0, blocks + 1)).summary == "5/2400 CDB 10")
        #expect(world.run(CDB.read(.sixteen, 0, blocks)).summary == "overrun")
    }

    @Test("The backstore's own maximum transfer bounds a READ")
    func backstoreMaximum() {
        let world = TestTarget { $0.geometry.maximum_transfer = 4096 }
        #expect(world.run(CDB.read(.ten, 0, 8), dataIn: 4096).summary == "good")
        #expect(world.run(CDB.read(.ten, 0, 9), dataIn: 4608).summary == "5/2400 CDB 7")
    }

    @Test("Blocks of 4096 bytes work like blocks of 512")
    func largeBlocks() {
        let world = TestTarget(blocks: 64, blockLength: 4096)
        let data = (0..<8192).map { UInt8(truncatingIfNeeded: $0 / 3) }
        #expect(world.run(CDB.write(.ten, 62, 2), dataOut: data).summary == "good")
        #expect(world.run(CDB.read(.ten, 62, 2), dataIn: 8192).data == data)
        #expect(world.run(CDB.read(.ten, 63, 2), dataIn: 8192).summary == "5/2100 CDB 2")
    }

    @Test("WRITE with FUA is stable before its status; WRITE without is not, while WCE is one")
    func forceUnitAccess() {
        _ = world.run(CDB.write(.ten, 1, 1), dataOut: pattern(1))
        _ = world.run(CDB.write(.ten, 2, 1, flags: 8), dataOut: pattern(1))
        #expect(world.backstore.accepted.map(\.description) == ["write 512+512", "write fua 1024+512"])
        #expect(world.backstore.unstable == [1])
    }

    @Test("READ with FUA makes what is cached stable before it reads")
    func readForceUnitAccess() {
        _ = world.run(CDB.write(.ten, 1, 1), dataOut: pattern(1))
        let end = world.run(CDB.read(.ten, 1, 1, flags: 8), dataIn: 512)
        #expect(end.data == pattern(1))
        #expect(world.backstore.accepted.map(\.description) == ["write 512+512", "flush", "read 512+512"])
    }

    @Test("Without a volatile cache, FUA and SYNCHRONIZE CACHE ask nothing of the backstore")
    func noCache() {
        let world = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_VOLATILE_CACHE) }
        _ = world.run(CDB.write(.ten, 1, 1, flags: 8), dataOut: pattern(1))
        _ = world.run(CDB.read(.ten, 1, 1, flags: 8), dataIn: 512)
        _ = world.run(CDB.synchronizeCache())
        #expect(world.backstore.accepted.map(\.description) == ["write 512+512", "read 512+512"])
    }

    @Test("SYNCHRONIZE CACHE flushes, whatever extent it names", arguments: [CDB.Form.ten, .sixteen])
    func synchronizeCache(form: CDB.Form) {
        _ = world.run(CDB.write(.ten, 1, 1), dataOut: pattern(1))
        #expect(world.run(CDB.synchronizeCache(form, 3, 0)).summary == "good")
        #expect(world.backstore.unstable.isEmpty)
        #expect(world.run(CDB.synchronizeCache(form, 4090, 7)).summary == "5/2100 CDB 2")
    }

    @Test("With WCE set to zero each WRITE is stable before its status, and what was cached is flushed first")
    func writeCacheOff() {
        _ = world.run(CDB.write(.ten, 1, 1), dataOut: pattern(1))
        var page = Array(world.run(CDB.modeSense6(0x08), dataIn: 255).data[4...])
        page[2] &= ~4
        let list = [0, 0, 0, 0] + page
        #expect(world.run(CDB.modeSelect6(listLength: list.count), dataOut: list).summary == "good")
        _ = world.run(CDB.write(.ten, 2, 1), dataOut: pattern(1))
        #expect(world.backstore.accepted.map(\.description) == ["write 512+512", "flush", "write fua 1024+512"])
        #expect(world.backstore.unstable.isEmpty)
    }

    @Test("A write protected unit refuses WRITE with DATA PROTECT and still reads")
    func writeProtected() {
        let world = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_WRITABLE) }
        #expect(world.run(CDB.write(.ten, 1, 1), dataOut: pattern(1)).summary == "7/2700")
        #expect(world.run(CDB.writeSame(.ten, 1, 1), dataOut: pattern(1)).summary == "7/2700")
        #expect(world.run(CDB.unmap(listLength: 0)).summary == "7/2700")
        #expect(world.run(CDB.read(.ten, 1, 1), dataIn: 512).summary == "good")
        #expect(world.backstore.accepted.map(\.operation) == [.read])
    }

    @Test("A WRITE that finds the backstore full waits for room and is carried out")
    func backstoreFull() {
        world.backstore.capacity = 1
        world.a.send(CDB.read(.ten, 9, 1), dataIn: 512)
        let tag = world.a.send(CDB.write(.ten, 1, 1), dataOut: pattern(1))
        #expect(world.backstore.pending.count == 1)
        world.backstore.complete()
        #expect(world.backstore.pending.map(\.operation) == [.write])
        world.backstore.complete()
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "good")
        #expect(world.backstore.block(1) == pattern(1))
        #expect(!world.shard.hasWaiting)
    }

    @Test("A command that waits for room in the backstore is ended at once by ABORT TASK")
    func abortWhileFull() {
        world.backstore.capacity = 0
        let tag = world.a.send(CDB.write(.ten, 1, 1), dataOut: pattern(1))
        world.a.manage(.abortTask, tag: tag, cookie: 5)
        #expect(world.journal.lines == ["A \(tag) aborted", "A function 5 functionComplete"])
        #expect(!world.shard.hasWaiting)
    }

    @Test("A WRITE that ABORT TASK SET ended while it waited for room never reaches the backstore")
    func abortSetWhileFull() {
        world.backstore.capacity = 0
        world.a.send(CDB.write(.ten, 1, 1), dataOut: pattern(1))
        world.a.send(CDB.write(.ten, 2, 1), dataOut: pattern(1))
        world.backstore.capacity = .max
        world.a.manage(.abortTaskSet, cookie: 5)
        #expect(world.backstore.accepted.isEmpty)
        #expect(world.journal.lines.last == "A function 5 functionComplete")
        #expect(world.journal.lines.count == 3)
    }

    @Test("Residuals are those of the command at hand and not of the one that had its task before")
    func residualsAreFresh() {
        _ = world.run(CDB.read(.ten, 0, 1), dataIn: 700)
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).dataInResidual == 0)
        #expect(world.run(CDB.testUnitReady, dataIn: 512).dataInResidual == 512)
    }
}

@Suite("Errors of the backstore")
struct BackstoreErrorTests {
    let world = TestTarget()

    private func end(_ cdb: [UInt8], error: Int32, offset: UInt64? = nil, out: [UInt8] = [], dataIn: Int = 0)
        -> Completion
    {
        let tag = world.a.send(cdb, dataOut: out, dataIn: dataIn)
        world.backstore.complete(error: error, errorOffset: offset)
        return world.a.completions.last { $0.tag == tag }!
    }

    @Test(
        "Each errno value becomes its sense data on READ",
        arguments: zip(
            [5, 12, 28, 30, 61, 84, 110, 121, 122, 123, 125, 9999] as [Int32],
            [
                "3/1100", "b/5503", "7/2707", "7/2700", "3/1100", "3/1100", "b/0801", "4/0800", "7/2707", "2/3a00",
                "b/0000", "3/1100",
            ]))
    func errnoOnRead(error: Int32, sense: String) {
        let completion = end(CDB.read(.ten, 8, 4), error: error, dataIn: 2048)
        #expect(completion.summary == sense)
        #expect(completion.dataInResidual == 2048)
    }

    @Test("EIO on WRITE is WRITE ERROR; the block that failed is in the INFORMATION field")
    func writeError() {
        let completion = end(
            CDB.write(.ten, 8, 4), error: 5, offset: 10 * 512 + 3, out: Array(repeating: 1, count: 2048))
        #expect(completion.summary == "3/0c00")
        #expect(completion.sense?.information == 10)
    }

    @Test("EIO on READ without a place has no INFORMATION field")
    func readErrorWithoutPlace() {
        #expect(end(CDB.read(.ten, 8, 4), error: 5, dataIn: 2048).sense?.information == nil)
    }

    @Test("An error of the flush before a READ with FUA ends the READ")
    func flushError() {
        #expect(end(CDB.read(.ten, 8, 1, flags: 8), error: 5, dataIn: 512).summary == "3/0c00")
        #expect(world.backstore.pending.isEmpty)
    }

    @Test("An error in the middle of WRITE SAME ends it there and gives its staging buffer back")
    func errorInTheMiddle() {
        let blocks = UInt64(Limits.pieceBytes / 512 + 100)
        let tag = world.a.send(CDB.writeSame(.sixteen, 0, blocks), dataOut: Array(repeating: 7, count: 512))
        world.backstore.complete()
        world.backstore.complete(error: 28)
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "7/2707")
        #expect(world.backstore.pending.isEmpty)
        #expect(
            world.run(CDB.writeSame(.sixteen, 0, blocks), dataOut: Array(repeating: 7, count: 512)).summary == "good")
    }
}

@Suite("A medium that becomes smaller")
struct ShrinkTests {
    let world = TestTarget()

    private func shrink(to blocks: UInt64) {
        world.backstore.geometry.size = blocks * 512
        world.unit.backstoreGeometryChanged()
    }

    private func end(_ tag: UInt64) -> String? { world.a.completions.last { $0.tag == tag }?.summary }

    @Test("A command that waits for older ones is checked against the new size when its turn comes")
    func waitsForOrder() {
        let first = world.a.send(CDB.write(.ten, 4000, 8), dataOut: Array(repeating: 1, count: 4096))
        let second = world.a.send(CDB.read(.ten, 4000, 8), dataIn: 4096)
        shrink(to: 1000)
        world.backstore.complete(error: 5)
        world.drain()
        #expect(end(first) == "3/0c00")
        #expect(end(second) == "6/2a09" || end(second) == "5/2100 CDB 2")
        #expect(world.backstore.accepted.count == 1)
    }

    @Test("A command that waits for room in the backstore does not reach past the new end")
    func waitsForBackstore() {
        world.backstore.capacity = 0
        let tag = world.a.send(CDB.write(.ten, 996, 8), dataOut: Array(repeating: 1, count: 4096))
        shrink(to: 1000)
        world.drain()
        #expect(end(tag) == "5/2100")
        #expect(world.a.completions.last { $0.tag == tag }?.sense?.information == 1000)
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("A command of several steps ends at the first that is past the new end")
    func severalSteps() {
        let world = TestTarget(blocks: 1 << 16)
        let tag = world.a.send(CDB.verify(.sixteen, 0, 4096))
        world.backstore.geometry.size = 1000 * 512
        world.unit.backstoreGeometryChanged()
        world.backstore.complete()
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "5/2100")
        #expect(world.backstore.accepted.count == 1)
    }
}
