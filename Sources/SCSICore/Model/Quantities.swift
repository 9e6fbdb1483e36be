// Quantities: block addresses and counts, byte offsets and counts, as types that do not mix.
//
// Called by: commands and the device server. Must not know: tasks or media.

/// A logical block address: the number of a logical block of the medium (SBC-4 4.5).
public struct LogicalBlockAddress: Equatable, Comparable, Sendable {
    /// The block's number, from 0.
    public let value: UInt64

    /// The address with this number.
    @inline(__always)
    public init(_ value: UInt64) { self.value = value }

    /// The order of the blocks on the medium.
    public static func < (left: Self, right: Self) -> Bool { left.value < right.value }
}

/// A number of logical blocks.
public struct BlockCount: Equatable, Comparable, Sendable {
    /// How many blocks.
    public let value: UInt64

    /// This many blocks.
    @inline(__always)
    public init(_ value: UInt64) { self.value = value }

    /// Fewer before more.
    public static func < (left: Self, right: Self) -> Bool { left.value < right.value }
}

/// A number of bytes.
public struct ByteCount: Equatable, Comparable, Sendable {
    /// How many bytes.
    public let value: UInt64

    /// This many bytes.
    @inline(__always)
    public init(_ value: UInt64) { self.value = value }

    /// Fewer before more.
    public static func < (left: Self, right: Self) -> Bool { left.value < right.value }
}

/// The distance of a byte from the first byte of the medium.
public struct ByteOffset: Equatable, Sendable {
    /// In bytes.
    public let value: UInt64

    /// This far from the first byte.
    @inline(__always)
    public init(_ value: UInt64) { self.value = value }
}

/// The shape of a medium: how many blocks of which length.
struct MediumExtent {
    let blocks: BlockCount
    /// Log2 of the logical block length in bytes: 9 or 12.
    let blockShift: UInt64

    /// Whether `count` blocks from `address` on all exist. Two comparisons, because a sum could wrap.
    @inline(__always)
    func contains(_ address: LogicalBlockAddress, _ count: BlockCount) -> Bool {
        address.value <= blocks.value && count.value <= blocks.value &- address.value
    }

    /// Where a block begins. The caller has checked that it exists.
    @inline(__always)
    func offset(of address: LogicalBlockAddress) -> ByteOffset { ByteOffset(address.value << blockShift) }

    /// How long blocks are together. The caller has bounded the count.
    @inline(__always)
    func bytes(_ count: BlockCount) -> ByteCount { ByteCount(count.value << blockShift) }

    /// The block that holds a byte.
    func address(of offset: ByteOffset) -> LogicalBlockAddress { LogicalBlockAddress(offset.value >> blockShift) }
}
