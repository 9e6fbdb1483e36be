// SegmentedBuffer: memory of an initiator in pieces of any length, with guard bytes between them.
//
// Owns: the memory. Called by: MockPort. Must not know: commands.

import CIOVector

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
        get { pieces.flatMap { unsafe Array(memory[$0]) } }
        set {
            var source = newValue[...]
            for piece in pieces {
                for index in piece { unsafe memory[index] = source.removeFirst() }
            }
        }
    }

    func fill(_ byte: UInt8) {
        for piece in pieces where !piece.isEmpty {
            unsafe UnsafeMutableRawBufferPointer(rebasing: memory[piece]).initializeMemory(
                as: UInt8.self, repeating: byte)
        }
    }

    /// The initiator reuses the memory for something else: whoever writes to it now destroys that.
    func poison() { fill(Self.poisonByte) }

    var isPoisoned: Bool {
        pieces.allSatisfy { piece in unsafe memory[piece].allSatisfy { $0 == Self.poisonByte } }
    }

    var guardsAreIntact: Bool {
        var offset = 0
        for piece in pieces + [unsafe memory.count..<memory.count] {
            for index in offset..<piece.lowerBound where unsafe memory[index] != Self.guardByte { return false }
            offset = piece.upperBound
        }
        return true
    }
}
