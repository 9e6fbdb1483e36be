// Top: what goes on at each logical unit and each guest, live.
//
// Owns: the differences between two reports, and how they are shown. Called by: Targetctl. Must not know: how the
// daemon counts.

import ArgumentParser
import ControlAPI
import Foundation

/// What went on between two reports.
struct Activity: Encodable, Equatable {
    /// One logical unit.
    struct Unit: Encodable, Equatable {
        var target: String
        var lun: Int
        var backstore: String
        /// READ and WRITE commands in a second.
        var reads: Double
        var writes: Double
        /// Bytes in a second.
        var bytesRead: Double
        var bytesWritten: Double
        /// Half, and 99 of 100, of the READ and WRITE commands took less; absent if there were none.
        var medianNanoseconds: UInt64?
        var percentile99Nanoseconds: UInt64?
        var inFlight: Int
        var oldestNanoseconds: UInt64
    }

    /// One initiator, at all of its logical units.
    struct Guest: Encodable, Equatable {
        var initiator: String
        /// Commands of any kind in a second.
        var commands: Double
        var bytesRead: Double
        var bytesWritten: Double
        /// Half, and 99 of 100, of its READ and WRITE commands took less; absent if there were none.
        var medianNanoseconds: UInt64?
        var percentile99Nanoseconds: UInt64?
        var inFlight: Int
        var oldestNanoseconds: UInt64
        /// Commands that ended with anything else than GOOD, in a second.
        var notGood: Double
    }

    var seconds: Double
    var units: [Unit]
    var guests: [Guest]

    /// What went on from one report to a later one. A unit that is new counts from zero, and so does one whose counters
    /// began again.
    init(from old: StatisticsReport, to new: StatisticsReport) {
        let seconds = max(Double(new.time &- old.time) / 1e9, 1e-9)
        self.seconds = seconds
        let before = Dictionary(
            old.units.map { (Self.key($0), $0) }, uniquingKeysWith: { first, _ in first })
        var guests: [String: Guest] = [:]
        var latencies: [String: Latencies] = [:]
        units = new.units.map { unit in
            let earlier = before[Self.key(unit)]
            for initiator in unit.initiators where !initiator.initiator.isEmpty {
                let past = earlier?.initiators.first { $0.initiator == initiator.initiator }
                var guest =
                    guests[initiator.initiator]
                    ?? Guest(
                        initiator: initiator.initiator, commands: 0, bytesRead: 0, bytesWritten: 0, inFlight: 0,
                        oldestNanoseconds: 0, notGood: 0)
                let per = { (value: (InitiatorReport) -> UInt64) in
                    Self.difference(value(initiator), past.map(value)) / seconds
                }
                guest.commands += per { $0.commands.reduce(0) { $0 + $1.count } }
                guest.notGood += per { $0.commands.reduce(0) { $0 + ($1.status == "good" ? 0 : $1.count) } }
                guest.bytesRead += per(\.bytesRead)
                guest.bytesWritten += per(\.bytesWritten)
                guest.oldestNanoseconds = max(guest.oldestNanoseconds, initiator.oldestNanoseconds)
                latencies[initiator.initiator, default: Latencies()].add(
                    initiator.latencies, since: past?.latencies ?? [])
                guests[initiator.initiator] = guest
            }
            return Self.unit(unit, earlier, seconds)
        }
        for nexus in new.nexuses { guests[nexus.initiator]?.inFlight += nexus.inFlight }
        for (initiator, latencies) in latencies {
            guests[initiator]?.medianNanoseconds = latencies.bound(0.5)
            guests[initiator]?.percentile99Nanoseconds = latencies.bound(0.99)
        }
        self.guests = guests.values.sorted { $0.initiator < $1.initiator }
    }

    private static func key(_ unit: UnitStatistics) -> String { "\(unit.target) \(unit.lun)" }

    private static func difference(_ now: UInt64, _ before: UInt64?) -> Double {
        guard let before, before <= now else { return Double(now) }
        return Double(now - before)
    }

    private static func unit(_ unit: UnitStatistics, _ earlier: UnitStatistics?, _ seconds: Double) -> Unit {
        func count(_ report: UnitStatistics, _ operation: String) -> UInt64 {
            report.latencies.filter { $0.operation == operation }.flatMap(\.buckets).reduce(0) { $0 + $1.count }
        }
        func rate(_ value: (UnitStatistics) -> UInt64) -> Double {
            difference(value(unit), earlier.map(value)) / seconds
        }
        var latencies = Latencies()
        latencies.add(unit.latencies, since: earlier?.latencies ?? [])
        return Unit(
            target: unit.target, lun: unit.lun, backstore: unit.backstore, reads: rate { count($0, "read") },
            writes: rate { count($0, "write") }, bytesRead: rate { $0.initiators.reduce(0) { $0 + $1.bytesRead } },
            bytesWritten: rate { $0.initiators.reduce(0) { $0 + $1.bytesWritten } },
            medianNanoseconds: latencies.bound(0.5),
            percentile99Nanoseconds: latencies.bound(0.99), inFlight: unit.inFlight,
            oldestNanoseconds: unit.oldestNanoseconds)
    }

    /// Two tables.
    var text: String {
        let units = Text.table(
            [
                "TARGET", "LUN", "BACKSTORE", "READ/s", "WRITE/s", "READ B/s", "WRITE B/s", "P50", "P99", "IN FLIGHT",
                "OLDEST",
            ],
            self.units.map { unit in
                [
                    unit.target, "\(unit.lun)", unit.backstore, Text.rate(unit.reads), Text.rate(unit.writes),
                    Text.rate(unit.bytesRead, base: 1024), Text.rate(unit.bytesWritten, base: 1024),
                    unit.medianNanoseconds.map(Text.time) ?? "-", unit.percentile99Nanoseconds.map(Text.time) ?? "-",
                    "\(unit.inFlight)", unit.inFlight == 0 ? "-" : Text.time(unit.oldestNanoseconds),
                ]
            }, right: [1, 3, 4, 5, 6, 7, 8, 9, 10])
        let guests = Text.table(
            [
                "GUEST", "COMMANDS/s", "READ B/s", "WRITE B/s", "P50", "P99", "IN FLIGHT", "OLDEST", "NOT GOOD/s",
            ],
            self.guests.map { guest in
                [
                    guest.initiator, Text.rate(guest.commands), Text.rate(guest.bytesRead, base: 1024),
                    Text.rate(guest.bytesWritten, base: 1024), guest.medianNanoseconds.map(Text.time) ?? "-",
                    guest.percentile99Nanoseconds.map(Text.time) ?? "-", "\(guest.inFlight)",
                    guest.inFlight == 0 ? "-" : Text.time(guest.oldestNanoseconds), Text.rate(guest.notGood),
                ]
            }, right: [1, 2, 3, 4, 5, 6, 7, 8])
        return units + "\n\n" + guests
    }
}

/// How long READ and WRITE commands took between two reports.
private struct Latencies {
    /// Commands by the end of their bucket.
    private var counts: [UInt64: UInt64] = [:]

    mutating func add(_ new: [LatencyReport], since old: [LatencyReport]) {
        let (now, before) = (Self.buckets(new), Self.buckets(old))
        for (bound, count) in now {
            let past = before[bound] ?? 0
            counts[bound, default: 0] += count < past ? count : count - past
        }
    }

    private static func buckets(_ reports: [LatencyReport]) -> [UInt64: UInt64] {
        reports.filter { $0.operation != "other" }.flatMap(\.buckets)
            .reduce(into: [:]) { $0[$1.to, default: 0] += $1.count }
    }

    /// What so large a part of the commands took less than; `nil` if there were none.
    func bound(_ fraction: Double) -> UInt64? {
        let total = counts.values.reduce(0, +)
        var rest = UInt64((Double(total) * fraction).rounded(.up))
        for (bound, count) in counts.sorted(by: { $0.key < $1.key }) where count > 0 {
            if count >= rest { return bound }
            rest -= count
        }
        return nil
    }
}

struct Top: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Show what goes on at each logical unit and each guest, again and again.",
        discussion: """
            On a terminal that can, the screen is drawn anew each time; elsewhere one report follows the other. --once \
            shows one interval and ends.
            """)
    @Option(help: "Seconds between two looks.") var interval = 2.0
    @Flag(help: "Show one interval, and end.") var once = false
    @OptionGroup var common: CommonOptions

    func validate() throws {
        guard interval >= 0.05, interval <= 3600 else { throw ValidationError("--interval must be 0.05 to 3600.") }
    }

    func run() throws {
        var old = try statistics()
        while true {
            Thread.sleep(forTimeInterval: interval)
            let new = try statistics()
            let activity = Activity(from: old, to: new)
            if common.json {
                print(String(decoding: JSON.line(activity), as: UTF8.self), terminator: "")
            } else {
                print((redraws ? "\u{1b}[H\u{1b}[J" : "") + activity.text + (redraws ? "" : "\n"))
            }
            fflush(nil)
            if once { return }
            old = new
        }
    }

    private var redraws: Bool {
        let terminal = ProcessInfo.processInfo.environment["TERM"] ?? "dumb"
        return !once && isatty(1) == 1 && terminal != "dumb"
    }

    private func statistics() throws -> StatisticsReport {
        let data = try common.ask("GET", "/v1/statistics")
        do {
            return try JSON.decode(StatisticsReport.self, from: data)
        } catch {
            throw CommonOptions.end(.failed, "the answer is not one of this version of targetd: \(error)")
        }
    }
}
