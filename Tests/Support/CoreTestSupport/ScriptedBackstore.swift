// ScriptedBackstore: a medium in memory whose requests complete when, in what order and how the test says.
//
// Owns: the content, the requests in flight. Called by: the core through the backstore seam; tests and the simulator.
// Must not know: SCSI.

public import CBackstore
import CIOVector
import CTarget
import Glibc
public import SCSICore

/// A request that the core has handed over, as tests look at it.
public struct BackstoreRequest: Equatable, CustomStringConvertible, Sendable {
    /// What it asks for.
    public enum Operation: UInt8, Sendable {
        case read = 1, write, flush, discard, writeZeroes, prefetch, extents, anchor, space
    }

    /// What it asks for.
    public let operation: Operation
    /// Whether it must be stable before it completes.
    public let forcesUnitAccess: Bool
    /// SCSI_BACKSTORE_IMMEDIATE, SCSI_BACKSTORE_ATOMIC.
    public let isImmediate: Bool, isAtomic: Bool
    /// In bytes.
    public let offset: UInt64
    /// In bytes.
    public let length: UInt64

    /// "read 512+1024", "write fua 0+512".
    public var description: String {
        if operation == .flush || operation == .space { return "\(operation)" }
        let flags = (isAtomic ? " atomic" : "") + (isImmediate ? " immediate" : "") + (forcesUnitAccess ? " fua" : "")
        return "\(operation)\(flags) \(offset)+\(length)"
    }
}

/// The vtable of all scripted backstores.
private nonisolated(unsafe) let backstoreOperations: UnsafePointer<scsi_backstore_operations> = {
    let operations = UnsafeMutablePointer<scsi_backstore_operations>.allocate(capacity: 1)
    unsafe operations.initialize(
        to: scsi_backstore_operations(
            struct_size: UInt32(MemoryLayout<scsi_backstore_operations>.size),
            abi_version: SCSI_BACKSTORE_ABI_VERSION,
            get_geometry: { context, geometry in
                let backstore = unsafe Unmanaged<ScriptedBackstore>.fromOpaque(context!).takeUnretainedValue()
                let size = unsafe geometry!.pointee.struct_size
                unsafe geometry!.pointee = backstore.geometry
                unsafe geometry!.pointee.struct_size = size
            },
            submit: { context, request in
                unsafe Unmanaged<ScriptedBackstore>.fromOpaque(context!).takeUnretainedValue().submit(request!)
            },
            cancel: { context, request in
                unsafe Unmanaged<ScriptedBackstore>.fromOpaque(context!).takeUnretainedValue().cancel(request!)
            }))
    return unsafe UnsafePointer(operations)
}()

/// A medium that a script completes.
@safe
public final class ScriptedBackstore {
    /// What the medium says of itself.
    public var geometry: scsi_backstore_geometry
    /// How many requests fit; one more is refused with EAGAIN.
    public var capacity = Int.max
    /// Whether a cancelled request ends with ECANCELED and without effect when it is completed without an error.
    public var honoursCancel = true
    /// Everything that was accepted, in order.
    public private(set) var accepted: [BackstoreRequest] = []
    /// How often a request was refused because the backstore was full.
    public private(set) var refusals = 0
    /// How often a request was asked to be cancelled.
    public private(set) var cancellations = 0
    /// Test of the tests: writes that complete without having been done. It is asked of writes only: a read that is not
    /// done would leave whatever the memory held before.
    public var losesWrite: ((BackstoreRequest) -> Bool)?
    /// Test of the tests: a byte is written to the memory of a READ after it has completed.
    public var touchesMemoryLate = false
    /// Whether writes are stable on completion; else a flush or a write with FUA makes them so.
    public private(set) var unstable: Set<UInt64> = []

    /// What the medium tells of its space, if the geometry says that it can.
    public var space = scsi_backstore_space()

    private let violations: Violations
    private var blocks: [UInt64: [UInt8]] = [:]
    /// Blocks that have space and no data.
    private var anchored: Set<UInt64> = []
    private var inFlight: [InFlight] = []
    private var owners: Set<Int> = []

    @safe
    private struct InFlight {
        let request: UnsafeMutablePointer<scsi_backstore_request>
        let summary: BackstoreRequest
        var isCancelled = false
    }

    /// A medium of zeros with every capability but a rotating one.
    public init(blocks: UInt64 = 4096, blockLength: UInt32 = 512, violations: Violations) {
        self.violations = violations
        geometry = scsi_backstore_geometry()
        geometry.size = blocks * UInt64(blockLength)
        geometry.logical_block_size = blockLength
        geometry.physical_block_size = 4096
        geometry.capabilities = UInt32(
            SCSI_BACKSTORE_WRITABLE | SCSI_BACKSTORE_VOLATILE_CACHE | SCSI_BACKSTORE_CAN_DISCARD
                | SCSI_BACKSTORE_CAN_WRITE_ZEROES | SCSI_BACKSTORE_DISCARD_READS_ZEROS | SCSI_BACKSTORE_CAN_PREFETCH
                | SCSI_BACKSTORE_CAN_REPORT_EXTENTS | SCSI_BACKSTORE_CAN_ANCHOR)
        geometry.atomic_write_maximum = 64 * blockLength
    }

    /// The handle that a logical unit takes. The backstore must live as long as the unit.
    public var handle: BackstoreHandle {
        unsafe BackstoreHandle(operations: backstoreOperations, context: Unmanaged.passUnretained(self).toOpaque())
    }

    /// Requests that are neither completed nor refused, oldest first.
    public var pending: [BackstoreRequest] { inFlight.map(\.summary) }

    /// Whether the backstore has the request of the task with this public head.
    public func holds(_ head: UnsafeRawPointer) -> Bool {
        owners.contains(Int(bitPattern: head))
    }

    private var blockLength: Int { Int(geometry.logical_block_size) }

    /// What a block holds.
    public func block(_ address: UInt64) -> [UInt8] { blocks[address] ?? Array(repeating: 0, count: blockLength) }

    /// Changes what a block holds, from outside.
    public func setBlock(_ address: UInt64, _ bytes: [UInt8]) {
        precondition(bytes.count == blockLength)
        blocks[address] = bytes
    }

    // MARK: The script

    /// Completes a request.
    ///
    /// - Parameters:
    ///   - index: Which of `pending`.
    ///   - error: The errno value; with one other than 0 only the first `partial` bytes have been transferred.
    ///   - errorOffset: The first byte that could not be transferred, if known.
    public func complete(_ index: Int = 0, error: Int32 = 0, errorOffset: UInt64? = nil, partial: Int = 0) {
        let entry = inFlight.remove(at: index)
        unsafe owners.remove(Int(bitPattern: entry.request.pointee.owner))
        var error = error
        if error == 0, entry.isCancelled, honoursCancel { error = ECANCELED }
        let request = unsafe entry.request
        if error == 0, unsafe request.pointee.offset &+ request.pointee.length > geometry.size { error = EIO }
        let late = unsafe touchesMemoryLate ? request.pointee.segments?.pointee.iov_base : nil
        let isLost = entry.summary.operation == .write && losesWrite?(entry.summary) ?? false
        if !isLost { unsafe perform(request, limit: error == 0 ? .max : partial) }
        if let errorOffset { unsafe request.pointee.error_offset = errorOffset }
        // The core may hand the memory out again inside: nothing of it is used after this call.
        unsafe request.pointee.complete(request, error)
        if let late = unsafe late, entry.summary.operation == .read { unsafe late.storeBytes(of: 1, as: UInt8.self) }
    }

    /// Completes everything, oldest first, and what follows from it.
    public func completeAll() { while !inFlight.isEmpty { complete() } }

    /// Forgets what was accepted until now, for runs that would fill the memory with it.
    public func forgetPast() { accepted = [] }

    private func perform(_ request: UnsafeMutablePointer<scsi_backstore_request>, limit: Int) {
        let operation = BackstoreRequest.Operation(rawValue: unsafe request.pointee.operation)!
        let first = unsafe request.pointee.offset / UInt64(blockLength)
        let count = unsafe request.pointee.length / UInt64(blockLength)
        let isAtomic = unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_ATOMIC) != 0
        let limit = isAtomic && limit != .max ? 0 : limit
        let stable = unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_FUA) != 0
        switch operation {
        case .flush: if limit == .max { unstable = [] }
        case .prefetch: break
        case .space:
            if limit == .max {
                unsafe request.pointee.segments.pointee.iov_base.storeBytes(of: space, as: scsi_backstore_space.self)
            }
        case .extents: if limit == .max { unsafe reportExtents(request, first, count) }
        case .read: unsafe read(request, first, count, limit)
        case .write: unsafe write(request, first, count, limit, stable)
        case .discard, .writeZeroes, .anchor:
            guard limit == .max else { return }
            if operation == .anchor { anchored.formUnion(first..<first + count) }
            if operation == .discard { anchored = anchored.filter { $0 < first || $0 - first >= count } }
            if count > 1 << 20 {
                blocks = blocks.filter { $0.key < first || $0.key - first >= count }
            } else {
                for address in first..<first + count { blocks[address] = nil }
            }
        }
    }

    private func read(
        _ request: UnsafeMutablePointer<scsi_backstore_request>, _ first: UInt64, _ count: UInt64, _ limit: Int
    ) {
        var bytes = (first..<first + count).flatMap { block($0) }[...].prefix(limit)
        for index in unsafe 0..<Int(request.pointee.segment_count) {
            let segment = unsafe request.pointee.segments[index]
            let piece = unsafe bytes.prefix(segment.iov_len)
            if !piece.isEmpty {
                unsafe UnsafeMutableRawBufferPointer(start: segment.iov_base, count: piece.count).copyBytes(from: piece)
            }
            bytes = bytes.dropFirst(piece.count)
        }
    }

    private func reportExtents(
        _ request: UnsafeMutablePointer<scsi_backstore_request>, _ first: UInt64, _ count: UInt64
    ) {
        let array = unsafe request.pointee.segments.pointee
        let room = unsafe array.iov_len / MemoryLayout<scsi_backstore_extent>.stride
        let extents = unsafe array.iov_base.assumingMemoryBound(to: scsi_backstore_extent.self)
        let end = first + count
        // Where the state may change: the blocks that are not deallocated, and those behind them.
        let known = Set(blocks.keys).union(anchored).filter { $0 >= first && $0 < end }
        let edges = known.union(known.map { $0 + 1 }).union([first]).filter { $0 < end }.sorted() + [end]
        var filled = 0
        for (start, next) in zip(edges, edges.dropFirst()) {
            let state = blocks[start] != nil ? 0 : anchored.contains(start) ? 2 : 1 as UInt32
            let length = (next - start) * UInt64(blockLength)
            if filled > 0, unsafe extents[filled - 1].state == state {
                unsafe extents[filled - 1].length += length
            } else if filled < room {
                unsafe extents[filled] = scsi_backstore_extent(length: length, state: state, reserved: 0)
                filled += 1
            } else {
                return
            }
        }
    }

    private func write(
        _ request: UnsafeMutablePointer<scsi_backstore_request>, _ first: UInt64, _ count: UInt64, _ limit: Int,
        _ stable: Bool
    ) {
        var bytes: [UInt8] = []
        for index in unsafe 0..<Int(request.pointee.segment_count) {
            let segment = unsafe request.pointee.segments[index]
            unsafe bytes += Array(UnsafeRawBufferPointer(start: segment.iov_base, count: segment.iov_len))
        }
        for address in first..<first + count {
            let start = Int(address - first) * blockLength
            guard start + blockLength <= min(limit, bytes.count) else { return }
            blocks[address] = Array(bytes[start..<start + blockLength])
            if stable { unstable.remove(address) } else { unstable.insert(address) }
        }
    }

    // MARK: What the core calls

    fileprivate func submit(_ request: UnsafeMutablePointer<scsi_backstore_request>) -> Int32 {
        guard inFlight.count < capacity else {
            refusals += 1
            return EAGAIN
        }
        unsafe check(request)
        guard let operation = BackstoreRequest.Operation(rawValue: unsafe request.pointee.operation) else {
            return EINVAL
        }
        let summary = BackstoreRequest(
            operation: operation, forcesUnitAccess: unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_FUA) != 0,
            isImmediate: unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_IMMEDIATE) != 0,
            isAtomic: unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_ATOMIC) != 0,
            offset: unsafe request.pointee.offset, length: unsafe request.pointee.length)
        accepted.append(summary)
        unsafe inFlight.append(InFlight(request: request, summary: summary))
        unsafe owners.insert(Int(bitPattern: request.pointee.owner))
        return 0
    }

    private func check(_ request: UnsafeMutablePointer<scsi_backstore_request>) {
        let operation = BackstoreRequest.Operation(rawValue: unsafe request.pointee.operation)
        violations.require(operation != nil, "a request with an unknown operation")
        violations.require(
            unsafe !owners.contains(Int(bitPattern: request.pointee.owner)), "a request was submitted that is in flight"
        )
        violations.require(
            unsafe request.pointee.struct_size >= UInt32(MemoryLayout<scsi_backstore_request>.size), "struct_size")
        violations.require(unsafe request.pointee.error_offset == .max, "error_offset is not UINT64_MAX at submit")
        let (offset, length) = unsafe (request.pointee.offset, request.pointee.length)
        let block = UInt64(blockLength)
        violations.require(
            offset <= geometry.size && length <= geometry.size - offset, "a request beyond the end of the medium")
        violations.require(offset % block == 0 && length % block == 0, "a request that is not a whole number of blocks")
        violations.require(operation == .flush || operation == .space || length > 0, "a request for nothing")
        let limit: UInt64
        switch operation {
        case .read, .write: limit = geometry.maximum_transfer
        case .discard: limit = geometry.maximum_discard
        case .writeZeroes: limit = geometry.maximum_write_zeroes
        case .anchor: limit = geometry.maximum_discard
        case .flush, .prefetch, .extents, .space, nil: limit = 0
        }
        violations.require(limit == 0 || length <= limit, "\(length) bytes in a request, \(limit) is the maximum")
        var sum: UInt64 = 0
        for index in unsafe 0..<Int(request.pointee.segment_count) {
            unsafe sum += UInt64(request.pointee.segments[index].iov_len)
        }
        unsafe checkAtomic(request, operation)
        if operation == .extents || operation == .space {
            return unsafe violations.require(request.pointee.segment_count == 1, "a request without its one answer")
        }
        let expected = operation == .read || operation == .write ? length : 0
        violations.require(sum == expected, "segments of \(sum) bytes for a transfer of \(expected)")
    }

    private func checkAtomic(
        _ request: UnsafeMutablePointer<scsi_backstore_request>, _ operation: BackstoreRequest.Operation?
    ) {
        guard unsafe request.pointee.flags & UInt16(SCSI_BACKSTORE_ATOMIC) != 0 else { return }
        let (offset, length) = unsafe (request.pointee.offset, request.pointee.length)
        violations.require(
            operation == .write && length <= UInt64(geometry.atomic_write_maximum)
                && length % UInt64(max(geometry.atomic_write_granularity, 1)) == 0
                && offset % UInt64(max(geometry.atomic_write_alignment, 1)) == 0,
            "an atomic write that the geometry does not allow")
    }

    fileprivate func cancel(_ request: UnsafeMutablePointer<scsi_backstore_request>) {
        cancellations += 1
        guard let index = inFlight.firstIndex(where: { unsafe $0.request == request }) else {
            return violations.report("a request was cancelled that is not in flight")
        }
        inFlight[index].isCancelled = true
    }
}
