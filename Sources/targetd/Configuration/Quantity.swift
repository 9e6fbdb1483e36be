// Quantity: sizes and durations as people write them.
//
// Owns: the units, and the sentences about what is allowed. Called by: the configuration reader, the command line and
// everything that prints. Must not know: what is measured.

/// Why a text is not a quantity: the sentence to show after the text itself.
struct QuantityError: Error, Equatable, CustomStringConvertible {
    /// What is allowed.
    let text: String

    /// The same, for the command line's messages.
    var description: String { text }
}

/// A number of bytes, written `4096`, `512MiB` or `10GB`.
enum Size {
    private static let units: [(name: String, bytes: UInt64)] = [
        ("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1),
        ("PB", 1_000_000_000_000_000), ("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000),
        ("kB", 1000),
    ]

    /// Reads a size in bytes. A unit that means 1000 to some and 1024 to others (`10G`) is refused, not guessed.
    static func parse(_ text: String) throws(QuantityError) -> UInt64 {
        let (number, unit) = try split(text, allowed: allowed)
        guard !unit.isEmpty else { return number }
        guard let factor = units.first(where: { $0.name == unit })?.bytes else {
            throw QuantityError(text: hint(number, unit) ?? allowed)
        }
        let (bytes, overflow) = number.multipliedReportingOverflow(by: factor)
        guard !overflow else { throw QuantityError(text: "is more than 64 bits of bytes can count") }
        return bytes
    }

    /// Writes a size with the largest binary unit that divides it, so that `parse` gives the same number back.
    static func format(_ bytes: UInt64) -> String {
        guard bytes > 0, let unit = units.first(where: { bytes % $0.bytes == 0 }) else { return "0B" }
        return "\(bytes / unit.bytes)\(unit.name)"
    }

    private static let allowed =
        "is not a size: write a whole number and a unit: B, KiB, MiB, GiB, TiB or PiB (powers of 1024), "
        + "or kB, MB, GB, TB or PB (powers of 1000), such as 10GiB"

    private static func hint(_ number: UInt64, _ unit: String) -> String? {
        guard let letter = unit.first, "kKmMgGtTpP".contains(letter) else { return nil }
        let prefix = letter.uppercased()
        let rest = unit.dropFirst().lowercased()
        guard ["", "b", "ib"].contains(rest) else { return nil }
        let binary = "\(number)\(prefix)iB"
        let decimal = "\(number)\(prefix == "K" ? "k" : prefix)B"
        return "does not say which unit is meant: write \(binary) (powers of 1024) or \(decimal) (powers of 1000)"
    }
}

/// A span of time, written `10s`, `500ms` or `20us`.
enum TimeSpan {
    private static let units: [(name: String, nanoseconds: UInt64)] = [
        ("h", 3_600_000_000_000), ("min", 60_000_000_000), ("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1000),
        ("ns", 1),
    ]

    /// Reads a span, in nanoseconds. Only 0 needs no unit.
    static func parse(_ text: String) throws(QuantityError) -> UInt64 {
        let (number, unit) = try split(text, allowed: allowed)
        if number == 0 && unit.isEmpty { return 0 }
        guard let factor = units.first(where: { $0.name == unit })?.nanoseconds else {
            throw QuantityError(text: allowed)
        }
        let (nanoseconds, overflow) = number.multipliedReportingOverflow(by: factor)
        guard !overflow else { throw QuantityError(text: "is longer than 64 bits of nanoseconds can count") }
        return nanoseconds
    }

    /// Writes a span with the largest unit that divides it, so that `parse` gives the same span back.
    static func format(_ nanoseconds: UInt64) -> String {
        guard nanoseconds > 0, let unit = units.first(where: { nanoseconds % $0.nanoseconds == 0 }) else { return "0s" }
        return "\(nanoseconds / unit.nanoseconds)\(unit.name)"
    }

    private static let allowed =
        "is not a time: write a whole number and a unit: ns, us, ms, s, min or h, such as 10s"
}

/// The digits at the front and the unit behind them.
private func split(_ text: String, allowed: String) throws(QuantityError) -> (number: UInt64, unit: String) {
    let digits = text.prefix { $0.isASCII && $0.isNumber }
    guard !digits.isEmpty else { throw QuantityError(text: allowed) }
    guard let number = UInt64(digits) else { throw QuantityError(text: "has more digits than 64 bits hold") }
    return (number, text.dropFirst(digits.count).trimmingSpaces())
}

extension Substring {
    /// Without the spaces at its front.
    fileprivate func trimmingSpaces() -> String { String(drop { $0 == " " }) }
}
