// VirtioSCSIDevice: a virtio-scsi device for one connection: its queues, its targets, and the way between them.
//
// Owns: the virtqueues, the task pools, the nexuses, the pending events. Called by: VhostUserSession (set up, tear
// down), the reactor (poll, flush), the core (completions). Must not know: vhost-user.
//
// Here is what holds the queues together: which are in service, and what a turn of the reactor does with them. The rest
// is in RequestQueues, ControlQueue, EventQueue, DeviceTargets, and QueueStops.

import CLinux
import CTarget
import Reactor
import SCSICore

/// The device of a connection, or the part of it that one reactor serves.
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
    static let subscriptionCapacity = 16_384

    let reactor: Reactor
    /// Where its queues are on several reactors: this one with its links. `nil` for an ordinary device.
    let shardReactor: ShardReactor?
    /// The devices that serve request queues on other reactors.
    private(set) var lanes: QueueLanes?
    /// This is such a device, and that is the one whose it is.
    let laneHome: LaneHome?
    var laneDrainTold = false
    /// The nexuses of targets that are reached through links.
    var linkedTargets: [UInt8: LinkedTarget] = [:]
    /// Those that were lost, and of which something may be left.
    var endings: [LinkedTarget] = []
    var isDisconnected = false
    /// The links that its commands take.
    var linksInUse: [ShardLink] = []
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
    var bases: [Int: UInt32] = [:]
    let targets: UnsafeMutablePointer<UnsafeMutablePointer<DeviceTarget>?>
    var targetObjects: [UInt8: TargetDevice] = [:]
    /// Targets that have no room for one more nexus.
    var withoutNexus: Set<UInt8> = []
    let initiatorPort: String
    let targetPort: UInt16
    /// Targets that were detached; a command of theirs may still lead to its entry.
    var detached: [(entry: UnsafeMutablePointer<DeviceTarget>, target: TargetDevice)] = unsafe []
    var running: [DeviceQueue?]
    /// The running queues as the poll reads them.
    private let polled: UnsafeMutablePointer<Unmanaged<DeviceQueue>>
    private var polledCount = 0
    /// All queues that may have something to tell the guest.
    private let flushed: UnsafeMutablePointer<Unmanaged<DeviceQueue>>
    private var flushedCount = 0
    /// Set when nothing more is to be taken from the queues: the server stops.
    var isPaused = false
    /// Detached targets for which task management functions wait; the core does not answer those of a lost nexus.
    var leaving: [UnsafeMutablePointer<DeviceTarget>] = unsafe []
    var features: UInt64 = 0
    /// The flags of the commands that are being taken: SCSI_COMMAND_REPEATED for those that were in flight when a
    /// back-end or a connection ended.
    var commandFlags: UInt8 = 0
    /// Sizes that the driver may set in the configuration space.
    var sizes = VirtioSCSISizes()
    /// Where to note what is written to the guest's memory, while the front-end wants to know.
    var log: DirtyLog?
    var isLogging = false
    var events: [(event: UInt32, lun: UInt64, reason: UInt32)] = []
    /// How many of `events` were given to the driver.
    var eventsDelivered = 0
    /// What the driver wants to be told of, by the LUN field of its request.
    var subscriptions: [UInt64: UInt32] = [:]
    var eventsMissed = false
    var statistics: VirtioFrontStatistics
    /// Called when a queue breaks.
    let onFault: (Int, VirtqueueFault) -> Void
    /// Called at the end of each turn while something waits for requests in flight, and never from a completion.
    var onDrained: (() -> Void)?
    var waitsForDrain = false
    /// How long queues that stop and must be drained are waited for, in nanoseconds.
    let drainPatience: UInt64
    /// One had to be waited for that long since the last one was started: the others that stop are not.
    var isImpatient = false
    var drainTimer: TimerToken?
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

    // MARK: Set up and tear down

    /// Requests popped and not used yet, on all queues.
    var requestsInFlight: Int { (running.compactMap { $0 } + stopped).reduce(0) { $0 + $1.ring.inFlight } }

    /// Queues out of service whose last requests have not ended.
    var stopped: [DeviceQueue] = []

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

    func refreshPolled() {
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

    func notify(_ queue: DeviceQueue) {
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
    func takeCommands() -> Bool {
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

    nonisolated(unsafe) static let portOperations: UnsafePointer<scsi_target_port_operations> = {
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
