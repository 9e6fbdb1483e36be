// Grants: memory of other domains: mapping a ring page, and copying data in batches.
//
// Owns: the handle of the grant device. Called by: VhostServer (mapping) and XenPort (copying), on the reactor's
// thread. Must not know: what is in the pages.

import CXen
import Glibc
import Xenbus

/// The functions behind `Grants`: libxengnttab's, or a test's.
@safe
struct GrantOperations {
    /// Maps a page of a domain for reading and writing; `nil` and errno if that is not granted.
    let map: @convention(c) (UnsafeMutableRawPointer, UInt16, UInt32) -> UnsafeMutableRawPointer?
    let unmap: @convention(c) (UnsafeMutableRawPointer, UnsafeMutableRawPointer) -> Void
    /// Does all copies and sets each one's status; other than 0: nothing is known about any of them.
    let copy:
        @convention(c) (
            UnsafeMutableRawPointer, UnsafeMutablePointer<xengnttab_grant_copy_segment_t>, Int
        ) -> Int32
}

/// Access to memory that other domains have granted: a vtable and its context.
@safe
struct Grants {
    private let operations: UnsafePointer<GrantOperations>
    private let context: UnsafeMutableRawPointer

    init(operations: UnsafePointer<GrantOperations>, context: UnsafeMutableRawPointer) {
        unsafe self.operations = operations
        unsafe self.context = context
    }

    func map(domain: UInt16, reference: UInt32) -> UnsafeMutableRawPointer? {
        unsafe operations.pointee.map(context, domain, reference)
    }

    func unmap(_ page: UnsafeMutableRawPointer) { unsafe operations.pointee.unmap(context, page) }

    @inline(__always)
    func copy(_ segments: UnsafeMutablePointer<xengnttab_grant_copy_segment_t>, count: Int) -> Int32 {
        unsafe operations.pointee.copy(context, segments, count)
    }
}

/// Grants through libxengnttab.
@safe
final class LibraryGrants {
    private let handle: OpaquePointer

    /// Opens /dev/xen/gntdev.
    init() throws(XenStoreError) {
        guard let handle = unsafe xengnttab_open(nil, 0) else {
            throw XenStoreError(operation: "open", path: "/dev/xen/gntdev", code: errno)
        }
        unsafe self.handle = handle
    }

    deinit { unsafe xengnttab_close(handle) }

    /// The seam. The caller keeps this object alive as long as it is used.
    var grants: Grants {
        unsafe Grants(operations: Self.operations, context: UnsafeMutableRawPointer(handle))
    }

    nonisolated(unsafe) private static let operations: UnsafePointer<GrantOperations> = {
        let operations = UnsafeMutablePointer<GrantOperations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: GrantOperations(
                map: { context, domain, reference in
                    unsafe xengnttab_map_grant_ref(
                        OpaquePointer(context), UInt32(domain), reference, PROT_READ | PROT_WRITE)
                },
                unmap: { context, page in _ = unsafe xengnttab_unmap(OpaquePointer(context), page, 1) },
                copy: { context, segments, count in
                    unsafe xengnttab_grant_copy(OpaquePointer(context), UInt32(count), segments)
                }))
        return unsafe UnsafePointer(operations)
    }()
}
