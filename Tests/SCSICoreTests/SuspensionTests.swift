// SCSI_SUSPEND_TASKS: what becomes of a group's commands, whatever they wait for, and whatever the medium makes of the
// cancellation of what it has.

import CBackstore
import CoreTestSupport
import CTarget
import Testing

@testable import SCSICore

/// Why a command waits: all that a dormant one can wait for, and an ACA condition.
enum WaitingFor: CaseIterable {
    case order, overlap, thaw, retry, quota, staging, backstore, state, contingentAllegiance
}

@Suite("Suspension of tasks")
struct SuspensionTests {
    private static let cancelled: Int32 = 125, failed: Int32 = 5
    private static let old = [UInt8](repeating: 0x11, count: 512), new = [UInt8](repeating: 0x22, count: 512)

    private func world(_ policy: ErrorPolicy = .report) -> TestTarget {
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "SERIAL0001")
        configuration.errorPolicy = policy
        return TestTarget(configuration: configuration, savesState: true)
    }

    /// Suspends A's group 1; the cookie of the function is 9.
    private func suspend(_ world: TestTarget) { world.a.suspend(group: 1, cookie: 9) }

    private func isAnswered(_ world: TestTarget) -> Bool {
        world.a.answers.last?.cookie == 9 && world.a.answers.last?.response == .functionComplete
    }

    private func end(_ world: TestTarget, _ tag: UInt64) -> String? {
        world.a.completions.last { $0.tag == tag }?.summary
    }

    private func fault(_ port: MockPort) {
        port.send([0x28, 0] + CDB.bytes(5000, 4) + [0, 0, 1, 0x04], attribute: .headOfQueue, dataIn: 512)
    }

    /// Has what A sends next wait for a reason.
    private func prepare(_ world: TestTarget, _ reason: WaitingFor) {
        switch reason {
        case .order: world.b.send(CDB.read(.ten, 0, 1), attribute: .ordered, dataIn: 512)
        case .overlap: world.b.send(CDB.write(.ten, 7, 1), dataOut: Self.old)
        case .thaw: world.unit.freeze()
        case .retry: break
        case .quota:
            var limits = RateLimits()
            (limits.operationsPerSecond, limits.burstNanoseconds) = (1, 0)
            world.unit.setLimits(limits)
            world.b.send(CDB.read(.ten, 0, 1), dataIn: 512)
        case .staging:
            for block in 0..<UInt64(Limits.stagingBuffers) { world.b.send(CDB.verify(.ten, block, 1)) }
        case .backstore: world.backstore.capacity = 0
        case .state: world.b.send(register, dataOut: ReservationParameters(0, 1, flags: 1).bytes)
        case .contingentAllegiance: world.b.send(CDB.read(.ten, 7, 1), attribute: .ordered, dataIn: 512)
        }
    }

    private var register: [UInt8] { CDB.persistentReserveOut(.registerAndIgnoreExistingKey) }

    /// Sends the command that is to wait.
    private func send(_ world: TestTarget, _ reason: WaitingFor) -> UInt64 {
        switch reason {
        case .staging: return world.a.send(CDB.verify(.ten, 7, 1), group: 1)
        case .state: return world.a.send(register, dataOut: ReservationParameters(0, 2, flags: 1).bytes, group: 1)
        default: return world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1)
        }
    }

    @Test(
        "What waits comes back at once and silently, changes nothing, and is carried out when it comes again",
        arguments: WaitingFor.allCases)
    func waiting(reason: WaitingFor) {
        let world = world(reason == .retry ? .retry(nanoseconds: .max) : .report)
        prepare(world, reason)
        let tag = send(world, reason)
        if reason == .retry { world.backstore.complete(error: Self.failed) }
        if reason == .contingentAllegiance { fault(world.b) }
        let before = world.unit.statistics
        #expect(end(world, tag) == nil)
        suspend(world)
        #expect(end(world, tag) == "suspended")
        #expect(isAnswered(world))
        #expect(world.unit.statistics.writes == before.writes && world.unit.statistics.others == before.others)
        #expect(world.a.completions.last?.dataOutResidual ?? 0 >= 0)
        // Nothing of it is left: it is not submitted later.
        let accepted = world.backstore.accepted.count
        world.unit.thaw()
        world.unit.setLimits(RateLimits())
        world.shard.now += 2_000_000_000
        world.shard.releaseThrottled()
        world.shard.expireDeadlines()
        world.comeToRest()
        #expect(world.backstore.block(7) != Self.new)
        #expect(!world.backstore.accepted[accepted...].contains { $0.operation == .write && $0.offset == 7 * 512 })
        #expect(world.unit.tasksInFlight == 0 && !world.shard.hasWaiting)
        let again = send(world, reason)
        world.drain()
        #expect(end(world, again) == "good", "no unit attention condition either")
    }

    @Test("What the medium lets go of because it is asked to comes back then, and not before")
    func cancelled() {
        let world = world()
        let tag = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1)
        suspend(world)
        #expect(world.backstore.cancellations == 1)
        #expect(end(world, tag) == nil && world.a.answers.isEmpty, "the medium still has its memory")
        world.backstore.complete()
        #expect(end(world, tag) == "suspended" && isAnswered(world))
        let errors = world.unit.statistics
        #expect(errors.backstoreErrors == 0 && errors.notGood == 0 && errors.aborted == 0)
    }

    @Test("What was done in part is done anew as a whole")
    func partial() {
        let world = world()
        let data = Self.new + Self.new
        let tag = world.a.send(CDB.write(.ten, 7, 2), dataOut: data, group: 1)
        suspend(world)
        world.backstore.complete(error: Self.cancelled, partial: 512)
        #expect(end(world, tag) == "suspended")
        #expect(world.backstore.block(7) == Self.new && world.backstore.block(8) != Self.new)
        #expect(world.run(CDB.write(.ten, 7, 2), dataOut: data).summary == "good")
        #expect(world.backstore.block(8) == Self.new)
    }

    @Test("What ends all the same ends as it would have: with success, and with the medium's error")
    func finalResults() {
        let world = world()
        world.backstore.honoursCancel = false
        let good = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1)
        let bad = world.a.send(CDB.read(.ten, 9, 1), dataIn: 512, group: 1)
        suspend(world)
        world.backstore.complete()
        #expect(end(world, good) == "good" && world.a.answers.isEmpty)
        world.backstore.complete(error: Self.failed)
        #expect(end(world, bad)?.hasPrefix("3/1100") == true && isAnswered(world))
    }

    @Test(
        "With an error policy, an error freezes the unit as ever, and its command comes back", arguments: [true, false])
    func policy(stops: Bool) {
        let world = world(stops ? .stop : .retry(nanoseconds: .max))
        let tag = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1)
        suspend(world)
        world.backstore.complete(error: Self.failed)
        #expect(end(world, tag) == "suspended" && isAnswered(world))
        #expect((world.unit.frozen != nil) == stops)
        world.unit.thaw()
    }

    @Test("Of several steps the next is not begun")
    func steps() {
        let world = world()
        world.backstore.honoursCancel = false
        let tag = world.a.send(CDB.verify(.ten, 0, 1024), group: 1)
        suspend(world)
        world.backstore.complete()
        #expect(end(world, tag) == "suspended" && world.backstore.pending.isEmpty)
        // Its staging buffer is back.
        for block in 0..<UInt64(Limits.stagingBuffers) { world.b.send(CDB.verify(.ten, block, 1)) }
        #expect(world.backstore.pending.count == Limits.stagingBuffers)
    }

    // MARK: What must not be carried out twice

    private func compareAndWrite(_ world: TestTarget) -> UInt64 {
        world.backstore.setBlock(1, Self.old)
        return world.a.send(
            [0x89, 0] + CDB.bytes(1, 8) + [0, 0, 0, 1, 0, 0], dataOut: Self.old + Self.new, group: 1)
    }

    @Test("COMPARE AND WRITE comes back as long as it has not written", arguments: [true, false])
    func compareAndWriteBefore(honours: Bool) {
        let world = world()
        world.backstore.honoursCancel = honours
        let tag = compareAndWrite(world)
        suspend(world)
        world.backstore.complete()
        #expect(end(world, tag) == "suspended" && isAnswered(world))
        #expect(world.backstore.pending.isEmpty && world.backstore.block(1) == Self.old)
    }

    @Test("It ends by itself when its write is with the medium, which is not asked to let go")
    func compareAndWriteAfter() {
        let world = world()
        let tag = compareAndWrite(world)
        world.backstore.complete()
        suspend(world)
        #expect(world.backstore.cancellations == 0)
        world.backstore.complete()
        #expect(end(world, tag) == "good" && isAnswered(world) && world.backstore.block(1) == Self.new)
    }

    @Test("It comes back if its write waits to be submitted, and not if that has failed and is to be tried again")
    func compareAndWriteWaits() {
        let frozen = world()
        let tag = compareAndWrite(frozen)
        frozen.unit.freeze()
        frozen.backstore.complete()
        suspend(frozen)
        #expect(end(frozen, tag) == "suspended")
        frozen.unit.thaw()
        #expect(frozen.backstore.pending.isEmpty)

        let retrying = world(.retry(nanoseconds: .max))
        let other = compareAndWrite(retrying)
        retrying.backstore.complete()
        retrying.backstore.complete(error: Self.failed)
        suspend(retrying)
        #expect(end(retrying, other) == nil && retrying.a.answers.isEmpty)
        retrying.shard.now += 1_000_000_000
        retrying.shard.expireDeadlines()
        retrying.backstore.complete()
        #expect(end(retrying, other) == "good" && isAnswered(retrying) && retrying.backstore.block(1) == Self.new)
    }

    @Test("ORWRITE comes back with a part of it written; XPWRITE goes on to its end then", arguments: [0x8b, 0x51])
    func exclusiveOr(code: UInt8) {
        let world = world()
        let data = [UInt8](repeating: 0x0f, count: 1024 * 512)
        let cdb =
            code == 0x8b
            ? [code, 0] + CDB.bytes(0, 8) + CDB.bytes(1024, 4) + [0, 0]
            : [code, 0] + CDB.bytes(0, 4) + [0] + CDB.bytes(1024, 2) + [0]
        let tag = world.a.send(cdb, dataOut: data, group: 1)
        world.backstore.complete()
        world.backstore.complete()
        suspend(world)
        world.drain()
        let mayRepeat = code == 0x8b
        #expect(end(world, tag) == (mayRepeat ? "suspended" : "good") && isAnswered(world))
        #expect(world.backstore.cancellations == (mayRepeat ? 1 : 0))
        #expect(world.backstore.block(1023).allSatisfy { $0 == (mayRepeat ? 0 : 0x0f) })
    }

    @Test("MODE SELECT that has changed the pages ends, and so does what is being saved")
    func changes() {
        let world = world()
        var page: [UInt8] = [0, 0, 0, 0, 0x08, 0x12] + [UInt8](repeating: 0, count: 18)
        page[6] = 0x00  // WCE zero: what is cached is flushed before the status
        let select = world.a.send(CDB.modeSelect6(listLength: page.count), dataOut: page, group: 1)
        #expect(world.backstore.pending.map(\.operation) == [.flush])
        let saving = world.a.send(register, dataOut: ReservationParameters(0, 2, flags: 1).bytes, group: 1)
        suspend(world)
        #expect(world.backstore.cancellations == 0)
        world.drain()
        #expect(end(world, select) == "good" && end(world, saving) == "good" && isAnswered(world))
        #expect(world.unit.reservationStatus.registrants.count == 1)
    }

    @Test("SAM-6 5.9.2 gives way: a response that an ACA condition withholds is given, for its command has been done")
    func withheld() {
        let world = world()
        let tag = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1)
        fault(world.b)
        world.backstore.complete()
        #expect(end(world, tag) == nil)
        suspend(world)
        #expect(end(world, tag) == "good" && isAnswered(world) && world.backstore.cancellations == 0)
        // The same if it ends only afterwards.
        world.b.manage(.clearACA)
        world.backstore.honoursCancel = false
        let second = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.old, group: 1)
        fault(world.b)
        suspend(world)
        world.backstore.complete()
        #expect(end(world, second) == "good" && isAnswered(world))
    }

    @Test("A command whose deadline has passed ends for that")
    func expired() {
        let world = world()
        let tag = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, timeoutMilliseconds: 1, group: 1)
        world.shard.now += 1_000_000_000
        world.shard.expireDeadlines()
        suspend(world)
        world.backstore.complete()
        #expect(end(world, tag)?.hasPrefix("b/") == true && isAnswered(world))
    }

    @Test("Every command has been judged: what writes in steps, or changes the unit, does not begin anew")
    func repetitions() {
        let notAlways = CommandTable(features: .all).all.filter { $0.handler.repetition != .always }
        #expect(
            notAlways.filter { $0.flags.contains(.needsMedium) && $0.serialization == .write }
                .allSatisfy { $0.flags.contains(.uninterrupted) && $0.handler.repetition == .untilItWrites })
        #expect(
            notAlways.filter { $0.serialization == .unitState }
                .allSatisfy { [.modeSelect, .setTargetPortGroups].contains($0.handler) })
    }

    // MARK: Which, and beside others

    @Test("Only the group of the nexus is meant, on all units; others go on, also those that had waited for it")
    func scope() {
        let world = world()
        let (_, medium) = world.addUnit(at: 1)
        for (port, lun) in [(world.a, 0), (world.a, 1), (world.b, 0)] as [(MockPort, UInt64)] {
            _ = world.run(CDB.requestSense(), lun: lun << 48, dataIn: 18, on: port)
        }
        let tags = [
            world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1),
            world.a.send(CDB.read(.ten, 0, 1), lun: 1 << 48, dataIn: 512, group: 1),
        ]
        let other = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.old, group: 2)
        let nexus = world.b.send(CDB.read(.ten, 3, 1), dataIn: 512, group: 1)
        suspend(world)
        #expect(world.backstore.cancellations == 1 && medium.cancellations == 1)
        world.drain()
        #expect(tags.map { end(world, $0) } == ["suspended", "suspended"] && isAnswered(world))
        #expect(end(world, other) == "good")
        #expect(world.b.completions.last?.tag == nexus && world.b.completions.last?.summary == "good")
        #expect(world.backstore.block(7) == Self.old)
    }

    @Test(
        "A function that ends a command takes precedence, before and after",
        arguments: [.abortTask, .abortTaskSet, .logicalUnitReset] as [TaskManagementFunction], [true, false])
    func functions(function: TaskManagementFunction, first: Bool) {
        let world = world()
        let tag = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1)
        if first { world.a.manage(function, tag: tag, cookie: 1) }
        world.a.suspend(group: 1, cookie: 9)
        world.a.manage(.queryTask, tag: tag, cookie: 2)
        #expect(world.a.answers.last?.response == (first ? .functionComplete : .functionSucceeded))
        if !first { world.a.manage(function, tag: tag, cookie: 1) }
        world.backstore.complete()
        #expect(end(world, tag) == (function == .logicalUnitReset ? "reset" : "aborted"))
        #expect(Set(world.a.answers.map(\.cookie)) == [1, 2, 9])
        #expect(world.a.answers.allSatisfy { $0.response == .functionComplete || $0.cookie == 2 })
    }

    @Test("The loss of the nexus ends what a suspension waits for, and answers nothing")
    func lossWhileACommandWaits() {
        let world = world()
        world.unit.freeze()
        var page: [UInt8] = [0, 0, 0, 0, 0x08, 0x12] + [UInt8](repeating: 0, count: 18)
        page[6] = 0x00  // WCE zero: the flush before the status waits for the thaw
        let tag = world.a.send(CDB.modeSelect6(listLength: page.count), dataOut: page, group: 1)
        suspend(world)
        #expect(end(world, tag) == nil && world.a.answers.isEmpty)
        world.a.disconnect()
        #expect(end(world, tag) == "aborted" && world.a.answers.isEmpty)
    }

    @Test("A group that is being suspended is not suspended twice; another one is beside it")
    func twice() {
        let world = world()
        world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1)
        world.a.send(CDB.write(.ten, 9, 1), dataOut: Self.new, group: 2)
        world.a.suspend(group: 1, cookie: 1)
        world.a.suspend(group: 1, cookie: 2)
        world.a.suspend(group: 2, cookie: 3)
        world.a.suspend(group: 3, cookie: 4)
        #expect(world.a.answers.map(\.cookie) == [2, 4])
        #expect(world.a.answers.map(\.response) == [.functionRejected, .functionComplete])
        world.drain()
        #expect(world.a.answers.map(\.cookie) == [2, 4, 1, 3])
    }

    @Test("It is no matter how many functions wait")
    func manyFunctions() {
        let world = world()
        world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new)
        for cookie in 0..<UInt64(Limits.waitingFunctions) { world.a.manage(.abortTaskSet, cookie: 100 + cookie) }
        world.a.manage(.abortTaskSet, cookie: 1)
        #expect(world.a.answers.map(\.response) == [.functionRejected])
        world.backstore.capacity = 0
        let tag = world.a.send(CDB.write(.ten, 9, 1), dataOut: Self.new, group: 1)
        suspend(world)
        #expect(end(world, tag) == "suspended")
        #expect(isAnswered(world))
    }

    @Test("A nexus that is lost meanwhile has its commands aborted, and hears nothing")
    func lost() {
        let world = world()
        let tag = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1)
        suspend(world)
        world.a.disconnect()
        world.backstore.complete()
        #expect(end(world, tag) == "aborted" && world.a.answers.isEmpty)
    }

    @Test("A unit that is removed meanwhile ends as ever")
    func removed() {
        let world = world()
        let tag = world.a.send(CDB.write(.ten, 7, 1), dataOut: Self.new, group: 1)
        var drained = false
        suspend(world)
        world.target.remove(at: LUN(0)!) { drained = true }
        world.backstore.complete()
        #expect(end(world, tag) == "suspended" && drained)
    }

    @Test("A front may send what it gets back from within the giving back, and suspend from within an end")
    func reentrant() {
        let world = world()
        world.unit.freeze()
        var sent = 0
        world.a.whenCompleted = { completion in
            guard completion.service == .suspended, sent < 8 else { return }
            sent += 1
            world.a.send(CDB.write(.ten, UInt64(sent), 1), dataOut: Self.new, group: 2)
        }
        for block in 0..<8 as Range<UInt64> { world.a.send(CDB.write(.ten, block, 1), dataOut: Self.new, group: 1) }
        suspend(world)
        #expect(sent == 8 && isAnswered(world) && world.unit.tasksInFlight == 8)
        world.a.whenCompleted = { _ in world.a.suspend(group: 2) }
        world.unit.thaw()
        world.backstore.honoursCancel = false
        world.drain()
        #expect(world.unit.tasksInFlight == 0)
        world.a.whenCompleted = nil
    }
}
