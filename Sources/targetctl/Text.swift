// Text: how answers are shown to people.
//
// Called by: the commands. Must not know: where answers come from.

import ControlAPI

/// Tables and lines.
enum Text {
    static func status(_ status: Status) -> String {
        """
        \(status.version), \(status.reactors.count) reactor\(status.reactors.count == 1 ? "" : "s"), \(status.ioEngine)

        \(fronts(status.fronts))
        \(status.xen.map { "\n\(xen($0))\n" } ?? "")
        \(([units(status.targets)] + slow(status.targets)).joined(separator: "\n\n"))
        """
    }

    /// Commands that are older than this are named.
    private static let slowMilliseconds: UInt64 = 10_000

    /// What is stuck, if anything is.
    private static func slow(_ targets: [TargetStatus]) -> [String] {
        let commands = targets.flatMap { target in
            target.luns.compactMap { unit in
                unit.oldest.map { (target: target.name, lun: unit.lun, command: $0) }
            }
        }.filter { $0.command.ageMilliseconds >= slowMilliseconds || $0.command.expired }
        guard !commands.isEmpty else { return [] }
        return [
            table(
                ["SLOW COMMAND", "LUN", "AGE", "OPERATION", "LBA", "BLOCKS", "WHERE", "INITIATOR"],
                commands.map { target, lun, command in
                    [
                        target, "\(lun)", age(command), String(command.operationCode, radix: 16) + "h",
                        "\(command.lba)", "\(command.blocks)", command.place + (command.expired ? ", cancelled" : ""),
                        command.initiator,
                    ]
                }, right: [1, 2, 3, 4, 5])
        ]
    }

    /// Seconds with one decimal.
    private static func age(_ command: CommandStatus) -> String {
        "\(command.ageMilliseconds / 1000).\(command.ageMilliseconds % 1000 / 100)s"
    }

    static func fronts(_ fronts: [FrontStatus]) -> String {
        table(
            ["FRONT", "GUEST", "QUEUES", "REACTOR", "COMMANDS", "TARGETS"],
            fronts.map { front in
                let targets = front.targets.sorted { (Int($0.key) ?? 0) < (Int($1.key) ?? 0) }
                return [
                    front.socket, front.connected ? "connected" : "none", "\(front.queues)", "\(front.reactor)",
                    "\(front.commands)", targets.map { "\($0.key)=\($0.value)" }.joined(separator: " "),
                ]
            }, right: [2, 3, 4])
    }

    static func xen(_ status: XenStatus) -> String {
        let vhosts = table(
            ["DOMAIN", "VHOST", "BACK END", "FRONT END", "REACTOR", "COMMANDS", "DEVICES"],
            status.vhosts.map { vhost in
                let devices = vhost.devices.map { "\($0.virtualDevice)=\($0.physicalDevice)" }
                return [
                    "\(vhost.domain)", "\(vhost.vhost)", vhost.backendState, vhost.frontendState,
                    vhost.reactor.map { "\($0)" } ?? "", "\(vhost.commands)", devices.joined(separator: " "),
                ]
            }, right: [0, 1, 4, 5])
        return status.waitsFor.map { "Xen guests are not served: \($0)\n" } ?? vhosts
    }

    static func units(_ targets: [TargetStatus]) -> String {
        table(
            [
                "TARGET", "LUN", "BACKSTORE", "SIZE", "MODE", "READS", "WRITES", "OTHER", "IN FLIGHT", "OLDEST",
                "ERRORS",
            ],
            targets.flatMap { target in
                target.luns.map { unit in
                    [
                        target.name, "\(unit.lun)", unit.backstore, size(unit.size), unit.writeProtected ? "ro" : "rw",
                        "\(unit.reads)", "\(unit.writes)", "\(unit.others)", "\(unit.inFlight)",
                        unit.oldest.map(age) ?? "", "\(unit.backstoreErrors)",
                    ]
                }
            }, right: [1, 3, 5, 6, 7, 8, 9, 10])
    }

    static func backstores(_ backstores: [BackstoreStatus]) -> String {
        table(
            ["BACKSTORE", "TYPE", "SIZE", "MODE", "PATH"],
            backstores.map {
                [$0.name, $0.type, $0.size.map(size) ?? "not open", $0.readOnly ? "ro" : "rw", $0.path ?? ""]
            }, right: [2])
    }

    static func reactors(_ reactors: [ReactorStatus]) -> String {
        table(
            ["REACTOR", "TURNS", "WAITS", "REQUESTS", "PUT OFF", "SUBMISSIONS"],
            reactors.map {
                ["\($0.index)", "\($0.turns)", "\($0.waits)", "\($0.requests)", "\($0.refused)", "\($0.submissions)"]
            }, right: [0, 1, 2, 3, 4, 5])
    }

    static func changes(_ report: ChangeReport, none: String) -> String {
        let lines = report.warnings.map(line(for:)) + (report.changes.isEmpty ? [none] : report.changes)
        return lines.joined(separator: "\n")
    }

    /// `12: error: key: what is wrong`
    static func line(for problem: ProblemReport) -> String {
        let place = problem.line.map { "line \($0): " } ?? ""
        return "\(place)\(problem.severity): \(problem.key.isEmpty ? "" : problem.key + ": ")\(problem.text)"
    }

    /// Bytes with the largest binary unit that divides them.
    static func size(_ bytes: UInt64) -> String {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
        let step = min(bytes == 0 ? 0 : bytes.trailingZeroBitCount / 10, units.count - 1)
        return "\(bytes >> (10 * step))\(units[step])"
    }

    /// Columns as wide as their widest value.
    ///
    /// - Parameter right: The columns whose values are numbers, which end together.
    static func table(_ header: [String], _ rows: [[String]], right: Set<Int>) -> String {
        let lines = [header] + rows
        let widths = header.indices.map { column in lines.map { $0[column].count }.max() ?? 0 }
        return lines.map { line in
            let cells = line.enumerated().map { column, value in
                let fill = String(repeating: " ", count: widths[column] - value.count)
                return right.contains(column) ? fill + value : value + fill
            }
            let text = cells.joined(separator: "  ")
            return String(text.reversed().drop { $0 == " " }.reversed())
        }.joined(separator: "\n")
    }
}
