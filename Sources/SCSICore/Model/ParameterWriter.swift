// ParameterWriter, ParameterReader: big-endian fields into and out of a byte buffer of fixed size.
//
// Called by: sense data and every command with parameter data or a parameter list. Must not know: what the bytes mean.

/// Writes big-endian fields one after the other. What does not fit is counted and dropped.
@safe
struct ParameterWriter: ~Copyable {
    private let buffer: UnsafeMutableRawBufferPointer
    /// How long the parameter data is, whether it fitted or not.
    private(set) var length = 0

    init(_ buffer: UnsafeMutableRawBufferPointer) { unsafe self.buffer = buffer }

    /// How many bytes are in the buffer.
    var written: Int { unsafe min(length, buffer.count) }

    mutating func byte(_ value: UInt8) {
        if unsafe length < buffer.count { unsafe buffer[length] = value }
        length += 1
    }

    mutating func uint16(_ value: UInt16) {
        byte(UInt8(value >> 8))
        byte(UInt8(truncatingIfNeeded: value))
    }

    mutating func uint32(_ value: UInt32) {
        uint16(UInt16(value >> 16))
        uint16(UInt16(truncatingIfNeeded: value))
    }

    mutating func uint64(_ value: UInt64) {
        uint32(UInt32(value >> 32))
        uint32(UInt32(truncatingIfNeeded: value))
    }

    mutating func zeros(_ count: Int) { for _ in 0..<count { byte(0) } }

    /// Bytes of an array, all of them.
    mutating func bytes(_ bytes: [UInt8]) { for value in bytes { byte(value) } }

    /// ASCII text, left-aligned and padded with spaces to `width` bytes (SPC-4: ASCII data field requirements); longer
    /// text is cut.
    mutating func text(_ text: [UInt8], width: Int) {
        for index in 0..<width { byte(index < text.count ? text[index] : 0x20) }
    }

    /// Overwrites a byte that was written before.
    mutating func patch(_ value: UInt8, at offset: Int) {
        if unsafe offset < buffer.count { unsafe buffer[offset] = value }
    }

    /// Overwrites a two-byte field that was written before.
    mutating func patch16(_ value: UInt16, at offset: Int) {
        patch(UInt8(value >> 8), at: offset)
        patch(UInt8(truncatingIfNeeded: value), at: offset + 1)
    }

    /// Overwrites a four-byte field that was written before.
    mutating func patch32(_ value: UInt32, at offset: Int) {
        patch16(UInt16(value >> 16), at: offset)
        patch16(UInt16(truncatingIfNeeded: value), at: offset + 2)
    }
}

/// Reads big-endian fields at offsets that the caller has checked against `count`.
@safe
struct ParameterReader {
    private let buffer: UnsafeRawBufferPointer

    init(_ buffer: UnsafeRawBufferPointer) { unsafe self.buffer = buffer }

    /// Length in bytes.
    var count: Int { unsafe buffer.count }

    /// All of it.
    var bytes: [UInt8] { unsafe Array(buffer) }

    func byte(_ offset: Int) -> UInt8 { unsafe buffer[offset] }
    func uint16(_ offset: Int) -> UInt16 { UInt16(byte(offset)) << 8 | UInt16(byte(offset + 1)) }
    func uint32(_ offset: Int) -> UInt32 { UInt32(uint16(offset)) << 16 | UInt32(uint16(offset + 2)) }
    func uint64(_ offset: Int) -> UInt64 { UInt64(uint32(offset)) << 32 | UInt64(uint32(offset + 4)) }
}
