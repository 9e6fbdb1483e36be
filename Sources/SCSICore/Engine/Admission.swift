// Admission: whether a command may be carried out now, as one verdict in the standard's order of precedence.
//
// Called by: LogicalUnit, for each command when it is enabled. Must not know: how commands work. Calls nobody.

/// What stands in a command's way.
enum AdmissionVerdict {
    case admitted
    /// A pending unit attention condition, which is reported and cleared.
    case unitAttention(UnitAttention)
    /// The deferred error that the nexus is to be told.
    case deferredError
    /// CHECK CONDITION with this.
    case refused(SenseData)
    /// RESERVATION CONFLICT.
    case conflict
}

/// What admission looks at: a snapshot of the logical unit, seen from one nexus.
struct AdmissionState {
    /// Unit attention conditions, a deferred error, and what the nexus's port lets through.
    let pending: UnitAttentionSet
    /// What a reservation makes of the nexus: the flags of which a command must have one; none: all may pass.
    let restriction: CommandFlags
    let readiness: Readiness
    let writeProtected: Bool
}

enum Admission {
    /// Checks in the order of SAM-6 5.3.3 (status precedence): unit attention conditions from resets, then
    /// reservation conflicts, then the other unit attention conditions, then everything else: deferred errors,
    /// asymmetric access states, readiness, write protection. Among these SAM-6 leaves the order to the target; what
    /// the port does not let through is not asked of the unit.
    ///
    /// - Parameter flags: The columns of the command's row; none for a command that is not in the table.
    @inline(__always)
    static func check(_ flags: CommandFlags, _ state: AdmissionState) -> AdmissionVerdict {
        if state.pending.isEmpty, state.restriction.isEmpty, state.readiness == .ready, !state.writeProtected {
            return .admitted
        }
        if !state.restriction.isEmpty, flags.isDisjoint(with: state.restriction) {
            guard let condition = state.pending.first, condition.isReset else { return .conflict }
            return .unitAttention(condition)
        }
        if !flags.contains(.passesUnitAttention), let condition = state.pending.first {
            return .unitAttention(condition)
        }
        if !flags.contains(.passesUnitAttention), state.pending.hasDeferredError { return .deferredError }
        if !state.pending.access.admits(flags) { return .refused(state.pending.access.sense) }
        if state.readiness != .ready, !state.readiness.admits(flags) { return .refused(state.readiness.sense) }
        if state.writeProtected, flags.contains(.writesMedium) {
            return .refused(SenseData(.dataProtect, .writeProtected))
        }
        return .admitted
    }
}
