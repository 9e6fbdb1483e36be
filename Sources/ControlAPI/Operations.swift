// Operations: what the control API tells of commands, operations and events, and what it takes.
//
// Owns: the names and units of what is told. Called by: targetd, targetctl. Must not know: how it is found out or
// shown.

/// A command in flight.
public struct TaskReport: Codable, Equatable, Sendable {
    /// The name of the target.
    public var target: String
    /// The logical unit number.
    public var lun: Int
    /// The name of the initiator port.
    public var initiator: String
    /// The command identifier.
    public var tag: UInt64
    /// The CDB in hexadecimal digits.
    public var cdb: String
    /// `simple`, `ordered`, `head-of-queue` or `aca`.
    public var attribute: String
    /// `transferring` while the medium has it, `dormant` while it waits.
    public var state: String
    /// What a dormant one waits for: `order`, `quota`, `backstore`, `staging`, ….
    public var waitsFor: String?
    /// Aborted; only the medium has not let go of it.
    public var aborted: Bool
    /// How long it has been here.
    public var ageNanoseconds: UInt64

    /// A report of these values.
    public init(
        target: String, lun: Int, initiator: String, tag: UInt64, cdb: String, attribute: String, state: String,
        waitsFor: String?, aborted: Bool, ageNanoseconds: UInt64
    ) {
        self.target = target
        self.lun = lun
        self.initiator = initiator
        self.tag = tag
        self.cdb = cdb
        self.attribute = attribute
        self.state = state
        self.waitsFor = waitsFor
        self.aborted = aborted
        self.ageNanoseconds = ageNanoseconds
    }
}

/// The trace of a logical unit.
public struct TraceReport: Codable, Equatable, Sendable {
    /// The name of the target.
    public var target: String
    /// The logical unit number.
    public var lun: Int
    /// Commands that are kept; 0 while the trace is off.
    public var capacity: Int
    /// The last commands that ended, the oldest first.
    public var entries: [TraceCommand]

    /// A report of these values.
    public init(target: String, lun: Int, capacity: Int, entries: [TraceCommand]) {
        self.target = target
        self.lun = lun
        self.capacity = capacity
        self.entries = entries
    }
}

/// A command that has ended.
public struct TraceCommand: Codable, Equatable, Sendable {
    /// Its place in the order of arrival.
    public var sequence: UInt64
    /// The name of the initiator port.
    public var initiator: String
    /// The command identifier.
    public var tag: UInt64
    /// The CDB in hexadecimal digits.
    public var cdb: String
    /// `simple`, `ordered`, `head-of-queue` or `aca`.
    public var attribute: String
    /// How long ago it arrived.
    public var ageNanoseconds: UInt64
    /// From its arrival to its response.
    public var latencyNanoseconds: UInt64
    /// `good`, `check-condition`, …, `without-status` for one that was aborted.
    public var status: String
    /// Sense key, additional sense code and its qualifier: `05/21/00`.
    public var sense: String?
    /// Bytes that were moved.
    public var bytes: UInt64

    /// A command of these values.
    public init(
        sequence: UInt64, initiator: String, tag: UInt64, cdb: String, attribute: String, ageNanoseconds: UInt64,
        latencyNanoseconds: UInt64, status: String, sense: String?, bytes: UInt64
    ) {
        self.sequence = sequence
        self.initiator = initiator
        self.tag = tag
        self.cdb = cdb
        self.attribute = attribute
        self.ageNanoseconds = ageNanoseconds
        self.latencyNanoseconds = latencyNanoseconds
        self.status = status
        self.sense = sense
        self.bytes = bytes
    }
}

/// The reservations of a logical unit.
public struct ReservationReport: Codable, Equatable, Sendable {
    /// The name of the target.
    public var target: String
    /// The logical unit number.
    public var lun: Int
    /// The type of the persistent reservation, such as `write-exclusive`; `nil`: nobody has reserved the unit so.
    public var type: String?
    /// PRGENERATION: how often registrations have changed.
    public var generation: UInt32
    /// Whether all this survives a restart, because an initiator has asked for it (APTPL).
    public var persists: Bool
    /// In the order of registration.
    public var registrants: [RegistrantReport]
    /// The initiator port that has reserved the unit by RESERVE(6) or (10).
    public var reservedBy: String?
    /// Whether those that were saved cannot be read, so that most commands are refused until they are replaced or
    /// cleared.
    public var lost: Bool

    /// Whether there is anything to tell.
    public var isEmpty: Bool { registrants.isEmpty && reservedBy == nil && !lost }

    /// A report of these values.
    public init(
        target: String, lun: Int, type: String?, generation: UInt32, persists: Bool, registrants: [RegistrantReport],
        reservedBy: String?, lost: Bool
    ) {
        self.target = target
        self.lun = lun
        self.type = type
        self.generation = generation
        self.persists = persists
        self.registrants = registrants
        self.reservedBy = reservedBy
        self.lost = lost
    }
}

/// An initiator that is registered for persistent reservations.
public struct RegistrantReport: Codable, Equatable, Sendable {
    /// The name of the initiator port; `nil` if it has not been seen since the target was made.
    public var initiator: String?
    /// The initiator port's SAS address, as PERSISTENT RESERVE IN tells it: `naa.` and 16 hexadecimal digits.
    public var port: String
    /// The relative target port identifier.
    public var targetPort: Int
    /// The reservation key, in 16 hexadecimal digits.
    public var key: String
    /// Whether it holds the persistent reservation.
    public var holds: Bool

    /// A report of these values.
    public init(initiator: String?, port: String, targetPort: Int, key: String, holds: Bool) {
        self.initiator = initiator
        self.port = port
        self.targetPort = targetPort
        self.key = key
        self.holds = holds
    }
}

/// A logical unit's reservations on their way to another targetd.
public struct ReservationState: Codable, Equatable, Sendable {
    /// The unit's NAA name, which is the same there.
    public var name: String
    /// The reservations, in Base64.
    public var state: String

    /// The state of these values.
    public init(name: String, state: String) {
        self.name = name
        self.state = state
    }
}

/// An operation that changes something: one that waits for its turn, that is under way, or that has ended lately.
public struct OperationStatus: Codable, Equatable, Sendable {
    /// Its number, in the order in which operations came.
    public var id: UInt64
    /// What was asked for.
    public var what: String
    /// `queued`, `running`, `done` or `failed`.
    public var state: String
    /// Changes that are made.
    public var done: Int
    /// Changes to be made; 0 while that is not known.
    public var total: Int
    /// Why it failed.
    public var message: String?

    /// An operation that waits for its turn.
    public init(id: UInt64, what: String) {
        self.id = id
        self.what = what
        (state, done, total, message) = ("queued", 0, 0, nil)
    }
}

/// Something that has happened.
public struct EventReport: Codable, Equatable, Sendable {
    /// Its number, in the order in which events happened.
    public var sequence: UInt64
    /// When, in milliseconds of Unix time.
    public var time: Int64
    /// `guest-connected`, `guest-disconnected`, `guest-fault`, `changed`, `operation-failed`, `reset`.
    public var kind: String
    /// What it happened to: a socket, a logical unit, a backstore; absent for the whole daemon.
    public var subject: String?
    /// The same in words.
    public var text: String

    /// An event of these values.
    public init(sequence: UInt64, time: Int64, kind: String, subject: String?, text: String) {
        self.sequence = sequence
        self.time = time
        self.kind = kind
        self.subject = subject
        self.text = text
    }
}
