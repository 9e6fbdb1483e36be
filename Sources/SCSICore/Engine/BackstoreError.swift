// BackstoreError: errno → sense data, one table.
//
// Called by: LogicalUnit when a request ended with an error. Must not know: which backstore it was.

import CBackstore

enum BackstoreError {
    /// Errno values by name, as scsi_backstore.h lists them; the numbers are Linux's.
    private enum Errno {
        static let eopnotsupp: Int32 = 95
        static let eio: Int32 = 5, enomem: Int32 = 12, enospc: Int32 = 28, erofs: Int32 = 30, enodata: Int32 = 61
        static let eilseq: Int32 = 84, etimedout: Int32 = 110, eremoteio: Int32 = 121, edquot: Int32 = 122
        static let enomedium: Int32 = 123, ecanceled: Int32 = 125, enobufs: Int32 = 105
    }

    /// The backstore has no memory to prefetch into: no failure.
    static func meansNoCache(_ error: Int32) -> Bool { error == Errno.enobufs }

    /// Whether a request ended because it was cancelled.
    static func isCancellation(_ error: Int32) -> Bool { error == Errno.ecanceled }

    /// Whether a request that failed may succeed when it is submitted again. A flush may not: what it could not make
    /// stable is lost, and the next one would not know of it.
    static func mayPass(_ error: Int32, operation: UInt8) -> Bool {
        switch Int(operation) {
        case SCSI_BACKSTORE_READ, SCSI_BACKSTORE_WRITE, SCSI_BACKSTORE_DISCARD, SCSI_BACKSTORE_WRITE_ZEROES,
            SCSI_BACKSTORE_ANCHOR:
            switch error {
            case Errno.eopnotsupp, Errno.erofs, Errno.enomedium, Errno.ecanceled: false
            default: true
            }
        default: false
        }
    }

    /// The sense data for an error of a task's request. A medium error names the first block that failed if the
    /// backstore knows it (SBC-4 4.18: INFORMATION).
    static func sense(_ error: Int32, _ task: TaskHandle, _ medium: MediumExtent) -> SenseData {
        let operation = unsafe Int(task.request.pointee.operation)
        let reading = [SCSI_BACKSTORE_READ, SCSI_BACKSTORE_PREFETCH, SCSI_BACKSTORE_EXTENTS].contains(operation)
        if let sense = common(error) { return sense }
        let offset = unsafe task.request.pointee.error_offset
        return SenseData(
            .mediumError, reading ? .unrecoveredReadError : .writeError,
            information: offset == .max ? nil : medium.address(of: ByteOffset(offset)).value)
    }

    /// The same for a flush that no task has.
    static func senseOfFlush(_ error: Int32) -> SenseData { common(error) ?? SenseData(.mediumError, .writeError) }

    /// What an error means whatever the request was; `nil`: the medium could not do it.
    private static func common(_ error: Int32) -> SenseData? {
        // swift-format-ignore
        switch error {
        case Errno.enospc, Errno.edquot: SenseData(.dataProtect,    .spaceAllocationFailedWriteProtect)
        case Errno.erofs:                SenseData(.dataProtect,    .writeProtected)
        case Errno.enomedium:            SenseData(.notReady,       .mediumNotPresent)
        case Errno.ecanceled:            SenseData(.abortedCommand, .noAdditionalSense)
        case Errno.etimedout:            SenseData(.abortedCommand, .logicalUnitCommunicationTimeOut)
        case Errno.eremoteio:            SenseData(.hardwareError,  .logicalUnitCommunicationFailure)
        case Errno.enomem:               SenseData(.abortedCommand, .insufficientResources)
        default:                         nil
        }
    }
}
