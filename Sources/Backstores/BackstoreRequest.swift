// BackstoreRequest: how the backstores here look at a request: its scratch, its list, its segments.
//
// Owns: nothing. Called by: the backstores. Must not know: which backstore.

import CBackstore
import CLinux
import Glibc

/// A request of the seam.
typealias RequestPointer = UnsafeMutablePointer<scsi_backstore_request>

/// The bounds of the backstores here.
public enum BackstoreLimits {
    /// Bytes of one bounce buffer, for direct I/O of segments that the kernel finds unaligned. A longer request is done
    /// in pieces of this size.
    public static let bounceBytes = 256 << 10
    /// Bounce buffers of one backstore. A request that finds none waits for one in the order of arrival.
    public static let bounceBuffers = 16
    /// Segments of one system call (IOV_MAX of Linux); a longer list is done in pieces.
    public static let segmentsPerCall = 1024
    /// Bytes of zeros written by one call where the medium cannot zero a range itself.
    public static let zeroBytes = 1 << 20
    /// Bytes of RAM that are cleared at once; more go to a helper thread, so that other disks need not wait.
    public static let ramClearBytes: UInt64 = 256 << 10
    /// Words of 64 pages that one EXTENTS request of a RAM disk looks at: 64 KiB of them, some microseconds.
    public static let ramExtentWords = 8192
    /// How often an interrupted call (EINTR, EAGAIN) is repeated before it counts as failed.
    public static let retries: UInt8 = 16
    /// Requests that one fault injector has in flight at its backstore.
    public static let faultInjectionRequests = 1024
}

/// Bytes from the start of a request to its scratch.
@inline(__always)
var scratchOffset: Int { SCSI_BACKSTORE_SCRATCH_OFFSET }

/// Bytes of scratch.
@inline(__always)
var scratchBytes: Int { Int(SCSI_BACKSTORE_SCRATCH_WORDS) * 8 }

/// A first-in first-out list of requests, through a link that stands at a fixed place in their scratch.
@safe
struct RequestList {
    private var head: RequestPointer?
    private var tail: RequestPointer?

    init() {
        unsafe head = nil
        unsafe tail = nil
    }

    var isEmpty: Bool { unsafe head == nil }

    /// The last word of the scratch is the link.
    @inline(__always)
    private static func link(_ request: RequestPointer) -> UnsafeMutablePointer<RequestPointer?> {
        unsafe UnsafeMutableRawPointer(request).advanced(by: scratchOffset + scratchBytes - 8)
            .assumingMemoryBound(to: RequestPointer?.self)
    }

    @inline(__always)
    mutating func append(_ request: RequestPointer) {
        unsafe Self.link(request).pointee = nil
        if let last = unsafe tail { unsafe Self.link(last).pointee = request } else { unsafe head = request }
        unsafe tail = request
    }

    @inline(__always)
    mutating func popFirst() -> RequestPointer? {
        guard let first = unsafe head else { return nil }
        unsafe head = Self.link(first).pointee
        if unsafe head == nil { unsafe tail = nil }
        return unsafe first
    }

    /// Takes everything, leaving an empty list.
    @inline(__always)
    mutating func takeAll() -> RequestList {
        let all = self
        self = RequestList()
        return all
    }
}

/// A position in a request's list of segments.
@safe
struct SegmentCursor {
    var index: UInt32 = 0
    /// Bytes of the segment at `index` that are done.
    var offset: UInt64 = 0

    /// Moves on by a number of bytes that the list is known to have.
    @inline(__always)
    mutating func advance(_ bytes: Int, _ request: RequestPointer) {
        var rest = UInt64(bytes)
        while rest > 0 {
            precondition(unsafe index < request.pointee.segment_count, "segments shorter than the request")
            let left = unsafe UInt64(request.pointee.segments[Int(index)].iov_len) - offset
            if rest < left {
                offset += rest
                return
            }
            rest -= left
            index += 1
            offset = 0
        }
    }

    /// Copies between a linear buffer and the segments from here on, without moving.
    @inline(__always)
    func copy(_ bytes: Int, _ buffer: UnsafeMutableRawPointer, toSegments: Bool, _ request: RequestPointer) {
        var place = Int(index)
        var skip = Int(offset)
        var done = 0
        while done < bytes {
            precondition(unsafe place < Int(request.pointee.segment_count), "segments shorter than the request")
            let segment = unsafe request.pointee.segments[place]
            let count = unsafe min(segment.iov_len - skip, bytes - done)
            if count > 0 {
                let memory = unsafe segment.iov_base! + skip
                if toSegments {
                    unsafe memcpy(memory, buffer + done, count)
                } else {
                    unsafe memcpy(buffer + done, memory, count)
                }
            }
            done += count
            place += 1
            skip = 0
        }
    }
}

/// Fills the array of an EXTENTS request: takes stretches in the order of the medium, joins those in the same state,
/// and makes their ends ends of logical blocks.
@safe
struct ExtentWriter {
    private let extents: UnsafeMutablePointer<scsi_backstore_extent>
    private let capacity: Int
    private let blockSize: UInt64
    private let end: UInt64
    private var count = 0
    /// Where the next stretch begins, in bytes of the medium.
    private(set) var position: UInt64

    init(_ request: RequestPointer, blockSize: UInt64) {
        let segment = unsafe request.pointee.segments!.pointee
        unsafe precondition(request.pointee.segment_count == 1, "an EXTENTS request without its array")
        capacity = unsafe segment.iov_len / MemoryLayout<scsi_backstore_extent>.stride
        precondition(capacity > 0, "an EXTENTS request without room for an answer")
        unsafe extents = segment.iov_base.assumingMemoryBound(to: scsi_backstore_extent.self)
        self.blockSize = blockSize
        position = unsafe request.pointee.offset
        end = unsafe request.pointee.offset + request.pointee.length
    }

    /// Adds the stretch from `position` to `limit`, which is cut to the request.
    ///
    /// - Returns: Whether there is more to tell and room for it.
    mutating func add(_ state: Int, to limit: UInt64) -> Bool {
        // A block of which a part is mapped is mapped.
        let up = state == SCSI_BACKSTORE_MAPPED ? blockSize - 1 : 0
        let rounded = min((min(limit, end) + up) / blockSize * blockSize, end)
        guard rounded > position else { return limit < end }
        let length = rounded - position
        if count > 0, unsafe extents[count - 1].state == UInt32(state) {
            unsafe extents[count - 1].length += length
        } else {
            guard count < capacity else { return false }
            unsafe extents[count] = scsi_backstore_extent(length: length, state: UInt32(state), reserved: 0)
            count += 1
        }
        position = rounded
        return position < end
    }
}

/// Answers a SPACE request. The product of what the system tells may be more than there are bytes.
func answerSpace(_ request: RequestPointer, used: UInt64, available: (partialValue: UInt64, overflow: Bool)) {
    let segment = unsafe request.pointee.segments!.pointee
    unsafe precondition(
        request.pointee.segment_count == 1 && segment.iov_len >= MemoryLayout<scsi_backstore_space>.size,
        "a SPACE request without room for an answer")
    let space = scsi_backstore_space(
        used: used, available: available.overflow ? .max : available.partialValue,
        flags: UInt32(SCSI_BACKSTORE_SPACE_SHARED), reserved: 0)
    unsafe segment.iov_base.storeBytes(of: space, as: scsi_backstore_space.self)
}

/// Traps unless the core asks for a range inside the medium: it has checked the guest's.
@inline(__always)
func checkRange(_ request: RequestPointer, size: UInt64) {
    precondition(
        unsafe request.pointee.offset <= size && request.pointee.length <= size - request.pointee.offset,
        "a request past the end of the medium")
}
