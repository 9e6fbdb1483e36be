// PowerConditions: in which power condition a logical unit is (SPC-4 5.12, SBC-4 4.20), worked out when somebody asks.
//
// Owns: what START STOP UNIT has commanded, and when the medium was last used. Called by: START STOP UNIT, REQUEST
// SENSE, LogicalUnit (resets). Must not know: the task set, backstores.
//
// A virtual disk saves no power of its own, and none of its conditions makes it slower; but an initiator that asks for
// a condition, by command or by the timers of the Power Condition mode page, finds it entered and left as the standards
// say. A request for the backstore is what makes the unit active. There are no timers that run: the time of the last
// request is enough.

/// A power condition other than active and stopped, from the lightest to the deepest.
enum PowerCondition: UInt8, CaseIterable {
    case idleA, idleB, idleC, standbyY, standbyZ

    /// LOW POWER CONDITION ON, as REQUEST SENSE tells of it (SPC-4: power conditions): entered by a timer, or by a
    /// command.
    // swift-format-ignore
    func sense(byTimer: Bool) -> AdditionalSense {
        switch self {
        case .idleA:    byTimer ? .idleConditionActivatedByTimer     : .idleConditionActivatedByCommand
        case .idleB:    byTimer ? .idleBConditionActivatedByTimer    : .idleBConditionActivatedByCommand
        case .idleC:    byTimer ? .idleCConditionActivatedByTimer    : .idleCConditionActivatedByCommand
        case .standbyY: byTimer ? .standbyYConditionActivatedByTimer : .standbyYConditionActivatedByCommand
        case .standbyZ: byTimer ? .standbyConditionActivatedByTimer  : .standbyConditionActivatedByCommand
        }
    }

    /// Where the Power Condition mode page enables the condition's timer, and where the timer is (SPC-4 7.5.13): byte
    /// and bit, and the first of four bytes, behind the page's header.
    private var fields: (byte: Int, bit: UInt8, timer: Int) {
        switch self {
        case .idleA: (1, 0x02, 2)
        case .idleB: (1, 0x04, 10)
        case .idleC: (1, 0x08, 14)
        case .standbyY: (0, 0x01, 18)
        case .standbyZ: (1, 0x01, 6)
        }
    }

    /// Nanoseconds after which the condition is entered, `nil` if its timer is disabled.
    func timer(_ page: [UInt8]) -> UInt64? {
        guard page[fields.byte] & fields.bit != 0 else { return nil }
        return UInt64(page.field(fields.timer) as UInt32) * 100_000_000
    }
}

/// What a unit keeps for its power condition.
struct PowerState {
    /// A condition that a command has brought about, until the medium is used.
    var commanded: PowerCondition?
    /// It was the timer that the command has ended (FORCE_IDLE_0, FORCE_STANDBY_0).
    var isForced = false
    /// START STOP UNIT has taken control: timers do not run.
    var timersDisabled = false
}

extension LogicalUnit {
    /// The power condition at this moment, `nil` for active; a stopped unit is asked for its readiness before.
    var powerCondition: (condition: PowerCondition, byTimer: Bool)? {
        // The lowest bit of the time of the last request: whether there was one since the command.
        if let commanded = power.commanded, lastRequest & 1 == 0 { return (commanded, power.isForced) }
        guard !power.timersDisabled else { return nil }
        let idle = shard.clock &- (lastRequest & ~1)
        let page = modePages.powerCondition
        let entered = PowerCondition.allCases.last { condition in condition.timer(page).map { $0 <= idle } ?? false }
        guard let entered, !contains({ $0.state == .transferring }) else { return nil }
        return (entered, true)
    }

    /// START STOP UNIT with ACTIVE (`nil`), IDLE, STANDBY: the initiator has control of the power condition.
    func command(_ condition: PowerCondition?) {
        enter(PowerState(commanded: condition, timersDisabled: true))
    }

    /// START STOP UNIT with FORCE_IDLE_0, FORCE_STANDBY_0: as if the timer had run out. The timers go on.
    func force(_ condition: PowerCondition) { enter(PowerState(commanded: condition, isForced: true)) }

    /// START STOP UNIT with LU_CONTROL, and a reset: the timers have control, and begin.
    func releasePowerControl() { enter(PowerState()) }

    private func enter(_ state: PowerState) {
        power = state
        lastRequest = shard.clock & ~1
    }
}
