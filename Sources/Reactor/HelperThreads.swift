// HelperThreads: two threads for calls that can only block (BLKDISCARD, SEEK_HOLE, fallocate without io_uring).
//
// Owns: the threads and the lists of jobs waiting and done. Called by: Reactor; the functions it is given run on the
// threads. Must not know: what the jobs are.

import CLinux
import Glibc
import Synchronization

/// The helper threads of one reactor. Jobs are linked through their requests; nothing is allocated for one.
@safe
final class HelperThreads: @unchecked Sendable {
    /// A long BLKDISCARD must not keep another disk's short one waiting; more would only queue at the device.
    private static let threads = 2

    private struct Lists: @unchecked Sendable {
        var waiting = IORequestList()
        var done = IORequestList()
        var isStopping = false
    }

    private let lists = Locked(Lists())
    private let hasDone = Atomic<Bool>(false)
    private let wakeUp: UnsafeMutablePointer<sem_t>
    private let wakeDescriptor: Int32
    private var handles: [pthread_t] = []

    /// - Parameter wakeDescriptor: An eventfd that is written when a job is done.
    init(wakeDescriptor: Int32) throws(ReactorError) {
        self.wakeDescriptor = wakeDescriptor
        unsafe wakeUp = .allocate(capacity: 1)
        unsafe sem_init(wakeUp, 0, 0)
        // Signals are the main thread's: the helpers inherit a mask that blocks them all.
        var all = sigset_t()
        var previous = sigset_t()
        unsafe sigfillset(&all)
        // A fault in memory that a front-end took away is handled on the thread that touched it.
        unsafe sigdelset(&all, SIGBUS)
        unsafe pthread_sigmask(SIG_SETMASK, &all, &previous)
        var code: Int32 = 0
        for _ in 0..<Self.threads where code == 0 {
            var handle = pthread_t()
            let context = unsafe Unmanaged.passUnretained(self).toOpaque()
            code = unsafe pthread_create(&handle, nil, { unsafe helperThreadMain($0) }, context)
            if code == 0 { handles.append(handle) }
        }
        unsafe pthread_sigmask(SIG_SETMASK, &previous, nil)
        if code != 0 {
            stop()
            throw .systemCall("pthread_create", errno: code)
        }
    }

    deinit {
        unsafe sem_destroy(wakeUp)
        unsafe wakeUp.deallocate()
    }

    /// Ends the threads; no job may be waiting.
    func stop() {
        lists.withLock { $0.isStopping = true }
        for _ in handles { unsafe sem_post(wakeUp) }
        for handle in handles { pthread_join(handle, nil) }
        handles = []
    }

    func add(_ request: UnsafeMutablePointer<IORequest>) {
        let job = unsafe Job(request: request)
        lists.withLock { unsafe $0.waiting.append(job.request) }
        unsafe sem_post(wakeUp)
    }

    /// The next job that is done, or `nil`.
    func popDone() -> UnsafeMutablePointer<IORequest>? {
        guard hasDone.load(ordering: .acquiring) else { return nil }
        let job = lists.withLock { lists -> Job in
            let first = unsafe lists.done.popFirst()
            if lists.done.isEmpty { hasDone.store(false, ordering: .relaxed) }
            return unsafe Job(request: first!)
        }
        return unsafe job.request
    }

    fileprivate func work() {
        while true {
            while unsafe sem_wait(wakeUp) != 0 {}
            let (job, isStopping) = lists.withLock { lists -> (Job?, Bool) in
                let first = unsafe lists.waiting.popFirst()
                return (unsafe first.map { unsafe Job(request: $0) }, lists.isStopping)
            }
            guard let job else {
                if isStopping { return }
                continue
            }
            let request = unsafe job.request
            unsafe request.pointee.result = request.pointee.function!(request)
            lists.withLock {
                unsafe $0.done.append(job.request)
                hasDone.store(true, ordering: .releasing)
            }
            wake(wakeDescriptor)
        }
    }

    /// A request that changes threads: exactly one of them has it at any time.
    @safe
    private struct Job: @unchecked Sendable {
        let request: UnsafeMutablePointer<IORequest>
    }
}

private func helperThreadMain(_ context: UnsafeMutableRawPointer?) -> UnsafeMutableRawPointer? {
    unsafe Unmanaged<HelperThreads>.fromOpaque(context!).takeUnretainedValue().work()
    return nil
}

/// Makes an eventfd readable. Its counter cannot overflow in a way that matters: EAGAIN means that it is readable.
func wake(_ eventDescriptor: Int32) {
    var one: UInt64 = 1
    _ = unsafe write(eventDescriptor, &one, 8)
}

/// Makes an eventfd unreadable again.
func drainEventDescriptor(_ eventDescriptor: Int32) {
    var count: UInt64 = 0
    _ = unsafe read(eventDescriptor, &count, 8)
}
