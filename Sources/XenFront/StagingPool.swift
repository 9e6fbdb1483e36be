// StagingPool: the memory through which a guest's data passes, allocated once, in contiguous runs of pages.
//
// Owns: that memory. Called by: the ports of one front, on the reactor's thread. Must not know: requests.
//
// Data of another domain is copied in and out in batches of one hypercall; a contiguous run means one data segment a
// command, aligned for direct I/O, whatever the guest's pages look like. Runs are powers of two (a buddy allocator), so
// that allocating and freeing take a bounded time and leave no holes that do not heal.

import Glibc

/// A fixed amount of page-aligned memory.
@safe
final class StagingPool {
    static let pageBytes = 4096
    /// Log2 of the pages of the largest run: 512 KiB.
    private static let maximumOrder = 7
    private let base: UnsafeMutableRawPointer
    private let pages: Int
    /// For each page that begins a free run: its order; else -1.
    private let freeOrder: UnsafeMutablePointer<Int8>
    private let next: UnsafeMutablePointer<Int32>
    private let previous: UnsafeMutablePointer<Int32>
    /// The first free run of each order, or -1.
    private let heads: UnsafeMutablePointer<Int32>
    private(set) var freePages: Int

    /// Reserves `bytes`, rounded up to a multiple of 512 KiB.
    init(bytes: Int) {
        precondition(bytes > 0 && bytes <= 1 << 40)
        let largest = 1 << Self.maximumOrder
        let blocks = (bytes + largest * Self.pageBytes - 1) / (largest * Self.pageBytes)
        pages = blocks * largest
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        let memory = unsafe mmap(nil, pages * Self.pageBytes, PROT_READ | PROT_WRITE, flags, -1, 0)
        guard let memory = unsafe memory, unsafe memory != MAP_FAILED else {
            fatalError("no address space for \(pages * Self.pageBytes) bytes of staging memory")
        }
        unsafe base = memory
        unsafe freeOrder = .allocate(capacity: pages)
        unsafe freeOrder.initialize(repeating: -1, count: pages)
        unsafe next = .allocate(capacity: pages)
        unsafe next.initialize(repeating: -1, count: pages)
        unsafe previous = .allocate(capacity: pages)
        unsafe previous.initialize(repeating: -1, count: pages)
        unsafe heads = .allocate(capacity: Self.maximumOrder + 1)
        unsafe heads.initialize(repeating: -1, count: Self.maximumOrder + 1)
        freePages = pages
        for block in (0..<blocks).reversed() { push(block * largest, order: Self.maximumOrder) }
    }

    deinit {
        unsafe munmap(base, pages * Self.pageBytes)
        unsafe freeOrder.deallocate()
        unsafe next.deallocate()
        unsafe previous.deallocate()
        unsafe heads.deallocate()
    }

    /// The memory of a run.
    @inline(__always)
    func memory(_ run: Int32) -> UnsafeMutableRawPointer { unsafe base + Int(run) &* Self.pageBytes }

    /// Takes a run of at least `bytes`, 1 to 512 KiB.
    ///
    /// - Returns: The run, or -1 if there is none now.
    func allocate(bytes: Int) -> Int32 {
        let order = Self.order(bytes)
        var found = order
        while found <= Self.maximumOrder, unsafe heads[found] < 0 { found += 1 }
        guard found <= Self.maximumOrder else { return -1 }
        let run = Int(unsafe heads[found])
        remove(run, order: found)
        while found > order {
            found -= 1
            push(run + (1 << found), order: found)
        }
        freePages -= 1 << order
        return Int32(run)
    }

    /// Whether a run of at least `bytes` could be taken now.
    func canAllocate(bytes: Int) -> Bool {
        (Self.order(bytes)...Self.maximumOrder).contains { unsafe heads[$0] >= 0 }
    }

    /// Gives a run back that was taken for `bytes`.
    func free(_ run: Int32, bytes: Int) {
        var order = Self.order(bytes)
        var run = Int(run)
        precondition(unsafe run >= 0 && run < pages && freeOrder[run] < 0, "a staging run freed twice")
        freePages += 1 << order
        while order < Self.maximumOrder {
            let buddy = run ^ (1 << order)
            guard Int(unsafe freeOrder[buddy]) == order else { break }
            remove(buddy, order: order)
            run &= ~(1 << order)
            order += 1
        }
        push(run, order: order)
    }

    private static func order(_ bytes: Int) -> Int {
        precondition(bytes > 0 && bytes <= pageBytes << maximumOrder)
        let pages = (bytes + pageBytes - 1) / pageBytes
        return pages == 1 ? 0 : Int.bitWidth - (pages - 1).leadingZeroBitCount
    }

    private func push(_ run: Int, order: Int) {
        let head = unsafe heads[order]
        unsafe freeOrder[run] = Int8(order)
        unsafe next[run] = head
        unsafe previous[run] = -1
        if head >= 0 { unsafe previous[Int(head)] = Int32(run) }
        unsafe heads[order] = Int32(run)
    }

    private func remove(_ run: Int, order: Int) {
        let after = unsafe next[run]
        let before = unsafe previous[run]
        if before >= 0 { unsafe next[Int(before)] = after } else { unsafe heads[order] = after }
        if after >= 0 { unsafe previous[Int(after)] = before }
        unsafe freeOrder[run] = -1
    }
}
