// AIOEngine: Linux's older asynchronous I/O, for hosts where io_uring is not allowed (containers, hardened kernels).
//
// Owns: the AIO context, its event descriptor, and the control blocks that the kernel has not taken yet.
// Called by: Reactor, on its thread. Must not know: requests beyond their address.

import CLinux
import Glibc

/// An AIO context. The memory is behind pointers, so that copies of this value are the same context.
@safe
struct AIOEngine {
    @unsafe
    private struct State {
        let context: io_context_t
        let eventDescriptor: Int32
        let capacity: Int
        let isMapped: Bool
        /// Control blocks, a circular queue: the kernel copies one when it takes it, so it is free at once.
        let blocks: UnsafeMutablePointer<iocb>
        /// The same in the form that io_submit wants.
        let pointers: UnsafeMutablePointer<UnsafeMutablePointer<iocb>?>
        var head = 0
        var count = 0
    }

    private let state: UnsafeMutablePointer<State>

    init(depth: Int) throws(ReactorError) {
        let descriptor = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
        guard descriptor >= 0 else { throw .systemCall("eventfd", errno: errno) }
        var context: io_context_t?
        let code = unsafe io_setup(Int32(depth), &context)
        guard code == 0, let context = unsafe context else {
            close(descriptor)
            throw .engineUnavailable(.libaio, call: "io_setup", errno: -code)
        }
        unsafe state = .allocate(capacity: 1)
        unsafe state.initialize(
            to: State(
                context: context, eventDescriptor: descriptor, capacity: depth,
                isMapped: clinux_aio_is_mapped(context) != 0, blocks: .allocate(capacity: depth),
                pointers: .allocate(capacity: depth)))
    }

    func destroy() {
        unsafe io_destroy(state.pointee.context)
        unsafe close(state.pointee.eventDescriptor)
        unsafe state.pointee.blocks.deallocate()
        unsafe state.pointee.pointers.deallocate()
        unsafe state.deallocate()
    }

    /// What becomes readable when operations have completed.
    var eventDescriptor: Int32 { unsafe state.pointee.eventDescriptor }

    /// Whether the kernel did not take everything yet.
    var hasQueued: Bool { unsafe state.pointee.count != 0 }

    /// Queues one operation. There is room: the reactor bounds what is in flight by the capacity.
    @inline(__always)
    func queue(
        _ request: UnsafeMutablePointer<IORequest>, opcode: io_iocb_cmd, _ descriptor: Int32,
        _ segments: UnsafePointer<iovec>?, _ count: Int, _ offset: UInt64, _ flags: Int32
    ) {
        precondition(unsafe state.pointee.count < state.pointee.capacity, "more I/O than the reactor's depth")
        let place = unsafe (state.pointee.head + state.pointee.count) % state.pointee.capacity
        unsafe clinux_aio_prepare(
            state.pointee.blocks + place, Int32(opcode.rawValue), descriptor, segments, Int32(count), offset, flags,
            state.pointee.eventDescriptor, request)
        unsafe state.pointee.count += 1
    }

    /// Hands everything queued to the kernel, or as much as it takes: EAGAIN leaves the rest for the next turn.
    ///
    /// - Parameter refused: Gets each operation that the kernel refuses as such, with its negative errno value.
    /// - Returns: Whether the kernel took any.
    func submit(refused: (UnsafeMutablePointer<IORequest>, Int) -> Void) -> Bool {
        var submitted = false
        while unsafe state.pointee.count > 0 {
            let count = unsafe state.pointee.count
            for index in 0..<count {
                let place = unsafe (state.pointee.head + index) % state.pointee.capacity
                unsafe state.pointee.pointers[index] = unsafe state.pointee.blocks + place
            }
            let result = unsafe io_submit(state.pointee.context, count, state.pointee.pointers)
            if result > 0 {
                drop(Int(result))
                submitted = true
                continue
            }
            if result == -EINTR { continue }
            if result == 0 || result == -EAGAIN { return submitted }
            // The first block is the one it complains about.
            let request = unsafe clinux_aio_data(state.pointee.pointers[0])!.assumingMemoryBound(to: IORequest.self)
            drop(1)
            unsafe refused(request, Int(result))
        }
        return submitted
    }

    private func drop(_ count: Int) {
        unsafe state.pointee.head = (state.pointee.head + count) % state.pointee.capacity
        unsafe state.pointee.count -= count
    }

    /// Takes the next completion.
    @inline(__always)
    func next(_ completion: inout clinux_completion) -> Bool {
        if unsafe state.pointee.isMapped { return unsafe clinux_aio_next(state.pointee.context, &completion) != 0 }
        var event = unsafe io_event()
        var immediately = timespec()
        guard unsafe io_getevents(state.pointee.context, 0, 1, &event, &immediately) == 1 else { return false }
        completion.data = UInt64(UInt(bitPattern: unsafe event.data))
        completion.result = Int64(Int(bitPattern: unsafe event.res))
        return true
    }
}
