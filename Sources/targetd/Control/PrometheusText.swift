// PrometheusText: the daemon's counters in Prometheus' text format, version 0.0.4.
//
// Owns: the names of the metrics. Called by: the router. Must not know: how counters are found out.

import ControlAPI

/// Writes what Prometheus reads.
struct PrometheusText {
    private var text = ""

    /// The text for one moment.
    static func render(_ status: Status, _ statistics: StatisticsReport) -> String {
        var writer = PrometheusText()
        writer.family("info", "gauge", "Version and I/O engine; always 1.", [status]) {
            ([("version", $0.version), ("io_engine", $0.ioEngine)], 1)
        }
        writer.writeReactors(status.reactors)
        writer.writeUnits(status.targets)
        writer.writeFronts(status.fronts)
        writer.writeLatencies(statistics.units)
        writer.writeInitiators(statistics.units)
        writer.writeGuests(statistics)
        writer.writeNexuses(statistics.nexuses)
        return writer.text
    }

    private mutating func writeReactors(_ reactors: [ReactorStatus]) {
        func labels(_ reactor: ReactorStatus) -> [(String, String)] { [("reactor", "\(reactor.index)")] }
        let counters: [(String, String, KeyPath<ReactorStatus, UInt64>)] = [
            ("reactor_turns_total", "Turns of the reactor's loop.", \.turns),
            ("reactor_waits_total", "Times the reactor went to sleep.", \.waits),
            ("reactor_requests_total", "I/O requests that were taken.", \.requests),
            ("reactor_refused_total", "I/O requests put off because too many were in flight.", \.refused),
            ("reactor_submissions_total", "Calls that handed I/O to the kernel.", \.submissions),
        ]
        for (name, help, value) in counters {
            family(name, "counter", help, reactors) { (labels($0), $0[keyPath: value]) }
        }
        fractions(
            "reactor_busy_seconds_total", "counter", "Time in turns of the reactor's loop that found work.", reactors
        ) { (labels($0), $0.busyNanoseconds) }
    }

    private mutating func writeUnits(_ targets: [TargetStatus]) {
        let units = targets.flatMap { target in target.luns.map { (target.name, $0) } }
        func labels(_ target: String, _ unit: LogicalUnitStatus) -> [(String, String)] {
            [("target", target), ("lun", "\(unit.lun)"), ("backstore", unit.backstore)]
        }
        family("lun_size_bytes", "gauge", "Bytes of the logical unit.", units) { (labels($0, $1), $1.size) }
        family("lun_in_flight", "gauge", "Commands received and not completed.", units) {
            (labels($0, $1), UInt64($1.inFlight))
        }
        family("lun_oldest_command_milliseconds", "gauge", "Age of the oldest command in flight; 0: none.", units) {
            (labels($0, $1), $1.oldest?.ageMilliseconds ?? 0)
        }
        let commands: [(String, KeyPath<LogicalUnitStatus, UInt64>)] = [
            ("read", \.reads), ("write", \.writes), ("other", \.others),
        ]
        family("lun_commands_total", "counter", "Commands that ended.", commands.flatMap { c in units.map { (c, $0) } })
        {
            command, unit in
            (labels(unit.0, unit.1) + [("operation", command.0)], unit.1[keyPath: command.1])
        }
        let bytes: [(String, KeyPath<LogicalUnitStatus, UInt64>)] = [("read", \.bytesRead), ("write", \.bytesWritten)]
        family("lun_bytes_total", "counter", "Bytes that were moved.", bytes.flatMap { b in units.map { (b, $0) } }) {
            direction, unit in
            (labels(unit.0, unit.1) + [("operation", direction.0)], unit.1[keyPath: direction.1])
        }
        let counters: [(String, String, KeyPath<LogicalUnitStatus, UInt64>)] = [
            ("lun_not_good_total", "Commands that ended neither GOOD nor CONDITION MET.", \.notGood),
            ("lun_aborted_total", "Commands that were aborted.", \.aborted),
            ("lun_expired_total", "Commands whose deadline passed.", \.expired),
            ("lun_backstore_errors_total", "Requests that the medium ended with an error.", \.backstoreErrors),
        ]
        for (name, help, value) in counters {
            family(name, "counter", help, units) { (labels($0, $1), $1[keyPath: value]) }
        }
    }

    private mutating func writeFronts(_ fronts: [FrontStatus]) {
        func labels(_ front: FrontStatus) -> [(String, String)] { [("front", front.type), ("socket", front.socket)] }
        family("front_connected", "gauge", "1 while a guest is attached.", fronts) {
            (labels($0), $0.connected ? 1 : 0)
        }
        let counters: [(String, String, KeyPath<FrontStatus, UInt64>)] = [
            ("front_connections_total", "Guests that have attached.", \.connections),
            ("front_commands_total", "Commands that the guest has sent.", \.commands),
            ("front_task_management_total", "Task management functions of the guest.", \.taskManagementFunctions),
            ("front_notifications_total", "Notifications that were sent to the guest.", \.notifications),
            ("front_events_total", "Events that were given to the guest.", \.events),
            ("front_events_missed_total", "Events for which the guest had no room.", \.eventsMissed),
            ("front_broken_queues_total", "Virtqueues taken out of service.", \.brokenQueues),
        ]
        for (name, help, value) in counters {
            family(name, "counter", help, fronts) { (labels($0), $0[keyPath: value]) }
        }
    }

    private static func labels(_ unit: UnitStatistics) -> [(String, String)] {
        [("target", unit.target), ("lun", "\(unit.lun)"), ("backstore", unit.backstore)]
    }

    /// The bounds of the histogram's buckets: powers of two, from 8 µs to 17 s.
    private static let bounds = (13...34).map { UInt64(1) << UInt64($0) }

    private mutating func writeLatencies(_ units: [UnitStatistics]) {
        fractions("lun_oldest_in_flight_seconds", "gauge", "Age of the oldest command that has not ended.", units) {
            (Self.labels($0), $0.oldestNanoseconds)
        }
        heading("lun_latency_seconds", "histogram", "Time from a command's arrival to its response.")
        for unit in units {
            for latency in unit.latencies {
                histogram(
                    "lun_latency_seconds", Self.labels(unit) + [("operation", latency.operation)], latency.buckets,
                    latency.sumNanoseconds)
            }
        }
    }

    /// The samples of a histogram. The buckets may be in any order, and some may be the same.
    private mutating func histogram(
        _ name: String, _ labels: [(String, String)], _ buckets: [LatencyBucket], _ sum: UInt64
    ) {
        let total = buckets.reduce(0) { $0 + $1.count }
        for bound in Self.bounds {
            let count = buckets.reduce(0) { $0 + ($1.to <= bound ? $1.count : 0) }
            sample("targetd_\(name)_bucket", labels + [("le", Self.seconds(bound))], "\(count)")
        }
        sample("targetd_\(name)_bucket", labels + [("le", "+Inf")], "\(total)")
        sample("targetd_\(name)_sum", labels, Self.seconds(sum))
        sample("targetd_\(name)_count", labels, "\(total)")
    }

    /// What a guest sees of all of its units together.
    private mutating func writeGuests(_ statistics: StatisticsReport) {
        let all = statistics.units.flatMap(\.initiators).filter { !$0.initiator.isEmpty }
        let guests = Dictionary(grouping: all, by: \.initiator).sorted { $0.key < $1.key }
        let inFlight = Dictionary(grouping: statistics.nexuses, by: \.initiator)
        family("guest_in_flight", "gauge", "Commands of an initiator received and not completed.", guests) { name, _ in
            ([("initiator", name)], (inFlight[name] ?? []).reduce(0) { $0 + UInt64($1.inFlight) })
        }
        fractions(
            "guest_oldest_in_flight_seconds", "gauge", "Age of the oldest command of an initiator that has not ended.",
            guests
        ) { name, reports in
            ([("initiator", name)], reports.map(\.oldestNanoseconds).max() ?? 0)
        }
        heading(
            "guest_latency_seconds", "histogram", "Time from a command's arrival to its response, by initiator.")
        for (name, reports) in guests {
            let latencies = Dictionary(grouping: reports.flatMap(\.latencies), by: \.operation)
            for (operation, latencies) in latencies.sorted(by: { $0.key < $1.key }) {
                histogram(
                    "guest_latency_seconds", [("initiator", name), ("operation", operation)],
                    latencies.flatMap(\.buckets), latencies.reduce(0) { $0 + $1.sumNanoseconds })
            }
        }
    }

    private mutating func writeInitiators(_ units: [UnitStatistics]) {
        let all = units.flatMap { unit in unit.initiators.map { (unit, $0) } }
        func labels(_ item: (UnitStatistics, InitiatorReport)) -> [(String, String)] {
            Self.labels(item.0) + [("initiator", item.1.initiator)]
        }
        family(
            "initiator_commands_total", "counter", "Commands that ended, by initiator, class and status.",
            all.flatMap { item in item.1.commands.map { (item, $0) } }
        ) { item, command in
            (labels(item) + [("operation", command.operation), ("status", command.status)], command.count)
        }
        let bytes: [(String, KeyPath<InitiatorReport, UInt64>)] = [("read", \.bytesRead), ("write", \.bytesWritten)]
        family(
            "initiator_bytes_total", "counter", "Bytes that were moved, by initiator.",
            bytes.flatMap { direction in all.map { (direction, $0) } }
        ) { direction, item in
            (labels(item) + [("operation", direction.0)], item.1[keyPath: direction.1])
        }
        family("initiator_unit_attentions_total", "counter", "Unit attention conditions that were reported.", all) {
            (labels(($0, $1)), $1.unitAttentions)
        }
    }

    private mutating func writeNexuses(_ nexuses: [NexusReport]) {
        func labels(_ nexus: NexusReport) -> [(String, String)] {
            [("target", nexus.target), ("initiator", nexus.initiator)]
        }
        family("nexus_connected", "gauge", "1 while the initiator is connected.", nexuses) {
            (labels($0), $0.connected ? 1 : 0)
        }
        family("nexus_connections_total", "counter", "Times the initiator connected.", nexuses) {
            (labels($0), $0.connections)
        }
        family("nexus_in_flight", "gauge", "Commands received and not completed.", nexuses) {
            (labels($0), UInt64($0.inFlight))
        }
        family(
            "nexus_task_management_total", "counter", "Task management functions that were asked for.",
            nexuses.flatMap { nexus in nexus.functions.map { (nexus, $0) } }
        ) { nexus, function in
            (labels(nexus) + [("function", function.function)], function.count)
        }
    }

    /// Nanoseconds as seconds, without rounding.
    private static func seconds(_ nanoseconds: UInt64) -> String {
        let (whole, rest) = nanoseconds.quotientAndRemainder(dividingBy: 1_000_000_000)
        if rest == 0 { return "\(whole)" }
        let digits = String(rest)
        return "\(whole)." + String(repeating: "0", count: 9 - digits.count) + digits
    }

    private mutating func sample(_ name: String, _ labels: [(String, String)], _ value: String) {
        let list = labels.map { "\($0.0)=\"\(Self.escaped($0.1))\"" }.joined(separator: ",")
        text += "\(name){\(list)} \(value)\n"
    }

    private mutating func heading(_ name: String, _ type: String, _ help: String) {
        text += "# HELP targetd_\(name) \(help)\n# TYPE targetd_\(name) \(type)\n"
    }

    /// One metric whose values are times in nanoseconds, shown in seconds.
    private mutating func fractions<Item>(
        _ name: String, _ type: String, _ help: String, _ items: [Item],
        _ value: (Item) -> (labels: [(String, String)], nanoseconds: UInt64)
    ) {
        heading(name, type, help)
        for item in items {
            let (labels, nanoseconds) = value(item)
            sample("targetd_\(name)", labels, Self.seconds(nanoseconds))
        }
    }

    /// One metric with its values.
    private mutating func family<Item>(
        _ name: String, _ type: String, _ help: String, _ items: [Item],
        _ values: (Item) -> (labels: [(String, String)], value: UInt64)
    ) {
        heading(name, type, help)
        for item in items {
            let (labels, value) = values(item)
            sample("targetd_\(name)", labels, "\(value)")
        }
    }

    private static func escaped(_ value: String) -> String {
        value.replacing("\\", with: "\\\\").replacing("\"", with: "\\\"").replacing("\n", with: "\\n")
    }
}
