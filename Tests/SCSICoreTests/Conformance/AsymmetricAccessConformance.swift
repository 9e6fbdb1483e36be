// SPC-4 5.15.2: asymmetric logical unit access, seen from two I_T nexuses through ports of two target port groups.

import CBackstore
import CoreTestSupport
import Testing

@testable import SCSICore

private typealias CDB = CoreTestSupport.CDB

@Suite("SPC-4 5.15.2: asymmetric logical unit access")
struct AsymmetricAccessConformance {
    /// A is at port 1, in group 1; B at port 2, in group 2. Port 3 is another device's.
    let world = TestTarget(
        savesState: true,
        portGroups: [
            TargetPortGroup(identifier: 1, ports: [1], isPreferred: true, isExplicit: true),
            TargetPortGroup(identifier: 2, ports: [3, 2], state: .activeNonOptimized, isExplicit: true),
            TargetPortGroup(identifier: 7, ports: [9]),
        ])

    private func testUnitReady(_ port: MockPort, lun: UInt64 = 0) -> String {
        world.run(CDB.testUnitReady, lun: lun, on: port).summary
    }

    private func calm() {
        for port in [world.a, world.b] { while world.attention(port).hasPrefix("6") {} }
        world.journal.entries = []
    }

    private func setState(_ state: AsymmetricAccessState, of group: UInt16 = 2) {
        #expect(world.target.setAccessState(state, ofPortGroup: group) == true)
        calm()
    }

    private func set(_ states: [(state: UInt8, group: UInt16)], on port: MockPort? = nil) -> String {
        let list = CDB.targetPortGroups(states)
        return world.run(CDB.setTargetPortGroups(listLength: list.count), dataOut: list, on: port).summary
    }

    /// Identifier, first byte and STATUS CODE of each group.
    private func reported(_ port: MockPort) -> [[UInt8]] {
        let data = world.run(CDB.reportTargetPortGroups(), dataIn: 255, on: port).data
        var groups: [[UInt8]] = []
        var offset = 4
        while offset < data.count {
            groups.append([data[offset + 3], data[offset], data[offset + 5]])
            offset += 8 + 4 * Int(data[offset + 7])
        }
        return groups
    }

    // MARK: What a state does

    @Test("SPC-4 5.15.2.4: a command is checked against the state of the group of the port that it came through")
    func byPort() {
        for (state, sense) in [
            (AsymmetricAccessState.standby, "2/040b"), (.unavailable, "2/040c"), (.transitioning, "2/040a"),
        ] {
            setState(state)
            #expect(testUnitReady(world.b) == sense)
            #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: world.b).summary == sense)
            #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "good")
        }
        setState(.activeOptimized)
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: world.b).summary == "good")
    }

    @Test("SPC-4 6.39: REQUEST SENSE says why the port is not ready, and INQUIRY works")
    func requestSense() {
        setState(.standby)
        #expect(world.attention(world.b) == "2/040b")
        #expect(world.attention(world.b) == "2/040b")
        #expect(world.attention(world.a) == "none")
        #expect(world.run(CDB.inquiry(), dataIn: 96, on: world.b).data[0] == 0)
    }

    @Test("SPC-4 5.15.2.4.5: in the unavailable state the PERIPHERAL QUALIFIER is 001b, through that port alone")
    func peripheralQualifier() {
        setState(.unavailable)
        for page in [nil, 0x00, 0x83] as [UInt8?] {
            #expect(world.run(CDB.inquiry(page: page), dataIn: 255, on: world.b).data[0] == 0x20)
            #expect(world.run(CDB.inquiry(page: page), dataIn: 255).data[0] == 0x00)
        }
        let standard = world.run(CDB.inquiry(), dataIn: 96, on: world.b).data
        #expect(Array(standard[1...]) == Array(world.run(CDB.inquiry(), dataIn: 96).data[1...]))
    }

    @Test("SAM-6 5.3.3: a reset, a reservation conflict, and another unit attention condition come before the state")
    func precedence() {
        #expect(world.reserveOut(.register, 0, 1) == "good")
        #expect(world.reserveOut(.reserve, 1, type: 3) == "good")
        setState(.standby)
        world.a.manage(.logicalUnitReset)
        let write = CDB.write(.ten, 0, 1)
        let block = [UInt8](repeating: 1, count: 512)
        #expect(world.run(write, dataOut: block, on: world.b).summary == "6/2903")
        #expect(world.run(write, dataOut: block, on: world.b).summary == "reservationConflict")
        world.backstore.geometry.size += 512
        world.unit.backstoreGeometryChanged()
        #expect(testUnitReady(world.b) == "6/2a09")
        #expect(testUnitReady(world.b) == "2/040b")
    }

    @Test("a stopped unit, and a protected one, are no matter to a port that is not active")
    func beforeReadiness() {
        #expect(world.run(CDB.startStopUnit(start: false)).summary == "good")
        setState(.standby)
        #expect(testUnitReady(world.b) == "2/040b")
        #expect(testUnitReady(world.a) == "2/0402")
        #expect(world.run(CDB.startStopUnit(start: true), on: world.b).summary == "2/040b")
    }

    @Test("SPC-4 5.15.2: a command that is enabled when the state changes ends normally, a dormant one is refused")
    func commandsInFlight() {
        let tags = [TaskAttribute.simple, .ordered, .ordered].map {
            world.b.send(CDB.read(.ten, 0, 1), attribute: $0, dataIn: 512)
        }
        world.target.setAccessState(.standby, ofPortGroup: 2)
        world.drain()
        let ends = tags.map { tag in world.b.completions.last { $0.tag == tag }?.summary }
        #expect(ends == ["good", "6/2a06", "2/040b"])
        #expect(world.backstore.accepted.count == 1)
    }

    @Test("SAM-6 7: task management functions work through a port in any state, and a reset leaves the state")
    func taskManagement() {
        setState(.unavailable)
        let tag = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.b.manage(.logicalUnitReset, cookie: 5)
        world.drain()
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "reset")
        #expect(world.b.answers.last?.response == .functionComplete)
        #expect(testUnitReady(world.b) == "6/2903")
        #expect(testUnitReady(world.b) == "2/040c")
    }

    @Test("a nexus that is lost and comes back finds the state of its port")
    func reconnection() {
        world.b.disconnect()
        world.target.setAccessState(.standby, ofPortGroup: 2)
        world.b.connect()
        #expect(testUnitReady(world.b) == "6/2907")
        #expect(testUnitReady(world.b) == "6/2a06")
        #expect(testUnitReady(world.b) == "2/040b")
    }

    @Test("a new unit has the states of its target's groups")
    func newUnit() {
        setState(.standby)
        _ = world.addUnit(at: 1)
        #expect(testUnitReady(world.b, lun: 1 << 48) == "6/2901")
        #expect(testUnitReady(world.b, lun: 1 << 48) == "2/040b")
        _ = world.run(CDB.requestSense(), lun: 1 << 48, dataIn: 18)
        #expect(testUnitReady(world.a, lun: 1 << 48) == "good")
    }

    // MARK: Who is told

    @Test("SPC-4 5.15.2.2: an implicit change is told to every nexus, once, by 2A/06 and by an event")
    func told() {
        world.target.setAccessState(.standby, ofPortGroup: 1)
        world.target.setAccessState(.activeOptimized, ofPortGroup: 1)
        #expect(world.journal.lines.filter { $0.contains("2a06") }.count == 4)
        for port in [world.a, world.b] {
            #expect(testUnitReady(port) == "6/2a06")
            #expect(testUnitReady(port) == "good")
        }
    }

    @Test("a target without groups has one that does not change")
    func symmetric() {
        let world = TestTarget()
        #expect(world.target.setAccessState(.standby, ofPortGroup: 1) == nil)
        #expect(world.run(CDB.testUnitReady).summary == "good")
        let data = world.run(CDB.reportTargetPortGroups(), dataIn: 255).data
        #expect(data == [0, 0, 0, 16, 0x00, 0x01, 0, 1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2])
    }

    @Test("a state that is set again is no change")
    func unchanged() {
        #expect(world.target.setAccessState(.activeNonOptimized, ofPortGroup: 2) == false)
        #expect(world.target.setAccessState(.standby, ofPortGroup: 3) == nil)
        #expect(set([(0x1, 2)]) == "good")
        for port in [world.a, world.b] { #expect(testUnitReady(port) == "good") }
        #expect(reported(world.a).map { $0[2] } == [0, 0, 0])
    }

    // MARK: REPORT TARGET PORT GROUPS

    @Test("SPC-4 6.37: REPORT TARGET PORT GROUPS: all groups, PREF, what is supported, and the ports; through any port")
    func report() {
        let groups: [UInt8] =
            [0x80, 0x8f, 0, 1, 0, 0, 0, 1] + [0, 0, 0, 1]
            + [0x02, 0x8f, 0, 2, 0, 2, 0, 2] + [0, 0, 0, 2] + [0, 0, 0, 3]
            + [0x00, 0x8f, 0, 7, 0, 0, 0, 1] + [0, 0, 0, 9]
        setState(.standby)
        for port in [world.a, world.b] {
            let short = world.run(CDB.reportTargetPortGroups(), dataIn: 255, on: port).data
            #expect(short == CDB.bytes(UInt64(groups.count), 4) + groups)
            let long = world.run(CDB.reportTargetPortGroups(extended: true), dataIn: 255, on: port).data
            #expect(long == CDB.bytes(UInt64(groups.count + 4), 4) + [0x10, 0, 0, 0] + groups)
        }
        setState(.unavailable)
        setState(.transitioning, of: 1)
        #expect(reported(world.b) == [[1, 0x8f, 2], [2, 0x03, 2], [7, 0x00, 0]])
        #expect(reported(world.a) == reported(world.b))
    }

    @Test("SPC-4 7.8.6: page 83h names the port and the group that the command came through")
    func designators() {
        for (port, expected) in [(world.a, [0, 1, 0, 1]), (world.b, [0, 2, 0, 2])] as [(MockPort, [UInt8])] {
            let page = world.run(CDB.inquiry(page: 0x83), dataIn: 255, on: port).data
            var found: [UInt8] = []
            var offset = 4
            while offset < page.count {
                if [0x14, 0x15].contains(page[offset + 1]) { found += page[(offset + 6)..<(offset + 8)] }
                offset += 4 + Int(page[offset + 3])
            }
            #expect(found == expected)
        }
    }

    // MARK: SET TARGET PORT GROUPS

    @Test("SPC-4 6.6.2: TPGS is 11b where a group can be set, 01b where none can")
    func targetPortGroupSupport() {
        #expect(world.run(CDB.inquiry(), dataIn: 96).data[5] & 0x30 == 0x30)
        world.target.setPortGroups([
            TargetPortGroup(identifier: 1, ports: [1]), TargetPortGroup(identifier: 2, ports: [2]),
        ])
        calm()
        #expect(world.run(CDB.inquiry(), dataIn: 96).data[5] & 0x30 == 0x10)
        #expect(set([(0x2, 2)]) == "5/2400 CDB 1.4")
    }

    @Test("SPC-4 6.45: SET TARGET PORT GROUPS changes the states; every nexus but its own is told by 2A/06")
    func setsStates() {
        #expect(set([(0x2, 1), (0x0, 2)], on: world.b) == "good")
        #expect(testUnitReady(world.b) == "good")
        #expect(testUnitReady(world.a) == "6/2a06")
        #expect(testUnitReady(world.a) == "2/040b")
        #expect(reported(world.b) == [[1, 0x82, 1], [2, 0x00, 1], [7, 0x00, 0]])
        #expect(reported(world.a) == reported(world.b))
    }

    @Test("of the other units, whose states change too, its nexus is told as all are")
    func otherUnits() {
        _ = world.addUnit(at: 1)
        for port in [world.a, world.b] { _ = world.run(CDB.requestSense(), lun: 1 << 48, dataIn: 18, on: port) }
        calm()
        #expect(set([(0x2, 2)]) == "good")
        #expect(testUnitReady(world.a) == "good")
        #expect(testUnitReady(world.a, lun: 1 << 48) == "6/2a06")
        #expect(testUnitReady(world.b) == "6/2a06")
        #expect(testUnitReady(world.b, lun: 1 << 48) == "6/2a06")
        #expect(testUnitReady(world.b, lun: 1 << 48) == "2/040b")
    }

    @Test("SPC-4 6.45: a list with an error changes nothing, and the field pointer names the field")
    func listErrors() {
        for (descriptor, sense) in [
            ((0x04, 2), "5/2600 list 8.3"), ((0x0e, 2), "5/2600 list 8.3"), ((0x0f, 2), "5/2600 list 8.3"),
            ((0x07, 2), "5/2600 list 8.3"), ((0x82, 2), "5/2600 list 8.7"), ((0x02, 3), "5/2600 list 10"),
            ((0x02, 7), "5/2600 list 10"),
        ] as [((UInt8, UInt16), String)] {
            #expect(set([(0x2, 1), descriptor]) == sense)
        }
        var list = CDB.targetPortGroups([(0x2, 2)])
        list[5] = 1
        #expect(world.run(CDB.setTargetPortGroups(listLength: 8), dataOut: list).summary == "5/2600 list 5")
        list[2] = 1
        #expect(world.run(CDB.setTargetPortGroups(listLength: 8), dataOut: list).summary == "5/2600 list 2")
        #expect(reported(world.a) == [[1, 0x80, 0], [2, 0x01, 0], [7, 0x00, 0]])
        for port in [world.a, world.b] { #expect(testUnitReady(port) == "good") }
    }

    @Test("SPC-4 6.45: no list, and a list without descriptors, are no error; other lengths are")
    func lengths() {
        #expect(world.run(CDB.setTargetPortGroups(listLength: 0)).summary == "good")
        #expect(world.run(CDB.setTargetPortGroups(listLength: 4), dataOut: [0, 0, 0, 0]).summary == "good")
        for length in [1, 3, 5, 7, 4 + 17 * 4, 0xffff_fffc] {
            let list = [UInt8](repeating: 0, count: min(length, 256))
            #expect(
                world.run(CDB.setTargetPortGroups(listLength: length), dataOut: list).summary == "5/2400 CDB 6",
                "\(length)")
        }
        #expect(world.run(CDB.setTargetPortGroups(listLength: 8), dataOut: [0, 0, 0, 0]).summary == "overrun")
    }

    @Test("a nexus whose port is unavailable can make it available again; one in transition cannot")
    func throughItsOwnPort() {
        setState(.unavailable)
        #expect(set([(0x0, 2)], on: world.b) == "good")
        #expect(testUnitReady(world.b) == "good")
        setState(.transitioning)
        #expect(set([(0x0, 2)], on: world.b) == "2/040a")
    }

    @Test("a transition that the target has begun is not ended by SET TARGET PORT GROUPS through another port")
    func duringTransition() {
        setState(.transitioning)
        #expect(set([(0x1, 1), (0x0, 2)]) == "2/040a")
        #expect(reported(world.a) == [[1, 0x80, 0], [2, 0x0f, 2], [7, 0x00, 0]])
        setState(.standby)
        #expect(set([(0x1, 1), (0x0, 2)]) == "good")
    }

    // MARK: Reservations

    @Test("SPC-4 5.13: a reservation is kept, taken and preempted through ports in the standby state")
    func reservations() {
        setState(.standby)
        #expect(world.reserveOut(.register, 0, 1) == "good")
        #expect(world.reserveOut(.register, 0, 2, on: world.b) == "good")
        #expect(world.reserveOut(.reserve, 1, type: 1) == "good")
        #expect(world.reserveOut(.preempt, 2, 1, type: 1, on: world.b) == "good")
        #expect(world.readReservation(on: world.b)?.key == 2)
        #expect(world.readKeys(on: world.b).keys == [2])
        #expect(set([(0x2, 1), (0x0, 2)], on: world.a) == "reservationConflict")
        #expect(set([(0x2, 1), (0x0, 2)], on: world.b) == "good")
        #expect(
            world.run(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512), on: world.b).summary == "good")
    }

    // MARK: Other groups

    @Test("other groups or ports are told by 2A/06 and 3F/03; states that stay keep their STATUS CODE")
    func replaced() {
        #expect(set([(0x1, 1)]) == "good")
        calm()
        world.target.setPortGroups([
            TargetPortGroup(identifier: 2, ports: [2], state: .standby),
            TargetPortGroup(
                identifier: 1, ports: [4, 1], state: .activeNonOptimized, isPreferred: true, isExplicit: true),
        ])
        #expect(testUnitReady(world.b) == "6/3f03")
        #expect(testUnitReady(world.b) == "6/2a06")
        #expect(testUnitReady(world.b) == "2/040b")
        _ = world.attention(world.a)
        _ = world.attention(world.a)
        #expect(reported(world.a) == [[1, 0x81, 1], [2, 0x02, 2]])
        #expect(world.target.portGroups.map(\.ports) == [[1, 4], [2]])
    }

    @Test("the same groups again are nothing to tell; another preference alone is told by 2A/06")
    func sameAgain() {
        var groups = world.target.portGroups
        world.target.setPortGroups(groups)
        for port in [world.a, world.b] { #expect(testUnitReady(port) == "good") }
        groups[0].isPreferred = false
        world.target.setPortGroups(groups)
        for port in [world.a, world.b] {
            #expect(testUnitReady(port) == "6/2a06")
            #expect(testUnitReady(port) == "good")
        }
    }
}
