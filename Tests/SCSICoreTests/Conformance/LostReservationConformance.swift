// SPC-4 5.13.5.3, 5.13.11.3: the state of a unit is damaged, so that nobody knows which persistent reservation there
// was.

import CoreTestSupport
import Testing

@testable import SCSICore

private typealias CDB = CoreTestSupport.CDB

@Suite("SPC-4 5.13.5.3: persistent reservations that are lost")
struct LostReservationConformance {
    /// What a unit with one registration and a reservation kept, with one bit of it changed.
    private static func damagedState() -> [UInt8] {
        let world = TestTarget(savesState: true)
        world.reserveOut(.register, 0, 0xa, flags: 0x01)
        world.reserveOut(.reserve, 0xa, type: 3)
        var bytes = world.store!.kept!
        bytes[bytes.count / 2] ^= 0x10
        return bytes
    }

    private let world = TestTarget(kept: damagedState())
    private static let lost = "7/4401"

    @Test("every command but those of SPC-4 5.13.5.2 is DATA PROTECT, PERSISTENT RESERVATION INFORMATION LOST")
    func refuses() {
        // Operation codes, or operation code and service action, that the clause names; and REPLACE LOST RESERVATION.
        let passing: [[UInt16]] = [
            [0x12], [0x4d], [0x3c], [0x9b], [0xa0], [0xa3, 0x0a], [0x03], [0x1b], [0x3b], [0x5f, 0x08],
        ]
        for row in world.unit.table.all {
            let passes = passing.contains {
                $0[0] == row.operationCode && ($0.count == 1 || $0[1] == row.serviceAction)
            }
            var cdb = (0..<Int(row.length)).map { $0 < 2 ? row.usageByte($0) & ($0 == 1 ? 0x1f : 0xff) : 0 }
            if !row.hasServiceAction { cdb[1] = 0 }
            if row.operationCode == 0x7f {
                // Byte 1 is CONTROL there: no NACA.
                cdb[1] = 0
                cdb.replaceSubrange(7..<10, with: [0x18, 0, UInt8(row.serviceAction)])
            }
            let end = world.run(cdb, dataOut: Array(repeating: 0, count: 512), dataIn: 4096, on: world.b)
            // A list of no bytes; a stop, which the clause does not name.
            let stops = row.operationCode == 0x1b
            #expect((end.summary == Self.lost) == (!passes || stops), "\(row.handler): \(end.summary)")
        }
        #expect(world.backstore.accepted.isEmpty)
        #expect(world.reserveOut(.register, 0, 0xa) == Self.lost)
        #expect(world.unit.reservationStatus.areLost)
    }

    @Test("START STOP UNIT: START with no power condition passes, everything else does not")
    func startStop() {
        for (modifier, byte) in [(0, 0x01), (0, 0x05)] as [(UInt8, UInt8)] {
            #expect(world.run([0x1b, 0, 0, modifier, byte, 0]).summary == "good")
        }
        for byte in [0x00, 0x02, 0x10, 0x11, 0x20, 0x30, 0x70] as [UInt8] {
            #expect(world.run([0x1b, 0, 0, 0, byte, 0]).summary == (byte == 0x02 ? "5/2400 CDB 4.1" : Self.lost))
        }
    }

    @Test("REPLACE LOST RESERVATION registers its nexus, which holds the reservation; commands are served again")
    func replaces() {
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xc, type: 3, on: world.b) == "good")
        #expect(world.readKeys().keys == [0xc])
        #expect(world.readKeys().generation == 0)
        #expect(world.readReservation()?.key == 0xc)
        #expect(world.readReservation()?.type == 3)
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: world.b).summary == "good")
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "reservationConflict")
        for port in [world.a, world.b] { #expect(world.attention(port) == "none") }
        #expect(!world.unit.reservationStatus.areLost)
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xd, type: 3) == "reservationConflict")
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xd, type: 3, on: world.b) == "5/2604")
    }

    @Test("what replaces is saved, APTPL or not: the next life has lost nothing", arguments: [0, 1] as [UInt8])
    func saved(flags: UInt8) {
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xc, type: 5, flags: flags) == "good")
        #expect(world.store?.saves == 1)
        let next = TestTarget(kept: world.store!.kept!)
        #expect(!next.unit.reservationStatus.areLost)
        #expect(next.readKeys().keys == (flags == 1 ? [0xc] : []))
        #expect(next.run(CDB.testUnitReady).summary == "good")
    }

    @Test("a replacement that cannot be saved is none, and the unit goes on refusing; so does its next life")
    func notSaved() {
        world.store?.errors = [5]
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xc, type: 3) == "4/4400")
        #expect(world.run(CDB.testUnitReady).summary == Self.lost)
        #expect(TestTarget(kept: world.store!.kept!).run(CDB.testUnitReady).summary == Self.lost)
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xc, type: 3) == "good")
    }

    @Test("of two that replace at the same time the second finds nothing lost")
    func twice() {
        let list = ReservationParameters(0, 0xc).bytes
        let before = world.a.completions.count
        world.a.send(CDB.persistentReserveOut(.replaceLostReservation, type: 1), dataOut: list)
        world.b.send(CDB.persistentReserveOut(.replaceLostReservation, type: 1), dataOut: list)
        #expect(world.a.completions.count == before)
        world.drain()
        #expect(world.a.completions.last?.summary == "good")
        #expect(world.b.completions.last?.summary == "reservationConflict")
    }

    @Test("a key or a type that cannot be meant is refused, and never with RESERVATION CONFLICT")
    func badParameters() {
        #expect(world.reserveOut(.replaceLostReservation, 0xa, 0xc, type: 3) == "5/2600 list 0")
        #expect(world.reserveOut(.replaceLostReservation, 0, 0, type: 3) == "5/2600 list 8")
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xc, type: 2) == "5/2400 CDB 2.3")
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xc, type: 0x13) == "5/2400 CDB 2.4")
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xc, type: 3, flags: 0x08) == "5/2600 list 20.3")
        #expect(world.reserveOut(.replaceLostReservation, 0, 0xc, type: 3, flags: 0x02) == "5/2600 list 20.1")
        #expect(world.run(CDB.testUnitReady).summary == Self.lost)
    }

    @Test("resets and nexus losses do not end the condition; a unit attention condition is reported before it")
    func lasts() {
        world.a.manage(.logicalUnitReset)
        #expect(world.run(CDB.testUnitReady).summary == "6/2903")
        #expect(world.run(CDB.testUnitReady).summary == Self.lost)
        world.b.disconnect()
        world.b.connect()
        var ends: [String] = []
        repeat { ends.append(world.run(CDB.testUnitReady, on: world.b).summary) } while ends.last!.hasPrefix("6/")
        #expect(ends == ["6/2903", "6/2907", Self.lost])
    }

    @Test("an operator may clear what is lost, or import what another target had")
    func operators() {
        var ends: [ReservationTransferError?] = []
        world.unit.clearReservations { ends.append($0) }
        world.drain()
        #expect(ends == [nil])
        #expect(world.run(CDB.testUnitReady).summary == "good")
        #expect(!TestTarget(kept: world.store!.kept!).unit.reservationStatus.areLost)

        let source = TestTarget(savesState: true)
        source.reserveOut(.register, 0, 0xa, flags: 0x01)
        let next = TestTarget(kept: Self.damagedState())
        next.unit.importReservations(source.unit.exportedReservations) { ends.append($0) }
        next.drain()
        #expect(ends == [nil, nil])
        #expect(next.readKeys().keys == [0xa])
    }

    @Test("RLR_C is one, and REPORT SUPPORTED OPERATION CODES has the service; without a store neither")
    func capabilities() {
        for isKept in [true, false] {
            let world = TestTarget(savesState: isKept)
            #expect(world.run(CDB.persistentReserveIn(2), dataIn: 8).data[2] == (isKept ? 0x9d : 0x1c))
            let report = world.run([0xa3, 0x0c, 0x02, 0x5f, 0, 0x08, 0, 0, 0, 64, 0, 0], dataIn: 64).data
            #expect(report[1] & 0x07 == (isKept ? 3 : 1))
        }
    }
}
