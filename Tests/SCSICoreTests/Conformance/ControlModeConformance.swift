// SPC-4 7.5.8: the fields of the control mode page that govern the task set, seen from two I_T nexuses.
//
// Bytes are counted behind the page header: byte 0 has TST, byte 1 QUEUE ALGORITHM MODIFIER and QERR, byte 2
// UA_INTLCK_CTRL, byte 3 TAS.

import CBackstore
import CoreTestSupport
import SCSICore
import Testing

@Suite("SPC-4 7.5.8: the control mode page and the task set", .onEachTransport)
struct ControlModeConformance {
    let world = TestTarget()

    @discardableResult
    private func read(_ port: MockPort, _ address: UInt64, _ attribute: TaskAttribute = .simple) -> UInt64 {
        port.send(CDB.read(.ten, address, 1), attribute: attribute, dataIn: 512)
    }

    @discardableResult
    private func write(_ port: MockPort, _ address: UInt64, _ attribute: TaskAttribute = .simple) -> UInt64 {
        port.send(CDB.write(.ten, address, 1), attribute: attribute, dataOut: Array(repeating: 1, count: 512))
    }

    private func fail(_ port: MockPort) { _ = world.run(CDB.read(.ten, 5000, 1), dataIn: 512, on: port) }

    private func end(_ port: MockPort, _ tag: UInt64) -> String? { port.completions.last { $0.tag == tag }?.summary }

    private var enabled: [UInt64] { world.backstore.pending.map { $0.offset / 512 } }

    @Test(
        "A value that a field does not have is INVALID FIELD IN PARAMETER LIST",
        arguments: [
            (0, 0x40), (1, 0x20), (1, 0x80), (1, 0x04), (2, 0x10),
        ])
    func reservedValues(byte: Int, value: UInt8) {
        var list = [0, 0, 0, 0] + Array(world.run(CDB.modeSense6(0x0a), dataIn: 255).data[4...])
        list[4 + 2 + byte] = value
        let end = world.run(CDB.modeSelect6(listLength: list.count), dataOut: list)
        #expect(end.summary == "5/2600 list \(4 + 2 + byte)")
    }

    // MARK: QERR

    @Test("QERR 00b: CHECK CONDITION of one command leaves the others alone")
    func queueErrorNone() {
        let tags = [read(world.a, 1), read(world.a, 2, .ordered)]
        world.backstore.complete(error: 5)
        world.drain()
        #expect(tags.map { end(world.a, $0) } == ["3/1100", "good"])
    }

    @Test("QERR 01b, TAS 0: all commands are aborted; the other nexus is told by COMMANDS CLEARED BY ANOTHER INITIATOR")
    func queueErrorAll() {
        world.setControlMode(byte: 1, to: 0x02)
        let faulting = read(world.a, 1)
        let mine = [read(world.a, 2), read(world.a, 3, .ordered)]
        let others = [read(world.b, 4), read(world.b, 5, .ordered)]
        world.backstore.complete(error: 5)
        #expect(world.journal.lines.first == "A \(faulting) 3/1100")
        world.drain()
        #expect(mine.allSatisfy { end(world.a, $0) == "aborted" })
        #expect(others.allSatisfy { end(world.b, $0) == "aborted" })
        #expect(world.run(CDB.testUnitReady, on: world.a).summary == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/2f00")
    }

    @Test("QERR 01b, TAS 1: the other nexus's commands end with TASK ABORTED, and there is no unit attention condition")
    func queueErrorAllWithStatus() {
        world.setControlMode(byte: 3, to: 0x40)
        world.setControlMode(byte: 1, to: 0x02)
        read(world.a, 1)
        let others = [read(world.b, 4), read(world.b, 5, .ordered)]
        world.backstore.complete(error: 5)
        world.drain()
        #expect(others.allSatisfy { end(world.b, $0) == "taskAborted" })
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("QERR 11b: only the commands of the nexus with the CHECK CONDITION are aborted")
    func queueErrorNexus() {
        world.setControlMode(byte: 1, to: 0x06)
        read(world.a, 1)
        let mine = read(world.a, 2)
        let others = read(world.b, 3)
        world.backstore.complete(error: 5)
        world.drain()
        #expect(end(world.a, mine) == "aborted")
        #expect(end(world.b, others) == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("QERR 01b: an aborted command's memory is not given back before the medium lets go of it")
    func queueErrorWaitsForMedium() {
        world.setControlMode(byte: 1, to: 0x02)
        read(world.a, 1)
        let other = read(world.b, 2)
        world.backstore.complete(error: 5)
        #expect(end(world.b, other) == nil)
        #expect(world.backstore.cancellations == 1)
        world.drain()
        #expect(end(world.b, other) == "aborted")
    }

    @Test("QERR 01b with NACA (SAM-6 5.9.2): the commands are aborted, and the ACA condition is in effect")
    func queueErrorWithACA() {
        world.setControlMode(byte: 1, to: 0x02)
        let other = read(world.b, 2)
        _ = world.run(ACAConformance.read(5000, naca: true), dataIn: 512)
        world.drain()
        #expect(end(world.b, other) == "aborted")
        #expect(world.run(CDB.testUnitReady).summary == "acaActive")
        world.a.manage(.clearACA)
        #expect(world.run(CDB.testUnitReady).summary == "good")
    }

    @Test("QERR 11b with NACA (SAM-6 5.9.2): the nexus's commands are aborted, the other's are blocked")
    func queueErrorNexusWithACA() {
        world.setControlMode(byte: 1, to: 0x06)
        let mine = read(world.a, 1)
        let other = read(world.b, 2)
        _ = world.run(ACAConformance.read(5000, naca: true), dataIn: 512)
        world.drain()
        #expect(end(world.a, mine) == "aborted")
        #expect(end(world.b, other) == nil)
        world.a.manage(.clearACA)
        #expect(end(world.b, other) == "good")
    }

    // MARK: TST

    @Test("TST 001b: an ORDERED command of one nexus does not hold up the commands of another")
    func separateOrder() {
        world.setControlMode(byte: 0, to: 0x20)
        read(world.a, 1)
        read(world.a, 2, .ordered)
        read(world.a, 3)
        read(world.b, 4)
        read(world.b, 5, .ordered)
        #expect(enabled == [1, 4])
        world.backstore.complete(1)
        #expect(enabled == [1, 5])
        world.backstore.complete(0)
        #expect(enabled == [5, 2])
    }

    @Test("TST 001b: a HEAD OF QUEUE command holds up the SIMPLE commands of its own nexus only")
    func separateHeadOfQueue() {
        world.setControlMode(byte: 0, to: 0x20)
        read(world.a, 1, .headOfQueue)
        read(world.a, 2)
        read(world.b, 3)
        #expect(enabled == [1, 3])
    }

    @Test("TST 001b: overlapping writes of two nexuses still do not meet in the medium, in whichever order")
    func separateHazard() {
        world.setControlMode(byte: 0, to: 0x20)
        read(world.a, 1)
        write(world.a, 5, .ordered)
        write(world.b, 5)
        #expect(enabled == [1, 5])
        world.backstore.complete(0)
        #expect(enabled == [5])
        world.backstore.complete(0)
        #expect(enabled == [5])
    }

    @Test("TST 001b (SAM-6 5.9.2): an ACA condition blocks the commands of its own nexus only")
    func separateACA() {
        world.setControlMode(byte: 0, to: 0x20)
        let mine = read(world.a, 1)
        let others = read(world.b, 2)
        _ = world.run(ACAConformance.read(5000, naca: true), dataIn: 512)
        world.drain()
        #expect(end(world.a, mine) == nil)
        #expect(end(world.b, others) == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
        #expect(world.run(CDB.testUnitReady, on: world.a).summary == "acaActive")
        _ = world.run(ACAConformance.read(5000, naca: true), dataIn: 512, on: world.b)
        world.a.manage(.clearACA)
        #expect(end(world.a, mine) == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "acaActive")
    }

    @Test("TST 001b, QERR 01b: the commands of the other nexus are not affected")
    func separateQueueError() {
        world.setControlMode(byte: 0, to: 0x20)
        world.setControlMode(byte: 1, to: 0x02)
        read(world.a, 1)
        let mine = read(world.a, 2)
        let others = read(world.b, 3)
        world.backstore.complete(error: 5)
        world.drain()
        #expect(end(world.a, mine) == "aborted")
        #expect(end(world.b, others) == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("TST 001b (SAM-6 7.5): CLEAR TASK SET clears the task set of its own nexus")
    func separateClearTaskSet() {
        world.setControlMode(byte: 0, to: 0x20)
        let mine = read(world.a, 1)
        let others = read(world.b, 2)
        world.a.manage(.clearTaskSet)
        world.drain()
        #expect(end(world.a, mine) == "aborted")
        #expect(end(world.b, others) == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("TST back to 000b: what is in the task sets is one task set from then on")
    func together() {
        world.setControlMode(byte: 0, to: 0x20)
        read(world.a, 1, .ordered)
        let list: [UInt8] = [0, 0, 0, 0, 0x0a, 10, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0]
        let select = world.b.send(CDB.modeSelect6(listLength: list.count), dataOut: list)
        #expect(end(world.b, select) == "good")
        read(world.b, 2)
        #expect(enabled == [1])
        world.backstore.complete()
        #expect(enabled == [2])
    }

    // MARK: QUEUE ALGORITHM MODIFIER

    @Test("QUEUE ALGORITHM MODIFIER 0: a WRITE is not overtaken by a MODE SELECT behind it that would forbid it")
    func restrictedReordering() {
        let list: [UInt8] = [0, 0, 0, 0, 0x0a, 10, 0, 0, 0x08, 0, 0, 0, 0xff, 0xff, 0, 0]
        write(world.a, 5)
        let second = write(world.a, 5)
        let select = world.a.send(CDB.modeSelect6(listLength: list.count), dataOut: list)
        #expect(end(world.a, select) == nil)
        world.drain()
        #expect([end(world.a, second), end(world.a, select)] == ["good", "good"])
        #expect(world.run(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512)).summary == "7/2700")
    }

    @Test("QUEUE ALGORITHM MODIFIER 0: the order is one of a nexus: a MODE SELECT of another does not wait")
    func restrictedReorderingOfNexus() {
        let list: [UInt8] = [0, 0, 0, 0, 0x0a, 10, 4, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0]
        write(world.a, 5)
        let select = world.b.send(CDB.modeSelect6(listLength: list.count), dataOut: list)
        #expect(end(world.b, select) == "good")
    }

    @Test("QUEUE ALGORITHM MODIFIER 1: SIMPLE commands may overtake each other; overlapping ones are still kept apart")
    func unrestrictedReordering() {
        world.setControlMode(byte: 1, to: 0x10)
        let list: [UInt8] = [0, 0, 0, 0, 0x0a, 10, 0, 0x10, 0x08, 0, 0, 0, 0xff, 0xff, 0, 0]
        write(world.a, 5)
        let second = write(world.a, 5)
        let select = world.a.send(CDB.modeSelect6(listLength: list.count), dataOut: list)
        #expect(end(world.a, select) == "good")
        #expect(enabled == [5])
        world.drain()
        #expect(end(world.a, second) == "7/2700")
    }

    // MARK: UA_INTLCK_CTRL

    private func announce() {
        world.backstore.geometry.size += 512
        world.unit.backstoreGeometryChanged()
    }

    @Test("UA_INTLCK_CTRL 00b: a unit attention condition is cleared by the CHECK CONDITION that reports it")
    func noInterlock() {
        announce()
        #expect(world.run(CDB.testUnitReady).summary == "6/2a09")
        #expect(world.run(CDB.testUnitReady).summary == "good")
    }

    @Test("UA_INTLCK_CTRL 10b, 11b: it stays pending until REQUEST SENSE reports it", arguments: [0x20, 0x30])
    func interlock(value: UInt8) {
        world.setControlMode(byte: 2, to: value)
        announce()
        for _ in 0..<3 { #expect(world.run(CDB.testUnitReady).summary == "6/2a09") }
        #expect(Sense(world.run(CDB.requestSense(), dataIn: 18).data)?.description == "6/2a09")
        #expect(world.run(CDB.testUnitReady).summary == "good")
    }

    @Test("UA_INTLCK_CTRL 11b: BUSY establishes PREVIOUS BUSY STATUS, once")
    func interlockBusy() {
        world.setControlMode(byte: 2, to: 0x30)
        _ = world.run(ACAConformance.read(5000, naca: true), dataIn: 512)
        for _ in 0..<2 { #expect(world.run(CDB.testUnitReady, on: world.b).summary == "busy") }
        world.a.manage(.clearACA)
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/2c07")
        #expect(Sense(world.run(CDB.requestSense(), dataIn: 18, on: world.b).data)?.description == "6/2c07")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test(
        "UA_INTLCK_CTRL 11b: TASK SET FULL establishes PREVIOUS TASK SET FULL STATUS; 10b establishes nothing",
        arguments: [0x20, 0x30])
    func interlockTaskSetFull(value: UInt8) {
        world.setControlMode(byte: 2, to: value)
        let port = MockPort(
            name: "C", target: world.target, journal: world.journal, violations: world.violations,
            tasks: Limits.tasksPerLogicalUnit + 1, segmentsPerTask: 1)
        port.connect()
        _ = port.send(CDB.requestSense(), dataIn: 18)
        for index in 0..<Limits.tasksPerLogicalUnit { read(port, UInt64(index % 8)) }
        #expect(end(port, read(port, 9)) == "taskSetFull")
        world.drain()
        #expect(world.run(CDB.testUnitReady, on: port).summary == (value == 0x30 ? "6/2c08" : "good"))
    }

    // MARK: What the unit says of itself

    @Test("SPC-4 7.8.7: HEADSUP, ORDSUP and SIMPSUP are one; PRIOR_SUP, UASK_SUP and GROUP_SUP are not; LUICLR is")
    func extendedInquiry() {
        let page = world.run(CDB.inquiry(page: 0x86), dataIn: 64).data
        #expect(page[5] == 0x07)
        #expect(page[7] & 0x01 == 0x01)
    }

    @Test("SPC-4 6.36: every task management function is supported; a length below four is INVALID FIELD IN CDB")
    func supportedFunctions() {
        let short = world.run(CDB.reportSupportedTaskManagementFunctions(allocation: 3), dataIn: 64)
        #expect(short.summary == "5/2400 CDB 6")
        let data = world.run(CDB.reportSupportedTaskManagementFunctions(), dataIn: 64).data
        #expect(data == [0xfe, 0x07, 0, 0])
        #expect(world.run(CDB.reportSupportedTaskManagementFunctions(allocation: 4), dataIn: 4).summary == "good")
    }
}
