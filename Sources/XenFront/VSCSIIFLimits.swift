// VSCSIIFLimits: every bound of the Xen front, in one place, with its unit, its reason, and what a guest sees.
//
// Called by: everything in XenFront. Must not know: anything else.

import CXen

/// The bounds of the Xen front. Nothing grows past them, whatever a guest sends.
enum VSCSIIFLimits {
    /// Requests of one vhost that have been received and not answered: what one ring page holds. A front end that
    /// claims more has broken the ring and is disconnected.
    static let requests = Int(cxen_ring_size())

    /// Data segments of one request through indirect tables: `feature-sg-grant`. It is what Linux's front end uses at
    /// most; a request with more gets host code ERROR.
    static let segments = 128

    /// Bytes of one page of the ring protocol, on every architecture.
    static let pageBytes = Int(VSCSIIF_PAGE_SIZE)

    /// Bytes of data of one request: 512 KiB.
    static let requestBytes = segments * pageBytes

    /// Devices of one vhost, and targets behind them. One more is a failed add.
    static let devices = 256

    /// Seconds for a command whose request has timeout 0, "default": what Linux gives a disk.
    static let defaultTimeout: UInt32 = 30

    /// Bytes of staging memory of one front, all vhosts together, unless configured otherwise: 8 vhosts with full rings
    /// of the largest requests. Requests that find none wait.
    static let stagingBytes = 64 << 20
}
