// ShardLink: how ports on one thread use the targets of a shard on another: the port's side.
//
// Owns: the rings between the two threads, and which task management functions are under way. Called by: fronts, on the
// port's thread; ShardGate, on the shard's thread. Must not know: transports, what threads and reactors are.
//
//     port's thread                                             shard's thread
//     ShardLink.send ──── requests: tasks, functions, losses ──► ShardGate.receive ──► TargetDevice
//     ShardLink.receive ◄── answers: tasks, functions ────────── LinkedNexus's port ◄── TargetDevice
//                       ◄── notices: events, nexuses gone ──────
//
// Nothing is ever lost and nobody waits: a link takes no more tasks than the ring back to the port has room for, so a
// task that was taken can be given back; what is not taken stays with the front, which tries again.

public import CTarget
import Synchronization

/// How one thread wakes the other that drives the far end of a link. Called only if that one sleeps.
@safe
public struct ShardWaker: @unchecked Sendable {
    /// The function.
    public typealias Function = @convention(c) (UnsafeMutableRawPointer) -> Void
    private let function: Function
    private let context: UnsafeMutableRawPointer

    /// Wakes by calling `function` with `context`, from any thread; both stay valid as long as the link is used.
    public init(_ function: Function, context: UnsafeMutableRawPointer) {
        unsafe self.function = unsafe function
        unsafe self.context = unsafe context
    }

    func wake() { unsafe function(context) }
}

/// Tells a thread that sleeps from one that will look anyway.
///
/// A consumer that is about to sleep raises the flag and then looks at its rings once more; a producer publishes and
/// then looks at the flag. Both do so with a fence between, so at least one of them sees the other.
@safe
final class SleepFlag: Sendable {
    private let isRaised = Atomic<Bool>(false)

    init() {}

    /// The consumer: it is going to sleep unless it has seen work.
    func raise() {
        isRaised.store(true, ordering: .relaxed)
        atomicMemoryFence(ordering: .sequentiallyConsistent)
    }

    /// The consumer: it is awake.
    func lower() {
        if isRaised.load(ordering: .relaxed) { isRaised.store(false, ordering: .relaxed) }
    }

    /// The producer, after it has published: whether it is the one who must wake the consumer.
    func take() -> Bool {
        atomicMemoryFence(ordering: .sequentiallyConsistent)
        guard isRaised.load(ordering: .relaxed) else { return false }
        return isRaised.exchange(false, ordering: .relaxed)
    }
}

/// What goes from a port to a shard.
@unsafe
struct LinkRequest: BitwiseCopyable {
    enum Kind: UInt8 { case task, function, loss }
    let kind: Kind
    let nexus: Unmanaged<LinkedNexus>
    /// The order of functions and losses over all links of a gate: taken when the port began to send it.
    let stamp: UInt64
    let task: UnsafeMutablePointer<scsi_task>?
    let function: scsi_task_management_request
}

/// What comes back for it.
@unsafe
struct LinkAnswer: BitwiseCopyable {
    let nexus: Unmanaged<LinkedNexus>
    /// The task that is given back; `nil`: the answer to a function.
    let task: UnsafeMutablePointer<scsi_task>?
    let function: FunctionSlot
    let response: UInt8
    let additional: UInt32
}

/// What comes unasked.
@unsafe
struct LinkNotice: BitwiseCopyable {
    /// Retained for the entry; the consumer lets go of it.
    let nexus: Unmanaged<LinkedNexus>
    /// `nil`: the nexus was lost, and nothing of it is left.
    let event: scsi_target_event?
}

/// Names one task management function under way in a link.
struct FunctionSlot: BitwiseCopyable, Equatable {
    let index: UInt16
    /// Told apart from the slot's earlier functions, whose nexus is gone.
    let generation: UInt32
}

/// The two-way connection of one port's thread with one shard's thread.
///
/// All public functions are called on the port's thread.
@safe
public final class ShardLink: @unchecked Sendable {
    /// Tasks that may be under way in the link at a time.
    public let capacity: Int
    private let requests: HandoverRing<LinkRequest>
    private let answers: HandoverRing<LinkAnswer>
    private let notices: HandoverRing<LinkNotice>
    private let ownerSleeps = SleepFlag()
    private let portSleeps = SleepFlag()
    private let wakeOwner: ShardWaker
    private let wakePort: ShardWaker
    private let stamps: StampCounter
    /// Set while the shard's thread holds answers back until what it has given back is delivered.
    private let deliveryAwaited = Atomic<Bool>(false)
    /// Set while the shard's thread has notices for which there was no room.
    private let roomAwaited = Atomic<Bool>(false)

    // The port's thread's own.
    private var tasksUnderWay = 0
    private var hasSent = false
    private let functions: UnsafeMutablePointer<Function>
    private var functionsFree: [UInt16]
    private var isReceiving = false

    // The shard's thread's own.
    private var hasAnswered = false
    /// Notices for which there was no room.
    private var deferred: [(nexus: LinkedNexus, event: scsi_target_event?)] = []
    /// The link's number in its gate.
    let index: Int

    private struct Function {
        var nexus: LinkedNexus?
        var cookie: UInt64 = 0
        var generation: UInt32 = 0
    }

    /// Made by a gate.
    init(capacity: Int, index: Int, stamps: StampCounter, wakeOwner: ShardWaker, wakePort: ShardWaker) {
        precondition(capacity > 0 && capacity <= Limits.tasksPerLink)
        self.capacity = capacity
        self.index = index
        self.stamps = stamps
        self.wakeOwner = wakeOwner
        self.wakePort = wakePort
        // A task or a function has one entry at a time in each direction.
        unsafe requests = HandoverRing(atLeast: capacity + Limits.functionsPerLink + Limits.lossesPerLink)
        // One more: an answer keeps its place until it is delivered, and in between its task may be sent again.
        unsafe answers = HandoverRing(atLeast: capacity + Limits.functionsPerLink + 1)
        unsafe notices = HandoverRing(atLeast: Limits.noticesPerLink)
        unsafe functions = .allocate(capacity: Limits.functionsPerLink)
        unsafe functions.initialize(repeating: Function(), count: Limits.functionsPerLink)
        functionsFree = (0..<UInt16(Limits.functionsPerLink)).reversed()
    }

    deinit {
        precondition(tasksUnderWay == 0, "a link went away with tasks under way")
        while let notice = unsafe notices.first {
            unsafe notice.nexus.release()
            unsafe notices.consume()
        }
        unsafe functions.deinitialize(count: Limits.functionsPerLink)
        unsafe functions.deallocate()
    }

    // MARK: The port's thread: sending

    /// Whether a task would be taken.
    @inline(__always)
    public var hasRoom: Bool { tasksUnderWay < capacity }

    /// Tasks that were sent and have not come back.
    public var tasksInFlight: Int { tasksUnderWay }

    /// Hands over a free task whose command is filled. It is given back by `complete_task` of the nexus's port, from
    /// within `receive`, exactly once.
    ///
    /// - Returns: `false` if the link is full: the task is still the front's, which tries again after `receive`.
    public func send(_ task: TaskHandle, nexus: LinkedNexus) -> Bool {
        guard hasRoom else { return false }
        tasksUnderWay += 1
        unsafe push(
            LinkRequest(
                kind: .task, nexus: Unmanaged.passUnretained(nexus), stamp: 0, task: task.head,
                function: scsi_task_management_request()))
        return true
    }

    /// Hands over a task management function. It is carried out after all tasks that were handed over before it through
    /// any link of the shard's gate. It is answered by `complete_task_management` of the nexus's port, from within
    /// `receive`, when all tasks that it ended have been given to their ports, on whatever thread.
    ///
    /// - Returns: `false` if too many are under way: the front tries again later, or rejects it.
    public func send(_ request: scsi_task_management_request, nexus: LinkedNexus) -> Bool {
        let stamp = stamps.next()
        guard let index = functionsFree.popLast() else { return false }
        unsafe functions[Int(index)].nexus = nexus
        unsafe functions[Int(index)].cookie = request.cookie
        unsafe functions[Int(index)].generation &+= 1
        var request = request
        request.cookie = unsafe Self.cookie(
            link: self.index, FunctionSlot(index: index, generation: functions[Int(index)].generation))
        unsafe push(
            LinkRequest(
                kind: .function, nexus: Unmanaged.passUnretained(nexus), stamp: stamp, task: nil, function: request))
        return true
    }

    /// I_T nexus loss, after all tasks of the nexus that were handed over before it. The nexus's tasks come back, its
    /// functions are not answered, save those whose answer is on its way, and then `whenGone` of the nexus is called on
    /// the thread of each link. A task that is handed over later comes back aborted.
    ///
    /// - Returns: `false` if too many losses are under way: the front tries again after the owner has run.
    public func lose(_ nexus: LinkedNexus) -> Bool {
        let stamp = stamps.next()
        // What tasks and functions may still need is not for losses.
        let kept = capacity - tasksUnderWay + functionsFree.count
        guard unsafe requests.room > kept else { return false }
        unsafe push(
            LinkRequest(
                kind: .loss, nexus: Unmanaged.passUnretained(nexus), stamp: stamp, task: nil,
                function: scsi_task_management_request()))
        return true
    }

    private func push(_ request: LinkRequest) {
        let pushed = unsafe requests.push(request)
        precondition(pushed, "a link took more than its ring has room for")
        hasSent = true
    }

    /// Wakes the shard's thread if it sleeps and something was sent. The driver calls it at the end of a turn.
    public func flush() {
        guard hasSent else { return }
        hasSent = false
        if ownerSleeps.take() { wakeOwner.wake() }
    }

    // MARK: The port's thread: receiving

    /// Gives what has come back to the ports.
    ///
    /// - Returns: Whether there was anything.
    @discardableResult
    public func receive() -> Bool {
        portSleeps.lower()
        guard !isReceiving else { return false }
        isReceiving = true
        defer { isReceiving = false }
        // A notice is given out after the answers that were published before it.
        let noticesEnd = unsafe notices.publishedEnd
        var worked = false
        let answersEnd = unsafe answers.publishedEnd
        while unsafe answers.position != answersEnd, let answer = unsafe answers.first {
            unsafe deliver(answer)
            // Only now: functions are answered when what they ended is delivered.
            unsafe answers.consume()
            worked = true
        }
        if worked, isAwaited(deliveryAwaited) { hasSent = true }
        let hasNotices = unsafe notices.position != noticesEnd
        while unsafe notices.position != noticesEnd, let notice = unsafe notices.first {
            unsafe notices.consume()
            unsafe deliver(notice)
        }
        if hasNotices, isAwaited(roomAwaited) { hasSent = true }
        return worked || hasNotices
    }

    /// Whether the shard's thread waits for what was taken from a ring here. It says so before it looks at how far that
    /// is, and here it is asked after the taking: one of the two sees the other.
    private func isAwaited(_ flag: borrowing Atomic<Bool>) -> Bool {
        atomicMemoryFence(ordering: .sequentiallyConsistent)
        return flag.load(ordering: .relaxed)
    }

    private func deliver(_ answer: LinkAnswer) {
        if let head = unsafe answer.task {
            tasksUnderWay -= 1
            unsafe TaskHandle(head: head).link = nil
            unsafe answer.nexus._withUnsafeGuaranteedRef { unsafe $0.port.complete(head) }
        } else if let cookie = unsafe release(answer.function) {
            unsafe answer.nexus._withUnsafeGuaranteedRef {
                unsafe $0.port.completeTaskManagement(
                    cookie: cookie, response: answer.response, additional: answer.additional)
            }
        }
    }

    private func deliver(_ notice: LinkNotice) {
        let nexus = unsafe notice.nexus.takeRetainedValue()
        if let event = unsafe notice.event { return nexus.port.report(event) }
        for index in 0..<UInt16(Limits.functionsPerLink) where unsafe functions[Int(index)].nexus === nexus {
            _ = release(unsafe FunctionSlot(index: index, generation: functions[Int(index)].generation))
        }
        nexus.whenGone(self)
    }

    /// The front's cookie of a function that has ended; `nil` if its nexus was gone before.
    private func release(_ slot: FunctionSlot) -> UInt64? {
        let entry = unsafe functions + Int(slot.index)
        guard unsafe entry.pointee.nexus != nil, unsafe entry.pointee.generation == slot.generation else { return nil }
        unsafe entry.pointee.nexus = nil
        functionsFree.append(slot.index)
        return unsafe entry.pointee.cookie
    }

    /// Says that the port's thread is about to sleep.
    ///
    /// - Returns: Whether there is something to receive: then it must not sleep.
    public func prepareToSleep() -> Bool {
        portSleeps.raise()
        guard unsafe answers.isEmpty, unsafe notices.isEmpty else {
            portSleeps.lower()
            return true
        }
        return false
    }

    // MARK: The shard's thread

    /// The position behind the last request that was published at this moment.
    var requestsEnd: Int { unsafe requests.publishedEnd }
    var requestsPosition: Int { unsafe requests.position }
    var firstRequest: LinkRequest? { unsafe requests.first }
    func consumeRequest() { unsafe requests.consume() }

    /// What was given back to the port until now, as a position, and how far it is delivered.
    var givenBack: Int { unsafe answers.pushedEnd }
    var delivered: Int { unsafe answers.consumedEnd }

    func awaitDelivery(_ isAwaited: Bool) { say(isAwaited, deliveryAwaited) }

    private func say(_ isAwaited: Bool, _ flag: borrowing Atomic<Bool>) {
        guard flag.load(ordering: .relaxed) != isAwaited else { return }
        flag.store(isAwaited, ordering: .relaxed)
        if isAwaited { atomicMemoryFence(ordering: .sequentiallyConsistent) }
    }

    func ownerIsAwake() { ownerSleeps.lower() }

    /// Whether there is something to do for the shard's thread, which is about to sleep.
    func ownerPreparesToSleep() -> Bool {
        ownerSleeps.raise()
        let hasRoomForDeferred = unsafe !deferred.isEmpty && notices.room > 0
        guard unsafe requests.isEmpty, !hasRoomForDeferred else {
            ownerSleeps.lower()
            return true
        }
        return false
    }

    func giveBack(_ task: UnsafeMutablePointer<scsi_task>, _ nexus: LinkedNexus) {
        unsafe answer(
            LinkAnswer(
                nexus: Unmanaged.passUnretained(nexus), task: task, function: FunctionSlot(index: 0, generation: 0),
                response: 0, additional: 0))
    }

    func answerFunction(_ slot: FunctionSlot, _ nexus: LinkedNexus, response: UInt8, additional: UInt32) {
        unsafe answer(
            LinkAnswer(
                nexus: Unmanaged.passUnretained(nexus), task: nil, function: slot, response: response,
                additional: additional))
    }

    private func answer(_ answer: LinkAnswer) {
        let pushed = unsafe answers.push(answer)
        precondition(pushed, "a link has more answers than tasks and functions")
        hasAnswered = true
    }

    /// Tells the port; at once if there is room, else by `flushToPort`. An event that is waiting already is not told
    /// twice, and past a bound all that is told is that events were missed.
    func notify(_ nexus: LinkedNexus, _ event: scsi_target_event?) {
        if deferred.isEmpty, push(nexus, event) { return }
        guard var event else { return deferred.append((nexus, nil)) }
        guard !deferred.contains(where: { $0.nexus === nexus && $0.event?.isSame(as: event) == true }) else { return }
        if deferred.count >= Limits.noticesPerLink {
            event = .missed
            guard !deferred.contains(where: { $0.nexus === nexus && $0.event?.isSame(as: event) == true }) else {
                return
            }
        }
        deferred.append((nexus, event))
    }

    private func push(_ nexus: LinkedNexus, _ event: scsi_target_event?) -> Bool {
        let held = unsafe Unmanaged.passRetained(nexus)
        guard unsafe notices.push(LinkNotice(nexus: held, event: event)) else {
            unsafe held.release()
            return false
        }
        hasAnswered = true
        return true
    }

    /// Sends what found no room, and wakes the port's thread if it sleeps and something was sent.
    func flushToPort() {
        while let next = deferred.first, push(next.nexus, next.event) { deferred.removeFirst() }
        // The port's thread wakes this one when it has made room; `ownerPreparesToSleep` looks once more.
        say(!deferred.isEmpty, roomAwaited)
        guard hasAnswered else { return }
        hasAnswered = false
        if portSleeps.take() { wakePort.wake() }
    }

    // MARK: Cookies

    /// The cookie of a function on the shard's side: where its answer goes.
    private static func cookie(link: Int, _ slot: FunctionSlot) -> UInt64 {
        UInt64(link) << 48 | UInt64(slot.index) << 32 | UInt64(slot.generation)
    }

    static func place(_ cookie: UInt64) -> (link: Int, slot: FunctionSlot) {
        let slot = FunctionSlot(
            index: UInt16(truncatingIfNeeded: cookie >> 32), generation: UInt32(truncatingIfNeeded: cookie))
        return (Int(cookie >> 48), slot)
    }
}

/// Numbers functions over all links of a gate.
final class StampCounter: Sendable {
    private let last = Atomic<UInt64>(0)

    init() {}

    func next() -> UInt64 { last.wrappingAdd(1, ordering: .sequentiallyConsistent).newValue }
}

extension scsi_target_event {
    /// Events were lost: the initiator must look at everything.
    static var missed: scsi_target_event {
        var event = scsi_target_event()
        event.struct_size = UInt32(MemoryLayout<scsi_target_event>.size)
        event.kind = UInt8(SCSI_EVENT_EVENTS_MISSED)
        return event
    }

    func isSame(as other: scsi_target_event) -> Bool {
        kind == other.kind && additional_sense_code == other.additional_sense_code
            && additional_sense_code_qualifier == other.additional_sense_code_qualifier
            && LUN.field(lun) == LUN.field(other.lun)
    }
}
