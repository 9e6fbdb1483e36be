// Sense: sense data read back from its bytes, by a decoder of its own (SPC-4: descriptor and fixed format sense data).
//
// Called by: tests. Must not know: how the core encodes it.

/// Decoded sense data.
public struct Sense: Equatable, CustomStringConvertible, Sendable {
    /// Whether it came in descriptor format.
    public var isDescriptorFormat = false
    /// Whether it is of a deferred error.
    public var isDeferred = false
    /// SENSE KEY.
    public var key: UInt8 = 0
    /// ADDITIONAL SENSE CODE and qualifier.
    public var code: UInt16 = 0
    /// INFORMATION, if valid.
    public var information: UInt64?
    /// SENSE KEY SPECIFIC, if valid: the three bytes.
    public var specific: [UInt8]?

    /// Decodes bytes; `nil` if there are none or they are malformed.
    public init?(_ bytes: [UInt8]) {
        guard let first = bytes.first else { return nil }
        isDeferred = first & 0x7d == 0x71
        switch first & 0x7e {
        case 0x70:
            guard bytes.count == 18, bytes[7] == 10 else { return nil }
            key = bytes[2] & 0x0f
            code = UInt16(bytes[12]) << 8 | UInt16(bytes[13])
            if first & 0x80 != 0 { information = bytes[3..<7].reduce(0) { $0 << 8 | UInt64($1) } }
            if bytes[15] & 0x80 != 0 { specific = Array(bytes[15..<18]) }
        case 0x72:
            guard bytes.count >= 8, bytes.count == 8 + Int(bytes[7]) else { return nil }
            isDescriptorFormat = true
            key = bytes[1] & 0x0f
            code = UInt16(bytes[2]) << 8 | UInt16(bytes[3])
            guard readDescriptors(Array(bytes[8...])) else { return nil }
        default: return nil
        }
    }

    private mutating func readDescriptors(_ bytes: [UInt8]) -> Bool {
        var rest = bytes[...]
        while let type = rest.first {
            guard rest.count >= 2 else { return false }
            let body = Array(rest.dropFirst(2).prefix(Int(rest[rest.startIndex + 1])))
            guard body.count == Int(rest[rest.startIndex + 1]) else { return false }
            switch type {
            case 0:
                guard body.count == 10, body[0] & 0x80 != 0 else { return false }
                information = body[2...].reduce(0) { $0 << 8 | UInt64($1) }
            case 2:
                guard body.count == 6 else { return false }
                specific = Array(body[2..<5])
            default: return false
            }
            rest = rest.dropFirst(2 + body.count)
        }
        return true
    }

    /// Where the sense key specific bytes point: the byte, the bit if one is named, and whether it is in the CDB.
    public var field: (inCDB: Bool, byte: Int, bit: Int?)? {
        guard let specific else { return nil }
        return (
            inCDB: specific[0] & 0x40 != 0, byte: Int(specific[1]) << 8 | Int(specific[2]),
            bit: specific[0] & 0x08 != 0 ? Int(specific[0] & 7) : nil
        )
    }

    /// Key, code and pointer in one short line, as tests compare them: "5/2400 CDB 2.7", "deferred 3/0c00".
    public var description: String {
        let code = String(UInt32(code) | 0x10000, radix: 16).dropFirst()
        var text = "\(isDeferred ? "deferred " : "")\(String(key, radix: 16))/\(code)"
        if let field {
            text += " \(field.inCDB ? "CDB" : "list") \(field.byte)" + (field.bit.map { ".\($0)" } ?? "")
        }
        return text
    }
}
