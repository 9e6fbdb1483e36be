// Which commands each asymmetric access state lets through: the lists of SPC-4 5.15.2.4, and each command of the table
// sent through a port in each state.

import CoreTestSupport
import Testing

@testable import SCSICore

private typealias CDB = CoreTestSupport.CDB

/// Operation codes, or operation code and service action.
private let transition: [[UInt16]] = [
    [0x12], [0xa0], [0x03], [0xa3, 0x0a], [0x3c, 0x0a], [0x3c, 0x0b], [0x9b, 0x0a], [0x9b, 0x0b], [0x3b, 0x0a],
]
private let unavailable = transition + [[0xa4, 0x0a]]
/// The last two are not in the list, which lets a target have more.
private let standby =
    unavailable + [
        [0x4c], [0x4d], [0x15], [0x55], [0x1a], [0x5a], [0x1c], [0x1d], [0x5e], [0x5f], [0x25], [0x9e, 0x10],
    ]

/// A state, what it lets through, and why others are refused.
private let states: [AsymmetricAccessState: (passing: [[UInt16]]?, sense: String)] = [
    .activeOptimized: (nil, ""), .activeNonOptimized: (nil, ""), .standby: (standby, "2/040b"),
    .unavailable: (unavailable, "2/040c"), .transitioning: (transition, "2/040a"),
]

@Suite("SPC-4 5.15.2.4: commands that are carried out in each asymmetric access state")
struct AsymmetricAccessMatrix {
    private static func makeWorld() -> TestTarget {
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "SERIAL0001")
        configuration.removable = true
        return TestTarget(
            configuration: configuration, savesState: true,
            portGroups: [
                TargetPortGroup(identifier: 1, ports: [1]),
                TargetPortGroup(identifier: 2, ports: [2], isExplicit: true),
            ])
    }

    /// A CDB of a row with all parameters zero.
    private static func plain(_ row: CommandDescriptor) -> [UInt8] {
        var cdb = [UInt8](repeating: 0, count: Int(row.length))
        cdb[0] = row.operationCode
        if row.operationCode == 0x7f {
            cdb.replaceSubrange(7..<10, with: [0x18, 0, UInt8(row.serviceAction)])
        } else if row.hasServiceAction {
            cdb[1] = UInt8(row.serviceAction)
        }
        return cdb
    }

    @Test("each state × each command, through a port in that state and through another", arguments: states.keys)
    func matrix(state: AsymmetricAccessState) {
        let (passing, sense) = states[state]!
        for row in CommandTable(features: .all).all where row.handler != .writeAtomic && row.handler != .unmap {
            let passes =
                passing?.contains {
                    $0[0] == row.operationCode && ($0.count == 1 || $0[1] == row.serviceAction)
                } ?? true
            // The command that one port refuses may change what the other finds: each has a world of its own.
            for (throughGroup, expected) in [(true, !passes), (false, false)] {
                let world = Self.makeWorld()
                world.target.setAccessState(state, ofPortGroup: 2)
                for port in [world.a, world.b] { _ = world.attention(port) }
                let before = world.backstore.accepted.count
                let end = world.run(
                    Self.plain(row), dataOut: Array(repeating: 0, count: 512), dataIn: 4096,
                    on: throughGroup ? world.b : world.a)
                #expect((end.summary == sense) == expected, "\(row.handler), \(state): \(end.summary)")
                #expect(end.sense?.key != 2 || expected, "\(row.handler), \(state): \(end.summary)")
                if expected { #expect(world.backstore.accepted.count == before, "\(row.handler) reached the medium") }
            }
        }
    }

    @Test("a command that is unknown is refused for that, in every state", arguments: states.keys)
    func unknown(state: AsymmetricAccessState) {
        let world = Self.makeWorld()
        world.target.setAccessState(state, ofPortGroup: 2)
        _ = world.attention(world.b)
        #expect(world.run([0xff, 0, 0, 0, 0, 0], on: world.b).summary == "5/2000 CDB 0")
    }
}
