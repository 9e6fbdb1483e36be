// ReservationTable: registrations and the persistent reservation of one logical unit, and what the services of
// PERSISTENT RESERVE OUT make of them (SPC-4 5.13; clause numbers of revision 36f).
//
// Owns: the rules. Called by: the PERSISTENT RESERVE commands, Reservations. Must not know: tasks, nexus indices, CDBs,
// where the table is kept. Pure: a service gives the new table and whom to tell; nothing has happened then.

/// An I_T nexus by the names of its ports, which are the same after a reconnection and after a restart (SPC-4 5.13.5:
/// registrations belong to I_T nexuses).
struct NexusName: Hashable {
    /// The initiator port's SAS address, as its TransportID has it.
    var initiatorPort: UInt64
    /// The relative target port identifier.
    var targetPort: UInt16
}

/// A persistent reservation type (SPC-4 6.15.3.4). The scope is always that of the logical unit.
enum ReservationType: UInt8, CaseIterable {
    case writeExclusive = 0x1
    case exclusiveAccess = 0x3
    case writeExclusiveRegistrantsOnly = 0x5
    case exclusiveAccessRegistrantsOnly = 0x6
    case writeExclusiveAllRegistrants = 0x7
    case exclusiveAccessAllRegistrants = 0x8

    /// Whether every registered nexus is a holder.
    var isAllRegistrants: Bool { self == .writeExclusiveAllRegistrants || self == .exclusiveAccessAllRegistrants }
    /// Whether every registered nexus may do what the holder may.
    var admitsRegistrants: Bool { self != .writeExclusive && self != .exclusiveAccess }
    /// Whether others may read.
    var admitsReads: Bool {
        self == .writeExclusive || self == .writeExclusiveRegistrantsOnly || self == .writeExclusiveAllRegistrants
    }
}

/// One registered I_T nexus.
struct Registration: Equatable {
    let nexus: NexusName
    var key: UInt64
}

/// A unit attention condition that a service establishes.
struct ReservationNotice: Equatable {
    let condition: UnitAttention
    let nexus: NexusName
}

/// What a service comes to.
enum ReservationVerdict: Equatable {
    /// The new table, and whom to tell.
    case changed(ReservationTable, [ReservationNotice], preempted: [NexusName])
    /// GOOD, and everything is as it was.
    case unchanged
    case conflict
    case failed(SenseData)
}

/// Registrations and the persistent reservation.
struct ReservationTable: Equatable {
    /// In the order of registration.
    private(set) var registrations: [Registration] = []
    /// The reservation, if there is one.
    private(set) var type: ReservationType?
    /// The nexus that holds it; `nil` if there is none, or if all registrants hold it.
    private(set) var holder: NexusName?
    /// PRGENERATION: counts the changes of registrations since power on.
    private(set) var generation: UInt32 = 0
    /// APTPL of the last service that said it: whether all this is kept over power loss.
    private(set) var persists = false

    var isEmpty: Bool { registrations.isEmpty }

    func registration(_ nexus: NexusName) -> Registration? { registrations.first { $0.nexus == nexus } }

    /// Whether a nexus holds the reservation.
    func isHolder(_ nexus: NexusName) -> Bool {
        guard let type else { return false }
        return type.isAllRegistrants ? registration(nexus) != nil : holder == nexus
    }

    /// Whether a registered nexus sends the key that it registered.
    private func owns(_ nexus: NexusName, _ key: UInt64) -> Bool { registration(nexus)?.key == key }

    // MARK: Services

    /// REGISTER and REGISTER AND IGNORE EXISTING KEY (SPC-4 5.13.7), of the nexus that sent the command and, if it is
    /// not registered, of others that the parameter list names (SPEC_I_PT, ALL_TG_PT).
    ///
    /// - Parameters:
    ///   - key: RESERVATION KEY; `nil`: ignored.
    ///   - newKey: SERVICE ACTION RESERVATION KEY; 0 ends the registration.
    ///   - sameInitiator: Nexuses of the same initiator port through other target ports: they get what it gets.
    ///   - others: Nexuses of other initiator ports; those that are registered stay as they are. `nil`: SPEC_I_PT is
    ///     zero.
    func register(
        _ nexus: NexusName, key: UInt64?, newKey: UInt64, persists: Bool, sameInitiator: [NexusName] = [],
        others: [NexusName]? = nil
    ) -> ReservationVerdict {
        let isRegistered = registration(nexus) != nil
        if let key, isRegistered ? !owns(nexus, key) : key != 0 { return .conflict }
        if isRegistered, others != nil { return .failed(.invalidField(inParameterList: 20, bit: 3)) }
        if !isRegistered, newKey == 0 { return .unchanged }
        var new = self
        var notices: [ReservationNotice] = []
        for own in [nexus] + sameInitiator {
            if newKey == 0 { notices += new.unregister(own, telling: nexus) } else { new.set(own, newKey) }
        }
        for other in others ?? [] where new.registration(other) == nil { new.set(other, newKey) }
        guard new.registrations.count <= Limits.registrations else {
            return .failed(SenseData(.illegalRequest, .insufficientRegistrationResources))
        }
        new.persists = persists
        new.generation &+= 1
        return .changed(new, notices, preempted: [])
    }

    /// RESERVE (SPC-4 5.13.9).
    func reserve(_ nexus: NexusName, key: UInt64, _ type: ReservationType) -> ReservationVerdict {
        guard owns(nexus, key) else { return .conflict }
        if let existing = self.type { return isHolder(nexus) && existing == type ? .unchanged : .conflict }
        var new = self
        new.establish(type, by: nexus)
        return .changed(new, [], preempted: [])
    }

    /// RELEASE (SPC-4 5.13.11.2.2).
    func release(_ nexus: NexusName, key: UInt64, _ type: ReservationType?) -> ReservationVerdict {
        guard owns(nexus, key) else { return .conflict }
        guard let existing = self.type, isHolder(nexus) else { return .unchanged }
        guard existing == type else {
            return .failed(SenseData(.illegalRequest, .invalidReleaseOfPersistentReservation))
        }
        var new = self
        new.removeReservation()
        let told = existing.admitsRegistrants ? registrations.map(\.nexus) : []
        return .changed(new, Self.notices(.reservationsReleased, told, exceptFor: nexus), preempted: [])
    }

    /// CLEAR (SPC-4 5.13.11.2.7).
    func clear(_ nexus: NexusName, key: UInt64) -> ReservationVerdict {
        guard owns(nexus, key) else { return .conflict }
        let (table, notices) = cleared(exceptFor: nexus)
        return .changed(table, notices, preempted: registrations.map(\.nexus))
    }

    /// The same without a nexus that asks for it: what an operator does.
    func cleared(exceptFor nexus: NexusName? = nil) -> (ReservationTable, [ReservationNotice]) {
        var new = self
        new.registrations = []
        new.removeReservation()
        new.generation &+= 1
        let told = registrations.map(\.nexus)
        return (new, Self.notices(.reservationsPreempted, told, exceptFor: nexus))
    }

    /// PREEMPT and PREEMPT AND ABORT (SPC-4 5.13.11.2.4, 5.13.11.2.6).
    ///
    /// - Parameters:
    ///   - preempted: SERVICE ACTION RESERVATION KEY: whose registrations are removed.
    ///   - type: The type in the CDB, `nil` if it is none; it counts only if the reservation is preempted.
    func preempt(
        _ nexus: NexusName, key: UInt64, preempted: UInt64, _ type: ReservationType?
    ) -> ReservationVerdict {
        guard owns(nexus, key) else { return .conflict }
        let all = self.type?.isAllRegistrants == true
        if preempted == 0, !all { return .failed(.invalidField(inParameterList: 8)) }
        let takesReservation =
            all ? preempted == 0 : holder.flatMap(registration).map { $0.key == preempted } ?? false
        if takesReservation { return preemptReservation(nexus, all ? nil : preempted, type) }
        return removeRegistrations(nexus, preempted)
    }

    /// SPC-4 5.13.11.2.4.3: the reservation and those whose key is `preempted`, or everybody else, go; the nexus holds
    /// a new one.
    private func preemptReservation(
        _ nexus: NexusName, _ preempted: UInt64?, _ type: ReservationType?
    ) -> ReservationVerdict {
        guard let type else { return .failed(.invalidField(inCDB: 2, bit: 3)) }
        let removed = registrations.filter { $0.nexus != nexus && (preempted == nil || $0.key == preempted) }
        var new = self
        new.registrations.removeAll { removed.contains($0) }
        new.removeReservation()
        new.establish(type, by: nexus)
        new.generation &+= 1
        var notices = Self.notices(.registrationsPreempted, removed.map(\.nexus), exceptFor: nexus)
        if type != self.type {
            notices += Self.notices(.reservationsReleased, new.registrations.map(\.nexus), exceptFor: nexus)
        }
        return .changed(new, notices, preempted: removed.map(\.nexus))
    }

    /// SPC-4 5.13.11.2.5: only registrations go, the nexus's own as well if it has that key.
    private func removeRegistrations(_ nexus: NexusName, _ preempted: UInt64) -> ReservationVerdict {
        let removed = registrations.filter { $0.key == preempted }
        guard !removed.isEmpty else { return .conflict }
        var new = self
        for registration in removed { _ = new.unregister(registration.nexus, telling: registration.nexus) }
        new.generation &+= 1
        let notices = Self.notices(.registrationsPreempted, removed.map(\.nexus), exceptFor: nexus)
        return .changed(new, notices, preempted: removed.map(\.nexus))
    }

    /// REGISTER AND MOVE (SPC-4 5.13.8).
    ///
    /// - Parameters:
    ///   - destination: The nexus that gets the reservation, registered with `newKey`.
    ///   - unregisters: UNREG: whether the nexus that sent the command is not registered any more.
    func registerAndMove(
        _ nexus: NexusName, key: UInt64, newKey: UInt64, to destination: NexusName, unregisters: Bool, persists: Bool
    ) -> ReservationVerdict {
        guard owns(nexus, key) else { return .conflict }
        guard let type else { return .failed(.invalidField(inCDB: 1, bit: 4)) }
        guard isHolder(nexus), !type.isAllRegistrants else { return .conflict }
        if newKey == 0 { return .failed(.invalidField(inParameterList: 8)) }
        if destination == nexus { return .failed(.invalidField(inParameterList: 24)) }
        var new = self
        new.set(destination, newKey)
        new.holder = destination
        if unregisters { new.registrations.removeAll { $0.nexus == nexus } }
        guard new.registrations.count <= Limits.registrations else {
            return .failed(SenseData(.illegalRequest, .insufficientRegistrationResources))
        }
        new.persists = persists
        new.generation &+= 1
        return .changed(new, [], preempted: [])
    }

    /// REPLACE LOST RESERVATION (SPC-4 5.13.11.3), of a nexus that needs no registration: it holds the new reservation,
    /// and is the only one that is registered. Nobody is told, and PRGENERATION begins again.
    static func replacingLost(
        _ nexus: NexusName, key: UInt64, newKey: UInt64, _ type: ReservationType, persists: Bool
    ) -> ReservationVerdict {
        if key != 0 { return .failed(.invalidField(inParameterList: 0)) }
        if newKey == 0 { return .failed(.invalidField(inParameterList: 8)) }
        var new = ReservationTable()
        new.set(nexus, newKey)
        new.establish(type, by: nexus)
        new.persists = persists
        return .changed(new, [], preempted: [])
    }

    /// The same while nothing is lost: a reservation stands against it as against RESERVE, from a nexus that is not
    /// registered (SPC-4 table 66).
    func replaceLost(_ nexus: NexusName) -> ReservationVerdict {
        if type != nil, registration(nexus) == nil { return .conflict }
        return .failed(SenseData(.illegalRequest, .invalidReleaseOfPersistentReservation))
    }

    // MARK: Parts

    private mutating func set(_ nexus: NexusName, _ key: UInt64) {
        if let index = registrations.firstIndex(where: { $0.nexus == nexus }) {
            registrations[index].key = key
        } else {
            registrations.append(Registration(nexus: nexus, key: key))
        }
    }

    private mutating func establish(_ type: ReservationType, by nexus: NexusName) {
        self.type = type
        holder = type.isAllRegistrants ? nil : nexus
    }

    private mutating func removeReservation() {
        type = nil
        holder = nil
    }

    /// Ends a registration, and the reservation with it if that leaves no holder. Of a registrants only reservation the
    /// other registrants are told (SPC-4 5.13.11.2.3).
    private mutating func unregister(_ nexus: NexusName, telling teller: NexusName) -> [ReservationNotice] {
        let wasHolder = isHolder(nexus)
        registrations.removeAll { $0.nexus == nexus }
        guard wasHolder, let type, !type.isAllRegistrants || registrations.isEmpty else { return [] }
        removeReservation()
        return type.admitsRegistrants
            ? Self.notices(.reservationsReleased, registrations.map(\.nexus), exceptFor: teller) : []
    }

    private static func notices(
        _ condition: UnitAttention, _ nexuses: [NexusName], exceptFor sender: NexusName?
    ) -> [ReservationNotice] {
        nexuses.filter { $0 != sender }.map { ReservationNotice(condition: condition, nexus: $0) }
    }

    // MARK: Bytes

    private static let headerLength = 20
    private static let registrationLength = 18

    /// The table as bytes: APTPL, type or 0, two zero bytes; PRGENERATION; the holder's initiator port and target port,
    /// or zeros; the number of registrations; for each the initiator port, the target port, the key. Big-endian.
    var encoded: [UInt8] {
        var bytes: [UInt8] = [persists ? 1 : 0, type?.rawValue ?? 0]
        bytes.append(bigEndian: generation)
        bytes.append(bigEndian: holder?.initiatorPort ?? 0)
        bytes.append(bigEndian: holder?.targetPort ?? 0)
        bytes.append(bigEndian: UInt32(registrations.count))
        for registration in registrations {
            bytes.append(bigEndian: registration.nexus.initiatorPort)
            bytes.append(bigEndian: registration.nexus.targetPort)
            bytes.append(bigEndian: registration.key)
        }
        return bytes
    }

    /// An empty table.
    init() {}

    /// Reads a table, whatever the bytes are; `nil` if they are none that this code can have written.
    init?(decoding bytes: [UInt8]) {
        guard bytes.count >= Self.headerLength, bytes[0] <= 1 else { return nil }
        persists = bytes[0] == 1
        generation = bytes.field(2)
        let count: UInt32 = bytes.field(16)
        guard count <= Limits.registrations,
            bytes.count == Self.headerLength + Int(count) * Self.registrationLength
        else { return nil }
        for index in 0..<Int(count) {
            let offset = Self.headerLength + index * Self.registrationLength
            let nexus = NexusName(initiatorPort: bytes.field(offset), targetPort: bytes.field(offset + 8))
            let key: UInt64 = bytes.field(offset + 10)
            guard key != 0, registration(nexus) == nil else { return nil }
            registrations.append(Registration(nexus: nexus, key: key))
        }
        let held = NexusName(initiatorPort: bytes.field(6), targetPort: bytes.field(14))
        let none = NexusName(initiatorPort: 0, targetPort: 0)
        guard bytes[1] != 0 else {
            if held != none { return nil }
            return
        }
        guard let type = ReservationType(rawValue: bytes[1]), !registrations.isEmpty else { return nil }
        guard type.isAllRegistrants ? held == none : registration(held) != nil else { return nil }
        self.type = type
        holder = type.isAllRegistrants ? nil : held
    }

    /// What a power on leaves of a table that was saved (SPC-4 5.13.5): PRGENERATION begins again.
    var afterPowerOn: ReservationTable {
        guard persists else { return ReservationTable() }
        var table = self
        table.generation = 0
        return table
    }
}
