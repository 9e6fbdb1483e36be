// TargetPorts: the target ports of one target device and their groups, and by which numbers and names initiators know
// them.
//
// Owns: the numbers, the names, the groups. Called by: TargetDevice, the commands that report or name ports. Must not
// know: transports, what a state means (AsymmetricAccess).
//
// A target that is given no groups has one port for each kind of front, whether or not the front is in use, and one
// group of all of them: so numbers and names are the same after a restart, in whatever order fronts come, and a
// registration that names a port stays true (SPC-4 5.13.5).

/// A target port, as initiators tell it from the others of the target device.
struct TargetPort: Equatable {
    /// RELATIVE TARGET PORT IDENTIFIER (SPC-6).
    let relativeIdentifier: UInt16
    /// An NAA locally assigned name: 3h and 60 bits.
    let name: UInt64
}

/// The ports of one target device.
struct TargetPorts {
    /// TARGET PORT GROUP of the group of all ports.
    private static let symmetricGroup: UInt16 = 1

    /// The groups, in ascending order of their identifiers.
    private(set) var groups: [TargetPortGroup]
    /// The relative target port identifiers of all groups, in ascending order.
    let identifiers: [UInt16]
    /// Whether the states of groups can differ: REPORT TARGET PORT GROUPS says which states there can be.
    let isAsymmetric: Bool
    private let target: UInt64

    /// Ports in one group that is always active and optimized.
    ///
    /// - Parameters:
    ///   - target: The target's NAA name.
    ///   - count: How many there are; at least 1.
    init(target: UInt64, count: UInt16) {
        self.init(
            target: target, groups: [TargetPortGroup(identifier: Self.symmetricGroup, ports: Array(1...count))],
            isAsymmetric: false)
    }

    /// Ports in groups, each in one.
    init(target: UInt64, groups: [TargetPortGroup]) { self.init(target: target, groups: groups, isAsymmetric: true) }

    private init(target: UInt64, groups: [TargetPortGroup], isAsymmetric: Bool) {
        self.target = target
        self.groups = groups.map(\.ordered).sorted { $0.identifier < $1.identifier }
        self.isAsymmetric = isAsymmetric
        identifiers = groups.flatMap(\.ports).sorted()
        precondition(
            !groups.isEmpty && groups.count <= Limits.portGroupsPerTarget
                && groups.allSatisfy { !$0.ports.isEmpty } && identifiers.count <= Limits.portsPerTarget
                && Set(groups.map(\.identifier)).count == groups.count
                && Set(identifiers).count == identifiers.count && !identifiers.contains(0),
            "target port groups that overlap, are empty, or are too many")
    }

    /// In ascending order of identifiers.
    var all: [TargetPort] { identifiers.compactMap { self[$0] } }

    /// The port with a relative target port identifier; `nil` if there is none.
    subscript(identifier: UInt16) -> TargetPort? {
        guard identifiers.contains(identifier) else { return nil }
        return TargetPort(relativeIdentifier: identifier, name: 0x3 << 60 | hash(identifier) & (1 << 60 - 1))
    }

    /// The group with an identifier.
    func group(_ identifier: UInt16) -> TargetPortGroup? { groups.first { $0.identifier == identifier } }

    /// The group that a port is in.
    func group(ofPort port: UInt16) -> TargetPortGroup? { groups.first { $0.ports.contains(port) } }

    /// Changes the state of a group that there is.
    mutating func set(_ state: AsymmetricAccessState, of identifier: UInt16, _ cause: TargetPortGroup.StatusCode) {
        let index = groups.firstIndex { $0.identifier == identifier }!
        (groups[index].state, groups[index].statusCode) = (state, cause)
    }

    /// Whether a group can be changed by SET TARGET PORT GROUPS.
    var hasExplicitGroup: Bool { groups.contains(where: \.isExplicit) }

    /// Whether INQUIRY says the same of both through every port.
    func describesSameDevice(as other: TargetPorts) -> Bool {
        hasExplicitGroup == other.hasExplicitGroup && groups.count == other.groups.count
            && zip(groups, other.groups).allSatisfy { $0.identifier == $1.identifier && $0.ports == $1.ports }
    }

    /// FNV-1a, 64 bits: not changed by the process or the compiler, as Swift's own hash values are.
    private func hash(_ identifier: UInt16) -> UInt64 {
        let bytes = (0..<8).map { UInt8(truncatingIfNeeded: target >> (56 - 8 * UInt64($0))) }
        return (bytes + [UInt8(identifier >> 8), UInt8(truncatingIfNeeded: identifier)])
            .reduce(0xcbf2_9ce4_8422_2325) { ($0 ^ UInt64($1)) &* 0x100_0000_01b3 }
    }
}

extension TargetPortGroup {
    /// The same group with its ports in ascending order.
    fileprivate var ordered: Self {
        var group = self
        group.ports.sort()
        return group
    }
}
