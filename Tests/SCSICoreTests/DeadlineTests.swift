// Deadlines: what becomes of a command that takes too long, and how people see what is stuck.
//
// The clock is the shard's, set by hand. The journal is the order in which the two ports were called.

import CoreTestSupport
import SCSICore
import Testing

@Suite("Deadlines of commands")
struct DeadlineTests {
    let world = TestTarget(
        configuration: {
            var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "DEADLINE")
            configuration.commandTimeout = 30 * second
            return configuration
        }())

    private static let second: UInt64 = 1_000_000_000

    /// Sets the clock to so many seconds and lets the deadlines that have come by then pass.
    private func advance(to seconds: UInt64) {
        world.shard.now = seconds * Self.second
        world.shard.expireDeadlines()
    }

    @discardableResult
    private func read(
        _ port: MockPort, _ address: UInt64, _ attribute: TaskAttribute = .simple, timeoutMilliseconds: UInt32 = 0
    ) -> UInt64 {
        port.send(
            CDB.read(.ten, address, 1), attribute: attribute, dataIn: 512, timeoutMilliseconds: timeoutMilliseconds)
    }

    @Test("a medium that does not answer is asked to cancel when the deadline has come, once, and not before")
    func cancelsOnce() {
        read(world.a, 1)
        advance(to: 29)
        #expect(world.backstore.cancellations == 0)
        advance(to: 30)
        #expect(world.backstore.cancellations == 1)
        advance(to: 60)
        advance(to: 600)
        #expect(world.backstore.cancellations == 1)
        #expect(world.unit.statistics.expired == 1)
    }

    @Test("the command comes back only when the medium lets go of its memory, with LOGICAL UNIT COMMUNICATION TIME-OUT")
    func endsWhenLetGo() {
        let tag = read(world.a, 1)
        advance(to: 300)
        #expect(world.journal.lines == [])
        world.backstore.complete()
        #expect(world.journal.lines == ["A \(tag) b/0801"])
        #expect(world.unit.statistics.backstoreErrors == 0)
    }

    @Test("a command that the medium carries out in spite of the cancellation ends with GOOD and its data")
    func lateButDone() {
        world.backstore.honoursCancel = false
        world.backstore.setBlock(1, Array(repeating: 7, count: 512))
        read(world.a, 1)
        advance(to: 31)
        world.backstore.complete()
        #expect(world.a.completions.last?.summary == "good")
        #expect(world.a.completions.last?.data == Array(repeating: 7, count: 512))
    }

    @Test("an error that the medium reports after the deadline is reported as what it is")
    func lateError() {
        read(world.a, 1)
        advance(to: 31)
        world.backstore.complete(error: 5)
        #expect(world.a.completions.last?.summary == "3/1100")
        #expect(world.unit.statistics.backstoreErrors == 1)
    }

    @Test("a command of several steps goes no further after its deadline, however well its step went")
    func stepsStop() {
        world.backstore.honoursCancel = false
        let block = Array(repeating: UInt8(3), count: 512)
        world.a.send(CDB.writeSame(.ten, 0, 2048), dataOut: block)
        world.backstore.complete()
        #expect(world.backstore.accepted.count == 2)
        advance(to: 30)
        world.backstore.complete()
        #expect(world.backstore.accepted.count == 2)
        #expect(world.a.completions.last?.summary == "b/0801")
    }

    @Test("a command that waits for a stuck one ends at its deadline at once, and the medium never sees it")
    func waitingEndsAtOnce() {
        read(world.a, 1)
        advance(to: 10)
        let ordered = read(world.b, 2, .ordered)
        let behind = read(world.a, 3)
        advance(to: 39)
        #expect(world.journal.lines == [])
        advance(to: 40)
        #expect(world.journal.lines == ["B \(ordered) b/0801", "A \(behind) b/0801"])
        world.drain()
        #expect(world.backstore.accepted.count == 1)
    }

    @Test("a command that waits for room in the backstore or for a staging buffer ends at its deadline at once")
    func resourceWaitersEndAtOnce() {
        for index in 0..<UInt64(Limits.stagingBuffers) { world.a.send(CDB.verify(.ten, index, 1)) }
        let forStaging = world.a.send(CDB.verify(.ten, 9, 1))
        world.backstore.capacity = 0
        let forRoom = read(world.a, 10)
        advance(to: 30)
        #expect(world.journal.lines == ["A \(forStaging) b/0801", "A \(forRoom) b/0801"])
        #expect(!world.shard.hasWaiting)
        world.drain()
        #expect(world.backstore.accepted.count == Limits.stagingBuffers)
    }

    @Test(
        "an ACA condition keeps no command beyond its deadline, whenever the medium lets go of it",
        arguments: [false, true])
    func acaConditionKeepsNothing(letsGoLate: Bool) {
        let tag = read(world.a, 1)
        var failing = CDB.read(.ten, 5000, 1)
        failing[9] = 0x04
        world.a.send(failing, dataIn: 512)
        if !letsGoLate { world.backstore.complete() }
        #expect(!world.a.completions.contains { $0.tag == tag })
        advance(to: 30)
        if letsGoLate { world.backstore.complete() }
        #expect(world.a.completions.last { $0.tag == tag }?.summary == (letsGoLate ? "b/0801" : "good"))
        #expect(world.unit.tasksInFlight == 0)
    }

    @Test("the transport's deadline goes before the logical unit's, whether it is shorter or longer")
    func transportGoesFirst() {
        let short = read(world.a, 1, timeoutMilliseconds: 2000)
        let long = read(world.a, 2, timeoutMilliseconds: 100_000)
        #expect(world.shard.nextDeadline == 2 * Self.second)
        advance(to: 2)
        #expect(world.backstore.cancellations == 1)
        #expect(world.shard.nextDeadline == 100 * Self.second)
        advance(to: 99)
        #expect(world.backstore.cancellations == 1)
        advance(to: 100)
        #expect(world.backstore.cancellations == 2)
        #expect(world.shard.nextDeadline == nil)
        world.drain()
        #expect(world.journal.lines == ["A \(short) b/0801", "A \(long) b/0801"])
    }

    @Test("without a deadline of the transport or the unit, nothing ever passes")
    func noDeadline() {
        world.unit.commandTimeout = 0
        read(world.a, 1)
        advance(to: 1_000_000)
        #expect(world.backstore.cancellations == 0)
        #expect(world.shard.nextDeadline == nil)
        world.drain()
        #expect(world.a.completions.last?.summary == "good")
    }

    @Test("a new timeout of the unit holds for commands that are there already")
    func changedTimeout() {
        read(world.a, 1)
        advance(to: 5)
        world.unit.commandTimeout = 4 * Self.second
        advance(to: 5)
        #expect(world.backstore.cancellations == 1)
    }

    @Test("ABORT TASK of a command past its deadline ends it without status, and is answered after it")
    func abortAfterDeadline() {
        let tag = read(world.a, 1)
        advance(to: 30)
        world.a.manage(.queryTask, tag: tag, cookie: 8)
        world.a.manage(.abortTask, tag: tag, cookie: 9)
        #expect(world.journal.lines == ["A function 8 functionSucceeded"])
        world.backstore.complete()
        #expect(world.journal.lines.dropFirst() == ["A \(tag) aborted", "A function 9 functionComplete"])
    }

    @Test("a command that LOGICAL UNIT RESET has ended has no deadline any more")
    func deadlineAfterReset() {
        let tag = read(world.a, 1)
        world.b.manage(.logicalUnitReset, cookie: 9)
        advance(to: 30)
        #expect(world.backstore.cancellations == 1)
        #expect(world.unit.statistics.expired == 0)
        world.backstore.complete()
        #expect(world.journal.lines == ["A \(tag) reset", "B function 9 functionComplete"])
    }

    @Test("what an ACA condition blocks does not end at its deadline, but at the next look after CLEAR ACA")
    func blockedByACA() {
        var failing = CDB.read(.ten, 5000, 1)
        failing[9] = 0x04
        let blocked = read(world.b, 1, .ordered)
        let behind = read(world.b, 2, .ordered)
        let fault = world.a.send(failing, attribute: .headOfQueue, dataIn: 512)
        advance(to: 31)
        #expect(world.journal.lines == ["A \(fault) 5/2100 CDB 2"])
        #expect(world.backstore.cancellations == 1, "the medium has the first of them already")
        world.backstore.complete()
        #expect(world.journal.lines == ["A \(fault) 5/2100 CDB 2"])
        #expect(world.shard.nextDeadline == 32 * Self.second)
        world.a.manage(.clearACA, cookie: 9)
        advance(to: 32)
        world.backstore.completeAll()
        #expect(
            world.journal.lines == [
                "A \(fault) 5/2100 CDB 2", "B \(blocked) b/0801", "A function 9 functionComplete",
                "B \(behind) b/0801",
            ])
        #expect(world.unit.statistics.expired == 2)
    }

    @Test("of two commands that wait too long, the first establishes an ACA condition, and the other stays blocked")
    func deadlineEstablishesACA() {
        let stuck = read(world.a, 1, timeoutMilliseconds: 1_000_000)
        var second = CDB.read(.ten, 1, 1)
        second[9] = 0x04
        let first = world.a.send(second, attribute: .ordered, dataIn: 512)
        let other = read(world.a, 3, .ordered)
        advance(to: 30)
        #expect(world.journal.lines == ["A \(first) b/0801"])
        world.a.manage(.clearACA, cookie: 9)
        advance(to: 31)
        #expect(
            world.journal.lines == [
                "A \(first) b/0801", "A function 9 functionComplete", "A \(other) b/0801",
            ])
        world.backstore.completeAll()
        #expect(world.journal.lines.last == "A \(stuck) good")
    }

    @Test("a WRITE past its deadline keeps its blocks from others until the medium lets go of it")
    func extentStaysBlocked() {
        let old = world.a.send(CDB.write(.ten, 1, 1), dataOut: Array(repeating: 1, count: 512))
        advance(to: 30)
        let new = world.b.send(CDB.write(.ten, 1, 1), dataOut: Array(repeating: 2, count: 512))
        #expect(world.backstore.accepted.count == 1)
        world.backstore.honoursCancel = false
        world.drain()
        #expect(world.journal.lines == ["A \(old) good", "B \(new) good"])
        #expect(world.backstore.block(1) == Array(repeating: 2, count: 512))
    }

    @Test("a port that sends the next command from inside a completion finds a unit that goes on")
    func reentrant() {
        read(world.a, 1)
        read(world.a, 2, .ordered)
        world.a.whenCompleted = { completion in
            world.a.whenCompleted = nil
            if completion.summary == "b/0801" { read(world.a, 3) }
        }
        advance(to: 30)
        advance(to: 59)
        #expect(world.unit.tasksInFlight == 2)
        advance(to: 60)
        world.drain()
        // The first was cancelled at 30, the one from inside the completion at 60; it had been handed to the medium.
        #expect(world.a.completions.suffix(3).map(\.summary) == ["b/0801", "b/0801", "b/0801"])
        #expect(world.backstore.cancellations == 2)
    }

    @Test("the oldest command says its age, initiator, operation, extent, and where it is")
    func oldest() {
        #expect(world.target.oldestTask == nil)
        advance(to: 1)
        let tag = world.b.send(CDB.read(.ten, 77, 3), dataIn: 3 * 512)
        advance(to: 2)
        read(world.a, 1, .ordered)
        advance(to: 33)
        let oldest = world.target.oldestTask
        #expect(oldest?.lun == LUN(0))
        #expect(
            oldest?.task
                == TaskInFlight(
                    age: 32 * Self.second, initiatorPort: "B", tag: tag, operationCode: 0x28, address: 77, blocks: 3,
                    place: .backstore, hasExpired: true))
        #expect(world.unit.tasksInFlight == 1)
        world.drain()
        #expect(world.target.oldestTask == nil)
    }

    @Test("a command that waits says what it waits for")
    func places() {
        world.backstore.capacity = 0
        read(world.a, 1)
        #expect(world.unit.oldestTask?.place == .waitingForResource)
        read(world.a, 2, .ordered)
        let second = world.addUnit(at: 1)
        #expect(second.unit.oldestTask == nil)
        world.drain()
        read(world.a, 3)
        advance(to: 1)
        read(world.a, 4, .ordered)
        #expect(world.unit.oldestTask?.place == .backstore)
    }
}
