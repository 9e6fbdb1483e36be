// TargetPorts: the target ports of one target device: which fronts reach it, and by which numbers initiators know them.
//
// Owns: the ports by I_T nexus. Called by: TargetDevice, the commands that report ports. Must not know: transports.
//
// A front serves one initiator port through one target port, so the name of the one names the other. Identifier and
// name are computed from that name and the target's, so that they are the same after a restart, in whatever order the
// fronts come.

/// A target port, as initiators tell it from the others of the target device.
struct TargetPort: Equatable {
    /// RELATIVE TARGET PORT IDENTIFIER, 1 to 65 535 (SPC-6 4.3.5).
    let relativeIdentifier: UInt16
    /// An NAA locally assigned name: 3h and 60 bits.
    let name: UInt64
}

/// The ports of one target device.
struct TargetPorts {
    /// TARGET PORT GROUP: all ports are in one.
    static let group: UInt16 = 1

    /// By index of the nexus. It stays when the nexus is lost: the port is still there.
    private var ports: [(initiatorPort: String, port: TargetPort)?]
    private let target: UInt64

    /// - Parameter target: The target's NAA name.
    init(target: UInt64) {
        self.target = target
        ports = Array(repeating: nil, count: Limits.nexusesPerTarget)
    }

    /// Each port once, in ascending order of its identifier.
    var all: [TargetPort] {
        var seen: Set<UInt16> = []
        return ports.compactMap { $0?.port }.filter { seen.insert($0.relativeIdentifier).inserted }
            .sorted { $0.relativeIdentifier < $1.relativeIdentifier }
    }

    /// The port of a nexus.
    subscript(nexus: UInt16) -> TargetPort? { ports[Int(nexus)]?.port }

    /// A nexus is established through the port that goes with an initiator port.
    ///
    /// - Returns: Whether the list of ports has changed by it.
    mutating func establish(_ nexus: UInt16, initiatorPort: String) -> Bool {
        let before = all
        ports[Int(nexus)] = nil
        let known = ports.first { $0?.initiatorPort == initiatorPort } ?? nil
        ports[Int(nexus)] = known ?? (initiatorPort: initiatorPort, port: newPort(initiatorPort))
        return all != before
    }

    private func newPort(_ initiatorPort: String) -> TargetPort {
        let hash = Self.hash(target, initiatorPort)
        var identifier = UInt16(truncatingIfNeeded: hash ^ hash >> 16 ^ hash >> 32 ^ hash >> 48)
        // As many identifiers as there are nexuses are taken at most.
        while identifier == 0 || ports.contains(where: { $0?.port.relativeIdentifier == identifier }) {
            identifier &+= 1
        }
        return TargetPort(relativeIdentifier: identifier, name: 0x3 << 60 | hash & (1 << 60 - 1))
    }

    /// FNV-1a, 64 bits: not changed by the process or the compiler, as Swift's own hash values are.
    private static func hash(_ target: UInt64, _ name: String) -> UInt64 {
        let bytes = (0..<8).map { UInt8(truncatingIfNeeded: target >> (56 - 8 * UInt64($0))) } + Array(name.utf8)
        return bytes.reduce(0xcbf2_9ce4_8422_2325) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
    }
}
