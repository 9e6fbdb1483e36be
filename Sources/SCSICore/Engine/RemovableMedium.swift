// RemovableMedium: a medium that goes and comes while the logical unit stays: ejected and loaded by START STOP UNIT, or
// taken away and put in by the control plane.
//
// Owns: the state of the medium, and who prevents its removal. Called by: the commands, TargetDevice and TaskManager
// (nexuses that are lost), the control plane. Must not know: what the medium is.
//
//              START STOP UNIT: LOEJ, START 0               removeMedium
//     loaded ─────────────────────────────────► ejected ─────────────────► absent
//       ▲  ▲ ◄───────────────────────────────── LOEJ, START 1                │ ▲
//       │  └──────────────────────────── insertMedium ───────────────────────┘ │
//       └────────────────────────────────── removeMedium ──────────────────────┘

import CBackstore

/// Where the medium of a logical unit is.
public enum MediumState: Sendable, Equatable {
    /// In the unit, which can use it.
    case loaded
    /// An initiator has ejected it. The unit still has its backstore, and an initiator may load it again.
    case ejected
    /// The control plane has taken it away.
    case absent
}

/// Why the medium cannot be removed.
public enum MediumRemovalRefusal: Error, Equatable, Sendable {
    /// The unit's medium is not removable.
    case notRemovable
    /// An initiator prevents it (PREVENT ALLOW MEDIUM REMOVAL). Those that do have been told of the request.
    case prevented
    /// There is none.
    case absent
}

/// Whether a unit's medium can be used, for admission: one byte.
enum Readiness: UInt8 {
    case ready, stopped, ejected, absent
    /// Who may use it is not known: the persistent reservations are lost (SPC-4 5.13.5.3).
    case reservationsLost

    /// Whether a command is carried out all the same.
    func admits(_ flags: CommandFlags) -> Bool {
        self == .reservationsLost ? flags.contains(.passesLostReservations) : !flags.contains(.needsMedium)
    }

    /// Why a command that needs the medium is refused.
    var sense: SenseData {
        switch self {
        case .ready: .none
        case .stopped: SenseData(.notReady, .logicalUnitNotReadyInitializingRequired)
        case .ejected: SenseData(.notReady, .mediumNotPresentTrayOpen)
        case .absent: SenseData(.notReady, .mediumNotPresent)
        case .reservationsLost: SenseData(.dataProtect, .persistentReservationInformationLost)
        }
    }
}

extension LogicalUnit {
    /// Whether the medium can be ejected (RMB).
    public var isRemovable: Bool { configuration.removable }

    /// The number of blocks that MODE SENSE reports: none without a medium.
    var reportedBlocks: UInt64 { mediumState == .loaded ? medium.blocks.value : 0 }

    func refreshReadiness() {
        if reservations.areLost {
            readiness = .reservationsLost
            return
        }
        switch mediumState {
        case .loaded: readiness = stopped ? .stopped : .ready
        case .ejected: readiness = .ejected
        case .absent: readiness = .absent
        }
    }

    // MARK: PREVENT ALLOW MEDIUM REMOVAL

    /// Whether an initiator prevents the removal of the medium.
    public var isRemovalPrevented: Bool { preventing != 0 }

    /// PREVENT: a bit for each I_T nexus (SBC-4 5.15).
    func prevent(_ prevents: Bool, by nexus: UInt16) {
        if prevents { preventing |= 1 << UInt64(nexus) } else { preventing &= ~(1 << UInt64(nexus)) }
    }

    /// Whether this nexus prevents it.
    func prevents(_ nexus: UInt16) -> Bool { preventing & 1 << UInt64(nexus) != 0 }

    // MARK: Initiators

    /// START STOP UNIT ejects. The data is in the backstore; commands under way end as they end.
    func ejected() {
        guard mediumState == .loaded else { return }
        mediumState = .ejected
        unsafe counters.pointee.loadUnloadCycles &+= 1
        whenMediumMoved?(.ejected)
    }

    /// START STOP UNIT loads.
    ///
    /// - Returns: Whether there is a medium to load.
    func loaded() -> Bool {
        guard mediumState == .ejected else { return mediumState == .loaded }
        mediumState = .loaded
        stopped = false
        establish(.mediumChanged, exceptFor: nil)
        whenMediumMoved?(.loaded)
        return true
    }

    // MARK: The control plane

    /// Takes the medium away: commands that need it are refused from now on, those that wait for the backstore end with
    /// MEDIUM NOT PRESENT.
    ///
    /// - Parameters:
    ///   - force: Also if an initiator prevents it.
    ///   - done: Called once when the unit does not use the backstore any more, maybe before this returns. What was
    ///     written is not flushed.
    /// - Throws: Why not; then `done` is not called. Initiators that prevent it get OPERATOR MEDIUM REMOVAL REQUEST.
    public func removeMedium(force: Bool = false, done: @escaping () -> Void) throws(MediumRemovalRefusal) {
        guard isRemovable else { throw .notRemovable }
        guard mediumState != .absent else { throw .absent }
        guard force || !isRemovalPrevented else {
            for nexus in 0..<UInt16(Limits.nexusesPerTarget) where preventing & 1 << UInt64(nexus) != 0 {
                establish(.mediumRemovalRequested, for: nexus)
            }
            throw .prevented
        }
        if mediumState == .loaded { unsafe counters.pointee.loadUnloadCycles &+= 1 }
        preventing = 0
        setMedium(.absent)
        endDormant(.failed(readiness.sense)) {
            // Waiting for the order they are refused when they are enabled, as every other command.
            $0.state == .dormant && $0.waitsFor != .order && $0.row?.flags.contains(.needsMedium) ?? false
        }
        freezeState.whenQuiet.append(done)
        callWhenQuiet()
    }

    /// Puts a medium into a unit without one. Initiators learn of it by NOT READY TO READY CHANGE, MEDIUM MAY HAVE
    /// CHANGED.
    ///
    /// - Parameter backstore: Its logical block size may be another than before.
    public func insertMedium(_ backstore: BackstoreHandle) {
        precondition(mediumState == .absent && freezeState.whenQuiet.isEmpty, "a medium was put in where one still is")
        replaceBackstore(backstore)
        setMedium(.loaded)
        stopped = false
        establish(.mediumChanged, exceptFor: nil)
    }

    private func setMedium(_ state: MediumState) {
        mediumState = state
        refreshBlocking()
    }
}
