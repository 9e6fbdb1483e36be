// Commands with IMMED: status before the flush, the flush that goes on, and deferred errors of one that fails.

import CBackstore
import CoreTestSupport
import Testing

@testable import SCSICore

private typealias CDB = CoreTestSupport.CDB

@Suite("IMMED: flushes that go on after the status, and their deferred errors")
struct DeferredErrorTests {
    private let world = TestTarget()
    private static let immediate: [[UInt8]] = [
        [0x35, 2] + Array(repeating: 0, count: 8), [0x91, 2] + Array(repeating: 0, count: 14),
    ]
    private static let deferred = "deferred 3/0c00"

    private var flushes: Int { world.backstore.accepted.filter { $0.operation == .flush }.count }

    /// The next life of a command that ends at once.
    private func send(_ cdb: [UInt8], on port: MockPort? = nil) -> String? {
        let port = port ?? world.a
        let tag = port.send(cdb)
        return port.completions.last { $0.tag == tag }?.summary
    }

    @Test("SYNCHRONIZE CACHE: GOOD as soon as the CDB is validated, and the flush goes on", arguments: immediate)
    func statusFirst(cdb: [UInt8]) {
        #expect(send(cdb) == "good")
        #expect(world.backstore.pending.count == 1)
        world.drain()
        #expect(flushes == 1)
        #expect(world.run(CDB.testUnitReady).summary == "good")
    }

    @Test("an extent that does not exist is refused and not flushed", arguments: immediate)
    func validated(cdb: [UInt8]) {
        var wrong = cdb
        wrong[wrong.count == 10 ? 2 : 3] = 1
        #expect(send(wrong) == "5/2100 CDB 2")
        #expect(flushes == 0)
    }

    @Test("each nexus is told of a flush that failed once, by a command that is not carried out", arguments: immediate)
    func told(cdb: [UInt8]) {
        #expect(send(cdb) == "good")
        world.backstore.complete(error: 5)
        for port in [world.a, world.b] {
            let before = world.backstore.accepted.count
            #expect(
                world.run(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512), on: port).summary
                    == Self.deferred)
            #expect(world.backstore.accepted.count == before)
            #expect(
                world.run(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512), on: port).summary
                    == "good")
        }
        #expect(world.unit.statistics.writeErrors.uncorrected == 1)
    }

    @Test("INQUIRY and REPORT LUNS do not take it away; REQUEST SENSE reports it with GOOD status, in either format")
    func requestSense() {
        for descriptors in [false, true] {
            _ = send(Self.immediate[0])
            world.backstore.complete(error: 5)
            #expect(world.run(CDB.inquiry(), dataIn: 96).summary == "good")
            #expect(world.run([0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], dataIn: 16).summary == "good")
            // An allocation length of zero reports nothing.
            #expect(world.run([0x03, 0, 0, 0, 0, 0], dataIn: 0).summary == "good")
            let data = world.run([0x03, descriptors ? 1 : 0, 0, 0, 252, 0], dataIn: 252).data
            #expect(data.first == (descriptors ? 0x73 : 0x71))
            #expect(Sense(data)?.description == Self.deferred)
            #expect(world.run(CDB.testUnitReady).summary == "good")
            #expect(world.run(CDB.testUnitReady, on: world.b).summary == Self.deferred)
        }
    }

    @Test(
        "the errors of the medium have their own sense data",
        arguments: [(28, "7/2707"), (5, "3/0c00"), (30, "7/2700")])
    func errors(error: Int32, sense: String) {
        _ = send(Self.immediate[0])
        world.backstore.complete(error: error)
        #expect(world.run(CDB.testUnitReady).summary == "deferred \(sense)")
    }

    @Test("a unit attention condition comes before it, a reservation conflict too; neither takes it away")
    func precedence() {
        _ = send(Self.immediate[0])
        world.backstore.complete(error: 5)
        world.unit.setReadOnly(true)
        #expect(world.run(CDB.testUnitReady).summary == "6/2a01")
        #expect(world.run(CDB.testUnitReady).summary == Self.deferred)
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/2a01")
        #expect(world.run([0x16, 0, 0, 0, 0, 0]).summary == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "reservationConflict")
        #expect(world.run([0x17, 0, 0, 0, 0, 0]).summary == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == Self.deferred)
    }

    @Test("QUERY ASYNCHRONOUS EVENT and the next unit attention condition know nothing of it")
    func noUnitAttention() {
        _ = send(Self.immediate[0])
        world.backstore.complete(error: 5)
        #expect(world.unit.unitAttention(for: 0) == nil)
        #expect(world.unit.asynchronousEvent(for: 0) == nil)
        #expect(world.unit.hasDeferredError(0))
    }

    @Test("resets and nexus losses do not take it away, and a nexus that is new knows nothing of it")
    func lasts() {
        _ = send(Self.immediate[0])
        world.backstore.complete(error: 5)
        world.a.manage(.logicalUnitReset)
        world.b.disconnect()
        world.b.connect()
        for port in [world.a, world.b] {
            var ends: [String] = []
            repeat { ends.append(world.run(CDB.testUnitReady, on: port).summary) } while ends.last!.hasPrefix("6/")
            #expect(ends.last == Self.deferred)
        }
        let c = world.addPort("C")
        #expect(world.run(CDB.testUnitReady, on: c).summary == "good")
    }

    @Test("flushes that are asked for while one goes on are one more, after it")
    func coalesced() {
        for _ in 0..<5 { #expect(send(Self.immediate[0]) == "good") }
        #expect(flushes == 1)
        world.backstore.complete()
        #expect(flushes == 2)
        world.drain()
        #expect(flushes == 2)
    }

    @Test("SYNCHRONIZE CACHE without IMMED flushes for itself, while another flush goes on")
    func waitsItself() {
        _ = send(Self.immediate[0])
        let tag = world.a.send(CDB.synchronizeCache())
        #expect(flushes == 2)
        #expect(world.a.tagsInFlight == [tag])
        world.drain()
        #expect(world.a.completions.last?.summary == "good")
    }

    @Test("an error that the other flush was told is also that of SYNCHRONIZE CACHE without IMMED, and a current one")
    func errorOfBoth() {
        _ = send(Self.immediate[0])
        world.a.send(CDB.synchronizeCache())
        world.backstore.complete(error: 5)
        world.drain()
        #expect(world.a.completions.last?.summary == "3/0c00")
        #expect(world.run(CDB.testUnitReady).summary == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == Self.deferred)
    }

    @Test("without a cache there is nothing to flush")
    func noCache() {
        let world = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_VOLATILE_CACHE) }
        #expect(world.run(Self.immediate[0]).summary == "good")
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("a backstore that is full is asked again, a frozen unit flushes when it is thawed")
    func waits() {
        world.backstore.capacity = 0
        #expect(send(Self.immediate[0]) == "good")
        #expect(flushes == 0)
        let next = world.shard.nextDeadline
        #expect(next != nil)
        world.backstore.capacity = .max
        world.shard.now = next ?? 0
        world.shard.expireDeadlines()
        #expect(flushes == 1)
        #expect(world.shard.nextDeadline == nil)
        world.drain()
        world.unit.freeze()
        #expect(send(Self.immediate[0]) == "good")
        #expect(flushes == 1)
        world.unit.thaw()
        #expect(flushes == 2)
        world.drain()
    }

    @Test("whoever waits for the medium to be quiet waits for the flush")
    func quiet() {
        _ = send(Self.immediate[0])
        var isQuiet = false
        world.unit.freeze { isQuiet = true }
        #expect(!isQuiet)
        world.backstore.complete()
        #expect(isQuiet)
        world.unit.thaw()
    }

    @Test("a unit that is removed is drained when its flush has ended")
    func removed() {
        _ = send(Self.immediate[0])
        var isDrained = false
        world.target.remove(at: LUN(0)!) { isDrained = true }
        #expect(!isDrained)
        world.backstore.complete(error: 5)
        #expect(isDrained)
    }

    @Test(
        "START STOP UNIT: the unit is stopped and the status given at once, the flush goes on", arguments: [0x00, 0x30])
    func stop(byte: UInt8) {
        #expect(send([0x1b, 1, 0, 0, byte, 0]) == "good")
        #expect(world.backstore.pending.count == 1)
        world.backstore.complete(error: 5)
        #expect(world.run(CDB.testUnitReady).summary == Self.deferred)
        if byte == 0 { #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "2/0402") }
        // NO_FLUSH.
        #expect(send([0x1b, 1, 0, 0, byte | 4, 0], on: world.b) == Self.deferred)
        #expect(send([0x1b, 1, 0, 0, byte | 4, 0], on: world.b) == "good")
        #expect(flushes == 1)
    }
}
