// StateFuzzer: what a logical unit finds of its earlier life: a file that anything may have happened to.
//
// Oracles: what is accepted reads the same when it is written again; a unit with that state answers the commands that
// show it, and what it saves in turn can be read.
//
// Called by: libFuzzer. Must not know: what the sections mean.

import CBackstore
import CoreTestSupport

@testable import SCSICore

enum StateFuzzer {
    private static let name: UInt64 = 0x3001_4054_0000_0001

    static func run(_ input: FuzzInput) {
        var input = input
        // Most inputs are sections with a right frame around them, for a checksum is hard to guess.
        let bytes = input.rarely(8) ? input.remainder() : framed(&input)
        guard let state = try? UnitState(parsing: bytes, name: name) else { return }
        precondition(state.encoded == bytes, "a state reads as something else")
        serve(bytes)
    }

    private static func framed(_ input: inout FuzzInput) -> [UInt8] {
        var sections: [(kind: UInt16, version: UInt16, bytes: [UInt8])] = []
        for kind in 1...4 as ClosedRange<UInt16> where input.flag() {
            let version: UInt16 = input.rarely(16) ? 2 : 1
            sections.append((kind, version, input.bytes(Int(input.number(UInt16.self) & 0x3ff))))
        }
        var bytes = Array("SCSIUNIT".utf8)
        let length = sections.reduce(32) { $0 + 8 + $1.bytes.count }
        bytes.append(bigEndian: UInt32(1))
        bytes.append(bigEndian: UInt32(length))
        bytes.append(bigEndian: name)
        bytes.append(bigEndian: UInt32(sections.count))
        for section in sections {
            bytes.append(bigEndian: section.kind)
            bytes.append(bigEndian: section.version)
            bytes.append(bigEndian: UInt32(section.bytes.count))
            bytes += section.bytes
        }
        bytes.append(bigEndian: UnitState.checksum(bytes[...]))
        return bytes
    }

    /// A unit of that state shows it, and saves it again.
    private static func serve(_ bytes: [UInt8]) {
        let world = TestTarget(
            configuration: LogicalUnitConfiguration(name: name, serial: "SERIAL0001"), kept: bytes)
        for service in 0...3 as ClosedRange<UInt8> { show(world, CDB.persistentReserveIn(service)) }
        for control in [0, 2, 3] as [UInt8] { show(world, CDB.modeSense10(0x3f, 0xff, control: control)) }
        show(world, [0xa3, 0x05, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0])
        for port in [world.a, world.b] {
            let list = ReservationParameters(0, 5, flags: 1).bytes
            _ = world.run(CDB.persistentReserveOut(.registerAndIgnoreExistingKey), dataOut: list, on: port)
        }
        let list = world.run(CDB.modeSense10(0x08)).data
        if list.count > 1 {
            _ = world.run(CDB.modeSelect10(listLength: list.count, flags: 0x11), dataOut: [0, 0] + list.dropFirst(2))
        }
        guard let kept = world.store?.kept else { return }
        precondition((try? UnitState(parsing: kept, name: name)) != nil, "what the unit has saved cannot be read")
    }

    private static func show(_ world: TestTarget, _ cdb: [UInt8]) { _ = world.run(cdb, dataIn: 8192) }
}
