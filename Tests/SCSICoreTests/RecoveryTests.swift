// Freezing and thawing a logical unit, and the error policies.

import CBackstore
import CoreTestSupport
import SCSICore
import Testing

@Suite("Freeze and thaw")
struct FreezeTests {
    let world = TestTarget()

    @Test("A frozen unit submits nothing and answers what needs no medium; thawed, it submits in the order of arrival")
    func order() {
        world.unit.freeze()
        let tags = (0..<4).map { world.a.send(CDB.read(.ten, $0, 1), dataIn: 512) }
        world.drain()
        #expect(world.backstore.accepted.isEmpty)
        #expect(world.a.tagsInFlight == Set(tags))
        #expect(world.unit.frozen == .asked)
        #expect(world.run(CDB.inquiry(), dataIn: 96, on: world.b).summary == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
        world.unit.thaw()
        #expect(world.unit.frozen == nil)
        #expect(world.backstore.pending.map(\.offset) == [0, 512, 1024, 1536])
        world.drain()
        #expect(world.a.completions.suffix(4).map(\.tag) == tags)
        #expect(world.a.completions.suffix(4).allSatisfy { $0.summary == "good" })
    }

    @Test("What the backstore has when the unit is frozen ends; when the last of it has, the unit is quiet")
    func quiet() {
        let tags = (0..<2).map { world.a.send(CDB.read(.ten, $0, 1), dataIn: 512) }
        var quiet = 0
        world.unit.freeze { quiet += 1 }
        #expect(quiet == 0)
        world.backstore.complete()
        #expect(quiet == 0)
        world.backstore.complete()
        #expect(quiet == 1)
        #expect(world.a.completions.suffix(2).map(\.tag) == tags)
        world.unit.freeze { quiet += 1 }
        #expect(quiet == 2, "it was quiet already")
        world.unit.thaw()
    }

    @Test("A command whose end an ACA condition withholds is done with the backstore: the unit is quiet")
    func quietUnderACA() {
        let tag = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        var failing = CDB.read(.ten, 0xffff_fff0, 1)
        failing[9] = 0x04
        world.a.send(failing, dataIn: 512)
        #expect(world.a.completions.last?.summary == "5/2100 CDB 2")
        var quiet = 0
        world.unit.freeze { quiet += 1 }
        world.backstore.complete()
        #expect(world.a.tagsInFlight == [tag])
        #expect(quiet == 1)
        world.a.manage(.clearACA)
        #expect(world.a.completions.last?.tag == tag && world.a.completions.last?.summary == "good")
        #expect(quiet == 1)
        world.unit.thaw()
    }

    @Test("A command of several steps stops between them, and that is quiet; thawed, it goes on")
    func steps() {
        let block = [UInt8](repeating: 5, count: 512)
        let tag = world.a.send([0x2e, 0x02, 0, 0, 0, 0, 0, 0, 1, 0], dataOut: block)
        var quiet = false
        world.unit.freeze { quiet = true }
        world.backstore.complete()
        #expect(quiet)
        #expect(world.backstore.pending.isEmpty)
        #expect(world.a.tagsInFlight == [tag])
        world.unit.thaw()
        world.drain()
        #expect(world.a.completions.last?.summary == "good")
        #expect(world.backstore.block(0) == block)
    }

    @Test(
        "Task management works while the unit is frozen, and what it ends is never submitted",
        arguments: [.abortTask, .abortTaskSet, .clearTaskSet, .logicalUnitReset, .nexusReset, .targetReset]
            as [TaskManagementFunction])
    func taskManagement(function: TaskManagementFunction) {
        world.unit.freeze()
        let tag = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.a.manage(.queryTask, tag: tag)
        world.a.manage(function, tag: tag)
        #expect(world.a.answers.map(\.response) == [.functionSucceeded, .functionComplete])
        #expect(world.a.tagsInFlight.isEmpty)
        world.unit.thaw()
        #expect(world.backstore.accepted.isEmpty)
        #expect(world.unit.tasksInFlight == 0)
    }

    @Test("A nexus that is lost, and a unit that is removed, while it is frozen leave nothing behind")
    func removal() {
        world.unit.freeze()
        world.b.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.b.disconnect()
        #expect(world.b.completions.last?.summary == "aborted")
        world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        var drained = false
        world.target.remove(at: LUN(0)!) { drained = true }
        world.drain()
        #expect(drained)
        #expect(world.a.tagsInFlight.isEmpty)
        #expect(world.unit.frozen == nil)
    }

    @Test("A deadline ends a command of a frozen unit")
    func deadline() {
        world.unit.freeze()
        world.a.send(CDB.read(.ten, 0, 1), dataIn: 512, timeoutMilliseconds: 5)
        world.shard.now += 5_000_000
        world.shard.expireDeadlines()
        #expect(world.a.completions.last?.summary == "b/0801")
        world.unit.thaw()
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("Freezing twice and thawing once is thawed; thawing what is not frozen changes nothing")
    func twice() {
        world.unit.freeze()
        world.unit.freeze()
        world.unit.thaw()
        world.unit.thaw()
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "good")
    }
}

@Suite("Error policies")
struct ErrorPolicyTests {
    private static func world(_ policy: ErrorPolicy) -> TestTarget {
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "S")
        configuration.errorPolicy = policy
        return TestTarget(configuration: configuration)
    }

    /// Errors that may pass, and the sense data if they do not.
    private static let errors: [(Int32, String)] = [
        (28, "7/2707"), (122, "7/2707"), (5, "3/0c00"), (61, "3/0c00"), (84, "3/0c00"), (121, "4/0800"), (12, "b/5503"),
        (110, "b/0801"),
    ]
    private static let block = [UInt8](repeating: 9, count: 512)

    @Test("Report: the command ends with what the error means, and the next one is tried")
    func report() {
        for (error, sense) in Self.errors {
            let world = Self.world(.report)
            #expect(world.fail(CDB.write(.ten, 0, 1), dataOut: Self.block, error: error).summary == sense)
            #expect(world.run(CDB.write(.ten, 0, 1), dataOut: Self.block).summary == "good")
        }
    }

    @Test(
        "Stop: the unit is frozen with the command in it, tells why, and thawed the command goes on as if nothing was")
    func stop() {
        for (error, _) in Self.errors {
            let world = Self.world(.stop)
            var told: [FreezeCause] = []
            world.unit.whenStopped = { told.append($0) }
            let first = world.a.send(CDB.write(.ten, 3, 1), dataOut: Self.block)
            world.backstore.complete(error: error)
            let second = world.a.send(CDB.read(.ten, 3, 1), dataIn: 512)
            world.drain()
            #expect(world.a.tagsInFlight == [first, second])
            #expect(world.unit.frozen == .mediumError(errno: error))
            #expect(told == [.mediumError(errno: error)])
            // Still wrong: frozen again.
            world.unit.thaw()
            world.backstore.complete(error: error)
            #expect(world.unit.frozen == .mediumError(errno: error))
            world.unit.thaw()
            world.drain()
            #expect(world.a.completions.suffix(2).map(\.summary) == ["good", "good"])
            #expect(world.a.completions.last?.data == Self.block)
            #expect(world.unit.statistics.writeErrors == MediumErrorCounters(corrected: 1, uncorrected: 0))
        }
    }

    @Test("Stop: a command that waits with its error can be aborted")
    func abortStopped() {
        let world = Self.world(.stop)
        let tag = world.a.send(CDB.write(.ten, 3, 1), dataOut: Self.block)
        world.backstore.complete(error: 5)
        world.a.manage(.abortTask, tag: tag)
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        world.unit.thaw()
        #expect(world.backstore.pending.isEmpty)
        #expect(world.run(CDB.read(.ten, 3, 1), dataIn: 512).summary == "good")
    }

    @Test("Retry: the request is submitted again at growing intervals until it succeeds")
    func retry() {
        let world = Self.world(.retry(nanoseconds: 30_000_000_000))
        let tag = world.a.send(CDB.write(.ten, 3, 1), dataOut: Self.block)
        var intervals: [UInt64] = []
        for _ in 0..<12 {
            world.backstore.complete(error: 28)
            #expect(world.backstore.pending.isEmpty)
            let due = world.shard.nextDeadline
            intervals.append((due ?? 0) - world.shard.now)
            world.shard.now = (due ?? 0) - 1
            world.shard.expireDeadlines()
            #expect(world.backstore.pending.isEmpty, "not before its time")
            world.shard.now += 1
            world.shard.expireDeadlines()
            #expect(world.backstore.pending.count == 1)
        }
        #expect(intervals.first == 10_000_000)
        #expect(intervals == intervals.sorted() && intervals.last == 1_000_000_000)
        #expect(world.a.tagsInFlight == [tag])
        #expect(world.unit.frozen == nil)
        world.drain()
        #expect(world.a.completions.last?.summary == "good")
        #expect(world.backstore.block(3) == Self.block)
        #expect(world.unit.statistics.writeErrors == MediumErrorCounters(corrected: 1, uncorrected: 0))
        #expect(world.log(0x02).number(3) == 1)
    }

    @Test("Retry: after its time the command ends with what the error means, and other commands were served meanwhile")
    func retryEnds() {
        for (error, sense) in Self.errors {
            let world = Self.world(.retry(nanoseconds: 500_000_000))
            let tag = world.a.send(CDB.write(.ten, 3, 1), dataOut: Self.block)
            let begin = world.shard.now
            world.backstore.complete(error: error)
            #expect(world.run(CDB.read(.ten, 8, 1), dataIn: 512, on: world.b).summary == "good")
            while world.a.tagsInFlight.contains(tag), let due = world.shard.nextDeadline {
                world.shard.now = due
                world.shard.expireDeadlines()
                world.backstore.complete(error: error)
            }
            #expect(world.a.completions.last?.summary == sense)
            #expect(world.shard.now - begin == 500_000_000)
        }
    }

    @Test("Retry: a backstore that is full delays the request further; a frozen unit keeps it until it is thawed")
    func fullAndFrozen() {
        let world = Self.world(.retry(nanoseconds: 30_000_000_000))
        world.a.send(CDB.write(.ten, 3, 1), dataOut: Self.block)
        world.backstore.complete(error: 5)
        world.backstore.capacity = 0
        world.shard.now = world.shard.nextDeadline ?? 0
        world.shard.expireDeadlines()
        #expect(world.backstore.pending.isEmpty)
        world.backstore.capacity = .max
        world.unit.freeze()
        world.shard.now += 1_000_000_000
        world.shard.expireDeadlines()
        #expect(world.backstore.pending.isEmpty)
        world.unit.thaw()
        #expect(world.backstore.pending.count == 1)
        world.drain()
        #expect(world.a.completions.last?.summary == "good")
    }

    @Test(
        "Errors that do not pass, and flushes, are reported at once whatever the policy",
        arguments: [ErrorPolicy.stop, .retry(nanoseconds: 1_000_000_000)])
    func notRecovered(policy: ErrorPolicy) {
        let world = Self.world(policy)
        #expect(world.fail(CDB.write(.ten, 0, 1), dataOut: Self.block, error: 30).summary == "7/2700")
        #expect(world.fail(CDB.write(.ten, 0, 1), dataOut: Self.block, error: 123).summary == "2/3a00")
        #expect(world.fail(CDB.synchronizeCache(), error: 5).summary == "3/0c00")
        #expect(world.unit.frozen == nil)
    }

    @Test(
        "A unit that is removed reports, so that it drains",
        arguments: [ErrorPolicy.stop, .retry(nanoseconds: 1 << 40)])
    func removal(policy: ErrorPolicy) {
        let world = Self.world(policy)
        world.a.send(CDB.write(.ten, 0, 1), dataOut: Self.block)
        world.a.send(CDB.write(.ten, 1, 1), dataOut: Self.block)
        world.backstore.complete(error: 5)
        var drained = false
        world.target.remove(at: LUN(0)!) { drained = true }
        #expect(world.a.completions.last?.summary == "5/2500")
        world.backstore.complete(error: 5)
        #expect(world.a.completions.last?.summary == "3/0c00")
        #expect(drained)
    }
}
