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

    /// The sums, of the same front on different threads.
    func adding(_ other: Self) -> Self {
        var sum = self
        sum.commands += other.commands
        sum.taskManagementFunctions += other.taskManagementFunctions
        sum.notifications += other.notifications
        sum.events += other.events
        sum.eventsMissed += other.eventsMissed
        sum.brokenQueues += other.brokenQueues
        sum.connections += other.connections
        return sum
    }
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
    /// Which target each slot's command was handed to.
    let targetNumbers: UnsafeMutablePointer<UInt8>
    /// The driver broke the rules: it is not served any more, what is in flight is still answered.
    var isBroken = false
    /// Whether the front-end wants it served (SET_VRING_ENABLE).
    var isEnabled = true
    /// The front-end has no way to notify us: the queue is looked at without pause.
    var mustPoll = false
    /// What is available waits for room in a link, which completions make; or, of functions, for queues with commands
    /// that are noted in flight.
    var isStalled = false
    /// It stops and does not wait for its commands: targets that are to be told so, and are not yet.
    var suspending: [UInt8] = []

    init(ring: Virtqueue, call: Int32, index: Int, device: VirtioSCSIDevice) {
        self.ring = ring
        self.call = call
        self.index = index
        unsafe self.device = device
        pool = TaskPool(capacity: ring.size, segmentsPerTask: 1)
        for slot in 0..<ring.size { unsafe pool[slot].command.group = UInt8(index) }
        unsafe responses = .allocate(capacity: ring.size)
        unsafe responses.initialize(repeating: nil, count: ring.size)
        unsafe functions = .allocate(capacity: ring.size)
        unsafe functions.initialize(repeating: nil, count: ring.size)
        unsafe targetNumbers = .allocate(capacity: ring.size)
        unsafe targetNumbers.initialize(repeating: 0, count: ring.size)
        unsafe ring.owner = Unmanaged.passUnretained(self)
    }

    deinit {
        unsafe responses.deallocate()
        unsafe functions.deallocate()
        unsafe targetNumbers.deallocate()
    }
}

/// A target of the device, at the address that the port seam has as its context.
@safe
struct DeviceTarget {
    let target: Unmanaged<TargetDevice>
    /// `nil`: the target is reached through `link`.
    var nexus: NexusIdentifier?
    let number: UInt8
    let device: Unmanaged<VirtioSCSIDevice>
    var link: Unmanaged<ShardLink>?
    var linkedNexus: Unmanaged<LinkedNexus>?
}

/// What became of a chain that was taken.
enum ChainOutcome {
    case done
    /// There is no room for it now: it goes back into the ring, and is taken again.
    case later
    case broken(VirtqueueFault)
}

/// What a queue's stop found.
enum QueueStop {
    case notInService
    /// Nothing was in flight; GET_VRING_BASE reports this.
    case drained(base: UInt32)
    /// Requests are in flight; `takeBase` has the answer when they have ended.
    case busy
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

    let reactor: Reactor
    /// Where its queues are on several reactors: this one with its links. `nil` for an ordinary device.
    let shardReactor: ShardReactor?
    /// The devices that serve request queues on other reactors.
    private(set) var lanes: QueueLanes?
    /// This is such a device, and that is the one whose it is.
    private let laneHome: LaneHome?
    private var laneDrainTold = false
    /// The nexuses of targets that are reached through links.
    private var linkedTargets: [UInt8: LinkedTarget] = [:]
    /// Those that were lost, and of which something may be left.
    private var endings: [LinkedTarget] = []
    private var isDisconnected = false
    /// The links that its commands take.
    private var linksInUse: [ShardLink] = []
    /// Request queues whose commands are noted in flight and that are not in service: functions wait for them.
    var withheld: Set<Int> = [] {
        didSet { if withheld.isEmpty { running[Self.controlQueue]?.isStalled = false } }
    }
    /// Queues that wait for room to take what a back-end that ended has left.
    private var resubmitting: [DeviceQueue] = []
    /// The guest's memory as this thread's queues see it.
    private(set) var memory = GuestMemory(regions: [])
    /// Tables that were replaced while requests led into them.
    private var retired: [GuestMemory] = []
    /// What GET_VRING_BASE is to report for queues that have stopped.
    private var bases: [Int: UInt32] = [:]
    private let targets: UnsafeMutablePointer<UnsafeMutablePointer<DeviceTarget>?>
    private var targetObjects: [UInt8: TargetDevice] = [:]
    /// Targets that have no room for one more nexus.
    private var withoutNexus: Set<UInt8> = []
    private let initiatorPort: String
    private let targetPort: UInt16
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
    /// The flags of the commands that are being taken: SCSI_COMMAND_REPEATED for those that were in flight when a
    /// back-end or a connection ended.
    private var commandFlags: UInt8 = 0
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
    let onFault: (Int, VirtqueueFault) -> Void
    /// Called at the end of each turn while something waits for requests in flight, and never from a completion.
    var onDrained: (() -> Void)?
    private var waitsForDrain = false
    /// How long queues that stop and must be drained are waited for, in nanoseconds.
    private let drainPatience: UInt64
    /// One had to be waited for that long since the last one was started: the others that stop are not.
    private var isImpatient = false
    private var drainTimer: TimerToken?
    /// Tells the guest of used elements where there is no call descriptor: INBAND_NOTIFICATIONS.
    var onNotification: ((Int) -> Void)? {
        didSet { lanes?.setNotifications(onNotification != nil) }
    }

    /// A device for a connection.
    ///
    /// - Parameters:
    ///   - initiatorPort, targetPort: As for `TargetDevice.establishNexus`.
    ///   - spread: The reactors over which its queues are dealt out, its own first, and all that own targets; `nil`: it
    ///     is served by `reactor` alone, which owns all its targets.
    ///   - drainPatience: As in `VhostUserSCSIServer.Configuration`.
    init(
        targets: [UInt8: TargetDevice], initiatorPort: String, targetPort: UInt16 = 1, queueCapacity: Int,
        reactor: Reactor, spread: [ShardReactor]? = nil, laneHome: LaneHome? = nil,
        drainPatience: UInt64 = VhostUserSCSIServer.Configuration.drainPatience, statistics: VirtioFrontStatistics,
        onFault: @escaping (Int, VirtqueueFault) -> Void
    ) {
        precondition(spread?.first.map { $0.reactor === reactor } ?? true)
        self.reactor = reactor
        shardReactor = spread?.first
        self.laneHome = laneHome
        self.onFault = onFault
        self.statistics = statistics
        self.initiatorPort = initiatorPort
        self.targetPort = targetPort
        self.drainPatience = drainPatience
        running = Array(repeating: nil, count: queueCapacity)
        unsafe polled = .allocate(capacity: queueCapacity)
        unsafe flushed = .allocate(capacity: queueCapacity)
        unsafe self.targets = .allocate(capacity: 256)
        unsafe self.targets.initialize(repeating: nil, count: 256)
        if let spread, laneHome == nil {
            lanes = QueueLanes(of: self, over: spread, queueCapacity: queueCapacity, drainPatience: drainPatience)
        }
        for (number, target) in targets { connect(target, number) }
    }

    private func connect(_ target: TargetDevice, _ number: UInt8) {
        if lanes != nil { return connectLinked(target, number) }
        let entry = UnsafeMutablePointer<DeviceTarget>.allocate(capacity: 1)
        let port = unsafe TargetPortHandle(operations: Self.portOperations, context: entry)
        guard let nexus = target.establishNexus(initiatorPort: initiatorPort, targetPort: targetPort, port: port) else {
            unsafe entry.deallocate()
            withoutNexus.insert(number)
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
        precondition(drainTimer == nil, "a virtio-scsi device went away while its queues are drained")
        for number in 0..<256 { unsafe targets[number]?.deallocate() }
        precondition(endings.isEmpty, "a virtio-scsi device went away while its nexuses end")
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
        if withoutNexus.remove(number) != nil { lanes?.forEach { $0.setWithoutNexus(number, false) } }
        guard let target = targetObjects.removeValue(forKey: number), let entry = unsafe targets[Int(number)]
        else { return }
        unsafe targets[Int(number)] = nil
        unsafe detached.append((entry, target))
        subscriptions = subscriptions.filter { VirtioSCSILUN(bytes: $0.key).target != number }
        if let nexus = unsafe entry.pointee.nexus {
            target.loseNexus(nexus)
            unsafe leaving.append(entry)
        } else {
            lanes?.dropTarget(number)
            unsafe loseLinked(number, leaving: entry)
        }
        announce(target, number, UInt32(VIRTIO_SCSI_EVT_RESET_REMOVED))
    }

    private func announce(_ target: TargetDevice, _ number: UInt8, _ reason: UInt32) {
        guard features & VirtioFeature.hotplug != 0 else { return }
        for unit in onOwner(of: target, { target.logicalUnits.map(\.lun) }) {
            let lun = VirtioSCSILUN.bytes(target: number, samField: unit.field)
            enqueue(VIRTIO_SCSI_T_TRANSPORT_RESET, lun, reason)
        }
    }

    // MARK: Set up and tear down

    /// Requests popped and not used yet, on all queues.
    var requestsInFlight: Int { (running.compactMap { $0 } + stopped).reduce(0) { $0 + $1.ring.inFlight } }

    /// Queues out of service whose last requests have not ended.
    private var stopped: [DeviceQueue] = []

    func setFeatures(_ features: UInt64) {
        self.features = features
        lanes?.forEach { $0.setFeatures(features) }
    }

    /// The sizes of the CDB and sense fields; the request queues must be out of service.
    func setSizes(_ sizes: VirtioSCSISizes) {
        self.sizes = sizes
        lanes?.forEach { $0.setSizes(sizes) }
    }

    /// Notes writes from now on, or no longer.
    func setLog(_ log: DirtyLog?) {
        self.log = log
        isLogging = log != nil
        lanes?.forEach { $0.setLog(log) }
    }

    /// Makes these regions the guest's memory. Queues in service still have to move there, and on other threads take
    /// more chains until then; `dropRetired` comes after that.
    func install(_ regions: [MemoryRegion]) {
        retired.append(memory)
        memory = GuestMemory(regions: regions)
        lanes?.forEach { $0.install(regions) }
    }

    /// Lets go of earlier memory into which no request leads.
    func dropRetired() {
        retired.removeAll { $0.references == 0 }
        lanes?.forEach { $0.dropRetired() }
    }

    func queue(_ index: Int) -> DeviceQueue? { running[index] }

    /// Puts a queue into service.
    func start(_ index: Int, ring: Virtqueue, call: Int32, mustPoll: Bool) {
        let queue = DeviceQueue(ring: ring, call: call, index: index, device: self)
        queue.mustPoll = mustPoll
        isImpatient = false
        running[index] = queue
        resubmit(queue)
        refreshPolled()
        if index == Self.eventQueue { deliverEvents() }
    }

    /// Takes what was in flight when the last back-end ended, in the order of then. What finds no room is taken later,
    /// and before anything that is new.
    private func resubmit(_ queue: DeviceQueue) {
        guard queue.ring.hasRecovered, !isPaused else { return }
        while true {
            if queue.index >= Self.firstRequestQueue, !linksInUse.allSatisfy(\.hasRoom) {
                return resubmitting.append(queue)
            }
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
                } else {
                    // Not what a function takes from the request queues before it: that is new.
                    if queue.index >= Self.firstRequestQueue { commandFlags = UInt8(SCSI_COMMAND_REPEATED) }
                    defer { commandFlags = 0 }
                    switch unsafe handle(queue, slot) {
                    case .done: break
                    // Only a function can find no room here.
                    case .later: unsafe finishControl(slot, [VirtioSCSIResponse.busy.rawValue])
                    case .broken(let fault):
                        // It was good when it was taken first, so the driver has changed it: it goes back as it is.
                        unsafe queue.ring.pushUsed(slot, length: 0)
                        breakQueue(queue, fault)
                    }
                }
            }
        }
    }

    private func resubmitMore() {
        let queues = resubmitting.filter { queue in
            (running[queue.index] === queue || stopped.contains { $0 === queue }) && !queue.isBroken
                && !queue.ring.isQuiet
        }
        resubmitting = []
        for queue in queues { resubmit(queue) }
        refreshPolled()
    }

    @inline(__always)
    private func handle(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> ChainOutcome {
        unsafe queue.index >= Self.firstRequestQueue ? command(queue, slot) : control(queue, slot)
    }

    /// Serves a queue, or leaves it alone for a while. What is in flight is answered in any case.
    func setEnabled(_ index: Int, _ isEnabled: Bool) {
        if let lanes, lanes.isElsewhere(index) { return lanes.setEnabled(index, isEnabled) }
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
        lanes?.pause()
    }

    /// Takes a queue out of service. Its requests in flight are still answered.
    ///
    /// - Parameter suspending: Commands need not be: those that can be carried out again stay noted as in flight.
    func stop(_ index: Int, suspending: Bool = false) -> QueueStop {
        if let lanes, lanes.isElsewhere(index) { return lanes.stop(index, suspending: suspending) }
        guard let queue = running[index] else { return .notInService }
        running[index] = nil
        bases[index] = nil
        refreshPolled()
        if suspending, index >= Self.firstRequestQueue, queue.ring.beginSuspension() { suspend(queue) }
        guard isDone(queue) else {
            stopped.append(queue)
            waitsForDrain = true
            awaitCommands(queue)
            return .busy
        }
        return .drained(base: conclude(queue))
    }

    /// Bounds how long a queue that must be drained is waited for. A guest's command may wait for something that does
    /// not come while the guest stands still: the end of an ACA condition, a thaw, an error that is cleared.
    private func awaitCommands(_ queue: DeviceQueue) {
        guard queue.index >= Self.firstRequestQueue, !queue.ring.isQuiet else { return }
        isImpatient ? losePatience() : setDrainTimer()
    }

    private func setDrainTimer() {
        guard drainTimer == nil else { return }
        drainTimer = unsafe reactor.setTimer(
            at: reactor.now &+ drainPatience,
            { context in
                unsafe Unmanaged<VirtioSCSIDevice>.fromOpaque(context)._withUnsafeGuaranteedRef {
                    $0.drainTimer = nil
                    $0.losePatience()
                }
            }, Unmanaged.passUnretained(self).toOpaque())
    }

    /// Has the targets give back what they have of queues that must be drained. What does not end by that, the medium
    /// has, or it must not be done twice; it is looked at again.
    func losePatience() {
        let late = stopped.filter { $0.index >= Self.firstRequestQueue && !$0.ring.isQuiet }
        guard !late.isEmpty else { return }
        isImpatient = true
        for queue in late { suspend(queue) }
        setDrainTimer()
    }

    private func forgetDrainTimer() {
        if let drainTimer { reactor.cancel(drainTimer) }
        drainTimer = nil
    }

    /// Has the targets give back what they have of a queue.
    private func suspend(_ queue: DeviceQueue) {
        let slots = (0..<queue.ring.size).filter { unsafe queue.ring.slot($0).pointee.inFlight }
        queue.suspending = Set(slots.map { unsafe queue.targetNumbers[$0] }).sorted()
        sendSuspensions(queue)
    }

    /// Tells the targets. One for which there is no room in its link is told later.
    private func sendSuspensions(_ queue: DeviceQueue) {
        // When the front-end is gone nothing may be sent any more.
        guard !queue.suspending.isEmpty, !queue.ring.isDetached else { return }
        // Nobody looks at the answer: all has been given back when nothing is in flight.
        let request = scsi_task_management_request.suspension(ofGroup: UInt8(queue.index), cookie: 0)
        let numbers = queue.suspending
        queue.suspending = []
        for number in numbers {
            // One that was taken away meanwhile has ended what it had.
            guard let entry = unsafe targets[Int(number)] else { continue }
            if let nexus = unsafe entry.pointee.nexus {
                unsafe entry.pointee.target._withUnsafeGuaranteedRef { $0.receive(request, nexus: nexus) }
            } else if unsafe !entry.pointee.link!._withUnsafeGuaranteedRef({ link in
                unsafe entry.pointee.linkedNexus!._withUnsafeGuaranteedRef { link.send(request, nexus: $0) }
            }) {
                queue.suspending.append(number)
            }
        }
    }

    /// Whether nothing of a queue that has stopped is left to do.
    private func isDone(_ queue: DeviceQueue) -> Bool {
        let resubmits = queue.ring.hasRecovered && !queue.ring.isQuiet && !queue.isBroken && !isPaused
        return queue.ring.inFlight == 0 && !resubmits
    }

    /// The last request of a queue that has stopped is answered.
    private func conclude(_ queue: DeviceQueue) -> UInt32 {
        if !queue.ring.isDetached {
            if queue.isBroken || !queue.ring.leavesNotes { queue.ring.finish() }
            notify(queue)
        }
        return queue.ring.base
    }

    /// What GET_VRING_BASE reports for a queue that was busy when it stopped; `nil`: it still is.
    func takeBase(_ index: Int) -> UInt32? {
        if let lanes, lanes.isElsewhere(index) { return lanes.takeBase(index) }
        return bases.removeValue(forKey: index)
    }

    private func refreshPolled() {
        polledCount = 0
        flushedCount = 0
        for queue in running.compactMap({ $0 }) {
            unsafe flushed[flushedCount] = unsafe Unmanaged.passUnretained(queue)
            flushedCount += 1
            guard queue.isEnabled, !queue.isBroken, !isPaused, queue.index != Self.eventQueue,
                !queue.ring.hasRecovered
            else { continue }
            unsafe polled[polledCount] = unsafe Unmanaged.passUnretained(queue)
            polledCount += 1
        }
    }

    /// The front-end is gone: nothing is written to the guest's memory any more, and the nexuses are lost.
    func disconnect() {
        isDisconnected = true
        // Those on other threads first: nothing may be sent through a link when its nexus is lost.
        lanes?.disconnect()
        for index in running.indices where running[index] != nil {
            running[index]?.ring.detach()
            _ = stop(index)
        }
        for queue in stopped { queue.ring.detach() }
        forgetDrainTimer()
        waitsForDrain = true
        for number in 0..<256 {
            guard let entry = unsafe targets[number] else { continue }
            if let nexus = unsafe entry.pointee.nexus {
                unsafe entry.pointee.target._withUnsafeGuaranteedRef { $0.loseNexus(nexus) }
            } else if laneHome == nil {
                unsafe loseLinked(UInt8(number), leaving: nil)
            }
        }
        // The core answers no function of a nexus that is lost, and nobody waits for one.
        unsafe leaving.removeAll()
        abandonFunctions()
        stopped.removeAll { $0.ring.inFlight == 0 }
    }

    /// Functions of nexuses that were lost are not answered; but one whose answer is under way in a link is.
    private func abandonFunctions() {
        guard isDisconnected, endings.isEmpty else { return }
        for queue in stopped where queue.index == Self.controlQueue { queue.ring.abandon() }
    }

    /// The device is reset: nexuses are lost and established anew, events and subscriptions are forgotten. All queues
    /// must be out of service, with nothing in flight.
    func reset() {
        precondition(isIdle)
        events = []
        eventsDelivered = 0
        eventsMissed = false
        subscriptions = [:]
        sizes = VirtioSCSISizes()
        for (number, target) in targetObjects {
            guard let entry = unsafe targets[Int(number)] else { continue }
            guard let old = unsafe entry.pointee.nexus else {
                lanes?.dropTarget(number)
                unsafe linkedTargets[number]?.unused = unsafe entry
                unsafe loseLinked(number, leaving: nil)
                unsafe targets[Int(number)] = nil
                targetObjects[number] = nil
                connectLinked(target, number)
                continue
            }
            target.loseNexus(old)
            let port = unsafe TargetPortHandle(operations: Self.portOperations, context: entry)
            if let nexus = target.establishNexus(initiatorPort: initiatorPort, targetPort: targetPort, port: port) {
                unsafe entry.pointee.nexus = nexus
            } else {
                withoutNexus.insert(number)
                unsafe targets[Int(number)] = nil
                unsafe detached.append((entry, target))
                targetObjects[number] = nil
            }
        }
    }

    /// Calls `onDrained` at the end of a turn in which nothing is in flight.
    func awaitDrain() { waitsForDrain = true }

    /// Whether what was in flight when its queue stopped has ended.
    var isDrained: Bool { stopped.isEmpty && endings.isEmpty && lanes?.isQuiet ?? true }

    /// Whether no request is in flight. On other threads that is known of queues that have stopped or are paused.
    var isIdle: Bool { requestsInFlight == 0 && lanes?.isQuiet ?? true }

    /// Lets go of what is on other threads; after `disconnect`, when it is drained.
    func close() { lanes?.close() }

    /// Lets go of queues that have stopped and whose requests have ended. Not at the completion itself: that runs on
    /// memory of the queue.
    private func settle() {
        for queue in stopped {
            notify(queue)
            sendSuspensions(queue)
        }
        // Only now: what one queue gives back may let commands of another end.
        let done = stopped.filter(isDone)
        stopped.removeAll(where: isDone)
        for queue in done {
            let base = conclude(queue)
            bases[queue.index] = base
            let index = queue.index
            laneHome?.tell { home in
                home.lanes?.drained(queue: index, base: base)
                home.awaitDrain()
            }
        }
        if stopped.isEmpty { forgetDrainTimer() }
        waitsForDrain = !stopped.isEmpty || isPaused
        if let laneHome, isPaused || isDisconnected, requestsInFlight == 0, !laneDrainTold {
            laneDrainTold = true
            let number = laneHome.number
            laneHome.tell { home in
                home.lanes?.drained(lane: number)
                home.awaitDrain()
            }
        }
        onDrained?()
    }

    /// Answers the functions that wait for a target that is gone, once none of its tasks can touch the guest's memory.
    private func answerLeaving() {
        let gone = unsafe leaving.filter { entry in
            guard let nexus = unsafe entry.pointee.nexus else { return true }
            return unsafe entry.pointee.target._withUnsafeGuaranteedRef { $0.tasksInFlight(nexus) == 0 }
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
        if !resubmitting.isEmpty { resubmitMore() }
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
            let hasWork = unsafe polled[index]._withUnsafeGuaranteedRef {
                !$0.isStalled && ($0.ring.wantNotifications() || $0.mustPoll)
            }
            if hasWork { found = true }
        }
        return found
    }

    private func serve(_ queue: DeviceQueue) -> Bool {
        guard queue.ring.hasAvailable, !queue.isBroken else { return false }
        queue.ring.stopNotifications()
        return take(queue, atMost: Self.budget) > 0
    }

    /// Takes chains until there are none.
    ///
    /// - Returns: How many were taken; a fault counts as one.
    @inline(__always)
    private func take(_ queue: DeviceQueue, atMost limit: Int) -> Int {
        for count in 0..<limit {
            switch queue.ring.pop() {
            case .nothing: return max(count, 1)
            case .broken(let fault):
                breakQueue(queue, fault)
                return count + 1
            case .chain(let slot):
                switch unsafe handle(queue, slot) {
                case .done: break
                case .later:
                    unsafe queue.ring.unpop(slot)
                    queue.isStalled = queue.index >= Self.firstRequestQueue || !withheld.isEmpty
                    return count
                case .broken(let fault):
                    unsafe queue.ring.unpop(slot)
                    breakQueue(queue, fault)
                    return count + 1
                }
            }
        }
        return limit
    }

    /// Takes all commands that the driver has made available up to now: a task management function has to find what
    /// was sent before it.
    ///
    /// - Returns: `false` if some had to stay in their rings.
    private func takeCommands() -> Bool {
        for index in 0..<polledCount {
            unsafe polled[index]._withUnsafeGuaranteedRef { queue in
                guard queue.index >= Self.firstRequestQueue, !queue.isBroken else { return }
                // No more than the ring's length can have been available.
                _ = take(queue, atMost: queue.ring.size)
            }
        }
        let isStalled = (0..<polledCount).contains {
            unsafe polled[$0]._withUnsafeGuaranteedRef { $0.isStalled && $0.ring.hasAvailable }
        }
        guard !isStalled, resubmitting.isEmpty else { return false }
        return lanes?.forEach({ $0.takeCommands() }).allSatisfy(\.self) ?? true
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
    private func command(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> ChainOutcome {
        guard let response = unsafe slot.pointee.takeResponse(sizes.response) else { return .broken(.header) }
        statistics.commands += 1
        return unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSISizes.requestCapacity, alignment: 8) { whole in
            let header = unsafe UnsafeMutableRawBufferPointer(rebasing: whole[..<sizes.requestHeader])
            guard unsafe slot.pointee.takeHeader(header) else {
                unsafe refuse(queue, slot, response, .failure)
                return .done
            }
            let lun = unsafe VirtioSCSILUN(bytes: UInt64(bigEndian: header.loadUnaligned(as: UInt64.self)))
            guard let target = unsafe target(lun) else {
                unsafe refuse(queue, slot, response, missing(lun))
                return .done
            }
            // Data both ways is what INOUT is about (5.6.6.1).
            if unsafe slot.pointee.readableLength > 0 && slot.pointee.writableLength > 0,
                features & VirtioFeature.inOut == 0
            {
                unsafe refuse(queue, slot, response, .failure)
                return .done
            }
            let head = unsafe Int(slot.pointee.number)
            unsafe queue.responses[head] = response
            unsafe queue.targetNumbers[head] = target.pointee.number
            let task = queue.pool[head]
            unsafe VirtioSCSICommandHeader.fill(
                &task.command, from: UnsafeRawBufferPointer(header), cdbSize: sizes.cdb)
            unsafe task.command.flags = commandFlags
            unsafe task.command.cookie = UInt64(UInt(bitPattern: slot))
            unsafe task.command.data_out = slot.pointee.readable
            unsafe task.command.data_out_count = UInt32(slot.pointee.readableCount)
            unsafe task.command.data_out_length = slot.pointee.readableLength
            unsafe task.command.data_in = slot.pointee.writable
            unsafe task.command.data_in_count = UInt32(slot.pointee.writableCount)
            unsafe task.command.data_in_length = slot.pointee.writableLength
            guard let nexus = unsafe target.pointee.nexus else { return unsafe send(task, to: target, from: queue) }
            unsafe target.pointee.target._withUnsafeGuaranteedRef { $0.receive(task, nexus: nexus) }
            return .done
        }
    }

    /// Hands a command over to the thread of its target.
    private func send(
        _ task: TaskHandle, to target: UnsafeMutablePointer<DeviceTarget>, from queue: DeviceQueue
    ) -> ChainOutcome {
        unsafe target.pointee.link!._withUnsafeGuaranteedRef { link in
            let isSent = unsafe target.pointee.linkedNexus!._withUnsafeGuaranteedRef { link.send(task, nexus: $0) }
            queue.isStalled = false
            if !isSent { statistics.commands -= 1 }
            return isSent ? .done : .later
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

    /// What is said of a LUN for which there is no nexus.
    private func missing(_ lun: VirtioSCSILUN) -> VirtioSCSIResponse {
        lun.target.map { withoutNexus.contains($0) } ?? false ? .nexusFailure : .badTarget
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
        if ring.isQuiet { return unsafe completeQuietly(task, slot, queue, ring) }
        unsafe answer(task, slot, queue, ring)
    }

    /// A command of a queue whose front-end is gone, or that stops without being drained.
    @inline(never)
    private func completeQuietly(
        _ task: TaskHandle, _ slot: UnsafeMutablePointer<VirtqueueSlot>, _ queue: DeviceQueue, _ ring: Virtqueue
    ) {
        if ring.isDetached { return unsafe ring.pushUsed(slot, length: 0) }
        guard task.response.service_response == ServiceResponse.suspended.rawValue else {
            return unsafe answer(task, slot, queue, ring)
        }
        // What of it was done may have been written there.
        if isLogging { unsafe noteData(slot) }
        unsafe ring.suspend(slot)
    }

    @inline(__always)
    private func answer(
        _ task: TaskHandle, _ slot: UnsafeMutablePointer<VirtqueueSlot>, _ queue: DeviceQueue, _ ring: Virtqueue
    ) {
        let head = unsafe Int(slot.pointee.number)
        let written = unsafe task.command.data_in_length &- task.response.data_in_residual
        let pieces = unsafe queue.responses[head].unsafelyUnwrapped
        // One field for both ways: what was offered less what was moved (5.6.6.1).
        let residual = UInt32(clamping: task.response.data_in_residual &+ task.response.data_out_residual)
        let (status, qualifier) = (task.response.status, task.response.status_qualifier)
        var code = VirtioSCSIResponse(task.response.service_response)
        // It was not a function that ended it: the target was taken away.
        if code == .aborted, unsafe targets[Int(queue.targetNumbers[head])] == nil { code = .transportFailure }
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
    private func control(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> ChainOutcome {
        var type: UInt32 = 0
        guard unsafe withUnsafeMutableBytes(of: &type, { unsafe slot.pointee.takeHeader($0) }) else {
            return .broken(.header)
        }
        switch Int32(bitPattern: UInt32(littleEndian: type)) {
        case VIRTIO_SCSI_T_TMF: return unsafe taskManagement(queue, slot)
        case VIRTIO_SCSI_T_AN_QUERY:
            return unsafe asynchronousNotification(queue, slot, isSubscription: false)
        case VIRTIO_SCSI_T_AN_SUBSCRIBE:
            return unsafe asynchronousNotification(queue, slot, isSubscription: true)
        default:
            // Nothing says how its response looks: the buffer goes back without one.
            unsafe queue.ring.pushUsed(slot, length: 0)
            return .done
        }
    }

    private func taskManagement(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> ChainOutcome {
        guard let response = unsafe slot.pointee.takeResponse(1) else { return .broken(.header) }
        // A command that is noted in flight has been sent before it, and comes when its queue is in service.
        guard withheld.isEmpty, takeCommands() else { return .later }
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
            if unsafe entry == nil { answer = missing(lun) }
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
            if let nexus = unsafe entry.pointee.nexus {
                unsafe entry.pointee.target._withUnsafeGuaranteedRef { $0.receive(request, nexus: nexus) }
            } else if unsafe !entry.pointee.link!._withUnsafeGuaranteedRef({ link in
                unsafe entry.pointee.linkedNexus!._withUnsafeGuaranteedRef { link.send(request, nexus: $0) }
            }) {
                unsafe finishControl(slot, [VirtioSCSIResponse.busy.rawValue])
            }
        }
        return .done
    }

    /// AN_QUERY and AN_SUBSCRIBE (5.6.6.2): which of the events asked for a logical unit reports, and from now on does.
    private func asynchronousNotification(
        _ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>, isSubscription: Bool
    ) -> ChainOutcome {
        guard let response = unsafe slot.pointee.takeResponse(5) else { return .broken(.header) }
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
        return .done
    }

    private func subscribe(
        _ lun: VirtioSCSILUN, _ requested: UInt32, isSubscription: Bool
    ) -> (VirtioSCSIResponse, UInt32) {
        guard let entry = unsafe target(lun), let number = lun.target else { return (missing(lun), 0) }
        // Both ways to write a LUN name one unit; its events carry the one that REPORT LUNS has.
        let target = unsafe entry.pointee.target.takeUnretainedValue()
        let unit = onOwner(of: target) {
            target.logicalUnits.first { LUN.parse(lun.samField) == .unit($0.lun) }?.lun
        }
        guard let unit else { return (.incorrectLUN, 0) }
        let granted = requested & AsynchronousEvent.supported
        guard isSubscription else { return (.ok, granted) }
        let address = VirtioSCSILUN.bytes(target: number, samField: unit.field)
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
        // None: a suspension, which nobody waits for.
        guard let slot = unsafe UnsafeMutablePointer<VirtqueueSlot>(bitPattern: UInt(cookie)) else { return }
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
        case Int32(SCSI_EVENT_HARD_RESET) where hotplug:
            enqueue(VIRTIO_SCSI_T_TRANSPORT_RESET, lun, UInt32(VIRTIO_SCSI_EVT_RESET_HARD))
        case Int32(SCSI_EVENT_EVENTS_MISSED):
            eventsMissed = true
            statistics.eventsMissed += 1
            deliverEvents()
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

    // MARK: Targets of other reactors

    /// Runs a function on the thread that owns a target.
    private func onOwner<Result>(of target: TargetDevice, _ body: @escaping () -> Result) -> Result {
        guard let lanes, let shardReactor else { return body() }
        return shardReactor.call(lanes.owner(of: target), body)
    }

    /// Establishes the nexus of a target through links, from this thread and from those of the other queues.
    private func connectLinked(_ target: TargetDevice, _ number: UInt8) {
        guard let lanes, let shardReactor else { preconditionFailure("a link from a device that is not spread") }
        let owner = lanes.owner(of: target)
        let link = shardReactor.link(to: owner)
        let linked = LinkedTarget(home: LaneHome(self, reactor: reactor, number: 0), owner: owner)
        linked.links = [link] + lanes.links(to: owner)
        let entry = UnsafeMutablePointer<DeviceTarget>.allocate(capacity: 1)
        unsafe entry.initialize(
            to: DeviceTarget(
                target: Unmanaged.passUnretained(target), nexus: nil, number: number,
                device: Unmanaged.passUnretained(self), link: Unmanaged.passUnretained(link)))
        let port = unsafe TargetPortHandle(operations: Self.portOperations, context: entry)
        let (name, relativeIdentifier) = (initiatorPort, targetPort)
        let nexus = shardReactor.call(owner) {
            owner.establishNexus(
                initiatorPort: name, targetPort: relativeIdentifier, target: target, port: port, events: link,
                whenGone: { linked.isGone(at: $0) })
        }
        guard let nexus else {
            withoutNexus.insert(number)
            lanes.forEach { $0.setWithoutNexus(number, true) }
            return unsafe entry.deallocate()
        }
        linked.nexus = nexus
        unsafe entry.pointee.linkedNexus = unsafe Unmanaged.passUnretained(nexus)
        unsafe targets[Int(number)] = entry
        targetObjects[number] = target
        linkedTargets[number] = linked
        use(link)
        lanes.addTarget(number, target, nexus, linked.links)
    }

    /// Adds a target to the device of another thread's queues.
    func addLaneTarget(_ number: UInt8, _ target: TargetDevice, _ nexus: LinkedNexus, through link: ShardLink) {
        let entry = UnsafeMutablePointer<DeviceTarget>.allocate(capacity: 1)
        unsafe entry.initialize(
            to: DeviceTarget(
                target: Unmanaged.passUnretained(target), nexus: nil, number: number,
                device: Unmanaged.passUnretained(self), link: Unmanaged.passUnretained(link),
                linkedNexus: Unmanaged.passUnretained(nexus)))
        unsafe targets[Int(number)] = entry
        targetObjects[number] = target
        use(link)
    }

    /// Says of a target that has no entry whether it is one without room for a nexus.
    func setWithoutNexus(_ number: UInt8, _ isWithout: Bool) {
        if isWithout { withoutNexus.insert(number) } else { withoutNexus.remove(number) }
    }

    /// Takes a target away from the device of another thread's queues. Nothing is sent to it any more.
    func dropLaneTarget(_ number: UInt8) {
        targetObjects[number] = nil
        // Nobody has its address: it is no port's context.
        unsafe targets[Int(number)]?.deallocate()
        unsafe targets[Int(number)] = nil
    }

    private func use(_ link: ShardLink) {
        if !linksInUse.contains(where: { $0 === link }) { linksInUse.append(link) }
    }

    /// I_T nexus loss of a target that is reached through links. Nothing is sent to it any more.
    private func loseLinked(_ number: UInt8, leaving entry: UnsafeMutablePointer<DeviceTarget>?) {
        guard let shardReactor, let linked = linkedTargets.removeValue(forKey: number) else { return }
        unsafe linked.leaving = entry
        endings.append(linked)
        shardReactor.call(linked.owner) { linked.owner.loseNexus(linked.nexus) }
    }

    /// Nothing of a lost nexus is left, on any thread.
    func ended(_ linked: LinkedTarget) {
        endings.removeAll { $0 === linked }
        linked.nexus = nil
        unsafe linked.unused?.deallocate()
        if let entry = unsafe linked.leaving { unsafe leaving.append(entry) }
        abandonFunctions()
        waitsForDrain = true
    }

    // MARK: The queues of other reactors

    /// Runs a function with the device that serves a queue, on its thread.
    func with<Result>(_ index: Int, _ body: @escaping (VirtioSCSIDevice) -> Result) -> Result {
        guard let lanes else { return body(self) }
        return lanes.with(index, body) ?? body(self)
    }

    /// A queue was put into service by whoever serves it.
    func started(_ index: Int) { lanes?.started(index) }

    /// Whether a queue is in service, wherever.
    func isInService(_ index: Int) -> Bool { lanes?.isInService(index) ?? (running[index] != nil) }

    /// What the device has done, on all threads.
    var totalStatistics: VirtioFrontStatistics {
        lanes?.forEach { $0.statistics }.reduce(statistics) { $0.adding($1) } ?? statistics
    }

    /// Of a lane that takes nothing more: whether nothing is in flight; if it is, the home thread is told of the end.
    func isLaneIdle() -> Bool {
        laneDrainTold = requestsInFlight == 0
        return laneDrainTold
    }

    /// Has the home thread notify the guest where there is no call descriptor, or nobody.
    func setLaneNotifications(_ isOn: Bool) {
        guard let laneHome, isOn else { return onNotification = nil }
        onNotification = { index in laneHome.tell { $0.onNotification?(index) } }
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
