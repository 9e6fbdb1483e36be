// UnitState: what a logical unit keeps over power loss, as a value and as bytes.
//
// Owns: the format of the bytes. Called by: PersistentState (to save), whoever creates a unit (to restore).
// Must not know: where the bytes are kept, what the sections mean.
//
//   offset  bytes
//        0      8  "SCSIUNIT"
//        8      4  version of this format: 1
//       12      4  length of everything, the checksum included
//       16      8  name of the logical unit (NAA)
//       24      4  number of sections
//       28         the sections, in ascending order of kind:
//                      2  kind      2  version of the section      4  length of what follows      n  its bytes
//      end      4  CRC-32C of all bytes before
//
// All fields are big-endian. A section of a kind that this version of the code does not know is kept as it is.

/// Why bytes are not the state of a logical unit.
public enum UnitStateError: Error, Equatable, CustomStringConvertible {
    /// Not the bytes of any unit's state.
    case foreign
    /// Written in a format, or with a section, that this version does not know.
    case newer(what: String, version: Int)
    /// Shorter or longer than they say, or another checksum.
    case damaged(String)
    /// The state of another logical unit, with this name.
    case otherUnit(UInt64)

    /// Whether what was saved is lost, and not only kept from this version or this unit.
    public var isLoss: Bool {
        switch self {
        case .foreign, .damaged: true
        case .newer, .otherUnit: false
        }
    }

    /// The error in words, without the place.
    public var description: String {
        switch self {
        case .foreign: "this is not the state of a logical unit"
        case .newer(let what, let version): "\(what) has version \(version), which this version does not know"
        case .damaged(let what): "the state is damaged: \(what)"
        case .otherUnit(let name): "this is the state of another logical unit, naa.\(String(name, radix: 16))"
        }
    }
}

/// What a section of the state holds. Numbers are never used again.
public struct UnitStateKind: RawRepresentable, Hashable, Comparable, Sendable {
    /// The number in the bytes.
    public let rawValue: UInt16

    /// The kind with this number.
    public init(rawValue: UInt16) { self.rawValue = rawValue }

    /// Registrations and the persistent reservation, for APTPL (SPC-4 5.13.5).
    static let persistentReservations = Self(rawValue: 1)
    /// Saved values of mode pages (SPC-4 7.5).
    static let savedModePages = Self(rawValue: 2)
    /// SET IDENTIFYING INFORMATION (SPC-4 6.43).
    static let identifyingInformation = Self(rawValue: 3)

    /// The order of the numbers.
    public static func < (left: Self, right: Self) -> Bool { left.rawValue < right.rawValue }
}

/// The state of one logical unit that survives power loss.
public struct UnitState: Equatable, Sendable {
    /// One part of the state.
    struct Section: Equatable, Sendable {
        let kind: UnitStateKind
        /// Version of the format of `bytes`, which their owner defines.
        let version: UInt16
        let bytes: [UInt8]
    }

    /// The NAA name of the unit.
    public let name: UInt64
    /// In ascending order of kind.
    private(set) var sections: [Section] = []

    private static let magic = Array("SCSIUNIT".utf8)
    private static let version: UInt32 = 1
    private static let headerLength = 28
    private static let sectionHeaderLength = 8
    private static let checksumLength = 4

    /// A unit of which nothing was saved.
    public init(name: UInt64) { self.name = name }

    /// The section of a kind, `nil` if there is none.
    subscript(kind: UnitStateKind) -> Section? { sections.first { $0.kind == kind } }

    /// Replaces the section of a kind; `bytes` of `nil` removes it.
    mutating func set(_ kind: UnitStateKind, version: UInt16, _ bytes: [UInt8]?) {
        sections.removeAll { $0.kind == kind }
        guard let bytes else { return }
        sections.insert(
            Section(kind: kind, version: version, bytes: bytes),
            at: sections.firstIndex { kind < $0.kind } ?? sections.endIndex)
    }

    // MARK: Bytes

    /// The bytes of the state.
    public var encoded: [UInt8] {
        var bytes = Self.magic
        let length = sections.reduce(Self.headerLength + Self.checksumLength) {
            $0 + Self.sectionHeaderLength + $1.bytes.count
        }
        bytes.append(bigEndian: Self.version)
        bytes.append(bigEndian: UInt32(length))
        bytes.append(bigEndian: name)
        bytes.append(bigEndian: UInt32(sections.count))
        for section in sections {
            bytes.append(bigEndian: section.kind.rawValue)
            bytes.append(bigEndian: section.version)
            bytes.append(bigEndian: UInt32(section.bytes.count))
            bytes += section.bytes
        }
        bytes.append(bigEndian: Self.checksum(bytes[...]))
        precondition(bytes.count == length && length <= Limits.unitStateBytes, "a unit's state is too long")
        return bytes
    }

    /// Reads the state of the unit `name`, whatever the bytes are. All of them are checked before any is used.
    public init(parsing bytes: [UInt8], name: UInt64) throws(UnitStateError) {
        guard bytes.starts(with: Self.magic) else { throw .foreign }
        guard bytes.count >= Self.headerLength + Self.checksumLength, bytes.count <= Limits.unitStateBytes else {
            throw .damaged("it is \(bytes.count) bytes long")
        }
        let content = bytes.dropLast(Self.checksumLength)
        let version: UInt32 = bytes.field(8)
        guard version == Self.version else { throw .newer(what: "the format", version: Int(version)) }
        let length: UInt32 = bytes.field(12)
        guard length == bytes.count else { throw .damaged("it is \(bytes.count) bytes long and says \(length)") }
        guard Self.checksum(content) == bytes.field(content.count) else { throw .damaged("the checksum is wrong") }
        self.init(name: bytes.field(16))
        guard self.name == name else { throw .otherUnit(self.name) }
        try readSections(content, count: bytes.field(24))
        try PersistentState.check(self)
    }

    private mutating func readSections(_ content: ArraySlice<UInt8>, count: UInt32) throws(UnitStateError) {
        var rest = content.dropFirst(Self.headerLength)
        for _ in 0..<count {
            guard rest.count >= Self.sectionHeaderLength else { throw .damaged("a section is cut off") }
            let header = Array(rest.prefix(Self.sectionHeaderLength))
            let kind = UnitStateKind(rawValue: header.field(0))
            let length: UInt32 = header.field(4)
            rest = rest.dropFirst(Self.sectionHeaderLength)
            guard rest.count >= length else { throw .damaged("section \(kind.rawValue) is cut off") }
            if let last = sections.last, kind <= last.kind { throw .damaged("the sections are not in order") }
            sections.append(Section(kind: kind, version: header.field(2), bytes: Array(rest.prefix(Int(length)))))
            rest = rest.dropFirst(Int(length))
        }
        guard rest.isEmpty else { throw .damaged("there are bytes behind the last section") }
    }

    /// CRC-32C (polynomial 1EDC6F41h, reflected), bit by bit: a state is saved seldom.
    static func checksum(_ bytes: ArraySlice<UInt8>) -> UInt32 {
        var register: UInt32 = .max
        for byte in bytes {
            register ^= UInt32(byte)
            for _ in 0..<8 { register = register >> 1 ^ (register & 1 == 0 ? 0 : 0x82f6_3b78) }
        }
        return ~register
    }
}

extension [UInt8] {
    /// Appends a big-endian field.
    mutating func append<Field: FixedWidthInteger>(bigEndian field: Field) {
        for shift in stride(from: Field.bitWidth - 8, through: 0, by: -8) {
            append(UInt8(truncatingIfNeeded: field >> Field(shift)))
        }
    }

    /// The big-endian field at an offset; the caller has checked that it is there.
    func field<Field: FixedWidthInteger>(_ offset: Int) -> Field {
        self[offset..<offset + Field.bitWidth / 8].reduce(0) { $0 << 8 | Field($1) }
    }
}
