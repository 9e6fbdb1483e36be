// LUN: logical unit numbers as SAM-6 4.7 writes them, and back.
//
// Called by: TargetDevice to route, REPORT LUNS to answer, fronts to address. Must not know: logical units.

/// A logical unit number of the single-level structure: 0 to 16 383, or a well-known logical unit.
public struct LUN: Hashable, Comparable, Sendable {
    /// The number that names the unit, 0 to 16 383.
    public let number: UInt16

    /// The unit with this number; `nil` if single-level addressing does not reach it.
    public init?(_ number: Int) {
        guard number >= 0, number < Limits.logicalUnitsPerTarget else { return nil }
        self.number = UInt16(number)
    }

    /// What the eight bytes of a LUN field address.
    public enum Address: Equatable, Sendable {
        /// A logical unit of the target.
        case unit(LUN)
        /// The REPORT LUNS well-known logical unit, C1 01 (SPC-4 8.2).
        case reportLUNsWellKnown
        /// A structure or method that names nothing here.
        case invalid
    }

    /// Reads the eight bytes of a LUN field (SAM-6 4.7.4): peripheral device addressing with bus 0 (4.7.7.2), flat
    /// space addressing (4.7.7.3), and the well-known unit (4.7.7.5.2). The lower levels must be zero.
    public static func parse(_ bytes: UInt64) -> Address {
        guard bytes & 0x0000_ffff_ffff_ffff == 0 else { return .invalid }
        let first = UInt16(truncatingIfNeeded: bytes >> 48)
        switch first >> 14 {
        case 0 where first >> 8 == 0, 1: return .unit(LUN(unchecked: first & 0x3fff))
        case 3 where first == 0xc101: return .reportLUNsWellKnown
        default: return .invalid
        }
    }

    /// The field that these bytes are, most significant first.
    ///
    /// By shifts, which the compiler makes one load: read through a pointer to a local copy of the tuple, the
    /// optimizer of Swift 6.3.1 drops the copy and reads what is not initialized.
    public static func field(_ bytes: (UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8)) -> UInt64 {
        let high = UInt32(bytes.0) << 24 | UInt32(bytes.1) << 16 | UInt32(bytes.2) << 8 | UInt32(bytes.3)
        let low = UInt32(bytes.4) << 24 | UInt32(bytes.5) << 16 | UInt32(bytes.6) << 8 | UInt32(bytes.7)
        return UInt64(high) << 32 | UInt64(low)
    }

    private init(unchecked number: UInt16) { self.number = number }

    /// The eight bytes that name this unit, most significant first: peripheral device addressing below 256, as
    /// initiators expect it, and flat space addressing above.
    public var field: UInt64 {
        UInt64(number < 256 ? number : 0x4000 | number) << 48
    }

    /// The order of the numbers.
    public static func < (left: Self, right: Self) -> Bool { left.number < right.number }
}
