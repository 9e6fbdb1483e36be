// ReservationOperations: what the daemon tells of reservations, and how it clears them, gives them away and takes them.
//
// Called by: the control API. Must not know: HTTP, JSON, what is in the bytes of a state.

import ControlAPI
import Foundation
import SCSICore

extension Daemon {
    /// The units that are reserved, or have registrants.
    func reservations() async throws(Failure) -> [ReservationReport] {
        if isStopping { throw Failure(.stopping, "targetd is stopping") }
        var all: [ReservationReport] = []
        for thread in threads { all += await thread.perform { $0.reservations() } }
        return all.filter { !$0.isEmpty }.sorted { ($0.target, $0.lun) < ($1.target, $1.lun) }
    }

    /// The reservations of one unit.
    func reservations(_ address: UnitAddress) async throws(Failure) -> ReservationReport {
        try await look(at: address) { unit, _ in ReservationReport(unit.reservationStatus, address) }
    }

    /// CLEAR by the operator: the persistent reservation and all registrations go, and each registrant is told.
    func clearReservations(_ address: UnitAddress) async throws(Failure) -> ChangeReport {
        try await operation("clear reservations of \(address.text)") { () async throws(Failure) -> ChangeReport in
            let before = try await reservations(address)
            guard before.reservedBy == nil else { throw Self.reserved(address) }
            if before.registrants.isEmpty, !before.lost { return ChangeReport(changes: [], warnings: []) }
            try await transfer(address) { $0.clearReservations(done: $1) }
            let count = before.registrants.count
            let text = "reservations cleared: \(count) registrant\(count == 1 ? "" : "s")"
            events.publish(.changed, subject: address.text, text)
            return ChangeReport(changes: ["~ target \(address.text) \(text)"], warnings: [])
        }
    }

    /// The reservations of one unit, for `importReservations` of another daemon.
    func exportReservations(_ address: UnitAddress) async throws(Failure) -> ReservationState {
        // An operation, so that it is not in the middle of another one; a guest's change that is being saved is a
        // command in flight, which whoever takes a guest elsewhere has none of.
        try await operate("export reservations of", on: address) { unit, _ in
            ReservationState(
                name: NAAName(unit.configuration.name).description,
                state: Data(unit.exportedReservations).base64EncodedString())
        }
    }

    /// Replaces the reservations of one unit by those of the unit of the same name elsewhere.
    func importReservations(
        _ address: UnitAddress, name: String, state: [UInt8]
    ) async throws(Failure) -> ChangeReport {
        try await operation("import reservations of \(address.text)") { () async throws(Failure) -> ChangeReport in
            let own = try await look(at: address) { unit, _ in NAAName(unit.configuration.name).description }
            guard own == name else {
                throw Failure(
                    .conflict,
                    "\(address.text) is \(own), and these are reservations of \(name): a unit takes only "
                        + "those of the unit with its own name.")
            }
            try await transfer(address) { $0.importReservations(state, done: $1) }
            let count = try await reservations(address).registrants.count
            let text = "reservations imported: \(count) registrant\(count == 1 ? "" : "s")"
            events.publish(.changed, subject: address.text, text)
            return ChangeReport(changes: ["~ target \(address.text) \(text)"], warnings: [])
        }
    }

    private static func reserved(_ address: UnitAddress) -> Failure {
        Failure(
            .conflict, "\(address.text) is reserved by RESERVE(6) or (10): a reset of the unit ends that reservation.")
    }

    /// Does something that may have to be saved; the operation under way has seen that the unit is there.
    private func transfer(
        _ address: UnitAddress,
        _ body: @escaping @Sendable (LogicalUnit, @escaping (ReservationTransferError?) -> Void) -> Void
    ) async throws(Failure) {
        let index = placement.targets[address.target]!
        let error = await threads[index].performAndWait { objects, done in
            body(objects.unit(address.number, target: address.target)!, done)
        }
        switch error {
        case nil: return
        case .invalid(let reason): throw Failure(.invalidRequest, "\(address.text): \(reason).")
        case .notPersistent:
            throw Failure(
                .conflict,
                "\(address.text): an initiator was promised that these reservations survive a restart, and "
                    + "nothing is kept here: give the configuration a state-directory.")
        case .reserved: throw Self.reserved(address)
        case .notSaved(let number):
            throw Failure(
                .failed,
                "\(address.text): the state could not be saved: \(SystemError(number: number).text); nothing "
                    + "was changed.")
        }
    }
}

extension ReactorObjects {
    func reservations() -> [ReservationReport] {
        servedTargets.flatMap { name, target in
            target.logicalUnits.map { lun, unit in
                ReservationReport(unit.reservationStatus, UnitAddress(target: name, number: Int(lun.number)))
            }
        }
    }
}

extension ReservationReport {
    fileprivate init(_ status: ReservationStatus, _ address: UnitAddress) {
        self.init(
            target: address.target.description, lun: address.number,
            type: status.type.map { Self.types[$0] ?? "type \($0)" }, generation: status.generation,
            persists: status.persists, registrants: status.registrants.map(RegistrantReport.init),
            reservedBy: status.reservedBy, lost: status.areLost)
    }

    /// The types of persistent reservations (SPC-4 6.13.3).
    private static let types: [UInt8: String] = [
        1: "write-exclusive", 3: "exclusive-access", 5: "write-exclusive-registrants-only",
        6: "exclusive-access-registrants-only", 7: "write-exclusive-all-registrants",
        8: "exclusive-access-all-registrants",
    ]
}

extension RegistrantReport {
    fileprivate init(_ registrant: ReservationStatus.Registrant) {
        self.init(
            initiator: registrant.name, port: NAAName(registrant.initiatorPort).description,
            targetPort: Int(registrant.targetPort), key: NAAName(registrant.key).hexadecimal, holds: registrant.isHolder
        )
    }
}
