// XenFront: the Xen front as the daemon sees it: which targets there are for guests, and a thread that serves them.
//
// Owns: the control thread, the catalogue of targets, the workers. Called by: the daemon, from any thread.
// Must not know: how vhosts come and go (XenControl), how requests are served (XenWorker and below).

import CLinux
import CXen
import Glibc
public import Reactor
public import SCSICore
import Synchronization
import Xenbus

/// Serves each `backend/vscsi` device of this domain whose `p-dev` names a target of the daemon.
@safe
public final class XenFront: @unchecked Sendable {
    /// How it works.
    public struct Configuration: Sendable {
        /// Bytes of staging memory of each reactor.
        public var stagingBytes: Int
        /// Where records of requests in flight are kept, so that a daemon that died can be followed by another. Must
        /// not outlive the host's boot.
        public var recordDirectory = "/run/targetd/xen"
        /// Whether guests may be given SCSI devices of this host.
        public var hostDevices = true
        /// The relative target port identifier of the front: one that each target has that is published.
        public var targetPort = Self.defaultTargetPort
        /// The one that it has if nobody says another; vhost-user's is 1.
        public static let defaultTargetPort: UInt16 = 2
        /// Takes one line for the operator; called on the control thread. `vhost` is `nil` for what concerns all.
        public var log: @Sendable (_ vhost: String?, _ text: String, _ isError: Bool) -> Void = { _, _, _ in }

        /// The defaults.
        public init() { stagingBytes = VSCSIIFLimits.stagingBytes }
    }

    /// What is known at one moment.
    public struct Status: Sendable {
        /// What it waits for before it can serve, such as xenstored; `nil`: it serves.
        public var waitsFor: String?
        /// In the order of domains and numbers.
        public var vhosts: [VhostStatus] = []
    }

    /// What is known of one vhost.
    public struct VhostStatus: Sendable {
        /// The guest's domain.
        public let domain: UInt16
        /// The vhost's number.
        public let number: UInt32
        /// The reactor that serves it, by index; `nil` while there is no ring.
        public let reactor: Int?
        /// The back end's state, and the front end's.
        public let backendState: String, frontendState: String
        /// Its devices: directory, `p-dev`, `v-dev`, state.
        public let devices: [(name: String, physicalDevice: String, virtualDevice: String, state: String)]
        /// Why it is not served, if it is not.
        public let fault: String?
        /// What was done since the ring was mapped.
        public var statistics = Statistics()
    }

    /// What was done on a ring.
    public struct Statistics: Sendable {
        /// Commands taken.
        public var commands: UInt64 = 0
        /// ABORT and RESET.
        public var taskManagementFunctions: UInt64 = 0
        /// Times the guest was notified of answers.
        public var notifications: UInt64 = 0
        /// Requests that had to wait for staging memory.
        public var waits: UInt64 = 0
    }

    private let configuration: Configuration
    private let reactors: [Reactor]
    private let executor: Executor
    private let messages = Mutex<[@Sendable (XenControl?) -> Void]>([])
    private let wakeDescriptor: Int32
    private let lifecycle = Mutex(Lifecycle.idle)
    /// The control thread's.
    private var store: XenStoreClient?
    private var control: XenControl?
    /// Why there is no `control`; told once for each reason.
    private var waitsFor: String?

    private enum Lifecycle {
        case idle
        case running
        case stopping(@Sendable () -> Void)
    }

    /// Whether this machine is a domain of Xen's.
    public static var isXenDomain: Bool { unsafe access("/proc/xen", F_OK) == 0 || access("/dev/xen", F_OK) == 0 }

    /// Opens nothing. `start` makes it serve.
    ///
    /// - Parameter reactors: Where vhosts may be served: each on the reactor of the first target that it uses.
    public init(_ configuration: Configuration, reactors: [Reactor]) {
        self.configuration = configuration
        self.reactors = reactors
        wakeDescriptor = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
        precondition(wakeDescriptor >= 0, "no eventfd")
        executor = Executor(configuration)
    }

    deinit { close(wakeDescriptor) }

    // MARK: Targets

    /// Makes a target's units known to guests' `p-dev` nodes. Again for each change of its units.
    ///
    /// - Parameters:
    ///   - target: A target on the reactor with this index.
    ///   - units: The numbers of its units.
    public func publish(_ target: TargetDevice, reactor: Int, units: Set<UInt16>) {
        let name = target.name
        let entry = CatalogueEntry(target: target, reactor: reactor, units: units)
        executor.catalogue.withLock { $0[name] = entry }
        post { $0?.published(name) }
    }

    /// Takes a target away from guests. Their devices stay, without an answer but "no connection", until the target is
    /// published again or the toolstack removes them.
    ///
    /// - Parameter done: Called on any thread when nothing of the front uses the target any more.
    public func withdraw(_ name: UInt64, done: @escaping @Sendable () -> Void) {
        guard let entry = executor.catalogue.withLock({ $0.removeValue(forKey: name) }) else { return done() }
        let workers = executor.workers.withLock { $0 }
        // Without workers there are no vhosts; those that will be do not find the target.
        guard !workers.isEmpty else { return done() }
        post { $0?.withdrawn(name) }
        workers[entry.reactor].post { $0.withdraw(name, done: done) }
    }

    // MARK: Running

    /// Starts the control thread: vhosts are served from now on, or as soon as there is a xenstored to ask.
    public func start() throws(XenFrontError) {
        executor.front = self
        makeDirectories(configuration.recordDirectory)
        lifecycle.withLock { $0 = .running }
        let context = unsafe Unmanaged.passRetained(self)
        var thread = pthread_t()
        let error = unsafe pthread_create(
            &thread, nil,
            { context in
                let front = unsafe Unmanaged<XenFront>.fromOpaque(context!).takeRetainedValue()
                front.run()
                return nil
            }, context.toOpaque())
        guard error == 0 else {
            unsafe context.release()
            lifecycle.withLock { $0 = .idle }
            throw XenFrontError(
                description: unsafe "the Xen front cannot start: no thread: \(String(cString: strerror(error)))")
        }
        pthread_detach(thread)
    }

    /// Stops the control thread, then lets go of all rings in good order: commands in flight are answered, guests wait
    /// for the next daemon.
    ///
    /// - Parameter done: Called on any thread when all is done.
    public func stop(done: @escaping @Sendable () -> Void) {
        let runs = lifecycle.withLock { lifecycle in
            guard case .running = lifecycle else { return false }
            lifecycle = .stopping(done)
            return true
        }
        guard runs else { return done() }
        wake()
    }

    /// What is known. Called on any thread; answered on another.
    public func status(_ answer: @escaping @Sendable (Status) -> Void) {
        let runs = lifecycle.withLock { lifecycle in
            if case .running = lifecycle { true } else { false }
        }
        guard runs else { return answer(Status(waitsFor: "its end")) }
        post { [self] control in
            guard let control else { return answer(Status(waitsFor: waitsFor ?? "xenstored")) }
            let missing = store == nil ? waitsFor ?? "xenstored" : nil
            let vhosts = control.status.map { vhost, machine, nodes in
                VhostStatus(
                    domain: vhost.domain, number: vhost.number, reactor: executor.place(of: vhost),
                    backendState: "\(nodes.backendState ?? .unknown)",
                    frontendState: "\(nodes.frontendState ?? .unknown)",
                    devices: nodes.devices.map { ($0.name, $0.physicalDevice, $0.virtualDevice, "\($0.state)") },
                    fault: machine.fault)
            }
            let status = Status(waitsFor: missing, vhosts: vhosts)
            Self.addStatistics(status, executor.workers.withLock { $0 }[...], answer)
        }
    }

    /// Asks one reactor after the other.
    private static func addStatistics(
        _ status: Status, _ workers: ArraySlice<XenWorker>, _ answer: @escaping @Sendable (Status) -> Void
    ) {
        guard let worker = workers.first else { return answer(status) }
        worker.post { worker in
            var status = status
            for (index, entry) in status.vhosts.enumerated() {
                let vhost = VhostIdentifier(domain: entry.domain, number: entry.number)
                if let statistics = worker.statistics(of: vhost) { status.vhosts[index].statistics = statistics }
            }
            addStatistics(status, workers.dropFirst(), answer)
        }
    }

    /// Runs on the control thread, if that runs.
    fileprivate func post(_ message: @escaping @Sendable (XenControl?) -> Void) {
        messages.withLock { $0.append(message) }
        wake()
    }

    private func wake() {
        var one: UInt64 = 1
        _ = unsafe write(wakeDescriptor, &one, 8)
    }

    // MARK: The control thread

    /// Everything it does may block; nothing it does is on the path of a request.
    private func run() {
        var all = sigset_t()
        unsafe sigfillset(&all)
        unsafe pthread_sigmask(SIG_SETMASK, &all, nil)
        while true {
            if case .stopping(let done) = lifecycle.withLock({ $0 }) { return end(done) }
            if store == nil { connect() }
            waitForWork()
            let mail = messages.withLock { messages in
                defer { messages = [] }
                return messages
            }
            for message in mail { message(control) }
            guard let store else { continue }
            control?.process()
            if !store.isAlive { disconnected() }
        }
    }

    /// xenstored has died. Rings go on without it; for anything else it is waited for.
    private func disconnected() {
        store = nil
        configuration.log(nil, "has lost xenstored; guests keep their disks, and it is looked for again", true)
    }

    private func waitForWork() {
        var waited = [pollfd(fd: wakeDescriptor, events: Int16(POLLIN), revents: 0)]
        if let store { waited.append(pollfd(fd: store.descriptor, events: Int16(POLLIN), revents: 0)) }
        // Nothing would tell us that xenstored has come, or has gone: its library hides the end of a connection.
        _ = unsafe poll(&waited, nfds_t(waited.count), store == nil ? 1000 : 5000)
        var count: UInt64 = 0
        _ = unsafe read(wakeDescriptor, &count, 8)
    }

    private func end(_ done: @escaping @Sendable () -> Void) {
        let mail = messages.withLock { messages in
            defer { messages = [] }
            return messages
        }
        for message in mail { message(nil) }
        let workers = executor.workers.withLock { $0 }
        let left = Counter(workers.count + 1)
        let part: @Sendable () -> Void = { if left.decrement() == 0 { done() } }
        for worker in workers { worker.post { $0.stop(done: part) } }
        part()
    }

    /// Begins to follow xenstore, if there is one.
    private func connect() {
        do throws(XenStoreError) {
            let store = try XenStoreClient()
            let domain = try store.ownDomain()
            if executor.workers.withLock({ $0.isEmpty }) { try makeWorkers() }
            executor.store = store
            if let control {
                try control.reconnect(store)
            } else {
                let control = XenControl(store: store, domain: domain, executor: executor)
                try control.start()
                self.control = control
            }
            (self.store, waitsFor) = (store, nil)
            configuration.log(nil, "follows xenstore", false)
        } catch {
            guard waitsFor != error.description else { return }
            waitsFor = error.description
            configuration.log(nil, "waits, and tries again each second: \(error)", true)
        }
    }

    private func makeWorkers() throws(XenStoreError) {
        var made: [XenWorker] = []
        for reactor in reactors {
            made.append(
                try XenWorker(
                    reactor: reactor, stagingBytes: configuration.stagingBytes,
                    recordDirectory: configuration.recordDirectory,
                    onFault: { [executor] vhost, text in executor.front?.post { $0?.give(up: vhost, because: text) } }))
        }
        let all = made
        executor.workers.withLock { $0 = all }
    }
}

/// Why the Xen front could not be started.
public struct XenFrontError: Error, Sendable, CustomStringConvertible {
    /// What is wrong and what to do.
    public let description: String
}

/// A target that guests may have.
@safe
private struct CatalogueEntry: @unchecked Sendable {
    /// Used on its reactor's thread only.
    let target: TargetDevice
    let reactor: Int
    let units: Set<UInt16>
}

/// A number that several threads count down.
private final class Counter: Sendable {
    private let value: Mutex<Int>
    init(_ value: Int) { self.value = Mutex(value) }
    func decrement() -> Int {
        value.withLock {
            $0 -= 1
            return $0
        }
    }
}

/// Does on the reactors what the control thread decides.
private final class Executor: XenbusExecutor, @unchecked Sendable {
    weak var front: XenFront?
    /// One for each reactor, once there is a grant device.
    let workers = Mutex<[XenWorker]>([])
    /// The control thread's.
    var store: XenStoreClient!
    let catalogue = Mutex<[UInt64: CatalogueEntry]>([:])
    private let line: @Sendable (String?, String, Bool) -> Void
    /// On which reactor each connected vhost is; the control thread's.
    private var places: [VhostIdentifier: Int] = [:]

    private let servesHostDevices: Bool
    private let targetPort: UInt16

    init(_ configuration: XenFront.Configuration) {
        line = configuration.log
        servesHostDevices = configuration.hostDevices
        targetPort = configuration.targetPort
    }

    func log(_ vhost: VhostIdentifier, _ text: String, isError: Bool) { line(vhost.description, text, isError) }

    func isTakenByKernel(_ vhost: VhostIdentifier) -> Bool {
        unsafe access("/sys/bus/xen-backend/devices/vscsi-\(vhost.domain)-\(vhost.number)/driver", F_OK) == 0
    }

    func forgotten(_ vhost: VhostIdentifier) { places[vhost] = nil }

    func place(of vhost: VhostIdentifier) -> Int? { places[vhost] }

    private func end(_ vhost: VhostIdentifier, _ outcome: XenbusOutcome) {
        front?.post { $0?.completed(vhost, outcome) }
    }

    func perform(_ effect: XenbusEffect, _ vhost: VhostIdentifier, _ nodes: VhostNodes) {
        switch effect {
        case .connect(let ring, let recovering): connect(vhost, ring, recovering, nodes)
        case .serve: on(vhost) { [self] in end(vhost, $0.serve(vhost)) }
        case .disconnect: on(vhost) { [self] in $0.disconnect(vhost) { self.end(vhost, .done) } }
        case .attach(_, let physical, let device): attach(vhost, physical, device)
        case .detach(_, let device):
            on(vhost) { [self] in
                $0.detach(device, of: vhost)
                end(vhost, .done)
            }
        }
    }

    private func on(_ vhost: VhostIdentifier, _ body: @escaping @Sendable (XenWorker) -> Void) {
        workers.withLock { $0 }[places[vhost] ?? 0].post(body)
    }

    private func connect(_ vhost: VhostIdentifier, _ ring: RingParameters, _ recovering: Bool, _ nodes: VhostNodes) {
        // Where the first device is that can be served.
        let names = nodes.devices.compactMap { PhysicalDevice(node: $0.physicalDevice) }
        places[vhost] = 0
        for case .named(let name, _) in names {
            guard let entry = catalogue.withLock({ $0[name] }) else { continue }
            places[vhost] = entry.reactor
            break
        }
        let connection = VhostConnection(
            vhost: vhost, ring: ring, wholeTarget: nodes.featureHost, recovering: recovering,
            initiatorPort: initiatorPort(vhost), targetPort: targetPort)
        on(vhost) { [self] in end(vhost, $0.connect(connection)) }
    }

    /// A guest keeps its identity when it is started again under another domain number: its UUID, if it has one.
    private func initiatorPort(_ vhost: VhostIdentifier) -> String {
        let path = (try? store.read("/local/domain/\(vhost.domain)/vm", .none)) ?? nil
        if let path, path.hasPrefix("/vm/") { return "xen,\(path.dropFirst(4).prefix(36)),\(vhost.number)" }
        return "xen,domain-\(vhost.domain),\(vhost.number)"
    }

    private func attach(_ vhost: VhostIdentifier, _ physical: PhysicalDevice, _ device: VirtualDevice) {
        let name: UInt64
        let number: UInt16
        switch physical {
        case .named(let target, let lun): (name, number) = (target, lun)
        case .host(let host, let channel, let target, let lun):
            guard servesHostDevices else {
                return end(
                    vhost,
                    .failed("p-dev \(physical): targetd is not allowed to serve devices of its host; name a target"))
            }
            let target = HostTarget(host: host, channel: channel, target: target)
            return on(vhost) { [self] in end(vhost, $0.attach(device, of: vhost, to: target, lun: lun)) }
        }
        let entry = catalogue.withLock { $0[name] }
        guard let entry else {
            return end(vhost, .failed("p-dev \(physical): the daemon has no such target"))
        }
        guard entry.units.contains(number), let unit = LUN(Int(number)) else {
            return end(vhost, .failed("p-dev \(physical): the target has no logical unit \(number)"))
        }
        guard entry.reactor == places[vhost] else {
            return end(
                vhost,
                .failed(
                    "p-dev \(physical): the target is on another reactor than the vhost's first target; "
                        + "attach it to a vhost of its own, or configure reactors: 1"))
        }
        on(vhost) { [self] worker in
            // It may have been withdrawn meanwhile, and then it may not be touched.
            guard let current = catalogue.withLock({ $0[name] }), current.target === entry.target else {
                return end(vhost, .failed("p-dev \(physical): the daemon has just removed the target"))
            }
            end(vhost, worker.attach(device, of: vhost, to: entry.target, unit: unit))
        }
    }
}

/// Makes a directory and its parents, as far as they are missing.
private func makeDirectories(_ path: String) {
    var at = ""
    for part in path.split(separator: "/") {
        at += "/" + part
        _ = unsafe mkdir(at, 0o700)
    }
}
