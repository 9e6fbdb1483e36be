// ReservationCommands: the commands of targetctl that show reservations, clear them, and take them to another targetd.
//
// Owns: their options, and how their answers are shown. Called by: Targetctl. Must not know: how the daemon works.

import ArgumentParser
import ControlAPI
import Foundation

struct Reservations: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Show who has reserved logical units, clear reservations, take them to another targetd.",
        subcommands: [
            ShowReservations.self, ClearReservations.self, ExportReservations.self, ImportReservations.self,
        ], defaultSubcommand: ShowReservations.self)
}

struct ShowReservations: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "show",
        abstract: "Show the registrants of all logical units, and which of them hold a reservation."
    )
    @OptionGroup var common: CommonOptions

    func run() throws { _ = try common.show("GET", "/v1/reservations", as: [ReservationReport].self, Self.text) }

    private static func text(_ units: [ReservationReport]) -> String {
        Text.table(
            ["TARGET", "LUN", "INITIATOR", "PORT", "KEY", "RESERVATION", "PERSISTS"],
            units.flatMap { unit in
                let registrants = unit.registrants.map { registrant in
                    [
                        unit.target, "\(unit.lun)", registrant.initiator ?? "not seen",
                        "\(registrant.port) at \(registrant.targetPort)", registrant.key,
                        registrant.holds ? unit.type ?? "" : "", unit.persists ? "yes" : "no",
                    ]
                }
                // Of the older kind: held by one initiator, without a key.
                let reserved = unit.reservedBy.map { [unit.target, "\(unit.lun)", $0, "", "", "reserve(6)", "no"] }
                let lost = unit.lost ? [unit.target, "\(unit.lun)", "", "", "", "lost", "yes"] : nil
                return registrants + [reserved, lost].compactMap(\.self)
            }, right: [1])
    }
}

struct ClearReservations: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "clear",
        abstract: "Clear the persistent reservation and all registrations of a logical unit. Registrants are told.",
        discussion: "For initiators that are gone for good. A reservation by RESERVE(6) or (10) ends with reset.")
    @OptionGroup var unit: UnitArguments
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("DELETE", unit.path + "/reservations") }
}

struct ExportReservations: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "export",
        abstract: "Print the reservations of a logical unit as a file for import.",
        discussion: "Stop its guests before, or remove their sockets, so that they change nothing meanwhile.")
    @OptionGroup var unit: UnitArguments
    @OptionGroup var common: CommonOptions

    func run() throws {
        print(String(decoding: try common.ask("GET", unit.path + "/reservations/state"), as: UTF8.self))
    }
}

struct ImportReservations: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "import",
        abstract: "Replace the reservations of a logical unit by exported ones of the unit with the same name.")
    @OptionGroup var unit: UnitArguments
    @Argument(help: "The file; - for standard input.", completion: .file()) var file: String
    @OptionGroup var common: CommonOptions

    func run() throws {
        let body = try CommonOptions.read(file)
        _ = try common.show(
            "PUT", unit.path + "/reservations/state", body: body, as: ChangeReport.self,
            { Text.changes($0, none: "Done. Nothing that runs had to change.") })
    }
}
