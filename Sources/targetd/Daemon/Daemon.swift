// Daemon: the running whole: reactor threads and what is on them, as one configuration says.
//
// Owns: the threads, the placement, the configuration that runs, and the order of management operations. Called by: the
// process, and the control plane. Must not know: signals, files, how operations are asked for.

import Logging
import Reactor

/// A running target daemon.
///
/// An actor of the control plane: it never runs on a reactor thread.
actor Daemon {
    /// A configuration and where its parts are.
    private struct State {
        var configuration: Configuration
        var placement = Placement()
    }

    private let threads: [ReactorThread]
    private let logger: Logger
    private var state: State
    private let hurried: AsyncStream<Void>
    private let hurriedContinuation: AsyncStream<Void>.Continuation

    private init(threads: [ReactorThread], configuration: Configuration, logger: Logger) {
        self.threads = threads
        self.logger = logger
        state = State(configuration: configuration)
        (hurried, hurriedContinuation) = AsyncStream.makeStream()
    }

    // MARK: Start

    /// Starts the reactors and makes everything that the configuration names; sockets come last, so no guest finds half
    /// of its disks. After an error nothing is left behind.
    static func start(_ wanted: Configuration, logger: Logger) async throws(ChangeError) -> Daemon {
        let threads = try startThreads(wanted, logger)
        logger.info(
            "reactors started",
            metadata: ["reactors": "\(threads.count)", "io-engine": "\(threads[0].engine.rawValue)"])
        var empty = wanted
        (empty.backstores, empty.targets, empty.vhostUserFronts) = ([:], [:], [])
        let daemon = Daemon(threads: threads, configuration: empty, logger: logger)
        do {
            try await daemon.apply(wanted)
        } catch {
            _ = await daemon.stop()
            throw error
        }
        return daemon
    }

    private static func startThreads(_ configuration: Configuration, _ logger: Logger) throws(ChangeError)
        -> [ReactorThread]
    {
        var threads: [ReactorThread] = []
        do {
            for index in 0..<configuration.reactors {
                let thread = try ReactorThread(
                    index: index, configuration: Reactor.Configuration(configuration), logger: logger)
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

    // MARK: Changes

    /// Makes the daemon match a configuration that has no errors, by the smallest set of changes, all or nothing.
    func apply(_ wanted: Configuration) async throws(ChangeError) {
        let plan = Plan(from: state.configuration, placement: state.placement, to: wanted)
        if let refusal = plan.refusals.first { throw ChangeError(text: "\(refusal.key): \(refusal.text)") }
        let new = State(configuration: wanted, placement: plan.placement)
        var made: [Change] = []
        for change in plan.changes {
            do {
                try await make(change, from: state, to: new)
                made.append(change)
                logger.debug("changed", metadata: ["change": "\(change)"])
            } catch {
                await undo(made, from: new)
                throw error
            }
        }
        state = new
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
            await thread(before.sockets[path]).performAndWait { $0.removeSocket(path, done: $1) }
        case .detachTarget(_, let number, let socket):
            await thread(before.sockets[socket]).perform { $0.detachTarget(number, socket: socket) }
        case .removeLogicalUnit(let number, let target):
            await thread(before.targets[target]).performAndWait {
                $0.removeLogicalUnit(number, target: target, done: $1)
            }
        case .removeTarget(let name):
            await thread(before.targets[name]).perform { $0.removeTarget(name) }
        case .removeBackstore(let name):
            error = await thread(before.backstores[name]).performAndWait { $0.removeBackstore(name, done: $1) }
        case .addBackstore(let name):
            let backstore = new.configuration.backstores[name]!
            error = await thread(after.backstores[name]).perform { $0.addBackstore(name, backstore) }
        case .resizeBackstore(let name, let size):
            error = await thread(after.backstores[name]).perform { $0.resizeBackstore(name, size: size) }
        case .addTarget(let name):
            await thread(after.targets[name]).perform { $0.addTarget(name) }
        case .addLogicalUnit(let number, let target):
            let unit = new.configuration.targets[target]!.logicalUnits[number]!
            await thread(after.targets[target]).perform { $0.addLogicalUnit(number, target: target, unit) }
        case .attachTarget(let name, let number, let socket):
            await thread(after.sockets[socket]).perform { $0.attachTarget(name, number: number, socket: socket) }
        case .addSocket(let path):
            let front = new.configuration.front(path)!
            error = await thread(after.sockets[path]).perform { $0.addSocket(front) }
        // `stop` looks at the configuration that runs.
        case .setStopTimeout: break
        case .setLogLevel: StandardErrorLog.setLevel(new.configuration.effectiveLogLevel)
        }
        if let error { throw error }
    }

    private func thread(_ index: Int?) -> ReactorThread {
        guard let index else { preconditionFailure("what a plan names has no place") }
        return threads[index]
    }

    // MARK: What runs

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
        let errors = await finished { [threads] in
            var errors: [ChangeError] = []
            // The files of the sockets are removed at once, however long the rest takes.
            for thread in threads { await thread.performAndWait { $0.removeSockets(done: $1) } }
            for thread in threads { errors += await thread.performAndWait { $0.close(done: $1) } }
            return errors
        }
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
