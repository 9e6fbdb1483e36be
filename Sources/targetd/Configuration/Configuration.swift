// Configuration: what targetd is asked to be, as a value.
//
// Owns: the shape of the configuration and its limits. Called by: everything in the daemon. Must not know: YAML, the
// command line, file systems, or anything that runs.

/// All that the configuration file says.
struct Configuration: Equatable, Sendable {
    /// Reactor threads.
    var reactors = 1
    /// How the reactors do I/O.
    var ioEngine = IOEngine.automatic
    /// How long a reactor goes on looking for work after the last work, in nanoseconds; 0: it sleeps at once.
    var pollNanoseconds: UInt64 = 20_000
    /// How long a stop waits for commands in flight, in nanoseconds.
    var stopTimeoutNanoseconds: UInt64 = 10_000_000_000
    /// The least severe messages that are logged; `nil`: the default, information.
    var logLevel: String?
    /// Where logical units keep what survives power loss; `nil`: where systemd says (StateDirectory=), else nowhere.
    var stateDirectory: String?
    /// Where the daemon is managed; `nil`: nowhere.
    var control: ControlConfiguration?
    /// The media, by name.
    var backstores: [String: BackstoreConfiguration] = [:]
    /// The target devices, by name.
    var targets: [NAAName: TargetConfiguration] = [:]
    /// The vhost-user sockets.
    var vhostUserFronts: [VhostUserFrontConfiguration] = []
    /// Xen guests; `nil`: they are not served.
    var xen: XenConfiguration?
}

/// The socket of the control API.
struct ControlConfiguration: Equatable, Sendable {
    var socket: String
    /// Permission bits of the socket's file; `nil`: the owner, and the group if one is named.
    var mode: UInt16?
    /// The group that may use the socket beside root and the daemon's own user.
    var group: String?
    /// Where metrics can be read without the socket.
    var metrics: MetricsAddress?

    /// The permission bits that the file gets.
    var effectiveMode: UInt16 { mode ?? (group == nil ? 0o600 : 0o660) }
}

/// A TCP address: a numeric host and a port.
struct MetricsAddress: Equatable, Sendable {
    var host: String
    var port: Int

    /// `127.0.0.1:9464` or `[::1]:9464`.
    var text: String { host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)" }
}

/// How reactors do I/O.
enum IOEngine: String, Sendable, CaseIterable {
    case automatic
    case ioUring = "io_uring"
    case libaio
}

/// A medium.
struct BackstoreConfiguration: Equatable, Sendable {
    enum Medium: Equatable, Sendable {
        /// Memory of the daemon; the content is gone when it stops.
        case ram(size: UInt64)
        /// A file; created if it does not exist and a size is given.
        case file(path: String, size: UInt64?, buffered: Bool)
        /// A block device of the host; it says its size itself.
        case blockDevice(path: String, buffered: Bool)
    }

    var medium: Medium
    /// Bytes of a logical block; `nil`: 512, or what the block device says.
    var blockSize: UInt32?
    /// Opened for reading only.
    var readOnly = false
    /// A file that another daemon may have open, if it is told so too.
    var isShared = false

    /// The path of a file or block device.
    var path: String? {
        switch medium {
        case .ram: nil
        case .file(let path, _, _), .blockDevice(let path, _): path
        }
    }
}

/// A target device: its logical units by number.
struct TargetConfiguration: Equatable, Sendable {
    var logicalUnits: [Int: LogicalUnitSettings] = [:]
    /// Its target port groups; none: `defaultPorts` are in one that is always active and optimized.
    var portGroups: [PortGroupConfiguration] = []

    /// The ports of a target without groups: one for each kind of front.
    static let defaultPorts = [VhostUserFrontConfiguration.defaultPort, XenConfiguration.defaultPort]

    /// The relative target port identifiers that a front may have.
    var ports: [Int] { portGroups.isEmpty ? Self.defaultPorts : portGroups.flatMap(\.ports) }
}

/// A target port group.
struct PortGroupConfiguration: Equatable, Sendable {
    /// TARGET PORT GROUP.
    var identifier: Int
    var state = AccessState.activeOptimized
    /// PREF.
    var isPreferred = false
    /// Whether guests may set the state.
    var isExplicit = false
    /// Relative target port identifiers, also of ports that another daemon serves.
    var ports: [Int]

    /// An asymmetric access state.
    enum AccessState: String, Sendable, CaseIterable {
        case activeOptimized = "active/optimized"
        case activeNonOptimized = "active/non-optimized"
        case standby, unavailable, transitioning
    }

    /// Whether only the state may differ.
    func isSameGroup(as other: Self) -> Bool {
        var same = other
        same.state = state
        return self == same
    }
}

/// A logical unit of a target.
struct LogicalUnitSettings: Equatable, Sendable {
    var backstore: String
    var readOnly = false
    /// `nil`: derived from the names of the target and the backstore.
    var name: NAAName?
    /// `nil`: the digits of the name.
    var serial: String?
    var limits = LimitsConfiguration()
    /// How long a command may take for which the guest gives no deadline, in nanoseconds; 0: as long as it takes.
    var commandTimeoutNanoseconds: UInt64 = 0
    /// Whether guests may eject the medium, and another can be put in.
    var removable = false
    /// What becomes of a command that the medium could not carry out.
    var onError = OnError.report
    /// How long `OnError.retry` tries, in nanoseconds; `nil`: the default.
    var retryTimeoutNanoseconds: UInt64?

    /// What becomes of a command that the medium could not carry out.
    enum OnError: String, Sendable, CaseIterable {
        /// The guest is told.
        case report
        /// The disk is frozen until somebody thaws it.
        case stop
        /// It is tried again for a time; then the guest is told.
        case retry
    }

    /// How long a failed command is tried again if the file does not say.
    static let defaultRetryTimeoutNanoseconds: UInt64 = 20_000_000_000

    /// The unit's name as initiators see it.
    func effectiveName(target: NAAName) -> NAAName {
        name ?? .derived(from: "logical unit", target.description, backstore)
    }

    /// The unit's serial number as initiators see it.
    func effectiveSerial(target: NAAName) -> String { serial ?? effectiveName(target: target).hexadecimal }
}

/// A vhost-user socket at which a virtual machine attaches a virtio SCSI host.
struct VhostUserFrontConfiguration: Equatable, Sendable {
    var socket: String
    /// Request queues that a guest may use.
    var queues = 1
    /// The target devices by virtio-scsi target number.
    var targets: [Int: NAAName] = [:]
    /// The relative target port identifier, at each of the targets.
    var port = Self.defaultPort
    var limits = LimitsConfiguration()
    /// Who makes the socket.
    var mode = Mode.server
    /// Whether its queues are dealt out over all reactors, and its targets need not be on its own.
    var isSpread = false
    /// Whether the front-end is offered the configuration space.
    var offersConfigurationSpace = false
    /// Whether the front-end is offered the reset of single rings.
    var offersRingReset = false
    /// How long a queue that stops waits for its commands, in nanoseconds; `nil`: the front's default.
    var drainTimeoutNanoseconds: UInt64?

    /// The port of a socket that has none.
    static let defaultPort = 1

    enum Mode: String, Sendable, CaseIterable {
        /// targetd listens.
        case server
        /// The front-end listens, and targetd connects whenever it is there.
        case client
    }

    /// Whether a guest that is attached could stay attached if this front became the other.
    func isSameDevice(as other: Self) -> Bool {
        var same = other
        (same.targets, same.limits) = (targets, limits)
        return self == same
    }
}

/// How much may be done in a second.
struct LimitsConfiguration: Equatable, Sendable {
    /// Commands that access the medium; `nil`: as many as there are.
    var operationsPerSecond: UInt64?
    /// Bytes that they name; `nil`: as many as there are.
    var bytesPerSecond: UInt64?
    /// How long unused rate is saved, in nanoseconds; `nil`: the core's own choice.
    var burstNanoseconds: UInt64?

    /// Whether nothing is limited.
    var isEmpty: Bool { operationsPerSecond == nil && bytesPerSecond == nil }
}

/// Bounds of the configuration, with their reasons.
enum ConfigurationLimits {
    /// Bytes of a configuration file: 200 times what a thousand disks need.
    static let fileBytes = 16 << 20
    /// More threads than this machine class has processors help nobody.
    static let reactors = 1...64
    /// A second of spinning per lull is already more than anyone wants.
    static let pollNanoseconds: ClosedRange<UInt64> = 0...1_000_000_000
    /// Ten minutes is beyond what a service manager waits.
    static let stopTimeoutNanoseconds: ClosedRange<UInt64> = 0...600_000_000_000
    /// Less than a second and a busy medium looks like a dead one; more than an hour and no guest is left waiting.
    static let commandTimeoutNanoseconds: ClosedRange<UInt64> = 1_000_000_000...3_600_000_000_000
    /// Long enough for a second attempt; guests give up after some minutes at the latest.
    static let retryTimeoutNanoseconds: ClosedRange<UInt64> = 100_000_000...600_000_000_000
    /// Less, and commands that would end are sent again; more than ten minutes and nobody waits for the guest to stop.
    static let drainTimeoutNanoseconds: ClosedRange<UInt64> = 100_000_000...600_000_000_000
    /// Permission bits of a socket's file; those of execution mean nothing there.
    static let socketMode = 0...0o777
    /// 0 would be a port that the system chooses, which nobody would know.
    static let ports = 1...65_535
    /// Bytes of a medium: what file offsets (63 bits) reach, with room for sums.
    static let mediumBytes: UInt64 = 1 << 62
    /// Bytes of a RAM medium: what a process can map (47 bits of addresses) with room for everything else.
    static let ramBytes: UInt64 = 1 << 45
    /// What SBC-5 media have in practice, and what the core supports.
    static let blockSizes: [UInt32] = [512, 4096]
    /// SAM-6 4.7.7: what single-level addressing reaches.
    static let logicalUnitNumbers = 0...16_383
    /// RELATIVE TARGET PORT IDENTIFIER has 16 bits, and zero is none; TARGET PORT GROUP alike.
    static let targetPorts = 1...65_535
    static let portGroupIdentifiers = 1...65_535
    /// What the core takes: groups of a target, and ports of all of them.
    static let portGroups = 16
    static let portsOfATarget = 64
    /// The virtio-scsi LUN field has one byte for the target.
    static let virtioTargetNumbers = 0...255
    /// Request queues of one vhost-user-scsi device: what the front serves, with the two that are always there.
    static let queues = 1...126
    /// `sockaddr_un.sun_path` has 108 bytes, one of them the end mark.
    static let socketPathBytes = 107
    /// Commands that the trace of a logical unit keeps: what the core can.
    static let traceEntries = 1...65_536
    /// Less than one command in a second is a disk that guests give up.
    static let operationsPerSecond = 1...1_000_000_000
    /// Slower than the first, one large command would hold a disk for minutes; the second is more than memory gives.
    static let bytesPerSecond: ClosedRange<UInt64> = 64 << 10...1 << 40
    /// A minute's saving is beyond any idea of a limit.
    static let burstNanoseconds: ClosedRange<UInt64> = 0...60_000_000_000
    /// Characters of a backstore's name, which also appears in logs and paths of the control API.
    static let nameCharacters = 1...64
    /// Characters of the Unit Serial Number (VPD page 80h) that tools still show.
    static let serialCharacters = 1...64
}
