// DirtyLog: the bitmap in which a back-end notes which pages of the guest's memory it has written (vhost-user,
// "Migration").
//
// Owns: the mapping. Called by: VhostUserSession (SET_LOG_BASE), Virtqueue and VirtioSCSIDevice (each write while the
// front-end wants to know). Must not know: what was written.

import CLinux
import CMemoryGuard
import Glibc

@safe
final class DirtyLog {
    /// Bytes of guest memory for which one bit stands (VHOST_LOG_PAGE).
    static let pageSize: UInt64 = 4096

    private let mapping: UnsafeMutableRawPointer
    private let mappingSize: Int
    private let base: UnsafeMutableRawPointer
    private let size: UInt64

    /// Maps the bitmap; `nil` if the file cannot hold it. The descriptor stays the caller's.
    init?(descriptor: Int32, size: UInt64, offset: UInt64) {
        var status = stat()
        let end = offset.addingReportingOverflow(size)
        guard unsafe fstat(descriptor, &status) == 0, size > 0, !end.overflow, status.st_size > 0,
            end.partialValue <= UInt64(status.st_size),
            let mapped = unsafe clinux_map_shared(Int(end.partialValue), descriptor)
        else { return nil }
        guard unsafe memory_guard_add(mapped, Int(end.partialValue)) == 0 else {
            unsafe munmap(mapped, Int(end.partialValue))
            return nil
        }
        unsafe mapping = mapped
        mappingSize = Int(end.partialValue)
        unsafe base = mapped + Int(offset)
        self.size = size
    }

    deinit {
        unsafe memory_guard_remove(mapping)
        unsafe munmap(mapping, mappingSize)
    }

    /// Notes that bytes at a guest address were written; behind the write, and before the guest can learn of it. Pages
    /// for which the front-end has given no bit are left out.
    func mark(_ address: UInt64, _ length: UInt64) {
        guard length > 0 else { return }
        let last = address.addingReportingOverflow(length - 1)
        let end = last.overflow ? UInt64.max : last.partialValue
        var page = address / Self.pageSize
        while page <= end / Self.pageSize, page / 8 < size {
            unsafe clinux_or8(base + Int(page / 8), 1 << UInt8(page % 8))
            page += 1
        }
    }

    /// The same for memory by its host address, as requests have it.
    func mark(_ pointer: UnsafeRawPointer, _ length: Int, in memory: GuestMemory) {
        guard let address = unsafe memory.guestAddress(of: pointer) else { return }
        mark(address, UInt64(length))
    }
}
