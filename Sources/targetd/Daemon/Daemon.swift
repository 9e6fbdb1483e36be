// Daemon: the running whole: reactor threads and what is on them, as one configuration says.
//
// Owns: the threads, the placement, the configuration that runs, and the order of management operations. Called by: the
// process, and the control plane. Must not know: signals, files, how operations are asked for.

import ControlAPI
import Logging
import Reactor
import XenFront

/// A running target daemon.
///
/// An actor of the control plane: it never runs on a reactor thread.
actor Daemon {
    /// A configuration and where its parts are.
    private struct State {
        var configuration: Configuration
        var placement = Placement()
    }

    let threads: [ReactorThread]
    private let logger: Logger
    private var state: State
    /// There while Xen guests are served.
    private var xen: XenService?
    /// Whether an operation is under way, and those that wait for their turn, in the order in which they came.
    private var isChanging = false
    private var waiting: [CheckedContinuation<Void, Never>] = []
    private(set) var isStopping = false
    /// Whether the operation under way aborts commands in flight of what it takes away.
    var isForced = false
    private var log = OperationLog()
    /// What has happened, for those who listen.
    nonisolated let events: EventHub
    private let hurried: AsyncStream<Void>
    private let hurriedContinuation: AsyncStream<Void>.Continuation

    private init(threads: [ReactorThread], configuration: Configuration, events: EventHub, logger: Logger) {
        self.threads = threads
        self.events = events
        self.logger = logger
        state = State(configuration: configuration)
        (hurried, hurriedContinuation) = AsyncStream.makeStream()
    }

    // MARK: Start

    /// Starts the reactors and makes everything that the configuration names; sockets come last, so no guest finds half
    /// of its disks. After an error nothing is left behind.
    static func start(_ wanted: Configuration, logger: Logger) async throws(ChangeError) -> Daemon {
        let events = EventHub()
        let threads = try startThreads(wanted, events, logger)
        logger.info(
            "reactors started",
            metadata: ["reactors": "\(threads.count)", "io-engine": "\(threads[0].engine.rawValue)"])
        var empty = wanted
        (empty.backstores, empty.targets, empty.vhostUserFronts, empty.xen) = ([:], [:], [], nil)
        let daemon = Daemon(threads: threads, configuration: empty, events: events, logger: logger)
        do {
            try await daemon.apply(wanted)
        } catch {
            _ = await daemon.stop()
            throw error
        }
        return daemon
    }

    private static func startThreads(
        _ configuration: Configuration, _ events: EventHub, _ logger: Logger
    ) throws(ChangeError) -> [ReactorThread] {
        let stateDirectory = try configuration.openStateDirectory(logger)
        var threads: [ReactorThread] = []
        do {
            for index in 0..<configuration.reactors {
                let thread = try ReactorThread(
                    index: index, isAlone: configuration.reactors == 1,
                    configuration: Reactor.Configuration(configuration), events: events,
                    stateDirectory: stateDirectory, logger: logger)
                try thread.start()
                threads.append(thread)
            }
        } catch {
            for thread in threads { thread.stop() }
            let text = (error as? SystemError)?.text ?? "\(error)"
            throw ChangeError(text: "reactor \(threads.count) could not be started: \(text)")
        }
        return threads
    }

    // MARK: The order of operations

    /// Waits until all operations that came before have ended: two at once never disturb, or refuse, each other.
    private func begin() async throws(ChangeError) {
        if !isStopping {
            await enter()
            if !isStopping { return }
            leave()
        }
        throw ChangeError(text: "targetd is stopping", kind: .stopping)
    }

    private func enter() async {
        guard isChanging else {
            isChanging = true
            return
        }
        // Whoever leaves hands over: nobody who comes later is before us.
        await withCheckedContinuation { waiting.append($0) }
    }

    private func leave() {
        if waiting.isEmpty { isChanging = false } else { waiting.removeFirst().resume() }
    }

    /// Does `body` when it is this operation's turn.
    ///
    /// - Parameters:
    ///   - what: What is asked for, for those who look at operations.
    ///   - waits: Whether it has a turn; one that changes no configuration may be what another waits for, and has none.
    func operation<Result>(
        _ what: String, waits: Bool = true, _ body: () async throws(Failure) -> Result
    ) async throws(Failure) -> Result {
        let id = log.add(what)
        do throws(Failure) {
            do throws(ChangeError) {
                if waits { try await begin() }
            } catch {
                throw Failure(error)
            }
            defer { if waits { leave() } }
            log.begin(id, hasTurn: waits)
            let result = try await body()
            log.end(id, failure: nil)
            return result
        } catch {
            log.end(id, failure: error.message)
            events.publish(.operationFailed, subject: what, error.message)
            throw error
        }
    }

    /// The operations that wait, that are under way, or that have ended lately.
    var operations: [OperationStatus] { log.operations }

    // MARK: Changes

    /// Makes the daemon match a configuration that has no errors, by the smallest set of changes, all or nothing.
    @discardableResult
    func apply(_ wanted: Configuration) async throws(ChangeError) -> [Change] {
        try await begin()
        defer { leave() }
        return try await change(to: wanted)
    }

    /// Makes the daemon match what `load` gives when it is this operation's turn.
    ///
    /// - Parameter load: Gets the configuration that runs.
    func apply(_ load: @Sendable (Configuration) -> ConfigurationSource.Loaded) async throws(Failure) -> ChangeReport {
        try await operation("apply a configuration") { () async throws(Failure) -> ChangeReport in
            let loaded = load(state.configuration)
            guard loaded.isUsable else { throw Failure(loaded) }
            do throws(ChangeError) {
                return ChangeReport(try await change(to: loaded.configuration), loaded)
            } catch {
                throw Failure(error)
            }
        }
    }

    /// What `apply` would change.
    func diff(_ load: @Sendable (Configuration) -> ConfigurationSource.Loaded) throws(Failure) -> ChangeReport {
        let loaded = load(state.configuration)
        guard loaded.isUsable else { throw Failure(loaded) }
        let plan = Plan(from: state.configuration, placement: state.placement, to: loaded.configuration)
        if let refusal = plan.refusals.first { throw Failure(ChangeError(refusal)) }
        return ChangeReport(plan.changes, loaded)
    }

    /// Makes the file of a backstore longer. The configuration that runs has the new size from then on.
    func resize(_ name: String, to size: UInt64) async throws(Failure) -> [Change] {
        try await operation("resize backstore \(name) to \(Size.format(size))") {
            () async throws(Failure) -> [Change] in
            do throws(ChangeError) {
                return try await resizeNow(name, to: size)
            } catch {
                throw Failure(error)
            }
        }
    }

    private func resizeNow(_ name: String, to size: UInt64) async throws(ChangeError) -> [Change] {
        guard let backstore = state.configuration.backstores[name] else {
            throw ChangeError(text: "there is no backstore \(name)", kind: .notFound)
        }
        guard case .file(let path, _, let buffered) = backstore.medium, !backstore.readOnly else {
            throw ChangeError(
                text: "backstore \(name) cannot be resized: only files can, and only where read-only is not set",
                kind: .conflict)
        }
        guard let index = state.placement.backstores[name] else {
            throw ChangeError(text: "backstore \(name) is not open: no logical unit has it", kind: .conflict)
        }
        let (before, blockSize) = await threads[index].perform { $0.extent(of: name) }
        guard size % blockSize == 0, size <= ConfigurationLimits.mediumBytes else {
            throw ChangeError(
                text: "backstore \(name) cannot have \(size) bytes: write a multiple of its logical block of "
                    + "\(blockSize) bytes, at most \(Size.format(ConfigurationLimits.mediumBytes))", kind: .conflict)
        }
        guard size >= before else {
            throw ChangeError(
                text: "backstore \(name) would shrink from \(Size.format(before)) to \(Size.format(size)), which "
                    + "loses what is at the end", kind: .conflict)
        }
        var new = state
        new.configuration.backstores[name]?.medium = .file(path: path, size: size, buffered: buffered)
        let change = Change.resizeBackstore(name, size: size)
        if size > before {
            try await make(change, from: state, to: new)
            events.publish(.changed, subject: nil, "\(change)")
        }
        state = new
        return size > before ? [change] : []
    }

    func change(to wanted: Configuration) async throws(ChangeError) -> [Change] {
        let plan = Plan(from: state.configuration, placement: state.placement, to: wanted)
        if let refusal = plan.refusals.first { throw ChangeError(refusal) }
        let new = State(configuration: wanted, placement: plan.placement)
        var made: [Change] = []
        for change in plan.changes {
            do {
                try await make(change, from: state, to: new)
                made.append(change)
                log.progress(made.count, of: plan.changes.count)
                logger.debug("changed", metadata: ["change": "\(change)"])
            } catch {
                await undo(made, from: new)
                throw error
            }
        }
        state = new
        for change in made { events.publish(.changed, subject: nil, "\(change)") }
        return made
    }

    /// Goes back to what was before, the last change first.
    private func undo(_ made: [Change], from new: State) async {
        for change in made.reversed() {
            guard let inverse = change.inverse else {
                logger.error("cannot be undone", metadata: ["change": "\(change)"])
                continue
            }
            do {
                try await make(inverse, from: new, to: state)
            } catch {
                logger.critical("undoing failed: \(error.text)", metadata: ["change": "\(change)"])
            }
        }
    }

    /// Makes one change; what it takes away is where `old` says, what it adds is as `new` says.
    private func make(_ change: Change, from old: State, to new: State) async throws(ChangeError) {
        let (before, after) = (old.placement, new.placement)
        var error: ChangeError?
        switch change {
        case .removeSocket(let path):
            await thread(before.sockets[path]).performAndWait { [isForced] in
                $0.removeSocket(path, isForced: isForced, done: $1)
            }
        case .detachTarget(_, let number, let socket):
            await thread(before.sockets[socket]).perform { $0.detachTarget(number, socket: socket) }
        case .stopXen: await stopXen()
        case .startXen: try await startXen(new)
        case .removeLogicalUnit(let number, let target):
            await xen?.publish(target, on: thread(before.targets[target]), without: number)
            await thread(before.targets[target]).performAndWait { [isForced] in
                $0.removeLogicalUnit(number, target: target, isForced: isForced, done: $1)
            }
        case .removeTarget(let name):
            await xen?.withdraw(name)
            await thread(before.targets[name]).perform { $0.removeTarget(name) }
        case .removeBackstore(let name):
            error = await thread(before.backstores[name]).performAndWait { $0.removeBackstore(name, done: $1) }
        case .addBackstore(let name):
            let backstore = new.configuration.backstores[name]!
            error = await thread(after.backstores[name]).perform { $0.addBackstore(name, backstore) }
        case .resizeBackstore(let name, let size):
            error = await thread(after.backstores[name]).perform { $0.resizeBackstore(name, size: size) }
        case .addTarget(let name):
            let target = new.configuration.targets[name]!
            await thread(after.targets[name]).perform { $0.addTarget(name, target) }
            await xen?.publish(name, on: thread(after.targets[name]))
        case .setPortGroups(let name):
            let groups = (old.configuration.targets[name]!.portGroups, new.configuration.targets[name]!.portGroups)
            await thread(after.targets[name]).perform { $0.setPortGroups(name, from: groups.0, to: groups.1) }
        case .setAccessState(let name, let group, _, let state):
            _ = await thread(after.targets[name]).perform { $0.setAccessState(state, ofPortGroup: group, target: name) }
        case .addLogicalUnit(let number, let target):
            let unit = new.configuration.targets[target]!.logicalUnits[number]!
            error = await thread(after.targets[target]).perform { $0.addLogicalUnit(number, target: target, unit) }
            if error == nil { await xen?.publish(target, on: thread(after.targets[target])) }
        case .attachTarget(let name, let number, let socket):
            let target = await target(name, after)
            await thread(after.sockets[socket]).perform {
                $0.attachTarget(target, name, number: number, socket: socket)
            }
        case .addSocket(let path):
            let front = new.configuration.front(path)!
            var targets: [Int: TargetReference] = [:]
            for (number, name) in front.targets { targets[number] = await target(name, after) }
            let all = front.isSpread ? threads.compactMap(\.shardReactor) : []
            error = await thread(after.sockets[path]).perform { [targets] in
                $0.addSocket(front, targets: targets, spread: all.isEmpty ? nil : all)
            }
        case .swapMedium(let number, let target, _):
            let backstore = new.configuration.targets[target]!.logicalUnits[number]!.backstore
            error = await thread(after.targets[target]).performAndWait { [isForced] in
                $0.swapMedium(number, target: target, backstore: backstore, isForced: isForced, done: $1)
            }
        case .protectLogicalUnit(let number, let target, let isProtected):
            await thread(after.targets[target]).perform {
                $0.protectLogicalUnit(number, target: target, isProtected: isProtected)
            }
        case .limitLogicalUnit(let number, let target):
            let limits = new.configuration.targets[target]!.logicalUnits[number]!.limits
            await thread(after.targets[target]).perform { $0.limitLogicalUnit(number, target: target, limits) }
        case .limitSocket(let path):
            let limits = new.configuration.front(path)!.limits
            await thread(after.sockets[path]).perform { $0.limitSocket(path, limits) }
        case .setCommandTimeout(let number, let target):
            let unit = new.configuration.targets[target]!.logicalUnits[number]!
            await thread(after.targets[target]).perform { $0.setCommandTimeout(number, target: target, unit) }
        // `stop` looks at the configuration that runs.
        case .setStopTimeout: break
        case .setLogLevel: StandardErrorLog.setLevel(new.configuration.effectiveLogLevel)
        }
        if let error { throw error }
    }

    /// Serves Xen guests, if that is possible on this machine.
    private func startXen(_ wanted: State) async throws(ChangeError) {
        guard let configuration = wanted.configuration.servedXen else { preconditionFailure("no xen to start") }
        guard configuration.enabled == .always || XenFront.isXenDomain else {
            return logger.info("xen is off: this machine is no domain of Xen's")
        }
        let service = XenService(configuration, threads: threads, logger: logger)
        for (name, index) in wanted.placement.targets { await service.publish(name, on: threads[index]) }
        try service.start()
        xen = service
    }

    private func stopXen() async {
        await xen?.stop()
        xen = nil
    }

    /// A target, from the reactor that owns it.
    private func target(_ name: NAAName, _ placement: Placement) async -> TargetReference {
        await thread(placement.targets[name]).perform { objects in
            guard let target = objects.servedTargets[name] else { preconditionFailure("no target \(name)") }
            return TargetReference(target: target)
        }
    }

    private func thread(_ index: Int?) -> ReactorThread {
        guard let index else { preconditionFailure("what a plan names has no place") }
        return threads[index]
    }

    // MARK: What runs

    /// Where everything is.
    var placement: Placement { state.placement }

    /// The configuration that runs.
    var configuration: Configuration { state.configuration }

    /// Everything that can be told of this moment, up to the moment at which a stop begins.
    func status() async throws(Failure) -> Status {
        if isStopping { throw Failure(.stopping, "targetd is stopping") }
        let configured = state.configuration.backstores
        var status = Status(
            version: Version.text, ioEngine: threads[0].engine.rawValue, reactors: [], backstores: [], targets: [],
            fronts: [])
        for thread in threads {
            let part = await thread.perform { [index = thread.index] in $0.snapshot(reactor: index) }
            status.reactors.append(part.reactor)
            status.backstores += part.backstores
            status.targets += part.targets
            status.fronts += part.fronts
        }
        let open = Set(status.backstores.map(\.name))
        status.backstores += configured.filter { !open.contains($0.key) }.map { BackstoreStatus($0, $1, size: nil) }
        status.backstores.sort { $0.name < $1.name }
        status.targets.sort { $0.name < $1.name }
        status.fronts.sort { $0.socket < $1.socket }
        status.xen = await xen?.status
        return status
    }

    /// The counters of all logical units and nexuses, up to the moment at which a stop begins.
    func statistics() async throws(Failure) -> StatisticsReport {
        if isStopping { throw Failure(.stopping, "targetd is stopping") }
        var report = StatisticsReport(time: 0, units: [], nexuses: [])
        for thread in threads {
            let part = await thread.perform { ($0.statistics(), $0.reactor.now) }
            report.units += part.0.units
            report.nexuses += part.0.nexuses
            report.time = max(report.time, part.1)
        }
        report.units.sort { ($0.target, $0.lun) < ($1.target, $1.lun) }
        report.nexuses.sort { ($0.target, $0.initiator) < ($1.target, $1.initiator) }
        return report
    }

    /// How many sockets are served.
    var socketCount: Int { state.configuration.vhostUserFronts.count }

    /// Returns when every reactor has made a turn.
    func ping() async {
        for thread in threads { await thread.perform { _ in } }
    }

    // MARK: Stop

    /// Makes a stop that is under way, or still to come, not wait for anything.
    nonisolated func hurry() { hurriedContinuation.finish() }

    /// Stops, once: no new commands, those in flight end, media are flushed and closed, sockets are removed.
    func stop() async -> ExitStatus {
        isStopping = true
        events.close()
        let errors = await finished { [self] in await takeAway() }
        guard let errors else {
            for thread in threads {
                // A reactor that hangs in a system call would hang us too.
                logger.warning("stopped with commands in flight", metadata: ["reactor": "\(thread.index)"])
            }
            return .abandoned
        }
        for thread in threads { thread.stop() }
        for error in errors { logger.error("\(error.text)") }
        return errors.isEmpty ? .success : .flushFailed
    }

    /// Takes away everything that runs; the errors of the flushes.
    private func takeAway() async -> [ChangeError] {
        // A change that is under way ends first; those that wait for their turn are refused in it.
        await enter()
        defer { leave() }
        var errors: [ChangeError] = []
        // A guest of one reactor may wait for a unit of another.
        for thread in threads { await thread.perform { $0.liftLimits() } }
        // The files of the sockets are removed at once, however long the rest takes.
        for thread in threads { await thread.performAndWait { $0.removeSockets(done: $1) } }
        // Xen guests' rings are let go of while there is still what they use.
        await stopXen()
        for thread in threads { errors += await thread.performAndWait { $0.close(done: $1) } }
        return errors
    }

    /// What `work` returns; `nil` if it takes longer than a stop may take, or somebody hurries.
    private func finished<Result: Sendable>(_ work: @escaping @Sendable () async -> Result) async -> Result? {
        let (ends, continuation) = AsyncStream.makeStream(of: Result?.self)
        let timeout = state.configuration.stopTimeoutNanoseconds
        let hurried = hurried
        Task { continuation.yield(await work()) }
        let timer = Task {
            try await Task.sleep(nanoseconds: timeout)
            continuation.yield(nil)
        }
        let listener = Task {
            for await _ in hurried {}
            continuation.yield(nil)
        }
        defer {
            timer.cancel()
            listener.cancel()
        }
        for await end in ends { return end }
        return nil
    }
}

extension Reactor.Configuration {
    /// What the daemon's configuration says of a reactor.
    fileprivate init(_ configuration: Configuration) {
        self.init()
        switch configuration.ioEngine {
        case .automatic: engine = .automatic
        case .ioUring: engine = .ioUring
        case .libaio: engine = .libaio
        }
        pollMicroseconds = Int(configuration.pollNanoseconds / 1000)
    }
}
