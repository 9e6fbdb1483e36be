// The trace of a logical unit: which commands it keeps, and what of them. Must not know: who reads it.

import CoreTestSupport
import Testing

@testable import SCSICore

@Suite("Trace")
struct TraceTests {
    let world = TestTarget()

    @Test("Off at first, it keeps nothing; on, it keeps what ended since; off again, it has forgotten")
    func onAndOff() {
        _ = world.run(CDB.read(.ten, 0, 1), dataIn: 512)
        #expect(world.unit.traceEntries == nil)
        world.unit.setTrace(entries: 16)
        _ = world.run(CDB.write(.ten, 7, 1), dataOut: [UInt8](repeating: 0, count: 512), on: world.b)
        let entries = world.unit.traceEntries!
        #expect(entries.map(\.cdb) == [CDB.write(.ten, 7, 1)])
        #expect(entries[0].nexus == 1 && entries[0].end == .good && entries[0].bytes == 512)
        world.unit.setTrace(entries: nil)
        #expect(world.unit.traceEntries == nil)
    }

    @Test("It keeps the last ones, the oldest first")
    func last() {
        world.unit.setTrace(entries: 3)
        for block in 0..<7 { _ = world.run(CDB.read(.ten, UInt64(block), 1), dataIn: 512) }
        #expect(world.unit.traceEntries?.map { $0.cdb[5] } == [4, 5, 6])
    }

    @Test("A refused command has its sense data, an aborted one has none, both have their times")
    func ends() {
        world.unit.setTrace(entries: 3)
        world.shard.now = 1000
        _ = world.run(CDB.read(.ten, 9999, 1), dataIn: 512)
        let tag = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.shard.now = 5000
        world.a.manage(.abortTask, tag: tag)
        world.drain()
        let entries = world.unit.traceEntries!
        #expect(entries.map(\.end) == [.checkCondition, .withoutStatus])
        #expect(entries[0].sense! == (5, 0x21, 0))
        #expect(entries[1].sense == nil && entries[1].tag == tag)
        #expect((entries[1].receivedAt, entries[1].endedAt) == (1000, 5000))
    }
}
