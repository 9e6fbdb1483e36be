// Resources: what the control API tells, as values that targetd writes and targetctl reads.
//
// Owns: the names and units of what is told. Called by: targetd, targetctl. Must not know: how it is found out or
// shown.

/// The whole daemon at one moment.
public struct Status: Codable, Equatable, Sendable {
    /// Name and version of the program.
    public var version: String
    /// `io_uring` or `libaio`.
    public var ioEngine: String
    /// The reactor threads.
    public var reactors: [ReactorStatus]
    /// The media, by name.
    public var backstores: [BackstoreStatus]
    /// The target devices, by name.
    public var targets: [TargetStatus]
    /// The fronts at which guests attach, by socket.
    public var fronts: [FrontStatus]
    /// Xen guests; `nil` where none are served.
    public var xen: XenStatus?

    /// A status of these parts.
    public init(
        version: String, ioEngine: String, reactors: [ReactorStatus], backstores: [BackstoreStatus],
        targets: [TargetStatus], fronts: [FrontStatus]
    ) {
        self.version = version
        self.ioEngine = ioEngine
        self.reactors = reactors
        self.backstores = backstores
        self.targets = targets
        self.fronts = fronts
    }
}

/// A reactor thread. Counters count from the start.
public struct ReactorStatus: Codable, Equatable, Sendable {
    /// Its number, from 0.
    public var index: Int
    /// Turns of its loop.
    public var turns: UInt64
    /// Times it went to sleep.
    public var waits: UInt64
    /// I/O requests that were taken.
    public var requests: UInt64
    /// I/O requests that were put off because too many were in flight.
    public var refused: UInt64
    /// Calls that handed I/O to the kernel.
    public var submissions: UInt64
    /// Nanoseconds in turns of its loop that found work.
    public var busyNanoseconds: UInt64

    /// A reactor that has done nothing yet.
    public init(index: Int) {
        self.index = index
        (turns, waits, requests, refused, submissions, busyNanoseconds) = (0, 0, 0, 0, 0, 0)
    }
}

/// A medium.
public struct BackstoreStatus: Codable, Equatable, Sendable {
    /// Its name in the configuration.
    public var name: String
    /// `ram`, `file` or `block-device`.
    public var type: String
    /// Where it is, if it has a path.
    public var path: String?
    /// Bytes; `nil` if it is not open, because no logical unit uses it.
    public var size: UInt64?
    /// Opened for reading only.
    public var readOnly: Bool

    /// A status of these values.
    public init(name: String, type: String, path: String?, size: UInt64?, readOnly: Bool) {
        self.name = name
        self.type = type
        self.path = path
        self.size = size
        self.readOnly = readOnly
    }
}

/// A target device.
public struct TargetStatus: Codable, Equatable, Sendable {
    /// Its NAA name.
    public var name: String
    /// The reactor that serves it.
    public var reactor: Int
    /// Its target port groups, by number.
    public var portGroups: [PortGroupStatus] = []
    /// Its logical units, by number.
    public var luns: [LogicalUnitStatus]

    /// A status of these values.
    public init(name: String, reactor: Int, luns: [LogicalUnitStatus]) {
        self.name = name
        self.reactor = reactor
        self.luns = luns
    }
}

/// A target port group.
public struct PortGroupStatus: Codable, Equatable, Sendable {
    /// TARGET PORT GROUP.
    public var id: Int
    /// `active/optimized`, `active/non-optimized`, `standby`, `unavailable` or `transitioning`.
    public var state: String
    /// Whether initiators should use it if they can choose.
    public var preferred: Bool
    /// Whether guests may set the state.
    public var explicit: Bool
    /// Who changed the state: `none`, `explicit` (a guest) or `implicit` (an operator).
    public var statusCode: String
    /// The relative target port identifiers of its ports.
    public var ports: [Int]

    /// A status of these values.
    public init(id: Int, state: String, preferred: Bool, explicit: Bool, statusCode: String, ports: [Int]) {
        self.id = id
        self.state = state
        self.preferred = preferred
        self.explicit = explicit
        self.statusCode = statusCode
        self.ports = ports
    }
}

/// A logical unit. Counters count from the moment at which it was made.
public struct LogicalUnitStatus: Codable, Equatable, Sendable {
    /// The logical unit number.
    public var lun: Int
    /// The name of its backstore.
    public var backstore: String
    /// Its NAA name.
    public var name: String
    /// Its serial number.
    public var serial: String
    /// Bytes of the medium.
    public var size: UInt64
    /// Whether writes are refused.
    public var writeProtected: Bool
    /// Whether nothing of it reaches the medium: an operator froze it, or an error of the medium did.
    public var frozen = false
    /// `loaded`, `ejected` by a guest, or `absent`.
    public var medium = "loaded"
    /// Commands received and not completed.
    public var inFlight: Int
    /// READ commands that ended.
    public var reads: UInt64
    /// WRITE commands that ended.
    public var writes: UInt64
    /// Other commands that ended.
    public var others: UInt64
    /// Bytes that READ commands moved.
    public var bytesRead: UInt64
    /// Bytes that WRITE commands moved.
    public var bytesWritten: UInt64
    /// Commands that ended with another status than GOOD or CONDITION MET.
    public var notGood: UInt64
    /// Commands that were aborted.
    public var aborted: UInt64
    /// Requests that the medium ended with an error.
    public var backstoreErrors: UInt64
    /// Commands whose deadline passed.
    public var expired: UInt64
    /// The command that has been here longest; `nil` if there is none.
    public var oldest: CommandStatus?

    /// A unit that has done nothing yet.
    public init(lun: Int, backstore: String, name: String, serial: String, size: UInt64, writeProtected: Bool) {
        self.lun = lun
        self.backstore = backstore
        self.name = name
        self.serial = serial
        self.size = size
        self.writeProtected = writeProtected
        (inFlight, reads, writes, others, bytesRead, bytesWritten) = (0, 0, 0, 0, 0, 0)
        (notGood, aborted, backstoreErrors, expired) = (0, 0, 0, 0)
    }
}

/// A command that has not been completed.
public struct CommandStatus: Codable, Equatable, Sendable {
    /// Milliseconds since it arrived.
    public var ageMilliseconds: UInt64
    /// The name of the initiator port that sent it.
    public var initiator: String
    /// Its command identifier.
    public var tag: UInt64
    /// The first byte of its CDB.
    public var operationCode: Int
    /// The first logical block that it names; 0 if it names none.
    public var lba: UInt64
    /// How many logical blocks it names.
    public var blocks: UInt64
    /// `waiting` for other commands, `waiting-for-resource`, with the `backstore`, or with the `state-store`.
    public var place: String
    /// Whether its deadline has passed and the backstore was asked to cancel it.
    public var expired: Bool

    /// A status of these values.
    public init(
        ageMilliseconds: UInt64, initiator: String, tag: UInt64, operationCode: Int, lba: UInt64, blocks: UInt64,
        place: String, expired: Bool
    ) {
        self.ageMilliseconds = ageMilliseconds
        self.initiator = initiator
        self.tag = tag
        self.operationCode = operationCode
        self.lba = lba
        self.blocks = blocks
        self.place = place
        self.expired = expired
    }
}

/// A front: a socket at which a guest attaches. Counters count from the moment at which it was made.
public struct FrontStatus: Codable, Equatable, Sendable {
    /// Always `vhost-user-scsi`.
    public var type: String
    /// The path of its socket.
    public var socket: String
    /// The reactor that serves it.
    public var reactor: Int
    /// Request queues that a guest may use.
    public var queues: Int
    /// Whether a guest is attached.
    public var connected: Bool
    /// Names of targets by virtio-scsi target number.
    public var targets: [String: String]
    /// The relative target port identifier.
    public var port = 1
    /// Guests that have attached.
    public var connections: UInt64
    /// Commands that the guest has sent.
    public var commands: UInt64
    /// Task management functions that the guest has sent.
    public var taskManagementFunctions: UInt64
    /// Notifications that were sent to the guest.
    public var notifications: UInt64
    /// Events that were given to the guest.
    public var events: UInt64
    /// Events for which the guest had no room.
    public var eventsMissed: UInt64
    /// Virtqueues that were taken out of service because the guest's driver broke the rules.
    public var brokenQueues: UInt64

    /// A front that has done nothing yet.
    public init(socket: String, reactor: Int, queues: Int, connected: Bool, targets: [String: String]) {
        type = "vhost-user-scsi"
        self.socket = socket
        self.reactor = reactor
        self.queues = queues
        self.connected = connected
        self.targets = targets
        (connections, commands, taskManagementFunctions, notifications) = (0, 0, 0, 0)
        (events, eventsMissed, brokenQueues) = (0, 0, 0)
    }
}

/// What an operation changed, or would change.
public struct ChangeReport: Codable, Equatable, Sendable {
    /// A line for each change, in their order: `+` adds, `-` takes away, `~` changes in place.
    public var changes: [String]
    /// What looks wrong, but is done all the same.
    public var warnings: [ProblemReport]

    /// A report of these changes.
    public init(changes: [String], warnings: [ProblemReport]) {
        self.changes = changes
        self.warnings = warnings
    }
}

/// The answer to a request that was refused or failed.
public struct FailureReport: Codable, Equatable, Sendable {
    /// Why.
    public var error: Failure

    /// A report of this failure.
    public init(error: Failure) { self.error = error }
}

/// Why a request was refused or failed.
public struct Failure: Codable, Equatable, Sendable, Error {
    /// One of `FailureCode`.
    public var code: String
    /// The same in words, with what to do next.
    public var message: String
    /// For `invalid-configuration`: each problem.
    public var details: [ProblemReport]

    /// A failure of a kind.
    public init(_ code: FailureCode, _ message: String, details: [ProblemReport] = []) {
        self.code = code.rawValue
        self.message = message
        self.details = details
    }
}

/// The kinds of failures, each with one HTTP status.
public enum FailureCode: String, CaseIterable, Sendable {
    /// The request, or its body, is not what the operation takes.
    case invalidRequest = "invalid-request"
    /// The configuration that was sent has errors; `details` has them all.
    case invalidConfiguration = "invalid-configuration"
    /// The peer may not use the socket.
    case notAuthorized = "not-authorized"
    /// There is nothing at this path, or nothing of this name.
    case notFound = "not-found"
    /// The path takes other methods; the header Allow names them.
    case methodNotAllowed = "method-not-allowed"
    /// The request did not come in time.
    case timeout = "timeout"
    /// What is asked for cannot be done to what runs.
    case conflict = "conflict"
    /// The body is longer than any request needs.
    case tooLarge = "too-large"
    /// The system refused something; everything is as before.
    case failed = "failed"
    /// The daemon is about to stop.
    case stopping = "stopping"

    /// The status of the response.
    public var httpStatus: Int {
        switch self {
        case .invalidRequest: 400
        case .notAuthorized: 403
        case .notFound: 404
        case .methodNotAllowed: 405
        case .timeout: 408
        case .conflict: 409
        case .tooLarge: 413
        case .invalidConfiguration: 422
        case .failed: 500
        case .stopping: 503
        }
    }
}

/// One thing that is wrong with a configuration.
public struct ProblemReport: Codable, Equatable, Sendable {
    /// `error` or `warning`.
    public var severity: String
    /// Line of the text that was sent, or of the file, from 1.
    public var line: Int?
    /// The key, with those above it.
    public var key: String
    /// What is wrong, and what is allowed.
    public var text: String

    /// A report of one problem.
    public init(severity: String, line: Int?, key: String, text: String) {
        self.severity = severity
        self.line = line
        self.key = key
        self.text = text
    }
}
