// START STOP UNIT and PREVENT ALLOW MEDIUM REMOVAL.
//
// Called by: DeviceServer. Must not know: the task set, transports; what follows from a power condition or a medium
// that is away (PowerConditions, RemovableMedium).

import CTarget

/// What a START STOP UNIT asks for.
private enum StartStopAction {
    case start, stop, load, eject
    case command(PowerCondition?)
    case force(PowerCondition)
    case releaseControl

    /// Whether what is cached is made stable before, unless NO_FLUSH says no: the medium cannot be used afterwards, or
    /// only once it is back from a standby.
    var flushes: Bool {
        switch self {
        case .stop, .eject, .command(.standbyY), .command(.standbyZ), .force(.standbyY), .force(.standbyZ): true
        case .start, .load, .command, .force, .releaseControl: false
        }
    }

    /// Decodes a CDB (SBC-4 5.31).
    ///
    /// - Returns: `nil` if POWER CONDITION or its modifier has no meaning.
    init?(_ cdb: CDB) {
        let (condition, modifier) = (cdb[4] >> 4, Int(cdb[3] & 0x0f))
        let idle = [PowerCondition.idleA, .idleB, .idleC]
        let standby = [PowerCondition.standbyZ, .standbyY]
        switch condition {
        case 0x0 where modifier == 0:
            let start = cdb.bit(4, 0)
            self = cdb.bit(4, 1) ? start ? .load : .eject : start ? .start : .stop
        case 0x1 where modifier == 0: self = .command(nil)
        case 0x2 where modifier < idle.count: self = .command(idle[modifier])
        case 0x3 where modifier < standby.count: self = .command(standby[modifier])
        case 0x7 where modifier == 0: self = .releaseControl
        case 0xa where modifier < idle.count: self = .force(idle[modifier])
        case 0xb where modifier < standby.count: self = .force(standby[modifier])
        default: return nil
        }
    }
}

extension SBC {
    /// START STOP UNIT (SBC-4 5.31). Everything is done at once but the flush. With IMMED the unit changes its
    /// condition, the status comes, and the flush goes on; an error of it is a deferred one.
    static func startStopUnit(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        // SBC-4 4.17: START without a power condition, and without a load, is allowed in the presence of
        // reservations.
        if cdb[4] & 0xf3 != 0x01, unit.isRestricted(task.nexus) { return .done(.reservationConflict) }
        // SPC-4 5.13.5.2: the same while nobody knows which reservation there was.
        if cdb[4] & 0xf1 != 0x01, unit.reservations.areLost { return .failed(unit.readiness.sense) }
        guard let action = StartStopAction(cdb) else { return .failed(invalidCondition(cdb)) }
        switch action {
        case .eject where unit.isRemovalPrevented: return .failed(SenseData(.illegalRequest, .mediumRemovalPrevented))
        case .load where unit.mediumState == .absent: return .failed(unit.readiness.sense)
        // A timer that is disabled cannot be forced to end.
        case .force(let condition) where condition.timer(unit.modePages.powerCondition) == nil:
            return .failed(.invalidField(inCDB: 4, bit: 7))
        default: break
        }
        if action.flushes, !cdb.bit(4, 2), unit.cachesWrites, unit.readiness == .ready {
            if cdb.bit(1, 0) {
                unit.flushLater()
                return perform(action, on: unit)
            }
            task.step = 1
            DeviceServer.fillFlush(task)
            return .submit
        }
        return perform(action, on: unit)
    }

    static func startStopAfterFlush(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        guard let action = StartStopAction(cdb) else { preconditionFailure("a CDB has changed") }
        if case .eject = action, unit.isRemovalPrevented {
            return .failed(SenseData(.illegalRequest, .mediumRemovalPrevented))
        }
        return perform(action, on: unit)
    }

    private static func invalidCondition(_ cdb: CDB) -> SenseData {
        let conditions: Set<UInt8> = [0x0, 0x1, 0x2, 0x3, 0x7, 0xa, 0xb]
        return conditions.contains(cdb[4] >> 4) ? .invalidField(inCDB: 3, bit: 3) : .invalidField(inCDB: 4, bit: 7)
    }

    private static func perform(_ action: StartStopAction, on unit: LogicalUnit) -> Outcome {
        switch action {
        case .start:
            unit.start()
            unit.releasePowerControl()
        case .stop: unit.stopped = true
        case .load:
            guard unit.loaded() else { return .failed(unit.readiness.sense) }
            unit.start()
        case .eject: unit.ejected()
        case .command(let condition):
            unit.start()
            unit.command(condition)
        case .force(let condition): unit.force(condition)
        case .releaseControl: unit.releasePowerControl()
        }
        return .done(.good)
    }

    /// PREVENT ALLOW MEDIUM REMOVAL (SBC-4 5.15), of removable units only.
    static func preventAllowMediumRemoval(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        // SPC-4 table 65 and SBC-4 5.15: only to allow is allowed in the presence of reservations.
        if cdb.bit(4, 0), unit.isRestricted(task.nexus) { return .done(.reservationConflict) }
        guard !cdb.bit(4, 0), unit.prevents(task.nexus), unit.cachesWrites, unit.readiness == .ready else {
            unit.prevent(cdb.bit(4, 0), by: task.nexus)
            return .done(.good)
        }
        // What is cached is made stable before the prevention ends.
        task.step = 1
        DeviceServer.fillFlush(task)
        return .submit
    }

    static func allowAfterFlush(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        unit.prevent(false, by: task.nexus)
        return .done(.good)
    }
}
