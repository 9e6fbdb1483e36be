// ShardGate: how ports on other threads use the targets of a shard: the shard's side.
//
// Owns: the links into the shard, and the nexuses that use them. Called by: the driver of the shard, on its thread; the
// task engine, through the nexuses' port. Must not know: what threads, descriptors and reactors are, transports.

import CTarget

/// An I_T nexus whose ports are on other threads than the target's.
///
/// Made by `ShardGate.establishNexus` on the shard's thread, then handed to the threads of the ports.
@safe
public final class LinkedNexus: @unchecked Sendable {
    /// The front's port: called on the thread of the link through which the task or function came, so from several
    /// threads if the front uses the nexus on several.
    let port: TargetPortHandle
    /// Called on the thread of each link of the gate when the nexus was lost and nothing of it is left in the shard.
    let whenGone: @Sendable (ShardLink) -> Void

    // The shard's thread's own.
    fileprivate let target: TargetDevice
    fileprivate var identifier: NexusIdentifier?
    /// Until nothing of the nexus is left.
    fileprivate var gate: ShardGate?
    /// Where events go.
    fileprivate let eventLink: ShardLink
    fileprivate var tasksUnderWay = 0
    fileprivate var isLost = false

    fileprivate init(
        target: TargetDevice, port: TargetPortHandle, gate: ShardGate, eventLink: ShardLink,
        whenGone: @escaping @Sendable (ShardLink) -> Void
    ) {
        self.target = target
        self.port = port
        self.gate = gate
        self.eventLink = eventLink
        self.whenGone = whenGone
    }
}

/// Where all links into one shard arrive.
///
/// All functions are called on the shard's thread.
@safe
public final class ShardGate {
    private let shard: Shard
    private let stamps = StampCounter()
    private var links: [ShardLink] = []
    private var nexuses: [LinkedNexus] = []
    private var isReceiving = false
    /// Answers to functions that wait until what the functions ended is delivered on other threads.
    private var heldBack: [HeldAnswer] = []

    private struct HeldAnswer {
        let link: ShardLink
        let slot: FunctionSlot
        let nexus: LinkedNexus
        let response: UInt8
        let additional: UInt32
        /// By link: how far it must have delivered.
        let needs: [Int]
    }

    /// A gate without links.
    public init(shard: Shard) { self.shard = shard }

    deinit { precondition(nexuses.isEmpty, "a gate went away with nexuses") }

    /// A new link, to be handed to the port's thread. It stays as long as the gate.
    ///
    /// - Parameters:
    ///   - capacity: Tasks that may be under way in it at a time; a front that has no more is never refused.
    ///   - wakeOwner: Wakes the shard's thread.
    ///   - wakePort: Wakes the port's thread.
    public func addLink(capacity: Int, wakeOwner: ShardWaker, wakePort: ShardWaker) -> ShardLink {
        precondition(links.count < Limits.linksPerShard, "too many links into one shard")
        let link = ShardLink(
            capacity: capacity, index: links.count, stamps: stamps, wakeOwner: wakeOwner, wakePort: wakePort)
        links.append(link)
        return link
    }

    // MARK: Nexuses

    /// Establishes an I_T nexus whose tasks come through links of this gate.
    ///
    /// - Parameters:
    ///   - initiatorPort, targetPort: As for `TargetDevice.establishNexus`.
    ///   - target: A target of the gate's shard.
    ///   - port: Where tasks are given back, functions answered and events reported: on the port's threads.
    ///   - events: The link whose thread gets the events.
    ///   - whenGone: Called on the thread of each link when the nexus was lost and nothing of it is left in the shard.
    /// - Returns: `nil` if the target's nexus table is full.
    public func establishNexus(
        initiatorPort: String, targetPort: UInt16 = 1, target: TargetDevice, port: TargetPortHandle, events: ShardLink,
        whenGone: @escaping @Sendable (ShardLink) -> Void
    ) -> LinkedNexus? {
        precondition(target.shard === shard, "a target of another shard")
        precondition(links.contains { $0 === events }, "a link of another gate")
        let nexus = LinkedNexus(target: target, port: port, gate: self, eventLink: events, whenGone: whenGone)
        let handle = unsafe TargetPortHandle(
            operations: linkOperations, context: Unmanaged.passUnretained(nexus).toOpaque())
        guard
            let identifier = target.establishNexus(
                initiatorPort: initiatorPort, targetPort: targetPort, port: handle)
        else { return nil }
        nexus.identifier = identifier
        nexuses.append(nexus)
        return nexus
    }

    /// I_T nexus loss, said by the shard's own thread: takes first what has been handed over up to now, through all
    /// links. The nexus's ports must have ended to send; `whenGone` is called as after `ShardLink.lose`.
    public func loseNexus(_ nexus: LinkedNexus) {
        precondition(!isReceiving, "a nexus is lost from within the receipt of a request")
        isReceiving = true
        for link in links { drain(link, upTo: link.requestsEnd, before: .max) }
        isReceiving = false
        lose(nexus)
    }

    private func lose(_ nexus: LinkedNexus) {
        guard !nexus.isLost else { return }
        nexus.isLost = true
        heldBack.removeAll { $0.nexus === nexus }
        nexus.target.loseNexus(nexus.identifier!)
        if nexus.tasksUnderWay == 0 { gone(nexus) }
    }

    private func gone(_ nexus: LinkedNexus) {
        // The threads of the links may let go of it at once.
        guard let index = nexuses.firstIndex(where: { $0 === nexus }) else { return }
        let held = nexuses.remove(at: index)
        held.gate = nil
        for link in links { link.notify(held, nil) }
    }

    // MARK: What comes in

    /// Takes what has arrived, `budget` requests of each link at most, save what a function has to see before it is
    /// carried out.
    ///
    /// - Returns: Whether there was anything.
    @discardableResult
    public func receive(budget: Int = 64) -> Bool {
        guard !isReceiving else { return false }
        isReceiving = true
        defer { isReceiving = false }
        var worked = false
        for link in links {
            link.ownerIsAwake()
            let position = link.requestsPosition
            let end = min(link.requestsEnd, position + budget)
            drain(link, upTo: end, before: .max)
            if link.requestsPosition != position { worked = true }
        }
        if releaseAnswers() { worked = true }
        return worked
    }

    /// Takes requests in their order, and stops at a function or loss that was sent after `stamp`.
    private func drain(_ link: ShardLink, upTo end: Int, before stamp: UInt64) {
        while link.requestsPosition < end, let request = unsafe link.firstRequest {
            if unsafe request.kind == .task {
                link.consumeRequest()
                unsafe take(request.task.unsafelyUnwrapped, request.nexus, from: link)
            } else {
                guard unsafe request.stamp < stamp else { return }
                unsafe perform(request, at: link)
            }
        }
    }

    private func take(_ head: UnsafeMutablePointer<scsi_task>, _ nexus: Unmanaged<LinkedNexus>, from link: ShardLink) {
        unsafe nexus._withUnsafeGuaranteedRef { nexus in
            let task = unsafe TaskHandle(head: head)
            guard !nexus.isLost else {
                task.respond(.aborted, .good)
                return unsafe link.giveBack(head, nexus)
            }
            nexus.tasksUnderWay += 1
            unsafe task.link = unsafe Unmanaged.passUnretained(link)
            nexus.target.receive(task, nexus: nexus.identifier!)
        }
    }

    /// A function or loss, which stands first in its link: takes all that was handed over before it through the other
    /// links, then carries it out.
    ///
    /// What was published there up to now is more than that, and nothing that must come later: another function is
    /// carried out before this one only if its stamp is lower, and then first. Such a one waits in turn for this link,
    /// but gets no further there than this one, whose stamp is higher.
    private func perform(_ request: LinkRequest, at link: ShardLink) {
        for other in links where other !== link {
            unsafe drain(other, upTo: other.requestsEnd, before: request.stamp)
        }
        link.consumeRequest()
        let nexus = unsafe request.nexus.takeUnretainedValue()
        if unsafe request.kind == .loss { return lose(nexus) }
        guard !nexus.isLost else {
            let place = unsafe ShardLink.place(request.function.cookie)
            return link.answerFunction(
                place.slot, nexus, response: TaskManagementResponse.functionRejected.rawValue, additional: 0)
        }
        unsafe nexus.target.receive(request.function, nexus: nexus.identifier!)
    }

    /// Sends what is to be told to the ports, and wakes those that sleep. The driver calls it at the end of a turn.
    public func flush() {
        for link in links { link.flushToPort() }
    }

    /// Says that the shard's thread is about to sleep.
    ///
    /// - Returns: Whether there is something to do: then it must not sleep.
    public func prepareToSleep() -> Bool {
        var hasWork = false
        for link in links where link.ownerPreparesToSleep() { hasWork = true }
        return releaseAnswers() || hasWork
    }

    // MARK: What the task engine gives back

    fileprivate static func complete(_ head: UnsafeMutablePointer<scsi_task>, _ nexus: LinkedNexus) {
        let link = unsafe TaskHandle(head: head).link.unsafelyUnwrapped
        unsafe link._withUnsafeGuaranteedRef { unsafe $0.giveBack(head, nexus) }
        nexus.tasksUnderWay -= 1
        if nexus.isLost, nexus.tasksUnderWay == 0 { nexus.gate!.gone(nexus) }
    }

    fileprivate func answer(_ cookie: UInt64, _ nexus: LinkedNexus, _ response: UInt8, _ additional: UInt32) {
        let place = ShardLink.place(cookie)
        heldBack.append(
            HeldAnswer(
                link: links[place.link], slot: place.slot, nexus: nexus, response: response, additional: additional,
                needs: links.map(\.givenBack)))
        releaseAnswers()
    }

    /// A task that a function ended was given back before the function was answered, but maybe through another link,
    /// and the port that it belongs to may not know yet. The initiator must not hear of the function first: it would
    /// take the task's memory for free.
    ///
    /// - Returns: Whether any answer went out.
    @discardableResult
    private func releaseAnswers() -> Bool {
        guard !heldBack.isEmpty else { return false }
        for link in links { link.awaitDelivery(true) }
        var released = false
        heldBack.removeAll { answer in
            let isDelivered = links.allSatisfy { link in
                link === answer.link || link.index >= answer.needs.count
                    || link.delivered &- answer.needs[link.index] >= 0
            }
            if isDelivered {
                answer.link.answerFunction(
                    answer.slot, answer.nexus, response: answer.response, additional: answer.additional)
                released = true
            }
            return isDelivered
        }
        if heldBack.isEmpty { for link in links { link.awaitDelivery(false) } }
        return released
    }
}

/// The port of all linked nexuses, as the task engine sees it. It must not move, so it is allocated once and stays.
private nonisolated(unsafe) let linkOperations: UnsafePointer<scsi_target_port_operations> = {
    let operations = UnsafeMutablePointer<scsi_target_port_operations>.allocate(capacity: 1)
    unsafe operations.initialize(
        to: scsi_target_port_operations(
            struct_size: UInt32(MemoryLayout<scsi_target_port_operations>.size),
            abi_version: SCSI_TARGET_ABI_VERSION,
            complete_task: { context, task in
                unsafe Unmanaged<LinkedNexus>.fromOpaque(context!)._withUnsafeGuaranteedRef {
                    unsafe ShardGate.complete(task!, $0)
                }
            },
            complete_task_management: { context, cookie, response, additional in
                unsafe Unmanaged<LinkedNexus>.fromOpaque(context!)._withUnsafeGuaranteedRef {
                    $0.gate!.answer(cookie, $0, response, additional)
                }
            },
            report_event: { context, event in
                unsafe Unmanaged<LinkedNexus>.fromOpaque(context!)._withUnsafeGuaranteedRef {
                    unsafe $0.eventLink.notify($0, event!.pointee)
                }
            }))
    return unsafe UnsafePointer(operations)
}()
