// FuzzInput: libFuzzer's bytes, read as choices and numbers. Behind its end an input has zeros.
//
// Called by: the fuzzers. Must not know: any of them.

/// What is left of an input. A copy reads on from the same place.
struct FuzzInput {
    private var rest: ArraySlice<UInt8>

    init(_ bytes: [UInt8]) { rest = bytes[...] }

    /// Whether nothing is left: the sequence of actions that it stands for ends.
    var isEmpty: Bool { rest.isEmpty }

    mutating func byte() -> UInt8 { rest.popFirst() ?? 0 }

    /// Most significant byte first.
    mutating func number<Value: FixedWidthInteger & UnsignedInteger>(_: Value.Type = Value.self) -> Value {
        (0..<MemoryLayout<Value>.size).reduce(0) { value, _ in
            // Shifted twice: a byte cannot be shifted by its whole width in one go.
            (value << 4) << 4 | Value(truncatingIfNeeded: byte())
        }
    }

    /// A number below `limit`, which is 1 to 256.
    mutating func below(_ limit: Int) -> Int { Int(byte()) % limit }

    mutating func pick<Value>(_ values: [Value]) -> Value { values[below(values.count)] }

    mutating func flag() -> Bool { byte() & 1 != 0 }

    /// Once in `rate` times.
    mutating func rarely(_ rate: Int) -> Bool { below(rate) == rate - 1 }

    /// The next bytes: as many as there are, up to `count`.
    mutating func bytes(_ count: Int) -> [UInt8] {
        let found = Array(rest.prefix(count))
        rest = rest.dropFirst(count)
        return found
    }

    /// The next bytes; zeros behind the end.
    mutating func exactly(_ count: Int) -> [UInt8] {
        let found = bytes(count)
        return found + [UInt8](repeating: 0, count: count - found.count)
    }

    /// All that is left.
    mutating func remainder() -> [UInt8] { bytes(rest.count) }
}
