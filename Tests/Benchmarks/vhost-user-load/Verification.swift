// Verification: what is written into each block, so that a read shows whose write it sees.
//
// Owns: for each range of a request's length, the last write that was completed. Called by: LoadStream. Must not know:
// queues.

import Glibc

/// Stamps blocks with (LBA, writer, sequence) and checks them.
///
/// No range has two requests at once while one of them is a write, so what a read must return is known exactly: the
/// last write of this run, and before there was one, any block that is consistent in itself, or never was stamped.
@safe
final class Verification {
    /// Ranges that can be remembered: 1 GiB of memory.
    static let rangeLimit = 1 << 26
    private static let magic: UInt64 = 0x7461_7267_6574_6421
    private static let words = 4

    private struct Range {
        /// The last completed write: 0 for none.
        var sequence: UInt32 = 0
        var writer: UInt16 = 0
        var readers: UInt16 = 0
        var isWritten = false
    }

    let blockLength: Int
    private let requestLength: Int
    private let ranges: UnsafeMutablePointer<Range>
    private var nextSequence: UInt32 = 1
    /// Blocks that were compared with what they must hold.
    private(set) var blocks: UInt64 = 0

    init(ranges count: Int, requestLength: Int, blockLength: Int) throws {
        guard count <= Self.rangeLimit else {
            throw LoadError("--verify remembers \(Self.rangeLimit) requests' places; limit the size with --size")
        }
        self.requestLength = requestLength
        self.blockLength = blockLength
        unsafe ranges = .allocate(capacity: count)
        unsafe ranges.initialize(repeating: Range(), count: count)
    }

    deinit { unsafe ranges.deallocate() }

    /// Reserves a range for a request; no if it would be unclear what a read sees.
    func begin(_ range: Int, isWrite: Bool) -> Bool {
        let entry = unsafe ranges + range
        if unsafe entry.pointee.isWritten || isWrite && entry.pointee.readers > 0 { return false }
        if isWrite { unsafe entry.pointee.isWritten = true } else { unsafe entry.pointee.readers += 1 }
        return true
    }

    /// Fills a request's data. Returns its sequence, which `endWrite` wants.
    func stamp(_ data: UnsafeMutableRawPointer, range: Int, writer: UInt16) -> UInt32 {
        let sequence = nextSequence
        nextSequence &+= 1
        var block = UInt64(range) * UInt64(requestLength / blockLength)
        for start in stride(from: 0, to: requestLength, by: blockLength) {
            let words = unsafe (data + start).assumingMemoryBound(to: UInt64.self)
            unsafe words[0] = Self.magic
            unsafe words[1] = block
            unsafe words[2] = UInt64(writer)
            unsafe words[3] = UInt64(sequence)
            let seed = Self.seed(block, writer, sequence)
            for index in Self.words..<blockLength / 8 { unsafe words[index] = seed &+ UInt64(index) }
            block += 1
        }
        return sequence
    }

    private static func seed(_ block: UInt64, _ writer: UInt16, _ sequence: UInt32) -> UInt64 {
        var value = block &* 0x9e37_79b9_7f4a_7c15 ^ UInt64(writer) << 48 ^ UInt64(sequence)
        value = (value ^ value >> 31) &* 0xbf58_476d_1ce4_e5b9
        return value ^ value >> 29
    }

    func endWrite(range: Int, writer: UInt16, sequence: UInt32) {
        unsafe ranges[range].isWritten = false
        unsafe ranges[range].sequence = sequence
        unsafe ranges[range].writer = writer
    }

    /// Checks what a read returned; a text if it is wrong.
    func endRead(_ data: UnsafeMutableRawPointer, range: Int) -> String? {
        unsafe ranges[range].readers -= 1
        let expected = unsafe ranges[range]
        var block = UInt64(range) * UInt64(requestLength / blockLength)
        for start in stride(from: 0, to: requestLength, by: blockLength) {
            if let problem = unsafe check((data + start).assumingMemoryBound(to: UInt64.self), block, expected) {
                return problem
            }
            block += 1
        }
        return nil
    }

    private func check(_ words: UnsafeMutablePointer<UInt64>, _ block: UInt64, _ expected: Range) -> String? {
        if unsafe words[0] != Self.magic {
            guard expected.sequence != 0 else { return nil }
            return "block \(block) holds no stamp; writer \(expected.writer) sequence \(expected.sequence) is due"
        }
        let found = unsafe (
            block: words[1], writer: UInt16(truncatingIfNeeded: words[2]),
            sequence: UInt32(truncatingIfNeeded: words[3])
        )
        guard found.block == block else { return "block \(block) holds the data of block \(found.block)" }
        if expected.sequence != 0, found.writer != expected.writer || found.sequence != expected.sequence {
            return "block \(block) holds writer \(found.writer) sequence \(found.sequence); "
                + "writer \(expected.writer) sequence \(expected.sequence) is due"
        }
        let seed = Self.seed(block, found.writer, found.sequence)
        for index in Self.words..<blockLength / 8 where unsafe words[index] != seed &+ UInt64(index) {
            return "block \(block), byte \(index * 8): not what writer \(found.writer) wrote as \(found.sequence)"
        }
        blocks += 1
        return nil
    }
}
