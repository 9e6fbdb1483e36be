// Name: the names of targets and logical units.
//
// Owns: how NAA names are written, and how a logical unit without a given name gets one. Called by: the configuration
// reader and the daemon. Must not know: what a target does.

/// An NAA name of 64 bits (SPC-4 7.8.6), written `naa.` and 16 hexadecimal digits.
struct NAAName: Hashable, Comparable, Sendable, CustomStringConvertible {
    /// The 64 bits.
    let value: UInt64

    /// The name with these bits.
    init(_ value: UInt64) { self.value = value }

    /// Reads `naa.` and 16 hexadecimal digits; the first digit is the kind of name.
    ///
    /// - Parameter kinds: The kinds that are allowed here: 2 IEEE extended, 3 locally assigned, 5 IEEE registered; and
    ///   6, which by SPC-6 has 128 bits, but which Linux and Xen tools have long given to targets in 64.
    init(parsing text: String, kinds: ClosedRange<UInt64>...) throws(QuantityError) {
        let digits = text.dropFirst(4)
        guard text.hasPrefix("naa."), digits.utf8.count == 16, digits.allSatisfy({ $0.isASCII && $0.isHexDigit }),
            let value = UInt64(digits, radix: 16)
        else {
            throw QuantityError(text: "is not an NAA name: write naa. and 16 hexadecimal digits")
        }
        guard kinds.contains(where: { $0.contains(value >> 60) }) else {
            let allowed = kinds.flatMap(Array.init).map(String.init).joined(separator: ", ")
            throw QuantityError(
                text: "is an NAA name of a kind that has no place here: the first digit can be \(allowed)")
        }
        self.value = value
    }

    /// `naa.` and 16 lower case digits.
    var description: String { "naa." + hexadecimal }

    /// The 16 digits.
    var hexadecimal: String {
        let digits = String(value, radix: 16)
        return String(repeating: "0", count: 16 - digits.count) + digits
    }

    /// By the bits.
    static func < (left: Self, right: Self) -> Bool { left.value < right.value }

    /// A locally assigned name (NAA 3h) made of what stays the same over restarts: the same parts give the same name.
    ///
    /// Locally assigned, because an IEEE registered name would need a company identifier of our own.
    static func derived(from parts: String...) -> NAAName {
        // FNV-1a over the parts, each ended by a byte that no text contains; then bits are mixed so that the 60 that
        // are kept depend on all. Changing this renames every unit without a given name: never change it.
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        for part in parts {
            for byte in part.utf8 { hash = (hash ^ UInt64(byte)) &* 0x0000_0100_0000_01b3 }
            hash = (hash ^ 0xff) &* 0x0000_0100_0000_01b3
        }
        hash = (hash ^ (hash >> 33)) &* 0xff51_afd7_ed55_8ccd
        hash = (hash ^ (hash >> 33)) &* 0xc4ce_b9fe_1a85_ec53
        hash ^= hash >> 33
        return NAAName(3 << 60 | hash >> 4)
    }
}
