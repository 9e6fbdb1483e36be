// SPC-4 5.13.5, APTPL: registrations and reservations over power loss, with the power gone at each point.

import CoreTestSupport
import Testing

@testable import SCSICore

private typealias CDB = CoreTestSupport.CDB

@Suite("SPC-4 5.13.5: persistent reservations through power loss")
struct PersistThroughPowerLossConformance {
    let world = TestTarget(savesState: true)

    /// What initiators can see of the reservations.
    private struct View: Equatable {
        var keys: [UInt64]
        var type: UInt8?
        var holderKey: UInt64?

        init(_ world: TestTarget) {
            let table = world.unit.reservations.table
            keys = table.registrations.map(\.key)
            type = table.type?.rawValue
            holderKey = table.holder.flatMap(table.registration)?.key
        }
    }

    /// The next life of the unit, with what the store held at this moment.
    private func afterPowerLoss(of world: TestTarget) -> TestTarget {
        TestTarget(savesState: true, kept: world.store?.kept)
    }

    @Test("APTPL: what was registered and reserved is there after power on, before the first command")
    func restores() {
        world.reserveOut(.register, 0, 0xa, flags: 0x01)
        world.reserveOut(.reserve, 0xa, type: 3)
        let next = afterPowerLoss(of: world)
        #expect(next.run(CDB.read(.ten, 0, 1), dataIn: 512, on: next.b).summary == "reservationConflict")
        #expect(next.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "good")
        #expect(next.readKeys().keys == [0xa])
        #expect(next.readReservation()?.key == 0xa)
        #expect(next.run(CDB.persistentReserveIn(2), dataIn: 8).data[3] & 1 == 1)
    }

    @Test("PRGENERATION begins again at power on")
    func generation() {
        world.reserveOut(.register, 0, 0xa, flags: 0x01)
        world.reserveOut(.register, 0xa, 0xb, flags: 0x01)
        let next = afterPowerLoss(of: world)
        #expect(next.readKeys().generation == 0)
    }

    @Test("without APTPL nothing survives, and nothing is saved")
    func withoutPersistence() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.reserve, 0xa, type: 3)
        #expect(world.store?.saves == 0)
        #expect(View(afterPowerLoss(of: world)).keys == [])
    }

    @Test("the last APTPL counts, whichever nexus sent it")
    func lastCounts() {
        world.reserveOut(.register, 0, 0xa, flags: 0x01)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        #expect(View(afterPowerLoss(of: world)).keys == [])
        world.reserveOut(.register, 0xb, 0xbb, flags: 0x01, on: world.b)
        #expect(View(afterPowerLoss(of: world)).keys == [0xa, 0xbb])
    }

    @Test("GOOD comes when the change is durable, and until then everybody sees what was before")
    func goodIsDurable() {
        let tag = world.a.send(
            CDB.persistentReserveOut(.register), dataOut: ReservationParameters(0, 0xa, flags: 0x01).bytes)
        #expect(world.a.tagsInFlight == [tag])
        world.b.send(CDB.persistentReserveIn(0), dataIn: 64)
        #expect(world.b.completions.last?.data == CDB.bytes(0, 8))
        #expect(world.store?.kept == nil)
        world.drain()
        #expect(world.a.completions.last?.summary == "good")
        #expect(world.store?.saves == 1)
        #expect(world.readKeys().keys == [0xa])
    }

    @Test("a service that comes while another is being saved waits, and then sees its result")
    func waits() {
        world.a.send(CDB.persistentReserveOut(.register), dataOut: ReservationParameters(0, 0xa, flags: 0x01).bytes)
        world.b.send(CDB.persistentReserveOut(.register), dataOut: ReservationParameters(0, 0xb, flags: 0x01).bytes)
        world.b.send([0x16, 0, 0, 0, 0, 0])
        #expect(world.b.tagsInFlight.count == 2)
        world.drain()
        #expect(world.b.completions.suffix(2).map(\.summary) == ["good", "reservationConflict"])
        #expect(world.readKeys().keys == [0xa, 0xb])
        #expect(View(afterPowerLoss(of: world)).keys == [0xa, 0xb])
    }

    @Test("what cannot be saved does not happen: CHECK CONDITION, and everything is as it was")
    func saveFails() {
        world.reserveOut(.register, 0, 0xa, flags: 0x01)
        let before = View(world)
        for (error, end) in [(5, "4/4400"), (28, "5/5503")] as [(Int32, String)] {
            world.store?.errors = [error]
            #expect(world.reserveOut(.reserve, 0xa, type: 3) == end)
            #expect(View(world) == before)
            #expect(View(afterPowerLoss(of: world)) == before)
            world.store?.errors = [error]
            #expect(world.reserveOut(.preemptAndAbort, 0xa, 0xa) == end)
            #expect(View(world) == before)
        }
        #expect(world.reserveOut(.reserve, 0xa, type: 3) == "good")
        #expect(View(afterPowerLoss(of: world)).type == 3)
    }

    @Test("an aborted service whose change is on its way happens, and the abort is answered after it")
    func abortedWhileSaving() {
        let tag = world.a.send(
            CDB.persistentReserveOut(.register), dataOut: ReservationParameters(0, 0xa, flags: 0x01).bytes)
        world.a.manage(.abortTask, tag: tag)
        #expect(world.a.answers.isEmpty)
        world.drain()
        #expect(world.a.completions.last?.summary == "aborted")
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        #expect(world.readKeys().keys == [0xa])
    }

    @Test("an aborted service that still waits for an earlier one never happens")
    func abortedWhileWaiting() {
        world.a.send(CDB.persistentReserveOut(.register), dataOut: ReservationParameters(0, 0xa, flags: 0x01).bytes)
        let tag = world.b.send(
            CDB.persistentReserveOut(.register), dataOut: ReservationParameters(0, 0xb, flags: 0x01).bytes)
        world.b.manage(.abortTask, tag: tag)
        #expect(world.b.answers.map(\.response) == [.functionComplete])
        world.drain()
        #expect(world.readKeys().keys == [0xa])
    }

    @Test("a logical unit that is removed while its state is being saved ends the save first")
    func removedWhileSaving() {
        world.a.send(CDB.persistentReserveOut(.register), dataOut: ReservationParameters(0, 0xa, flags: 0x01).bytes)
        var drained = false
        world.target.remove(at: LUN(0)!) { drained = true }
        #expect(!drained)
        world.drain()
        #expect(drained)
        #expect(View(afterPowerLoss(of: world)).keys == [0xa])
    }

    @Test("PREEMPT AND ABORT saves first, then aborts, then ends")
    func preemptAndAbort() {
        world.reserveOut(.register, 0, 0xa, flags: 0x01)
        world.reserveOut(.register, 0, 0xb, flags: 0x01, on: world.b)
        let write = world.b.send(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512))
        let preempt = world.a.send(
            CDB.persistentReserveOut(.preemptAndAbort), dataOut: ReservationParameters(0xa, 0xb).bytes)
        #expect(world.b.tagsInFlight == [write])
        world.store?.complete()
        #expect(world.a.tagsInFlight == [preempt])
        world.drain()
        #expect(world.journal.lines.suffix(2) == ["B \(write) aborted", "A \(preempt) good"])
        #expect(View(afterPowerLoss(of: world)).keys == [0xa])
    }

    /// A service of a random kind that may or may not succeed.
    private func act(_ world: TestTarget, _ random: inout SplitMix64) {
        let port = random.chance(1, in: 2) ? world.a : world.b
        let name = world.target.nexusName(port === world.a ? 0 : 1)!
        let own = world.unit.reservations.table.registration(name)?.key ?? 0
        let keys: [UInt64] = [0, 1, 2, 3]
        let service = random.pick(CDB.ReservationService.allCases)
        let type = random.pick([1, 3, 5, 6, 7, 8] as [UInt8])
        if service == .registerAndMove {
            let address = TransportIdentifier.address(of: random.pick(["A", "B", "C"]))
            let list = ReservationParameters.move(
                own, random.pick(keys), flags: random.pick([0, 1, 2, 3]),
                to: [6, 0, 0, 0] + CDB.bytes(address, 8) + Array(repeating: 0, count: 12))
            port.send(CDB.persistentReserveOut(service, listLength: list.count), dataOut: list)
        } else {
            let flags: UInt8 = random.chance(4, in: 5) ? 0x01 : 0x00
            let list = ReservationParameters(own, random.pick(keys), flags: flags).bytes
            port.send(CDB.persistentReserveOut(service, type: type), dataOut: list)
        }
    }

    @Test("random services, the power lost at a random point: all that ended with GOOD is there, or what was in flight")
    func randomPowerLoss() {
        var random = SplitMix64(seed: 20)
        var lives = 0
        var current = TestTarget(savesState: true)
        for _ in 0..<400 {
            for _ in 0..<random.below(6) {
                act(current, &random)
                current.drain()
            }
            // One more, whose save the power loss may or may not come before.
            let before = View(current)
            let persisted = current.unit.reservations.table.persists
            act(current, &random)
            if random.chance(1, in: 2) { current.store?.complete() }
            let kept = current.store?.kept
            let after = View(current)
            let nowPersists = current.unit.reservations.table.persists
            current.drain()
            let next = TestTarget(savesState: true, kept: kept)
            let nothing = View(TestTarget())
            #expect(View(next) == (nowPersists ? after : nothing))
            // What had not ended has not happened.
            if after == before { #expect(View(next) == (persisted || nowPersists ? before : nothing)) }
            current = next
            lives += 1
        }
        #expect(lives == 400)
    }

    @Test("the bytes of a table are read back as the same table, and nothing else is accepted")
    func bytes() {
        var random = SplitMix64(seed: 7)
        for _ in 0..<50 {
            let world = TestTarget(savesState: true)
            for _ in 0..<random.below(8) {
                act(world, &random)
                world.drain()
            }
            let table = world.unit.reservations.table
            #expect(ReservationTable(decoding: table.encoded) == table)
            for length in 0..<table.encoded.count {
                #expect(ReservationTable(decoding: Array(table.encoded[..<length])) == nil)
            }
            var hostile = table.encoded
            hostile[random.below(hostile.count)] = UInt8(truncatingIfNeeded: random.next())
            // Whatever it is, it is refused or it is a table that can be written and read again; it never traps.
            if let read = ReservationTable(decoding: hostile) { #expect(read.encoded == hostile) }
        }
    }
}
