// VirtioSCSIDevice: a virtio-scsi device for one connection: its queues, its targets, and the way between them.
//
// Owns: the virtqueues, the task pools, the nexuses, the pending events. Called by: VhostUserSession (set up, tear
// down), the reactor (poll, flush), the core (completions). Must not know: vhost-user.

import CIOVector
import CLinux
import CTarget
import Glibc
import Reactor
import SCSICore

/// What a front has done since it was created. Monotonic counters.
public struct VirtioFrontStatistics: Sendable {
    /// Commands that were handed to a target, or refused before.
    public var commands: UInt64 = 0
    /// Task management functions.
    public var taskManagementFunctions: UInt64 = 0
    /// Notifications that were sent to the guest.
    public var notifications: UInt64 = 0
    /// Events that were given to the guest, and those for which there was no room (EVENTS_MISSED).
    public var events: UInt64 = 0, eventsMissed: UInt64 = 0
    /// Virtqueues that were taken out of service because the driver broke the rules.
    public var brokenQueues: UInt64 = 0
    /// Front-ends that have connected.
    public var connections: UInt64 = 0
}

/// A queue in service.
@safe
final class DeviceQueue {
    let ring: Virtqueue
    /// Where to notify the guest, -1 for nowhere. The session closes it.
    var call: Int32
    let index: Int
    /// A task for each slot of a request queue.
    let pool: TaskPool
    unowned(unsafe) let device: VirtioSCSIDevice
    /// Where each slot's response goes.
    let responses: UnsafeMutablePointer<ResponsePieces?>
    /// Which target each slot's task management function waits for; used on the control queue only.
    let functions: UnsafeMutablePointer<UnsafeMutablePointer<DeviceTarget>?>
    /// The driver broke the rules: it is not served any more, what is in flight is still answered.
    var isBroken = false
    /// Whether the front-end wants it served (SET_VRING_ENABLE).
    var isEnabled = true
    /// The front-end has no way to notify us: the queue is looked at without pause.
    var mustPoll = false

    init(ring: Virtqueue, call: Int32, index: Int, device: VirtioSCSIDevice) {
        self.ring = ring
        self.call = call
        self.index = index
        unsafe self.device = device
        pool = TaskPool(capacity: ring.size, segmentsPerTask: 1)
        unsafe responses = .allocate(capacity: ring.size)
        unsafe responses.initialize(repeating: nil, count: ring.size)
        unsafe functions = .allocate(capacity: ring.size)
        unsafe functions.initialize(repeating: nil, count: ring.size)
        unsafe ring.owner = Unmanaged.passUnretained(self)
    }

    deinit {
        unsafe responses.deallocate()
        unsafe functions.deallocate()
    }
}

/// A target of the device, at the address that the port seam has as its context.
@safe
struct DeviceTarget {
    let target: Unmanaged<TargetDevice>
    var nexus: NexusIdentifier
    let number: UInt8
    let device: Unmanaged<VirtioSCSIDevice>
}

@safe
final class VirtioSCSIDevice {
    static let controlQueue = 0
    static let eventQueue = 1
    static let firstRequestQueue = 2
    /// Requests that one queue may take in one turn, so that one busy queue does not keep the others waiting.
    private static let budget = 64
    /// Events that wait for a buffer of the driver: all logical units of four targets may vanish at once. One more sets
    /// EVENTS_MISSED, and the driver rescans.
    static let pendingEvents = 4 * 16_384
    /// Logical units for which a driver may ask for asynchronous notifications.
    private static let subscriptionCapacity = 16_384

    private let reactor: Reactor
    private let targets: UnsafeMutablePointer<UnsafeMutablePointer<DeviceTarget>?>
    private var targetObjects: [UInt8: TargetDevice] = [:]
    private let initiatorPort: String
    /// Targets that were detached; a command of theirs may still lead to its entry.
    private var detached: [(entry: UnsafeMutablePointer<DeviceTarget>, target: TargetDevice)] = unsafe []
    private var running: [DeviceQueue?]
    /// The running queues as the poll reads them.
    private let polled: UnsafeMutablePointer<Unmanaged<DeviceQueue>>
    private var polledCount = 0
    /// All queues that may have something to tell the guest.
    private let flushed: UnsafeMutablePointer<Unmanaged<DeviceQueue>>
    private var flushedCount = 0
    /// Set when nothing more is to be taken from the queues: the server stops.
    private var isPaused = false
    /// Detached targets for which task management functions wait; the core does not answer those of a lost nexus.
    private var leaving: [UnsafeMutablePointer<DeviceTarget>] = unsafe []
    private var features: UInt64 = 0
    /// Sizes that the driver may set in the configuration space.
    private var sizes = VirtioSCSISizes()
    /// Where to note what is written to the guest's memory, while the front-end wants to know.
    private var log: DirtyLog?
    private var isLogging = false
    private var events: [(event: UInt32, lun: UInt64, reason: UInt32)] = []
    /// How many of `events` were given to the driver.
    private var eventsDelivered = 0
    /// What the driver wants to be told of, by the LUN field of its request.
    private var subscriptions: [UInt64: UInt32] = [:]
    private var eventsMissed = false
    private(set) var statistics: VirtioFrontStatistics
    /// Called when a queue breaks.
    private let onFault: (Int, VirtqueueFault) -> Void
    /// Called at the end of each turn while something waits for requests in flight, and never from a completion.
    var onDrained: (() -> Void)?
    private var waitsForDrain = false
    /// Tells the guest of used elements where there is no call descriptor: INBAND_NOTIFICATIONS.
    var onNotification: ((Int) -> Void)?

    init(
        targets: [UInt8: TargetDevice], initiatorPort: String, queueCapacity: Int, reactor: Reactor,
        statistics: VirtioFrontStatistics, onFault: @escaping (Int, VirtqueueFault) -> Void
    ) {
        self.reactor = reactor
        self.onFault = onFault
        self.statistics = statistics
        self.initiatorPort = initiatorPort
        running = Array(repeating: nil, count: queueCapacity)
        unsafe polled = .allocate(capacity: queueCapacity)
        unsafe flushed = .allocate(capacity: queueCapacity)
        unsafe self.targets = .allocate(capacity: 256)
        unsafe self.targets.initialize(repeating: nil, count: 256)
        for (number, target) in targets { connect(target, number) }
    }

    private func connect(_ target: TargetDevice, _ number: UInt8) {
        let entry = UnsafeMutablePointer<DeviceTarget>.allocate(capacity: 1)
        let port = unsafe TargetPortHandle(operations: Self.portOperations, context: entry)
        guard let nexus = target.establishNexus(initiatorPort: initiatorPort, port: port) else {
            unsafe entry.deallocate()
            return
        }
        unsafe entry.initialize(
            to: DeviceTarget(
                target: Unmanaged.passUnretained(target), nexus: nexus, number: number,
                device: Unmanaged.passUnretained(self)))
        unsafe targets[Int(number)] = entry
        targetObjects[number] = target
    }

    deinit {
        precondition(requestsInFlight == 0, "a virtio-scsi device went away with requests in flight")
        for number in 0..<256 { unsafe targets[number]?.deallocate() }
        for index in unsafe detached.indices { unsafe detached[index].entry.deallocate() }
        unsafe targets.deallocate()
        unsafe polled.deallocate()
        unsafe flushed.deallocate()
    }

    // MARK: Targets

    /// Adds a target while the device is in use; the guest is told to look for it.
    func attach(_ target: TargetDevice, number: UInt8) {
        precondition(targetObjects[number] == nil, "target \(number) is there already")
        connect(target, number)
        announce(target, number, UInt32(VIRTIO_SCSI_EVT_RESET_RESCAN))
    }

    /// Takes a target away: its nexus is lost, commands for it get BAD_TARGET, and the guest is told.
    func detach(number: UInt8) {
        guard let target = targetObjects.removeValue(forKey: number), let entry = unsafe targets[Int(number)]
        else { return }
        unsafe targets[Int(number)] = nil
        unsafe detached.append((entry, target))
        unsafe target.loseNexus(entry.pointee.nexus)
        unsafe leaving.append(entry)
        announce(target, number, UInt32(VIRTIO_SCSI_EVT_RESET_REMOVED))
    }

    private func announce(_ target: TargetDevice, _ number: UInt8, _ reason: UInt32) {
        guard features & VirtioFeature.hotplug != 0 else { return }
        for entry in target.logicalUnits {
            let lun = VirtioSCSILUN.bytes(target: number, samField: entry.lun.field)
            enqueue(VIRTIO_SCSI_T_TRANSPORT_RESET, lun, reason)
        }
    }

    // MARK: Set up and tear down

    /// Requests popped and not used yet, on all queues.
    var requestsInFlight: Int { (running.compactMap { $0 } + stopped).reduce(0) { $0 + $1.ring.inFlight } }

    /// Queues out of service whose last requests have not ended.
    private var stopped: [DeviceQueue] = []

    func setFeatures(_ features: UInt64) { self.features = features }

    /// The sizes of the CDB and sense fields; the request queues must be out of service.
    func setSizes(_ sizes: VirtioSCSISizes) { self.sizes = sizes }

    /// Notes writes from now on, or no longer.
    func setLog(_ log: DirtyLog?) {
        self.log = log
        isLogging = log != nil
    }

    func queue(_ index: Int) -> DeviceQueue? { running[index] }

    /// Puts a queue into service.
    func start(_ index: Int, ring: Virtqueue, call: Int32, mustPoll: Bool) {
        let queue = DeviceQueue(ring: ring, call: call, index: index, device: self)
        queue.mustPoll = mustPoll
        running[index] = queue
        refreshPolled()
        resubmit(queue)
        if index == Self.eventQueue { deliverEvents() }
    }

    /// Takes what was in flight when the last back-end ended, in the order of then.
    private func resubmit(_ queue: DeviceQueue) {
        guard queue.ring.hasRecovered, !isPaused else { return }
        while true {
            switch queue.ring.popRecovered() {
            case .nothing: return
            case .broken(let fault): return breakQueue(queue, fault)
            case .chain(let slot):
                if queue.index == Self.eventQueue {
                    // What it was for was lost with the back-end: the driver looks for itself.
                    guard let response = unsafe slot.pointee.takeResponse(VirtioSCSILayout.event) else {
                        unsafe queue.ring.pushUsed(slot, length: 0)
                        continue
                    }
                    eventsMissed = true
                    unsafe writeEvent(response, slot)
                    unsafe queue.ring.pushUsed(slot, length: UInt32(VirtioSCSILayout.event))
                } else if let fault = unsafe handle(queue, slot) {
                    // It was good when it was taken first, so the driver has changed it: it goes back as it is.
                    unsafe queue.ring.pushUsed(slot, length: 0)
                    breakQueue(queue, fault)
                }
            }
        }
    }

    @inline(__always)
    private func handle(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> VirtqueueFault? {
        unsafe queue.index >= Self.firstRequestQueue ? command(queue, slot) : control(queue, slot)
    }

    /// Serves a queue, or leaves it alone for a while. What is in flight is answered in any case.
    func setEnabled(_ index: Int, _ isEnabled: Bool) {
        guard let queue = running[index], queue.isEnabled != isEnabled else { return }
        queue.isEnabled = isEnabled
        refreshPolled()
        if index == Self.eventQueue { deliverEvents() }
    }

    /// Takes nothing more from any queue; `onDrained` is called until all that is in flight has been answered.
    func pause() {
        isPaused = true
        waitsForDrain = true
        refreshPolled()
    }

    /// Takes a queue out of service. Its requests in flight are still answered.
    func stop(_ index: Int) -> DeviceQueue? {
        guard let queue = running[index] else { return nil }
        running[index] = nil
        refreshPolled()
        if queue.ring.inFlight > 0 {
            stopped.append(queue)
            waitsForDrain = true
        }
        return queue
    }

    private func refreshPolled() {
        polledCount = 0
        flushedCount = 0
        for queue in running.compactMap({ $0 }) {
            unsafe flushed[flushedCount] = unsafe Unmanaged.passUnretained(queue)
            flushedCount += 1
            guard queue.isEnabled, !queue.isBroken, !isPaused, queue.index != Self.eventQueue else { continue }
            unsafe polled[polledCount] = unsafe Unmanaged.passUnretained(queue)
            polledCount += 1
        }
    }

    /// The front-end is gone: nothing is written to the guest's memory any more, and the nexuses are lost.
    func disconnect() {
        for index in running.indices {
            running[index]?.ring.detach()
            _ = stop(index)
        }
        for queue in stopped { queue.ring.detach() }
        for number in 0..<256 {
            guard let entry = unsafe targets[number] else { continue }
            unsafe entry.pointee.target._withUnsafeGuaranteedRef { unsafe $0.loseNexus(entry.pointee.nexus) }
        }
        // The core answers no function of a nexus that is lost, and nobody waits for one.
        unsafe leaving.removeAll()
        for queue in stopped where queue.index == Self.controlQueue { queue.ring.abandon() }
        stopped.removeAll { $0.ring.inFlight == 0 }
    }

    /// The device is reset: nexuses are lost and established anew, events and subscriptions are forgotten. All queues
    /// must be out of service, with nothing in flight.
    func reset() {
        precondition(requestsInFlight == 0)
        events = []
        eventsDelivered = 0
        eventsMissed = false
        subscriptions = [:]
        sizes = VirtioSCSISizes()
        for (number, target) in targetObjects {
            guard let entry = unsafe targets[Int(number)] else { continue }
            unsafe target.loseNexus(entry.pointee.nexus)
            let port = unsafe TargetPortHandle(operations: Self.portOperations, context: entry)
            if let nexus = target.establishNexus(initiatorPort: initiatorPort, port: port) {
                unsafe entry.pointee.nexus = nexus
            } else {
                // The target has no room for it any more: its commands get BAD_TARGET.
                unsafe targets[Int(number)] = nil
                unsafe detached.append((entry, target))
                targetObjects[number] = nil
            }
        }
    }

    /// Calls `onDrained` at the end of a turn in which nothing is in flight.
    func awaitDrain() { waitsForDrain = true }

    /// Whether what was in flight when its queue stopped has ended.
    var isDrained: Bool { stopped.isEmpty }

    /// Lets go of queues that have stopped and whose requests have ended. Not at the completion itself: that runs on
    /// memory of the queue.
    private func settle() {
        for queue in stopped { notify(queue) }
        stopped.removeAll { $0.ring.inFlight == 0 }
        waitsForDrain = !stopped.isEmpty || isPaused
        onDrained?()
    }

    /// Answers the functions that wait for a target that is gone, once none of its tasks can touch the guest's memory.
    private func answerLeaving() {
        let gone = unsafe leaving.filter { entry in
            unsafe entry.pointee.target._withUnsafeGuaranteedRef {
                unsafe $0.tasksInFlight(entry.pointee.nexus) == 0
            }
        }
        guard unsafe !gone.isEmpty else { return }
        unsafe leaving.removeAll { unsafe gone.contains($0) }
        for queue in running.compactMap({ $0 }) + stopped where queue.index == Self.controlQueue {
            for head in 0..<queue.ring.size {
                guard let entry = unsafe queue.functions[head] else { continue }
                guard unsafe gone.contains(entry) else { continue }
                unsafe finishControl(queue.ring.slot(head), [VirtioSCSIResponse.badTarget.rawValue])
            }
        }
    }

    // MARK: The reactor's side

    /// Takes what the driver has made available, each queue up to its budget.
    func poll() -> Bool {
        var worked = false
        for index in 0..<polledCount {
            let queue = unsafe polled[index]
            if unsafe queue._withUnsafeGuaranteedRef({ serve($0) }) { worked = true }
        }
        return worked
    }

    /// Notifies the guest of what was used in this turn, once a queue.
    func flush() {
        if unsafe !leaving.isEmpty { answerLeaving() }
        for index in 0..<flushedCount { unsafe flushed[index]._withUnsafeGuaranteedRef { notify($0) } }
        if waitsForDrain { settle() }
    }

    private func notify(_ queue: DeviceQueue) {
        guard queue.ring.takeNotification() else { return }
        statistics.notifications += 1
        if queue.call >= 0 {
            _ = clinux_signal(queue.call)
        } else if let onNotification {
            onNotification(queue.index)
        }
    }

    func prepareToSleep() -> Bool {
        var found = false
        for index in 0..<polledCount {
            let hasWork = unsafe polled[index]._withUnsafeGuaranteedRef { $0.ring.wantNotifications() || $0.mustPoll }
            if hasWork { found = true }
        }
        return found
    }

    private func serve(_ queue: DeviceQueue) -> Bool {
        guard queue.ring.hasAvailable, !queue.isBroken else { return false }
        queue.ring.stopNotifications()
        for _ in 0..<Self.budget {
            switch queue.ring.pop() {
            case .nothing: return true
            case .broken(let fault):
                breakQueue(queue, fault)
                return true
            case .chain(let slot):
                if let fault = unsafe handle(queue, slot) {
                    unsafe queue.ring.unpop(slot)
                    breakQueue(queue, fault)
                    return true
                }
            }
        }
        return true
    }

    /// Takes a queue out of service because the driver broke the rules.
    func breakQueue(_ queue: DeviceQueue, _ fault: VirtqueueFault) {
        guard !queue.isBroken else { return }
        queue.isBroken = true
        statistics.brokenQueues += 1
        refreshPolled()
        onFault(queue.index, fault)
    }

    // MARK: Request queues

    /// Hands a command to its target.
    @inline(__always)
    private func command(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> VirtqueueFault? {
        guard let response = unsafe slot.pointee.takeResponse(sizes.response) else { return .header }
        statistics.commands += 1
        return unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSISizes.requestCapacity, alignment: 8) { whole in
            let header = unsafe UnsafeMutableRawBufferPointer(rebasing: whole[..<sizes.requestHeader])
            guard unsafe slot.pointee.takeHeader(header) else {
                unsafe refuse(queue, slot, response, .failure)
                return nil
            }
            let lun = unsafe VirtioSCSILUN(bytes: UInt64(bigEndian: header.loadUnaligned(as: UInt64.self)))
            guard let target = unsafe target(lun) else {
                unsafe refuse(queue, slot, response, .badTarget)
                return nil
            }
            // INOUT is not offered: a command moves data one way (5.6.6.1).
            if unsafe slot.pointee.readableLength > 0 && slot.pointee.writableLength > 0 {
                unsafe refuse(queue, slot, response, .failure)
                return nil
            }
            let head = unsafe Int(slot.pointee.number)
            unsafe queue.responses[head] = response
            let task = queue.pool[head]
            unsafe VirtioSCSICommandHeader.fill(
                &task.command, from: UnsafeRawBufferPointer(header), cdbSize: sizes.cdb)
            unsafe task.command.cookie = UInt64(UInt(bitPattern: slot))
            unsafe task.command.data_out = slot.pointee.readable
            unsafe task.command.data_out_count = UInt32(slot.pointee.readableCount)
            unsafe task.command.data_out_length = slot.pointee.readableLength
            unsafe task.command.data_in = slot.pointee.writable
            unsafe task.command.data_in_count = UInt32(slot.pointee.writableCount)
            unsafe task.command.data_in_length = slot.pointee.writableLength
            unsafe target.pointee.target._withUnsafeGuaranteedRef {
                unsafe $0.receive(task, nexus: target.pointee.nexus)
            }
            return nil
        }
    }

    /// The target that a LUN addresses. The REPORT LUNS well-known unit is that of the first target.
    @inline(__always)
    private func target(_ lun: VirtioSCSILUN) -> UnsafeMutablePointer<DeviceTarget>? {
        if let number = lun.target { return unsafe targets[Int(number)] }
        guard lun.isReportLUNsWellKnown else { return nil }
        for number in 0..<256 { if let target = unsafe targets[number] { return unsafe target } }
        return nil
    }

    /// Answers a command that no target saw.
    private func refuse(
        _ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>, _ response: ResponsePieces,
        _ code: VirtioSCSIResponse
    ) {
        let residual = unsafe UInt32(clamping: slot.pointee.writableLength + slot.pointee.readableLength)
        response.writeCommand(code, status: 0, qualifier: 0, residual: residual, senseSize: sizes.sense)
        if isLogging { unsafe note(response, slot) }
        unsafe queue.ring.pushUsed(slot, length: UInt32(sizes.response))
    }

    /// A command has ended: its response goes to the guest.
    @inline(__always)
    fileprivate static func complete(_ task: TaskHandle) {
        let slot = unsafe UnsafeMutablePointer<VirtqueueSlot>(bitPattern: UInt(task.command.cookie))!
        let ring = unsafe slot.pointee.queue
        unsafe ring._withUnsafeGuaranteedRef { ring in
            unsafe ring.owner.unsafelyUnwrapped._withUnsafeGuaranteedRef { queue in
                unsafe queue.device.complete(task, slot, queue, ring)
            }
        }
    }

    @inline(__always)
    private func complete(
        _ task: TaskHandle, _ slot: UnsafeMutablePointer<VirtqueueSlot>, _ queue: DeviceQueue, _ ring: Virtqueue
    ) {
        let head = unsafe Int(slot.pointee.number)
        let written = unsafe task.command.data_in_length &- task.response.data_in_residual
        if !ring.isDetached {
            let pieces = unsafe queue.responses[head].unsafelyUnwrapped
            let residual = UInt32(clamping: task.response.data_in_residual &+ task.response.data_out_residual)
            let (status, qualifier) = (task.response.status, task.response.status_qualifier)
            let code = VirtioSCSIResponse(task.response.service_response)
            if status == SCSIStatus.checkCondition.rawValue, code == .ok {
                pieces.writeCommand(
                    task, status: status, qualifier: qualifier, residual: residual, senseSize: sizes.sense)
            } else {
                pieces.writeCommand(
                    code, status: status, qualifier: qualifier, residual: residual, senseSize: sizes.sense)
            }
            if isLogging {
                unsafe note(pieces, slot)
                unsafe noteData(slot)
            }
        }
        unsafe ring.pushUsed(slot, length: UInt32(sizes.response) &+ UInt32(truncatingIfNeeded: written))
    }

    // MARK: Dirty logging

    /// Notes a response that was written.
    private func note(_ pieces: ResponsePieces, _ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        for index in 0..<pieces.count { unsafe note(pieces.first[index], slot) }
    }

    /// Notes the buffer of a command's data: all of it, for a command that failed may have written anywhere in it.
    private func noteData(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        for index in unsafe 0..<slot.pointee.writableCount { unsafe note(slot.pointee.writable[index], slot) }
    }

    private func note(_ piece: iovec, _ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        unsafe slot.pointee.memory?._withUnsafeGuaranteedRef { memory in
            unsafe log?.mark(piece.iov_base, piece.iov_len, in: memory)
        }
    }

    // MARK: Control queue

    /// Carries a request of the control queue out (5.6.6.2).
    private func control(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> VirtqueueFault? {
        var type: UInt32 = 0
        guard unsafe withUnsafeMutableBytes(of: &type, { unsafe slot.pointee.takeHeader($0) }) else { return .header }
        switch Int32(bitPattern: UInt32(littleEndian: type)) {
        case VIRTIO_SCSI_T_TMF: return unsafe taskManagement(queue, slot)
        case VIRTIO_SCSI_T_AN_QUERY:
            return unsafe asynchronousNotification(queue, slot, isSubscription: false)
        case VIRTIO_SCSI_T_AN_SUBSCRIBE:
            return unsafe asynchronousNotification(queue, slot, isSubscription: true)
        default:
            // Nothing says how its response looks: the buffer goes back without one.
            unsafe queue.ring.pushUsed(slot, length: 0)
            return nil
        }
    }

    private func taskManagement(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> VirtqueueFault? {
        guard let response = unsafe slot.pointee.takeResponse(1) else { return .header }
        unsafe queue.responses[Int(slot.pointee.number)] = response
        statistics.taskManagementFunctions += 1
        var request = scsi_task_management_request()
        request.struct_size = UInt32(MemoryLayout<scsi_task_management_request>.size)
        request.cookie = UInt64(UInt(bitPattern: slot))
        var entry: UnsafeMutablePointer<DeviceTarget>?
        var answer: VirtioSCSIResponse?
        unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSILayout.taskManagementRest, alignment: 8) { rest in
            guard unsafe slot.pointee.takeHeader(rest) else { return answer = .failure }
            let subtype = unsafe UInt32(littleEndian: rest.loadUnaligned(as: UInt32.self))
            let lun = unsafe VirtioSCSILUN(
                bytes: UInt64(bigEndian: rest.loadUnaligned(fromByteOffset: 4, as: UInt64.self)))
            unsafe request.tag = UInt64(littleEndian: rest.loadUnaligned(fromByteOffset: 12, as: UInt64.self))
            unsafe withUnsafeMutableBytes(of: &request.lun) {
                unsafe $0.storeBytes(of: lun.samField.bigEndian, as: UInt64.self)
            }
            unsafe entry = unsafe target(lun)
            if unsafe entry == nil { answer = .badTarget }
            guard let function = VirtioSCSIResponse.function(subtype: subtype) else {
                return answer = .functionRejected
            }
            request.function = function.rawValue
        }
        if let answer {
            unsafe finishControl(slot, [answer.rawValue])
        } else {
            let entry = unsafe entry!
            unsafe queue.functions[Int(slot.pointee.number)] = entry
            unsafe entry.pointee.target._withUnsafeGuaranteedRef {
                unsafe $0.receive(request, nexus: entry.pointee.nexus)
            }
        }
        return nil
    }

    /// AN_QUERY and AN_SUBSCRIBE (5.6.6.2): which of the events asked for a logical unit reports, and from now on does.
    private func asynchronousNotification(
        _ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>, isSubscription: Bool
    ) -> VirtqueueFault? {
        guard let response = unsafe slot.pointee.takeResponse(5) else { return .header }
        unsafe queue.responses[Int(slot.pointee.number)] = response
        unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSILayout.asynchronousNotificationRest, alignment: 8) {
            rest in
            var code = VirtioSCSIResponse.failure
            var granted: UInt32 = 0
            if unsafe slot.pointee.takeHeader(rest) {
                let lun = unsafe VirtioSCSILUN(bytes: UInt64(bigEndian: rest.loadUnaligned(as: UInt64.self)))
                let requested = unsafe UInt32(littleEndian: rest.loadUnaligned(fromByteOffset: 8, as: UInt32.self))
                (code, granted) = subscribe(lun, requested, isSubscription: isSubscription)
            }
            unsafe finishControl(slot, VhostUserMessage.bytes(granted) + [code.rawValue])
        }
        return nil
    }

    private func subscribe(
        _ lun: VirtioSCSILUN, _ requested: UInt32, isSubscription: Bool
    ) -> (VirtioSCSIResponse, UInt32) {
        guard let entry = unsafe target(lun), let number = lun.target else { return (.badTarget, 0) }
        // Both ways to write a LUN name one unit; its events carry the one that REPORT LUNS has.
        let unit = unsafe entry.pointee.target._withUnsafeGuaranteedRef { target in
            target.logicalUnits.first { LUN.parse(lun.samField) == .unit($0.lun) }
        }
        guard let unit else { return (.incorrectLUN, 0) }
        let granted = requested & AsynchronousEvent.supported
        guard isSubscription else { return (.ok, granted) }
        let address = VirtioSCSILUN.bytes(target: number, samField: unit.lun.field)
        guard granted != 0 else {
            subscriptions[address] = nil
            return (.ok, 0)
        }
        guard subscriptions[address] != nil || subscriptions.count < Self.subscriptionCapacity else {
            return (.busy, 0)
        }
        subscriptions[address] = granted
        return (.ok, granted)
    }

    fileprivate static func completeTaskManagement(cookie: UInt64, response: UInt8) {
        let slot = unsafe UnsafeMutablePointer<VirtqueueSlot>(bitPattern: UInt(cookie))!
        unsafe slot.pointee.queue._withUnsafeGuaranteedRef { ring in
            unsafe ring.owner.unsafelyUnwrapped._withUnsafeGuaranteedRef { queue in
                unsafe queue.device.finishControl(slot, [VirtioSCSIResponse(function: response).rawValue])
            }
        }
    }

    private func finishControl(_ slot: UnsafeMutablePointer<VirtqueueSlot>, _ bytes: [UInt8]) {
        unsafe slot.pointee.queue._withUnsafeGuaranteedRef { ring in
            let pieces = unsafe ring.owner.unsafelyUnwrapped._withUnsafeGuaranteedRef { queue in
                unsafe queue.functions[Int(slot.pointee.number)] = nil
                return unsafe queue.responses[Int(slot.pointee.number)]
            }
            if !ring.isDetached, let pieces = pieces {
                unsafe bytes.withUnsafeBytes { unsafe pieces.write($0) }
                if isLogging { unsafe note(pieces, slot) }
            }
            unsafe ring.pushUsed(slot, length: UInt32(bytes.count))
        }
    }

    // MARK: Event queue

    /// An event of a target for the guest (5.6.6.3), if the driver has negotiated that kind.
    fileprivate func report(_ event: scsi_target_event, from number: UInt8) {
        let lun = VirtioSCSILUN.bytes(target: number, samField: LUN.field(event.lun))
        let hotplug = features & VirtioFeature.hotplug != 0
        switch Int32(event.kind) {
        case Int32(SCSI_EVENT_LOGICAL_UNIT_ADDED) where hotplug:
            enqueue(VIRTIO_SCSI_T_TRANSPORT_RESET, lun, UInt32(VIRTIO_SCSI_EVT_RESET_RESCAN))
        case Int32(SCSI_EVENT_LOGICAL_UNIT_REMOVED) where hotplug:
            enqueue(VIRTIO_SCSI_T_TRANSPORT_RESET, lun, UInt32(VIRTIO_SCSI_EVT_RESET_REMOVED))
        case Int32(SCSI_EVENT_PARAMETERS_CHANGED) where features & VirtioFeature.change != 0:
            let reason = UInt32(event.additional_sense_code) | UInt32(event.additional_sense_code_qualifier) << 8
            enqueue(VIRTIO_SCSI_T_PARAM_CHANGE, lun, reason)
        default: break
        }
        if Int32(event.kind) == Int32(SCSI_EVENT_LOGICAL_UNIT_REMOVED) { subscriptions[lun] = nil }
        if Int32(event.kind) == Int32(SCSI_EVENT_PARAMETERS_CHANGED), let wanted = subscriptions[lun] {
            let reason = AsynchronousEvent.reason(event.additional_sense_code) & wanted
            if reason != 0 { enqueue(VIRTIO_SCSI_T_ASYNC_NOTIFY, lun, reason) }
        }
    }

    private func enqueue(_ event: Int32, _ lun: UInt64, _ reason: UInt32) {
        if events.count - eventsDelivered < Self.pendingEvents {
            events.append((event: UInt32(event), lun: lun, reason: reason))
        } else {
            eventsMissed = true
            statistics.eventsMissed += 1
        }
        deliverEvents()
    }

    /// Gives pending events to the driver as long as it has buffers.
    func deliverEvents() {
        guard let queue = running[Self.eventQueue], queue.isEnabled, !queue.isBroken, !isPaused else { return }
        defer { notify(queue) }
        while eventsDelivered < events.count || eventsMissed {
            switch queue.ring.pop() {
            case .nothing:
                // Buffers wake us only if they are asked for behind those that were taken.
                if queue.ring.wantNotifications() { continue }
                return
            case .broken(let fault): return breakQueue(queue, fault)
            case .chain(let slot):
                guard let response = unsafe slot.pointee.takeResponse(VirtioSCSILayout.event) else {
                    unsafe queue.ring.unpop(slot)
                    return breakQueue(queue, .header)
                }
                unsafe writeEvent(response, slot)
                unsafe queue.ring.pushUsed(slot, length: UInt32(VirtioSCSILayout.event))
            }
        }
    }

    private func nextEvent() -> (event: UInt32, lun: UInt64, reason: UInt32) {
        guard eventsDelivered < events.count else { return (event: UInt32(VIRTIO_SCSI_T_NO_EVENT), lun: 0, reason: 0) }
        defer {
            eventsDelivered += 1
            if eventsDelivered == events.count {
                events = []
                eventsDelivered = 0
            }
        }
        return events[eventsDelivered]
    }

    private func writeEvent(_ response: ResponsePieces, _ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        let next = nextEvent()
        let event =
            next.event | (eventsMissed ? UInt32(bitPattern: Int32(truncatingIfNeeded: VIRTIO_SCSI_T_EVENTS_MISSED)) : 0)
        eventsMissed = false
        statistics.events += 1
        unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSILayout.event, alignment: 8) { bytes in
            unsafe bytes.storeBytes(of: event.littleEndian, as: UInt32.self)
            unsafe bytes.storeBytes(of: next.lun.bigEndian, toByteOffset: 4, as: UInt64.self)
            unsafe bytes.storeBytes(of: next.reason.littleEndian, toByteOffset: 12, as: UInt32.self)
            unsafe response.write(UnsafeRawBufferPointer(bytes))
        }
        if isLogging { unsafe note(response, slot) }
    }

    // MARK: The port seam

    nonisolated(unsafe) private static let portOperations: UnsafePointer<scsi_target_port_operations> = {
        let operations = UnsafeMutablePointer<scsi_target_port_operations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: scsi_target_port_operations(
                struct_size: UInt32(MemoryLayout<scsi_target_port_operations>.size),
                abi_version: SCSI_TARGET_ABI_VERSION,
                complete_task: { _, task in unsafe VirtioSCSIDevice.complete(TaskHandle(head: task!)) },
                complete_task_management: { _, cookie, response, _ in
                    VirtioSCSIDevice.completeTaskManagement(cookie: cookie, response: response)
                },
                report_event: { context, event in
                    let entry = unsafe context!.assumingMemoryBound(to: DeviceTarget.self)
                    unsafe entry.pointee.device._withUnsafeGuaranteedRef {
                        unsafe $0.report(event!.pointee, from: entry.pointee.number)
                    }
                }))
        return unsafe UnsafePointer(operations)
    }()
}
