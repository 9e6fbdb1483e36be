// Status: what a command can end with.
//
// Called by: everything. Must not know: anything else.

/// A status code (SAM-6 5.3.1, table 29).
public enum SCSIStatus: UInt8, Sendable {
    case good = 0x00
    case checkCondition = 0x02
    case conditionMet = 0x04
    case busy = 0x08
    case reservationConflict = 0x18
    case taskSetFull = 0x28
    case acaActive = 0x30
    case taskAborted = 0x40
}

/// How a task ended as the service delivery subsystem sees it: `scsi_response.service_response` of scsi_target.h.
public enum ServiceResponse: UInt8, Sendable {
    /// COMMAND COMPLETE: there is a status.
    case commandComplete = 0
    /// Ended by a task management function of the same nexus.
    case aborted = 1
    /// Ended by a reset.
    case reset = 2
    /// The CDB asks for more data than the buffers hold; nothing was done.
    case overrun = 3
    /// The target could not take the command.
    case targetFailure = 4
    /// Not carried out, or not to its end: the front hands it in again (`scsi_task_management_request.suspension`).
    case suspended = 5
}

/// A task attribute (SAM-6 8.6).
public enum TaskAttribute: UInt8, Sendable, CaseIterable {
    case simple = 0
    case ordered = 1
    case headOfQueue = 2
    case aca = 3
}

/// A task management function (SAM-6 clause 7): `scsi_task_management_request.function` of scsi_target.h.
public enum TaskManagementFunction: UInt8, Sendable, CaseIterable {
    case abortTask = 1
    case abortTaskSet = 2
    case clearACA = 3
    case clearTaskSet = 4
    case nexusReset = 5
    case logicalUnitReset = 6
    case queryTask = 7
    case queryTaskSet = 8
    case queryAsynchronousEvent = 9
    case targetReset = 10
}

/// A service response of a task management function (SAM-6 7.1).
public enum TaskManagementResponse: UInt8, Sendable {
    case functionComplete = 0
    case functionSucceeded = 1
    case functionRejected = 2
    case incorrectLogicalUnitNumber = 3
}
