// SegmentedBuffer: memory of an initiator in pieces of any length, with guard bytes between them.
//
// Owns: the memory. Called by: MockPort. Must not know: commands.

import CIOVector
import Glibc

/// The buffers of one data transfer. Bytes around the pieces are guards that nobody may touch.
@safe
final class SegmentedBuffer {
    private static let guardLength = 24
    private static let guardByte: UInt8 = 0x5c
    private static let poisonByte: UInt8 = 0xa9

    private let memory: UnsafeMutableRawBufferPointer
    private let pieces: [Range<Int>]
    let length: Int

    init(layout: [Int]) {
        var offset = Self.guardLength
        var pieces: [Range<Int>] = []
        for length in layout {
            pieces.append(offset..<offset + length)
            offset += length + Self.guardLength
        }
        self.pieces = pieces
        length = layout.reduce(0, +)
        unsafe memory = .allocate(byteCount: offset, alignment: 16)
        unsafe memory.initializeMemory(as: UInt8.self, repeating: Self.guardByte)
    }

    deinit { unsafe memory.deallocate() }

    var count: Int { pieces.count }

    /// Writes the segment list that names the pieces.
    func describe(in list: UnsafeMutablePointer<iovec>) {
        for (index, piece) in pieces.enumerated() {
            unsafe list[index] = unsafe iovec(iov_base: memory.baseAddress! + piece.lowerBound, iov_len: piece.count)
        }
    }

    var bytes: [UInt8] {
        get {
            // The standard library writes to the one empty array that all threads share, which a sanitizer minds.
            if length == 0 { return [] }
            return unsafe [UInt8](unsafeUninitializedCapacity: length) { buffer, count in
                for piece in pieces where !piece.isEmpty {
                    unsafe memcpy(buffer.baseAddress! + count, memory.baseAddress! + piece.lowerBound, piece.count)
                    count += piece.count
                }
            }
        }
        set {
            var done = 0
            for piece in pieces where !piece.isEmpty {
                unsafe newValue.withUnsafeBytes { source in
                    _ = unsafe memcpy(memory.baseAddress! + piece.lowerBound, source.baseAddress! + done, piece.count)
                }
                done += piece.count
            }
        }
    }

    /// Whether the pieces hold these bytes.
    func holds(_ bytes: [UInt8]) -> Bool {
        var done = 0
        for piece in pieces where !piece.isEmpty {
            let isSame = unsafe bytes.withUnsafeBytes {
                unsafe memcmp(memory.baseAddress! + piece.lowerBound, $0.baseAddress! + done, piece.count) == 0
            }
            if !isSame { return false }
            done += piece.count
        }
        return true
    }

    func fill(_ byte: UInt8) {
        for piece in pieces where !piece.isEmpty {
            unsafe UnsafeMutableRawBufferPointer(rebasing: memory[piece]).initializeMemory(
                as: UInt8.self, repeating: byte)
        }
    }

    /// The initiator reuses the memory for something else: whoever writes to it now destroys that.
    func poison() { fill(Self.poisonByte) }

    var isPoisoned: Bool { pieces.allSatisfy { isFilled($0, with: Self.poisonByte) } }

    /// Whether all bytes of a range are the same as its first, which is `byte`.
    private func isFilled(_ range: Range<Int>, with byte: UInt8) -> Bool {
        guard let start = unsafe memory.baseAddress, !range.isEmpty else { return true }
        let first = unsafe start + range.lowerBound
        return unsafe first.load(as: UInt8.self) == byte && memcmp(first, first + 1, range.count - 1) == 0
    }

    var guardsAreIntact: Bool {
        var offset = 0
        for piece in pieces + [unsafe memory.count..<memory.count] {
            if !isFilled(offset..<piece.lowerBound, with: Self.guardByte) { return false }
            offset = piece.upperBound
        }
        return true
    }
}
