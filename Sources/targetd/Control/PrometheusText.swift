// PrometheusText: the daemon's counters in Prometheus' text format, version 0.0.4.
//
// Owns: the names of the metrics. Called by: the router. Must not know: how counters are found out.

import ControlAPI

/// Writes what Prometheus reads.
struct PrometheusText {
    private var text = ""

    /// The text for one moment.
    static func render(_ status: Status) -> String {
        var writer = PrometheusText()
        writer.family("info", "gauge", "Version and I/O engine; always 1.", [status]) {
            ([("version", $0.version), ("io_engine", $0.ioEngine)], 1)
        }
        writer.writeReactors(status.reactors)
        writer.writeUnits(status.targets)
        writer.writeFronts(status.fronts)
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

    /// One metric with its values.
    private mutating func family<Item>(
        _ name: String, _ type: String, _ help: String, _ items: [Item],
        _ sample: (Item) -> (labels: [(String, String)], value: UInt64)
    ) {
        text += "# HELP targetd_\(name) \(help)\n# TYPE targetd_\(name) \(type)\n"
        for item in items {
            let (labels, value) = sample(item)
            let list = labels.map { "\($0.0)=\"\(Self.escaped($0.1))\"" }.joined(separator: ",")
            text += "targetd_\(name){\(list)} \(value)\n"
        }
    }

    private static func escaped(_ value: String) -> String {
        value.replacing("\\", with: "\\\\").replacing("\"", with: "\\\"").replacing("\n", with: "\\n")
    }
}
