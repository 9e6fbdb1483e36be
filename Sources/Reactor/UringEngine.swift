// UringEngine: one io_uring, which is at once the reactor's wait and its I/O.
//
// Owns: the ring. Called by: Reactor, on its thread. Must not know: requests beyond their address, descriptors'
// handlers.

import CLinux
import Glibc

/// An io_uring. The memory is behind one pointer, so that copies of this value are the same ring.
@safe
struct UringEngine {
    /// What stands in `user_data` of the poll of the descriptor set; no request has this address.
    static let pollData: UInt64 = 1

    private let ring: UnsafeMutablePointer<io_uring>

    /// Creates the ring, disabled until `enable`. Throws the errno value and the name of the call that failed.
    init(depth: Int) throws(ReactorError) {
        unsafe ring = .allocate(capacity: 1)
        unsafe ring.initialize(to: io_uring())
        let code = unsafe Self.create(unsafe ring, depth: UInt32(depth))
        guard code == 0 else {
            unsafe ring.deallocate()
            throw .engineUnavailable(.ioUring, call: "io_uring_setup", errno: code)
        }
        guard unsafe Self.hasOperations(unsafe ring) else {
            unsafe io_uring_queue_exit(ring)
            unsafe ring.deallocate()
            throw .engineUnavailable(.ioUring, call: "probe of the operations", errno: EOPNOTSUPP)
        }
    }

    /// From the best set of flags to none: with DEFER_TASKRUN (6.1) completions come when we ask and interrupt nothing;
    /// with COOP_TASKRUN (5.19) they at least do not interrupt. CQ entries: an overflow would cost a system call.
    private static func create(_ ring: UnsafeMutablePointer<io_uring>, depth: UInt32) -> Int32 {
        let common = UInt32(IORING_SETUP_CLAMP) | UInt32(IORING_SETUP_R_DISABLED)
        let flagSets = [
            common | UInt32(IORING_SETUP_SINGLE_ISSUER) | UInt32(IORING_SETUP_DEFER_TASKRUN)
                | UInt32(IORING_SETUP_TASKRUN_FLAG),
            common | UInt32(IORING_SETUP_COOP_TASKRUN) | UInt32(IORING_SETUP_TASKRUN_FLAG),
            common,
        ]
        var code: Int32 = 0
        for flags in flagSets {
            var parameters = io_uring_params()
            parameters.flags = flags
            // Room for a full depth of I/O, and a little for the poll of the descriptor set.
            code = -(unsafe io_uring_queue_init_params(depth + 8, ring, &parameters))
            if code != EINVAL { break }
        }
        guard code == 0 else { return code }
        let needed = UInt32(IORING_FEAT_NODROP) | UInt32(IORING_FEAT_SUBMIT_STABLE) | UInt32(IORING_FEAT_EXT_ARG)
        guard unsafe ring.pointee.features & needed == needed else {
            unsafe io_uring_queue_exit(ring)
            return EOPNOTSUPP
        }
        return 0
    }

    private static func hasOperations(_ ring: UnsafeMutablePointer<io_uring>) -> Bool {
        guard let probe = unsafe io_uring_get_probe_ring(ring) else { return false }
        defer { unsafe io_uring_free_probe(probe) }
        let operations = [
            IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_READ, IORING_OP_WRITE, IORING_OP_FSYNC, IORING_OP_FALLOCATE,
            IORING_OP_POLL_ADD,
        ]
        return operations.allSatisfy { unsafe io_uring_opcode_supported(probe, Int32($0.rawValue)) != 0 }
    }

    func destroy() {
        unsafe io_uring_queue_exit(ring)
        unsafe ring.deallocate()
    }

    /// Binds the ring to the calling thread.
    func enable() {
        let code = unsafe clinux_ring_enable(ring)
        precondition(code == 0, "io_uring: a disabled ring could not be enabled")
    }

    /// A free submission entry. There always is one once what stands in the queue was submitted, because the reactor
    /// bounds what is in flight by the size of the queue.
    @inline(__always)
    private func entry(_ data: UInt64) -> UnsafeMutablePointer<io_uring_sqe>? {
        if let entry = unsafe io_uring_get_sqe(ring) { return unsafe entry }
        unsafe io_uring_submit(ring)
        return unsafe io_uring_get_sqe(ring)
    }

    /// Queues the multishot poll of the descriptor set; `false` if the queue is full and the kernel takes nothing now.
    func pollDescriptors(_ descriptor: Int32) -> Bool {
        guard let entry = unsafe entry(Self.pollData) else { return false }
        unsafe io_uring_prep_poll_multishot(entry, descriptor, UInt32(EPOLLIN.rawValue))
        unsafe entry.pointee.user_data = Self.pollData
        return true
    }

    @inline(__always)
    func read(
        _ request: UnsafeMutablePointer<IORequest>, _ descriptor: Int32, _ segments: UnsafePointer<iovec>, _ count: Int,
        _ offset: UInt64
    ) -> Bool {
        guard let entry = unsafe entry(0) else { return false }
        if count == 1, unsafe segments.pointee.iov_len <= Int(Int32.max) {
            unsafe io_uring_prep_read(
                entry, descriptor, segments.pointee.iov_base, UInt32(segments.pointee.iov_len), offset)
        } else {
            unsafe io_uring_prep_readv(entry, descriptor, segments, UInt32(count), offset)
        }
        unsafe entry.pointee.user_data = UInt64(UInt(bitPattern: request))
        return true
    }

    @inline(__always)
    func write(
        _ request: UnsafeMutablePointer<IORequest>, _ descriptor: Int32, _ segments: UnsafePointer<iovec>, _ count: Int,
        _ offset: UInt64, _ flags: Int32
    ) -> Bool {
        guard let entry = unsafe entry(0) else { return false }
        if count == 1, unsafe segments.pointee.iov_len <= Int(Int32.max) {
            unsafe io_uring_prep_write(
                entry, descriptor, segments.pointee.iov_base, UInt32(segments.pointee.iov_len), offset)
        } else {
            unsafe io_uring_prep_writev(entry, descriptor, segments, UInt32(count), offset)
        }
        unsafe entry.pointee.rw_flags = flags
        unsafe entry.pointee.user_data = UInt64(UInt(bitPattern: request))
        return true
    }

    func synchronizeData(_ request: UnsafeMutablePointer<IORequest>, _ descriptor: Int32) -> Bool {
        guard let entry = unsafe entry(0) else { return false }
        unsafe io_uring_prep_fsync(entry, descriptor, UInt32(IORING_FSYNC_DATASYNC))
        unsafe entry.pointee.user_data = UInt64(UInt(bitPattern: request))
        return true
    }

    func allocate(
        _ request: UnsafeMutablePointer<IORequest>, _ descriptor: Int32, _ mode: Int32, _ offset: UInt64,
        _ length: UInt64
    ) -> Bool {
        guard let entry = unsafe entry(0) else { return false }
        unsafe io_uring_prep_fallocate(entry, descriptor, mode, off_t(offset), off_t(length))
        unsafe entry.pointee.user_data = UInt64(UInt(bitPattern: request))
        return true
    }

    /// How many completions can be taken; enters the kernel only if it holds some back.
    @inline(__always)
    func ready() -> Int {
        if unsafe clinux_ring_wants_enter(ring) != 0 { unsafe io_uring_get_events(ring) }
        return Int(unsafe io_uring_cq_ready(ring))
    }

    @inline(__always)
    func next(_ completion: inout clinux_completion) -> Bool { unsafe clinux_ring_next(ring, &completion) != 0 }

    /// Hands what is queued to the kernel; `true` if there was any. What the kernel does not take now (EAGAIN, EBUSY)
    /// stays queued for the next turn.
    @inline(__always)
    func submit() -> Bool {
        guard unsafe io_uring_sq_ready(ring) != 0 else { return false }
        unsafe io_uring_submit_and_get_events(ring)
        return true
    }

    /// Submits and sleeps until a completion, a signal, or the end of `nanoseconds` (`nil`: no end).
    func wait(nanoseconds: UInt64?) {
        var entry: UnsafeMutablePointer<io_uring_cqe>?
        guard let nanoseconds else {
            unsafe io_uring_submit_and_wait_timeout(ring, &entry, 1, nil, nil)
            return
        }
        var time = __kernel_timespec()
        time.tv_sec = Int64(nanoseconds / 1_000_000_000)
        time.tv_nsec = Int64(nanoseconds % 1_000_000_000)
        unsafe io_uring_submit_and_wait_timeout(ring, &entry, 1, &time, nil)
    }
}
