// SPC-4 5.13: persistent reservations, seen from two and three I_T nexuses.

import CBackstore
import CoreTestSupport
import Testing

@testable import SCSICore

private typealias CDB = CoreTestSupport.CDB

/// The TransportID of an initiator port with a SAS address.
private func sas(_ address: UInt64) -> [UInt8] {
    [6, 0, 0, 0] + CDB.bytes(address, 8) + Array(repeating: 0, count: 12)
}

private let allTypes: [UInt8] = [1, 3, 5, 6, 7, 8]

@Suite("SPC-4 5.13.7: registering", .onEachTransport)
struct RegistrationConformance {
    let world = TestTarget()

    @Test("an unregistered nexus registers with reservation key 0, and every nexus sees the key")
    func register() {
        #expect(world.reserveOut(.register, 0, 0xa) == "good")
        #expect(world.reserveOut(.register, 0, 0xb, on: world.b) == "good")
        for port in [world.a, world.b] {
            #expect(world.readKeys(on: port).keys == [0xa, 0xb])
            #expect(world.readKeys(on: port).generation == 2)
        }
    }

    @Test("table of REGISTER: the key that is not the nexus's own is a conflict and changes nothing")
    func wrongKey() {
        #expect(world.reserveOut(.register, 5, 0xa) == "reservationConflict")
        #expect(world.reserveOut(.register, 0, 0xa) == "good")
        #expect(world.reserveOut(.register, 0, 0xb) == "reservationConflict")
        #expect(world.reserveOut(.register, 5, 0) == "reservationConflict")
        #expect(world.readKeys().keys == [0xa])
        #expect(world.readKeys().generation == 1)
    }

    @Test("table of REGISTER: the own key and another change the registration, the own key and 0 end it")
    func changeAndEnd() {
        world.reserveOut(.register, 0, 0xa)
        #expect(world.reserveOut(.register, 0xa, 0xc) == "good")
        #expect(world.readKeys().keys == [0xc])
        #expect(world.reserveOut(.register, 0xc, 0) == "good")
        #expect(world.readKeys().keys == [])
        #expect(world.readKeys().generation == 3)
    }

    @Test("table of REGISTER: two zero keys of an unregistered nexus do nothing, with GOOD status")
    func nothing() {
        #expect(world.reserveOut(.register, 0, 0) == "good")
        #expect(world.reserveOut(.registerAndIgnoreExistingKey, 7, 0) == "good")
        #expect(world.readKeys().keys == [])
        #expect(world.readKeys().generation == 0)
    }

    @Test("REGISTER AND IGNORE EXISTING KEY does not look at the reservation key")
    func ignoreExisting() {
        #expect(world.reserveOut(.registerAndIgnoreExistingKey, 99, 0xa) == "good")
        #expect(world.reserveOut(.registerAndIgnoreExistingKey, 98, 0xb) == "good")
        #expect(world.readKeys().keys == [0xb])
        #expect(world.reserveOut(.registerAndIgnoreExistingKey, 97, 0) == "good")
        #expect(world.readKeys().keys == [])
    }

    @Test("SCOPE and TYPE are ignored by REGISTER, REGISTER AND IGNORE EXISTING KEY, CLEAR")
    func ignoredType() {
        #expect(world.reserveOut(.register, 0, 0xa, type: 0xff) == "good")
        #expect(world.reserveOut(.registerAndIgnoreExistingKey, 0, 0xb, type: 0xf0) == "good")
        #expect(world.reserveOut(.clear, 0xb, type: 0x29) == "good")
    }

    @Test("the registration is the nexus's and survives its loss, another nexus's reset, and a logical unit reset")
    func survives() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.reserve, 0xa, type: 3)
        world.a.disconnect()
        #expect(world.readKeys(on: world.b).keys == [0xa])
        #expect(
            world.run(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 0, count: 512), on: world.b).summary
                == "reservationConflict")
        world.a.connect()
        #expect(world.attention(world.a) == "6/2907")
        world.b.manage(.logicalUnitReset)
        #expect(world.attention(world.a) == "6/2903")
        #expect(world.run(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 0, count: 512)).summary == "good")
        #expect(world.reserveOut(.release, 0xa, type: 3) == "good")
    }

    @Test("another initiator port that takes the place of one that went has none of its registrations")
    func otherPort() {
        world.reserveOut(.register, 0, 0xa)
        world.a.disconnect()
        let port = world.addPort("another")
        #expect(world.reserveOut(.reserve, 0xa, type: 1, on: port) == "reservationConflict")
    }

    @Test("SPEC_I_PT registers the nexuses of the listed initiator ports as well, but not those that are registered")
    func specifyInitiatorPorts() {
        let b = TransportIdentifier.address(of: "B")
        world.reserveOut(.register, 0, 0xb, on: world.b)
        #expect(
            world.reserveOut(.register, 0, 0xa, flags: 0x08, transportIdentifiers: [sas(b), sas(0x77), sas(0x77)])
                == "good")
        let status = world.readFullStatus()
        #expect(status.map(\.key) == [0xb, 0xa, 0xa])
        #expect(status.map(\.transportIdentifier) == [sas(b), sas(TransportIdentifier.address(of: "A")), sas(0x77)])
        #expect(world.readKeys().generation == 2)
    }

    @Test("SPEC_I_PT of a nexus that is not there yet: it is registered when it comes")
    func specifyFutureNexus() {
        let address = TransportIdentifier.address(of: "later")
        world.reserveOut(.register, 0, 0xa, flags: 0x08, transportIdentifiers: [sas(address)])
        world.reserveOut(.reserve, 0xa, type: 6)
        let later = world.addPort("later")
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: later).summary == "good")
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: world.b).summary == "reservationConflict")
    }

    @Test("ALL_TG_PT registers the initiator port through every target port, and ends it through every one")
    func allTargetPorts() {
        #expect(world.reserveOut(.register, 0, 0xa, flags: 0x04) == "good")
        #expect(world.readFullStatus().map(\.targetPort) == [1, 2])
        #expect(Set(world.readFullStatus().map(\.transportIdentifier)).count == 1)
        #expect(world.reserveOut(.register, 0xa, 0, flags: 0x04) == "good")
        #expect(world.readKeys().keys == [])
    }

    @Test("APTPL without a store for it is refused: INVALID FIELD IN PARAMETER LIST")
    func persistWithoutStore() {
        #expect(world.reserveOut(.register, 0, 0xa, flags: 0x01) == "5/2600 list 20.0")
        #expect(world.reserveOut(.registerAndIgnoreExistingKey, 0, 0xa, flags: 0x01) == "5/2600 list 20.0")
        #expect(world.readKeys().keys == [])
    }

    @Test("the table of registrations is bounded: INSUFFICIENT REGISTRATION RESOURCES, and nothing is registered")
    func bounded() {
        let many = (0..<UInt64(Limits.registrations)).map { sas($0 + 1) }
        #expect(
            world.reserveOut(.register, 0, 0xa, flags: 0x08, transportIdentifiers: many) == "5/5504")
        #expect(world.readKeys().keys == [])
        #expect(
            world.reserveOut(.register, 0, 0xa, flags: 0x08, transportIdentifiers: Array(many.dropLast())) == "good")
        #expect(world.readKeys().keys.count == Limits.registrations)
    }
}

@Suite("SPC-4 6.16: the parameter list of PERSISTENT RESERVE OUT", .onEachTransport)
struct ReservationParameterConformance {
    let world = TestTarget()

    private func send(_ service: CDB.ReservationService, _ list: [UInt8], type: UInt8 = 0, length: Int? = nil) -> String
    {
        world.run(CDB.persistentReserveOut(service, type: type, listLength: length ?? list.count), dataOut: list)
            .summary
    }

    @Test(
        "a parameter list that is not 24 bytes long is PARAMETER LIST LENGTH ERROR",
        arguments: [0, 1, 16, 23, 25, 28, 48])
    func length(length: Int) {
        world.reserveOut(.register, 0, 1)
        for service in CDB.ReservationService.allCases
        where service != .registerAndMove && service != .replaceLostReservation {
            let list = ReservationParameters(1, 2).bytes + Array(repeating: 0, count: 24)
            #expect(send(service, Array(list[..<length])) == "5/1a00", "\(service)")
        }
        #expect(world.readKeys().keys == [1])
    }

    @Test("a parameter list longer than any that can be meant is PARAMETER LIST LENGTH ERROR")
    func hugeLength() {
        #expect(send(.register, Array(repeating: 0, count: 24), length: 0xffff_ffff) == "5/1a00")
    }

    @Test("buffers shorter than the parameter list are an overrun, and nothing is done")
    func overrun() {
        #expect(send(.register, Array(ReservationParameters(0, 1).bytes[..<20]), length: 24) == "overrun")
        #expect(world.readKeys().keys == [])
    }

    @Test(
        "reserved bits of the flags are INVALID FIELD IN PARAMETER LIST",
        arguments: [0x02, 0x10, 0x20, 0x40, 0x80] as [UInt8])
    func reservedFlags(flags: UInt8) {
        let bit = flags == 0x02 ? 1 : 7
        #expect(world.reserveOut(.register, 0, 1, flags: flags) == "5/2600 list 20.\(bit)")
        #expect(world.reserveOut(.registerAndIgnoreExistingKey, 0, 1, flags: flags) == "5/2600 list 20.\(bit)")
    }

    @Test("SPEC_I_PT belongs to REGISTER alone")
    func specifyElsewhere() {
        world.reserveOut(.register, 0, 1)
        for service in CDB.ReservationService.allCases
        where service != .register && service != .registerAndMove && service != .replaceLostReservation {
            #expect(
                world.reserveOut(service, 1, 2, type: 1, flags: 0x08, transportIdentifiers: [sas(1)])
                    == "5/2600 list 20.3",
                "\(service)")
        }
    }

    @Test("SPEC_I_PT of a registered nexus: a wrong key is a conflict, the right one INVALID FIELD IN PARAMETER LIST")
    func specifyRegistered() {
        world.reserveOut(.register, 0, 1)
        #expect(
            world.reserveOut(.register, 9, 2, flags: 0x08, transportIdentifiers: [sas(1)]) == "reservationConflict")
        #expect(
            world.reserveOut(.register, 1, 2, flags: 0x08, transportIdentifiers: [sas(1)]) == "5/2600 list 20.3")
        #expect(world.readKeys().keys == [1])
    }

    @Test("SPEC_I_PT with a length that does not fit is PARAMETER LIST LENGTH ERROR")
    func specifyLength() {
        let list = ReservationParameters(0, 1, flags: 0x08, transportIdentifiers: [sas(1)]).bytes
        #expect(send(.register, Array(list[..<24])) == "5/1a00")
        #expect(send(.register, Array(list[..<27])) == "5/1a00")
        #expect(send(.register, Array(list.dropLast())) == "5/1a00")
        var wrong = list
        wrong[27] = 25
        #expect(send(.register, wrong) == "5/1a00")
        wrong.replaceSubrange(24..<28, with: [0xff, 0xff, 0xff, 0xff])
        #expect(send(.register, wrong) == "5/1a00")
        #expect(world.readKeys().keys == [])
    }

    @Test("SPEC_I_PT without TransportIDs registers the nexus itself")
    func specifyNobody() {
        #expect(world.reserveOut(.register, 0, 1, flags: 0x08) == "good")
        #expect(world.readKeys().keys == [1])
    }

    @Test("a bad TransportID is INVALID FIELD IN PARAMETER LIST that points at it, and nobody is registered")
    func badTransportIdentifier() {
        var wrongProtocol = sas(1)
        wrongProtocol[0] = 0x05
        var wrongFormat = sas(1)
        wrongFormat[0] = 0x46
        for offset in [1, 3, 12, 23] {
            var reserved = sas(1)
            reserved[offset] = 1
            #expect(
                world.reserveOut(.register, 0, 1, flags: 0x08, transportIdentifiers: [sas(2), reserved])
                    == "5/2600 list 52")
        }
        for bad in [wrongProtocol, wrongFormat] {
            #expect(
                world.reserveOut(.register, 0, 1, flags: 0x08, transportIdentifiers: [sas(2), bad]) == "5/2600 list 52")
        }
        #expect(
            world.reserveOut(.register, 0, 1, flags: 0x08, transportIdentifiers: [sas(2), [6, 0, 0, 0]])
                == "5/2600 list 24")
        #expect(world.readKeys().keys == [])
    }

    @Test("a scope or a type that does not exist is INVALID FIELD IN CDB, where it counts")
    func badType() {
        world.reserveOut(.register, 0, 1)
        for type in 0...0x0f as ClosedRange<UInt8> where !allTypes.contains(type) {
            #expect(world.reserveOut(.reserve, 1, type: type) == "5/2400 CDB 2.3", "type \(type)")
        }
        #expect(world.reserveOut(.reserve, 1, type: 0x11) == "5/2400 CDB 2.4")
        #expect(world.reserveOut(.release, 1, type: 0x21) == "5/2400 CDB 2.5")
        world.reserveOut(.reserve, 1, type: 1)
        #expect(world.reserveOut(.preempt, 1, 1, type: 0x02) == "5/2400 CDB 2.3")
        #expect(world.reserveOut(.preempt, 1, 1, type: 0x13) == "5/2400 CDB 2.3")
    }

    @Test("a service action that does not exist is INVALID FIELD IN CDB; without a store also REPLACE LOST RESERVATION")
    func badService() {
        for service in 0x08...0x1f as ClosedRange<UInt8> {
            #expect(
                world.run([0x5f, service, 0, 0, 0, 0, 0, 0, 24, 0], dataOut: Array(repeating: 0, count: 24)).summary
                    == "5/2400 CDB 1.4")
        }
        for service in 0x04...0x1f as ClosedRange<UInt8> {
            #expect(world.run([0x5e, service, 0, 0, 0, 0, 0, 0, 24, 0], dataIn: 24).summary == "5/2400 CDB 1.4")
        }
    }
}

@Suite("SPC-4 5.13.9, 5.13.11: reserving, releasing, clearing, preempting", .onEachTransport)
struct ReservationConformance {
    let world = TestTarget()

    /// Registers A with 0xa, B with 0xb and C with 0xc.
    private func registerThree() -> MockPort {
        let c = world.addPort("C")
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        world.reserveOut(.register, 0, 0xc, on: c)
        return c
    }

    @Test("RESERVE needs a registration and its key")
    func reserveUnregistered() {
        #expect(world.reserveOut(.reserve, 0, type: 1) == "reservationConflict")
        world.reserveOut(.register, 0, 0xa)
        #expect(world.reserveOut(.reserve, 0xb, type: 1) == "reservationConflict")
        #expect(world.readReservation() == nil)
    }

    @Test("RESERVE: the reservation is seen from the other nexus, with the holder's key", arguments: allTypes)
    func reserve(type: UInt8) {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        #expect(world.reserveOut(.reserve, 0xa, type: type) == "good")
        let reservation = world.readReservation(on: world.b)
        #expect(reservation?.type == type)
        #expect(reservation?.key == (type >= 7 ? 0 : 0xa))
        #expect(world.readFullStatus(on: world.b).map(\.heldType) == [type, type >= 7 ? type : nil])
        #expect(world.readKeys().generation == 2)
    }

    @Test("RESERVE again by the holder with the same type is GOOD, with another a conflict", arguments: allTypes)
    func reserveAgain(type: UInt8) {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        world.reserveOut(.reserve, 0xa, type: type)
        for other in allTypes {
            #expect(world.reserveOut(.reserve, 0xa, type: other) == (other == type ? "good" : "reservationConflict"))
            let expected = other == type && type >= 7 ? "good" : "reservationConflict"
            #expect(world.reserveOut(.reserve, 0xb, type: other, on: world.b) == expected)
        }
    }

    @Test("RELEASE with another type is INVALID RELEASE OF PERSISTENT RESERVATION")
    func invalidRelease() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.reserve, 0xa, type: 5)
        #expect(world.reserveOut(.release, 0xa, type: 6) == "5/2604")
        #expect(world.reserveOut(.release, 0xa, type: 2) == "5/2604")
        #expect(world.readReservation()?.type == 5)
    }

    @Test("RELEASE without a reservation, or by a registrant that does not hold it, is GOOD and releases nothing")
    func releaseByOthers() {
        world.reserveOut(.register, 0, 0xa)
        #expect(world.reserveOut(.release, 0xa, type: 1) == "good")
        world.reserveOut(.register, 0, 0xb, on: world.b)
        world.reserveOut(.reserve, 0xa, type: 1)
        #expect(world.reserveOut(.release, 0xb, type: 1, on: world.b) == "good")
        #expect(world.readReservation() != nil)
    }

    @Test("RELEASE tells other registrants if the type admits them: RESERVATIONS RELEASED", arguments: allTypes)
    func releaseTells(type: UInt8) {
        let c = registerThree()
        world.reserveOut(.reserve, 0xa, type: type)
        #expect(world.reserveOut(.release, 0xa, type: type) == "good")
        #expect(world.readReservation() == nil)
        let expected = type >= 5 ? "6/2a04" : "none"
        #expect(world.attention(world.b) == expected)
        #expect(world.attention(c) == expected)
        #expect(world.attention(world.a) == "none")
        #expect(world.readKeys().keys == [0xa, 0xb, 0xc])
        #expect(world.readKeys().generation == 3)
    }

    @Test("unregistering the holder releases; a registrants only type tells the others", arguments: allTypes)
    func unregisterHolder(type: UInt8) {
        let c = registerThree()
        world.reserveOut(.reserve, 0xa, type: type)
        #expect(world.reserveOut(.register, 0xa, 0) == "good")
        // An all registrants reservation stays as long as one registrant is left.
        #expect((world.readReservation() == nil) == (type < 7))
        let expected = type == 5 || type == 6 ? "6/2a04" : "none"
        #expect(world.attention(world.b) == expected)
        #expect(world.attention(c) == expected)
        world.reserveOut(.register, 0xb, 0, on: world.b)
        world.reserveOut(.register, 0xc, 0, on: c)
        #expect(world.readReservation() == nil)
    }

    @Test("CLEAR removes everything and tells the others: RESERVATIONS PREEMPTED")
    func clear() {
        let c = registerThree()
        world.reserveOut(.reserve, 0xa, type: 3)
        #expect(world.reserveOut(.clear, 0xa, on: world.b) == "reservationConflict")
        #expect(world.reserveOut(.clear, 0xb, on: world.b) == "good")
        #expect(world.readKeys(on: world.b).keys == [])
        #expect(world.readReservation(on: world.b) == nil)
        #expect(world.readKeys(on: world.b).generation == 4)
        #expect(world.attention(world.a) == "6/2a03")
        #expect(world.attention(c) == "6/2a03")
        #expect(world.attention(world.b) == "none")
    }

    @Test("PREEMPT of the holder takes its reservation and registration, with the type of the CDB", arguments: allTypes)
    func preemptHolder(type: UInt8) {
        let c = registerThree()
        world.reserveOut(.reserve, 0xa, type: 1)
        #expect(world.reserveOut(.preempt, 0xb, 0xa, type: type, on: world.b) == "good")
        #expect(world.readKeys(on: world.b).keys == [0xb, 0xc])
        #expect(world.readReservation(on: world.b)?.type == type)
        #expect(world.readFullStatus(on: world.b).first?.heldType == type)
        #expect(world.readKeys(on: world.b).generation == 4)
        #expect(world.attention(world.a) == "6/2a05")
        #expect(world.attention(world.a) == "none")
        #expect(world.attention(c) == (type == 1 ? "none" : "6/2a04"))
        #expect(world.attention(world.b) == "none")
    }

    @Test("PREEMPT of the holder's own key changes the type, and the holder stays registered")
    func preemptSelf() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.reserve, 0xa, type: 1)
        #expect(world.reserveOut(.preempt, 0xa, 0xa, type: 6) == "good")
        #expect(world.readKeys().keys == [0xa])
        #expect(world.readReservation()?.type == 6)
    }

    @Test("PREEMPT of a key that does not hold removes registrations, and the reservation stays", arguments: allTypes)
    func preemptRegistrant(type: UInt8) {
        let c = registerThree()
        world.reserveOut(.reserve, 0xa, type: type)
        #expect(world.reserveOut(.preempt, 0xb, 0xc, type: 8, on: world.b) == "good")
        #expect(world.readKeys().keys == [0xa, 0xb])
        #expect(world.readReservation()?.type == type)
        #expect(world.attention(c) == "6/2a05")
        #expect(world.attention(world.a) == "none")
    }

    @Test("PREEMPT of a key that nobody has is a conflict")
    func preemptNobody() {
        world.reserveOut(.register, 0, 0xa)
        #expect(world.reserveOut(.preempt, 0xa, 0xb, type: 1) == "reservationConflict")
        world.reserveOut(.reserve, 0xa, type: 1)
        #expect(world.reserveOut(.preempt, 0xa, 0xb, type: 1) == "reservationConflict")
        #expect(world.readKeys().generation == 1)
    }

    @Test("PREEMPT with key 0 is INVALID FIELD IN PARAMETER LIST, save under an all registrants type")
    func preemptZero() {
        let c = registerThree()
        #expect(world.reserveOut(.preempt, 0xa, 0, type: 1) == "5/2600 list 8")
        world.reserveOut(.reserve, 0xa, type: 6)
        #expect(world.reserveOut(.preempt, 0xa, 0, type: 1) == "5/2600 list 8")
        world.reserveOut(.release, 0xa, type: 6)
        for port in [world.a, world.b, c] { _ = world.attention(port) }
        world.reserveOut(.reserve, 0xa, type: 8)
        #expect(world.reserveOut(.preempt, 0xb, 0, type: 1, on: world.b) == "good")
        #expect(world.readKeys(on: world.b).keys == [0xb])
        #expect(world.readReservation(on: world.b)?.type == 1)
        #expect(world.attention(world.a) == "6/2a05")
        #expect(world.attention(c) == "6/2a05")
    }

    @Test("PREEMPT removes all nexuses with the key, and tells each once")
    func preemptShared() {
        let c = world.addPort("C")
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        world.reserveOut(.register, 0, 0xb, on: c)
        #expect(world.reserveOut(.preempt, 0xa, 0xb) == "good")
        #expect(world.readKeys().keys == [0xa])
        for port in [world.b, c] {
            #expect(world.attention(port) == "6/2a05")
            #expect(world.attention(port) == "none")
        }
    }

    @Test("PREEMPT needs a registration and its key")
    func preemptUnregistered() {
        world.reserveOut(.register, 0, 0xa)
        #expect(world.reserveOut(.preempt, 0, 0xa, type: 1, on: world.b) == "reservationConflict")
        world.reserveOut(.register, 0, 0xb, on: world.b)
        #expect(world.reserveOut(.preempt, 0xa, 0xa, type: 1, on: world.b) == "reservationConflict")
    }

    @Test("SAM-6 5.3.3: a reset is reported before the conflict, the conflict before REGISTRATIONS PREEMPTED")
    func precedence() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        world.reserveOut(.reserve, 0xa, type: 3)
        world.reserveOut(.preempt, 0xb, 0xa, type: 3, on: world.b)
        let read = { world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary }
        #expect(read() == "reservationConflict")
        world.b.manage(.logicalUnitReset)
        _ = world.attention(world.b)
        #expect(read() == "6/2903")
        #expect(read() == "reservationConflict")
        #expect(world.run(CDB.testUnitReady).summary == "6/2a05")
        #expect(read() == "reservationConflict")
    }

    @Test("a command that the table does not have is refused for that, not for a reservation")
    func unknownCommand() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.reserve, 0xa, type: 3)
        #expect(world.run([0xff, 0, 0, 0, 0, 0], on: world.b).summary == "5/2000 CDB 0")
    }

    @Test("SPC-4 6.15.4: REPORT CAPABILITIES")
    func capabilities() {
        #expect(world.run(CDB.persistentReserveIn(2), dataIn: 64).data == [0, 8, 0x1c, 0xb0, 0xea, 0x01, 0, 0])
        let saving = TestTarget(savesState: true)
        #expect(saving.run(CDB.persistentReserveIn(2), dataIn: 64).data == [0, 8, 0x9d, 0xb0, 0xea, 0x01, 0, 0])
        saving.reserveOut(.register, 0, 1, flags: 0x01)
        #expect(saving.run(CDB.persistentReserveIn(2), dataIn: 64).data[3] == 0xb1)
    }

    @Test(
        "PERSISTENT RESERVE IN is cut to the allocation length and says its whole length",
        arguments: 0...3 as ClosedRange<UInt8>)
    func allocationLength(service: UInt8) {
        world.reserveOut(.register, 0, 1)
        world.reserveOut(.reserve, 1, type: 1)
        let whole = world.run(CDB.persistentReserveIn(service), dataIn: 0x1_0000).data
        for length in 0...whole.count {
            let end = world.run(CDB.persistentReserveIn(service, allocationLength: UInt64(length)), dataIn: 256)
            #expect(end.data == Array(whole[..<length]))
        }
    }
}

@Suite("SPC-4 5.13.8: REGISTER AND MOVE", .onEachTransport)
struct RegisterAndMoveConformance {
    let world = TestTarget()

    private func move(
        _ key: UInt64, _ actionKey: UInt64, flags: UInt8 = 0, targetPort: UInt64 = 1, to name: String,
        on port: MockPort? = nil
    ) -> String {
        send(
            ReservationParameters.move(
                key, actionKey, flags: flags, targetPort: targetPort, to: sas(TransportIdentifier.address(of: name))),
            on: port)
    }

    private func send(_ list: [UInt8], on port: MockPort? = nil) -> String {
        world.run(CDB.persistentReserveOut(.registerAndMove, listLength: list.count), dataOut: list, on: port).summary
    }

    @Test(
        "the reservation moves to a nexus that gets registered with the key; the type stays",
        arguments: [1, 3, 5, 6] as [UInt8])
    func moves(type: UInt8) {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.reserve, 0xa, type: type)
        #expect(move(0xa, 0xb, to: "B") == "good")
        #expect(world.readKeys().keys == [0xa, 0xb])
        #expect(world.readKeys().generation == 2)
        #expect(world.readReservation()?.key == 0xb)
        #expect(world.readReservation()?.type == type)
        #expect(world.reserveOut(.release, 0xb, type: type, on: world.b) == "good")
        #expect(world.readReservation(on: world.b) == nil)
    }

    @Test("UNREG ends the registration of the nexus that moved the reservation")
    func unregisters() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.reserve, 0xa, type: 3)
        #expect(move(0xa, 0xb, flags: 0x02, to: "B") == "good")
        #expect(world.readKeys().keys == [0xb])
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "reservationConflict")
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: world.b).summary == "good")
    }

    @Test("a registered destination gets the new key")
    func registeredDestination() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        world.reserveOut(.reserve, 0xa, type: 3)
        #expect(move(0xa, 0xbb, to: "B") == "good")
        #expect(world.readKeys().keys == [0xa, 0xbb])
    }

    @Test("who is not registered, sends a wrong key, or does not hold, conflicts; so does an all registrants type")
    func conflicts() {
        #expect(move(0, 0xb, to: "B") == "reservationConflict")
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        world.reserveOut(.reserve, 0xa, type: 7)
        #expect(move(0xa, 0xb, to: "B") == "reservationConflict")
        world.reserveOut(.release, 0xa, type: 7)
        _ = world.attention(world.b)
        world.reserveOut(.reserve, 0xa, type: 3)
        #expect(move(9, 0xb, to: "B") == "reservationConflict")
        #expect(move(0xb, 0xc, to: "C", on: world.b) == "reservationConflict")
    }

    @Test("without a reservation: INVALID FIELD IN CDB")
    func noReservation() {
        world.reserveOut(.register, 0, 0xa)
        #expect(move(0xa, 0xb, to: "B") == "5/2400 CDB 1.4")
    }

    @Test("bad fields are INVALID FIELD IN PARAMETER LIST at their place, and nothing moves")
    func badFields() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.reserve, 0xa, type: 3)
        #expect(move(0xa, 0, to: "B") == "5/2600 list 8")
        #expect(move(0xa, 0xb, to: "A") == "5/2600 list 24")
        #expect(move(0xa, 0xb, flags: 0x04, to: "B") == "5/2600 list 17.7")
        #expect(move(0xa, 0xb, flags: 0x01, to: "B") == "5/2600 list 17.0")
        #expect(move(0xa, 0xb, targetPort: 0, to: "B") == "5/2600 list 18")
        #expect(move(0xa, 0xb, targetPort: 3, to: "B") == "5/2600 list 18")
        #expect(send(ReservationParameters.move(0xa, 0xb, to: [5] + sas(1)[1...])) == "5/2600 list 24")
        #expect(send(ReservationParameters.move(0xa, 0xb, to: [])) == "5/2600 list 24")
        #expect(send(ReservationParameters.move(0xa, 0xb, to: sas(1) + sas(2))) == "5/2600 list 24")
        #expect(send(ReservationParameters.move(0xa, 0xb, to: sas(1)).dropLast()) == "5/1a00")
        #expect(send(Array(ReservationParameters.move(0xa, 0xb, to: [])[..<20])) == "5/1a00")
        #expect(world.readReservation()?.key == 0xa)
        #expect(world.readKeys().keys == [0xa])
    }
}

@Suite("SPC-4 5.13.11.2.6: PREEMPT AND ABORT", .onEachTransport)
struct PreemptAndAbortConformance {
    let world = TestTarget()

    @Test(
        "commands of the preempted nexus end, and GOOD comes after the medium has let go of them",
        .enabled(if: TestTarget.ordersPorts, "what two initiators see in one turn has no order between them"))
    func waits() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        world.reserveOut(.reserve, 0xb, type: 3, on: world.b)
        world.journal.entries = []
        let write = world.b.send(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512))
        let list = ReservationParameters(0xa, 0xb).bytes
        let preempt = world.a.send(CDB.persistentReserveOut(.preemptAndAbort, type: 3), dataOut: list)
        #expect(world.b.tagsInFlight == [write])
        #expect(world.a.tagsInFlight == [preempt])
        // The reservation has changed hands already.
        world.b.send(CDB.read(.ten, 8, 1), dataIn: 512)
        #expect(world.b.completions.last?.summary == "reservationConflict")
        world.drain()
        #expect(world.journal.lines.suffix(2) == ["B \(write) aborted", "A \(preempt) good"])
        #expect(world.attention(world.b) == "6/2a05")
    }

    @Test("with TAS the commands end with TASK ABORTED status")
    func taskAborted() {
        var pages = [0, 0, 0, 0] + world.run(CDB.modeSense6(0x0a), dataIn: 255).data[4...]
        pages[4 + 2 + 3] |= 0x40
        _ = world.run(CDB.modeSelect6(listLength: pages.count), dataOut: Array(pages))
        _ = world.attention(world.b)
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        let write = world.b.send(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512))
        #expect(world.reserveOut(.preemptAndAbort, 0xa, 0xb) == "good")
        #expect(world.b.completions.last { $0.tag == write }?.summary == "taskAborted")
    }

    @Test("commands of a nexus that is not preempted go on, and nobody to abort is GOOD at once")
    func leavesOthers() {
        let c = world.addPort("C")
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        let write = c.send(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512))
        let tag = world.a.send(
            CDB.persistentReserveOut(.preemptAndAbort), dataOut: ReservationParameters(0xa, 0xb).bytes)
        #expect(world.a.completions.last?.tag == tag)
        #expect(world.a.completions.last?.summary == "good")
        #expect(c.tagsInFlight == [write])
        world.drain()
        #expect(c.completions.last?.summary == "good")
    }

    @Test("its own other commands are aborted too if it preempts its own key, but not itself")
    func abortsOwn() {
        world.reserveOut(.register, 0, 0xa)
        let write = world.a.send(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512))
        #expect(world.reserveOut(.preemptAndAbort, 0xa, 0xa) == "good")
        #expect(world.a.completions.last { $0.tag == write }?.summary == "aborted")
        #expect(world.readKeys().keys == [])
    }

    @Test("aborted itself while it waits, it ends when the others have; a lost nexus loses nothing")
    func abortedItself() {
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        world.b.send(CDB.write(.ten, 0, 1), dataOut: Array(repeating: 1, count: 512))
        let preempt = world.a.send(
            CDB.persistentReserveOut(.preemptAndAbort), dataOut: ReservationParameters(0xa, 0xb).bytes)
        world.a.manage(.abortTask, tag: preempt)
        #expect(world.a.answers.isEmpty)
        world.b.disconnect()
        world.drain()
        #expect(world.a.completions.last { $0.tag == preempt }?.summary == "aborted")
        #expect(world.a.answers.map(\.response) == [.functionComplete])
        #expect(world.readKeys().keys == [0xa])
    }
}

@Suite("SPC-2 5.5.1, SPC-4 5.13.3: RESERVE and RELEASE", .onEachTransport)
struct ReserveConformance {
    let world = TestTarget()
    private let reserve: [UInt8] = [0x16, 0, 0, 0, 0, 0]
    private let release: [UInt8] = [0x17, 0, 0, 0, 0, 0]
    private let reserve10: [UInt8] = [0x56, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    private let release10: [UInt8] = [0x57, 0, 0, 0, 0, 0, 0, 0, 0, 0]

    private func read(_ port: MockPort) -> String { world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: port).summary }

    @Test("a reserved unit is the holder's alone, until it releases it; both lengths are one reservation")
    func reserveAndRelease() {
        #expect(world.run(reserve).summary == "good")
        #expect(world.run(reserve10).summary == "good")
        #expect(world.run(reserve, on: world.b).summary == "reservationConflict")
        #expect(read(world.a) == "good")
        #expect(read(world.b) == "reservationConflict")
        #expect(world.run(release, on: world.b).summary == "good")
        #expect(read(world.b) == "reservationConflict")
        #expect(world.run(release10).summary == "good")
        #expect(read(world.b) == "good")
    }

    @Test(
        "a logical unit reset ends it",
        arguments: [TaskManagementFunction.logicalUnitReset, .targetReset].filter { TestTarget.canSend($0) })
    func reset(function: TaskManagementFunction) {
        _ = world.run(reserve)
        world.b.manage(function)
        _ = world.attention(world.b)
        #expect(read(world.b) == "good")
    }

    @Test("the loss, and the reset, of the holder's nexus end it; those of another do not")
    func nexusLoss() {
        _ = world.run(reserve)
        world.b.disconnect()
        world.b.connect()
        _ = world.attention(world.b)
        #expect(read(world.b) == "reservationConflict")
        world.a.disconnect()
        #expect(read(world.b) == "good")
        world.a.connect()
        _ = world.attention(world.a)
        _ = world.run(reserve)
        world.a.manage(.nexusReset)
        #expect(read(world.b) == "good")
    }

    @Test("while it is there nobody uses persistent reservations, the holder neither")
    func excludesPersistent() {
        _ = world.run(reserve)
        for port in [world.a, world.b] {
            #expect(world.reserveOut(.register, 0, 1, on: port) == "reservationConflict")
            #expect(world.run(CDB.persistentReserveIn(0), dataIn: 8, on: port).summary == "reservationConflict")
        }
        _ = world.run(release)
        #expect(world.reserveOut(.register, 0, 1) == "good")
    }

    @Test("while there are registrations it conflicts, save for who may do everything, who gets GOOD and nothing")
    func excludedByPersistent() {
        world.reserveOut(.register, 0, 0xa)
        for command in [reserve, release, reserve10, release10] {
            #expect(world.run(command).summary == "reservationConflict")
            #expect(world.run(command, on: world.b).summary == "reservationConflict")
        }
        world.reserveOut(.reserve, 0xa, type: 3)
        for command in [reserve, release, reserve10, release10] {
            #expect(world.run(command).summary == "good")
            #expect(world.run(command, on: world.b).summary == "reservationConflict")
        }
        #expect(read(world.a) == "good")
        #expect(world.readReservation()?.type == 3)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        #expect(world.run(reserve, on: world.b).summary == "reservationConflict")
        world.reserveOut(.preempt, 0xa, 0xa, type: 6)
        _ = world.attention(world.b)
        #expect(world.run(reserve, on: world.b).summary == "good")
        #expect(read(world.a) == "good")
    }
}
