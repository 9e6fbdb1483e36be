// VSCSIIFHost: the host codes of a response, bits 16 to 23 of `rslt`.
//
// Called by: XenPort. Must not know: anything else.
//
//   code                  when
//   OK                    the command has ended with a status
//   NO_CONNECT            no device at this logical unit number
//   BAD_TARGET            no device at this channel and target
//   BUS_BUSY              the request has waited for staging memory until its time-out
//   TIME_OUT              the command's deadline has passed
//   ABORT                 ended by ABORT
//   RESET                 ended by RESET, or by a reset that another initiator has asked for
//   ERROR                 the request is malformed, names memory that is not granted, or less than the command needs
//   SOFT_ERROR            the target could not take the command now: do it again
//   TRANSPORT_DISRUPTED   the device was removed while the command ran
//
// The others are not a back end's to send here: PARITY and BAD_INTR are faults of a physical bus;
// PASSTHROUGH, IMM_RETRY, REQUEUE and TRANSPORT_FAILFAST steer a local queue; TARGET_FAILURE, NEXUS_FAILURE,
// ALLOC_FAILURE, MEDIUM_ERROR and TRANSPORT_MARGINAL are what the guest's own middle layer makes of status and sense
// data, which a response with a host code would hide from it.

import CXen

enum VSCSIIFHost {
    static let noConnect = UInt8(XEN_VSCSIIF_RSLT_HOST_NO_CONNECT)
    static let busBusy = UInt8(XEN_VSCSIIF_RSLT_HOST_BUS_BUSY)
    static let timeOut = UInt8(XEN_VSCSIIF_RSLT_HOST_TIME_OUT)
    static let badTarget = UInt8(XEN_VSCSIIF_RSLT_HOST_BAD_TARGET)
    static let abort = UInt8(XEN_VSCSIIF_RSLT_HOST_ABORT)
    static let error = UInt8(XEN_VSCSIIF_RSLT_HOST_ERROR)
    static let reset = UInt8(XEN_VSCSIIF_RSLT_HOST_RESET)
    static let softError = UInt8(XEN_VSCSIIF_RSLT_HOST_SOFT_ERROR)
    /// A host code of a device of this host, as far as guests know it.
    static func known(_ code: UInt8) -> UInt8 {
        code <= UInt8(XEN_VSCSIIF_RSLT_HOST_TRANSPORT_MARGINAL) ? code : error
    }

    static let transportDisrupted = UInt8(XEN_VSCSIIF_RSLT_HOST_TRANSPORT_DISRUPTED)
}
