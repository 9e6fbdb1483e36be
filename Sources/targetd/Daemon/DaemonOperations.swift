// DaemonOperations: the daemon's operations on single objects, and what it tells of commands.
//
// Called by: the control API. Must not know: HTTP, JSON.

import ControlAPI
import Reactor
import SCSICore

/// A logical unit by the name of its target and its number.
struct UnitAddress: Sendable {
    var target: NAAName
    var number: Int

    /// `naa.60014054ac780582 LUN 0`
    var text: String { "\(target) LUN \(number)" }
}

extension Daemon {
    /// Changes the configuration that runs, and makes the daemon match, all or nothing.
    ///
    /// - Parameters:
    ///   - what: What is asked for, for those who look at operations.
    ///   - isForced: Whether commands in flight of what goes away are aborted.
    ///   - edit: Changes a configuration, or says why not.
    func edit(
        _ what: String, isForced: Bool = false,
        _ edit: @escaping @Sendable (inout Configuration) throws(Failure) -> Void
    ) async throws(Failure) -> ChangeReport {
        try await operation(what) { () async throws(Failure) -> ChangeReport in
            var wanted = configuration
            try edit(&wanted)
            self.isForced = isForced
            defer { self.isForced = false }
            return try await change(toEdited: wanted)
        }
    }

    private func change(toEdited wanted: Configuration) async throws(Failure) -> ChangeReport {
        let loaded = ConfigurationSource.load(edited: wanted, running: configuration)
        guard loaded.isUsable else { throw Failure(loaded) }
        do throws(ChangeError) {
            return ChangeReport(try await change(to: loaded.configuration), loaded)
        } catch {
            throw Failure(error)
        }
    }

    /// Sets the state of a port group, in the configuration that runs and whatever a guest has set since.
    func setAccessState(
        _ state: PortGroupConfiguration.AccessState, ofPortGroup group: Int, target: NAAName
    ) async throws(Failure) -> ChangeReport {
        let what = "set port group \(group) of \(target) to \(state.rawValue)"
        return try await operation(what) { () async throws(Failure) -> ChangeReport in
            var wanted = configuration
            guard let index = wanted.targets[target]?.portGroups.firstIndex(where: { $0.identifier == group }),
                let place = placement.targets[target]
            else { throw Failure(.notFound, "There is no port group \(group) of \(target) in the configuration.") }
            let old = wanted.targets[target]!.portGroups[index].state
            if old != state {
                wanted.targets[target]!.portGroups[index].state = state
                return try await change(toEdited: wanted)
            }
            let isChanged = await threads[place].perform {
                $0.setAccessState(state, ofPortGroup: group, target: target)
            }
            guard isChanged else { return ChangeReport(changes: [], warnings: []) }
            let change = Change.setAccessState(target, group: group, old: old, new: state)
            events.publish(.changed, subject: nil, "\(change)")
            return ChangeReport(changes: ["\(change)"], warnings: [])
        }
    }

    /// Does something to a logical unit, on its thread, as an operation among others.
    func operate<Result: Sendable>(
        _ what: String, on address: UnitAddress, waits: Bool = true,
        _ body: @escaping @Sendable (LogicalUnit, ReactorObjects) -> Result
    ) async throws(Failure) -> Result {
        try await operation("\(what) \(address.text)", waits: waits) { () async throws(Failure) -> Result in
            try await look(at: address, body)
        }
    }

    /// Has a front whose removal waits for its guest's commands wait no longer. Whether there is one.
    func hurry(front path: String) async -> Bool {
        if isStopping { return false }
        for thread in threads where await thread.perform({ $0.hurrySocket(path) }) { return true }
        return false
    }

    /// Looks at a logical unit, on its thread.
    func look<Result: Sendable>(
        at address: UnitAddress, _ body: @escaping @Sendable (LogicalUnit, ReactorObjects) -> Result
    ) async throws(Failure) -> Result {
        let missing = Failure(.notFound, "There is no logical unit \(address.number) of \(address.target).")
        guard !isStopping else { throw Failure(.stopping, "targetd is stopping") }
        guard let index = placement.targets[address.target] else { throw missing }
        let result = await threads[index].perform { objects in
            objects.unit(address.number, target: address.target).map { body($0, objects) }
        }
        guard let result else { throw missing }
        return result
    }

    /// LOGICAL UNIT RESET by the operator. At once: a removal may wait for commands that it ends.
    func reset(_ address: UnitAddress) async throws(Failure) -> ChangeReport {
        let ended = try await operate("reset", on: address, waits: false) { unit, _ in
            let count = unit.tasksInFlight
            unit.resetByOperator()
            return count
        }
        let text = "\(ended) command\(ended == 1 ? "" : "s") ended"
        events.publish(.reset, subject: address.text, "reset by the operator: \(text)")
        return ChangeReport(changes: ["~ target \(address.text) reset: \(text)"], warnings: [])
    }

    /// Lets nothing of a unit reach its medium, until it is thawed; returns when the medium has none of its requests,
    /// which holds no other operation up.
    func freeze(_ address: UnitAddress) async throws(Failure) -> ChangeReport {
        let wasFrozen = try await operation("freeze \(address.text)", waits: false) {
            () async throws(Failure) -> Bool in
            let wasFrozen = try await look(at: address) { unit, _ in unit.frozen != nil }
            guard let index = placement.targets[address.target] else { return wasFrozen }
            await threads[index].performAndWait { objects, done in
                // It may be gone by now.
                guard let unit = objects.unit(address.number, target: address.target) else { return done() }
                unit.freeze(whenQuiet: done)
            }
            return wasFrozen
        }
        if !wasFrozen { events.publish(.changed, subject: address.text, "frozen") }
        return ChangeReport(changes: wasFrozen ? [] : ["~ target \(address.text) frozen"], warnings: [])
    }

    /// Lets the commands of a frozen unit go on. At once: a removal may wait for them.
    func thaw(_ address: UnitAddress) async throws(Failure) -> ChangeReport {
        let wasFrozen = try await operate("thaw", on: address, waits: false) { unit, _ in
            let wasFrozen = unit.frozen != nil
            unit.thaw()
            return wasFrozen
        }
        if wasFrozen { events.publish(.changed, subject: address.text, "thawed") }
        return ChangeReport(changes: wasFrozen ? ["~ target \(address.text) thawed"] : [], warnings: [])
    }

    /// Takes the medium out of a removable unit.
    func eject(_ address: UnitAddress, isForced: Bool) async throws(Failure) -> ChangeReport {
        try await operation("eject \(address.text)") { () async throws(Failure) -> ChangeReport in
            let isIn = try await look(at: address) { unit, _ in unit.mediumState != .absent }
            let index = placement.targets[address.target]!
            let refusal = await threads[index].performAndWait { objects, done in
                objects.eject(objects.unit(address.number, target: address.target)!, isForced: isForced, done: done)
            }
            if let refusal { throw Failure(.conflict, "\(address.text): \(refusal).") }
            if isIn { events.publish(.changed, subject: address.text, "medium ejected") }
            return ChangeReport(changes: isIn ? ["~ target \(address.text) ejected"] : [], warnings: [])
        }
    }

    /// Puts the medium of a removable unit in again.
    func load(_ address: UnitAddress) async throws(Failure) -> ChangeReport {
        let isChanged = try await operate("load", on: address) { unit, objects in objects.load(unit) }
        if isChanged { events.publish(.changed, subject: address.text, "medium loaded") }
        return ChangeReport(changes: isChanged ? ["~ target \(address.text) loaded"] : [], warnings: [])
    }

    /// The trace of a logical unit.
    func trace(_ address: UnitAddress) async throws(Failure) -> TraceReport {
        try await look(at: address) { $1.trace($0, address) }
    }

    /// Begins, or with `nil` ends, to keep the last commands of a logical unit.
    func setTrace(_ address: UnitAddress, entries: Int?) async throws(Failure) -> TraceReport {
        try await operate(entries == nil ? "trace off" : "trace on", on: address) { unit, objects in
            unit.setTrace(entries: entries)
            return objects.trace(unit, address)
        }
    }

    /// Commands in flight, the oldest of each unit first.
    func tasks() async throws(Failure) -> [TaskReport] {
        if isStopping { throw Failure(.stopping, "targetd is stopping") }
        var all: [TaskReport] = []
        for thread in threads { all += await thread.perform { $0.tasks() } }
        return all.sorted { $0.ageNanoseconds > $1.ageNanoseconds }
    }
}

extension ReactorObjects {
    /// Commands that are told of one unit: more say nothing more to a person.
    static let tasksTold = 1000

    func tasks() -> [TaskReport] {
        servedTargets.flatMap { name, target in
            let initiators = initiators(of: target)
            return target.logicalUnits.flatMap { lun, unit in
                unit.tasks(limit: Self.tasksTold).map { task in
                    TaskReport(
                        target: name.description, lun: Int(lun.number), initiator: initiators[task.nexus] ?? "",
                        tag: task.tag, cdb: Self.hexadecimal(task.cdb), attribute: JSON.dashed("\(task.attribute)"),
                        state: task.state, waitsFor: task.waitsFor.map(JSON.dashed), aborted: task.isAborted,
                        ageNanoseconds: age(task.receivedAt))
                }
            }
        }
    }

    func trace(_ unit: LogicalUnit, _ address: UnitAddress) -> TraceReport {
        let initiators = servedTargets[address.target].map(initiators) ?? [:]
        let entries = (unit.traceEntries ?? []).map { entry in
            TraceCommand(
                sequence: entry.sequence, initiator: initiators[entry.nexus] ?? "", tag: entry.tag,
                cdb: Self.hexadecimal(entry.cdb), attribute: JSON.dashed("\(entry.attribute)"),
                ageNanoseconds: age(entry.receivedAt), latencyNanoseconds: entry.endedAt - entry.receivedAt,
                status: JSON.dashed("\(entry.end)"),
                sense: entry.sense.map {
                    "\(Self.digits($0.key))/\(Self.digits($0.code))/\(Self.digits($0.qualifier))"
                },
                bytes: entry.bytes)
        }
        return TraceReport(
            target: address.target.description, lun: address.number, capacity: unit.traceCapacity ?? 0,
            entries: entries)
    }

    private func initiators(of target: TargetDevice) -> [Int: String] {
        Dictionary(uniqueKeysWithValues: target.nexusStatus.map { ($0.index, $0.initiatorPort) })
    }

    private func age(_ time: UInt64) -> UInt64 { reactor.now - min(time, reactor.now) }

    private static func hexadecimal(_ bytes: [UInt8]) -> String { bytes.map(digits).joined() }

    private static func digits(_ byte: UInt8) -> String { (byte < 16 ? "0" : "") + String(byte, radix: 16) }
}
