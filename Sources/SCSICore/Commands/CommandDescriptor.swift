// CommandDescriptor: the columns of the command table. A policy question about a command is a column here.
//
// Called by: CommandTable (rows), Admission, TaskSet and the device server (columns). Must not know: any command.

/// The code that carries a command out. `DeviceServer.execute` has the only switch over it.
enum CommandHandler: UInt8, CaseIterable {
    case testUnitReady, requestSense, inquiry, modeSelect, modeSense, startStopUnit
    case logSelect, logSense, preventAllowMediumRemoval
    case readCapacity10, readCapacity16
    case read, write, verify, writeAndVerify, synchronizeCache, writeSame, unmap, compareAndWrite, orWrite
    case xpWrite, xdWriteRead
    case preFetch, writeAtomic, getLBAStatus, getLBAStatus32
    case reportTargetPortGroups, setTargetPortGroups
    case readBufferData, readBufferDescriptor, readEchoBuffer, readEchoBufferDescriptor
    case writeBufferData, writeEchoBuffer
    case sendDiagnostic, receiveDiagnosticResults
    case reportTimestamp, setTimestamp, reportIdentifyingInformation, setIdentifyingInformation
    case readDefectData10, readDefectData12
    case reportLUNs, reportSupportedOperationCodes, reportSupportedTaskManagementFunctions
    case persistentReserveIn, persistentReserveOut, reserve, release
}

/// Where a CDB keeps its logical block address and its number of blocks.
enum ExtentField: UInt8 {
    case none, six, ten, twelve, sixteen
    /// COMPARE AND WRITE: as in a CDB of 16 bytes, but with one byte for the number of blocks.
    case compareAndWrite
    /// WRITE ATOMIC: as in a CDB of 16 bytes, but with two bytes for the number of blocks.
    case writeAtomic
    /// XPWRITE(32), XDWRITEREAD(32): a variable length CDB (SBC-3).
    case thirtyTwo

    /// The byte with the GROUP NUMBER field; `nil` if there is none.
    var groupNumberByte: Int? {
        switch self {
        case .none, .six: nil
        case .ten, .thirtyTwo: 6
        case .twelve: 10
        case .sixteen, .compareAndWrite, .writeAtomic: 14
        }
    }
}

/// What a command does to the medium, for the hazard matrix in Serialization.
enum SerializationClass: UInt8, CaseIterable {
    /// Touches no blocks.
    case none
    /// Reads an extent.
    case read
    /// Changes an extent.
    case write
    /// Changes extents that its parameter list names: treated as the whole medium.
    case writeAnywhere
    /// Touches no blocks, but changes what commands after it may do to them.
    case unitState
}

/// What the policy checks ask about a command.
struct CommandFlags: OptionSet {
    let rawValue: UInt16

    /// Carried out although a unit attention condition is pending (SAM-6 5.14: INQUIRY, REPORT LUNS, REQUEST SENSE).
    static let passesUnitAttention = Self(rawValue: 1 << 0)
    /// Answered for a LUN that addresses no logical unit.
    static let worksWithoutUnit = Self(rawValue: 1 << 1)
    /// Needs the medium: refused while the unit is stopped.
    static let needsMedium = Self(rawValue: 1 << 2)
    /// Changes the medium: refused when it is write protected. XDWRITEREAD changes it unless its CDB says otherwise, so
    /// its handler asks.
    static let writesMedium = Self(rawValue: 1 << 3)

    // Through a target port that is not active (SPC-4 5.15.2.4, the lists of commands of each state). A command of one
    // list is in the longer ones, too, so each row names the shortest that it is in.

    /// Carried out in the standby state. The list lets a target carry out more: READ CAPACITY is there because an
    /// initiator that finds the path first would else take the disk for one without blocks.
    static let allowedInStandby = Self(rawValue: 1 << 4)
    /// Carried out in the unavailable state as well.
    static let allowedInUnavailable: Self = [Self(rawValue: 1 << 5), .allowedInStandby]
    /// Carried out in the transitioning state as well.
    static let allowedInTransition: Self = [Self(rawValue: 1 << 6), .allowedInUnavailable]

    /// Carried out for other nexuses while an ACA condition is in effect: PERSISTENT RESERVE OUT with PREEMPT AND ABORT
    /// (SAM-6 5.9.4).
    static let passesACA = Self(rawValue: 1 << 15)

    // In the presence of reservations (SPC-4 5.13.1 and SBC-4 4.17, their tables of commands that are allowed then;
    // SPC-2 5.5.1). What has none of these conflicts with a reservation that does not admit the nexus. Commands of
    // which the CDB decides have all that apply, and their handlers ask `LogicalUnit.isRestricted`.

    /// Allowed under a persistent reservation of any type.
    static let allowedUnderAny = Self(rawValue: 1 << 8)
    /// Allowed under a persistent reservation of a write exclusive type: what only reads.
    static let allowedUnderWriteExclusive = Self(rawValue: 1 << 9)
    /// Allowed under the reservation that RESERVE(6) or (10) of another nexus has made.
    static let allowedUnderReserve = Self(rawValue: 1 << 10)

    /// Carried out although the persistent reservations of the unit are lost: REPLACE LOST RESERVATION, and the
    /// commands of SPC-4 5.13.5.2.
    static let passesLostReservations = Self(rawValue: 1 << 11)

    /// Reads and writes its blocks as one: not even HEAD OF QUEUE comes in between (SBC-4: COMPARE AND WRITE, ORWRITE,
    /// atomic writes; SBC-3: XPWRITE, XDWRITEREAD).
    static let uninterrupted = Self(rawValue: 1 << 12)

    /// A command that the table does not have is refused for that, and not for a reservation or for its port.
    static let ofUnknownCommand: Self = [
        .allowedUnderAny, .allowedUnderReserve, .passesLostReservations, .allowedInTransition,
    ]
}

/// What a unit must be able to do, mostly by its backstore, for a row to be in its table.
struct UnitFeatures: OptionSet, Hashable {
    let rawValue: UInt8

    /// Logical block provisioning management: UNMAP (LBPME).
    static let unmap = Self(rawValue: 1 << 0)
    /// Space without data: the ANCHOR bit of UNMAP and WRITE SAME (ANC_SUP).
    static let anchor = Self(rawValue: 1 << 1)
    /// Atomic writes.
    static let atomicWrite = Self(rawValue: 1 << 2)
    /// A store for the persistent state: SP of MODE SELECT, identifying information.
    static let savesState = Self(rawValue: 1 << 3)
    /// A removable medium.
    static let removable = Self(rawValue: 1 << 4)
    /// A target port group whose state initiators may change.
    static let explicitAccess = Self(rawValue: 1 << 5)

    /// What there is: a table for these has every handler.
    static let all: Self = [.unmap, .anchor, .atomicWrite, .savesState, .removable, .explicitAccess]
}

/// One row of the command table.
struct CommandDescriptor {
    let operationCode: UInt8
    /// Whether `serviceAction` takes part in the match.
    let hasServiceAction: Bool
    let serviceAction: UInt16
    /// CDB length in bytes.
    let length: UInt8
    let handler: CommandHandler
    let extent: ExtentField
    let serialization: SerializationClass
    let flags: CommandFlags
    /// The CDB usage data (SPC-4 6.35.3): a bit is one if some value of it is honoured. Two words as they lie in
    /// memory, for the validator, and the same as bytes for REPORT SUPPORTED OPERATION CODES.
    let usage: (UInt64, UInt64)
    /// The same of bytes 16 to 31, which only variable length CDBs have: their handlers check them
    /// (`CommandTable.validateVariableLength`), so that no other command asks for them.
    let usageTail: (UInt64, UInt64)

    /// Byte `offset` of the usage data.
    func usageByte(_ offset: Int) -> UInt8 {
        let words = [usage.0, usage.1, usageTail.0, usageTail.1]
        let word = words[offset >> 3].littleEndian
        return UInt8(truncatingIfNeeded: word >> (UInt64(offset & 7) * 8))
    }
}

/// A row of a unit's table: one word, valid as long as the process (tables are never freed).
@safe
struct CommandRow {
    let pointer: UnsafePointer<CommandDescriptor>

    @inline(__always)
    init(_ pointer: UnsafePointer<CommandDescriptor>) { unsafe self.pointer = pointer }

    @inline(__always) var handler: CommandHandler { unsafe pointer.pointee.handler }
    @inline(__always) var extent: ExtentField { unsafe pointer.pointee.extent }
    @inline(__always) var serialization: SerializationClass { unsafe pointer.pointee.serialization }
    @inline(__always) var flags: CommandFlags { unsafe pointer.pointee.flags }
    @inline(__always) var length: Int { Int(unsafe pointer.pointee.length) }
    @inline(__always) var usage: (UInt64, UInt64) { unsafe pointer.pointee.usage }
    /// The whole row, for reports.
    var descriptor: CommandDescriptor { unsafe pointer.pointee }
}
