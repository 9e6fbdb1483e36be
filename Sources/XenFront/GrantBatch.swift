// GrantBatch: the copies of one turn, done by one hypercall, and whose they are.
//
// Owns: the list. Called by: XenPort. Must not know: what the bytes mean.

import CXen

/// Copies between granted pages and our own memory, collected and then done at once.
@safe
final class GrantBatch {
    private let copies: UnsafeMutablePointer<xengnttab_grant_copy_segment_t>
    private let owners: UnsafeMutablePointer<UInt8>
    private let capacity: Int
    private(set) var count = 0

    /// Room for every segment, direct or indirect, of every request of one ring.
    init() {
        capacity = VSCSIIFLimits.requests * VSCSIIFLimits.segments
        unsafe copies = .allocate(capacity: capacity)
        unsafe copies.initialize(repeating: xengnttab_grant_copy_segment_t(), count: capacity)
        unsafe owners = .allocate(capacity: capacity)
        unsafe owners.initialize(repeating: 0, count: capacity)
    }

    deinit {
        unsafe copies.deallocate()
        unsafe owners.deallocate()
    }

    /// Adds one copy for the request in slot `owner`. The caller has checked that the segment lies within a page.
    @inline(__always)
    func add(
        _ segment: vscsiif_segment_t, length: UInt16, toGuest: Bool, domain: UInt16, local: UnsafeMutableRawPointer,
        owner: Int
    ) {
        precondition(count < capacity)
        unsafe cxen_fill_copy(copies + count, toGuest, domain, segment.gref, segment.offset, length, local)
        unsafe owners[count] = UInt8(truncatingIfNeeded: owner)
        count += 1
    }

    /// Does the copies.
    ///
    /// - Returns: The slots of which a copy failed, a bit each.
    func run(_ grants: Grants) -> UInt32 {
        guard count > 0 else { return 0 }
        let failed = unsafe grants.copy(copies, count: count) != 0
        var mask: UInt32 = 0
        for index in 0..<count where unsafe failed || copies[index].status != GNTST_okay {
            mask |= unsafe 1 << UInt32(owners[index])
        }
        count = 0
        return mask
    }
}
