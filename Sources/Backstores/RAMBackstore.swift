// RAMBackstore: a disk in memory. What was never written takes no memory; everything is lost at the end.
//
// Owns: the memory and the requests that are done and not yet reported. Called by: a logical unit through its handle,
// the reactor through a work source. Must not know: SCSI.

import CBackstore
import CLinux
import Glibc
public import Reactor
public import SCSICore

/// A sparse disk in memory.
///
/// The data is copied in `submit`; completions come from the reactor's next look at the list. The memory is not
/// reserved: if the machine runs out of it, the kernel's out-of-memory killer decides.
@safe
public final class RAMBackstore {
    /// The backstore as a logical unit uses it. Valid until `close`.
    public var handle: BackstoreHandle {
        unsafe BackstoreHandle(operations: Self.operations, context: Unmanaged.passUnretained(self).toOpaque())
    }

    /// In the scratch of a request.
    @unsafe
    private struct State {
        /// For ranges that a helper thread clears. Must be first.
        var io: IORequest
        var owner: Unmanaged<RAMBackstore>
        var error: Int32
    }

    private let memory: UnsafeMutableRawPointer
    /// The pages that have been written since they were last cleared, a bit each. The kernel could be asked, but counts
    /// a page as present that was only read.
    private let mapped: PageMap
    private let size: UInt64
    private let logicalBlockSize: Int
    private let isReadOnly: Bool
    private let reactor: Reactor
    private var source: WorkSourceToken?
    private var finished = RequestList()
    private var inFlight = 0

    nonisolated(unsafe) private static let operations: UnsafePointer<scsi_backstore_operations> = {
        precondition(unsafe MemoryLayout<State>.size <= scratchBytes - 8, "the scratch of a request is too small")
        let operations = UnsafeMutablePointer<scsi_backstore_operations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: scsi_backstore_operations(
                struct_size: UInt32(MemoryLayout<scsi_backstore_operations>.size),
                abi_version: SCSI_BACKSTORE_ABI_VERSION,
                get_geometry: { context, geometry in
                    unsafe Unmanaged<RAMBackstore>.fromOpaque(context!)
                        ._withUnsafeGuaranteedRef { unsafe $0.fill(&geometry!.pointee) }
                },
                submit: { context, request in
                    unsafe Unmanaged<RAMBackstore>.fromOpaque(context!)
                        ._withUnsafeGuaranteedRef { unsafe $0.submit(request!) }
                },
                // Everything is done in submit, or cannot be interrupted.
                cancel: { _, _ in }))
        return unsafe UnsafePointer(operations)
    }()

    /// Creates a disk of zeros.
    ///
    /// - Parameters:
    ///   - size: Bytes, a multiple of the logical block size.
    ///   - logicalBlockSize: 512 or 4096 bytes.
    ///   - readOnly: Whether writes are refused (EROFS).
    ///   - reactor: The reactor of the logical unit that will use it.
    public init(
        size: UInt64, logicalBlockSize: Int = 512, readOnly: Bool = false, reactor: Reactor
    ) throws(BackstoreError) {
        try checkBlockSize(logicalBlockSize, "RAM disk")
        try checkSize(size, blockSize: logicalBlockSize, "RAM disk")
        let mapping = unsafe mmap(
            nil, Int(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        guard let memory = unsafe mapping, unsafe memory != MAP_FAILED else {
            throw BackstoreError("RAM disk", .systemCall("mmap of \(size) bytes", errno: errno))
        }
        unsafe self.memory = memory
        do {
            mapped = try PageMap(pages: (size + Self.pageBytes - 1) / Self.pageBytes)
        } catch {
            unsafe munmap(memory, Int(size))
            throw error
        }
        self.size = size
        self.logicalBlockSize = logicalBlockSize
        isReadOnly = readOnly
        self.reactor = reactor
        source = unsafe reactor.add(
            Reactor.WorkSource(
                poll: { context in
                    unsafe Unmanaged<RAMBackstore>.fromOpaque(context)._withUnsafeGuaranteedRef { $0.deliver() }
                },
                flush: { _ in },
                prepareToSleep: { context in
                    unsafe Unmanaged<RAMBackstore>.fromOpaque(context)
                        ._withUnsafeGuaranteedRef { !$0.finished.isEmpty }
                },
                context: Unmanaged.passUnretained(self).toOpaque()))
    }

    deinit {
        precondition(source == nil, "a RAM disk went away without close()")
        unsafe munmap(memory, Int(size))
        mapped.destroy()
    }

    /// Ends the use of the backstore. Nothing may be in flight. On the reactor's thread, or after its end.
    public func close() {
        precondition(inFlight == 0, "a RAM disk is closed with requests in flight")
        if let source { reactor.remove(source) }
        source = nil
    }

    private func fill(_ geometry: inout scsi_backstore_geometry) {
        var answer = scsi_backstore_geometry()
        answer.capabilities = UInt32(
            SCSI_BACKSTORE_CAN_DISCARD | SCSI_BACKSTORE_CAN_WRITE_ZEROES | SCSI_BACKSTORE_DISCARD_READS_ZEROS
                | SCSI_BACKSTORE_CAN_REPORT_EXTENTS | SCSI_BACKSTORE_CAN_REPORT_SPACE)
        if !isReadOnly { answer.capabilities |= UInt32(SCSI_BACKSTORE_WRITABLE) }
        answer.size = size
        answer.logical_block_size = UInt32(logicalBlockSize)
        answer.physical_block_size = UInt32(Self.pageBytes)
        answer.discard_granularity = UInt32(Self.pageBytes)
        // A write is one copy within `submit`, and the loss of power takes the whole disk.
        answer.atomic_write_maximum = 1 << 30
        copyGeometry(answer, to: &geometry)
    }

    private static let pageBytes: UInt64 = 4096

    // MARK: Requests

    private func submit(_ request: RequestPointer) -> Int32 {
        unsafe checkRange(request, size: size)
        var error: Int32 = 0
        switch unsafe Int(request.pointee.operation) {
        case SCSI_BACKSTORE_READ:
            unsafe copy(request, toSegments: true)
        case SCSI_BACKSTORE_WRITE:
            if isReadOnly { error = EROFS } else { unsafe write(request) }
        case SCSI_BACKSTORE_FLUSH:
            break
        case SCSI_BACKSTORE_EXTENTS:
            unsafe reportExtents(request)
        case SCSI_BACKSTORE_SPACE:
            // What is free of the machine's memory, without what the kernel would drop from its caches.
            let free = UInt64(max(sysconf(Int32(_SC_AVPHYS_PAGES)), 0))
            unsafe answerSpace(
                request, used: mapped.count * Self.pageBytes,
                available: free.multipliedReportingOverflow(by: UInt64(max(sysconf(Int32(_SC_PAGESIZE)), 1))))
        case SCSI_BACKSTORE_DISCARD, SCSI_BACKSTORE_WRITE_ZEROES:
            if isReadOnly {
                error = EROFS
            } else if unsafe request.pointee.length > BackstoreLimits.ramClearBytes {
                return unsafe clearElsewhere(request)
            } else {
                unsafe clear(request.pointee.offset, request.pointee.length)
                unsafe mapped.clear(Self.wholePages(request))
            }
        default:
            error = EOPNOTSUPP
        }
        unsafe finish(request, error)
        return 0
    }

    @inline(__always)
    private func finish(_ request: RequestPointer, _ error: Int32) {
        unsafe Self.state(request).pointee.error = error
        inFlight += 1
        unsafe finished.append(request)
    }

    @inline(__always)
    private static func state(_ request: RequestPointer) -> UnsafeMutablePointer<State> {
        unsafe UnsafeMutableRawPointer(request).advanced(by: scratchOffset).assumingMemoryBound(to: State.self)
    }

    @inline(__always)
    private func write(_ request: RequestPointer) {
        guard unsafe request.pointee.length > 0 else { return }
        let last = unsafe (request.pointee.offset + request.pointee.length - 1) / Self.pageBytes
        unsafe mapped.set(request.pointee.offset / Self.pageBytes..<last + 1)
        unsafe copy(request, toSegments: false)
    }

    /// The pages that a request covers whole: `clear` gives them back to the kernel.
    private static func wholePages(_ request: RequestPointer) -> Range<UInt64> {
        let first = unsafe (request.pointee.offset + pageBytes - 1) / pageBytes
        let end = unsafe (request.pointee.offset + request.pointee.length) / pageBytes
        return first..<max(first, end)
    }

    private func reportExtents(_ request: RequestPointer) {
        var writer = unsafe ExtentWriter(request, blockSize: UInt64(logicalBlockSize))
        var words = BackstoreLimits.ramExtentWords
        var goesOn = unsafe request.pointee.length > 0
        while goesOn, words > 0 {
            let first = writer.position / Self.pageBytes
            let run = mapped.run(from: first, limit: words)
            words -= Int((run.end - first) / 64) + 1
            goesOn = writer.add(
                run.isMapped ? SCSI_BACKSTORE_MAPPED : SCSI_BACKSTORE_DEALLOCATED, to: run.end * Self.pageBytes)
        }
    }

    @inline(__always)
    private func copy(_ request: RequestPointer, toSegments: Bool) {
        var place = unsafe memory + Int(request.pointee.offset)
        var rest = unsafe Int(request.pointee.length)
        let segments = unsafe request.pointee.segments
        for index in unsafe 0..<Int(request.pointee.segment_count) {
            let segment = unsafe segments![index]
            unsafe precondition(segment.iov_len <= rest, "segments longer than the request")
            if toSegments {
                unsafe memcpy(segment.iov_base, place, segment.iov_len)
            } else {
                unsafe memcpy(place, segment.iov_base, segment.iov_len)
            }
            unsafe place += segment.iov_len
            unsafe rest -= segment.iov_len
        }
        precondition(rest == 0, "segments shorter than the request")
    }

    /// Zeros a range: whole pages go back to the kernel.
    private func clear(_ offset: UInt64, _ length: UInt64) {
        let end = offset + length
        let firstPage = (offset + Self.pageBytes - 1) / Self.pageBytes * Self.pageBytes
        let lastPage = end / Self.pageBytes * Self.pageBytes
        guard firstPage < lastPage else {
            unsafe memset(memory + Int(offset), 0, Int(length))
            return
        }
        unsafe memset(memory + Int(offset), 0, Int(firstPage - offset))
        if unsafe madvise(memory + Int(firstPage), Int(lastPage - firstPage), MADV_DONTNEED) != 0 {
            // Locked memory cannot be given back; it can be zeroed.
            unsafe memset(memory + Int(firstPage), 0, Int(lastPage - firstPage))
        }
        unsafe memset(memory + Int(lastPage), 0, Int(end - lastPage))
    }

    private func clearElsewhere(_ request: RequestPointer) -> Int32 {
        let state = unsafe Self.state(request)
        unsafe state.initialize(
            to: State(
                io: IORequest { context, result in
                    let state = unsafe context.assumingMemoryBound(to: State.self)
                    unsafe state.pointee.owner._withUnsafeGuaranteedRef {
                        $0.inFlight -= 1
                        let request = unsafe (context - scratchOffset).assumingMemoryBound(
                            to: scsi_backstore_request.self)
                        unsafe $0.mapped.clear(RAMBackstore.wholePages(request))
                        unsafe request.pointee.complete(request, Int32(-result))
                    }
                }, owner: unsafe Unmanaged.passUnretained(self), error: 0))
        let accepted = unsafe reactor.offload(&state.pointee.io) { context in
            let request = unsafe (context - scratchOffset).assumingMemoryBound(to: scsi_backstore_request.self)
            unsafe context.assumingMemoryBound(to: State.self).pointee.owner._withUnsafeGuaranteedRef {
                unsafe $0.clear(request.pointee.offset, request.pointee.length)
            }
            return 0
        }
        if accepted { inFlight += 1 }
        return accepted ? 0 : EAGAIN
    }

    /// Reports what is done; `true` if there was any.
    private func deliver() -> Bool {
        // Taken whole: what a completion submits is for the next turn.
        var batch = finished.takeAll()
        guard !batch.isEmpty else { return false }
        while let request = unsafe batch.popFirst() {
            inFlight -= 1
            unsafe request.pointee.complete(request, Self.state(request).pointee.error)
        }
        return true
    }
}

/// Copies as much of a geometry as its reader knows of.
func copyGeometry(_ answer: scsi_backstore_geometry, to geometry: inout scsi_backstore_geometry) {
    var answer = answer
    let size = min(Int(geometry.struct_size), MemoryLayout<scsi_backstore_geometry>.size)
    answer.struct_size = UInt32(size)
    unsafe memcpy(&geometry, &answer, size)
}
