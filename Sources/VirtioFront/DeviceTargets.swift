// DeviceTargets: the targets of a virtio-scsi device: their nexuses, and how targets come and go while it is in use;
// also those that other reactors own.
//
// Called by: the server (attach, detach), VirtioSCSIDevice (set up, reset, tear down), QueueLanes. Must not know:
// queues but the control queue's functions that wait for a target, vhost-user.

import CLinux
import CTarget
import Reactor
import SCSICore

extension VirtioSCSIDevice {
    /// Establishes the nexus of a target.
    func connect(_ target: TargetDevice, _ number: UInt8) {
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

    /// Answers the functions that wait for a target that is gone, once none of its tasks can touch the guest's memory.
    func answerLeaving() {
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

    // MARK: Targets of other reactors

    /// Runs a function on the thread that owns a target.
    func onOwner<Result>(of target: TargetDevice, _ body: @escaping () -> Result) -> Result {
        guard let lanes, let shardReactor else { return body() }
        return shardReactor.call(lanes.owner(of: target), body)
    }

    /// Establishes the nexus of a target through links, from this thread and from those of the other queues.
    func connectLinked(_ target: TargetDevice, _ number: UInt8) {
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
    func loseLinked(_ number: UInt8, leaving entry: UnsafeMutablePointer<DeviceTarget>?) {
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
}
