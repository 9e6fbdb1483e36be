// PortGroupCommands: the commands of targetctl that show target port groups and set their states.
//
// Owns: their options, and how their answers are shown. Called by: Targetctl. Must not know: how the daemon works.

import ArgumentParser
import ControlAPI

struct PortGroups: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "port-group", abstract: "Show target port groups, set their asymmetric access states.",
        subcommands: [ShowPortGroups.self, SetPortGroup.self], defaultSubcommand: ShowPortGroups.self)
}

struct ShowPortGroups: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "show", abstract: "Show the port groups of all targets, and the sockets that are their ports.")
    @OptionGroup var common: CommonOptions

    func run() throws { _ = try common.show("GET", "/v1/status", as: Status.self, Self.text) }

    private static func text(_ status: Status) -> String {
        Text.table(
            ["TARGET", "GROUP", "STATE", "PREFERRED", "SET BY", "PORTS", "SOCKETS"],
            status.targets.flatMap { target in
                target.portGroups.map { group in
                    let sockets = status.fronts.filter { front in
                        group.ports.contains(front.port) && front.targets.values.contains(target.name)
                    }
                    return [
                        target.name, "\(group.id)", group.state, group.preferred ? "yes" : "no",
                        group.explicit ? "operators, guests" : "operators",
                        group.ports.map(String.init).joined(separator: " "),
                        sockets.map(\.socket).joined(separator: " "),
                    ]
                }
            }, right: [1])
    }
}

struct SetPortGroup: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "set", abstract: "Set the state of a port group. Guests of all groups are told.",
        discussion: "Commands that the medium has end normally; what comes after finds the new state.")
    @Argument(help: "The target, such as naa.60014054ac780582.") var target: String
    @Argument(help: "The number of the group.") var group: Int
    @Argument(
        help: "active/optimized, active/non-optimized, standby, unavailable or transitioning.",
        completion: .list(["active/optimized", "active/non-optimized", "standby", "unavailable", "transitioning"]))
    var state: String
    @OptionGroup var common: CommonOptions

    func run() throws {
        try common.change("PUT", "\(Path.target(target))/port-groups/\(group)/state", ["state": .text(state)])
    }
}
