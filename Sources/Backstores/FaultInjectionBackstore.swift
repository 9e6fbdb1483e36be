// FaultInjectionBackstore: a backstore that goes wrong as told, around any other.
//
// Owns: the faults, copies of the requests under way. Called by: a logical unit through the handle, tests and the
// simulation (inject, release). Must not know: the backstore behind it; SCSI.

import CBackstore
import CLinux
import Glibc
public import Reactor
public import SCSICore

/// Wraps a backstore and makes chosen requests fail, come late, come torn, come in another order, or never.
///
/// A request without a fault goes through unchanged. Faults are tried in the order in which they were injected; the
/// first that matches has its way.
@safe
public final class FaultInjectionBackstore {
    /// A fault: which requests, and what becomes of them.
    public struct Fault: Sendable {
        /// What becomes of a request.
        public enum Action: Sendable, Equatable {
            /// Ends with this errno value; the backstore does not see it.
            case fail(errno: Int32)
            /// Is refused as if the backstore were full.
            case full
            /// The backstore does it, and its completion comes this much later.
            case delay(nanoseconds: UInt64)
            /// The backstore does the first `bytes` of a transfer, and it ends with this errno value.
            case torn(bytes: UInt64, errno: Int32)
            /// The backstore does it, and its completion waits for `releaseHeld` or `releaseHeldReversed`.
            case hold
            /// The backstore does it, and completions are kept until there are `count`, then given in reverse.
            case reorder(count: Int)
        }

        /// What becomes of a request.
        public var action: Action
        /// Which operations, SCSI_BACKSTORE_READ and so on; empty: all.
        public var operations: [UInt8]
        /// Bytes of the medium that a request must touch, or `nil`; a flush touches all.
        public var range: Range<UInt64>?
        /// How many matching requests pass before the fault begins.
        public var skip: Int
        /// How many requests it befalls; `Int.max`: all.
        public var times: Int

        /// A fault for the next matching request.
        public init(
            _ action: Action, operations: [UInt8] = [], range: Range<UInt64>? = nil, skip: Int = 0, times: Int = 1
        ) {
            self.action = action
            self.operations = operations
            self.range = range
            self.skip = skip
            self.times = times
        }
    }

    /// One request under way: the copy that the backstore has, and where it came from.
    @unsafe
    private struct Slot {
        /// Must be first: the backstore's completion finds the rest by its address.
        var inner = unsafe scsi_backstore_request()
        var outer: RequestPointer?
        var owner: Unmanaged<FaultInjectionBackstore>?
        var error: Int32 = 0
        var ending = Ending.now
        var delay: UInt64 = 0
        var nextFree: Int32 = -1
        /// The segments of a transfer that is cut short; allocated for it alone.
        var segments: UnsafeMutablePointer<iovec>?
    }

    /// What is done with a completion of the backstore.
    private enum Ending: UInt8 {
        case now
        case late
        case held
        case reordered
    }

    private let inner: BackstoreHandle
    private let reactor: Reactor
    private let slots: UnsafeMutablePointer<Slot>
    private var firstFree: Int32 = 0
    private var source: WorkSourceToken?
    private var faults: [Fault] = []
    /// Slots whose request has ended and is to be reported in this order by the next turn.
    private var finished: [Int] = []
    private var held: [Int] = []
    private var reordered: [Int] = []
    private var reorderCount = 0
    /// Requests accepted and not completed.
    public private(set) var requestsInFlight = 0
    /// Requests that a fault has befallen.
    public private(set) var faultCount = 0

    nonisolated(unsafe) private static let operations: UnsafePointer<scsi_backstore_operations> = {
        let operations = UnsafeMutablePointer<scsi_backstore_operations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: scsi_backstore_operations(
                struct_size: UInt32(MemoryLayout<scsi_backstore_operations>.size),
                abi_version: SCSI_BACKSTORE_ABI_VERSION,
                get_geometry: { context, geometry in
                    let owner = unsafe Unmanaged<FaultInjectionBackstore>.fromOpaque(context!).takeUnretainedValue()
                    unsafe copyGeometry(owner.inner.geometry(), to: &geometry!.pointee)
                },
                submit: { context, request in
                    unsafe Unmanaged<FaultInjectionBackstore>.fromOpaque(context!).takeUnretainedValue().submit(
                        request!)
                },
                cancel: { context, request in
                    unsafe Unmanaged<FaultInjectionBackstore>.fromOpaque(context!).takeUnretainedValue().cancel(
                        request!)
                }))
        return unsafe UnsafePointer(operations)
    }()

    /// Wraps a backstore, which the caller keeps alive and closes after this one.
    ///
    /// - Parameter reactor: The reactor of the logical unit that will use it.
    public init(wrapping inner: BackstoreHandle, reactor: Reactor) {
        self.inner = inner
        self.reactor = reactor
        unsafe slots = .allocate(capacity: BackstoreLimits.faultInjectionRequests)
        for index in 0..<BackstoreLimits.faultInjectionRequests {
            var slot = unsafe Slot()
            unsafe slot.nextFree = index + 1 < BackstoreLimits.faultInjectionRequests ? Int32(index + 1) : -1
            unsafe (slots + index).initialize(to: slot)
        }
        source = unsafe reactor.add(
            Reactor.WorkSource(
                poll: { unsafe Unmanaged<FaultInjectionBackstore>.fromOpaque($0).takeUnretainedValue().deliver() },
                flush: { _ in },
                prepareToSleep: {
                    unsafe !Unmanaged<FaultInjectionBackstore>.fromOpaque($0).takeUnretainedValue().finished.isEmpty
                },
                context: unsafe Unmanaged.passUnretained(self).toOpaque()))
    }

    deinit {
        precondition(source == nil, "a fault injector went away without close()")
        unsafe slots.deallocate()
    }

    /// The backstore as a logical unit uses it. Valid until `close`.
    public var handle: BackstoreHandle {
        unsafe BackstoreHandle(operations: Self.operations, context: Unmanaged.passUnretained(self).toOpaque())
    }

    /// Ends the use. Nothing may be in flight: release what is held first.
    public func close() {
        precondition(requestsInFlight == 0, "a fault injector is closed with requests in flight")
        if let source { reactor.remove(source) }
        source = nil
    }

    // MARK: The script

    /// Adds a fault behind those that there are.
    public func inject(_ fault: Fault) { faults.append(fault) }

    /// Forgets all faults. What is held stays held.
    public func clearFaults() { faults = [] }

    /// How many completions are held or kept for another order.
    public var heldCount: Int { held.count + reordered.count }

    /// Lets held completions go, the oldest first.
    public func releaseHeld() {
        finished += held + reordered
        held = []
        reordered = []
    }

    /// Lets held completions go, the newest first.
    public func releaseHeldReversed() {
        finished += (held + reordered).reversed()
        held = []
        reordered = []
    }

    // MARK: Requests

    private func submit(_ request: RequestPointer) -> Int32 {
        guard firstFree >= 0 else { return EAGAIN }
        let action = unsafe takeFault(request)
        if action == .full { return EAGAIN }
        let index = Int(firstFree)
        let slot = unsafe slots + index
        unsafe fill(slot, request)
        switch action {
        case .fail(let code):
            unsafe accept(slot)
            unsafe slot.pointee.error = code
            finished.append(index)
            return 0
        case .delay(let nanoseconds):
            unsafe slot.pointee.ending = .late
            unsafe slot.pointee.delay = nanoseconds
        case .torn(let bytes, let code): unsafe tear(slot, bytes, code)
        case .hold: unsafe slot.pointee.ending = .held
        case .reorder(let count):
            unsafe slot.pointee.ending = .reordered
            reorderCount = count
        case .full, nil: break
        }
        let operation = unsafe Int(request.pointee.operation)
        let isWhole = operation == SCSI_BACKSTORE_FLUSH || operation == SCSI_BACKSTORE_SPACE
        guard unsafe slot.pointee.inner.length > 0 || isWhole else {
            unsafe accept(slot)
            finished.append(index)
            return 0
        }
        guard unsafe inner.submit(Self.innerRequest(slot)) else {
            unsafe freeSegments(slot)
            return EAGAIN
        }
        unsafe accept(slot)
        return 0
    }

    /// The fault that befalls a request, counted down.
    private func takeFault(_ request: RequestPointer) -> Fault.Action? {
        for index in faults.indices where unsafe matches(faults[index], request) {
            if faults[index].skip > 0 {
                faults[index].skip -= 1
                continue
            }
            let action = faults[index].action
            if faults[index].times != .max { faults[index].times -= 1 }
            if faults[index].times == 0 { faults.remove(at: index) }
            faultCount += 1
            return action
        }
        return nil
    }

    private func matches(_ fault: Fault, _ request: RequestPointer) -> Bool {
        let operation = unsafe request.pointee.operation
        if !fault.operations.isEmpty && !fault.operations.contains(operation) { return false }
        guard let range = fault.range, Int(operation) != SCSI_BACKSTORE_FLUSH, Int(operation) != SCSI_BACKSTORE_SPACE
        else { return true }
        return unsafe range.overlaps(request.pointee.offset..<(request.pointee.offset + request.pointee.length))
    }

    private func fill(_ slot: UnsafeMutablePointer<Slot>, _ request: RequestPointer) {
        var copy = unsafe scsi_backstore_request()
        unsafe copy.struct_size = unsafe UInt32(MemoryLayout<scsi_backstore_request>.size)
        unsafe copy.operation = unsafe request.pointee.operation
        unsafe copy.flags = unsafe request.pointee.flags
        unsafe copy.offset = unsafe request.pointee.offset
        unsafe copy.length = unsafe request.pointee.length
        unsafe copy.segments = unsafe request.pointee.segments
        unsafe copy.segment_count = unsafe request.pointee.segment_count
        unsafe copy.error_offset = .max
        unsafe copy.complete = { request, error in
            let slot = unsafe UnsafeMutableRawPointer(request!).assumingMemoryBound(to: Slot.self)
            unsafe slot.pointee.owner!.takeUnretainedValue().completed(slot, error)
        }
        unsafe slot.pointee.inner = unsafe copy
        unsafe slot.pointee.outer = unsafe request
        unsafe slot.pointee.owner = unsafe Unmanaged.passUnretained(self)
        unsafe slot.pointee.error = 0
        unsafe slot.pointee.ending = .now
        unsafe slot.pointee.segments = nil
    }

    /// Takes the slot out of the free list, with the link to it in the request, for `cancel`.
    private func accept(_ slot: UnsafeMutablePointer<Slot>) {
        firstFree = unsafe slot.pointee.nextFree
        requestsInFlight += 1
        unsafe slot.pointee.outer!.pointee.scratch.0 = unsafe UInt64(slot - slots)
    }

    /// Leaves the backstore the first `bytes` of a transfer.
    private func tear(_ slot: UnsafeMutablePointer<Slot>, _ bytes: UInt64, _ code: Int32) {
        let blockSize = UInt64(inner.geometry().logical_block_size)
        // An atomic write is not done in part, not even by a fault.
        let isAtomic = unsafe slot.pointee.inner.flags & UInt16(SCSI_BACKSTORE_ATOMIC) != 0
        let length = unsafe isAtomic ? 0 : min(bytes / blockSize * blockSize, slot.pointee.inner.length)
        let count = unsafe Int(slot.pointee.inner.segment_count)
        let segments = UnsafeMutablePointer<iovec>.allocate(capacity: max(count, 1))
        var rest = Int(length)
        for index in 0..<count {
            var segment = unsafe slot.pointee.inner.segments[index]
            unsafe segment.iov_len = unsafe min(segment.iov_len, rest)
            unsafe rest -= segment.iov_len
            unsafe (segments + index).initialize(to: segment)
        }
        unsafe slot.pointee.segments = unsafe segments
        // The segment of EXTENTS and SPACE is the place for the answer and no data.
        let operation = unsafe Int(slot.pointee.inner.operation)
        if operation != SCSI_BACKSTORE_EXTENTS, operation != SCSI_BACKSTORE_SPACE {
            unsafe slot.pointee.inner.segments = unsafe UnsafePointer(segments)
        }
        unsafe slot.pointee.inner.length = length
        unsafe slot.pointee.error = code
        unsafe slot.pointee.outer!.pointee.error_offset = unsafe slot.pointee.inner.offset + length
    }

    private static func innerRequest(_ slot: UnsafeMutablePointer<Slot>) -> RequestPointer {
        unsafe UnsafeMutableRawPointer(slot).assumingMemoryBound(to: scsi_backstore_request.self)
    }

    private func freeSegments(_ slot: UnsafeMutablePointer<Slot>) {
        unsafe slot.pointee.segments?.deallocate()
        unsafe slot.pointee.segments = nil
    }

    private func cancel(_ request: RequestPointer) {
        let slot = unsafe slots + Int(request.pointee.scratch.0)
        // What the backstore has already completed is not its any more.
        guard unsafe slot.pointee.outer == request, unsafe !isOurs(slot - slots) else { return }
        unsafe inner.cancel(Self.innerRequest(slot))
    }

    private func isOurs(_ index: Int) -> Bool {
        finished.contains(index) || held.contains(index) || reordered.contains(index) || late.contains(index)
    }

    /// Slots whose timer runs.
    private var late: Set<Int> = []

    private func completed(_ slot: UnsafeMutablePointer<Slot>, _ error: Int32) {
        let index = unsafe slot - slots
        if unsafe slot.pointee.error == 0 {
            unsafe slot.pointee.error = error
            unsafe slot.pointee.outer!.pointee.error_offset = unsafe slot.pointee.inner.error_offset
        }
        switch unsafe slot.pointee.ending {
        case .now: report(index)
        case .late:
            late.insert(index)
            _ = unsafe reactor.setTimer(
                at: reactor.now + slot.pointee.delay,
                { context in
                    let slot = unsafe context.assumingMemoryBound(to: Slot.self)
                    let owner = unsafe slot.pointee.owner!.takeUnretainedValue()
                    unsafe owner.late.remove(slot - owner.slots)
                    unsafe owner.report(slot - owner.slots)
                }, unsafe slot)
        case .held: held.append(index)
        case .reordered:
            reordered.append(index)
            if reordered.count >= reorderCount {
                finished += reordered.reversed()
                reordered = []
            }
        }
    }

    private func report(_ index: Int) {
        let slot = unsafe slots + index
        let outer = unsafe slot.pointee.outer!
        let error = unsafe slot.pointee.error
        unsafe freeSegments(slot)
        unsafe slot.pointee.outer = nil
        unsafe slot.pointee.nextFree = firstFree
        firstFree = Int32(index)
        requestsInFlight -= 1
        unsafe outer.pointee.complete(outer, error)
    }

    private func deliver() -> Bool {
        let batch = finished
        finished = []
        for index in batch { report(index) }
        return !batch.isEmpty
    }
}
