// SAM-6 clause 7: task management functions, seen from two I_T nexuses.
//
// The journal is the order in which the two ports were called: "A 3 good" is command 3 of A coming back, "A function 7
// functionComplete" is the answer to the function that A sent with cookie 7.

import CoreTestSupport
import SCSICore
import Testing

@Suite("SAM-6 7: task management functions", .onEachTransport)
struct TaskManagementConformance {
    let world = TestTarget()

    @discardableResult
    private func read(_ port: MockPort, _ address: UInt64, _ attribute: TaskAttribute = .simple) -> UInt64 {
        port.send(CDB.read(.ten, address, 1), attribute: attribute, dataIn: 512)
    }

    @Test("SAM-6 7.2: ABORT TASK of a command that waits ends it without status, then answers FUNCTION COMPLETE")
    func abortsDormant() {
        read(world.a, 1)
        let tag = read(world.a, 2, .ordered)
        world.a.manage(.abortTask, tag: tag, cookie: 9)
        #expect(world.journal.lines == ["A \(tag) aborted", "A function 9 functionComplete"])
        world.drain()
        #expect(world.backstore.accepted.count == 1)
    }

    @Test("SAM-6 7.2: ABORT TASK is not answered while the medium may still touch the command's memory")
    func abortWaitsForMedium() {
        let tag = read(world.a, 1)
        world.a.manage(.abortTask, tag: tag, cookie: 9)
        #expect(world.journal.lines == [])
        #expect(world.backstore.cancellations == 1)
        world.backstore.complete()
        #expect(world.journal.lines == ["A \(tag) aborted", "A function 9 functionComplete"])
    }

    @Test("SAM-6 7.2: ABORT TASK of a command whose medium ignores the cancellation still ends it without status")
    func abortOfUncancellable() {
        world.backstore.honoursCancel = false
        let tag = read(world.a, 1)
        world.a.manage(.abortTask, tag: tag, cookie: 9)
        world.backstore.complete()
        #expect(world.journal.lines == ["A \(tag) aborted", "A function 9 functionComplete"])
    }

    @Test("SAM-6 7.2: ABORT TASK for a command that does not exist answers FUNCTION COMPLETE")
    func abortsNothing() {
        world.a.manage(.abortTask, tag: 12345, cookie: 9)
        #expect(world.journal.lines == ["A function 9 functionComplete"])
    }

    @Test("SAM-6 7.2: ABORT TASK does not reach a command of another nexus with the same tag")
    func abortStaysInNexus() {
        world.b.send(CDB.read(.ten, 1, 1), dataIn: 512, tag: 77)
        world.a.manage(.abortTask, tag: 77, cookie: 9)
        #expect(world.journal.lines == ["A function 9 functionComplete"])
        world.drain()
        #expect(world.b.completions.last?.summary == "good")
    }

    @Test("SAM-6 7.2: two ABORT TASK for the same command are both answered after it has ended, in their order")
    func abortTwice() {
        let tag = read(world.a, 1)
        world.a.manage(.abortTask, tag: tag, cookie: 1)
        world.a.manage(.abortTask, tag: tag, cookie: 2)
        #expect(world.journal.lines == [])
        world.drain()
        #expect(
            world.journal.lines == [
                "A \(tag) aborted", "A function 1 functionComplete", "A function 2 functionComplete",
            ])
    }

    @Test("SAM-6 7.3: ABORT TASK SET ends every command of its nexus and none of another")
    func abortTaskSet() {
        let mine = [read(world.a, 1), read(world.a, 2), read(world.a, 3, .ordered)]
        let other = read(world.b, 4)
        world.a.manage(.abortTaskSet, cookie: 9)
        world.drain()
        #expect(world.journal.lines.filter { $0.hasSuffix("aborted") }.count == mine.count)
        #expect(world.b.completions.last { $0.tag == other }?.summary == "good")
        #expect(world.a.answers.map(\.response) == [.functionComplete])
    }

    @Test("SAM-6 7.5: CLEAR TASK SET with TAS zero ends the others' commands without status and tells them by 2F/00")
    func clearTaskSet() {
        let mine = read(world.a, 1)
        let others = read(world.b, 2)
        world.a.manage(.clearTaskSet, cookie: 9)
        world.drain()
        #expect(world.a.completions.last { $0.tag == mine }?.summary == "aborted")
        #expect(world.b.completions.last { $0.tag == others }?.summary == "aborted")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/2f00")
        #expect(world.run(CDB.testUnitReady, on: world.a).summary == "good")
    }

    @Test("SPC-4 7.5.8: CLEAR TASK SET with TAS one ends the others' commands with TASK ABORTED and without 2F/00")
    func clearTaskSetWithStatus() {
        world.setControlMode(byte: 3, to: 0x40)
        let mine = read(world.a, 1)
        let others = read(world.b, 2)
        world.a.manage(.clearTaskSet, cookie: 9)
        world.drain()
        #expect(world.a.completions.last { $0.tag == mine }?.summary == "aborted")
        #expect(world.b.completions.last { $0.tag == others }?.summary == "taskAborted")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("SAM-6 7.6: I_T NEXUS RESET ends the nexus's commands on all units, and 29/07 follows on each")
    func nexusReset() {
        let second = world.addUnit(at: 1)
        for port in [world.a, world.b] { _ = world.run(CDB.requestSense(), lun: 1 << 48, dataIn: 18, on: port) }
        for port in [world.a, world.b] { _ = world.run(CDB.requestSense(), dataIn: 18, on: port) }
        read(world.a, 1)
        world.a.send(CDB.read(.ten, 1, 1), lun: 1 << 48, dataIn: 512)
        let other = read(world.b, 2)
        world.a.manage(.nexusReset, cookie: 9)
        #expect(world.a.answers.isEmpty)
        second.backstore.completeAll()
        #expect(world.a.answers.isEmpty)
        world.backstore.complete()
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        world.drain()
        #expect(world.b.completions.last { $0.tag == other }?.summary == "good")
        for lun in [0, 1 << 48] as [UInt64] {
            #expect(world.run(CDB.testUnitReady, lun: lun).summary == "6/2907")
            #expect(world.run(CDB.testUnitReady, lun: lun, on: world.b).summary == "good")
        }
    }

    @Test("SAM-6 7.7: LOGICAL UNIT RESET ends all commands of all nexuses, then is answered; 29/03 follows for each")
    func logicalUnitReset() {
        let mine = read(world.a, 1)
        let others = read(world.b, 2)
        let waiting = read(world.b, 3, .ordered)
        world.a.manage(.logicalUnitReset, cookie: 9)
        #expect(world.journal.lines == ["B \(waiting) reset"])
        world.drain()
        #expect(
            world.journal.lines.dropFirst().sorted() == [
                "A \(mine) reset", "A function 9 functionComplete", "B \(others) reset",
            ])
        #expect(world.journal.lines.last == "A function 9 functionComplete")
        for port in [world.a, world.b] {
            #expect(world.run(CDB.testUnitReady, on: port).summary == "6/2903")
            #expect(world.run(CDB.testUnitReady, on: port).summary == "good")
        }
    }

    @Test("SPC-4 7.5.8: LOGICAL UNIT RESET with TAS one ends the others' commands with TASK ABORTED")
    func logicalUnitResetWithStatus() {
        world.setControlMode(byte: 3, to: 0x40)
        let mine = read(world.a, 1)
        let others = read(world.b, 2)
        world.a.manage(.logicalUnitReset)
        world.drain()
        #expect(world.a.completions.last { $0.tag == mine }?.summary == "reset")
        #expect(world.b.completions.last { $0.tag == others }?.summary == "taskAborted")
    }

    @Test("SAM-6 6.3.3: LOGICAL UNIT RESET starts a stopped unit and sets the mode pages back")
    func resetRestores() {
        _ = world.run(CDB.startStopUnit(start: false))
        world.setControlMode(byte: 3, to: 0x40)
        world.a.manage(.logicalUnitReset)
        _ = world.run(CDB.requestSense(), dataIn: 18)
        #expect(world.run(CDB.testUnitReady).summary == "good")
        #expect(world.run(CDB.modeSense6(0x0a), dataIn: 255).data[4 + 2 + 3] == 0)
    }

    @Test("SAM-6 7.7: LOGICAL UNIT RESET leaves the other units alone")
    func resetStaysInUnit() {
        let second = world.addUnit(at: 1)
        for port in [world.a, world.b] { _ = world.run(CDB.requestSense(), lun: 1 << 48, dataIn: 18, on: port) }
        for port in [world.a, world.b] { _ = world.run(CDB.requestSense(), dataIn: 18, on: port) }
        let tag = world.a.send(CDB.read(.ten, 1, 1), lun: 1 << 48, dataIn: 512)
        world.a.manage(.logicalUnitReset, cookie: 9)
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        second.backstore.completeAll()
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "good")
        #expect(world.run(CDB.testUnitReady, lun: 1 << 48).summary == "good")
    }

    @Test("SAM-6 7.7: two LOGICAL UNIT RESET of two nexuses do not wait for each other")
    func crossingResets() {
        read(world.a, 1)
        world.a.manage(.logicalUnitReset, cookie: 1)
        world.b.manage(.logicalUnitReset, cookie: 2)
        world.drain()
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        #expect(world.b.answers.map(\.response) == [.functionComplete])
    }

    @Test("SAM-6 7.7: commands that arrive while a LOGICAL UNIT RESET waits are not ended by it")
    func laterCommandsSurvive() {
        read(world.a, 1)
        world.a.manage(.logicalUnitReset, cookie: 9)
        let later = world.b.send(CDB.inquiry(), dataIn: 96)
        #expect(world.b.completions.last { $0.tag == later }?.summary == "good")
        #expect(world.a.answers.isEmpty)
        world.drain()
        #expect(world.a.answers.map(\.response) == [.functionComplete])
    }

    @Test("SAM-6 7.8: QUERY TASK answers FUNCTION SUCCEEDED for a command in the task set, else FUNCTION COMPLETE")
    func queryTask() {
        let tag = read(world.a, 1)
        world.a.manage(.queryTask, tag: tag, cookie: 1)
        world.a.manage(.queryTask, tag: tag + 1, cookie: 2)
        world.b.manage(.queryTask, tag: tag, cookie: 3)
        world.drain()
        world.a.manage(.queryTask, tag: tag, cookie: 4)
        #expect(world.a.answers.map(\.response) == [.functionSucceeded, .functionComplete, .functionComplete])
        #expect(world.b.answers.map(\.response) == [.functionComplete])
    }

    @Test("SAM-6 7.9: QUERY TASK SET answers FUNCTION SUCCEEDED if the nexus has a command in the task set")
    func queryTaskSet() {
        read(world.a, 1)
        world.a.manage(.queryTaskSet)
        world.b.manage(.queryTaskSet)
        #expect(world.a.answers.map(\.response) == [.functionSucceeded])
        #expect(world.b.answers.map(\.response) == [.functionComplete])
    }

    @Test("SAM-6 7.1: a function for a LUN that addresses no unit answers INCORRECT LOGICAL UNIT NUMBER")
    func incorrectLogicalUnitNumber() {
        for function in [.abortTask, .abortTaskSet, .clearTaskSet, .logicalUnitReset, .queryTask, .queryTaskSet]
            as [TaskManagementFunction]
        {
            world.a.manage(function, lun: 9 << 48)
            #expect(world.a.answers.last?.response == .incorrectLogicalUnitNumber, "\(function)")
        }
    }

    @Test(
        "SAM-6 7.1: an unknown function is rejected",
        .enabled(if: TestTarget.canSend(nil), "the transport cannot say a function that it does not know"))
    func unknownFunction() {
        for number in [0, 11, 255] as [UInt8] {
            world.a.manage(rawFunction: number)
            #expect(world.a.answers.last?.response == .functionRejected)
        }
    }

    @Test(
        "SAM-6 5.6: a command that TARGET RESET ends is not handed to the medium when another unit makes room",
        .enabled(if: TestTarget.canSend(.targetReset), "the transport has no TARGET RESET"))
    func targetResetStartsNothing() {
        let second = world.addUnit(at: 1)
        for lun in [0, 1 << 48] as [UInt64] {
            for _ in 0..<2 { _ = world.run(CDB.requestSense(), lun: lun, dataIn: 18) }
        }
        for index in 0..<UInt64(Limits.stagingBuffers) { world.a.send(CDB.verify(.ten, index, 1)) }
        world.backstore.capacity = 0
        world.a.send(CDB.verify(.ten, 9, 1), lun: 1 << 48)
        world.a.send(CDB.read(.ten, 9, 1), lun: 1 << 48, attribute: .ordered, dataIn: 512)
        world.a.manage(.targetReset, cookie: 9)
        world.drain()
        #expect(second.backstore.accepted.isEmpty)
        #expect(world.a.completions.suffix(Limits.stagingBuffers + 2).allSatisfy { $0.summary == "reset" })
        #expect(world.run(CDB.testUnitReady, lun: 1 << 48).summary == "6/2903")
    }

    @Test(
        "SAM-2 7.7: TARGET RESET ends the commands of all nexuses on all units before it is answered",
        .enabled(if: TestTarget.canSend(.targetReset), "the transport has no TARGET RESET"))
    func targetReset() {
        let second = world.addUnit(at: 1)
        for port in [world.a, world.b] {
            for lun in [0, 1 << 48] as [UInt64] { _ = world.run(CDB.requestSense(), lun: lun, dataIn: 18, on: port) }
        }
        read(world.a, 1)
        world.b.send(CDB.read(.ten, 1, 1), lun: 1 << 48, dataIn: 512)
        world.a.manage(.targetReset, cookie: 9)
        world.backstore.complete()
        #expect(world.a.answers.isEmpty)
        second.backstore.complete()
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        #expect(world.a.completions.last?.summary == "reset")
        #expect(world.b.completions.last?.summary == "reset")
    }
}

extension TestTarget {
    /// MODE SELECT(6) by A of one byte of the control mode page (SPC-4 7.5.8); B's unit attention is taken away.
    func setControlMode(byte: Int, to value: UInt8) {
        let page = run(CDB.modeSense6(0x0a), dataIn: 255).data[4...]
        var list: [UInt8] = [0, 0, 0, 0] + page
        list[4 + 2 + byte] = value
        let end = run(CDB.modeSelect6(listLength: list.count), dataOut: list)
        precondition(end.summary == "good")
        _ = run(CDB.requestSense(), dataIn: 18, on: b)
        journal.entries = []
    }
}
