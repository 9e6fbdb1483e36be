// AsymmetricAccess: what the target port groups of a target let through, and how they change (SPC-4 5.15.2).
//
// Owns: the states and their table; what happens when one changes. Called by: TargetPorts, Admission, the daemon or an
// embedder (implicit changes), SET TARGET PORT GROUPS (explicit ones). Must not know: CDBs, the task set.

/// A target port asymmetric access state (SPC-4 5.15.2.4), by its code on the wire. Offline is one of secondary groups,
/// and LBA dependent one of referrals; there are neither here.
public enum AsymmetricAccessState: UInt8, CaseIterable, Sendable {
    /// All commands, in the best way there is.
    case activeOptimized = 0x0
    /// All commands, in a worse way than through another group.
    case activeNonOptimized = 0x1
    /// What an initiator needs to know the unit and to take it over.
    case standby = 0x2
    /// What an initiator needs to know the states.
    case unavailable = 0x3
    /// The state changes, and it is not said yet into which.
    case transitioning = 0xf

    /// One row each: its bit among those that REPORT TARGET PORT GROUPS says are supported, whether SET TARGET PORT
    /// GROUPS may ask for it (SPC-4 6.45), and what it lets through.
    // swift-format-ignore
    private var row: (supported: UInt8, canBeSet: Bool, access: PortAccess) {
        switch self {
        case .activeOptimized:    (0x01, true,  .full)
        case .activeNonOptimized: (0x02, true,  .full)
        case .standby:            (0x04, true,  .standby)
        case .unavailable:        (0x08, true,  .unavailable)
        case .transitioning:      (0x80, false, .transitioning)
        }
    }

    var supportedBit: UInt8 { row.supported }
    var canBeSet: Bool { row.canBeSet }
    var access: PortAccess { row.access }
}

/// What a target port lets through, for admission: two bits.
enum PortAccess: UInt8, CaseIterable {
    case full, standby, unavailable, transitioning

    /// The flag that a command must have to be carried out (SPC-4 5.15.2.4), none: every command is; and why others
    /// are refused.
    // swift-format-ignore
    private var row: (demands: CommandFlags, code: AdditionalSense) {
        switch self {
        case .full:          ([],                      .noAdditionalSense)
        case .standby:       (.allowedInStandby,       .targetPortInStandbyState)
        case .unavailable:   (.allowedInUnavailable,   .targetPortInUnavailableState)
        case .transitioning: (.allowedInTransition,    .asymmetricAccessStateTransition)
        }
    }

    /// Whether a command is carried out.
    func admits(_ flags: CommandFlags) -> Bool { flags.isSuperset(of: row.demands) }

    /// Why a command is refused.
    var sense: SenseData { self == .full ? .none : SenseData(.notReady, row.code) }
}

/// A target port group of a target device: its state is that of all logical units through all of its ports.
public struct TargetPortGroup: Equatable, Sendable {
    /// Who changed the state the last time: STATUS CODE (SPC-4 6.37).
    public enum StatusCode: UInt8, Sendable {
        /// Nobody.
        case none = 0
        /// SET TARGET PORT GROUPS.
        case explicit = 1
        /// The target itself.
        case implicit = 2
    }

    /// TARGET PORT GROUP.
    public var identifier: UInt16
    /// The relative target port identifiers of its ports, which another device may serve. No port is in two groups.
    public var ports: [UInt16]
    /// The state.
    public var state: AsymmetricAccessState
    /// PREF: an initiator should use it if it can choose.
    public var isPreferred: Bool
    /// Whether SET TARGET PORT GROUPS may change the state.
    public var isExplicit: Bool
    /// Who changed the state.
    public internal(set) var statusCode = StatusCode.none

    /// A group whose state nothing has changed yet.
    public init(
        identifier: UInt16, ports: [UInt16], state: AsymmetricAccessState = .activeOptimized, isPreferred: Bool = false,
        isExplicit: Bool = false
    ) {
        self.identifier = identifier
        self.ports = ports
        self.state = state
        self.isPreferred = isPreferred
        self.isExplicit = isExplicit
    }
}

extension TargetDevice {
    /// Makes these the groups; none: as of a target that was made without. Initiators are told of a changed state or
    /// preference by ASYMMETRIC ACCESS STATE CHANGED, and of other groups or ports by INQUIRY DATA HAS CHANGED, because
    /// vital product data name them. A nexus whose port is in no group any more should be lost: it can do everything.
    public func setPortGroups(_ groups: [TargetPortGroup]) {
        let old = ports
        ports =
            groups.isEmpty
            ? symmetric
            : TargetPorts(target: name, groups: groups.map { $0.following(old.group($0.identifier)) })
        if ports.describesSameDevice(as: old) {
            if ports.groups != old.groups { announceAccess() }
        } else {
            announceAccess()
            for (_, unit) in logicalUnits { unit.portGroupsReplaced() }
        }
    }

    /// Changes the state of a group, implicitly (SPC-4 5.15.2.2): every initiator is told by ASYMMETRIC ACCESS STATE
    /// CHANGED. Commands that are enabled end as they would have; those that are dormant find the new state.
    ///
    /// - Returns: Whether it was another; `nil` if there is no such group, or the target was given none.
    @discardableResult
    public func setAccessState(_ state: AsymmetricAccessState, ofPortGroup identifier: UInt16) -> Bool? {
        guard ports.isAsymmetric, let group = ports.group(identifier) else { return nil }
        guard group.state != state else { return false }
        ports.set(state, of: identifier, .implicit)
        announceAccess()
        return true
    }

    /// SET TARGET PORT GROUPS through a unit. Its nexus knows what it has asked of that unit; of the other units, whose
    /// states change with it, it is told as all others are.
    func setAccessStates(
        _ states: [(group: UInt16, state: AsymmetricAccessState)], by nexus: UInt16, on unit: LogicalUnit
    ) {
        let old = ports.groups
        for (group, state) in states where ports.group(group)?.state != state { ports.set(state, of: group, .explicit) }
        guard ports.groups != old else { return }
        announceAccess(exceptFor: nexus, on: unit)
        for (group, before) in zip(ports.groups, old) where group.state != before.state {
            whenAccessStateSet?(group.identifier, group.state, initiatorPort(nexus) ?? "")
        }
    }

    private func announceAccess(exceptFor nexus: UInt16? = nil, on asked: LogicalUnit? = nil) {
        for unit in allUnits {
            unit.refreshAccess()
            unit.establish(.accessStateChanged, exceptFor: unit === asked ? nexus : nil)
        }
    }

    /// What a nexus's port lets through.
    func access(of nexus: UInt16) -> PortAccess {
        nexusName(nexus).flatMap { ports.group(ofPort: $0.targetPort) }?.state.access ?? .full
    }
}

extension TargetPortGroup {
    /// The group as it is after an earlier one of its identifier: it keeps who changed its state.
    fileprivate func following(_ old: TargetPortGroup?) -> TargetPortGroup {
        guard let old else { return self }
        var group = self
        group.statusCode = old.state == state ? old.statusCode : .implicit
        return group
    }
}
