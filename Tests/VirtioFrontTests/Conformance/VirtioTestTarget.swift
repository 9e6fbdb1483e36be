// VirtioTestTarget: the conformance suite's target with its initiators A and B behind vhost-user sockets, each with a
// front-end, rings and memory of its own.
//
// Owns: the reactors, the servers, the front-ends. Called by: the conformance suite, whose files are linked into this
// directory: in this module their TestTarget is the one here. Must not know: the clauses.
//
// Each test runs twice. First with devices on two reactors: the target and each second request queue belong to one,
// the servers and the other queues to the other; A's commands come through a queue of the servers' reactor and B's
// through one of the target's. Then with one reactor that has all.
//
// The target's reactor is on the test's thread, which makes its turns itself, so that each test is in control of every
// step; a second reactor has a thread that makes a turn when it is told to (SteppedReactor). The handshakes, which wait
// for answers, are on a thread of their own. A function's answer and the command that it ended, used in the same turn,
// are taken in the order in which the driver must see them, commands first: that the front writes them in this order is
// what EndToEndManagementTests look at.

import CLinux
import CoreTestSupport
import Glibc
import Reactor
import SCSICore
import Synchronization
import Testing
import VhostUserInitiator
import VirtioFront

typealias TestTarget = VirtioTestTarget

/// Runs each test of a suite with devices on two reactors, and again with one reactor for all.
struct TransportTrait: SuiteTrait, TestTrait, TestScoping {
    @TaskLocal static var isSpread = false

    var isRecursive: Bool { true }

    @concurrent func provideScope(
        for test: Test, testCase: Test.Case?, performing function: @Sendable @concurrent () async throws -> Void
    ) async throws {
        try await Self.$isSpread.withValue(true) { try await function() }
        try await function()
    }
}

extension Trait where Self == TransportTrait {
    /// Each way in which this module brings commands to the target.
    static var onEachTransport: Self { Self() }
}

/// The target.
final class VirtioTestTarget: CoreTestSupport.TestTarget {
    private let hub: VirtioHub

    override init(
        blocks: UInt64 = 4096, blockLength: UInt32 = 512, attentive: Bool = false,
        configuration: LogicalUnitConfiguration = LogicalUnitConfiguration(
            name: 0x3001_4054_0000_0001, serial: "SERIAL0001"),
        savesState: Bool = false, kept: [UInt8]? = nil, portGroups: [TargetPortGroup] = [],
        configure: (ScriptedBackstore) -> Void = { _ in },
        transport: (MockPort) -> (any MockTransport)? = { _ in nil }
    ) {
        let hub = VirtioHub(isSpread: TransportTrait.isSpread)
        self.hub = hub
        super.init(
            blocks: blocks, blockLength: blockLength, attentive: attentive, configuration: configuration,
            savesState: savesState, kept: kept, portGroups: portGroups, configure: configure,
            transport: { hub.transport(for: $0) })
        journal.whenRead = { hub.turn() }
    }

    deinit {
        journal.whenRead = nil
        comeToRest()
        hub.close()
    }

    /// Each front-end looks into its own rings.
    override static var ordersPorts: Bool { false }

    /// A front-end that is gone sees nothing any more.
    override static var givesBackAfterLoss: Bool { false }

    /// virtio 1.2 5.6.6.2 has no TARGET RESET and no QUERY ASYNCHRONOUS EVENT, and a function that it has no number for
    /// cannot be sent.
    override static func canSend(_ function: TaskManagementFunction?) -> Bool {
        function.map { VirtioTransport.number($0) != nil } ?? false
    }
}

/// The reactors and what is on them.
final class VirtioHub {
    private let reactor: Reactor
    /// The servers' reactor, if it is another one.
    private let second: SteppedReactor?
    /// Both, that of the servers first.
    private var spread: [ShardReactor]?
    private var transports: [VirtioTransport] = []
    private var isTurning = false
    /// Turns of both reactors after which whatever a command or a function causes has come to its end: the command to
    /// its queue's thread, to the target's, back, and for a function the calls between the threads before that.
    private static let turns = 6

    init(isSpread: Bool) {
        do { reactor = try Reactor(Reactor.Configuration()) } catch { fatalError("no reactor: \(error)") }
        second = isSpread ? SteppedReactor() : nil
    }

    func transport(for port: MockPort) -> VirtioTransport {
        if let second, spread == nil {
            // Before the second reactor makes its first turn.
            spread = [
                ShardReactor(reactor: second.reactor, shard: Shard()),
                ShardReactor(reactor: reactor, shard: port.target.shard),
            ]
        }
        let number = transports.count
        let transport = VirtioTransport(port, hub: self, spread: spread, queue: spread == nil ? 0 : number)
        transports.append(transport)
        return transport
    }

    /// The servers' reactor.
    fileprivate var serverReactor: Reactor { second?.reactor ?? reactor }

    /// Runs a function where the servers are.
    fileprivate func onServers<Result>(_ body: @escaping () -> Result) -> Result {
        guard let second else { return body() }
        let work = Work(body)
        second.reactor.post { work.run() }
        while !work.isDone.load(ordering: .acquiring) { turnOnce() }
        return work.result!
    }

    private func turnOnce() {
        guard let second else { return reactor.turn(mayWait: false) }
        // One of its turns may wait for calls to this thread, which a turn here serves.
        second.turn { reactor.turn(mayWait: false) }
        reactor.turn(mayWait: false)
    }

    /// What there is to do is done, and what has come back by then is taken.
    func turn() {
        guard !isTurning else { return }
        isTurning = true
        for _ in 0..<(second == nil ? 1 : Self.turns) { turnOnce() }
        isTurning = false
        for transport in transports { transport.collectCommands() }
        for transport in transports { transport.collectFunctionsAndEvents() }
    }

    func turn(until isMet: () -> Bool) {
        while !isMet() { turn() }
    }

    /// Runs what waits for the server on a thread of its own, and makes turns meanwhile.
    fileprivate func handshake(_ body: @escaping () -> Void) {
        let work = Work(body)
        var thread = pthread_t()
        let error = unsafe pthread_create(
            &thread, nil,
            { context in
                unsafe Unmanaged<Work<Void>>.fromOpaque(context!).takeRetainedValue().run()
                return nil
            }, Unmanaged.passRetained(work).toOpaque())
        precondition(error == 0, "no thread")
        while !work.isDone.load(ordering: .acquiring) { turnOnce() }
        pthread_join(thread, nil)
    }

    /// A function that runs on another thread.
    private final class Work<Result>: @unchecked Sendable {
        private let body: () -> Result
        private(set) var result: Result?
        let isDone = Atomic<Bool>(false)

        init(_ body: @escaping () -> Result) { self.body = body }

        func run() {
            result = body()
            isDone.store(true, ordering: .releasing)
        }
    }

    func close() {
        for transport in transports { transport.close() }
        transports = []
        second?.stop()
    }
}

/// A reactor on a thread of its own, which makes a turn when it is told to.
final class SteppedReactor: @unchecked Sendable {
    let reactor: Reactor
    private let begin = eventfd(0, Int32(EFD_CLOEXEC))
    private let hasTurned = Atomic<Bool>(false)
    private let isStopped = Atomic<Bool>(false)
    private var thread = pthread_t()

    init() {
        do { reactor = try Reactor(Reactor.Configuration()) } catch { fatalError("no reactor: \(error)") }
        let error = unsafe pthread_create(
            &thread, nil,
            { context in
                unsafe Unmanaged<SteppedReactor>.fromOpaque(context!).takeUnretainedValue().loop()
                return nil
            }, Unmanaged.passUnretained(self).toOpaque())
        precondition(error == 0, "no thread")
    }

    deinit { close(begin) }

    private func loop() {
        var count: eventfd_t = 0
        while unsafe eventfd_read(begin, &count) == 0, !isStopped.load(ordering: .acquiring) {
            reactor.turn(mayWait: false)
            hasTurned.store(true, ordering: .releasing)
        }
    }

    /// One turn, and meanwhile, at least once, something here.
    func turn(meanwhile body: () -> Void) {
        hasTurned.store(false, ordering: .relaxed)
        _ = eventfd_write(begin, 1)
        repeat { body() } while !hasTurned.load(ordering: .acquiring)
    }

    func stop() {
        isStopped.store(true, ordering: .releasing)
        _ = eventfd_write(begin, 1)
        pthread_join(thread, nil)
    }
}

/// One initiator: a server for one socket, and the front-end that is connected to it.
final class VirtioTransport: MockTransport {
    private unowned let port: MockPort
    private unowned let hub: VirtioHub
    private let server: VhostUserSCSIServer
    private let path: String
    private var frontEnd: VhostUserFrontEnd?
    private var commands: [(command: SCSICommand, inFlight: SCSIInFlight)] = []
    private var functions: [(cookie: UInt64, chain: Chain)] = []
    private var events: [Chain] = []
    /// Which of the request queues carries the commands.
    private let queue: Int
    private static let counter = Atomic<Int>(0)
    private static let eventBuffers = 8

    init(_ port: MockPort, hub: VirtioHub, spread: [ShardReactor]?, queue: Int) {
        self.port = port
        self.hub = hub
        self.queue = 2 + queue
        let serial = Self.counter.wrappingAdd(1, ordering: .relaxed).newValue
        path = "/tmp/targetd-conformance-\(getpid())-\(serial).sock"
        var configuration = VhostUserSCSIServer.Configuration(
            socketPath: path, requestQueues: queue + 1, targets: [0: port.target], initiatorPort: port.name)
        configuration.targetPort = port.targetPort
        configuration.spread = spread
        let server = VhostUserSCSIServer(
            configuration: configuration, reactor: hub.serverReactor, report: { _ in })
        self.server = server
        hub.onServers {
            do { try server.start() } catch { fatalError("no server: \(error)") }
        }
    }

    var isConnected: Bool { frontEnd != nil }

    func connect() {
        let path = path
        var options = VhostUserFrontEnd.Options()
        options.queues = queue + 1
        hub.handshake { [unowned self] in
            do {
                frontEnd = try VhostUserFrontEnd.started(path: path, options: options)
            } catch {
                fatalError("no handshake: \(error)")
            }
        }
        events = (0..<Self.eventBuffers).map { _ in frontEnd!.queues[1].offerEventBuffer() }
        hub.turn()
    }

    func disconnect() {
        frontEnd?.disconnect()
        frontEnd = nil
        (commands, functions, events) = ([], [], [])
        turn { !$0.isConnected }
    }

    func close() {
        disconnect()
        var isStopped = false
        hub.onServers { [server] in server.stop { isStopped = true } }
        turn { _ in isStopped }
        unsafe unlink(path)
    }

    /// Makes turns until a condition holds, which is looked at where the server is.
    private func turn(until isMet: @escaping (VhostUserSCSIServer) -> Bool) {
        hub.turn { [hub, server] in hub.onServers { isMet(server) } }
    }

    func poll() { hub.turn() }

    // MARK: Sending

    func send(_ cdb: [UInt8], lun: UInt64, attribute: TaskAttribute, dataOut: [UInt8], dataIn: Int, tag: UInt64) {
        var command = SCSICommand(Self.address(lun), cdb, dataOut: dataOut, dataIn: dataIn)
        command.tag = tag
        command.attribute = attribute.rawValue
        let expected = statistics.commands + 1
        commands.append((command, frontEnd!.queues[queue].submit(command)))
        turn { $0.statistics.commands >= expected }
        // It may be on its way still.
        hub.turn()
    }

    func manage(_ function: TaskManagementFunction, lun: UInt64, tag: UInt64, cookie: UInt64) {
        let expected = statistics.taskManagementFunctions + 1
        let chain = frontEnd!.queues[0].submitTaskManagement(
            Self.number(function)!, Self.address(lun), tag: tag)
        functions.append((cookie, chain))
        turn { $0.statistics.taskManagementFunctions >= expected }
        hub.turn()
    }

    private var statistics: VirtioFrontStatistics { hub.onServers { [server] in server.statistics } }

    static func number(_ function: TaskManagementFunction) -> Int32? {
        switch function {
        case .abortTask: VIRTIO_SCSI_T_TMF_ABORT_TASK
        case .abortTaskSet: VIRTIO_SCSI_T_TMF_ABORT_TASK_SET
        case .clearACA: VIRTIO_SCSI_T_TMF_CLEAR_ACA
        case .clearTaskSet: VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET
        case .nexusReset: VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET
        case .logicalUnitReset: VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET
        case .queryTask: VIRTIO_SCSI_T_TMF_QUERY_TASK
        case .queryTaskSet: VIRTIO_SCSI_T_TMF_QUERY_TASK_SET
        case .targetReset, .queryAsynchronousEvent: nil
        }
    }

    /// The eight bytes of a LUN field of SAM: single-level, or the REPORT LUNS well-known logical unit.
    private static func address(_ lun: UInt64) -> VirtioSCSIAddress {
        lun == 0xc101 << 48 ? .reportLUNs : .flat(target: 0, lun: UInt16(lun >> 48))
    }

    // MARK: What comes back

    func collectCommands() {
        guard let frontEnd else { return }
        do { try frontEnd.queues[queue].collect() } catch { fatalError("the device broke a rule: \(error)") }
        let ended = commands.filter { $0.inFlight.chain.isComplete }
            .sorted { $0.inFlight.chain.usedNumber < $1.inFlight.chain.usedNumber }
        commands.removeAll { $0.inFlight.chain.isComplete }
        for (command, inFlight) in ended { port.deliver(completion(command, inFlight)) }
    }

    private func completion(_ command: SCSICommand, _ inFlight: SCSIInFlight) -> Completion {
        let result: SCSIResult
        do { result = try inFlight.result() } catch { fatalError("the device broke a rule: \(error)") }
        let service: ServiceResponse =
            switch Int32(result.response) {
            case VIRTIO_SCSI_S_OK: .commandComplete
            case VIRTIO_SCSI_S_OVERRUN: .overrun
            case VIRTIO_SCSI_S_ABORTED: .aborted
            case VIRTIO_SCSI_S_RESET: .reset
            default: .targetFailure
            }
        // virtio has one residual for both directions.
        let residual = service == .commandComplete ? Int(result.residual) : 0
        return Completion(
            tag: command.tag, service: service, status: SCSIStatus(rawValue: result.status)!, senseBytes: result.sense,
            buffer: result.dataIn, dataInResidual: command.dataIn > 0 ? residual : 0,
            dataOutResidual: command.dataIn > 0 ? 0 : residual)
    }

    func collectFunctionsAndEvents() {
        guard let frontEnd else { return }
        do {
            try frontEnd.queues[0].collect()
            try frontEnd.queues[1].collect()
        } catch {
            fatalError("the device broke a rule: \(error)")
        }
        let answered = functions.filter(\.chain.isComplete).sorted { $0.chain.usedNumber < $1.chain.usedNumber }
        functions.removeAll(where: \.chain.isComplete)
        for (cookie, chain) in answered { port.deliver(Self.response(chain.written[0]), cookie: cookie) }
        let reported = events.filter(\.isComplete).sorted { $0.usedNumber < $1.usedNumber }
        events.removeAll(where: \.isComplete)
        for chain in reported {
            report(chain.written)
            events.append(frontEnd.queues[1].offerEventBuffer())
        }
    }

    private static func response(_ byte: UInt8) -> TaskManagementResponse {
        switch Int32(byte) {
        // virtio gives FUNCTION COMPLETE the value of OK.
        case VIRTIO_SCSI_S_OK: .functionComplete
        case VIRTIO_SCSI_S_FUNCTION_SUCCEEDED: .functionSucceeded
        case VIRTIO_SCSI_S_FUNCTION_REJECTED: .functionRejected
        case VIRTIO_SCSI_S_INCORRECT_LUN: .incorrectLogicalUnitNumber
        default: fatalError("a function was answered \(byte)")
        }
    }

    /// An event (virtio 1.2 5.6.6.3) in the words of the port seam: its kind, additional sense code and LUN.
    private func report(_ bytes: [UInt8]) {
        let reason = UInt32(bytes[12]) | UInt32(bytes[13]) << 8
        let lun = (UInt64(bytes[6] & 0x3f) << 8 | UInt64(bytes[7])) << 48
        switch Int32(bytes[0]) {
        case VIRTIO_SCSI_T_PARAM_CHANGE:
            port.deliver(eventKind: 3, code: UInt16(reason & 0xff) << 8 | UInt16(reason >> 8), lun: lun)
        case VIRTIO_SCSI_T_TRANSPORT_RESET:
            port.deliver(eventKind: Int32(reason) == VIRTIO_SCSI_EVT_RESET_REMOVED ? 2 : 1, code: 0, lun: lun)
        default: break
        }
    }
}
