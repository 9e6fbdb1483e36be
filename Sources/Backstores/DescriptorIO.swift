// DescriptorIO: the requests of a backstore that is a file descriptor: a file or a block device.
//
//   submit ── READ, WRITE ─► transferring (again for the rest of a short transfer, for the next bounce buffer)
//          ── FLUSH ───────► flushing
//          ── DISCARD ─────► discarding ──────────────┬─► flushing (FUA)
//          ── WRITE ZEROES ► punching ─► zeroing ─► writingZeros (each if the one before is not supported)
//          ── ANCHOR ──────► anchoring ───────────────┴─► flushing (FUA)
//          ── PREFETCH ────► transferring into a bounce buffer, so that the page cache has it; or advising
//          ── EXTENTS ─────► reporting
//          ── SPACE ───────► measuring
//
// Owns: the descriptor, the bounce buffers, the lists of requests that wait. Called by: FileBackstore and
// BlockDeviceBackstore, a logical unit through the vtable, the reactor. Must not know: SCSI, paths, how a medium is
// opened.

import CBackstore
import CLinux
import Glibc
import Reactor
import SCSICore

/// What kind of descriptor it is: they discard and zero in different ways.
enum DescriptorKind {
    case file
    case blockDevice
}

/// Serves requests on a descriptor.
@safe
final class DescriptorIO {
    /// What is being done for a request.
    private enum Step: UInt8 {
        case transferring
        case flushing
        case discarding
        case punching
        case zeroing
        case writingZeros
        case anchoring
        case advising
        case reporting
        case measuring
    }

    /// In the scratch of a request, before the link of `RequestList`.
    @unsafe
    private struct State {
        /// Must be first: the reactor's completion finds the rest by its address.
        var io: IORequest
        /// The segment of the current call if it is not the caller's list: a bounce buffer, or the rest of a segment.
        /// Must be second.
        var segment: iovec
        var owner: Unmanaged<DescriptorIO>
        /// Bytes that are done.
        var done: UInt64
        /// Where in the caller's segments the rest begins.
        var cursor: SegmentCursor
        /// The bounce buffer, or -1.
        var buffer: Int32
        /// For a request that ends without I/O.
        var error: Int32
        var retries: UInt8
        var step: Step
        var isCancelled: Bool
        var needsBuffer: Bool
    }

    let descriptor: Int32
    let kind: DescriptorKind
    /// Whether the descriptor is open with O_DIRECT.
    let isDirect: Bool
    private let memoryMask: UInt
    private let lengthMask: UInt64
    private let reactor: Reactor
    private var source: WorkSourceToken?
    private var answer: scsi_backstore_geometry
    private let isReadOnly: Bool

    private var buffers: BounceBuffers
    /// Requests that wait for a bounce buffer.
    private var waiting = RequestList()
    /// Requests under way whose next step the reactor had no room for.
    private var stalled = RequestList()
    /// Requests that ended without I/O.
    private var finished = RequestList()
    private(set) var inFlight = 0
    private var hasCancelledWaiters = false

    /// The error of the first fdatasync that failed, for good: the kernel reports a lost write once and then calls the
    /// pages clean, so that a later fdatasync that succeeds says nothing about the writes that this one was for. The
    /// logical unit keeps failing its flushes until somebody has looked and opened the medium again.
    private(set) var flushError: Int32 = 0
    private var canPunch: Bool
    private var canZero = true
    /// Whether the file system tells extents apart, space without data included; else only data and holes.
    private let knowsExtents: Bool
    private let blockSize: UInt64

    nonisolated(unsafe) private static let operations: UnsafePointer<scsi_backstore_operations> = {
        unsafe precondition(MemoryLayout<State>.size <= scratchBytes - 8, "the scratch of a request is too small")
        unsafe precondition(MemoryLayout<State>.offset(of: \State.segment) == segmentOffset, "State has another order")
        let operations = UnsafeMutablePointer<scsi_backstore_operations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: scsi_backstore_operations(
                struct_size: UInt32(MemoryLayout<scsi_backstore_operations>.size),
                abi_version: SCSI_BACKSTORE_ABI_VERSION,
                get_geometry: { context, geometry in
                    unsafe Unmanaged<DescriptorIO>.fromOpaque(context!)
                        ._withUnsafeGuaranteedRef { unsafe copyGeometry($0.answer, to: &geometry!.pointee) }
                },
                submit: { context, request in
                    unsafe Unmanaged<DescriptorIO>.fromOpaque(context!)._withUnsafeGuaranteedRef {
                        unsafe $0.submit(request!)
                    }
                },
                cancel: { context, request in
                    unsafe Unmanaged<DescriptorIO>.fromOpaque(context!)._withUnsafeGuaranteedRef {
                        unsafe $0.cancel(request!)
                    }
                }))
        return unsafe UnsafePointer(operations)
    }()

    /// Takes the descriptor over if it does not throw.
    init(
        path: String, descriptor: Int32, kind: DescriptorKind, alignment: DirectAlignment?, canPunch: Bool,
        geometry: scsi_backstore_geometry, reactor: Reactor
    ) throws(BackstoreError) {
        self.descriptor = descriptor
        self.kind = kind
        isDirect = alignment != nil
        memoryMask = UInt(alignment?.memory ?? 1) - 1
        lengthMask = UInt64(alignment?.offset ?? 1) - 1
        self.canPunch = canPunch
        answer = geometry
        blockSize = UInt64(geometry.logical_block_size)
        knowsExtents = kind == .file && clinux_file_extents(descriptor, 0, 1, 0, nil) == 0
        isReadOnly = geometry.capabilities & UInt32(SCSI_BACKSTORE_WRITABLE) == 0
        self.reactor = reactor
        buffers = try BounceBuffers(path: path)
        declareAtomicWrites()
        source = unsafe reactor.add(
            Reactor.WorkSource(
                poll: { unsafe Unmanaged<DescriptorIO>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.poll() } },
                flush: { _ in },
                prepareToSleep: {
                    unsafe Unmanaged<DescriptorIO>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.hasWork }
                },
                context: unsafe Unmanaged.passUnretained(self).toOpaque()))
    }

    deinit { precondition(source == nil, "a backstore went away without close()") }

    var handle: BackstoreHandle {
        unsafe BackstoreHandle(operations: Self.operations, context: Unmanaged.passUnretained(self).toOpaque())
    }

    var geometry: scsi_backstore_geometry { answer }

    /// Takes a new size in bytes over.
    func resize(to size: UInt64) { answer.size = size }

    /// For a descriptor that turned out to go through the page cache.
    func declareVolatileCache() { answer.capabilities |= UInt32(SCSI_BACKSTORE_VOLATILE_CACHE) }

    /// Atomic writes as the kernel promises them, over the loss of power too: one length, at multiples of it. (It takes
    /// shorter ones, of half the length and so on; the Block Limits VPD page has no words for that.) Only direct I/O
    /// has them.
    private func declareAtomicWrites() {
        guard isDirect, !isReadOnly else { return }
        let maximum = min(clinux_atomic_write_maximum(descriptor), UInt32(BackstoreLimits.bounceBytes))
        guard maximum >= answer.logical_block_size else { return }
        answer.atomic_write_maximum = maximum
        answer.atomic_write_granularity = maximum
        answer.atomic_write_alignment = maximum
    }

    /// Ends the use. Nothing may be in flight. Returns the errno value of the last flush, or 0.
    func close() -> Int32 {
        precondition(inFlight == 0, "a backstore is closed with requests in flight")
        guard let source else { return 0 }
        reactor.remove(source)
        self.source = nil
        if !isReadOnly, fdatasync(descriptor) != 0, flushError == 0 { flushError = errno }
        Glibc.close(descriptor)
        buffers.destroy()
        return flushError
    }

    // MARK: From the logical unit

    private func submit(_ request: RequestPointer) -> Int32 {
        unsafe checkRange(request, size: answer.size)
        let state = unsafe Self.state(request)
        unsafe prepare(request, state)
        if let error = unsafe refusal(request) {
            unsafe state.pointee.error = error
            inFlight += 1
            unsafe finished.append(request)
            return 0
        }
        if unsafe state.pointee.needsBuffer {
            unsafe state.pointee.buffer = buffers.take()
            if unsafe state.pointee.buffer < 0 {
                inFlight += 1
                unsafe waiting.append(request)
                return 0
            }
        }
        guard unsafe startStep(request) else {
            if unsafe state.pointee.buffer >= 0 { unsafe buffers.give(back: state.pointee.buffer) }
            return EAGAIN
        }
        inFlight += 1
        return 0
    }

    @inline(__always)
    private func prepare(_ request: RequestPointer, _ state: UnsafeMutablePointer<State>) {
        let operation = unsafe Int(request.pointee.operation)
        let isTransfer = operation == SCSI_BACKSTORE_READ || operation == SCSI_BACKSTORE_WRITE
        let needsBuffer = unsafe isTransfer ? isDirect && mustBounce(request) : operation == SCSI_BACKSTORE_PREFETCH
        unsafe state.initialize(
            to: State(
                io: Self.newIORequest(), segment: iovec(), owner: Unmanaged.passUnretained(self), done: 0,
                cursor: SegmentCursor(), buffer: -1, error: 0, retries: 0,
                step: isTransfer ? .transferring : firstStep(operation, request.pointee.flags), isCancelled: false,
                needsBuffer: needsBuffer && !isAdvice(operation, request.pointee.flags)))
    }

    private func isAdvice(_ operation: Int, _ flags: UInt16) -> Bool {
        operation == SCSI_BACKSTORE_PREFETCH && flags & UInt16(SCSI_BACKSTORE_IMMEDIATE) != 0
    }

    /// Whether direct I/O does not take a request's segments. An atomic write must have one only.
    @inline(__always)
    private func mustBounce(_ request: RequestPointer) -> Bool {
        let isAtomic = unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_ATOMIC) != 0
        return unsafe !isAligned(request) || isAtomic && request.pointee.segment_count > 1
    }

    @inline(__always)
    private static func newIORequest() -> IORequest {
        unsafe IORequest { context, result in
            let owner = unsafe context.assumingMemoryBound(to: State.self).pointee.owner
            unsafe owner._withUnsafeGuaranteedRef { unsafe $0.completed(DescriptorIO.request(context), result) }
        }
    }

    /// How a request that moves no data begins.
    private func firstStep(_ operation: Int, _ flags: UInt16) -> Step {
        switch operation {
        case SCSI_BACKSTORE_DISCARD:
            return kind == .blockDevice || canPunch ? .discarding : firstZeroingStep
        case SCSI_BACKSTORE_WRITE_ZEROES:
            let mayUnmap = flags & UInt16(SCSI_BACKSTORE_MAY_UNMAP) != 0
            return mayUnmap && canPunch ? .punching : firstZeroingStep
        case SCSI_BACKSTORE_ANCHOR: return .anchoring
        case SCSI_BACKSTORE_PREFETCH: return isAdvice(operation, flags) ? .advising : .transferring
        case SCSI_BACKSTORE_EXTENTS: return .reporting
        case SCSI_BACKSTORE_SPACE: return .measuring
        default:
            return .flushing
        }
    }

    private var firstZeroingStep: Step { canZero ? .zeroing : .writingZeros }

    /// The error of a request that is not even tried.
    @inline(__always)
    private func refusal(_ request: RequestPointer) -> Int32? {
        let isFUA = unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_FUA) != 0
        switch unsafe Int(request.pointee.operation) {
        case SCSI_BACKSTORE_READ:
            return unsafe request.pointee.length == 0 ? 0 : nil
        case SCSI_BACKSTORE_PREFETCH:
            if isDirect { return ENOBUFS }
            return unsafe request.pointee.length == 0 ? 0 : nil
        case SCSI_BACKSTORE_EXTENTS:
            if kind != .file { return EOPNOTSUPP }
            return unsafe request.pointee.length == 0 ? 0 : nil
        case SCSI_BACKSTORE_SPACE:
            return kind == .file ? nil : EOPNOTSUPP
        case SCSI_BACKSTORE_ANCHOR where answer.capabilities & UInt32(SCSI_BACKSTORE_CAN_ANCHOR) == 0:
            return EOPNOTSUPP
        case SCSI_BACKSTORE_WRITE, SCSI_BACKSTORE_DISCARD, SCSI_BACKSTORE_WRITE_ZEROES, SCSI_BACKSTORE_ANCHOR:
            if isReadOnly { return EROFS }
            if isFUA && flushError != 0 { return flushError }
            return unsafe request.pointee.length == 0 ? 0 : nil
        case SCSI_BACKSTORE_FLUSH:
            if isReadOnly { return 0 }
            return flushError != 0 ? flushError : nil
        default:
            return EOPNOTSUPP
        }
    }

    @inline(__always)
    private func isAligned(_ request: RequestPointer) -> Bool {
        let segments = unsafe request.pointee.segments
        var bits = unsafe UInt(truncatingIfNeeded: request.pointee.offset) & UInt(lengthMask)
        for index in unsafe 0..<Int(request.pointee.segment_count) {
            unsafe bits |= UInt(bitPattern: segments![index].iov_base) & memoryMask
            unsafe bits |= UInt(segments![index].iov_len) & UInt(lengthMask)
        }
        return bits == 0
    }

    private func cancel(_ request: RequestPointer) {
        unsafe Self.state(request).pointee.isCancelled = true
        // It may be one that waits for a buffer; the next turn looks.
        hasCancelledWaiters = true
    }

    // MARK: Steps

    @inline(__always)
    private static func state(_ request: RequestPointer) -> UnsafeMutablePointer<State> {
        unsafe UnsafeMutableRawPointer(request).advanced(by: scratchOffset).assumingMemoryBound(to: State.self)
    }

    @inline(__always)
    private static func request(_ state: UnsafeMutableRawPointer) -> RequestPointer {
        unsafe (state - scratchOffset).assumingMemoryBound(to: scsi_backstore_request.self)
    }

    /// Hands the current step to the reactor; `false` if the reactor is full.
    @inline(__always)
    private func startStep(_ request: RequestPointer) -> Bool {
        let state = unsafe Self.state(request)
        // The address of the whole state: `&state.pointee.io` as a pointer of its own would be a temporary's.
        let io = unsafe UnsafeMutableRawPointer(state).assumingMemoryBound(to: IORequest.self)
        switch unsafe state.pointee.step {
        case .transferring: return unsafe startTransfer(request, state, io)
        case .flushing: return unsafe reactor.synchronizeData(io, descriptor: descriptor)
        case .discarding where kind == .blockDevice: return unsafe reactor.offload(io, Self.discardBlocks)
        case .discarding, .punching:
            return unsafe allocate(request, io, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
        case .zeroing where kind == .blockDevice: return unsafe reactor.offload(io, Self.zeroBlocks)
        case .zeroing, .anchoring: return unsafe allocate(request, io, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE)
        case .advising: return unsafe reactor.offload(io, Self.advise)
        case .reporting: return unsafe reactor.offload(io, Self.report)
        case .measuring: return unsafe reactor.offload(io, Self.measure)
        case .writingZeros:
            let length = unsafe min(request.pointee.length - state.pointee.done, UInt64(BackstoreLimits.zeroBytes))
            return unsafe startWrite(request, state, io, iovec(iov_base: Zeros.address, iov_len: Int(length)))
        }
    }

    private func allocate(_ request: RequestPointer, _ io: UnsafeMutablePointer<IORequest>, _ mode: Int32) -> Bool {
        unsafe reactor.allocate(
            io, descriptor: descriptor, mode: mode, offset: request.pointee.offset, length: request.pointee.length)
    }

    private static let discardBlocks: IORequest.Function = { context in
        let request = unsafe DescriptorIO.request(context)
        let descriptor = unsafe context.assumingMemoryBound(to: State.self).pointee.owner._withUnsafeGuaranteedRef {
            $0.descriptor
        }
        return unsafe clinux_block_discard(descriptor, request.pointee.offset, request.pointee.length) == 0
            ? 0 : -Int(errno)
    }

    private static let zeroBlocks: IORequest.Function = { context in
        let request = unsafe DescriptorIO.request(context)
        let descriptor = unsafe context.assumingMemoryBound(to: State.self).pointee.owner._withUnsafeGuaranteedRef {
            $0.descriptor
        }
        return unsafe clinux_block_zero(descriptor, request.pointee.offset, request.pointee.length) == 0
            ? 0 : -Int(errno)
    }

    private static let advise: IORequest.Function = { context in
        let request = unsafe DescriptorIO.request(context)
        let descriptor = unsafe context.assumingMemoryBound(to: State.self).pointee.owner._withUnsafeGuaranteedRef {
            $0.descriptor
        }
        return Int(unsafe clinux_will_need(descriptor, request.pointee.offset, request.pointee.length))
    }

    /// On a helper thread: nothing of the owner changes there that this looks at.
    private static let report: IORequest.Function = { context in
        let request = unsafe DescriptorIO.request(context)
        return unsafe context.assumingMemoryBound(to: State.self).pointee.owner._withUnsafeGuaranteedRef { owner in
            var writer = unsafe ExtentWriter(request, blockSize: owner.blockSize)
            let end = unsafe request.pointee.offset + request.pointee.length
            return owner.knowsExtents
                ? FileExtents.report(
                    owner.descriptor, &writer, end, owner.blockSize, synchronize: !owner.isDirect)
                : FileExtents.reportHoles(owner.descriptor, &writer, end, owner.blockSize)
        }
    }

    /// On a helper thread, because a file system may be far away. What is available is the file system's, which has
    /// other users.
    private static let measure: IORequest.Function = { context in
        let request = unsafe DescriptorIO.request(context)
        let descriptor = unsafe context.assumingMemoryBound(to: State.self).pointee.owner._withUnsafeGuaranteedRef {
            $0.descriptor
        }
        var (file, system) = (stat(), statvfs())
        guard unsafe fstat(descriptor, &file) == 0, unsafe fstatvfs(descriptor, &system) == 0 else {
            return -Int(errno)
        }
        unsafe answerSpace(
            request, used: UInt64(file.st_blocks) * 512,
            available: UInt64(system.f_bavail).multipliedReportingOverflow(by: UInt64(system.f_frsize)))
        return 0
    }

    /// Transfers the rest, or as much of it as one call can take.
    @inline(__always)
    private func startTransfer(
        _ request: RequestPointer, _ state: UnsafeMutablePointer<State>, _ io: UnsafeMutablePointer<IORequest>
    ) -> Bool {
        let isRead = unsafe Int(request.pointee.operation) != SCSI_BACKSTORE_WRITE
        if unsafe state.pointee.buffer >= 0 {
            let address = unsafe buffers.address(state.pointee.buffer)
            let rest = unsafe request.pointee.length - state.pointee.done
            let length = Int(min(rest, UInt64(BackstoreLimits.bounceBytes)))
            if !isRead { unsafe state.pointee.cursor.copy(length, address, toSegments: false, request) }
            unsafe state.pointee.segment = unsafe iovec(iov_base: address, iov_len: length)
        } else if unsafe state.pointee.cursor.offset != 0 {
            // A transfer ended within a segment: first the rest of that one.
            let segment = unsafe request.pointee.segments[Int(state.pointee.cursor.index)]
            unsafe state.pointee.segment = unsafe iovec(
                iov_base: segment.iov_base! + Int(state.pointee.cursor.offset),
                iov_len: segment.iov_len - Int(state.pointee.cursor.offset))
        } else {
            let first = unsafe Int(state.pointee.cursor.index)
            let count = unsafe min(Int(request.pointee.segment_count) - first, BackstoreLimits.segmentsPerCall)
            return unsafe call(request, io, request.pointee.segments + first, count, state.pointee.done, isRead: isRead)
        }
        return unsafe call(request, io, Self.segmentPointer(state), 1, state.pointee.done, isRead: isRead)
    }

    private func startWrite(
        _ request: RequestPointer, _ state: UnsafeMutablePointer<State>, _ io: UnsafeMutablePointer<IORequest>,
        _ segment: iovec
    ) -> Bool {
        unsafe state.pointee.segment = unsafe segment
        return unsafe call(request, io, Self.segmentPointer(state), 1, state.pointee.done, isRead: false)
    }

    @inline(__always)
    private static func segmentPointer(_ state: UnsafeMutablePointer<State>) -> UnsafePointer<iovec> {
        unsafe UnsafePointer(
            UnsafeMutableRawPointer(state).advanced(by: segmentOffset).assumingMemoryBound(to: iovec.self))
    }

    /// Where `State.segment` stands; a key path would be looked up at each call.
    private static var segmentOffset: Int { MemoryLayout<IORequest>.stride }

    @inline(__always)
    private func call(
        _ request: RequestPointer, _ io: UnsafeMutablePointer<IORequest>, _ segments: UnsafePointer<iovec>,
        _ count: Int, _ done: UInt64, isRead: Bool
    ) -> Bool {
        let offset = unsafe request.pointee.offset + done
        if isRead { return unsafe reactor.read(io, descriptor: descriptor, segments, count: count, offset: offset) }
        let flags = unsafe request.pointee.flags
        let isFUA = flags & UInt16(SCSI_BACKSTORE_FUA) != 0
        let isAtomic = flags & UInt16(SCSI_BACKSTORE_ATOMIC) != 0
        return unsafe reactor.write(
            io, descriptor: descriptor, segments, count: count, offset: offset,
            flags: (isFUA ? Int32(RWF_DSYNC) : 0) | (isAtomic ? Int32(CLINUX_RWF_ATOMIC) : 0))
    }

    // MARK: Completions

    private func completed(_ request: RequestPointer, _ result: Int) {
        let state = unsafe Self.state(request)
        if result == -Int(EINTR) || result == -Int(EAGAIN), unsafe state.pointee.retries < BackstoreLimits.retries {
            unsafe state.pointee.retries += 1
            unsafe resume(request)
            return
        }
        switch unsafe state.pointee.step {
        case .transferring, .writingZeros: unsafe transferred(request, state, result)
        case .flushing: unsafe flushed(request, result)
        case .discarding, .punching, .zeroing: unsafe deallocated(request, state, result)
        case .anchoring where result >= 0: unsafe deallocated(request, state, result)
        case .anchoring, .advising, .reporting, .measuring: unsafe finish(request, Int32(-min(result, 0)))
        }
    }

    @inline(__always)
    private func transferred(_ request: RequestPointer, _ state: UnsafeMutablePointer<State>, _ result: Int) {
        var bytes = result
        let rest = unsafe request.pointee.length - state.pointee.done
        // Direct I/O goes on at an aligned offset; what is past it is done again.
        if bytes > 0, UInt64(bytes) < rest { bytes &= ~Int(lengthMask) }
        guard bytes > 0 else {
            // Nothing: an error, or (a read) the end of a file that somebody has made shorter.
            let error = result < 0 ? Int32(-result) : EIO
            unsafe request.pointee.error_offset = unsafe request.pointee.offset + state.pointee.done
            unsafe noteFailure(request, error)
            unsafe finish(request, error)
            return
        }
        precondition(UInt64(bytes) <= rest, "the kernel transferred more than it was asked for")
        if unsafe state.pointee.step == .transferring {
            if unsafe state.pointee.buffer >= 0, unsafe Int(request.pointee.operation) == SCSI_BACKSTORE_READ {
                unsafe state.pointee.cursor.copy(
                    bytes, buffers.address(state.pointee.buffer), toSegments: true, request)
            }
            let hasSegments = unsafe request.pointee.segment_count > 0
            if UInt64(bytes) < rest, hasSegments { unsafe state.pointee.cursor.advance(bytes, request) }
        }
        unsafe state.pointee.done += UInt64(bytes)
        unsafe state.pointee.retries = 0
        if UInt64(bytes) == rest {
            unsafe finish(request, 0)
        } else if unsafe state.pointee.isCancelled {
            unsafe finish(request, ECANCELED)
        } else {
            unsafe resume(request)
        }
    }

    /// A write with RWF_DSYNC that fails with EIO may have taken the report of an earlier write's loss.
    private func noteFailure(_ request: RequestPointer, _ error: Int32) {
        let isFUA = unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_FUA) != 0
        if isFUA, unsafe Int(request.pointee.operation) != SCSI_BACKSTORE_READ, error == EIO { noteFlushError(error) }
    }

    private func noteFlushError(_ error: Int32) {
        if flushError == 0 { flushError = error }
    }

    private func flushed(_ request: RequestPointer, _ result: Int) {
        if result < 0 { noteFlushError(Int32(-result)) }
        unsafe finish(request, Int32(-min(result, 0)))
    }

    private func deallocated(_ request: RequestPointer, _ state: UnsafeMutablePointer<State>, _ result: Int) {
        if result >= 0 {
            guard unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_FUA) != 0 else {
                return unsafe finish(request, 0)
            }
            unsafe state.pointee.step = .flushing
            return unsafe resume(request)
        }
        guard Self.meansUnsupported(-result) else {
            unsafe request.pointee.error_offset = unsafe request.pointee.offset
            return unsafe finish(request, Int32(-result))
        }
        switch unsafe state.pointee.step {
        case .discarding where kind == .blockDevice:
            // Only advice there, and nobody was promised zeros.
            return unsafe finish(request, 0)
        case .discarding, .punching:
            canPunch = false
            unsafe state.pointee.step = firstZeroingStep
        default:
            canZero = false
            unsafe state.pointee.step = .writingZeros
        }
        unsafe resume(request)
    }

    private static func meansUnsupported(_ code: Int) -> Bool {
        [EOPNOTSUPP, ENOSYS, ENODEV, ENOTTY].contains(Int32(code))
    }

    private func resume(_ request: RequestPointer) {
        if unsafe !startStep(request) { unsafe stalled.append(request) }
    }

    private func finish(_ request: RequestPointer, _ error: Int32) {
        let buffer = unsafe Self.state(request).pointee.buffer
        if buffer >= 0 {
            buffers.give(back: buffer)
            startWaiting()
        }
        inFlight -= 1
        unsafe request.pointee.complete(request, error)
    }

    /// Gives free buffers to those that have waited longest.
    private func startWaiting() {
        while !waiting.isEmpty {
            let buffer = buffers.take()
            guard buffer >= 0 else { return }
            let request = unsafe waiting.popFirst()!
            unsafe Self.state(request).pointee.buffer = buffer
            unsafe resume(request)
        }
    }

    // MARK: The work source

    private var hasWork: Bool {
        // A stalled request waits for the reactor's other I/O, whose completion wakes it.
        !finished.isEmpty || hasCancelledWaiters || (!stalled.isEmpty && reactor.requestsInFlight == 0)
    }

    private func poll() -> Bool {
        var didWork = false
        if hasCancelledWaiters { endCancelledWaiters() }
        var ended = finished.takeAll()
        while let request = unsafe ended.popFirst() {
            didWork = true
            inFlight -= 1
            unsafe request.pointee.complete(request, Self.state(request).pointee.error)
        }
        var retried = stalled.takeAll()
        while let request = unsafe retried.popFirst() {
            if unsafe Self.state(request).pointee.isCancelled {
                didWork = true
                unsafe finish(request, ECANCELED)
            } else if unsafe startStep(request) {
                didWork = true
            } else {
                unsafe stalled.append(request)
            }
        }
        return didWork
    }

    private func endCancelledWaiters() {
        hasCancelledWaiters = false
        var candidates = waiting.takeAll()
        while let request = unsafe candidates.popFirst() {
            if unsafe Self.state(request).pointee.isCancelled {
                unsafe Self.state(request).pointee.error = ECANCELED
                unsafe finished.append(request)
            } else {
                unsafe waiting.append(request)
            }
        }
    }
}
