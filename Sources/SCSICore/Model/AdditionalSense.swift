// AdditionalSense: the additional sense codes that this target uses (SPC-4: ASC and ASCQ assignments), one line each.
//
// Called by: SenseData, the unit attention table. Must not know: when they apply.

/// An additional sense code and its qualifier.
public struct AdditionalSense: RawRepresentable, Hashable, Sendable {
    /// The code in the high byte, the qualifier in the low one.
    public let rawValue: UInt16

    /// The pair with this value.
    public init(rawValue: UInt16) { self.rawValue = rawValue }

    fileprivate init(_ rawValue: UInt16) { self.rawValue = rawValue }

    /// ADDITIONAL SENSE CODE.
    public var code: UInt8 { UInt8(rawValue >> 8) }
    /// ADDITIONAL SENSE CODE QUALIFIER.
    public var qualifier: UInt8 { UInt8(truncatingIfNeeded: rawValue) }
}

// swift-format-ignore
extension AdditionalSense {
    static let noAdditionalSense                       = Self(0x0000)
    static let logicalUnitNotReadyInitializingRequired = Self(0x0402)
    static let asymmetricAccessStateTransition         = Self(0x040a)
    static let targetPortInStandbyState                = Self(0x040b)
    static let targetPortInUnavailableState            = Self(0x040c)
    static let logicalUnitCommunicationFailure         = Self(0x0800)
    static let logicalUnitCommunicationTimeOut         = Self(0x0801)
    static let writeError                              = Self(0x0c00)
    static let unrecoveredReadError                    = Self(0x1100)
    static let parameterListLengthError                = Self(0x1a00)
    static let miscompareDuringVerifyOperation         = Self(0x1d00)
    static let invalidCommandOperationCode             = Self(0x2000)
    static let logicalBlockAddressOutOfRange           = Self(0x2100)
    static let invalidFieldInCDB                       = Self(0x2400)
    static let logicalUnitNotSupported                 = Self(0x2500)
    static let invalidFieldInParameterList             = Self(0x2600)
    static let invalidReleaseOfPersistentReservation   = Self(0x2604)
    static let writeProtected                          = Self(0x2700)
    static let spaceAllocationFailedWriteProtect       = Self(0x2707)
    static let notReadyToReadyChange                   = Self(0x2800)
    static let powerOnResetOrBusDeviceReset            = Self(0x2900)
    static let powerOnOccurred                         = Self(0x2901)
    static let scsiBusResetOccurred                    = Self(0x2902)
    static let busDeviceResetFunctionOccurred          = Self(0x2903)
    static let nexusLossOccurred                       = Self(0x2907)
    static let modeParametersChanged                   = Self(0x2a01)
    static let logParametersChanged                    = Self(0x2a02)
    static let reservationsPreempted                   = Self(0x2a03)
    static let reservationsReleased                    = Self(0x2a04)
    static let registrationsPreempted                  = Self(0x2a05)
    static let asymmetricAccessStateChanged            = Self(0x2a06)
    static let capacityDataChanged                     = Self(0x2a09)
    static let timestampChanged                        = Self(0x2a10)
    static let commandSequenceError                    = Self(0x2c00)
    static let previousBusyStatus                      = Self(0x2c07)
    static let previousTaskSetFullStatus               = Self(0x2c08)
    static let previousReservationConflictStatus       = Self(0x2c09)
    static let commandsClearedByAnotherInitiator       = Self(0x2f00)
    static let thinProvisioningSoftThresholdReached    = Self(0x3807)
    static let savingParametersNotSupported            = Self(0x3900)
    static let mediumNotPresent                        = Self(0x3a00)
    static let mediumNotPresentTrayOpen                = Self(0x3a02)
    static let logicalUnitFailedSelfTest               = Self(0x3e03)
    static let inquiryDataChanged                      = Self(0x3f03)
    static let deviceIdentifierChanged                 = Self(0x3f05)
    static let reportedLUNsDataChanged                 = Self(0x3f0e)
    static let echoBufferOverwritten                   = Self(0x3f0f)
    static let internalTargetFailure                   = Self(0x4400)
    static let persistentReservationInformationLost    = Self(0x4401)
    static let invalidMessageError                     = Self(0x4900)
    static let mediumRemovalPrevented                  = Self(0x5302)
    static let insufficientResources                   = Self(0x5503)
    static let insufficientRegistrationResources       = Self(0x5504)
    static let operatorMediumRemovalRequest            = Self(0x5a01)
    static let thresholdConditionMet                   = Self(0x5b01)
    static let failurePredictionThresholdExceeded      = Self(0x5d00)
    static let failurePredictionThresholdExceededFalse = Self(0x5dff)
    static let idleConditionActivatedByTimer           = Self(0x5e01)
    static let standbyConditionActivatedByTimer        = Self(0x5e02)
    static let idleConditionActivatedByCommand         = Self(0x5e03)
    static let standbyConditionActivatedByCommand      = Self(0x5e04)
    static let idleBConditionActivatedByTimer          = Self(0x5e05)
    static let idleBConditionActivatedByCommand        = Self(0x5e06)
    static let idleCConditionActivatedByTimer          = Self(0x5e07)
    static let idleCConditionActivatedByCommand        = Self(0x5e08)
    static let standbyYConditionActivatedByTimer       = Self(0x5e09)
    static let standbyYConditionActivatedByCommand     = Self(0x5e0a)
}
