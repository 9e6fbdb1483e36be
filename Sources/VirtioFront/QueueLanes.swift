// QueueLanes: the request queues of a device that other reactors serve.
//
// Owns: for each of those reactors a device that has the queues and nothing else, and what the home thread knows of
// them. Called by: VirtioSCSIDevice, on the home thread, which has the control and event queues, the protocol and the
// first of the request queues. Must not know: rings, commands.
//
// What changes a queue is done by a call on its thread; the home thread knows which queues are in service without
// asking. What happens there, a fault or the end of the last request, is told by a message. Commands never come through
// here: each thread hands them over to the targets' threads by links of its own.

import Reactor
import SCSICore

/// The way from another thread to the device on the home thread.
final class LaneHome: @unchecked Sendable {
    private weak let device: VirtioSCSIDevice?
    private let reactor: Reactor
    /// Which lane it is that tells.
    let number: Int

    init(_ device: VirtioSCSIDevice, reactor: Reactor, number: Int) {
        self.device = device
        self.reactor = reactor
        self.number = number
    }

    /// Runs a function on the home thread, if the device is still there then.
    func tell(_ body: @escaping @Sendable (VirtioSCSIDevice) -> Void) {
        reactor.post { [self] in
            if let device { body(device) }
        }
    }
}

/// The nexus of a target that is reached through links.
@safe
final class LinkedTarget: @unchecked Sendable {
    private let home: LaneHome
    let owner: ShardReactor
    /// From each thread that serves queues; set before the nexus is established.
    var links: [ShardLink] = []
    // The home thread's.
    var nexus: LinkedNexus!
    /// The target's entry, if functions wait for the end of the nexus.
    var leaving: UnsafeMutablePointer<DeviceTarget>?
    /// The same, if nobody needs it after the end.
    var unused: UnsafeMutablePointer<DeviceTarget>?
    private var saidSo = 0

    init(home: LaneHome, owner: ShardReactor) {
        self.home = home
        self.owner = owner
    }

    /// On the thread of each link of the target's shard: all that went through it has come back.
    func isGone(at link: ShardLink) {
        guard links.contains(where: { $0 === link }) else { return }
        home.tell { [self] device in
            saidSo += 1
            if saidSo == links.count { device.ended(self) }
        }
    }
}

final class QueueLanes {
    private struct Lane {
        let reactor: ShardReactor
        let device: VirtioSCSIDevice
        let source: WorkSourceToken
    }

    private let home: ShardReactor
    /// All reactors that may own targets.
    private let reactors: [ShardReactor]
    private var lanes: [Lane] = []
    private var inService: [Bool]
    private var isEnabled: [Bool]
    /// Queues that stopped with requests in flight.
    private var busy: Set<Int> = []
    /// What GET_VRING_BASE is to report of those that have ended since.
    private var bases: [Int: UInt32] = [:]
    /// Lanes that were paused or disconnected with requests in flight.
    private var draining: Set<Int> = []

    /// Deals the queues of a device out over reactors, the first of which is its own.
    init(of device: VirtioSCSIDevice, over reactors: [ShardReactor], queueCapacity: Int, drainPatience: UInt64) {
        home = reactors[0]
        self.reactors = reactors
        inService = Array(repeating: false, count: queueCapacity)
        isEnabled = Array(repeating: true, count: queueCapacity)
        let requestQueues = queueCapacity - VirtioSCSIDevice.firstRequestQueue
        for (number, reactor) in reactors.prefix(requestQueues).dropFirst().enumerated() {
            let way = LaneHome(device, reactor: device.reactor, number: number)
            lanes.append(
                home.call(reactor) {
                    Self.lane(on: reactor, way, queueCapacity: queueCapacity, drainPatience: drainPatience)
                })
        }
    }

    /// On the lane's thread.
    private static func lane(
        on reactor: ShardReactor, _ home: LaneHome, queueCapacity: Int, drainPatience: UInt64
    ) -> Lane {
        let device = VirtioSCSIDevice(
            targets: [:], initiatorPort: "", queueCapacity: queueCapacity, reactor: reactor.reactor, spread: [reactor],
            laneHome: home, drainPatience: drainPatience, statistics: VirtioFrontStatistics(),
            onFault: { index, fault in home.tell { $0.onFault(index, fault) } })
        let source = unsafe reactor.reactor.add(
            Reactor.WorkSource(
                poll: { unsafe Unmanaged<VirtioSCSIDevice>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.poll() } },
                flush: { unsafe Unmanaged<VirtioSCSIDevice>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.flush() } },
                prepareToSleep: {
                    unsafe Unmanaged<VirtioSCSIDevice>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.prepareToSleep() }
                },
                context: Unmanaged.passUnretained(device).toOpaque()))
        return Lane(reactor: reactor, device: device, source: source)
    }

    /// Lets go of the other threads. Nothing may be in flight there.
    func close() {
        for lane in lanes { home.call(lane.reactor) { lane.reactor.reactor.remove(lane.source) } }
        lanes = []
    }

    // MARK: Which thread

    /// The lane of a queue; `nil`: the home thread.
    private func lane(of index: Int) -> Int? {
        guard index >= VirtioSCSIDevice.firstRequestQueue, !lanes.isEmpty else { return nil }
        let place = (index - VirtioSCSIDevice.firstRequestQueue) % (lanes.count + 1)
        return place == 0 ? nil : place - 1
    }

    func isElsewhere(_ index: Int) -> Bool { lane(of: index) != nil }

    /// The reactor that owns a target.
    func owner(of target: TargetDevice) -> ShardReactor {
        guard let owner = reactors.first(where: { $0.shard === target.shard }) else {
            preconditionFailure("a target of a reactor that the device does not know")
        }
        return owner
    }

    /// Runs a function with the device that serves a queue, on its thread; `nil` if that is the home thread.
    func with<Result>(_ index: Int, _ body: @escaping (VirtioSCSIDevice) -> Result) -> Result? {
        guard let number = lane(of: index) else { return nil }
        let lane = lanes[number]
        return home.call(lane.reactor) { body(lane.device) }
    }

    /// Runs a function with each device, on its thread.
    @discardableResult
    func forEach<Result>(_ body: @escaping (VirtioSCSIDevice) -> Result) -> [Result] {
        lanes.map { lane in home.call(lane.reactor) { body(lane.device) } }
    }

    // MARK: Queues

    /// Whether a queue is in service; `nil` if it is the home thread's.
    func isInService(_ index: Int) -> Bool? { isElsewhere(index) ? inService[index] : nil }

    /// A queue was put into service, enabled.
    func started(_ index: Int) { (inService[index], isEnabled[index]) = (true, true) }

    func setEnabled(_ index: Int, _ isEnabled: Bool) {
        guard inService[index], self.isEnabled[index] != isEnabled else { return }
        self.isEnabled[index] = isEnabled
        _ = with(index) { $0.setEnabled(index, isEnabled) }
    }

    func stop(_ index: Int, suspending: Bool) -> QueueStop {
        guard inService[index] else { return .notInService }
        inService[index] = false
        bases[index] = nil
        let stop = with(index) { $0.stop(index, suspending: suspending) } ?? .notInService
        if case .busy = stop { busy.insert(index) }
        return stop
    }

    func takeBase(_ index: Int) -> UInt32? { bases.removeValue(forKey: index) }

    func setNotifications(_ isOn: Bool) { forEach { $0.setLaneNotifications(isOn) } }

    // MARK: The end of requests

    /// Whether all that stopped has ended.
    var isQuiet: Bool { busy.isEmpty && draining.isEmpty }

    func pause() { drain { $0.pause() } }

    func disconnect() {
        drain { $0.disconnect() }
        for index in inService.indices { inService[index] = false }
        busy = []
    }

    private func drain(_ body: @escaping (VirtioSCSIDevice) -> Void) {
        let isIdle = forEach { device in
            body(device)
            return device.isLaneIdle()
        }
        draining = Set(lanes.indices.filter { !isIdle[$0] })
    }

    /// A queue's last request has ended.
    func drained(queue index: Int, base: UInt32) {
        busy.remove(index)
        bases[index] = base
    }

    /// A lane's last request has ended.
    func drained(lane number: Int) { draining.remove(number) }

    // MARK: Targets

    /// The links from all lanes into a shard.
    func links(to owner: ShardReactor) -> [ShardLink] {
        lanes.map { lane in home.call(lane.reactor) { lane.reactor.link(to: owner) } }
    }

    /// - Parameter links: That of the home thread, then those of the lanes.
    func addTarget(_ number: UInt8, _ target: TargetDevice, _ nexus: LinkedNexus, _ links: [ShardLink]) {
        for (lane, link) in zip(lanes, links.dropFirst()) {
            home.call(lane.reactor) { lane.device.addLaneTarget(number, target, nexus, through: link) }
        }
    }

    func dropTarget(_ number: UInt8) { forEach { $0.dropLaneTarget(number) } }
}
