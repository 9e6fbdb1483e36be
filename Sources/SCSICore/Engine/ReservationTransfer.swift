// ReservationTransfer: a logical unit's reservations for others than initiators: shown, taken to another target,
// cleared.
//
// Called by: the control plane and embedders, on the unit's thread. Must not know: how the bytes travel.

/// A logical unit's reservations, to be shown.
public struct ReservationStatus: Equatable, Sendable {
    /// One registered I_T nexus.
    public struct Registrant: Equatable, Sendable {
        /// The SAS address in the initiator port's TransportID.
        public let initiatorPort: UInt64
        /// The initiator port's name, if the target has seen it since it was created.
        public let name: String?
        /// The relative target port identifier.
        public let targetPort: UInt16
        /// The reservation key.
        public let key: UInt64
        /// Whether the nexus holds the persistent reservation.
        public let isHolder: Bool
    }

    /// In the order of registration.
    public let registrants: [Registrant]
    /// The persistent reservation's type code (SPC-4 6.13.3); `nil`: there is none.
    public let type: UInt8?
    /// PRGENERATION.
    public let generation: UInt32
    /// APTPL: whether all this survives power loss.
    public let persists: Bool
    /// The initiator port that holds the reservation of RESERVE(6) or (10), which a reset of the unit ends (SPC-2
    /// 5.5.1); `nil`: none.
    public let reservedBy: String?
    /// Whether they cannot be read: commands are refused until an initiator replaces them (REPLACE LOST RESERVATION),
    /// or `clearReservations` or `importReservations` does.
    public let areLost: Bool
}

/// Why reservations could not be taken over or cleared. Nothing has changed then.
public enum ReservationTransferError: Error, Equatable {
    /// The bytes are not an export of this unit's reservations.
    case invalid(UnitStateError)
    /// They are to survive power loss, and this unit has nothing that keeps them.
    case notPersistent
    /// An initiator has reserved the unit by RESERVE(6) or (10).
    case reserved
    /// They could not be saved; an errno value.
    case notSaved(Int32)
}

extension LogicalUnit {
    /// The reservations as they are.
    public var reservationStatus: ReservationStatus {
        let table = reservations.table
        return ReservationStatus(
            registrants: table.registrations.map {
                ReservationStatus.Registrant(
                    initiatorPort: $0.nexus.initiatorPort, name: target?.initiatorPortName($0.nexus),
                    targetPort: $0.nexus.targetPort, key: $0.key, isHolder: table.isHolder($0.nexus))
            }, type: table.type?.rawValue, generation: table.generation, persists: table.persists,
            reservedBy: reservations.reserved.map { target?.initiatorPortName(index: $0) ?? "" },
            areLost: reservations.areLost)
    }

    /// The registrations and the persistent reservation as bytes, for `importReservations` of the unit with the same
    /// name elsewhere. A change that is being saved is not in them: export when no command is in flight.
    public var exportedReservations: [UInt8] {
        var state = UnitState(name: configuration.name)
        state.set(.persistentReservations, version: 1, reservations.table.encoded)
        return state.encoded
    }

    /// Replaces the reservations by exported ones, durably if they are to survive power loss. Initiators are told
    /// nothing, because for them nothing has changed: their nexuses have the same names here.
    ///
    /// - Parameter done: Called once, on this thread, maybe before this returns; `nil`: done.
    public func importReservations(_ bytes: [UInt8], done: @escaping (ReservationTransferError?) -> Void) {
        let state: UnitState
        do {
            state = try UnitState(parsing: bytes, name: configuration.name)
        } catch {
            return done(.invalid(error))
        }
        guard let section = state[.persistentReservations], let table = ReservationTable(decoding: section.bytes) else {
            return done(.invalid(.damaged("there are no reservations in it")))
        }
        if table.persists, !persistentState.canSave { return done(.notPersistent) }
        replace(done) { _ in (table, []) }
    }

    /// Removes all registrations and the persistent reservation, as CLEAR does (SPC-4 5.13.11.2.7): each registrant is
    /// told RESERVATIONS PREEMPTED, and does not prevent the removal of the medium any more. For an operator whose
    /// initiators are gone for good.
    ///
    /// - Parameter done: Called once, on this thread, maybe before this returns; `nil`: done.
    public func clearReservations(done: @escaping (ReservationTransferError?) -> Void) {
        replace(done, allowingRemoval: true) { $0.cleared() }
    }

    private func replace(
        _ done: @escaping (ReservationTransferError?) -> Void, allowingRemoval: Bool = false,
        by make: @escaping (ReservationTable) -> (ReservationTable, [ReservationNotice])
    ) {
        persistentState.whenIdle { [self] in
            if reservations.reserved != nil { return done(.reserved) }
            let old = reservations.table
            let (table, notices) = make(old)
            let released = allowingRemoval ? old.registrations.map(\.nexus) : []
            guard reservations.mustBeSaved(before: table) else {
                install(table, telling: notices, allowingRemovalFor: released)
                return done(nil)
            }
            persistentState.stage(.persistentReservations, version: 1, table.persists ? table.encoded : nil) { [self] in
                install(table, telling: notices, allowingRemovalFor: released)
            }
            persistentState.begin { done($0 == 0 ? nil : .notSaved($0)) }
        }
    }
}
