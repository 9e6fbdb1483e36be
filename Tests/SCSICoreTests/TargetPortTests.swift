// Target ports: page 83h, page 88h, REPORT TARGET PORT GROUPS, and what they have in common.
//
// Must not know: how identifiers are computed.

import CoreTestSupport
import Testing

@testable import SCSICore

@Suite("Target ports")
struct TargetPortTests {
    let world = TestTarget()
    /// An initiator at the target's second port.
    let other: MockPort

    init() {
        other = MockPort(name: "C", target: world.target, journal: world.journal, violations: world.violations)
        other.targetPort = 2
        other.connect()
        #expect(world.run(CDB.testUnitReady, on: other).summary == "6/2901")
    }

    /// The designators of page 83h: association and type, value.
    private func designators(_ port: MockPort) -> [(kind: [UInt8], value: [UInt8])] {
        var rest = world.run(CDB.inquiry(page: 0x83), dataIn: 255, on: port).data[4...]
        var list: [(kind: [UInt8], value: [UInt8])] = []
        while rest.count >= 4 {
            let bytes = Array(rest)
            list.append((kind: Array(bytes[..<2]), value: Array(bytes[4..<4 + Int(bytes[3])])))
            rest = rest.dropFirst(4 + Int(bytes[3]))
        }
        return list
    }

    private func identifier(_ port: MockPort) -> [UInt8] {
        let value = designators(port).first { $0.kind == [0x01, 0x14] }?.value ?? []
        return Array(value.suffix(2))
    }

    private func portName(_ port: MockPort) -> [UInt8] { designators(port).first { $0.kind == [0x01, 0x13] }!.value }

    /// The ports of REPORT TARGET PORT GROUPS.
    private func reported(extended: Bool = false) -> [[UInt8]] {
        let data = world.run(CDB.reportTargetPortGroups(extended: extended), dataIn: 255).data
        let ports = Array(data[(extended ? 16 : 12)...])
        return stride(from: 0, to: ports.count, by: 4).map { Array(ports[$0 + 2..<$0 + 4]) }
    }

    @Test("Page 83h names the port that the command came through; the rest is equal through every port")
    func designatorsByPort() {
        let kinds: [[UInt8]] = [[1, 3], [2, 1], [1, 0x13], [1, 0x14], [1, 0x15], [1, 0x23]]
        #expect(designators(world.a).map(\.kind) == kinds)
        #expect(identifier(world.a) == [0, 1])
        #expect(identifier(other) == [0, 2])
        #expect(portName(world.a) != portName(other))
        #expect(portName(world.a)[0] >> 4 == 3)
        for index in [0, 1, 4, 5] {
            #expect(designators(world.a)[index].value == designators(other)[index].value)
        }
    }

    @Test("Page 88h and REPORT TARGET PORT GROUPS list the same ports as page 83h names")
    func lists() {
        let expected = [identifier(world.a), identifier(other)]
        #expect(reported() == expected)
        #expect(reported(extended: true) == expected)
        let page = world.run(CDB.inquiry(page: 0x88), dataIn: 255).data
        #expect(page.count == 4 + 2 * 24)
        let names = [identifier(world.a): portName(world.a), identifier(other): portName(other)]
        for (index, port) in expected.enumerated() {
            let entry = Array(page[(4 + index * 24)..<(28 + index * 24)])
            #expect(entry == [0, 0] + port + [0, 0, 0, 0, 0, 0, 0, 12, 0x01, 0x13, 0, 8] + names[port]!)
        }
    }

    @Test("REPORT TARGET PORT GROUPS: one group, active and optimized, in both formats")
    func group() {
        let data = world.run(CDB.reportTargetPortGroups(), dataIn: 255).data
        #expect(Array(data[..<12]) == [0, 0, 0, 16, 0x00, 0x01, 0, 1, 0, 0, 0, 2])
        let extended = world.run(CDB.reportTargetPortGroups(extended: true), dataIn: 255).data
        #expect(Array(extended[..<16]) == [0, 0, 0, 20, 0x10, 0, 0, 0, 0x00, 0x01, 0, 1, 0, 0, 0, 2])
        #expect(world.run([0xa3, 0x4a] + Array(repeating: 0, count: 10), dataIn: 255).summary == "5/2400 CDB 1.6")
    }

    @Test("TPGS says that there is the command, and not on a LUN without a unit")
    func inquiryBit() {
        #expect(world.run(CDB.inquiry(), dataIn: 96).data[5] >> 4 & 3 == 1)
        #expect(world.run(CDB.inquiry(), lun: 9 << 48, dataIn: 96).data[5] >> 4 & 3 == 0)
    }

    @Test("The ports of a target are the same at each start, and other than those of another target")
    func stable() {
        #expect(TargetPorts(target: 1, count: 2).all == TargetPorts(target: 1, count: 2).all)
        #expect(TargetPorts(target: 1, count: 3).all.map(\.relativeIdentifier) == [1, 2, 3])
        let names = (1...9 as ClosedRange<UInt64>).flatMap { TargetPorts(target: $0, count: 3).all.map(\.name) }
        #expect(Set(names).count == names.count)
    }

    @Test("Page 87h: the mode pages are shared by all nexuses")
    func modePagePolicy() {
        #expect(world.run(CDB.inquiry(page: 0x87), dataIn: 255).data == [0, 0x87, 0, 4, 0x3f, 0xff, 0, 0])
    }

    @Test("Pages 92h and B7h claim nothing that is not there")
    func emptyPages() {
        #expect(world.run(CDB.inquiry(page: 0x92), dataIn: 255).data == [0, 0x92, 0, 4, 0, 0, 0, 0])
        let limits = world.run(CDB.inquiry(page: 0xb7), dataIn: 255).data
        #expect(limits == [0, 0xb7, 0, 60] + [UInt8](repeating: 0, count: 60))
    }
}
