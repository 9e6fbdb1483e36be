// MockPort: a front without a transport: it sends commands with buffers of any layout and keeps what comes back.
//
// Owns: the tasks, the buffers, what came back. Called by: tests and the simulator. Must not know: backstores.

import CIOVector
import CTarget
public import SCSICore

/// How a command ended, as the port saw it.
public struct Completion: Sendable {
    /// The command identifier.
    public let tag: UInt64
    /// Below the status: `scsi_response.service_response`.
    public let service: ServiceResponse
    /// The status, if `service` is `.commandComplete`.
    public let status: SCSIStatus
    /// The sense data bytes, if the status is CHECK CONDITION.
    public let senseBytes: [UInt8]
    /// What the data-in buffers hold, all of them.
    public let buffer: [UInt8]
    /// Bytes of the data-in buffers that were not filled.
    public let dataInResidual: Int
    /// Bytes of the data-out buffers that were not used.
    public let dataOutResidual: Int

    /// An end of these values.
    public init(
        tag: UInt64, service: ServiceResponse, status: SCSIStatus, senseBytes: [UInt8], buffer: [UInt8],
        dataInResidual: Int, dataOutResidual: Int
    ) {
        self.tag = tag
        self.service = service
        self.status = status
        self.senseBytes = senseBytes
        self.buffer = buffer
        self.dataInResidual = dataInResidual
        self.dataOutResidual = dataOutResidual
    }

    /// The parameter or medium data that was returned.
    public var data: [UInt8] { Array(buffer.dropLast(dataInResidual)) }
    /// The same with another end: a test of the tests.
    public func replacing(status: SCSIStatus, sense: [UInt8]) -> Completion {
        Completion(
            tag: tag, service: service, status: status, senseBytes: sense, buffer: buffer,
            dataInResidual: dataInResidual, dataOutResidual: dataOutResidual)
    }

    /// The same with a byte of the data replaced: a test of the tests.
    public func replacing(byte: Int, with value: UInt8) -> Completion {
        var changed = buffer
        changed[byte] = value
        return Completion(
            tag: tag, service: service, status: status, senseBytes: senseBytes, buffer: changed,
            dataInResidual: dataInResidual, dataOutResidual: dataOutResidual)
    }

    /// The decoded sense data.
    public var sense: Sense? { Sense(senseBytes) }

    /// The end in one short line, as tests compare it: "good", "5/2400 CDB 2.7", "taskAborted", "aborted".
    public var summary: String {
        guard service == .commandComplete else { return "\(service)" }
        guard status == .checkCondition else { return "\(status)" }
        return sense.map(\.description) ?? "check condition without sense data"
    }
}

/// What a port was called with, in the order over all ports that share a journal.
public enum JournalEntry: Sendable {
    /// A command was given back.
    case completed(port: String, Completion)
    /// A task management function was answered.
    case answered(port: String, cookie: UInt64, TaskManagementResponse)
    /// An event was reported.
    case event(port: String, kind: UInt8, code: UInt16, lun: UInt64)

    /// The entry in one short line: "A 3 good", "A function 7 functionComplete".
    public var summary: String {
        switch self {
        case .completed(let port, let completion): "\(port) \(completion.tag) \(completion.summary)"
        case .answered(let port, let cookie, let response): "\(port) function \(cookie) \(response)"
        case .event(let port, let kind, let code, let lun):
            "\(port) event \(kind) \(String(code, radix: 16)) \(lun >> 48)"
        }
    }
}

/// The order in which ports were called.
public final class Journal {
    /// The calls so far.
    public var entries: [JournalEntry] {
        get {
            whenRead?()
            return calls
        }
        set {
            whenRead?()
            calls = newValue
        }
    }
    /// Called before the journal is read: a transport looks at what has come back.
    public var whenRead: (() -> Void)?
    private var calls: [JournalEntry] = []

    func append(_ entry: JournalEntry) { calls.append(entry) }

    /// An empty journal.
    public init() {}

    /// The calls in words.
    public var lines: [String] { entries.map(\.summary) }
}

/// The vtable of all mock ports. It must not move, so it is allocated once and stays.
private nonisolated(unsafe) let portOperations: UnsafePointer<scsi_target_port_operations> = {
    let operations = UnsafeMutablePointer<scsi_target_port_operations>.allocate(capacity: 1)
    unsafe operations.initialize(
        to: scsi_target_port_operations(
            struct_size: UInt32(MemoryLayout<scsi_target_port_operations>.size),
            abi_version: SCSI_TARGET_ABI_VERSION,
            complete_task: { context, task in
                unsafe Unmanaged<MockPort>.fromOpaque(context!).takeUnretainedValue().completed(TaskHandle(head: task!))
            },
            complete_task_management: { context, cookie, response, additional in
                let port = unsafe Unmanaged<MockPort>.fromOpaque(context!).takeUnretainedValue()
                port.answered(cookie, response, additional)
            },
            report_event: { context, event in
                unsafe Unmanaged<MockPort>.fromOpaque(context!).takeUnretainedValue().reported(event!.pointee)
            }))
    return unsafe UnsafePointer(operations)
}()

/// What carries a port's commands, if not a call: a real transport, whose front is the port that the target sees.
public protocol MockTransport: AnyObject {
    /// Whether there is a nexus.
    var isConnected: Bool { get }
    /// Establishes the nexus, and loses it.
    func connect()
    func disconnect()
    /// Sends a command; the target has it when this returns.
    func send(_ cdb: [UInt8], lun: UInt64, attribute: TaskAttribute, dataOut: [UInt8], dataIn: Int, tag: UInt64)
    /// Sends a task management function; the target has it when this returns.
    func manage(_ function: TaskManagementFunction, lun: UInt64, tag: UInt64, cookie: UInt64)
    /// Looks at what has come back, and tells the port by `deliver`.
    func poll()
}

/// A target port with one initiator port behind it. Used on one thread at a time.
@safe
public final class MockPort: @unchecked Sendable {
    /// The initiator port's name.
    public let name: String
    /// The target that the port gives commands to.
    public let target: TargetDevice
    /// What came back, with what came back to other ports.
    public let journal: Journal
    /// The nexus, if commands cross to another thread.
    public private(set) var linkedNexus: LinkedNexus?
    /// Whether nothing is left of a linked nexus that was lost: not in any link, or an answer that was on its way in
    /// one would be taken for an answer to the next nexus.
    public var isGone: Bool { linkedNexus == nil && linksGone == links.count }
    private var links: [ShardLink] = []
    private var linksGone = 0
    /// The nexus while there is one.
    public private(set) var nexus: NexusIdentifier?
    /// What came back to this port.
    public var completions: [Completion] {
        transport?.poll()
        return ended
    }
    private var ended: [Completion] = []
    /// Task management functions that were answered: cookie and service response.
    public var answers: [(cookie: UInt64, response: TaskManagementResponse)] {
        transport?.poll()
        return answered
    }
    private var answered: [(cookie: UInt64, response: TaskManagementResponse)] = []
    /// What carries commands instead of a call of the target.
    public var transport: (any MockTransport)?
    /// The Additional Response Information of the last function that was answered.
    public private(set) var additionalResponse: UInt32 = 0
    /// Whether there is a nexus.
    public var isConnected: Bool { nexus != nil || linkedNexus != nil || transport?.isConnected == true }
    /// Called when a command has come back, after it was recorded; it may send more.
    public var whenCompleted: ((Completion) -> Void)?
    /// Called when a task management function was answered.
    public var whenAnswered: ((UInt64, TaskManagementResponse) -> Void)?
    /// Called when an event was reported: its additional sense code and LUN field.
    public var whenReported: ((UInt16, UInt64) -> Void)?
    /// Whether the public head of a task is still known to a medium; no task may come back while it is.
    public var isHeldByMedium: ((UnsafeRawPointer) -> Bool)?
    /// Whether a command that the port did not send may come back.
    public var ignoresUnknownTasks = false
    /// Test of the tests: what the port makes of a completion before it is recorded: none, one, or several.
    public var mutateCompletion: ((Completion) -> [Completion])?

    private let violations: Violations
    private let pool: TaskPool
    private var inFlight: [Int: Transfer] = [:]
    private var retired: [SegmentedBuffer] = []
    private var nextTag: UInt64 = 1
    private var free: [Int]

    /// The buffers of a command.
    private struct Transfer {
        let tag: UInt64
        let dataOut: SegmentedBuffer
        let sent: [UInt8]
        let dataIn: SegmentedBuffer
    }

    /// What the data-in buffers hold before the command.
    public static let untouched: UInt8 = 0xee

    /// A port with room for `tasks` commands in flight.
    public init(
        name: String, target: TargetDevice, journal: Journal, violations: Violations, tasks: Int = 64,
        segmentsPerTask: Int = 64
    ) {
        self.name = name
        self.target = target
        self.journal = journal
        self.violations = violations
        pool = TaskPool(capacity: tasks, segmentsPerTask: segmentsPerTask)
        free = Array((0..<tasks).reversed())
    }

    /// The relative target port identifier with which it connects.
    public var targetPort: UInt16 = 1

    /// Establishes the nexus.
    public func connect() {
        if let transport { return transport.connect() }
        let port = unsafe TargetPortHandle(
            operations: portOperations, context: Unmanaged.passUnretained(self).toOpaque())
        nexus = target.establishNexus(initiatorPort: name, targetPort: targetPort, port: port)
    }

    /// Establishes the nexus so that commands cross to another thread; called on the thread of the gate's shard. From
    /// then on the port is used on the thread of the links.
    ///
    /// - Parameter links: The links that commands may go through; events come through the first.
    public func connect(through links: [ShardLink], of gate: ShardGate) {
        let port = unsafe TargetPortHandle(
            operations: portOperations, context: Unmanaged.passUnretained(self).toOpaque())
        self.links = links
        linksGone = 0
        linkedNexus = gate.establishNexus(
            initiatorPort: name, targetPort: targetPort, target: target, port: port, events: links[0]
        ) { [unowned self] link in
            if self.links.contains(where: { $0 === link }) { self.linksGone += 1 }
        }
    }

    /// Loses the nexus.
    public func disconnect() {
        if let transport { return transport.disconnect() }
        if let linked = linkedNexus {
            linkedNexus = nil
            let taken = links[0].lose(linked)
            precondition(taken)
        }
        guard let nexus else { return }
        self.nexus = nil
        target.loseNexus(nexus)
    }

    /// Commands that have not come back.
    public var tagsInFlight: Set<UInt64> { Set(inFlight.values.map(\.tag)) }

    /// The task of a command that has not come back.
    public func task(_ tag: UInt64) -> TaskHandle? {
        inFlight.first { $0.value.tag == tag }.map { pool[$0.key] }
    }

    /// Whether one more command can be sent.
    public var hasFreeTask: Bool { inFlight.count < pool.capacity }

    /// The memory of the commands that have come back is the initiator's again: checks that nobody has written to it.
    public func checkRetiredMemory() {
        for buffer in retired {
            violations.require(buffer.isPoisoned, "memory of a command was touched after the command had come back")
        }
        if retired.count > 64 { retired.removeFirst(retired.count - 64) }
    }

    /// Forgets what came back until now, for runs that would fill the memory with it.
    public func forgetPast() {
        checkRetiredMemory()
        retired = []
        ended = []
        answered = []
    }

    /// Sends a command.
    ///
    /// - Parameters:
    ///   - cdb: The CDB's bytes; the rest of the 32 are zero.
    ///   - lun: The LUN field as on the wire.
    ///   - dataOut: What the data-out buffers hold.
    ///   - outLayout: The lengths of the data-out segments; one segment if `nil`.
    ///   - dataIn: The length of the data-in buffers.
    ///   - inLayout: The lengths of the data-in segments; one segment if `nil`.
    ///   - timeoutMilliseconds: The transport's deadline; 0 if it has none.
    ///   - link: Which link the command crosses through, if commands cross.
    ///   - flags: `scsi_command.flags`.
    /// - Returns: The tag.
    @discardableResult
    public func send(
        _ cdb: [UInt8], lun: UInt64 = 0, attribute: TaskAttribute = .simple, dataOut: [UInt8] = [],
        outLayout: [Int]? = nil, dataIn: Int = 0, inLayout: [Int]? = nil, tag: UInt64? = nil, cdbLength: Int? = nil,
        timeoutMilliseconds: UInt32 = 0, link: Int = 0, flags: UInt8 = 0
    ) -> UInt64 {
        let tag = tag ?? nextTag
        nextTag = max(nextTag, tag) + 1
        if let transport {
            transport.send(cdb, lun: lun, attribute: attribute, dataOut: dataOut, dataIn: dataIn, tag: tag)
            return tag
        }
        let index = free.removeLast()
        let task = pool[index]
        violations.require(task.isFree, "a task that had come back is not free")
        let transfer = Transfer(
            tag: tag, dataOut: SegmentedBuffer(layout: outLayout ?? (dataOut.isEmpty ? [] : [dataOut.count])),
            sent: dataOut, dataIn: SegmentedBuffer(layout: inLayout ?? (dataIn == 0 ? [] : [dataIn])))
        precondition(transfer.dataOut.length == dataOut.count && transfer.dataIn.length == dataIn || inLayout != nil)
        transfer.dataOut.bytes = dataOut
        transfer.dataIn.fill(Self.untouched)
        inFlight[index] = transfer
        fill(task, transfer, cdb, cdbLength ?? cdb.count, lun, attribute)
        unsafe task.command.timeout_milliseconds = timeoutMilliseconds
        unsafe task.command.flags = flags
        if let linkedNexus {
            let taken = links[link].send(task, nexus: linkedNexus)
            precondition(taken, "a link is full; tests ask hasRoom first")
        } else {
            target.receive(task, nexus: nexus!)
        }
        return tag
    }

    private func fill(
        _ task: TaskHandle, _ transfer: Transfer, _ cdb: [UInt8], _ cdbLength: Int, _ lun: UInt64,
        _ attribute: TaskAttribute
    ) {
        unsafe task.command = scsi_command()
        unsafe withUnsafeMutableBytes(of: &task.command.lun) {
            unsafe $0.storeBytes(of: lun.bigEndian, as: UInt64.self)
        }
        unsafe withUnsafeMutableBytes(of: &task.command.cdb) { unsafe $0.copyBytes(from: cdb) }
        unsafe task.command.cdb_length = UInt8(cdbLength)
        unsafe task.command.tag = transfer.tag
        unsafe task.command.attribute = attribute.rawValue
        let list = unsafe pool.segments(of: task)
        unsafe transfer.dataOut.describe(in: list)
        unsafe transfer.dataIn.describe(in: list + transfer.dataOut.count)
        unsafe task.command.data_out = transfer.dataOut.count == 0 ? nil : list
        unsafe task.command.data_out_count = UInt32(transfer.dataOut.count)
        unsafe task.command.data_out_length = UInt64(transfer.dataOut.length)
        unsafe task.command.data_in = transfer.dataIn.count == 0 ? nil : list + transfer.dataOut.count
        unsafe task.command.data_in_count = UInt32(transfer.dataIn.count)
        unsafe task.command.data_in_length = UInt64(transfer.dataIn.length)
    }

    /// Sends a task management function.
    public func manage(
        _ function: TaskManagementFunction, lun: UInt64 = 0, tag: UInt64 = 0, cookie: UInt64 = 0, link: Int = 0
    ) {
        manage(rawFunction: function.rawValue, lun: lun, tag: tag, cookie: cookie, link: link)
    }

    /// Sends a task management function by number, known or not.
    public func manage(rawFunction: UInt8, lun: UInt64 = 0, tag: UInt64 = 0, cookie: UInt64 = 0, link: Int = 0) {
        if let transport {
            return transport.manage(
                TaskManagementFunction(rawValue: rawFunction)!, lun: lun, tag: tag, cookie: cookie)
        }
        var request = scsi_task_management_request()
        request.struct_size = UInt32(MemoryLayout<scsi_task_management_request>.size)
        request.function = rawFunction
        unsafe withUnsafeMutableBytes(of: &request.lun) { unsafe $0.storeBytes(of: lun.bigEndian, as: UInt64.self) }
        request.tag = tag
        request.cookie = cookie
        if let linkedNexus {
            let taken = links[link].send(request, nexus: linkedNexus)
            precondition(taken, "a link has too many functions under way")
        } else {
            target.receive(request, nexus: nexus!)
        }
    }

    // MARK: What the core calls

    fileprivate func completed(_ task: TaskHandle) {
        guard let transfer = inFlight.removeValue(forKey: task.index) else {
            if ignoresUnknownTasks { return }
            return violations.report("a command came back twice, or was never sent")
        }
        free.append(task.index)
        violations.require(task.isFree, "a task came back that is not free")
        if let isHeldByMedium = unsafe isHeldByMedium {
            unsafe violations.require(
                !isHeldByMedium(UnsafeRawPointer(task.head)), "a command came back while a backstore has its memory")
        }
        let completion = record(task, transfer)
        retire(transfer)
        for completion in mutateCompletion?(completion) ?? [completion] { deliver(completion) }
    }

    /// A command has come back.
    public func deliver(_ completion: Completion) {
        ended.append(completion)
        journal.append(.completed(port: name, completion))
        whenCompleted?(completion)
    }

    /// A task management function was answered.
    public func deliver(_ response: TaskManagementResponse, cookie: UInt64) {
        answered.append((cookie: cookie, response: response))
        journal.append(.answered(port: name, cookie: cookie, response))
        whenAnswered?(cookie, response)
    }

    /// An event was reported.
    public func deliver(eventKind: UInt8, code: UInt16, lun: UInt64) {
        journal.append(.event(port: name, kind: eventKind, code: code, lun: lun))
        whenReported?(code, lun)
    }

    private func record(_ task: TaskHandle, _ transfer: Transfer) -> Completion {
        var sense = [UInt8](repeating: 0, count: Int(SCSI_SENSE_CAPACITY))
        let count = unsafe sense.withUnsafeMutableBytes { unsafe task.copySense(into: $0) }
        let completion = Completion(
            tag: transfer.tag, service: ServiceResponse(rawValue: task.response.service_response)!,
            status: SCSIStatus(rawValue: task.response.status)!, senseBytes: Array(sense[..<count]),
            buffer: transfer.dataIn.bytes, dataInResidual: Int(task.response.data_in_residual),
            dataOutResidual: Int(task.response.data_out_residual))
        check(completion, transfer)
        return completion
    }

    private func check(_ completion: Completion, _ transfer: Transfer) {
        violations.require(transfer.dataOut.guardsAreIntact, "memory beside a data-out buffer was touched")
        violations.require(transfer.dataIn.guardsAreIntact, "memory beside a data-in buffer was touched")
        violations.require(transfer.dataOut.holds(transfer.sent), "a data-out buffer was written to")
        violations.require(
            completion.dataInResidual <= transfer.dataIn.length
                && completion.dataOutResidual <= transfer.dataOut.length,
            "a residual is longer than the buffers")
        let checkCondition = completion.service == .commandComplete && completion.status == .checkCondition
        violations.require(
            checkCondition == !completion.senseBytes.isEmpty, "sense data without CHECK CONDITION, or the reverse")
        if completion.service == .commandComplete, completion.status == .good {
            violations.require(
                completion.buffer.suffix(completion.dataInResidual).allSatisfy { $0 == Self.untouched },
                "a data-in buffer was filled beyond what the residual says")
        }
    }

    private func retire(_ transfer: Transfer) {
        transfer.dataOut.poison()
        transfer.dataIn.poison()
        retired.append(transfer.dataOut)
        retired.append(transfer.dataIn)
    }

    fileprivate func answered(_ cookie: UInt64, _ response: UInt8, _ additional: UInt32) {
        additionalResponse = additional
        deliver(TaskManagementResponse(rawValue: response)!, cookie: cookie)
    }

    fileprivate func reported(_ event: scsi_target_event) {
        let code = UInt16(event.additional_sense_code) << 8 | UInt16(event.additional_sense_code_qualifier)
        deliver(eventKind: event.kind, code: code, lun: LUN.field(event.lun))
    }
}
