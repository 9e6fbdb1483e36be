// TargetPorts: the target ports of one target device, and by which numbers and names initiators know them.
//
// Owns: the numbers and names. Called by: TargetDevice, the commands that report or name ports. Must not know:
// transports.
//
// There is one port for each kind of front, whether or not the front is in use: so numbers and names are the same
// after a restart, in whatever order fronts come, and a registration that names a port stays true (SPC-4 5.13.5).

/// A target port, as initiators tell it from the others of the target device.
struct TargetPort: Equatable {
    /// RELATIVE TARGET PORT IDENTIFIER (SPC-6).
    let relativeIdentifier: UInt16
    /// An NAA locally assigned name: 3h and 60 bits.
    let name: UInt64
}

/// The ports of one target device.
struct TargetPorts {
    /// TARGET PORT GROUP: all ports are in one.
    static let group: UInt16 = 1

    /// Their relative target port identifiers.
    let identifiers: ClosedRange<UInt16>
    private let target: UInt64

    /// - Parameters:
    ///   - target: The target's NAA name.
    ///   - count: How many there are; at least 1.
    init(target: UInt64, count: UInt16) {
        self.target = target
        identifiers = 1...count
    }

    /// In ascending order of identifiers.
    var all: [TargetPort] { identifiers.map { self[$0] } }

    /// The port with a relative target port identifier.
    subscript(identifier: UInt16) -> TargetPort {
        TargetPort(relativeIdentifier: identifier, name: 0x3 << 60 | hash(identifier) & (1 << 60 - 1))
    }

    /// FNV-1a, 64 bits: not changed by the process or the compiler, as Swift's own hash values are.
    private func hash(_ identifier: UInt16) -> UInt64 {
        let bytes = (0..<8).map { UInt8(truncatingIfNeeded: target >> (56 - 8 * UInt64($0))) }
        return (bytes + [UInt8(identifier >> 8), UInt8(truncatingIfNeeded: identifier)])
            .reduce(0xcbf2_9ce4_8422_2325) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
    }
}
