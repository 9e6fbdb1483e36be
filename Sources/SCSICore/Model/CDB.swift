// CDB: a command descriptor block, copied once by the front, and its big-endian fields.
//
// Called by: the command table and the device server. Must not know: what any command means.

import CTarget

/// A view of the CDB inside a task. The bytes are the core's own copy; a guest cannot change them any more.
@safe
struct CDB {
    private let base: UnsafePointer<UInt8>

    @inline(__always)
    init(_ task: TaskHandle) { unsafe base = task.cdbPointer }

    /// The byte at an offset below 32.
    @inline(__always)
    subscript(_ offset: Int) -> UInt8 { unsafe base[offset] }

    @inline(__always)
    func uint16(_ offset: Int) -> UInt16 { UInt16(bigEndian: load(offset)) }

    @inline(__always)
    func uint24(_ offset: Int) -> UInt32 { UInt32(self[offset]) << 16 | UInt32(uint16(offset + 1)) }

    @inline(__always)
    func uint32(_ offset: Int) -> UInt32 { UInt32(bigEndian: load(offset)) }

    @inline(__always)
    func uint64(_ offset: Int) -> UInt64 { UInt64(bigEndian: load(offset)) }

    /// Whether a bit of a byte is set.
    @inline(__always)
    func bit(_ offset: Int, _ bit: UInt8) -> Bool { self[offset] & (1 << bit) != 0 }

    /// Eight bytes as they lie in memory, for the comparison with a usage mask.
    @inline(__always)
    func word(_ index: Int) -> UInt64 { load(index * 8) }

    @inline(__always)
    private func load<Value: BitwiseCopyable>(_ offset: Int) -> Value {
        unsafe UnsafeRawPointer(base).loadUnaligned(fromByteOffset: offset, as: Value.self)
    }
}
