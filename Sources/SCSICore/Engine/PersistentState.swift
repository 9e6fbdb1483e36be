// PersistentState: what of a logical unit survives power loss, and how a change of it becomes durable before it
// happens.
//
// Owns: the state that was last saved, the one save in flight, the commands that wait for it. Called by: LogicalUnit
// and, through `LogicalUnit.save`, the commands that change what is kept. Must not know: what the sections mean.
//
// A change goes: the handler checks the command against the state in memory, and stages the new bytes of its section
// with the code that makes the change in memory (`LogicalUnit.save`, which gives the outcome to return). The bytes are
// saved; when they are durable the change is made, and the command goes on or ends with GOOD. If they could not be
// saved the change is not made, and the command ends with CHECK CONDITION: the memory never runs ahead of the store.

/// The persistent state of one logical unit.
@safe
final class PersistentState {
    /// A change on its way.
    private struct Change {
        let state: UnitState
        /// Makes the change in memory. Runs once the bytes are durable.
        let apply: () -> Void
    }

    /// What the store holds, unless a save has failed.
    private(set) var saved: UnitState
    private let store: UnitStateStore?
    private var change: Change?
    private var isInFlight = false
    private var ended: ((Int32) -> Void)?
    /// Commands that wait until the save in flight has ended.
    private var waiting: [TaskHandle] = []
    private var waitingControl: [() -> Void] = []
    /// What the store is reading.
    private var bytes: UnsafeMutableBufferPointer<UInt8>

    /// - Parameter saved: What was saved in the unit's earlier life.
    init(_ saved: UnitState, store: UnitStateStore?) {
        self.saved = saved
        self.store = store
        unsafe bytes = .allocate(capacity: 0)
    }

    deinit {
        precondition(!isInFlight, "a logical unit went away while its state was being saved")
        unsafe bytes.deallocate()
    }

    /// Checks the sections that this code knows, so that a unit is never created from half of its state.
    static func check(_ state: UnitState) throws(UnitStateError) {
        for section in state.sections {
            switch section.kind {
            case .persistentReservations:
                guard section.version == 1 else {
                    throw .newer(what: "section \(section.kind.rawValue)", version: Int(section.version))
                }
                guard ReservationTable(decoding: section.bytes) != nil else {
                    throw .damaged("the persistent reservations are none")
                }
            case .savedModePages, .identifyingInformation:
                guard section.version == 1 else {
                    throw .newer(what: "section \(section.kind.rawValue)", version: Int(section.version))
                }
                guard section.kind != .savedModePages || ModePages.parseSaved(section.bytes) != nil else {
                    throw .damaged("the saved mode pages are cut off")
                }
            default: break
            }
            if section.kind == .identifyingInformation, IdentifyingInformation(parsing: section.bytes) == nil {
                throw .damaged("the identifying information cannot be read")
            }
        }
    }

    /// The reservations that a power on leaves.
    var reservations: ReservationTable {
        guard let section = saved[.persistentReservations] else { return ReservationTable() }
        guard let table = ReservationTable(decoding: section.bytes) else {
            preconditionFailure("a logical unit was given a state that nobody has checked")
        }
        return table.afterPowerOn
    }

    /// Whether there is something that keeps state: PTPL_C, PS.
    var canSave: Bool { store != nil }
    /// Whether a change is on its way; another must wait.
    var isBusy: Bool { change != nil }

    /// Prepares a change; `begin` follows.
    func stage(_ kind: UnitStateKind, version: UInt16, _ bytes: [UInt8]?, apply: @escaping () -> Void) {
        precondition(canSave && !isBusy, "a change of the persistent state that could not be staged")
        var state = saved
        state.set(kind, version: version, bytes)
        change = Change(state: state, apply: apply)
    }

    /// The staged change is not wanted any more.
    func discard() {
        precondition(!isInFlight)
        change = nil
    }

    /// Saves what was staged.
    ///
    /// - Parameter ended: Called with 0 after the change was made, or with an errno value and no change.
    func begin(ended: @escaping (Int32) -> Void) {
        guard let change, let store, !isInFlight else { preconditionFailure("nothing is staged") }
        isInFlight = true
        self.ended = ended
        let encoded = change.state.encoded
        unsafe bytes.deallocate()
        unsafe bytes = .allocate(capacity: encoded.count)
        _ = unsafe bytes.initialize(from: encoded)
        // Held until `done`.
        let token = unsafe Unmanaged.passRetained(self).toOpaque()
        unsafe store.save(UnsafeBufferPointer(bytes), token: token) { token, error in
            unsafe Unmanaged<PersistentState>.fromOpaque(token!).takeRetainedValue().done(error)
        }
    }

    private func done(_ error: Int32) {
        guard let change, let ended, isInFlight else { preconditionFailure("a state store called done twice") }
        self.change = nil
        self.ended = nil
        isInFlight = false
        if error == 0 {
            saved = change.state
            change.apply()
        }
        ended(error)
        retryWaiting()
    }

    /// Why a command whose change could not be saved ends with CHECK CONDITION.
    static func sense(_ error: Int32) -> SenseData {
        // ENOSPC, EDQUOT: what the initiator asked for does not fit, and it can make room by asking for less.
        error == 28 || error == 122
            ? SenseData(.illegalRequest, .insufficientResources)
            : SenseData(.hardwareError, .internalTargetFailure)
    }

    // MARK: Waiting for the save in flight

    /// A command that must wait.
    func wait(_ task: TaskHandle) { waiting.append(task) }

    /// Takes a command out, because it is aborted.
    func stopWaiting(_ task: TaskHandle) { waiting.removeAll { $0 == task } }

    /// Calls `body` when no change is on its way: at once, or later.
    func whenIdle(_ body: @escaping () -> Void) {
        if isBusy { waitingControl.append(body) } else { body() }
    }

    private func retryWaiting() {
        while !isBusy {
            if !waitingControl.isEmpty {
                waitingControl.removeFirst()()
            } else if !waiting.isEmpty {
                let task = waiting.removeFirst()
                unsafe task.logicalUnit!._withUnsafeGuaranteedRef { $0.retry(task) }
            } else {
                return
            }
        }
    }
}
