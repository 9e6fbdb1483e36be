// Reservations for others than initiators: shown, taken to another target, cleared.

import CoreTestSupport
import Testing

@testable import SCSICore

private typealias CDB = CoreTestSupport.CDB

@Suite("Reservations that leave the target")
struct ReservationTransferTests {
    private final class Ends { var all: [ReservationTransferError?] = [] }

    private let world = TestTarget(savesState: true)
    private let ends = Ends()

    private func reserve(flags: UInt8 = 0) {
        world.reserveOut(.register, 0, 0xa, flags: flags)
        world.reserveOut(.register, 0, 0xb, flags: flags, on: world.b)
        world.reserveOut(.reserve, 0xa, type: 3)
    }

    @Test("what is exported is imported by the unit of the same name, and the holder goes on there")
    func moves() {
        reserve(flags: 1)
        let other = TestTarget(savesState: true)
        other.unit.importReservations(world.unit.exportedReservations) { [ends] in ends.all.append($0) }
        #expect(ends.all.isEmpty)
        other.drain()
        #expect(ends.all == [nil])
        #expect(other.unit.reservationStatus == world.unit.reservationStatus)
        #expect(other.run(CDB.read(.ten, 0, 1), dataIn: 512, on: other.b).summary == "reservationConflict")
        #expect(other.reserveOut(.release, 0xa, type: 3) == "good")
        // It survives a power loss there, too.
        let next = TestTarget(savesState: true, kept: other.store?.kept)
        #expect(next.readKeys().keys == [0xa, 0xb])
    }

    @Test("without APTPL nothing is saved, and a unit without a store takes them")
    func movesVolatile() {
        reserve()
        let other = TestTarget()
        other.unit.importReservations(world.unit.exportedReservations) { [ends] in ends.all.append($0) }
        #expect(ends.all == [nil])
        #expect(other.unit.reservationStatus == world.unit.reservationStatus)
    }

    @Test("what shows a unit: who is registered, by name and TransportID, who holds, what type")
    func status() {
        reserve(flags: 1)
        let status = world.unit.reservationStatus
        #expect(status.registrants.map(\.name) == ["A", "B"])
        #expect(status.registrants.map(\.isHolder) == [true, false])
        #expect(status.registrants.map(\.key) == [0xa, 0xb])
        #expect(status.registrants[0].initiatorPort == TransportIdentifier.address(of: "A"))
        #expect(status.type == 3)
        #expect(status.generation == 2)
        #expect(status.persists)
    }

    @Test("refused, with nothing changed: bytes of others, no store for APTPL, an SPC-2 reservation, a failed save")
    func refusals() {
        reserve(flags: 1)
        let exported = world.unit.exportedReservations
        let other = TestTarget()
        for bytes in [[], Array(exported.dropLast()), Array("nothing of the kind".utf8)] {
            other.unit.importReservations(bytes) { [ends] in ends.all.append($0) }
            guard case .invalid? = ends.all.removeLast() else {
                Issue.record("imported")
                return
            }
        }
        other.unit.importReservations(UnitState(name: other.unit.configuration.name).encoded) { [ends] in
            ends.all.append($0)
        }
        other.unit.importReservations(exported) { [ends] in ends.all.append($0) }
        #expect(ends.all == [.invalid(.damaged("there are no reservations in it")), .notPersistent])
        #expect(other.readKeys().keys == [])

        let third = TestTarget(savesState: true)
        _ = third.run([0x16, 0, 0, 0, 0, 0])
        third.unit.importReservations(exported) { [ends] in ends.all.append($0) }
        #expect(ends.all.last == .some(.reserved))
        _ = third.run([0x17, 0, 0, 0, 0, 0])
        third.store?.errors = [5]
        third.unit.importReservations(exported) { [ends] in ends.all.append($0) }
        third.drain()
        #expect(ends.all.last == .some(.notSaved(5)))
        #expect(third.readKeys().keys == [])
    }

    @Test("clearing tells each registrant, waits for a service that is being saved, and is durable")
    func clears() {
        reserve(flags: 1)
        world.a.send(CDB.persistentReserveOut(.register), dataOut: ReservationParameters(0xa, 0xaa, flags: 1).bytes)
        world.unit.clearReservations { [ends] in ends.all.append($0) }
        #expect(ends.all.isEmpty)
        world.drain()
        #expect(world.a.completions.last?.summary == "good")
        #expect(ends.all == [nil])
        #expect(world.attention(world.a) == "6/2a03")
        #expect(world.attention(world.b) == "6/2a03")
        #expect(world.readKeys().keys == [])
        #expect(TestTarget(savesState: true, kept: world.store?.kept).readKeys().keys == [])
    }
}
