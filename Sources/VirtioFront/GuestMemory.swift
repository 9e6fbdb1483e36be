// GuestMemory: the guest's memory as the front-end shared it, and the only place where pointers into it are made.
//
// Owns: the mappings. Called by: VhostUserSession (regions), Virtqueue (addresses). Must not know: rings, messages.

import CIOVector
import CLinux
import CMemoryGuard
import Glibc

/// One mapped region. Unmapped when the last table that has it goes away.
@safe
final class MemoryRegion {
    let guestAddress: UInt64
    let size: UInt64
    let userAddress: UInt64
    private let mapping: UnsafeMutableRawPointer
    private let mappingSize: Int
    /// Where the region begins.
    let base: UnsafeMutableRawPointer

    /// Why a region was refused.
    enum Fault: Error {
        case invalid(String)
    }

    /// Maps a region. The descriptor stays the caller's.
    init(
        guestAddress: UInt64, size: UInt64, userAddress: UInt64, offset: UInt64, descriptor: Int32
    ) throws(Fault) {
        let sums = [guestAddress, userAddress, offset].map { $0.addingReportingOverflow(size) }
        guard size > 0, sums.allSatisfy({ !$0.overflow }), sums[2].partialValue <= UInt64(Int.max) else {
            throw .invalid("a memory region of \(size) bytes at \(guestAddress) whose end is not an address")
        }
        var status = stat()
        guard unsafe fstat(descriptor, &status) == 0 else {
            throw .invalid("a memory region without a usable file descriptor")
        }
        // Behind the end of a file there is no memory, only SIGBUS.
        if status.st_mode & S_IFMT == S_IFREG, UInt64(status.st_size) < sums[2].partialValue {
            throw .invalid("a memory region of \(size) bytes at offset \(offset) in a file of \(status.st_size) bytes")
        }
        // Huge pages are mapped and unmapped in whole ones only.
        let block = max(UInt64(status.st_blksize), 4096)
        let end = sums[2].partialValue.addingReportingOverflow(block - 1)
        guard !end.overflow, end.partialValue <= UInt64(Int.max) else {
            throw .invalid("a memory region of \(size) bytes at offset \(offset)")
        }
        mappingSize = Int(end.partialValue / block * block)
        guard let mapped = unsafe clinux_map_shared(mappingSize, descriptor) else {
            throw .invalid("a memory region of \(size) bytes that cannot be mapped (errno \(errno))")
        }
        // The front-end may make its file shorter at any time; that must not end the process.
        guard unsafe memory_guard_add(mapped, mappingSize) == 0 else {
            unsafe munmap(mapped, mappingSize)
            throw .invalid("one memory region more than this process can guard")
        }
        unsafe mapping = mapped
        unsafe base = mapped + Int(offset)
        self.guestAddress = guestAddress
        self.size = size
        self.userAddress = userAddress
    }

    deinit {
        unsafe memory_guard_remove(mapping)
        unsafe munmap(mapping, mappingSize)
    }

    func overlaps(_ other: MemoryRegion) -> Bool {
        guestAddress < other.guestAddress + other.size && other.guestAddress < guestAddress + size
    }
}

/// A table of regions that does not change. A new memory map is a new table; requests in flight keep theirs.
@safe
final class GuestMemory {
    /// The most regions, as GET_MAX_MEM_SLOTS reports them: what QEMU's memory hot-plug can use.
    static let slots = 512

    /// What the look-up reads: sorted by guest address.
    @safe
    private struct Entry {
        let start: UInt64
        let size: UInt64
        let base: UnsafeMutableRawPointer
    }

    let regions: [MemoryRegion]
    private let entries: UnsafeMutablePointer<Entry>
    private let count: Int
    private var last = 0
    /// Requests that lead into this memory. The session keeps the table until it is 0.
    var references = 0

    init(regions: [MemoryRegion]) {
        self.regions = regions.sorted { $0.guestAddress < $1.guestAddress }
        count = regions.count
        unsafe entries = .allocate(capacity: max(count, 1))
        for (index, region) in self.regions.enumerated() {
            unsafe (entries + index).initialize(
                to: Entry(start: region.guestAddress, size: region.size, base: region.base))
        }
    }

    deinit { unsafe entries.deallocate() }

    /// The memory at a guest physical address.
    ///
    /// - Returns: Where it is and how much of it is contiguous here, at most `length`; `nil` if there is none.
    @inline(__always)
    func piece(_ address: UInt64, _ length: UInt64) -> UnsafeMutableRawBufferPointer? {
        var index = last
        if index >= count || !contains(index, address) {
            guard let found = find(address) else { return nil }
            index = found
            last = found
        }
        let entry = unsafe entries[index]
        let offset = address &- entry.start
        let available = min(entry.size &- offset, length)
        return unsafe UnsafeMutableRawBufferPointer(start: entry.base + Int(offset), count: Int(available))
    }

    @inline(__always)
    private func contains(_ index: Int, _ address: UInt64) -> Bool {
        unsafe address >= entries[index].start && address &- entries[index].start < entries[index].size
    }

    private func find(_ address: UInt64) -> Int? {
        var (low, high) = (0, count)
        while low < high {
            let middle = (low + high) / 2
            if unsafe entries[middle].start <= address { low = middle + 1 } else { high = middle }
        }
        return low > 0 && contains(low - 1, address) ? low - 1 : nil
    }

    /// The guest physical address of memory here; not for the hot path.
    func guestAddress(of pointer: UnsafeRawPointer) -> UInt64? {
        for region in regions {
            let start = unsafe UInt64(UInt(bitPattern: region.base))
            let address = UInt64(UInt(bitPattern: pointer))
            if address >= start, address - start < region.size { return region.guestAddress + (address - start) }
        }
        return nil
    }

    /// The memory at an address of the front-end's process, `length` bytes of it in one region: where rings lie.
    func ring(userAddress: UInt64, length: UInt64, alignment: UInt64) -> UnsafeMutableRawPointer? {
        for region in regions where userAddress >= region.userAddress {
            let offset = userAddress - region.userAddress
            guard offset < region.size, length <= region.size - offset else { continue }
            let pointer = unsafe region.base + Int(offset)
            return unsafe UInt64(UInt(bitPattern: pointer)) % alignment == 0 ? pointer : nil
        }
        return nil
    }
}
