// DataBuffers: the initiator's buffers of a task: copying into and out of them, comparing, shortening.
//
// Called by: the device server. Must not know: commands. The memory may be shared with a hostile guest and change at
// any time: it is copied or compared, never interpreted.

import CIOVector
import CTarget

extension TaskHandle {
    /// Copies bytes into the data-in buffers, from an offset on. The caller has checked that they fit.
    func scatter(_ bytes: UnsafeRawBufferPointer, at offset: UInt64 = 0) {
        unsafe Self.forEachPiece(of: command.data_in, from: offset, count: bytes.count) { piece, done in
            unsafe piece.baseAddress!.copyMemory(from: bytes.baseAddress! + done, byteCount: piece.count)
            return true
        }
    }

    /// Copies `buffer.count` bytes out of the data-out buffers. The caller has checked that there are as many.
    func gather(into buffer: UnsafeMutableRawBufferPointer, from offset: UInt64) {
        unsafe forEachDataOut(from: offset, count: buffer.count) { piece, done in
            unsafe (buffer.baseAddress! + done).copyMemory(from: piece.baseAddress!, byteCount: piece.count)
            return true
        }
    }

    /// Changes a buffer by the data-out buffers from an offset on.
    func combineDataOut(
        into buffer: UnsafeMutableRawBufferPointer, from offset: UInt64, _ operation: BitwiseOperation
    ) {
        unsafe forEachDataOut(from: offset, count: buffer.count) { piece, done in
            unsafe operation.combine(
                piece, into: UnsafeMutableRawBufferPointer(rebasing: buffer[done..<done + piece.count]))
            return true
        }
    }

    /// Compares a buffer with the data-out buffers from an offset on.
    ///
    /// - Returns: The offset in `buffer` of the first byte that differs, `nil` if none does.
    func firstDifference(from buffer: UnsafeRawBufferPointer, offset: UInt64) -> Int? {
        var difference: Int?
        unsafe forEachDataOut(from: offset, count: buffer.count) { piece, done in
            let same = unsafe Self.commonPrefix(
                piece, UnsafeRawBufferPointer(rebasing: buffer[done..<done + piece.count]))
            if same < piece.count { difference = done + same }
            return difference == nil
        }
        return difference
    }

    /// How many leading bytes of two buffers of the same length are equal.
    static func commonPrefix(_ left: UnsafeRawBufferPointer, _ right: UnsafeRawBufferPointer) -> Int {
        var index = 0
        while index + 8 <= left.count,
            unsafe left.loadUnaligned(fromByteOffset: index, as: UInt64.self)
                == right.loadUnaligned(fromByteOffset: index, as: UInt64.self)
        { index += 8 }
        while index < left.count, unsafe left[index] == right[index] { index += 1 }
        return index
    }

    private func forEachDataOut(from offset: UInt64, count: Int, _ body: (UnsafeRawBufferPointer, Int) -> Bool) {
        unsafe Self.forEachPiece(of: command.data_out, from: offset, count: count) { piece, done in
            unsafe body(UnsafeRawBufferPointer(piece), done)
        }
    }

    /// Walks the pieces of a segment list; `body` gets each with its distance from `offset`, and says whether to go on.
    private static func forEachPiece(
        of segments: UnsafeMutablePointer<iovec>?, from offset: UInt64, count: Int,
        _ body: (UnsafeMutableRawBufferPointer, Int) -> Bool
    ) {
        var skip = offset
        var done = 0
        var segment = unsafe segments
        while done < count {
            let length = unsafe UInt64(segment!.pointee.iov_len)
            if skip < length {
                let size = min(Int(length - skip), count - done)
                let start = unsafe segment!.pointee.iov_base + Int(skip)
                guard unsafe body(UnsafeMutableRawBufferPointer(start: start, count: size), done) else { return }
                done += size
                skip = 0
            } else {
                skip -= length
            }
            unsafe segment! += 1
        }
    }

    /// Shortens a segment list in place so that its sum is `length`, which it reaches (scsi_target.h allows it).
    ///
    /// - Returns: The number of segments that are left.
    static func shorten(_ segments: UnsafeMutablePointer<iovec>, to length: UInt64) -> UInt32 {
        var left = length
        var index = 0
        while left > 0 {
            let size = unsafe UInt64(segments[index].iov_len)
            if size > left { unsafe segments[index].iov_len = Int(left) }
            left -= min(size, left)
            index += 1
        }
        return UInt32(index)
    }

    /// Takes the first bytes away from the data-out buffers, in place (scsi_target.h allows it). The caller has checked
    /// that there are as many.
    ///
    /// - Returns: The segments that are left.
    func dropDataOut(_ bytes: UInt64) -> (segments: UnsafeMutablePointer<iovec>, count: UInt32) {
        var left = bytes
        var segment = unsafe command.data_out!
        var count = unsafe command.data_out_count
        while left > 0, unsafe left >= UInt64(segment.pointee.iov_len) {
            unsafe left -= UInt64(segment.pointee.iov_len)
            unsafe segment += 1
            count -= 1
        }
        if left > 0 {
            unsafe segment.pointee.iov_base += Int(left)
            unsafe segment.pointee.iov_len -= Int(left)
        }
        return unsafe (segment, count)
    }
}

/// How a command makes new bytes of those of the medium and those of the initiator.
enum BitwiseOperation {
    case or, exclusiveOr

    /// Changes a buffer by another one of the same length.
    func combine(_ bytes: UnsafeRawBufferPointer, into buffer: UnsafeMutableRawBufferPointer) {
        switch self {
        case .or: for index in bytes.indices { unsafe buffer[index] |= bytes[index] }
        case .exclusiveOr: for index in bytes.indices { unsafe buffer[index] ^= bytes[index] }
        }
    }
}
