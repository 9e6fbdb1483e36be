// Reservations: the reservations of one logical unit, persistent and of SPC-2, and which commands each nexus may send.
//
// Owns: the reservation table, the SPC-2 reservation, and the restriction of each nexus that follows from them. Called
// by: LogicalUnit, the reservation commands. Must not know: CDBs, the task set.

/// The reservations of one unit.
@safe
final class Reservations {
    /// Registrations and the persistent reservation.
    private(set) var table: ReservationTable
    /// The nexus that holds the reservation of a RESERVE(6) or (10) command (SPC-2 5.5.1).
    private(set) var reserved: UInt16?
    /// Whether those of the unit's earlier life cannot be read (SPC-4 5.13.5.3: a recoverable lost persistent
    /// reservation). It ends when they are replaced, or by the operator.
    private(set) var areLost: Bool
    /// By nexus: the flags of which a command must have one to be carried out; none: every command is. Behind a
    /// pointer, because each command asks.
    let restrictions: UnsafeMutablePointer<CommandFlags>

    init(_ table: ReservationTable, areLost: Bool = false) {
        precondition(!areLost || table.isEmpty, "reservations that are lost and there")
        self.table = table
        self.areLost = areLost
        unsafe restrictions = .allocate(capacity: Limits.nexusesPerTarget)
        unsafe restrictions.initialize(repeating: [], count: Limits.nexusesPerTarget)
    }

    deinit { unsafe restrictions.deallocate() }

    /// Makes a table that a service has given the one that counts.
    func install(_ table: ReservationTable, on target: TargetDevice?) {
        self.table = table
        areLost = false
        refresh(target)
    }

    /// Whether a new table makes a difference to what the store keeps.
    func mustBeSaved(before table: ReservationTable) -> Bool { table.persists || self.table.persists || areLost }

    /// RESERVE and RELEASE.
    func setReserved(_ nexus: UInt16?, on target: TargetDevice?) {
        reserved = nexus
        refresh(target)
    }

    /// Derives what each nexus may do. To be called when a nexus changes its name, too.
    func refresh(_ target: TargetDevice?) {
        for index in 0..<Limits.nexusesPerTarget {
            unsafe restrictions[index] = restriction(UInt16(index), target?.nexusName(UInt16(index)))
        }
    }

    private func restriction(_ index: UInt16, _ name: NexusName?) -> CommandFlags {
        if let reserved { return reserved == index ? [] : .allowedUnderReserve }
        guard let type = table.type else { return [] }
        if let name, table.isHolder(name) || type.admitsRegistrants && table.registration(name) != nil { return [] }
        return type.admitsReads ? [.allowedUnderAny, .allowedUnderWriteExclusive] : .allowedUnderAny
    }
}

extension LogicalUnit {
    /// What a nexus may not do because of a reservation: `Reservations.restrictions`.
    @inline(__always)
    func restriction(_ nexus: UInt16) -> CommandFlags { unsafe restrictions[Int(nexus)] }

    /// Whether a reservation stands against a nexus. Asked by commands of which the CDB says whether they conflict.
    func isRestricted(_ nexus: UInt16) -> Bool { !restriction(nexus).isEmpty }

    /// Makes what a service has given take effect, and tells the nexuses concerned.
    ///
    /// - Parameter released: Nexuses that do not prevent the removal of the medium any more.
    func install(
        _ table: ReservationTable, telling notices: [ReservationNotice], allowingRemovalFor released: [NexusName] = []
    ) {
        reservations.install(table, on: target)
        refreshReadiness()
        for index in released.flatMap({ target?.nexusIndices($0) ?? [] }) { prevent(false, by: index) }
        for notice in notices {
            for index in target?.nexusIndices(notice.nexus) ?? [] { establish(notice.condition, for: index) }
        }
    }

    /// Saves the table if APTPL asks for it, or has asked for the one before, or that was lost; then it takes effect.
    func change(
        _ table: ReservationTable, telling notices: [ReservationNotice], allowingRemovalFor released: [NexusName]
    ) -> Outcome {
        guard reservations.mustBeSaved(before: table) else {
            install(table, telling: notices, allowingRemovalFor: released)
            return .done(.good)
        }
        return save(.persistentReservations, table.persists ? table.encoded : nil) { [self] in
            install(table, telling: notices, allowingRemovalFor: released)
        }
    }

    /// An I_T nexus loss, or the reset of a nexus, clears its ACA condition (SAM-6 5.9.5) and ends the SPC-2
    /// reservation that it holds (SPC-2 5.5.1). Persistent reservations stay.
    func nexusLost(_ nexus: UInt16) {
        clearACA(nexus)
        if reservations.reserved == nexus { reservations.setReserved(nil, on: target) }
        prevent(false, by: nexus)
    }
}
