// What is counted: commands by initiator, class and status, bytes, latency, task management. Must not know: who reads
// it.

import CBackstore
import CoreTestSupport
import Testing

@testable import SCSICore

@Suite("Measurements")
struct MeasurementTests {
    let world = TestTarget()

    private func counted(_ port: Int) throws -> CommandStatistics { try #require(world.unit.commands(nexus: port)) }

    @Test("Buckets follow each other without a gap, and each time is in the bucket whose bounds hold it")
    func buckets() {
        for bucket in 0..<LatencyHistogram.count {
            let (low, high) = (LatencyHistogram.lowerBound(bucket), LatencyHistogram.lowerBound(bucket + 1))
            #expect(low < high)
            #expect(LatencyHistogram.bucket(low) == bucket)
            #expect(LatencyHistogram.bucket(high - 1) == bucket)
            // At most a quarter of the time itself, above the first microsecond.
            #expect(bucket < 4 || (high - low) * 4 <= low)
        }
        #expect(LatencyHistogram.bucket(.max) == LatencyHistogram.count - 1)
    }

    @Test("Commands count at the nexus that sent them, by class and status")
    func byNexus() throws {
        let (beforeA, beforeB) = (try counted(0), try counted(1))
        #expect(world.run(CDB.read(.ten, 0, 2), dataIn: 1024, on: world.a).summary == "good")
        let data = [UInt8](repeating: 1, count: 512)
        #expect(world.run(CDB.write(.ten, 0, 1), dataOut: data, on: world.b).summary == "good")
        #expect(world.run(CDB.read(.ten, 4096, 1), dataIn: 512, on: world.b).summary != "good")
        let (a, b) = (try counted(0), try counted(1))
        #expect(a[.read, .good] == 1 && a.count(.write) == 0 && a.bytesRead == 1024)
        #expect(b[.write, .good] == 1 && b.bytesWritten == 512)
        #expect(b[.read, .checkCondition] == 1 && b[.read, .good] == 0 && b.bytesRead == 0)
        #expect(a.count(.other) == beforeA.count(.other) && b.count(.other) == beforeB.count(.other))
        let all = world.unit.statistics
        #expect((all.reads, all.writes, all.notGood, all.aborted) == (2, 1, 1, 0))
    }

    @Test("Latency is the time from arrival to response")
    func latency() {
        world.shard.now = 1_000_000
        _ = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        #expect(world.unit.oldestReceivedAt == 1_000_000)
        world.shard.now = 3_500_000
        world.drain()
        let reads = world.unit.latency(.read)
        #expect((reads.count, reads.sum) == (1, 2_500_000))
        let bucket = reads.buckets.firstIndex(of: 1)!
        #expect((LatencyHistogram.lowerBound(bucket)..<LatencyHistogram.lowerBound(bucket + 1)).contains(2_500_000))
        #expect(world.unit.latency(.write).count == 0)
        #expect(world.unit.oldestReceivedAt == nil)
    }

    @Test("Latency and the oldest command are told of each nexus, and of the unit as their sum")
    func latencyByNexus() throws {
        world.shard.now = 1_000_000
        _ = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.shard.now = 2_000_000
        _ = world.b.send(CDB.read(.ten, 0, 1), dataIn: 512)
        #expect(world.unit.oldestReceivedAt(nexus: 0) == 1_000_000)
        #expect(world.unit.oldestReceivedAt(nexus: 1) == 2_000_000)
        world.shard.now = 3_500_000
        world.drain()
        let (a, b) = (
            try #require(world.unit.latency(.read, nexus: 0)), try #require(world.unit.latency(.read, nexus: 1))
        )
        #expect((a.count, a.sum) == (1, 2_500_000))
        #expect((b.count, b.sum) == (1, 1_500_000))
        #expect(world.unit.latency(.read) == a + b)
        #expect(world.unit.latency(.read).sum == 4_000_000)
        #expect(world.unit.oldestReceivedAt(nexus: 0) == nil && world.unit.oldestReceivedAt(nexus: 1) == nil)
        #expect(world.unit.latency(.read, nexus: 2) == nil)
    }

    @Test("Aborted commands end without a status, and functions count at their nexus")
    func aborted() throws {
        let tag = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.a.manage(.abortTask, tag: tag)
        world.drain()
        #expect(try counted(0)[.read, .withoutStatus] == 1)
        #expect(world.unit.statistics.aborted == 1)
        let nexuses = world.target.nexusStatus
        #expect(nexuses.map(\.index) == [0, 1])
        #expect(nexuses[0].functions.map(\.function) == [.abortTask])
        #expect(nexuses[0].functions.map(\.count) == [1])
        #expect(nexuses[1].functions.isEmpty && nexuses[1].isEstablished && nexuses[1].connections == 1)
    }

    @Test("Errors of the medium and reported unit attention conditions count")
    func errors() throws {
        let before = try counted(0).unitAttentions
        _ = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.backstore.complete(error: 5)
        #expect(world.a.completions.last?.summary != "good")
        #expect(world.unit.statistics.backstoreErrors == 1)
        world.a.manage(.logicalUnitReset)
        #expect(world.run(CDB.testUnitReady).summary != "good")
        #expect(try counted(0).unitAttentions == before + 1)
    }
}
