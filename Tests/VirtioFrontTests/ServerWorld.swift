// ServerWorld: a vhost-user server on a reactor thread of its own, with units on scripted backstores.
//
// Owns: the thread, the reactor, the target, the media, the server and its socket. Called by: the tests here. Must not
// know: what they test.

import CLinux
import CoreTestSupport
import Glibc
import Reactor
import SCSICore
import Synchronization
import VhostUserInitiator
import VirtioFront

/// A server to test. The tests' thread is the front-end; `perform` runs a function on the reactor's thread.
final class ServerWorld: @unchecked Sendable {
    /// What lives on the reactor's thread.
    final class Objects {
        let shard = Shard()
        let target: TargetDevice
        let backstore: ScriptedBackstore
        let unit: LogicalUnit
        var moreUnits: [(LogicalUnit, ScriptedBackstore)] = []
        var server: VhostUserSCSIServer!
        /// Requests stay with the medium until the test completes them.
        var isHeld = false
        /// What a test waits for, looked at in each turn.
        var condition: (met: () -> Bool, signal: Signal)?
        var events: [VhostUserSCSIServer.Event] = []

        init() {
            target = TargetDevice(name: 0x3001_4054_0000_00ff, shard: shard)
            let violations = Violations()
            backstore = ScriptedBackstore(violations: violations)
            unit = LogicalUnit(
                configuration: LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "SERIAL0001"),
                backstore: backstore.handle, shard: shard)
            let added = target.add(unit, at: LUN(0)!)
            precondition(added)
        }

        func addUnit(at lun: Int) {
            let backstore = ScriptedBackstore(violations: Violations())
            let unit = LogicalUnit(
                configuration: LogicalUnitConfiguration(
                    name: 0x3001_4054_0000_0100 + UInt64(lun), serial: "SERIAL\(lun)"),
                backstore: backstore.handle, shard: shard)
            moreUnits.append((unit, backstore))
            let added = target.add(unit, at: LUN(lun)!)
            precondition(added)
        }

        /// Lets the media work; called in each turn.
        func work() -> Bool {
            guard !isHeld, !backstore.pending.isEmpty else { return false }
            backstore.completeAll()
            return true
        }

        func checkCondition() {
            guard let condition, condition.met() else { return }
            self.condition = nil
            condition.signal.raise()
        }
    }

    /// One thread says to another that something has happened.
    final class Signal: Sendable {
        private let descriptor = eventfd(0, Int32(EFD_CLOEXEC))
        deinit { close(descriptor) }
        func raise() { _ = eventfd_write(descriptor, 1) }
        func wait() {
            var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
            while true {
                let count = unsafe poll(&entry, 1, 60_000)
                if count < 0, errno == EINTR { continue }
                precondition(count == 1, "waited a minute for what does not happen")
                return
            }
        }
    }

    let socketPath: String
    let reactor: Reactor
    private let directory: String
    private var objects: Objects!
    private var thread = pthread_t()
    private var isStopped = false

    init(
        requestQueues: Int = 2, pollMicroseconds: Int = 0,
        options: VhostUserSCSIServer.Options = VhostUserSCSIServer.Options(),
        drainPatience: UInt64 = TestDaemon.patience
    ) throws {
        // mkdtemp replaces the six letters.
        var template = Array(("/tmp/targetd-virtio-" + String(repeating: "X", count: 6)).utf8CString)
        directory = unsafe String(cString: mkdtemp(&template)!)
        socketPath = directory + "/socket"
        var configuration = Reactor.Configuration()
        configuration.pollMicroseconds = pollMicroseconds
        reactor = try Reactor(configuration)
        let context = unsafe Unmanaged.passRetained(reactor).toOpaque()
        let code = unsafe pthread_create(
            &thread, nil,
            { context in
                unsafe Unmanaged<Reactor>.fromOpaque(context!).takeRetainedValue().run()
                return nil
            }, context)
        precondition(code == 0)
        try onReactor { [self] in Result { try makeObjects(requestQueues, options, drainPatience) } }.get()
    }

    private func makeObjects(
        _ requestQueues: Int, _ options: VhostUserSCSIServer.Options, _ drainPatience: UInt64
    ) throws {
        let objects = Objects()
        self.objects = objects
        let source = unsafe Reactor.WorkSource(
            poll: { unsafe Unmanaged<Objects>.fromOpaque($0).takeUnretainedValue().work() },
            flush: { unsafe Unmanaged<Objects>.fromOpaque($0).takeUnretainedValue().checkCondition() },
            prepareToSleep: { _ in false }, context: Unmanaged.passUnretained(objects).toOpaque())
        _ = reactor.add(source)
        var configuration = VhostUserSCSIServer.Configuration(
            socketPath: socketPath, requestQueues: requestQueues, targets: [0: objects.target],
            initiatorPort: "guest")
        configuration.options = options
        configuration.drainPatience = drainPatience
        objects.server = VhostUserSCSIServer(
            configuration: configuration, reactor: reactor, report: { [unowned objects] in objects.events.append($0) })
        try objects.server.start()
    }

    deinit { precondition(isStopped, "a test must stop its world") }

    /// Stops the server as the daemon does, after all that was in flight has been answered, and the reactor.
    func stop() {
        guard !isStopped else { return }
        hold(false)
        beginStop().wait()
        isStopped = true
        reactor.stop()
        pthread_join(thread, nil)
        unsafe unlink(socketPath)
        unsafe rmdir(directory)
    }

    /// Begins to stop the server; the signal comes when it has stopped.
    func beginStop() -> Signal {
        let signal = Signal()
        perform { objects in
            objects.server.stop { signal.raise() }
        }
        return signal
    }

    /// Runs a function on the reactor's thread and waits for it.
    @discardableResult
    func perform<Value>(_ function: @escaping (Objects) -> Value) -> Value {
        onReactor { [self] in function(objects) }
    }

    /// The same for functions that need no objects.
    @discardableResult
    func onReactor<Value>(_ function: @escaping () -> Value) -> Value {
        let signal = Signal()
        let box = Box(function: function)
        reactor.post {
            box.run()
            signal.raise()
        }
        signal.wait()
        return box.result!
    }

    /// Whether the reactor comes to sleep although nothing happens but our asking.
    func sleeps() -> Bool {
        let before = onReactor { [reactor] in reactor.statistics.waits }
        for _ in 0..<10_000 where onReactor({ [reactor] in reactor.statistics.waits }) > before { return true }
        return false
    }

    /// Waits until something holds on the reactor's thread; looked at in each turn.
    func wait(until met: @escaping (Objects) -> Bool) {
        let signal = Signal()
        perform { (objects: Objects) in
            objects.condition = ({ met(objects) }, signal)
        }
        signal.wait()
    }

    /// Keeps requests with the medium, or lets them go.
    func hold(_ isHeld: Bool) { perform { $0.isHeld = isHeld } }

    /// The faults that the server has reported, in words.
    var faults: [String] {
        perform { objects in
            objects.events.compactMap {
                switch $0 {
                case .fault(let what): what
                case .disconnected(let reason): reason
                case .connected: nil
                }
            }
        }
    }

    /// Carries a function to the reactor's thread and its result back; `Signal` orders the two.
    private final class Box<Value>: @unchecked Sendable {
        private let function: () -> Value
        private(set) var result: Value?
        init(function: @escaping () -> Value) { self.function = function }
        func run() { result = function() }
    }
}

/// The unit of the world.
let unit0 = VirtioSCSIAddress.flat(target: 0, lun: 0)

extension VhostUserFrontEnd {
    /// Queue 0.
    var control: DriverQueue { queues[0] }
    /// Queue 1.
    var events: DriverQueue { queues[1] }
    /// The first request queue.
    var requests: DriverQueue { queues[2] }

    /// A started front-end whose unit attentions are past.
    static func ready(_ world: ServerWorld, _ options: Options = Options()) throws -> VhostUserFrontEnd {
        let frontEnd = try started(path: world.socketPath, options: options)
        _ = try frontEnd.requests.runPastUnitAttentions(SCSICommand(unit0, [0]))
        return frontEnd
    }
}
