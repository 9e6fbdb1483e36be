// TestDaemon: servers on a reactor thread, as the daemon has them, over RAM disks that can be told to hold requests, of
// the same thread or of another.
//
// Owns: the thread and everything on it. Called by: the end-to-end tests here. Must not know: what is tested.

import Backstores
import CLinux
import Glibc
import Reactor
import SCSICore
import Synchronization
import VhostUserInitiator
import VirtioFront

/// What lives on the reactors' threads.
final class TestObjects: @unchecked Sendable {
    /// The reactor of the disks.
    let reactor: Reactor
    /// The reactor of the servers.
    let serverReactor: Reactor
    let shard = Shard()
    private let serverShard = Shard()
    /// Both, if they are two.
    let spread: [ShardReactor]?
    /// The disks of logical units 0 and 1 of target 0, each of `TestDaemon.diskSize` bytes.
    var disks: [RAMBackstore] = []
    /// The faults in front of each disk.
    var faults: [FaultInjectionBackstore] = []
    let target: TargetDevice
    private var moreTargets: [TargetDevice] = []
    var servers: [VhostUserSCSIServer] = []
    /// What the servers reported.
    let events = Mutex<[(server: Int, event: VhostUserSCSIServer.Event)]>([])

    init(isSpread: Bool) throws {
        var configuration = Reactor.Configuration()
        configuration.pollMicroseconds = 0
        reactor = try Reactor(configuration)
        serverReactor = isSpread ? try Reactor(configuration) : reactor
        spread =
            isSpread
            ? [
                ShardReactor(reactor: serverReactor, shard: serverShard), ShardReactor(reactor: reactor, shard: shard),
            ] : nil
        target = TargetDevice(name: 0x5000_0000_0000_0001, shard: shard)
        for number in 0..<2 {
            let disk = try RAMBackstore(size: TestDaemon.diskSize, reactor: reactor)
            let fault = FaultInjectionBackstore(wrapping: disk.handle, reactor: reactor)
            let unit = LogicalUnit(
                configuration: LogicalUnitConfiguration(
                    name: 0x5000_0000_0000_0010 + UInt64(number), serial: "serial\(number)"),
                backstore: fault.handle, shard: shard)
            _ = target.add(unit, at: LUN(number)!)
            disks.append(disk)
            faults.append(fault)
        }
        driveShard()
    }

    /// One more target, with so many units on the first disk.
    func addTarget(_ number: UInt64, units: Int) -> TargetDevice {
        let target = TargetDevice(name: 0x5000_0000_0000_0001 + number << 32, shard: shard)
        for lun in 0..<units {
            let unit = LogicalUnit(
                configuration: LogicalUnitConfiguration(
                    name: 0x5000_0000_0000_1000 + number << 32 + UInt64(lun), serial: "serial\(number).\(lun)"),
                backstore: faults[0].handle, shard: shard)
            _ = target.add(unit, at: LUN(lun)!)
        }
        moreTargets.append(target)
        return target
    }

    private func driveShard() {
        _ = unsafe reactor.add(
            Reactor.WorkSource(
                poll: { context in
                    let objects = unsafe Unmanaged<TestObjects>.fromOpaque(context).takeUnretainedValue()
                    objects.shard.now = objects.reactor.now
                    guard objects.shard.hasWaiting else { return false }
                    objects.shard.retryWaiting()
                    return true
                },
                flush: { _ in }, prepareToSleep: { _ in false },
                context: Unmanaged.passUnretained(self).toOpaque()))
    }

    func close() {
        for target in [target] + moreTargets {
            for entry in target.logicalUnits { target.remove(at: entry.lun, drained: {}) }
        }
        for fault in faults { fault.close() }
        for disk in disks { disk.close() }
    }
}

/// Servers on a thread of their own, each at a socket of its own, all with the same target 0.
final class TestDaemon: Sendable {
    static let diskSize: UInt64 = 8 << 20
    static let requestQueues = 4
    static let patience: UInt64 = 3_600_000_000_000
    private static let numbers = Atomic<Int>(0)

    /// The paths of the sockets.
    let paths: [String]
    private let objects: TestObjects
    private let threads: Mutex<[pthread_t]>

    /// - Parameter isSpread: Two reactors: the disks belong to one, the servers to the other, and request queues are
    ///   served by both in turn, the first by that of the servers.
    ///   - drainPatience: As in `VhostUserSCSIServer.Configuration`; by default longer than any test, however slow.
    init(sockets: Int = 1, isSpread: Bool = false, drainPatience: UInt64 = TestDaemon.patience) throws {
        let number = Self.numbers.wrappingAdd(1, ordering: .relaxed).newValue
        paths = (0..<sockets).map { "/tmp/virtio-front-test-\(getpid())-\(number)-\($0).sock" }
        let objects = try TestObjects(isSpread: isSpread)
        self.objects = objects
        for (index, path) in paths.enumerated() {
            var configuration = VhostUserSCSIServer.Configuration(
                socketPath: path, requestQueues: Self.requestQueues, targets: [0: objects.target],
                initiatorPort: "test \(index)")
            configuration.spread = objects.spread
            configuration.drainPatience = drainPatience
            let server = VhostUserSCSIServer(
                configuration: configuration, reactor: objects.serverReactor,
                report: { event in objects.events.withLock { $0.append((index, event)) } })
            try server.start()
            objects.servers.append(server)
        }
        threads = Mutex([])
        let reactors = isSpread ? [objects.reactor, objects.serverReactor] : [objects.reactor]
        threads.withLock { $0 = reactors.map(Self.start) }
    }

    private static func start(_ reactor: Reactor) -> pthread_t {
        var thread = pthread_t()
        let context = unsafe Unmanaged.passRetained(reactor).toOpaque()
        let error = unsafe pthread_create(
            &thread, nil,
            { context in
                let reactor = unsafe Unmanaged<Reactor>.fromOpaque(context!).takeRetainedValue()
                // As in the daemon: a front-end's broken pipe is an error there, and no signal.
                var all = sigset_t()
                unsafe sigfillset(&all)
                unsafe pthread_sigmask(SIG_SETMASK, &all, nil)
                reactor.run()
                return nil
            }, context)
        precondition(error == 0, "no thread")
        return thread
    }

    /// Runs `body` on the thread of the disks and returns its result.
    func perform<Result: Sendable>(_ body: @escaping @Sendable (TestObjects) -> Result) -> Result {
        perform(on: objects.reactor, body)
    }

    /// The same on the thread of the servers.
    func performOnServers<Result: Sendable>(_ body: @escaping @Sendable (TestObjects) -> Result) -> Result {
        perform(on: objects.serverReactor, body)
    }

    private func perform<Result: Sendable>(
        on reactor: Reactor, _ body: @escaping @Sendable (TestObjects) -> Result
    ) -> Result {
        let done = OneShot<Result>()
        let objects = objects
        reactor.post { done.set(body(objects)) }
        return done.wait()
    }

    /// Waits until a condition on the disks' thread, or the servers', holds.
    func eventually(
        _ what: String, onServers: Bool = false, _ condition: @escaping @Sendable (TestObjects) -> Bool
    ) throws(InitiatorError) {
        let end = time(nil) + 30
        while !(onServers ? performOnServers(condition) : perform(condition)) {
            guard time(nil) < end else { throw .timeout(what) }
            sched_yield()
        }
    }

    /// Tells the disk of a logical unit what to do with its next requests.
    func inject(_ unit: Int, _ action: FaultInjectionBackstore.Fault.Action, times: Int = 1) {
        perform { $0.faults[unit].inject(FaultInjectionBackstore.Fault(action, times: times)) }
    }

    /// Takes a logical unit away from the target.
    func removeUnit(_ number: Int) {
        perform { _ = $0.target.remove(at: LUN(number)!, drained: {}) }
    }

    /// Waits until the disk of a logical unit holds so many requests.
    func waitForHeld(_ count: Int, unit: Int = 0) throws(InitiatorError) {
        try eventually("\(count) requests to be held") { $0.faults[unit].heldCount == count }
    }

    /// Lets the requests go that the disk of a logical unit holds.
    func release(_ unit: Int = 0) { perform { $0.faults[unit].releaseHeld() } }

    /// The disk of logical unit 0 takes no requests.
    func freeze() { perform { $0.target.logicalUnits[0].unit.freeze() } }

    /// It takes them again.
    func thaw() { perform { $0.target.logicalUnits[0].unit.thaw() } }

    /// Waits until logical unit 0 has so many tasks.
    func waitForTasks(_ count: Int) throws(InitiatorError) {
        try eventually("\(count) tasks") { $0.target.logicalUnits[0].unit.tasksInFlight == count }
    }

    /// Waits until no front-end is connected to a server and nothing that one had sent is in flight.
    func waitForDisconnection(_ index: Int = 0) throws(InitiatorError) {
        try eventually("the server to see the end of the connection", onServers: true) {
            !$0.servers[index].isConnected
        }
    }

    /// Front-ends that a server has accepted until now.
    func connections(_ index: Int = 0) -> Int {
        objects.events.withLock { events in
            events.count { entry in
                if case .connected = entry.event { entry.server == index } else { false }
            }
        }
    }

    /// The faults that a server reported, and the reasons for which it ended connections.
    func complaints(_ index: Int = 0) -> [String] {
        objects.events.withLock { events in
            events.compactMap { entry in
                guard entry.server == index else { return nil }
                switch entry.event {
                case .fault(let text): return text
                case .disconnected(let reason): return reason
                case .connected: return nil
                }
            }
        }
    }

    /// Stops the servers, waits until nothing is in flight, ends the thread.
    func stop() {
        for index in paths.indices {
            let stopped = OneShot<Bool>()
            let objects = objects
            objects.serverReactor.post { objects.servers[index].stop { stopped.set(true) } }
            _ = stopped.wait()
        }
        performOnServers { $0.servers = [] }
        perform { $0.close() }
        objects.serverReactor.stop()
        objects.reactor.stop()
        threads.withLock { threads in
            for running in threads { pthread_join(running, nil) }
            threads = []
        }
    }
}

/// A value that one thread waits for and another sets.
final class OneShot<Value: Sendable>: Sendable {
    private let value = Mutex<Value?>(nil)
    private let descriptor = eventfd(0, Int32(EFD_CLOEXEC))

    deinit { close(descriptor) }

    func set(_ new: Value) {
        value.withLock { $0 = new }
        _ = eventfd_write(descriptor, 1)
    }

    func wait() -> Value {
        var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
        let count = unsafe poll(&entry, 1, 60_000)
        guard count == 1, let value = value.withLock({ $0 }) else {
            preconditionFailure("the reactor's thread did not answer for a minute")
        }
        return value
    }
}

/// Runs a test with a daemon of one reactor, and again with one of two between which all commands cross. Each is
/// stopped at its end: that fails if something is left in flight.
@discardableResult
func withDaemon<Result>(
    sockets: Int = 1, drainPatience: UInt64 = TestDaemon.patience, _ body: (TestDaemon) throws -> Result
) throws -> Result {
    let spread = try TestDaemon(sockets: sockets, isSpread: true, drainPatience: drainPatience)
    do {
        defer { spread.stop() }
        _ = try body(spread)
    }
    let daemon = try TestDaemon(sockets: sockets, drainPatience: drainPatience)
    defer { daemon.stop() }
    return try body(daemon)
}

// MARK: Commands

/// Logical unit `number` of target 0.
func unit(_ number: UInt16) -> VirtioSCSIAddress { .flat(target: 0, lun: number) }

/// READ(10) of blocks of 512 bytes.
func read10(_ address: VirtioSCSIAddress, block: UInt32, count: UInt16, dataIn: Int? = nil) -> SCSICommand {
    SCSICommand(address, cdb10(0x28, block, count), dataIn: dataIn ?? Int(count) * 512)
}

/// WRITE(10) of blocks of 512 bytes.
func write10(_ address: VirtioSCSIAddress, block: UInt32, _ data: [UInt8]) -> SCSICommand {
    SCSICommand(address, cdb10(0x2a, block, UInt16(data.count / 512)), dataOut: data)
}

private func cdb10(_ operation: UInt8, _ block: UInt32, _ count: UInt16) -> [UInt8] {
    [operation, 0] + WireBytes.of(block.bigEndian) + [0] + WireBytes.of(count.bigEndian) + [0]
}

/// TEST UNIT READY.
func testUnitReady(_ address: VirtioSCSIAddress) -> SCSICommand {
    SCSICommand(address, [0, 0, 0, 0, 0, 0])
}

/// Bytes that differ from block to block and from seed to seed.
func pattern(_ count: Int, seed: UInt8) -> [UInt8] {
    (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 31 &+ $0 >> 9 &* 7 &+ Int(seed)) }
}

extension VhostUserFrontEnd {
    /// A started front-end whose unit attentions of units 0 and 1 are over.
    static func ready(_ daemon: TestDaemon, socket: Int = 0, options: Options = Options()) throws -> VhostUserFrontEnd {
        let frontEnd = try VhostUserFrontEnd.started(path: daemon.paths[socket], options: options)
        for number: UInt16 in 0..<2 {
            let result = try frontEnd.requests.runPastUnitAttentions(testUnitReady(unit(number)))
            precondition(result.isGood, "logical unit \(number) is not ready: \(result)")
        }
        return frontEnd
    }

    /// Stops all rings as QEMU does, one after the other; what SET_VRING_BASE takes.
    func stopAll() throws -> [UInt32] { try queues.map { try stopAnywhere($0) } }

    /// Starts rings that were stopped on this connection.
    func startAgain(_ bases: [UInt32]) throws {
        for (queue, base) in zip(queues, bases) {
            try setUp(queue, base: base)
            try tell(.setVringCall, WireBytes.of(UInt64(queue.index)), descriptors: [queue.callDescriptor])
            try tell(.setVringKick, WireBytes.of(UInt64(queue.index)), descriptors: [queue.kickDescriptor])
            try enable(queue, true)
        }
    }
}
