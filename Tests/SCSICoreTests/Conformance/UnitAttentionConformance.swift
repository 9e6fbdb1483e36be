// SAM-6 5.14: unit attention conditions, seen from two I_T nexuses.

import CBackstore
import CoreTestSupport
import Testing

@testable import SCSICore

@Suite("SAM-6 5.14: unit attention conditions", .onEachTransport)
struct UnitAttentionConformance {
    let world = TestTarget(attentive: true)

    private func testUnitReady(_ port: MockPort) -> String { world.run(CDB.testUnitReady, on: port).summary }

    /// Takes away what a new nexus has.
    private func calm() {
        for port in [world.a, world.b] { _ = world.run(CDB.requestSense(), dataIn: 18, on: port) }
        world.journal.entries = []
    }

    @Test("SAM-6 6.3.1: each new nexus is told of the power on, once")
    func powerOn() {
        #expect(testUnitReady(world.a) == "6/2901")
        #expect(testUnitReady(world.a) == "good")
        #expect(testUnitReady(world.b) == "6/2901")
    }

    @Test("SAM-6 5.14: a command that reports a unit attention condition is not carried out")
    func notCarriedOut() {
        let end = world.run(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512))
        #expect(end.summary == "6/2901")
        #expect(end.dataOutResidual == 512)
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("SAM-6 5.14: an invalid command reports the unit attention condition and not its own error")
    func precedesInvalidCommand() {
        #expect(world.run([0xff, 0, 0, 0, 0, 0]).summary == "6/2901")
        #expect(world.run([0xff, 0, 0, 0, 0, 0]).summary == "5/2000 CDB 0")
    }

    @Test("SAM-6 5.14: INQUIRY is carried out and leaves the unit attention condition pending")
    func inquiryPasses() {
        #expect(world.run(CDB.inquiry(), dataIn: 96).summary == "good")
        #expect(testUnitReady(world.a) == "6/2901")
    }

    @Test("SAM-6 5.14: REPORT LUNS is carried out and leaves POWER ON pending")
    func reportLUNsPasses() {
        #expect(world.run(CDB.reportLUNs(), dataIn: 64).summary == "good")
        #expect(testUnitReady(world.a) == "6/2901")
    }

    @Test("SPC-4 6.39: REQUEST SENSE returns the unit attention condition as parameter data and clears it")
    func requestSenseReports() {
        let end = world.run(CDB.requestSense(), dataIn: 18)
        #expect(end.summary == "good")
        #expect(Sense(end.data)?.description == "6/2901")
        #expect(Sense(world.run(CDB.requestSense(), dataIn: 18).data)?.description == "0/0000")
        #expect(testUnitReady(world.a) == "good")
    }

    @Test("SPC-4 6.39: REQUEST SENSE that could not be carried out does not lose the unit attention condition")
    func requestSenseOverrun() {
        #expect(world.run(CDB.requestSense(), dataIn: 4).summary == "overrun")
        #expect(testUnitReady(world.a) == "6/2901")
    }

    @Test("SAM-6 5.14: conditions are reported one at a time, the widest reset first")
    func order() {
        world.backstore.geometry.size += 512
        world.unit.backstoreGeometryChanged()
        world.b.manage(.logicalUnitReset)
        #expect(testUnitReady(world.a) == "6/2901")
        #expect(testUnitReady(world.a) == "6/2903")
        #expect(testUnitReady(world.a) == "6/2a09")
        #expect(testUnitReady(world.a) == "good")
    }

    @Test("SAM-6 5.14: the same condition established twice is reported once")
    func noDuplicates() {
        calm()
        for _ in 0..<2 {
            world.backstore.geometry.size += 512
            world.unit.backstoreGeometryChanged()
        }
        #expect(testUnitReady(world.a) == "6/2a09")
        #expect(testUnitReady(world.a) == "good")
        #expect(testUnitReady(world.b) == "6/2a09")
    }

    @Test("SBC-4 4.7: a changed capacity is told to every nexus, by a unit attention condition and by an event")
    func capacityChanged() {
        calm()
        world.backstore.geometry.size *= 2
        world.unit.backstoreGeometryChanged()
        #expect(world.journal.lines == ["A event 3 2a09 0", "B event 3 2a09 0"])
        #expect(testUnitReady(world.a) == "6/2a09")
        #expect(testUnitReady(world.b) == "6/2a09")
        #expect(world.run(CDB.readCapacity10, dataIn: 8).data == CDB.bytes(8191, 4) + CDB.bytes(512, 4))
    }

    @Test("SBC-4 4.7: an unchanged capacity is not announced")
    func capacityUnchanged() {
        calm()
        world.unit.backstoreGeometryChanged()
        #expect(testUnitReady(world.a) == "good")
        #expect(world.journal.lines == ["A 2 good"])
    }

    @Test("SPC-4 6.11: MODE SELECT that changes a parameter is told to every nexus but its own")
    func modeParametersChanged() {
        calm()
        var list = [0, 0, 0, 0] + world.run(CDB.modeSense6(0x0a), dataIn: 255).data[4...]
        list[4 + 2] |= 0x04
        #expect(world.run(CDB.modeSelect6(listLength: list.count), dataOut: list).summary == "good")
        #expect(testUnitReady(world.a) == "good")
        #expect(testUnitReady(world.b) == "6/2a01")
        #expect(testUnitReady(world.b) == "good")
    }

    @Test("SPC-4 6.11: MODE SELECT that changes nothing is not announced")
    func modeParametersUnchanged() {
        calm()
        let list = [0, 0, 0, 0] + world.run(CDB.modeSense6(0x0a), dataIn: 255).data[4...]
        #expect(world.run(CDB.modeSelect6(listLength: list.count), dataOut: Array(list)).summary == "good")
        #expect(testUnitReady(world.b) == "good")
    }

    @Test("SPC-4 6.33: a changed LUN map is told on every unit; one report serves for all units of the nexus")
    func reportedLUNsChanged() {
        calm()
        _ = world.addUnit(at: 1)
        _ = world.run(CDB.requestSense(), lun: 1 << 48, dataIn: 18)
        _ = world.addUnit(at: 2)
        #expect(world.run(CDB.testUnitReady, lun: 1 << 48).summary == "6/3f0e")
        #expect(testUnitReady(world.a) == "good")
        #expect(testUnitReady(world.b) == "6/3f0e")
    }

    @Test("SPC-4 6.33: REPORT LUNS clears REPORTED LUNS DATA HAS CHANGED of its nexus on all units")
    func reportLUNsClears() {
        calm()
        _ = world.addUnit(at: 1)
        #expect(world.run(CDB.reportLUNs(), dataIn: 64).summary == "good")
        #expect(testUnitReady(world.a) == "good")
        #expect(testUnitReady(world.b) == "6/3f0e")
    }

    @Test("SPC-4 6.33: REPORT LUNS that could not be carried out does not lose REPORTED LUNS DATA HAS CHANGED")
    func reportLUNsOverrun() {
        calm()
        _ = world.addUnit(at: 1)
        #expect(world.run(CDB.reportLUNs(), dataIn: 4).summary == "overrun")
        #expect(testUnitReady(world.a) == "6/3f0e")
    }

    @Test("SAM-6 5.14: a removed unit is told on the units that are left")
    func removedUnit() {
        _ = world.addUnit(at: 1)
        _ = world.run(CDB.reportLUNs(), dataIn: 64)
        calm()
        world.target.remove(at: LUN(1)!) {}
        #expect(testUnitReady(world.a) == "6/3f0e")
        #expect(world.run(CDB.testUnitReady, lun: 1 << 48).summary == "5/2500")
    }

    @Test("SAM-6 6.3.4: a nexus that comes back is told of its loss, and of what happened meanwhile")
    func nexusLoss() {
        calm()
        world.a.disconnect()
        world.backstore.geometry.size += 512
        world.unit.backstoreGeometryChanged()
        world.a.connect()
        #expect(testUnitReady(world.a) == "6/2907")
        #expect(testUnitReady(world.a) == "6/2a09")
        #expect(testUnitReady(world.a) == "good")
        #expect(testUnitReady(world.b) == "6/2a09")
    }

    @Test("SAM-6 6.3.4: the commands of a lost nexus end, the commands of the other go on")
    func nexusLossEndsCommands() {
        calm()
        let mine = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        let others = world.b.send(CDB.read(.ten, 1, 1), dataIn: 512)
        world.a.disconnect()
        #expect(world.journal.lines == [])
        #expect(world.backstore.cancellations == 1)
        world.drain()
        #expect(world.unit.tasksInFlight == 0)
        #expect(world.journal.lines.last == "B \(others) good")
        #expect(world.journal.lines.dropLast() == (TestTarget.givesBackAfterLoss ? ["A \(mine) aborted"] : []))
    }

    @Test("SAM-6 5.14: a condition that was reported to a command that waited is not reported again")
    func reportedWhenEnabled() {
        calm()
        world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        let first = world.a.send(CDB.read(.ten, 1, 1), attribute: .ordered, dataIn: 512)
        let second = world.a.send(CDB.read(.ten, 2, 1), dataIn: 512)
        world.backstore.geometry.size += 512
        world.unit.backstoreGeometryChanged()
        world.drain()
        #expect(world.a.completions.last { $0.tag == first }?.summary == "6/2a09")
        #expect(world.a.completions.last { $0.tag == second }?.summary == "good")
    }

    @Test("SPC-4 6.39: REQUEST SENSE that asks for no data (ALLOCATION LENGTH 0) leaves the condition pending")
    func requestSenseOfNothing() {
        #expect(world.run(CDB.requestSense(allocation: 0)).summary == "good")
        #expect(testUnitReady(world.a) == "6/2901")
    }

    @Test("SAM-6 6.3.2: a hard reset is told to every nexus; conditions of narrower resets are implied by it")
    func hardReset() {
        calm()
        let tag = world.b.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.a.manage(.logicalUnitReset)
        world.target.hardReset()
        world.drain()
        #expect(world.b.completions.last { $0.tag == tag }?.summary == "reset")
        for port in [world.a, world.b] {
            #expect(testUnitReady(port) == "6/2902")
            #expect(testUnitReady(port) == "good")
        }
    }

    @Test("SPC-4 6.6: INQUIRY data that change are told to every nexus by INQUIRY DATA HAS CHANGED, others are not")
    func inquiryDataChanged() {
        calm()
        var configuration = world.unit.configuration
        world.unit.reconfigure(configuration)
        #expect(testUnitReady(world.a) == "good")
        configuration.product = "ANOTHER DISK"
        world.unit.reconfigure(configuration)
        for port in [world.a, world.b] {
            let inquiry = world.run(CDB.inquiry(), dataIn: 96, on: port).data
            #expect(Array(inquiry[16..<32]) == Array("ANOTHER DISK    ".utf8))
            #expect(testUnitReady(port) == "6/3f03")
            #expect(testUnitReady(port) == "good")
        }
    }

    @Test("SPC-4 7.8: a limit of the medium that changes is told by INQUIRY DATA HAS CHANGED: it is in page B0h")
    func limitsChanged() {
        calm()
        world.backstore.geometry.maximum_transfer = 4096
        world.unit.backstoreGeometryChanged()
        #expect(testUnitReady(world.a) == "6/3f03")
        #expect(testUnitReady(world.b) == "6/3f03")
    }

    @Test(
        "SBC-4 6.5.1: write protection that comes or goes is told by MODE PARAMETERS CHANGED: WP is in the mode header")
    func writeProtectionChanged() {
        calm()
        var configuration = world.unit.configuration
        configuration.readOnly = true
        world.unit.reconfigure(configuration)
        #expect(testUnitReady(world.a) == "6/2a01")
        let data = [UInt8](repeating: 1, count: 512)
        #expect(world.run(CDB.write(.ten, 0, 1), dataOut: data).summary == "7/2700")
        configuration.readOnly = false
        world.unit.reconfigure(configuration)
        #expect(testUnitReady(world.a) == "6/2a01")
        #expect(world.run(CDB.write(.ten, 0, 1), dataOut: data).summary == "good")
        world.backstore.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_WRITABLE)
        world.unit.backstoreGeometryChanged()
        #expect(testUnitReady(world.a) == "6/2a01")
    }

    @Test(
        "SAM-6 6.2: an initiator port that the target had to forget is told POWER ON, RESET, OR BUS DEVICE RESET OCCURRED"
    )
    func forgottenNexus() {
        calm()
        world.a.disconnect()
        world.b.disconnect()
        let others = (0..<Limits.nexusesPerTarget).map {
            MockPort(
                name: "C\($0)", target: world.target, journal: world.journal, violations: world.violations, tasks: 1)
        }
        for port in others { port.connect() }
        for port in others { port.disconnect() }
        world.a.connect()
        #expect(testUnitReady(world.a) == "6/2900")
        #expect(testUnitReady(world.a) == "good")
    }

    @Test("SAM-6 5.14: all conditions that can be pending at once are reported once each, in their order")
    func allConditions() {
        let established = UnitAttention.allCases
        for condition in established.reversed() { world.unit.establish(condition, for: 0) }
        // POWER ON, RESET, OR BUS DEVICE RESET OCCURRED was established last and implies all other resets.
        let expected = established.filter {
            !UnitAttention.powerOnOrReset.clears.contains($0)
        }
        for condition in expected {
            let code = String(UInt32(condition.code.rawValue) | 0x10000, radix: 16).dropFirst()
            #expect(testUnitReady(world.a) == "6/\(code)")
        }
        #expect(testUnitReady(world.a) == "good")
        #expect(testUnitReady(world.b) == "6/2901")
    }

    // MARK: QUERY ASYNCHRONOUS EVENT

    @Test(
        "SAM-6 7.10: QUERY ASYNCHRONOUS EVENT is FUNCTION COMPLETE if nothing is pending",
        .enabled(if: TestTarget.canSend(.queryAsynchronousEvent), "the transport has no QUERY ASYNCHRONOUS EVENT"))
    func nothingPending() {
        calm()
        world.a.manage(.queryAsynchronousEvent)
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        #expect(world.a.additionalResponse == 0)
    }

    @Test(
        "SAM-6 7.10: it is FUNCTION SUCCEEDED with UADE DEPTH, sense key and code if something is, and clears nothing",
        .enabled(if: TestTarget.canSend(.queryAsynchronousEvent), "the transport has no QUERY ASYNCHRONOUS EVENT"))
    func somethingPending() {
        world.a.manage(.queryAsynchronousEvent)
        #expect(world.a.additionalResponse == 0x16_2901)
        world.backstore.geometry.size += 512
        world.unit.backstoreGeometryChanged()
        world.a.manage(.queryAsynchronousEvent)
        #expect(world.a.answers.map(\.response) == [.functionSucceeded, .functionSucceeded])
        #expect(world.a.additionalResponse == 0x26_2901)
        #expect(testUnitReady(world.a) == "6/2901")
        #expect(testUnitReady(world.a) == "6/2a09")
    }

    @Test(
        "SAM-6 7.10: it is asked of one I_T_L nexus, and a LUN without a unit is INCORRECT LOGICAL UNIT NUMBER",
        .enabled(if: TestTarget.canSend(.queryAsynchronousEvent), "the transport has no QUERY ASYNCHRONOUS EVENT"))
    func pendingElsewhere() {
        calm()
        _ = world.addUnit(at: 1)
        _ = world.run(CDB.reportLUNs(), dataIn: 64)
        world.a.manage(.queryAsynchronousEvent)
        world.a.manage(.queryAsynchronousEvent, lun: 1 << 48)
        world.b.manage(.queryAsynchronousEvent)
        world.a.manage(.queryAsynchronousEvent, lun: 9 << 48)
        #expect(
            world.a.answers.map(\.response) == [.functionComplete, .functionSucceeded, .incorrectLogicalUnitNumber])
        #expect(world.b.answers.map(\.response) == [.functionSucceeded])
        #expect(world.b.additionalResponse == 0x16_3f0e)
    }
}
