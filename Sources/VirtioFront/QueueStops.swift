// QueueStops: how queues of a virtio-scsi device go out of service: their commands end, or are taken back and stay
// noted as in flight (Docs/decisions/0012), and whoever stopped them learns of it when nothing touches the guest's
// memory any more.
//
// Called by: VhostUserSession and QueueLanes (stop, pause, disconnect), VirtioSCSIDevice (at the end of a turn). Must
// not know: vhost-user, why a queue stops.

import CTarget
import Reactor
import SCSICore

extension VirtioSCSIDevice {
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
    func suspend(_ queue: DeviceQueue) {
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
    func abandonFunctions() {
        guard isDisconnected, endings.isEmpty else { return }
        for queue in stopped where queue.index == Self.controlQueue { queue.ring.abandon() }
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
    func settle() {
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
}
