// ViewCommands: the commands of targetctl that look at commands, initiators, operations and events.
//
// Owns: their options, and how their answers are shown. Called by: Targetctl. Must not know: how the daemon works.

import ArgumentParser
import ControlAPI
import Foundation

struct Tasks: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Show the commands in flight, the oldest first.")
    @OptionGroup var common: CommonOptions

    func run() throws { _ = try common.show("GET", "/v1/tasks", as: [TaskReport].self, Self.text) }

    private static func text(_ tasks: [TaskReport]) -> String {
        Text.table(
            ["AGE", "TARGET", "LUN", "INITIATOR", "TAG", "ATTRIBUTE", "STATE", "CDB"],
            tasks.map { task in
                let waits = task.waitsFor.map { " (\($0))" } ?? ""
                return [
                    Text.time(task.ageNanoseconds), task.target, "\(task.lun)", task.initiator, "\(task.tag)",
                    task.attribute, (task.aborted ? "aborted, " : "") + task.state + waits, task.cdb,
                ]
            }, right: [0, 2, 4])
    }
}

struct Nexuses: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Show the initiators at each target.")
    @OptionGroup var common: CommonOptions

    func run() throws { _ = try common.show("GET", "/v1/nexuses", as: [NexusReport].self, Self.text) }

    private static func text(_ nexuses: [NexusReport]) -> String {
        Text.table(
            ["TARGET", "INITIATOR", "STATE", "IN FLIGHT", "CONNECTIONS", "TASK MANAGEMENT"],
            nexuses.map { nexus in
                [
                    nexus.target, nexus.initiator, nexus.connected ? "connected" : "gone", "\(nexus.inFlight)",
                    "\(nexus.connections)",
                    nexus.functions.map { "\($0.function)=\($0.count)" }.joined(separator: " "),
                ]
            }, right: [3, 4])
    }
}

struct Operations: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Show the operations that wait, that are under way, or that have ended lately.")
    @OptionGroup var common: CommonOptions

    func run() throws { _ = try common.show("GET", "/v1/operations", as: [OperationStatus].self, Self.text) }

    private static func text(_ operations: [OperationStatus]) -> String {
        Text.table(
            ["ID", "STATE", "DONE", "OPERATION"],
            operations.map {
                ["\($0.id)", $0.state, "\($0.done)/\($0.total)", $0.what + ($0.message.map { ": \($0)" } ?? "")]
            }, right: [0, 2])
    }
}

struct Trace: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Show the last commands of a logical unit that ended, or switch that on or off.")
    @OptionGroup var unit: UnitArguments
    @Flag(help: "Keep the last commands from now on.") var on = false
    @Flag(help: "Keep none any more.") var off = false
    @Option(help: "With --on: how many are kept, up to 65536.") var entries: UInt64 = 1024
    @OptionGroup var common: CommonOptions

    func validate() throws { if on && off { throw ValidationError("Give --on or --off, not both.") } }

    func run() throws {
        let path = unit.path + "/trace"
        if on {
            let body = JSON.encode(["entries": entries])
            _ = try common.show("PUT", path, body: body, as: TraceReport.self) {
                "On: \($0.capacity) commands are kept."
            }
        } else if off {
            _ = try common.show("DELETE", path, as: TraceReport.self) { _ in "Off." }
        } else {
            _ = try common.show("GET", path, as: TraceReport.self, Self.text)
        }
    }

    private static func text(_ trace: TraceReport) -> String {
        if trace.capacity == 0 { return "The trace is off: switch it on with --on." }
        return Text.table(
            ["AGO", "TOOK", "INITIATOR", "TAG", "ATTRIBUTE", "STATUS", "BYTES", "CDB"],
            trace.entries.map { entry in
                [
                    Text.time(entry.ageNanoseconds), Text.time(entry.latencyNanoseconds), entry.initiator,
                    "\(entry.tag)", entry.attribute, entry.status + (entry.sense.map { " \($0)" } ?? ""),
                    "\(entry.bytes)", entry.cdb,
                ]
            }, right: [0, 1, 3, 6])
    }
}

struct Events: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Show what happens, as it happens, until it is interrupted.")
    @Flag(help: "Begin with the last events that the daemon has kept.") var recent = false
    @Option(help: "End after so many events.") var count: Int?
    @OptionGroup var common: CommonOptions

    func run() throws {
        var rest = count
        if rest == 0 { return }
        try common.follow("/v1/events\(recent ? "?recent=true" : "")") { line in
            if common.json {
                print(line)
            } else if let event = try? JSON.decode(EventReport.self, from: Data(line.utf8)) {
                print(Self.text(event))
            }
            // Seen at once where standard output is a pipe or a file.
            try? FileHandle.standardOutput.synchronize()
            rest = rest.map { $0 - 1 }
            return rest != 0
        }
    }

    private static func text(_ event: EventReport) -> String {
        let time = Date(timeIntervalSince1970: Double(event.time) / 1000).formatted(.iso8601)
        return "\(time) \(event.kind)\(event.subject.map { " \($0)" } ?? ""): \(event.text)"
    }
}

extension Text {
    /// A span of time with three digits or so: `1.2ms`.
    static func time(_ nanoseconds: UInt64) -> String {
        let units: [(String, Double)] = [("ns", 1), ("us", 1e3), ("ms", 1e6), ("s", 1e9)]
        let unit = units.last { Double(nanoseconds) >= $0.1 } ?? units[0]
        return short(Double(nanoseconds) / unit.1) + unit.0
    }

    /// A rate with three digits or so: `12.3k`.
    static func rate(_ value: Double, base: Double = 1000) -> String {
        let names = base == 1000 ? ["", "k", "M", "G", "T"] : ["B", "KiB", "MiB", "GiB", "TiB"]
        var (rest, index) = (value, 0)
        while rest >= base, index + 1 < names.count { (rest, index) = (rest / base, index + 1) }
        return (index == 0 ? "\(Int(rest.rounded()))" : short(rest)) + names[index]
    }

    private static func short(_ value: Double) -> String {
        value >= 100 || value == value.rounded() ? "\(Int(value.rounded()))" : "\((value * 10).rounded() / 10)"
    }
}
