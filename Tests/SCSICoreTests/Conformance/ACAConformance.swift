// SAM-6 5.9: auto contingent allegiance, seen from two I_T nexuses.
//
// How to read: A's command with NACA fails, and A is the faulted nexus. `pending` is what the medium has been asked
// for. READ(10) of a block whose number is 5000 fails at once: LOGICAL BLOCK ADDRESS OUT OF RANGE.

import CBackstore
import CoreTestSupport
import SCSICore
import Testing

@Suite("SAM-6 5.9: auto contingent allegiance", .onEachTransport)
struct ACAConformance {
    let world = TestTarget()

    static func read(_ address: UInt64, naca: Bool = false) -> [UInt8] {
        var cdb = CDB.read(.ten, address, 1)
        if naca { cdb[9] = 0x04 }
        return cdb
    }

    @discardableResult
    private func send(
        _ port: MockPort, _ address: UInt64, _ attribute: TaskAttribute = .simple, naca: Bool = false
    ) -> UInt64 {
        port.send(Self.read(address, naca: naca), attribute: attribute, dataIn: 512)
    }

    private func end(_ port: MockPort, _ tag: UInt64) -> String? { port.completions.last { $0.tag == tag }?.summary }

    private func run(
        _ port: MockPort, _ address: UInt64, _ attribute: TaskAttribute = .simple, naca: Bool = false
    ) -> String {
        world.run(Self.read(address, naca: naca), attribute: attribute, dataIn: 512, on: port).summary
    }

    /// A's command fails with NACA, at once: A is the faulted nexus.
    private func fault(_ attribute: TaskAttribute = .simple) {
        let tag = send(world.a, 5000, attribute, naca: true)
        #expect(end(world.a, tag)?.hasPrefix("5/2100") == true)
    }

    private var enabled: [UInt64] { world.backstore.pending.map { $0.offset / 512 } }

    @Test("SPC-4 6.6.2: NORMACA is one in the INQUIRY data of a unit, and zero where there is no task set")
    func normaca() {
        #expect(world.run(CDB.inquiry(), dataIn: 96).data[3] & 0x20 != 0)
        for lun in [9 << 48, 0xc101 << 48] as [UInt64] {
            #expect(world.run(CDB.inquiry(), lun: lun, dataIn: 96).data[3] & 0x20 == 0)
        }
        var cdb = CDB.reportLUNs()
        cdb[11] = 0x04
        #expect(world.run(cdb, lun: 0xc101 << 48, dataIn: 64).summary == "5/2400 CDB 11.2")
    }

    @Test("SAM-6 5.2: a command with NACA that does not fail establishes nothing")
    func goodWithNACA() {
        #expect(run(world.a, 1, naca: true) == "good")
        #expect(run(world.a, 1) == "good")
    }

    @Test("SAM-6 5.9.1: CHECK CONDITION without NACA establishes no ACA condition")
    func withoutNACA() {
        #expect(run(world.a, 5000).hasPrefix("5/2100"))
        #expect(run(world.a, 1) == "good")
        #expect(run(world.b, 1) == "good")
    }

    @Test("SBC-5 5.3: what recovers from an ACA condition does not come between the halves of COMPARE AND WRITE")
    func compareAndWriteIsWhole() {
        let block = Array(repeating: 0 as UInt8, count: 512)
        let new = Array(repeating: 7 as UInt8, count: 512)
        world.a.send([0x89, 0] + CDB.bytes(1, 8) + [0, 0, 0, 1, 0, 0], dataOut: block + new)
        #expect(enabled == [1])
        fault(.headOfQueue)
        let recovery = world.a.send(CDB.write(.ten, 1, 1), attribute: .aca, dataOut: block)
        #expect(enabled == [1], "the medium reads for COMPARE AND WRITE, and nothing else is at work")
        world.backstore.complete()
        #expect(world.backstore.pending.map(\.operation) == [.write])
        world.backstore.complete()
        #expect(world.backstore.block(1) == new)
        #expect(enabled == [1], "now it is the other's turn")
        world.backstore.complete()
        #expect(end(world.a, recovery) == "good")
        #expect(world.backstore.block(1) == block)
    }

    @Test("SAM-6 5.9.3: a command of the faulted nexus without the ACA attribute ends with ACA ACTIVE")
    func faultedNexus() {
        fault()
        for attribute in [.simple, .ordered, .headOfQueue] as [TaskAttribute] {
            #expect(run(world.a, 1, attribute) == "acaActive")
            #expect(run(world.a, 1, attribute, naca: true) == "acaActive")
        }
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("SAM-6 5.9.3: a command of the faulted nexus with the ACA attribute is carried out")
    func acaCommand() {
        fault()
        #expect(run(world.a, 1, .aca) == "good")
        #expect(run(world.a, 2, .aca) == "good")
    }

    @Test("SAM-6 5.9.3: one ACA command at a time: a second one ends with ACA ACTIVE")
    func oneACACommand() {
        fault()
        let first = send(world.a, 1, .aca)
        let second = send(world.a, 2, .aca)
        #expect(end(world.a, second) == "acaActive")
        world.drain()
        #expect(end(world.a, first) == "good")
    }

    @Test("SAM-6 5.9.4: a command of another nexus ends with BUSY, with NACA or the ACA attribute with ACA ACTIVE")
    func otherNexus() {
        fault()
        #expect(run(world.b, 1) == "busy")
        #expect(run(world.b, 1, .headOfQueue) == "busy")
        #expect(run(world.b, 1, naca: true) == "acaActive")
        #expect(run(world.b, 1, .aca) == "acaActive")
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("SAM-6 8.6.5: the ACA attribute without an ACA condition is INVALID MESSAGE ERROR")
    func attributeWithoutACA() {
        #expect(run(world.a, 1, .aca) == "5/4900")
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("SAM-6 5.9.2: enabled commands of all nexuses are blocked: they do not end before the condition is cleared")
    func blocked() {
        let mine = send(world.a, 1)
        let others = send(world.b, 2, .headOfQueue)
        let waiting = send(world.b, 3, .ordered)
        fault(.headOfQueue)
        world.drain()
        #expect([end(world.a, mine), end(world.b, others), end(world.b, waiting)] == [nil, nil, nil])
        #expect(world.backstore.accepted.count == 2)
        world.a.manage(.clearACA, cookie: 9)
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        #expect([end(world.a, mine), end(world.b, others)] == ["good", "good"])
        world.drain()
        #expect(end(world.b, waiting) == "good")
    }

    @Test("SAM-6 5.9.2: a command that failed while it was blocked reports that when the condition is cleared")
    func failsWhileBlocked() {
        let tag = world.b.send(Self.read(1), dataIn: 512)
        fault()
        world.backstore.complete(error: 5)
        #expect(end(world.b, tag) == nil)
        world.a.manage(.clearACA)
        #expect(end(world.b, tag) == "3/1100")
    }

    @Test("SAM-6 5.9.1: a blocked command with NACA that had failed establishes an ACA condition of its own nexus")
    func secondFault() {
        let tag = send(world.b, 1, naca: true)
        fault()
        world.backstore.complete(error: 5)
        world.a.manage(.clearACA)
        #expect(end(world.b, tag) == "3/1100")
        #expect(run(world.a, 1) == "busy")
        #expect(run(world.b, 1) == "acaActive")
        world.b.manage(.clearACA)
        #expect(run(world.a, 1) == "good")
    }

    @Test(
        "SAM-6 5.9.5: an ACA command that ends with CHECK CONDITION clears the condition; with NACA there is a new one")
    func failingACACommand() {
        fault()
        #expect(run(world.a, 5000, .aca, naca: true).hasPrefix("5/2100"))
        #expect(run(world.b, 1) == "busy")
        #expect(run(world.a, 5000, .aca).hasPrefix("5/2100"))
        #expect(run(world.b, 1) == "good")
    }

    @Test("SAM-6 5.9.1: a unit attention condition that a command with NACA reports establishes an ACA condition")
    func unitAttentionFaults() {
        world.backstore.geometry.size += 512
        world.unit.backstoreGeometryChanged()
        #expect(run(world.a, 1, naca: true) == "6/2a09")
        #expect(run(world.a, 1) == "acaActive")
        #expect(run(world.b, 1) == "busy")
        world.a.manage(.clearACA)
        #expect(run(world.b, 1) == "6/2a09")
    }

    @Test("SAM-6 5.3.3: ACA ACTIVE comes before a unit attention condition, which stays pending")
    func precedesUnitAttention() {
        fault()
        world.backstore.geometry.size += 512
        world.unit.backstoreGeometryChanged()
        #expect(run(world.a, 1) == "acaActive")
        world.a.manage(.clearACA)
        #expect(run(world.a, 1) == "6/2a09")
    }

    @Test("SAM-6 5.9.2: an ACA condition is one of the logical unit: other units go on")
    func otherUnit() {
        _ = world.addUnit(at: 1)
        for port in [world.a, world.b] {
            for lun in [0, 1 << 48] as [UInt64] { _ = world.run(CDB.reportLUNs(), lun: lun, dataIn: 64, on: port) }
            _ = world.run(CDB.requestSense(), lun: 1 << 48, dataIn: 18, on: port)
        }
        fault()
        #expect(world.run(CDB.testUnitReady, lun: 1 << 48).summary == "good")
        #expect(world.run(CDB.testUnitReady, lun: 1 << 48, on: world.b).summary == "good")
    }

    @Test("SPC-4 7.5.8, TMF_ONLY: the faulted nexus can only clear the condition; ACA commands end with ACA ACTIVE")
    func taskManagementFunctionsOnly() {
        world.setControlMode(byte: 0, to: 0x10)
        fault()
        #expect(run(world.a, 1, .aca) == "acaActive")
        world.a.manage(.clearACA)
        #expect(run(world.a, 1) == "good")
    }

    // MARK: What clears it, and what does not

    @Test(
        "SAM-6 7.4: CLEAR ACA without an ACA condition, or by another nexus, changes nothing and is FUNCTION COMPLETE")
    func clearNothing() {
        world.a.manage(.clearACA, cookie: 1)
        fault()
        world.b.manage(.clearACA, cookie: 2)
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        #expect(world.b.answers.map(\.response) == [.functionComplete])
        #expect(run(world.a, 1) == "acaActive")
    }

    @Test("SAM-6 7.4: CLEAR ACA aborts the ACA command, as ABORT TASK would, and is answered after that")
    func clearAbortsACACommand() {
        fault()
        let tag = send(world.a, 1, .aca)
        world.journal.entries = []
        world.a.manage(.clearACA, cookie: 9)
        #expect(world.journal.lines == [])
        world.drain()
        #expect(world.journal.lines == ["A \(tag) aborted", "A function 9 functionComplete"])
        #expect(run(world.b, 1) == "good")
    }

    @Test("SAM-6 7.4: CLEAR ACA for a LUN that addresses no unit is INCORRECT LOGICAL UNIT NUMBER")
    func clearNowhere() {
        world.a.manage(.clearACA, lun: 9 << 48)
        #expect(world.a.answers.map(\.response) == [.incorrectLogicalUnitNumber])
    }

    @Test(
        "SAM-6 7.2, 7.3, 7.5: ABORT TASK, ABORT TASK SET and CLEAR TASK SET end blocked commands and leave the condition",
        arguments: [.abortTask, .abortTaskSet, .clearTaskSet] as [TaskManagementFunction])
    func abortsLeaveACA(function: TaskManagementFunction) {
        let tag = send(world.a, 1)
        fault()
        world.drain()
        world.a.manage(function, tag: tag, cookie: 9)
        #expect(end(world.a, tag) == "aborted")
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        #expect(run(world.a, 1) == "acaActive")
    }

    @Test("SAM-6 7.8, 7.9: QUERY TASK and QUERY TASK SET find a blocked command")
    func queriesFindBlocked() {
        let tag = send(world.a, 1)
        fault()
        world.drain()
        world.a.manage(.queryTask, tag: tag)
        world.a.manage(.queryTaskSet)
        #expect(world.a.answers.map(\.response) == [.functionSucceeded, .functionSucceeded])
    }

    @Test(
        "SAM-6 6.3.3: LOGICAL UNIT RESET and TARGET RESET, by any nexus, clear an ACA condition",
        arguments: [TaskManagementFunction.logicalUnitReset, .targetReset].filter { TestTarget.canSend($0) })
    func resetsClear(function: TaskManagementFunction) {
        let tag = send(world.a, 1)
        fault()
        world.drain()
        world.b.manage(function)
        #expect(end(world.a, tag) == "reset")
        #expect(run(world.a, 1) == "6/2903")
        #expect(run(world.a, 1) == "good")
    }

    @Test("SAM-6 6.3.2: a hard reset clears an ACA condition, and 29/02 follows")
    func hardResetClears() {
        fault()
        world.target.hardReset()
        #expect(run(world.b, 1) == "6/2902")
        #expect(run(world.b, 1) == "good")
    }

    @Test("SAM-6 6.3.4: the loss of the faulted nexus clears its ACA condition, that of another does not")
    func nexusLossClears() {
        let others = send(world.b, 1)
        fault()
        world.drain()
        #expect(end(world.b, others) == nil)
        world.a.disconnect()
        #expect(end(world.b, others) == "good")
        world.a.connect()
        #expect(run(world.a, 1) == "6/2907")
        fault()
        world.b.disconnect()
        #expect(run(world.a, 1) == "acaActive")
    }

    @Test("SAM-6 7.6: I_T NEXUS RESET of the faulted nexus clears its ACA condition")
    func nexusResetClears() {
        fault()
        world.b.manage(.nexusReset)
        #expect(run(world.a, 1) == "acaActive")
        world.a.manage(.nexusReset)
        #expect(run(world.a, 1) == "6/2907")
        #expect(run(world.a, 1) == "good")
    }

    @Test(
        "SAM-6 5.9.2: a unit that is removed refuses what waits, and what was blocked at its end still ends as it did")
    func removal() {
        let done = send(world.b, 1)
        let waiting = send(world.b, 2, .ordered)
        fault(.headOfQueue)
        world.drain()
        world.target.remove(at: LUN(0)!) {}
        #expect(end(world.b, done) == "good")
        #expect(end(world.b, waiting) == "5/2500")
    }

    @Test(
        "SAM-6 5.9.2: a command that waits for a staging buffer is not begun while it is blocked, and holds no buffer")
    func waitsForStaging() {
        let holders = (0..<UInt64(Limits.stagingBuffers)).map { world.b.send(CDB.verify(.ten, $0, 1)) }
        let waiter = world.b.send(CDB.verify(.ten, 20, 1))
        fault()
        world.drain()
        #expect(world.backstore.accepted.count == Limits.stagingBuffers)
        #expect(holders.allSatisfy { end(world.b, $0) == nil } && end(world.b, waiter) == nil)
        world.a.manage(.clearACA)
        world.drain()
        #expect((holders + [waiter]).allSatisfy { end(world.b, $0) == "good" })
    }

    @Test("SAM-6 5.9.4, 5.9.5: PREEMPT AND ABORT of another nexus is carried out and clears the condition")
    func preemptAndAbort() {
        let register = { (port: MockPort, key: UInt64) in
            let list = CDB.bytes(0, 8) + CDB.bytes(key, 8) + Array(repeating: 0, count: 8)
            return world.run([0x5f, 0x06, 0, 0, 0, 0, 0, 0, 24, 0], dataOut: list, on: port).summary
        }
        #expect(register(world.a, 0xa) == "good")
        #expect(register(world.b, 0xb) == "good")
        let tag = send(world.a, 1)
        fault()
        world.drain()
        let list = CDB.bytes(0xb, 8) + CDB.bytes(0xa, 8) + Array(repeating: 0, count: 8)
        let preempt: [UInt8] = [0x5f, 0x04, 0x01, 0, 0, 0, 0, 0, 24, 0]
        #expect(world.run(preempt, dataOut: list, on: world.b).summary == "busy")
        let abort: [UInt8] = [0x5f, 0x05, 0x01, 0, 0, 0, 0, 0, 24, 0]
        #expect(world.run(abort, dataOut: list, on: world.b).summary == "good")
        #expect(end(world.a, tag) == "aborted")
        #expect(run(world.b, 1) == "good")
        #expect(run(world.a, 1).hasPrefix("6/2a"))
    }
}
