// DaemonProcess: the life of the process: start, signals, service manager, stop.
//
// Owns: what happens when. Called by: the command line. Must not know: what is served.

import ControlAPI
import Glibc
import Logging
import ServiceLifecycle
import UnixSignals

/// Runs a daemon until it is told to stop.
enum DaemonProcess {
    /// Serves a configuration that has no errors.
    ///
    /// - Parameters:
    ///   - configuration: With the overrides in it.
    ///   - file: Where it comes from, to be read again on SIGHUP; `nil`: from the command line.
    ///   - overrides: What the command line says in place of any file.
    static func run(_ configuration: Configuration, file: String?, overrides: OverrideOptions) async -> ExitStatus {
        let logger = Logger(label: "targetd")
        // A guest that closes its socket while it is written to is an error value, not the end of the process.
        signal(SIGPIPE, SIG_IGN)
        for shortage in ResourceLimits.raise(for: configuration) { logger.warning("\(shortage.text)") }
        // Trapped before anything is opened: a stop during the start is then a clean stop just after it.
        let signals = await UnixSignalsSequence(trapping: .sigterm, .sigint, .sighup)
        let daemon: Daemon
        do {
            daemon = try await Daemon.start(configuration, logger: logger)
        } catch {
            logger.error("\(error.text)")
            return .startFailed
        }
        let control: ControlServer?
        do {
            control = try await startControl(configuration, daemon, overrides, logger)
        } catch {
            logger.error("\(error.text)")
            _ = await daemon.stop()
            return .startFailed
        }
        announce(configuration)

        let notification = ServiceNotification()
        let stop = StopRequest()
        let service = DaemonService(daemon: daemon, control: control, notification: notification, logger: logger)
        let reload = file.map {
            Reload(daemon: daemon, file: $0, overrides: overrides, notification: notification, logger: logger)
        }
        // Stopped in reverse order: signals are heard to the end.
        let group = ServiceGroup(
            configuration: ServiceGroupConfiguration(
                services: [
                    .init(
                        service: SignalService(
                            signals: signals, stop: stop, reload: reload, daemon: daemon, logger: logger)),
                    .init(service: service),
                    .init(service: WatchdogService(daemon: daemon, notification: notification)),
                    .init(service: stop, successTerminationBehavior: .gracefullyShutdownGroup),
                ], logger: quietLogger))
        do {
            try await group.run()
        } catch {
            logger.critical("a part of the daemon ended by itself: \(error)")
            _exit(ExitStatus.abandoned.rawValue)
        }
        if service.outcome == .abandoned {
            // Reactors may still work: nothing of theirs may be freed, and nobody waits for them.
            _exit(service.outcome.rawValue)
        }
        return service.outcome
    }

    private static func startControl(
        _ configuration: Configuration, _ daemon: Daemon, _ overrides: OverrideOptions, _ logger: Logger
    ) async throws(ChangeError) -> ControlServer? {
        guard let control = configuration.control else { return nil }
        let router = ControlRouter(daemon: daemon, overrides: overrides)
        return try await ControlServer(
            control, logger: logger, respond: { await router.respond(to: $0) },
            respondToAnybody: { await router.respondToAnybody($0) })
    }

    /// ServiceLifecycle's own messages are about its inside: only its errors concern an operator.
    private static var quietLogger: Logger {
        var logger = Logger(label: "services")
        logger.logLevel = .error
        return logger
    }

    /// Prints how guests are attached.
    private static func announce(_ configuration: Configuration) {
        print("\(Version.text) serves \(configuration.vhostUserFronts.count) socket(s).")
        for (index, front) in configuration.vhostUserFronts.enumerated() {
            print("\nTo attach a guest to \(front.socket), with SIZE as in -m SIZE, add to QEMU:")
            print("    \(QEMUArguments.lines(for: front, index: index))")
        }
        // Seen at once where standard output is a pipe or a file.
        fflush(nil)
    }
}

/// Ends, and with it ends the group, when a stop is requested.
struct StopRequest: Service {
    private let stream: AsyncStream<Void>
    private let continuation: AsyncStream<Void>.Continuation

    init() { (stream, continuation) = AsyncStream.makeStream() }

    /// Asks for the stop.
    func request() { continuation.finish() }

    func run() async throws {
        for await _ in stream.cancelOnGracefulShutdown() {}
    }
}

/// Reads the configuration file again and makes the daemon match it.
struct Reload: Sendable {
    let daemon: Daemon
    let file: String
    let overrides: OverrideOptions
    let notification: ServiceNotification
    let logger: Logger

    /// Applies the file, or logs why not; then nothing has changed.
    func run() async {
        notification.reloading()
        do {
            let report = try await daemon.apply { [overrides] running in
                var loaded = ConfigurationSource.load(file, running: running)
                loaded.configuration = overrides.applied(to: loaded.configuration)
                return loaded
            }
            log(report.warnings)
            logger.info("configuration applied", metadata: ["changes": "\(report.changes.count)"])
        } catch {
            log(error.details)
            logger.error("configuration not applied: \(error.message)", metadata: ["file": "\(file)"])
        }
        notification.ready("Serving \(await daemon.socketCount) sockets")
    }

    private func log(_ problems: [ProblemReport]) {
        for problem in problems {
            let place = problem.line.map { "\(file):\($0)" } ?? file
            logger.log(
                level: problem.severity == Problem.Severity.error.rawValue ? .error : .warning,
                "\(place): \(problem.key): \(problem.text)")
        }
    }
}

/// Hears the signals: the first that asks for a stop gets it, the second a stop at once; SIGHUP asks for a reload.
struct SignalService: Service {
    let signals: UnixSignalsSequence
    let stop: StopRequest
    /// `nil`: there is no file to be read again, so a hangup is what it is to other programs: an end.
    let reload: Reload?
    let daemon: Daemon
    let logger: Logger

    func run() async throws {
        var isStopping = false
        for await signal in signals.cancelOnGracefulShutdown() {
            if signal == .sighup, let reload {
                // Not awaited: a stop must be heard while a change waits for commands in flight.
                if !isStopping { Task { await reload.run() } }
            } else if isStopping {
                logger.warning("second signal: stopping without waiting", metadata: ["signal": "\(signal)"])
                daemon.hurry()
            } else {
                logger.info("stopping", metadata: ["signal": "\(signal)"])
                isStopping = true
                stop.request()
            }
        }
    }
}

/// The daemon from its readiness to its end.
final class DaemonService: Service, @unchecked Sendable {
    private let daemon: Daemon
    private let control: ControlServer?
    private let notification: ServiceNotification
    private let logger: Logger
    /// How it ended; to be read when `run` has returned.
    private(set) var outcome = ExitStatus.success

    init(daemon: Daemon, control: ControlServer?, notification: ServiceNotification, logger: Logger) {
        self.daemon = daemon
        self.control = control
        self.notification = notification
        self.logger = logger
    }

    func run() async throws {
        notification.ready("Serving \(await daemon.socketCount) sockets")
        logger.info("ready")
        // Returns when the group is told to stop, or cancelled because another part failed.
        try? await gracefulShutdown()
        notification.stopping()
        await control?.stopListening()
        outcome = await daemon.stop()
        // Operations that were under way have ended: whoever asked for them has the answer, or gets it now.
        if outcome != .abandoned { await control?.stop() }
        logger.info("stopped")
    }
}

/// Tells the service manager that the daemon is alive, as long as every reactor answers.
struct WatchdogService: Service {
    let daemon: Daemon
    let notification: ServiceNotification

    func run() async throws {
        guard let interval = notification.watchdogNanoseconds else {
            try? await gracefulShutdown()
            return
        }
        try? await cancelWhenGracefulShutdown {
            while true {
                await daemon.ping()
                notification.alive()
                // Half the interval, as sd_watchdog_enabled(3) recommends.
                try await Task.sleep(nanoseconds: interval / 2)
            }
        }
    }
}
