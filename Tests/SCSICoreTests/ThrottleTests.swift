// Limits of operations and bytes, in simulated time: that they hold, and what may happen to tasks that wait. Must not
// know: configurations, reactors.

import CoreTestSupport
import Testing

@testable import SCSICore

@Suite("Limits of operations and bytes")
struct ThrottleTests {
    let world = TestTarget()
    private let second: UInt64 = 1_000_000_000

    private func limits(_ operations: UInt64 = 0, bytes: UInt64 = 0, burst: UInt64 = 0) -> RateLimits {
        var limits = RateLimits()
        (limits.operationsPerSecond, limits.bytesPerSecond, limits.burstNanoseconds) = (operations, bytes, burst)
        return limits
    }

    /// Sends READs without end, each as soon as there is room for it, and gives how many ended until a time.
    private func readsUntil(_ end: UInt64, blocks: Int = 1, on port: MockPort? = nil) -> Int {
        let port = port ?? world.a
        let before = port.completions.count
        while true {
            while port.tagsInFlight.count < 16 {
                _ = port.send(CDB.read(.ten, 0, UInt64(blocks)), dataIn: blocks * 512)
            }
            world.backstore.completeAll()
            if port.tagsInFlight.count < 16 { continue }
            guard let next = world.shard.nextRelease, next <= end else { break }
            world.shard.now = max(world.shard.now, next)
            world.shard.releaseThrottled()
        }
        world.shard.now = end
        world.a.manage(.abortTaskSet)
        return port.completions.count - before - (port === world.a ? 16 : 0)
    }

    @Test("Operations: as many as the rate, and what the burst saves", arguments: [UInt64(0), 100_000_000])
    func operations(burst: UInt64) {
        world.unit.setLimits(limits(1000, burst: burst))
        // Every millisecond one, the first at once, and at the start what a full bucket holds.
        #expect(readsUntil(2 * second) == 2001 + Int(burst / 1_000_000))
    }

    @Test("Bytes: as many as the rate")
    func bytes() {
        world.unit.setLimits(limits(bytes: 1 << 20))
        #expect(readsUntil(2 * second, blocks: 8) == 513)
    }

    @Test("Of two limits the narrower holds, and each counts all")
    func both() {
        world.unit.setLimits(limits(1000, bytes: 4096 * 100))
        #expect(readsUntil(second, blocks: 8) == 101)
    }

    @Test("A command larger than what the bucket holds begins, and the next one waits for it")
    func debt() {
        world.unit.setLimits(limits(bytes: 1 << 20, burst: 1_000_000))
        #expect(world.run(CDB.read(.ten, 0, 2048), dataIn: 1 << 20).summary == "good")
        _ = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        #expect(world.backstore.pending.isEmpty)
        #expect(world.shard.nextRelease == second - 1_000_000)
        world.a.manage(.abortTaskSet)
    }

    @Test("Commands that do not access the medium never wait")
    func others() {
        world.unit.setLimits(limits(1))
        _ = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        let waiting = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        #expect(world.run(CDB.testUnitReady).summary == "good")
        #expect(world.a.tagsInFlight == [waiting])
        let view = world.unit.tasks(limit: 10)
        #expect(view.map(\.state) == ["dormant"] && view.map(\.waitsFor) == ["quota"])
        world.a.manage(.abortTaskSet)
    }

    @Test("An initiator's limit is for all of its units together and for nobody else")
    func initiators() {
        _ = world.addUnit(at: 1)
        world.target.setThrottle(Throttle(limits(10), shard: world.shard), initiatorPort: "A")
        world.drain()
        for lun in [UInt64(0), 1 << 48] {
            for port in [world.a, world.b] { _ = world.run(CDB.requestSense(), lun: lun, dataIn: 18, on: port) }
        }
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "good")
        let other = world.a.send(CDB.read(.ten, 0, 1), lun: 1 << 48, dataIn: 512)
        #expect(world.a.tagsInFlight == [other])
        for _ in 0..<50 { #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: world.b).summary == "good") }
        world.shard.now = world.shard.nextRelease!
        world.shard.releaseThrottled()
        world.drain()
        #expect(world.a.tagsInFlight.isEmpty)
    }

    @Test("A task passes its initiator's limit, then that of the unit")
    func inARow() {
        world.target.setThrottle(Throttle(limits(10), shard: world.shard), initiatorPort: "A")
        world.unit.setLimits(limits(5))
        #expect(readsUntil(2 * second) == 11)
    }

    @Test("Waiting tasks keep their order, and tasks behind a barrier stay behind it")
    func order() {
        world.unit.setLimits(limits(100))
        let tags = (0..<6).map { index in
            world.a.send(CDB.read(.ten, 0, 1), attribute: index == 3 ? .ordered : .simple, dataIn: 512)
        }
        world.backstore.completeAll()
        while let next = world.shard.nextRelease {
            world.shard.now = max(next, world.shard.now)
            world.shard.releaseThrottled()
            world.backstore.completeAll()
        }
        #expect(world.a.completions.suffix(6).map(\.tag) == tags)
    }

    @Test("Task management ends tasks that wait for a limit, at once", arguments: TaskManagementFunction.allCases)
    func aborted(function: TaskManagementFunction) {
        world.unit.setLimits(limits(1))
        _ = world.run(CDB.read(.ten, 0, 1), dataIn: 512)
        let tags = (0..<4).map { _ in world.a.send(CDB.read(.ten, 0, 1), dataIn: 512) }
        world.a.manage(function, tag: tags[1])
        let left: Int
        switch function {
        case .abortTask: left = 3
        case .abortTaskSet, .clearTaskSet, .logicalUnitReset, .nexusReset, .targetReset: left = 0
        case .clearACA, .queryTask, .queryTaskSet, .queryAsynchronousEvent: left = 4
        }
        #expect(world.a.tagsInFlight.count == left)
        world.a.manage(.abortTaskSet)
        #expect(world.a.tagsInFlight.isEmpty)
        #expect(world.unit.limiter?.waiting == 0)
    }

    @Test("A lost nexus and a removed unit take their waiting tasks with them")
    func lost() {
        world.unit.setLimits(limits(1))
        _ = world.run(CDB.read(.ten, 0, 1), dataIn: 512)
        for port in [world.a, world.b] { _ = port.send(CDB.read(.ten, 0, 1), dataIn: 512) }
        world.b.disconnect()
        #expect(world.unit.limiter?.waiting == 1)
        var drained = false
        world.target.remove(at: LUN(0)!) { drained = true }
        #expect(drained && world.a.tagsInFlight.isEmpty)
    }

    @Test("New limits hold for those that wait; without limits nobody waits")
    func changed() {
        world.unit.setLimits(limits(1))
        for _ in 0..<5 { _ = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512) }
        #expect(world.backstore.pending.count == 1)
        world.unit.setLimits(RateLimits())
        world.shard.releaseThrottled()
        #expect(world.backstore.pending.count == 5)
        world.drain()
        #expect(world.a.tagsInFlight.isEmpty && world.shard.nextRelease == nil)
    }
}
