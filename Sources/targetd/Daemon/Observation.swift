// Observation: the counters of what is on one reactor, in the words of the control API.
//
// Called by: the daemon, through ReactorThread.perform. Must not know: how they are asked for or shown.

import ControlAPI
import Reactor
import SCSICore

extension ReactorObjects {
    /// The counters of the logical units and nexuses that are here.
    func statistics() -> (units: [UnitStatistics], nexuses: [NexusReport]) {
        let names = unitBackstores
        var units: [UnitStatistics] = []
        var nexuses: [NexusReport] = []
        for (name, target) in servedTargets {
            let nexusStatus = target.nexusStatus
            nexuses += nexusStatus.map { NexusReport($0, target: name.description) }
            for (lun, unit) in target.logicalUnits {
                let backstore = names[ObjectIdentifier(unit)] ?? ""
                var report = UnitStatistics(target: name.description, lun: Int(lun.number), backstore: backstore)
                report.inFlight = unit.tasksInFlight
                report.oldestNanoseconds = unit.oldestReceivedAt.map { reactor.now - min($0, reactor.now) } ?? 0
                report.latencies = CommandClass.allCases.map { LatencyReport($0, unit.latency($0)) }
                report.initiators = nexusStatus.compactMap { nexus in
                    unit.commands(nexus: nexus.index).map { commands in
                        var initiator = InitiatorReport(nexus.initiatorPort, commands)
                        initiator.oldestNanoseconds =
                            unit.oldestReceivedAt(nexus: nexus.index).map { reactor.now - min($0, reactor.now) } ?? 0
                        initiator.latencies = CommandClass.allCases.compactMap { kind in
                            unit.latency(kind, nexus: nexus.index).map { LatencyReport(kind, $0) }
                        }
                        return initiator
                    }
                }
                let forgotten = InitiatorReport("", unit.forgottenCommands)
                if !forgotten.commands.isEmpty { report.initiators.append(forgotten) }
                units.append(report)
            }
        }
        return (units, nexuses)
    }
}

extension LatencyReport {
    init(_ kind: CommandClass, _ latency: LatencyStatistics) {
        self.init(
            operation: "\(kind)", sumNanoseconds: latency.sum,
            buckets: latency.buckets.enumerated().filter { $0.element > 0 }.map { bucket, count in
                let end = bucket + 1 < LatencyHistogram.count ? LatencyHistogram.lowerBound(bucket + 1) : .max
                return LatencyBucket(from: LatencyHistogram.lowerBound(bucket), to: end, count: count)
            })
    }
}

extension InitiatorReport {
    init(_ initiator: String, _ statistics: CommandStatistics) {
        var commands: [CommandCount] = []
        for kind in CommandClass.allCases {
            for end in CommandEnd.allCases where statistics[kind, end] > 0 {
                commands.append(
                    CommandCount(
                        operation: "\(kind)", status: JSON.dashed("\(end)"), count: statistics[kind, end]))
            }
        }
        self.init(
            initiator: initiator, commands: commands, bytesRead: statistics.bytesRead,
            bytesWritten: statistics.bytesWritten, unitAttentions: statistics.unitAttentions)
    }
}

extension NexusReport {
    init(_ nexus: NexusStatus, target: String) {
        self.init(
            target: target, initiator: nexus.initiatorPort, connected: nexus.isEstablished,
            inFlight: nexus.tasksInFlight, connections: nexus.connections,
            functions: nexus.functions.map { FunctionCount(function: $0.function.dashed, count: $0.count) })
    }
}

extension TaskManagementFunction {
    /// `logical-unit-reset`
    var dashed: String { self == .clearACA ? "clear-aca" : JSON.dashed("\(self)") }
}
