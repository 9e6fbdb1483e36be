// VirtioTestTarget: the conformance suite's target with its initiators A and B behind vhost-user sockets, each with a
// front-end, rings and memory of its own.
//
// Owns: the reactor, the servers, the front-ends. Called by: the conformance suite, whose files are linked into this
// directory: in this module their TestTarget is the one here. Must not know: the clauses.
//
// All is on the test's thread, which makes the reactor's turns itself, so that each test is in control of every step;
// only the handshakes, which wait for answers, are on a thread of their own. A function's answer and the command that
// it ended, used in the same turn, are taken in the order in which the driver must see them, commands first: that the
// front writes them in this order is what EndToEndManagementTests look at.

import CLinux
import CoreTestSupport
import Glibc
import Reactor
import SCSICore
import Synchronization
import VhostUserInitiator
import VirtioFront

typealias TestTarget = VirtioTestTarget

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
        let hub = VirtioHub()
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

/// The reactor and what is on it.
final class VirtioHub {
    fileprivate let reactor: Reactor
    private var transports: [VirtioTransport] = []
    private var isTurning = false

    init() {
        do { reactor = try Reactor(Reactor.Configuration()) } catch { fatalError("no reactor: \(error)") }
    }

    func transport(for port: MockPort) -> VirtioTransport {
        let transport = VirtioTransport(port, hub: self, number: transports.count)
        transports.append(transport)
        return transport
    }

    /// One turn of the reactor, and what has come back by then.
    func turn() {
        guard !isTurning else { return }
        isTurning = true
        reactor.turn(mayWait: false)
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
                let work = unsafe Unmanaged<Work>.fromOpaque(context!).takeRetainedValue()
                work.body()
                work.isDone.store(true, ordering: .releasing)
                return nil
            }, Unmanaged.passRetained(work).toOpaque())
        precondition(error == 0, "no thread")
        while !work.isDone.load(ordering: .acquiring) { reactor.turn(mayWait: false) }
        pthread_join(thread, nil)
    }

    private final class Work: @unchecked Sendable {
        let body: () -> Void
        let isDone = Atomic<Bool>(false)
        init(_ body: @escaping () -> Void) { self.body = body }
    }

    func close() {
        for transport in transports { transport.close() }
        transports = []
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
    private static let counter = Atomic<Int>(0)
    private static let eventBuffers = 8

    init(_ port: MockPort, hub: VirtioHub, number: Int) {
        self.port = port
        self.hub = hub
        let serial = Self.counter.wrappingAdd(1, ordering: .relaxed).newValue
        path = "/tmp/targetd-conformance-\(getpid())-\(serial).sock"
        var configuration = VhostUserSCSIServer.Configuration(
            socketPath: path, targets: [0: port.target], initiatorPort: port.name)
        configuration.targetPort = port.targetPort
        server = VhostUserSCSIServer(configuration: configuration, reactor: hub.reactor, report: { _ in })
        do { try server.start() } catch { fatalError("no server: \(error)") }
    }

    var isConnected: Bool { frontEnd != nil }

    func connect() {
        let path = path
        hub.handshake { [unowned self] in
            do { frontEnd = try VhostUserFrontEnd.started(path: path) } catch { fatalError("no handshake: \(error)") }
        }
        events = (0..<Self.eventBuffers).map { _ in frontEnd!.queues[1].offerEventBuffer() }
        hub.turn()
    }

    func disconnect() {
        frontEnd?.disconnect()
        frontEnd = nil
        (commands, functions, events) = ([], [], [])
        let server = server
        hub.turn { !server.isConnected }
    }

    func close() {
        disconnect()
        var isStopped = false
        server.stop { isStopped = true }
        hub.turn { isStopped }
        unsafe unlink(path)
    }

    func poll() { hub.turn() }

    // MARK: Sending

    func send(_ cdb: [UInt8], lun: UInt64, attribute: TaskAttribute, dataOut: [UInt8], dataIn: Int, tag: UInt64) {
        var command = SCSICommand(Self.address(lun), cdb, dataOut: dataOut, dataIn: dataIn)
        command.tag = tag
        command.attribute = attribute.rawValue
        let expected = server.statistics.commands + 1
        commands.append((command, frontEnd!.queues[2].submit(command)))
        let server = server
        hub.turn { server.statistics.commands >= expected }
    }

    func manage(_ function: TaskManagementFunction, lun: UInt64, tag: UInt64, cookie: UInt64) {
        let expected = server.statistics.taskManagementFunctions + 1
        let chain = frontEnd!.queues[0].submitTaskManagement(
            Self.number(function)!, Self.address(lun), tag: tag)
        functions.append((cookie, chain))
        let server = server
        hub.turn { server.statistics.taskManagementFunctions >= expected }
    }

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
        do { try frontEnd.queues[2].collect() } catch { fatalError("the device broke a rule: \(error)") }
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
