// Reactor: one thread, one wait. Everything the data plane does happens in a turn of a reactor.
//
//   drain completions and descriptors → mailbox → timers → poll each source → flush each source → submit I/O once
//   → sleep, if there was nothing to do for a while
//
// Owns: the engine, the descriptors' table, the mailbox, the timers, the work sources, the helper threads.
// Called by: fronts, backstores, the daemon, embedders. Must not know: SCSI.

public import CLinux
import Glibc
import Synchronization

/// Names one work source.
public struct WorkSourceToken: Sendable, Equatable {
    let number: UInt64
}

/// One thread's event loop: file descriptors, timers, posted messages, polled work sources and asynchronous I/O.
///
/// All but `init`, `post` and `stop` is called on the one thread that calls `run` or `turn`, or on the creating thread
/// before the first turn. Context pointers are not retained: whoever registers outlives the registration.
@safe
public final class Reactor: @unchecked Sendable {
    /// Called with the context and the EPOLL bits that are set. Level-triggered: called again until it has drained.
    public typealias DescriptorHandler = @convention(c) (UnsafeMutableRawPointer, UInt32) -> Void
    /// Called with the context at the timer's time.
    public typealias TimerHandler = @convention(c) (UnsafeMutableRawPointer) -> Void

    /// Something that is looked at in every turn: a virtqueue, a ring, a backstore that completes from a list.
    @safe
    public struct WorkSource {
        /// Does a bounded amount of work; `true` if it did any.
        public typealias Poll = @convention(c) (UnsafeMutableRawPointer) -> Bool
        /// End of a turn: one notification a turn goes here.
        public typealias Flush = @convention(c) (UnsafeMutableRawPointer) -> Void

        let poll: Poll
        let flush: Flush
        let prepareToSleep: Poll
        let context: UnsafeMutableRawPointer

        /// - Parameters:
        ///   - poll: Does a bounded amount of work; returns whether it did any. A source that had asked its peer for
        ///     notifications turns them off at its next poll that finds work.
        ///   - flush: Called at the end of each turn.
        ///   - prepareToSleep: Asks the peer for notifications and looks again; `true` if work arrived meanwhile.
        ///   - context: The first argument of all three.
        public init(
            poll: Poll, flush: Flush, prepareToSleep: Poll, context: UnsafeMutableRawPointer
        ) {
            unsafe self.poll = poll
            unsafe self.flush = flush
            unsafe self.prepareToSleep = prepareToSleep
            unsafe self.context = context
        }
    }

    /// The kernel interface in use.
    public let engine: ActiveEngine

    private let uring: UringEngine?
    private let aio: AIOEngine?
    private var descriptors: DescriptorTable
    private var timers = TimerHeap()
    private let sources = WorkSourceList()
    private let helpers: HelperThreads
    private let wakeDescriptor: Int32

    private let mailbox = Locked<[@Sendable () -> Void]>([])
    private let hasMail = Atomic<Bool>(false)
    private let isStopping = Atomic<Bool>(false)

    private let ioDepth: Int
    private let pollNanoseconds: UInt64
    private var ownerThread: pthread_t = 0
    private var time: UInt64 = 0
    private var lastWork: UInt64 = 0
    /// When the turn began, and whether it has found work.
    private var turnBegan: UInt64 = 0
    private var didWork = false
    private var clockHandler: (handler: TimerHandler, context: UnsafeMutableRawPointer)?
    private var ioInFlight = 0
    /// Completions that the engine did not deliver itself: operations that the kernel refused at submission.
    private var deferred = IORequestList()
    /// Whether the descriptor set may hold events that its poll will not announce again: a level-triggered descriptor
    /// stays ready without another wake-up, so the set is asked until it says that nothing is ready.
    private var mayHaveEvents = true
    /// Events that libaio's wait has brought, for the next turn.
    private var fetchedEvents = 0
    private var isPollArmed = false
    private var turnsToDescriptors = 0
    private var lacksAsynchronousSync = false
    private var counters = Statistics()

    /// How many busy turns libaio's loop goes without a system call that looks at the descriptors. Fronts see their
    /// kicks by polling; what stands in descriptors only is control traffic.
    private static let turnsBetweenDescriptors = 32
    /// How long to sleep at most if the kernel was out of room for submissions.
    private static let retryNanoseconds: UInt64 = 1_000_000

    /// Creates a reactor. Its thread is the one that makes the first turn.
    public init(_ configuration: Configuration) throws(ReactorError) {
        guard (1...ReactorLimits.ioDepth).contains(configuration.ioDepth) else {
            throw .invalidConfiguration(
                "I/O depth \(configuration.ioDepth) is not in 1...\(ReactorLimits.ioDepth); choose one that is")
        }
        guard (0...1_000_000).contains(configuration.pollMicroseconds) else {
            throw .invalidConfiguration(
                "\(configuration.pollMicroseconds) µs of polling is not in 0...1000000; choose a value that is")
        }
        ioDepth = configuration.ioDepth
        pollNanoseconds = UInt64(configuration.pollMicroseconds) * 1000
        let wakeDescriptor = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
        guard wakeDescriptor >= 0 else { throw .systemCall("eventfd", errno: errno) }
        self.wakeDescriptor = wakeDescriptor
        do {
            descriptors = try DescriptorTable()
            helpers = try HelperThreads(wakeDescriptor: wakeDescriptor)
        } catch {
            close(wakeDescriptor)
            throw error
        }
        do {
            (uring, aio) = try Self.startEngine(configuration)
        } catch {
            helpers.stop()
            close(wakeDescriptor)
            throw error
        }
        engine = uring != nil ? .ioUring : .libaio
        time = Self.clock()
        try watchOwnDescriptors()
    }

    private static func startEngine(
        _ configuration: Configuration
    ) throws(ReactorError) -> (UringEngine?, AIOEngine?) {
        switch configuration.engine {
        case .ioUring: return (try UringEngine(depth: configuration.ioDepth), nil)
        case .libaio: return (nil, try AIOEngine(depth: configuration.ioDepth))
        case .automatic:
            do {
                return (try UringEngine(depth: configuration.ioDepth), nil)
            } catch {
                guard case .engineUnavailable(_, _, let ringError) = error else { throw error }
                do {
                    return (nil, try AIOEngine(depth: configuration.ioDepth))
                } catch {
                    guard case .engineUnavailable(_, _, let aioError) = error else { throw error }
                    throw .noEngine(ioUring: ringError, libaio: aioError)
                }
            }
        }
    }

    private func watchOwnDescriptors() throws(ReactorError) {
        let drain: DescriptorHandler = { context, _ in
            drainEventDescriptor(Int32(Int(bitPattern: context)) - 1)
        }
        // The context is the descriptor itself, plus one so that it is never null.
        _ = try unsafe watch(wakeDescriptor, events: EPOLLIN.rawValue, drain, Self.asContext(wakeDescriptor))
        if let aio {
            _ = try unsafe watch(
                aio.eventDescriptor, events: EPOLLIN.rawValue, drain, Self.asContext(aio.eventDescriptor))
        }
    }

    private static func asContext(_ descriptor: Int32) -> UnsafeMutableRawPointer {
        unsafe UnsafeMutableRawPointer(bitPattern: Int(descriptor) + 1)!
    }

    deinit {
        precondition(ioInFlight == 0, "a reactor went away with I/O in flight; drain it first")
        helpers.stop()
        uring?.destroy()
        aio?.destroy()
        close(wakeDescriptor)
    }

    // MARK: Any thread

    /// Runs `message` on the reactor's thread, in the order of the calls. Wakes the thread.
    public func post(_ message: @escaping @Sendable () -> Void) {
        mailbox.withLock {
            precondition($0.count < ReactorLimits.messages, "the mailbox of a reactor is full")
            $0.append(message)
            hasMail.store(true, ordering: .releasing)
        }
        wake(wakeDescriptor)
    }

    /// Makes `run` return after the current turn and the completion of the I/O in flight.
    public func stop() {
        isStopping.store(true, ordering: .releasing)
        wake(wakeDescriptor)
    }

    // MARK: The owner thread

    /// Makes turns until `stop` is called, then waits for the I/O in flight.
    public func run() {
        while !isStopping.load(ordering: .acquiring) { turn(mayWait: true) }
        drain()
        isStopping.store(false, ordering: .relaxed)
    }

    /// Waits until no I/O is in flight, delivering completions and nothing else. Completions may submit more I/O.
    public func drain() {
        while ioInFlight > 0 {
            beginTurn()
            _ = deliverCompletions()
            _ = submit()
            if ioInFlight > 0 && deferred.isEmpty { waitForIO() }
        }
    }

    /// Sleeps until an I/O completion, whatever other descriptors are ready.
    private func waitForIO() {
        if let uring {
            uring.wait(nanoseconds: isPollArmed ? nil : Self.retryNanoseconds)
        } else if let aio {
            var waited = [
                pollfd(fd: wakeDescriptor, events: Int16(POLLIN), revents: 0),
                pollfd(fd: aio.eventDescriptor, events: Int16(POLLIN), revents: 0),
            ]
            _ = unsafe Glibc.poll(&waited, 2, aio.hasQueued ? 1 : -1)
            drainEventDescriptor(wakeDescriptor)
            drainEventDescriptor(aio.eventDescriptor)
        }
    }

    /// CLOCK_MONOTONIC in nanoseconds, read once at the beginning of a turn.
    public var now: UInt64 { time }

    /// I/O requests in flight.
    public var requestsInFlight: Int { ioInFlight }

    /// What was counted so far.
    public var statistics: Statistics { counters }

    /// Makes one turn.
    ///
    /// - Parameter mayWait: Whether the thread may sleep at the end if there was nothing to do for the polling time. A
    ///   turn that slept ends then; the next one finds what woke it.
    public func turn(mayWait: Bool) {
        beginTurn()
        didWork = deliverCompletions()
        if handleDescriptors() { didWork = true }
        if runMessages() { didWork = true }
        if fireTimers() { didWork = true }
        if sources.poll() { didWork = true }
        sources.flush()
        if submit() { didWork = true }
        if didWork {
            lastWork = time
            return
        }
        guard mayWait, !isStopping.load(ordering: .relaxed) else { return }
        if time &- lastWork < pollNanoseconds && (ioInFlight > 0 || !sources.isEmpty) { return }
        if sources.prepareToSleep() || !deferred.isEmpty { return }
        wait(until: timers.earliest)
    }

    private func beginTurn() {
        let thread = pthread_self()
        if thread != ownerThread {
            precondition(ownerThread == 0, "a reactor's turns are made by one thread; this is another")
            ownerThread = thread
            uring?.enable()
        }
        counters.turns &+= 1
        time = Self.clock()
        if didWork { counters.busyNanoseconds &+= time &- turnBegan }
        didWork = false
        turnBegan = time
        if let clockHandler = unsafe clockHandler { unsafe clockHandler.handler(clockHandler.context) }
    }

    /// Has `handler` called at the beginning of each turn, when `now` has been read and before anything else: whoever
    /// keeps a clock of its own sets it there.
    public func onTurn(_ handler: TimerHandler, _ context: UnsafeMutableRawPointer) {
        unsafe clockHandler = unsafe (handler: handler, context: context)
    }

    private static func clock() -> UInt64 {
        var time = timespec()
        unsafe clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }

    private func deliverCompletions() -> Bool {
        var didWork = false
        while let request = unsafe deferred.popFirst() {
            unsafe complete(request, request.pointee.result)
            didWork = true
        }
        while let request = unsafe helpers.popDone() {
            unsafe complete(request, request.pointee.result)
            didWork = true
        }
        var completion = clinux_completion()
        if let uring {
            var budget = uring.ready()
            while budget > 0, uring.next(&completion) {
                budget -= 1
                didWork = true
                if completion.data == UringEngine.pollData {
                    mayHaveEvents = true
                    if completion.flags & UInt32(IORING_CQE_F_MORE) == 0 { isPollArmed = false }
                } else {
                    unsafe complete(Self.request(completion.data), Int(completion.result))
                }
            }
        } else if let aio {
            var budget = ioInFlight
            while budget > 0, aio.next(&completion) {
                budget -= 1
                didWork = true
                unsafe complete(Self.request(completion.data), Int(completion.result))
            }
        }
        return didWork
    }

    @inline(__always)
    private static func request(_ data: UInt64) -> UnsafeMutablePointer<IORequest> {
        unsafe UnsafeMutablePointer(bitPattern: UInt(data))!
    }

    @inline(__always)
    private func complete(_ request: UnsafeMutablePointer<IORequest>, _ result: Int) {
        if unsafe request.pointee.isAsynchronousSync && result == -Int(EINVAL) {
            // libaio: this file system has no asynchronous fdatasync (or the kernel is older than 4.18).
            lacksAsynchronousSync = true
            unsafe request.pointee.isAsynchronousSync = false
            unsafe offloadSynchronize(request)
            return
        }
        ioInFlight -= 1
        unsafe request.pointee.completion(request, result)
    }

    private func handleDescriptors() -> Bool {
        if uring == nil {
            turnsToDescriptors -= 1
            if turnsToDescriptors > 0 && !mayHaveEvents && fetchedEvents == 0 { return false }
            turnsToDescriptors = Self.turnsBetweenDescriptors
        } else if !mayHaveEvents {
            return false
        }
        let count = fetchedEvents > 0 ? fetchedEvents : descriptors.fetch(milliseconds: 0)
        fetchedEvents = 0
        mayHaveEvents = count > 0
        for number in 0..<count {
            // Looked up one by one: a handler may remove a descriptor whose event was fetched with its own.
            if let target = unsafe descriptors.target(number) { unsafe target.handler(target.context, target.events) }
        }
        return count > 0
    }

    private func runMessages() -> Bool {
        guard hasMail.load(ordering: .acquiring) else { return false }
        let messages = mailbox.withLock { waiting in
            hasMail.store(false, ordering: .relaxed)
            let messages = waiting
            waiting = []
            return messages
        }
        for message in messages { message() }
        return true
    }

    private func fireTimers() -> Bool {
        // At most those that are set now: one that sets itself again for the same time must not hold the turn.
        var budget = timers.count
        var didWork = false
        while budget > 0, let timer = unsafe timers.popDue(time) {
            unsafe timer.handler(timer.context)
            budget -= 1
            didWork = true
        }
        return didWork
    }

    /// Hands queued I/O to the kernel; `true` if there was any.
    private func submit() -> Bool {
        let didSubmit: Bool
        if let uring {
            if !isPollArmed { isPollArmed = uring.pollDescriptors(descriptors.epoll) }
            didSubmit = uring.submit()
        } else if let aio, aio.hasQueued {
            didSubmit = unsafe aio.submit { request, result in
                unsafe request.pointee.result = result
                unsafe deferred.append(request)
            }
        } else {
            return false
        }
        if didSubmit { counters.submissions &+= 1 }
        return didSubmit
    }

    private func wait(until deadline: UInt64?) {
        // A handler that left its level-triggered descriptor ready would not wake us.
        guard !mayHaveEvents else { return }
        var nanoseconds: UInt64?
        if let deadline {
            time = Self.clock()
            guard deadline > time else { return }
            nanoseconds = deadline - time
        }
        counters.waits &+= 1
        if let uring {
            // A poll that could not be queued is tried again soon.
            if !isPollArmed { nanoseconds = min(nanoseconds ?? .max, Self.retryNanoseconds) }
            uring.wait(nanoseconds: nanoseconds)
            return
        }
        if let aio, aio.hasQueued { nanoseconds = min(nanoseconds ?? .max, Self.retryNanoseconds) }
        // Rounded up: to wake a little before the time would only mean to spin until it.
        let milliseconds = nanoseconds.map { Int32(clamping: ($0 + 999_999) / 1_000_000) } ?? -1
        fetchedEvents = descriptors.fetch(milliseconds: milliseconds)
    }

    // MARK: File descriptors

    /// Watches a file descriptor for EPOLL bits, level-triggered. The descriptor stays the caller's; unwatch it before
    /// closing it.
    public func watch(
        _ descriptor: Int32, events: UInt32, _ handler: DescriptorHandler, _ context: UnsafeMutableRawPointer
    ) throws(ReactorError) -> DescriptorToken {
        // What is ready already may have woken nobody.
        mayHaveEvents = true
        return try unsafe descriptors.add(descriptor, events: events, handler, context)
    }

    /// Watches for other EPOLL bits; 0 for none but EPOLLHUP and EPOLLERR, which always come.
    public func change(_ token: DescriptorToken, events: UInt32) {
        mayHaveEvents = true
        descriptors.change(token, events: events)
    }

    /// Stops watching. The handler is never called again, not even later in this turn.
    public func unwatch(_ token: DescriptorToken) { descriptors.remove(token) }

    // MARK: Work sources

    /// Adds a source. It is polled from this turn on.
    public func add(_ source: WorkSource) -> WorkSourceToken { sources.add(source) }

    /// Removes a source. None of its functions is called again, not even later in this turn.
    public func remove(_ token: WorkSourceToken) { sources.remove(token) }

    // MARK: Timers

    /// Calls `handler` once when `now` has reached `time`, in nanoseconds.
    public func setTimer(at time: UInt64, _ handler: TimerHandler, _ context: UnsafeMutableRawPointer) -> TimerToken {
        unsafe timers.set(at: time, handler, context)
    }

    /// Forgets a timer; one that has gone off already is no error.
    public func cancel(_ token: TimerToken) { timers.cancel(token) }

    // MARK: I/O

    @inline(__always)
    private func reserve(_ request: UnsafeMutablePointer<IORequest>) -> Bool {
        guard ioInFlight < ioDepth else {
            counters.refused &+= 1
            return false
        }
        ioInFlight += 1
        counters.requests &+= 1
        unsafe request.pointee.isAsynchronousSync = false
        return true
    }

    /// A submission queue that the kernel does not empty now: as if the reactor were full.
    private func release() -> Bool {
        ioInFlight -= 1
        counters.requests &-= 1
        counters.refused &+= 1
        return false
    }

    /// preadv of a range into segments, which stay valid until the completion. Its result: bytes read, perhaps fewer.
    ///
    /// - Returns: `false` if the reactor is full; try again after a completion.
    @inline(__always)
    public func read(
        _ request: UnsafeMutablePointer<IORequest>, descriptor: Int32, _ segments: UnsafePointer<iovec>, count: Int,
        offset: UInt64
    ) -> Bool {
        guard unsafe reserve(request) else { return false }
        if let uring { return unsafe uring.read(request, descriptor, segments, count, offset) || release() }
        unsafe aio!.queue(request, opcode: IO_CMD_PREADV, descriptor, segments, count, offset, 0)
        return true
    }

    /// pwritev2 of segments, which stay valid until the completion, with `RWF_DSYNC` or 0. Its result: bytes written,
    /// perhaps fewer.
    ///
    /// - Returns: `false` if the reactor is full; try again after a completion.
    @inline(__always)
    public func write(
        _ request: UnsafeMutablePointer<IORequest>, descriptor: Int32, _ segments: UnsafePointer<iovec>, count: Int,
        offset: UInt64, flags: Int32
    ) -> Bool {
        guard unsafe reserve(request) else { return false }
        if let uring { return unsafe uring.write(request, descriptor, segments, count, offset, flags) || release() }
        unsafe aio!.queue(request, opcode: IO_CMD_PWRITEV, descriptor, segments, count, offset, flags)
        return true
    }

    /// fdatasync.
    ///
    /// - Returns: `false` if the reactor is full; try again after a completion.
    public func synchronizeData(_ request: UnsafeMutablePointer<IORequest>, descriptor: Int32) -> Bool {
        guard unsafe reserve(request) else { return false }
        if let uring { return unsafe uring.synchronizeData(request, descriptor) || release() }
        unsafe request.pointee.descriptor = descriptor
        if lacksAsynchronousSync {
            unsafe offloadSynchronize(request)
        } else {
            unsafe request.pointee.isAsynchronousSync = true
            unsafe aio!.queue(request, opcode: IO_CMD_FDSYNC, descriptor, nil, 0, 0, 0)
        }
        return true
    }

    private func offloadSynchronize(_ request: UnsafeMutablePointer<IORequest>) {
        unsafe request.pointee.function = { context in
            let request = unsafe context.assumingMemoryBound(to: IORequest.self)
            return unsafe fdatasync(request.pointee.descriptor) == 0 ? 0 : -Int(errno)
        }
        unsafe helpers.add(request)
    }

    /// fallocate with the FALLOC_FL bits `mode`.
    ///
    /// - Returns: `false` if the reactor is full; try again after a completion.
    public func allocate(
        _ request: UnsafeMutablePointer<IORequest>, descriptor: Int32, mode: Int32, offset: UInt64, length: UInt64
    ) -> Bool {
        guard unsafe reserve(request) else { return false }
        if let uring { return unsafe uring.allocate(request, descriptor, mode, offset, length) || release() }
        unsafe request.pointee.descriptor = descriptor
        unsafe request.pointee.mode = mode
        unsafe request.pointee.offset = offset
        unsafe request.pointee.length = length
        unsafe request.pointee.function = { context in
            let request = unsafe context.assumingMemoryBound(to: IORequest.self)
            let code = unsafe fallocate(
                request.pointee.descriptor, request.pointee.mode, off_t(request.pointee.offset),
                off_t(request.pointee.length))
            return code == 0 ? 0 : -Int(errno)
        }
        unsafe helpers.add(request)
        return true
    }

    /// Runs a blocking function on a helper thread. Its result is the request's.
    ///
    /// - Returns: `false` if the reactor is full; try again after a completion.
    public func offload(_ request: UnsafeMutablePointer<IORequest>, _ function: IORequest.Function) -> Bool {
        guard unsafe reserve(request) else { return false }
        unsafe request.pointee.function = function
        unsafe helpers.add(request)
        return true
    }
}
