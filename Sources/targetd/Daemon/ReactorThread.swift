// ReactorThread: a reactor, the thread that drives it, and the way from the control plane to what lives on that thread.
//
// Owns: the thread, and what was put on it. Called by: the daemon. Must not know: what the reactor's work is.

import Backstores
import Glibc
import Logging
import Reactor
import SCSICore
import VirtioFront

/// A thread that runs one reactor.
///
/// The control plane never touches what lives on the thread: it sends a function there and awaits the result (design
/// decision D5).
final class ReactorThread: @unchecked Sendable {
    let index: Int
    /// How this reactor does I/O.
    let engine: Reactor.ActiveEngine
    let reactor: Reactor
    /// Its part in what is served by several reactors; `nil`: there is only one.
    let shardReactor: ShardReactor?
    /// What lives on the thread; used by functions that `perform` runs there, and by nobody else.
    private let objects: ReactorObjects
    private var thread = pthread_t()

    /// Makes the reactor. `start` makes it run.
    init(
        index: Int, isAlone: Bool, configuration: Reactor.Configuration, events: EventHub,
        stateDirectory: StateDirectory?,
        logger: Logger
    ) throws(ReactorError) {
        self.index = index
        reactor = try Reactor(configuration)
        engine = reactor.engine
        let shard = Shard()
        shardReactor = isAlone ? nil : ShardReactor(reactor: reactor, shard: shard)
        objects = ReactorObjects(
            reactor: reactor, shard: shard, events: events, stateDirectory: stateDirectory, logger: logger)
    }

    /// Starts the thread.
    func start() throws(SystemError) {
        let context = unsafe Unmanaged.passRetained(self)
        let error = unsafe pthread_create(
            &thread, nil,
            { context in
                let host = unsafe Unmanaged<ReactorThread>.fromOpaque(context!).takeRetainedValue()
                host.main()
                return nil
            }, context.toOpaque())
        guard error == 0 else {
            unsafe context.release()
            throw SystemError(number: error)
        }
    }

    private func main() {
        Self.nameThread("reactor-\(index)")
        // Signals are the control plane's; a system call of the data plane must not be interrupted by one.
        var all = sigset_t()
        unsafe sigfillset(&all)
        // A fault in memory that a front-end took away is handled on the thread that touched it.
        unsafe sigdelset(&all, SIGBUS)
        unsafe pthread_sigmask(SIG_SETMASK, &all, nil)
        driveShard()
        objects.watchCommands()
        reactor.run()
    }

    /// Gives the calling thread its name in ps and gdb; pthread_setname_np is no part of what Swift imports.
    private static func nameThread(_ name: String) {
        let descriptor = unsafe open("/proc/thread-self/comm", O_WRONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return }
        _ = unsafe write(descriptor, name, name.utf8.count)
        close(descriptor)
    }

    /// Gives the core its clock, before a turn's completions are seen, and lets the tasks that wait for memory or for
    /// a backstore try again.
    private func driveShard() {
        unsafe reactor.onTurn(
            { context in
                unsafe Unmanaged<ReactorObjects>.fromOpaque(context)._withUnsafeGuaranteedRef { objects in
                    objects.shard.now = objects.reactor.now
                }
            }, Unmanaged.passUnretained(objects).toOpaque())
        let source = unsafe Reactor.WorkSource(
            poll: { context in
                unsafe Unmanaged<ReactorObjects>.fromOpaque(context)._withUnsafeGuaranteedRef { objects in
                    objects.driveShard()
                }
            },
            flush: { _ in },
            prepareToSleep: { context in
                unsafe Unmanaged<ReactorObjects>.fromOpaque(context)._withUnsafeGuaranteedRef { $0.prepareToSleep() }
                return false
            },
            context: Unmanaged.passUnretained(objects).toOpaque())
        _ = reactor.add(source)
    }

    /// Runs `body` on the thread, between two turns' work, and returns its result.
    func perform<Result: Sendable>(_ body: @escaping @Sendable (ReactorObjects) -> Result) async -> Result {
        await withCheckedContinuation { continuation in
            reactor.post { [self] in continuation.resume(returning: body(objects)) }
        }
    }

    /// Runs `body` on the thread, and returns what `body` gives, then or later, to the function that it gets.
    func performAndWait<Result: Sendable>(
        _ body: @escaping @Sendable (ReactorObjects, @escaping (Result) -> Void) -> Void
    ) async -> Result {
        await withCheckedContinuation { continuation in
            reactor.post { [self] in body(objects) { continuation.resume(returning: $0) } }
        }
    }

    /// Runs `body` on the thread, and returns when `body` calls, then or later, the function that it gets.
    func performAndWait(_ body: @escaping @Sendable (ReactorObjects, @escaping () -> Void) -> Void) async {
        await withCheckedContinuation { continuation in
            reactor.post { [self] in body(objects) { continuation.resume() } }
        }
    }

    /// Ends the thread after its current turn, and waits for its end. Nothing may be in flight.
    func stop() {
        reactor.stop()
        pthread_join(thread, nil)
    }
}
