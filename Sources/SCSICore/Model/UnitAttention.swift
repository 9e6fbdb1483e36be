// UnitAttention: the unit attention conditions, their precedence, and the set of those pending for one I_T_L nexus.
//
// Called by: LogicalUnit (establish, report), Admission. Must not know: who causes them.

/// A unit attention condition, in the order in which they are reported (SAM-6 5.14, precedence table): the resets from
/// the widest to the narrowest, then the rest, among which SAM-6 leaves the order to the target.
enum UnitAttention: UInt8, CaseIterable {
    case powerOnOrReset, powerOn, hardReset, logicalUnitReset, nexusLoss
    case mediumChanged, reportedLUNsChanged, inquiryDataChanged
    case modeParametersChanged, logParametersChanged, capacityChanged
    case reservationsPreempted, reservationsReleased, registrationsPreempted, accessStateChanged
    case timestampChanged, deviceIdentifierChanged
    case commandsCleared, thresholdConditionMet, softThresholdReached
    case failurePredicted, failurePredictedFalsely, mediumRemovalRequested
    case previousBusy, previousTaskSetFull, previousReservationConflict

    /// One row each: the additional sense code, whether it is reported before a reservation conflict (SAM-6 5.3.3), and
    /// which pending conditions it takes away when it is established, because it implies them.
    // swift-format-ignore
    private var row: (code: AdditionalSense, isReset: Bool, clears: UnitAttentionSet) {
        switch self {
        case .powerOnOrReset:              (.powerOnResetOrBusDeviceReset,         true,  [.powerOn, .hardReset, .logicalUnitReset, .nexusLoss, .commandsCleared])
        case .powerOn:                     (.powerOnOccurred,                      true,  [.hardReset, .logicalUnitReset, .nexusLoss, .commandsCleared])
        case .hardReset:                   (.scsiBusResetOccurred,                 true,  [.logicalUnitReset, .nexusLoss, .commandsCleared])
        case .logicalUnitReset:            (.busDeviceResetFunctionOccurred,       true,  [.commandsCleared])
        case .nexusLoss:                   (.nexusLossOccurred,                    true,  [.commandsCleared])
        case .mediumChanged:               (.notReadyToReadyChange,                false, [])
        case .reportedLUNsChanged:         (.reportedLUNsDataChanged,              false, [])
        case .inquiryDataChanged:          (.inquiryDataChanged,                   false, [])
        case .modeParametersChanged:       (.modeParametersChanged,                false, [])
        case .logParametersChanged:        (.logParametersChanged,                 false, [])
        case .capacityChanged:             (.capacityDataChanged,                  false, [])
        case .reservationsPreempted:       (.reservationsPreempted,                false, [])
        case .reservationsReleased:        (.reservationsReleased,                 false, [])
        case .registrationsPreempted:      (.registrationsPreempted,               false, [])
        case .accessStateChanged:          (.asymmetricAccessStateChanged,         false, [])
        case .timestampChanged:            (.timestampChanged,                     false, [])
        case .deviceIdentifierChanged:     (.deviceIdentifierChanged,              false, [])
        case .commandsCleared:             (.commandsClearedByAnotherInitiator,    false, [])
        case .thresholdConditionMet:       (.thresholdConditionMet,                false, [])
        case .softThresholdReached:        (.thinProvisioningSoftThresholdReached, false, [])
        case .failurePredicted:            (.failurePredictionThresholdExceeded,   false, [])
        case .failurePredictedFalsely:     (.failurePredictionThresholdExceededFalse, false, [])
        case .mediumRemovalRequested:      (.operatorMediumRemovalRequest,         false, [])
        case .previousBusy:                (.previousBusyStatus,                   false, [])
        case .previousTaskSetFull:         (.previousTaskSetFullStatus,            false, [])
        case .previousReservationConflict: (.previousReservationConflictStatus,    false, [])
        }
    }

    var code: AdditionalSense { row.code }
    var isReset: Bool { row.isReset }
    var clears: UnitAttentionSet { row.clears }
    var sense: SenseData { SenseData(.unitAttention, row.code) }
}

/// What is to be reported to a nexus: pending unit attention conditions, each at most once, of which the lowest bit is
/// the first to report; whether there is a deferred error; and what its target port lets through. So a command asks for
/// all of it at once.
struct UnitAttentionSet: ExpressibleByArrayLiteral {
    private var bits: UInt32 = 0
    private static let deferredError: UInt32 = 1 << 31
    private static let accessShift: UInt32 = 29
    private static let accessMask: UInt32 = 3 << accessShift
    private var conditions: UInt32 { bits & ~(Self.deferredError | Self.accessMask) }

    init(arrayLiteral elements: UnitAttention...) { for element in elements { bits |= 1 << element.rawValue } }

    /// Whether nothing is to be reported, no deferred error either, and the port lets everything through.
    var isEmpty: Bool { bits == 0 }

    /// What the nexus's target port lets through.
    var access: PortAccess {
        get { PortAccess(rawValue: UInt8(bits >> Self.accessShift & 3))! }
        set { bits = bits & ~Self.accessMask | UInt32(newValue.rawValue) << Self.accessShift }
    }

    /// Whether a deferred error is to be reported.
    var hasDeferredError: Bool {
        get { bits & Self.deferredError != 0 }
        set { bits = newValue ? bits | Self.deferredError : bits & ~Self.deferredError }
    }

    /// How many conditions are pending.
    var count: Int { conditions.nonzeroBitCount }

    /// The condition with the highest precedence.
    var first: UnitAttention? {
        conditions == 0 ? nil : UnitAttention(rawValue: UInt8(conditions.trailingZeroBitCount))
    }

    func contains(_ condition: UnitAttention) -> Bool { bits & (1 << condition.rawValue) != 0 }

    mutating func establish(_ condition: UnitAttention) {
        bits = bits & ~condition.clears.bits | 1 << condition.rawValue
    }

    mutating func remove(_ condition: UnitAttention) { bits &= ~(1 << condition.rawValue) }
}
