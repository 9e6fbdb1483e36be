// SlowCommandLog: commands that take too long: their deadlines, and the log's lines about them.
//
// Owns: what has been said of which logical unit. Called by: ReactorThread, on the reactor's thread only. Must not
// know: sockets, how a command is ended.

import Logging
import Reactor
import SCSICore

/// Says which logical unit's commands are stuck: when it begins, once a minute while it lasts, and when it is over.
final class SlowCommandLog {
    /// A command that is older than this is slow, whatever its deadline.
    static let age: UInt64 = 10_000_000_000
    /// How often a unit that stays stuck is named, in nanoseconds.
    static let repetition: UInt64 = 60_000_000_000

    /// A logical unit as the log names it.
    struct Unit {
        let identity: ObjectIdentifier
        let target: String
        let lun: Int
        let backstore: String
        let oldest: TaskInFlight?
    }

    private struct Report {
        var saidAt: UInt64
        var age: UInt64
        var metadata: Logger.Metadata
    }

    private let logger: Logger
    private var rate = LogRate()
    private var stuck: [ObjectIdentifier: Report] = [:]

    init(_ logger: Logger) { self.logger = logger }

    /// Looks at all logical units.
    ///
    /// - Parameter now: Nanoseconds of a monotonic clock.
    func look(at units: [Unit], now: UInt64) {
        var seen: Set<ObjectIdentifier> = []
        for unit in units {
            guard let oldest = unit.oldest, oldest.age >= Self.age || oldest.hasExpired else { continue }
            seen.insert(unit.identity)
            let last = stuck[unit.identity]
            if let last, now &- last.saidAt < Self.repetition {
                stuck[unit.identity]?.age = max(last.age, oldest.age)
                continue
            }
            let metadata: Logger.Metadata = [
                "target": "\(unit.target)", "lun": "\(unit.lun)", "backstore": "\(unit.backstore)",
            ]
            stuck[unit.identity] = Report(saidAt: now, age: oldest.age, metadata: metadata)
            warn(oldest, metadata, now)
        }
        for (identity, report) in stuck where !seen.contains(identity) {
            stuck[identity] = nil
            guard let suppressed = rate.admit(now) else { continue }
            logger.notice(
                "commands end again; the slowest took at least \(report.age / 1_000_000_000) s",
                metadata: Self.metadata(report.metadata, suppressed))
        }
    }

    private func warn(_ oldest: TaskInFlight, _ metadata: Logger.Metadata, _ now: UInt64) {
        guard let suppressed = rate.admit(now) else { return }
        var metadata = Self.metadata(metadata, suppressed)
        metadata["initiator"] = "\(oldest.initiatorPort)"
        metadata["tag"] = "\(oldest.tag)"
        let code = String(oldest.operationCode, radix: 16)
        let place =
            switch oldest.place {
            case .waiting: "waits for other commands"
            case .waitingForResource: "waits for memory or for room in the backstore"
            case .stateStore: "waits until the logical unit's state is saved"
            case .backstore: "is with the backstore" + (oldest.hasExpired ? ", which was asked to cancel it" : "")
            }
        logger.warning(
            """
            a command has not ended for \(oldest.age / 1_000_000_000) s: operation code \(code)h, \
            LBA \(oldest.address), \(oldest.blocks) blocks; it \(place)
            """, metadata: metadata)
    }

    private static func metadata(_ metadata: Logger.Metadata, _ suppressed: Int) -> Logger.Metadata {
        suppressed == 0 ? metadata : metadata.merging(["suppressed": "\(suppressed)"]) { $1 }
    }
}

extension ReactorObjects {
    /// The longest time between two looks at the commands in flight, and the shortest, in nanoseconds.
    private static let interval: UInt64 = 1_000_000_000
    private static let shortestInterval: UInt64 = 50_000_000

    /// Looks at the commands in flight now and then, from now on.
    func watchCommands() {
        let next = min(shard.nextDeadline ?? .max, reactor.now + Self.interval)
        _ = unsafe reactor.setTimer(
            at: max(next, reactor.now + Self.shortestInterval),
            { context in
                unsafe Unmanaged<ReactorObjects>.fromOpaque(context)._withUnsafeGuaranteedRef { objects in
                    objects.lookAtCommands()
                    objects.watchCommands()
                }
            }, Unmanaged.passUnretained(self).toOpaque())
    }

    private func lookAtCommands() {
        shard.now = reactor.now
        shard.expireDeadlines()
        let names = unitBackstores
        let units = servedTargets.flatMap { name, target in
            target.logicalUnits.map { lun, unit in
                SlowCommandLog.Unit(
                    identity: ObjectIdentifier(unit), target: name.description, lun: Int(lun.number),
                    backstore: names[ObjectIdentifier(unit)] ?? "", oldest: unit.oldestTask)
            }
        }
        slowCommands.look(at: units, now: reactor.now)
    }
}
