// AdditionalSense: the additional sense codes that this target uses (SPC-6 annex F.2), one line each.
//
// Called by: SenseData, the unit attention table. Must not know: when they apply.

/// An additional sense code and its qualifier.
public struct AdditionalSense: RawRepresentable, Hashable, Sendable {
    /// The code in the high byte, the qualifier in the low one.
    public let rawValue: UInt16

    /// The pair with this value.
    public init(rawValue: UInt16) { self.rawValue = rawValue }

    private init(_ rawValue: UInt16) { self.rawValue = rawValue }

    /// ADDITIONAL SENSE CODE.
    public var code: UInt8 { UInt8(rawValue >> 8) }
    /// ADDITIONAL SENSE CODE QUALIFIER.
    public var qualifier: UInt8 { UInt8(truncatingIfNeeded: rawValue) }

    // swift-format-ignore-start: a table
    public static let noAdditionalSense                       = Self(0x0000)
    public static let logicalUnitNotReadyInitializingRequired = Self(0x0402)
    public static let logicalUnitNotReadyManualIntervention   = Self(0x0403)
    public static let logicalUnitCommunicationFailure         = Self(0x0800)
    public static let writeError                              = Self(0x0c00)
    public static let unrecoveredReadError                    = Self(0x1100)
    public static let parameterListLengthError                = Self(0x1a00)
    public static let miscompareDuringVerifyOperation         = Self(0x1d00)
    public static let invalidCommandOperationCode             = Self(0x2000)
    public static let logicalBlockAddressOutOfRange           = Self(0x2100)
    public static let invalidFieldInCDB                       = Self(0x2400)
    public static let logicalUnitNotSupported                 = Self(0x2500)
    public static let invalidFieldInParameterList             = Self(0x2600)
    public static let writeProtected                          = Self(0x2700)
    public static let spaceAllocationFailedWriteProtect       = Self(0x2707)
    public static let notReadyToReadyChange                   = Self(0x2800)
    public static let powerOnResetOrBusDeviceReset            = Self(0x2900)
    public static let powerOnOccurred                         = Self(0x2901)
    public static let scsiBusResetOccurred                    = Self(0x2902)
    public static let busDeviceResetFunctionOccurred          = Self(0x2903)
    public static let nexusLossOccurred                       = Self(0x2907)
    public static let modeParametersChanged                   = Self(0x2a01)
    public static let reservationsPreempted                   = Self(0x2a03)
    public static let reservationsReleased                    = Self(0x2a04)
    public static let registrationsPreempted                  = Self(0x2a05)
    public static let asymmetricAccessStateChanged            = Self(0x2a06)
    public static let capacityDataChanged                     = Self(0x2a09)
    public static let commandsClearedByAnotherInitiator       = Self(0x2f00)
    public static let thinProvisioningSoftThresholdReached    = Self(0x3807)
    public static let savingParametersNotSupported            = Self(0x3900)
    public static let mediumNotPresent                        = Self(0x3a00)
    public static let inquiryDataChanged                      = Self(0x3f03)
    public static let reportedLUNsDataChanged                 = Self(0x3f0e)
    public static let internalTargetFailure                   = Self(0x4400)
    public static let overlappedCommandsAttempted             = Self(0x4e00)
    public static let insufficientResources                   = Self(0x5503)
    // swift-format-ignore-end
}
