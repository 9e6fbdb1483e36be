// InflightRegion: the memory in which a back-end notes what it has in flight (vhost-user, "Inflight I/O tracking"), so
// that the next back-end on the same rings goes on where this one was killed.
//
// Owns: the mapping, and the layout of a queue's part of it, of both ring formats. Called by: VhostUserSession (GET and
// SET_INFLIGHT_FD), Virtqueue (each element taken and used). Must not know: what the chains hold.
//
// The front-end keeps this memory and can write to it: while the queue runs nothing here is read, and what is read when
// the queue starts is checked as everything is that comes from outside.

import CLinux
import CMemoryGuard
import Glibc

/// The mapped region.
@safe
final class InflightRegion {
    /// Parts of the queues begin at multiples of this.
    private static let alignment = 64
    private static let headerSize = 64
    private static let entrySize = 32

    let queues: Int
    let queueSize: Int
    private let mapping: UnsafeMutableRawPointer
    private let mappingSize: Int
    private let base: UnsafeMutableRawPointer

    /// Bytes of one queue's part; the same for both ring formats, which differ in the entries' size.
    private static func stride(_ queueSize: Int) -> Int {
        (headerSize + entrySize * queueSize + alignment - 1) / alignment * alignment
    }

    /// Bytes of a region.
    static func size(queues: Int, queueSize: Int) -> Int { queues * stride(queueSize) }

    /// Makes a region of zeros: a file without a name, which is the caller's.
    static func make(queues: Int, queueSize: Int) -> Int32? {
        let descriptor = unsafe memfd_create("vhost-user-inflight", UInt32(MFD_CLOEXEC))
        guard descriptor >= 0 else { return nil }
        guard ftruncate(descriptor, size(queues: queues, queueSize: queueSize)) == 0 else {
            close(descriptor)
            return nil
        }
        return descriptor
    }

    /// Maps a region; `nil` if the file cannot hold it. The descriptor stays the caller's.
    init?(descriptor: Int32, size: UInt64, offset: UInt64, queues: Int, queueSize: Int) {
        var status = stat()
        let end = offset.addingReportingOverflow(size)
        guard unsafe fstat(descriptor, &status) == 0, status.st_size > 0, !end.overflow,
            end.partialValue <= UInt64(status.st_size), offset % 8 == 0,
            size >= UInt64(Self.size(queues: queues, queueSize: queueSize)),
            let mapped = unsafe clinux_map_shared(Int(end.partialValue), descriptor)
        else { return nil }
        guard unsafe memory_guard_add(mapped, Int(end.partialValue)) == 0 else {
            unsafe munmap(mapped, Int(end.partialValue))
            return nil
        }
        unsafe mapping = mapped
        mappingSize = Int(end.partialValue)
        unsafe base = mapped + Int(offset)
        self.queues = queues
        self.queueSize = queueSize
    }

    deinit {
        unsafe memory_guard_remove(mapping)
        unsafe munmap(mapping, mappingSize)
    }

    /// The device was reset with nothing in flight: no notes count any more, for the driver begins its rings anew.
    func finish() {
        for index in 0..<queues {
            unsafe clinux_store16_release(base + index * Self.stride(queueSize) + InflightQueue.versionOffset, 0)
        }
    }

    /// The part of one queue, if the region has one for a ring of this size.
    func queue(_ index: Int, size: Int, isPacked: Bool) -> InflightQueue? {
        guard index < queues, size <= queueSize else { return nil }
        let part = unsafe base + index * Self.stride(queueSize)
        return unsafe InflightQueue(part, size: size, isPacked: isPacked, region: self)
    }
}

/// A chain that was in flight when the last back-end ended.
struct InflightChain {
    /// Index of the first descriptor (split), or number of the first entry (packed).
    let head: UInt16
    let counter: UInt64
    /// Copies of its descriptors (packed), as 64-bit halves.
    var descriptors: [(UInt64, UInt64)] = []
}

/// Where the next used element goes; a split ring has no wrap counter.
struct UsedPosition: Equatable {
    var index: UInt16
    var wrap: Bool
}

/// One queue's part of the region.
@safe
final class InflightQueue {
    /// Where the fields lie. The header's first three are common to both formats.
    // swift-format-ignore
    private enum Field {
        static let version = 8, count = 10
        static let splitLastBatchHead = 12, splitUsedIndex = 14, splitEntries = 16, splitEntrySize = 16
        /// `used` is used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter and two bytes of padding.
        static let freeHead = 12, oldFreeHead = 14, used = 16
        static let packedEntries = 32, packedEntrySize = 32
        /// Of an entry; `next` is at another place in each format.
        static let inflight = 0, splitNext = 6, counter = 8
        static let next = 2, last = 4, number = 6, identifier = 16, flags = 18, length = 20, address = 24
    }

    fileprivate static let versionOffset = Field.version

    private let part: UnsafeMutableRawPointer
    private let size: Int
    private let isPacked: Bool
    /// Keeps the mapping.
    private let region: InflightRegion
    private var counter: UInt64 = 0
    // What the packed format needs to know of itself: the region's own links are never followed.
    private var freeHead: UInt16 = 0
    private var links: [UInt16] = []
    private var lasts: [UInt16] = []
    private var lastUsed = UsedPosition(index: 0, wrap: true)

    fileprivate init(_ part: UnsafeMutableRawPointer, size: Int, isPacked: Bool, region: InflightRegion) {
        unsafe self.part = part
        self.size = size
        self.isPacked = isPacked
        self.region = region
        if isPacked {
            links = (0..<size).map { UInt16($0 + 1 == size ? 0 : $0 + 1) }
            lasts = Array(repeating: 0, count: size)
        }
    }

    /// Whether a back-end ended without stopping this queue: its notes count.
    var isResumed: Bool { unsafe clinux_load16_relaxed(part + Field.version) == 1 }

    /// The same, and there are any.
    var hasNotes: Bool {
        isResumed && (0..<size).contains { unsafe clinux_load8_relaxed(entry($0) + Field.inflight) != 0 }
    }

    private func load(_ offset: Int) -> UInt16 { unsafe clinux_load16_relaxed(part + offset) }
    private func store(_ offset: Int, _ value: UInt16) { unsafe clinux_store16_release(part + offset, value) }

    private func entry(_ index: Int) -> UnsafeMutableRawPointer {
        precondition(index >= 0 && index < size)
        return unsafe isPacked
            ? part + Field.packedEntries + Field.packedEntrySize * index
            : part + Field.splitEntries + Field.splitEntrySize * index
    }

    private func setInflight(_ index: Int, _ value: UInt8) {
        unsafe clinux_store8_release(entry(index) + Field.inflight, value)
    }

    /// Begins with nothing in flight.
    func begin(_ used: UsedPosition) {
        for index in 0..<size { setInflight(index, 0) }
        if isPacked {
            for index in 0..<size { unsafe clinux_store16_relaxed(entry(index) + Field.next, links[index]) }
            store(Field.freeHead, 0)
            store(Field.oldFreeHead, 0)
            storeUsed(used, old: used)
            lastUsed = used
        } else {
            store(Field.splitLastBatchHead, 0)
            store(Field.splitUsedIndex, used.index)
        }
        store(Field.count, UInt16(size))
        store(Field.version, 1)
    }

    /// The queue stopped with nothing in flight: the next start is a new one.
    func finish() { store(Field.version, 0) }

    /// Where the used position is and was, in one store: an end between two would leave an index without its wrap
    /// counter.
    private func storeUsed(_ new: UsedPosition, old: UsedPosition) {
        let indices = UInt64(new.index) | UInt64(old.index) << 16
        let wraps: UInt64 = (new.wrap ? 1 << 32 : 0) | (old.wrap ? 1 << 40 : 0)
        unsafe clinux_store64_release(part + Field.used, indices | wraps)
    }

    private func loadUsed() -> (new: UsedPosition, old: UsedPosition) {
        let word = unsafe clinux_load64_relaxed(part + Field.used)
        return (
            UsedPosition(index: UInt16(truncatingIfNeeded: word), wrap: word >> 32 & 0xff != 0),
            UsedPosition(index: UInt16(truncatingIfNeeded: word >> 16), wrap: word >> 40 & 0xff != 0)
        )
    }

    private func storeCounter(_ index: Int) {
        unsafe clinux_store64_relaxed(entry(index) + Field.counter, counter)
        counter &+= 1
    }

    // MARK: Split

    /// A chain was taken from the available ring.
    func take(_ head: UInt16) {
        storeCounter(Int(head))
        setInflight(Int(head), 1)
    }

    /// It was put back.
    func putBack(_ head: UInt16) { setInflight(Int(head), 0) }

    /// A chain is about to be used: before the used index moves.
    func willUse(_ head: UInt16) {
        unsafe clinux_store16_relaxed(entry(Int(head)) + Field.splitNext, load(Field.splitLastBatchHead))
        store(Field.splitLastBatchHead, head)
    }

    /// It was used: behind the used index.
    func didUse(_ head: UInt16, usedIndex: UInt16) {
        setInflight(Int(head), 0)
        store(Field.splitUsedIndex, usedIndex)
    }

    /// What was in flight, in the order in which it was taken; what had been used already is taken out.
    func recoverSplit(usedIndex: UInt16) -> [InflightChain] {
        var rest = Int(usedIndex &- load(Field.splitUsedIndex))
        var head = load(Field.splitLastBatchHead)
        if rest <= size {
            while rest > 0, head < size {
                setInflight(Int(head), 0)
                head = unsafe clinux_load16_relaxed(entry(Int(head)) + Field.splitNext)
                rest -= 1
            }
        }
        store(Field.splitUsedIndex, usedIndex)
        return inFlightEntries()
    }

    private func inFlightEntries() -> [InflightChain] {
        let entries = (0..<size).filter { unsafe clinux_load8_relaxed(entry($0) + Field.inflight) != 0 }
        let chains = entries.map {
            unsafe InflightChain(head: UInt16($0), counter: clinux_load64_relaxed(entry($0) + Field.counter))
        }
        counter = (chains.map(\.counter).max() ?? 0) &+ 1
        return chains.sorted { $0.counter < $1.counter }
    }

    // MARK: Packed

    /// A chain was taken: its descriptors are kept, for the ring's are overwritten by used ones.
    ///
    /// - Returns: Its first entry.
    func take(descriptors: UnsafePointer<UInt64>, count: Int) -> UInt16 {
        let head = freeHead
        // An entry whose number is 0 was begun only.
        unsafe clinux_store16_release(entry(Int(head)) + Field.number, 0)
        storeCounter(Int(head))
        setInflight(Int(head), 1)
        var (current, last) = (head, head)
        for number in 0..<count {
            let place = unsafe entry(Int(current))
            let rest = unsafe descriptors[2 * number + 1]
            unsafe clinux_store64_relaxed(place + Field.address, descriptors[2 * number])
            unsafe clinux_store32_relaxed(place + Field.length, UInt32(truncatingIfNeeded: rest))
            unsafe clinux_store16_relaxed(place + Field.identifier, UInt16(truncatingIfNeeded: rest >> 32))
            unsafe clinux_store16_relaxed(place + Field.flags, UInt16(truncatingIfNeeded: rest >> 48))
            last = current
            current = links[Int(current)]
        }
        unsafe clinux_store16_relaxed(entry(Int(head)) + Field.last, last)
        unsafe clinux_store16_release(entry(Int(head)) + Field.number, UInt16(count))
        lasts[Int(head)] = last
        freeHead = current
        store(Field.freeHead, freeHead)
        store(Field.oldFreeHead, freeHead)
        return head
    }

    private func free(_ head: UInt16) {
        let last = lasts[Int(head)]
        links[Int(last)] = freeHead
        unsafe clinux_store16_relaxed(entry(Int(last)) + Field.next, freeHead)
        freeHead = head
        store(Field.freeHead, freeHead)
    }

    /// It was put back.
    func putBack(entry head: UInt16) {
        free(head)
        setInflight(Int(head), 0)
        store(Field.oldFreeHead, freeHead)
    }

    /// A chain is about to be used: before its flags in the ring change.
    func willUse(entry head: UInt16, _ next: UsedPosition) {
        free(head)
        storeUsed(next, old: lastUsed)
        lastUsed = next
    }

    /// It was used.
    func didUse(entry head: UInt16) {
        setInflight(Int(head), 0)
        store(Field.oldFreeHead, freeHead)
        storeUsed(lastUsed, old: lastUsed)
    }

    /// What was in flight, and where the used position was. `flagsAt` reads a descriptor's flags from the ring: they
    /// tell whether the last use was completed.
    ///
    /// - Returns: `nil` if the notes contradict each other.
    func recoverPacked(flagsAt: (Int) -> UInt16) -> (chains: [InflightChain], used: UsedPosition)? {
        let (new, old) = loadUsed()
        guard old.index < size, new.index < size else { return nil }
        // An update was begun. It counts if the descriptor at the old position was used, which the driver cannot take
        // back: it may have made it available anew, and that leaves the used flag as it was.
        let isCommitted = old != new && (flagsAt(Int(old.index)) & Self.usedFlag != 0) == old.wrap
        clearFree(isCommitted: isCommitted)
        guard let chains = readChains() else { return nil }
        rebuild(chains)
        lastUsed = isCommitted ? new : old
        storeUsed(lastUsed, old: lastUsed)
        return (chains, lastUsed)
    }

    private static let usedFlag: UInt16 = 1 << UInt16(VRING_PACKED_DESC_F_USED)

    /// Entries that are free are not in flight: one that was begun or ended half is among them.
    private func clearFree(isCommitted: Bool) {
        let head = Int(load(isCommitted ? Field.freeHead : Field.oldFreeHead))
        guard head < size else { return }
        let taken = (0..<size).reduce(0) { sum, index in
            guard unsafe clinux_load8_relaxed(entry(index) + Field.inflight) != 0 else { return sum }
            return unsafe sum + Int(clinux_load16_relaxed(entry(index) + Field.number))
        }
        // Behind the last free entry its link stands for nothing.
        var rest = size - taken
        if isCommitted, unsafe clinux_load8_relaxed(entry(head) + Field.inflight) != 0 {
            rest += unsafe Int(clinux_load16_relaxed(entry(head) + Field.number))
        }
        var current = head
        while rest > 0, current < size {
            setInflight(current, 0)
            current = unsafe Int(clinux_load16_relaxed(entry(current) + Field.next))
            rest -= 1
        }
    }

    private func readChains() -> [InflightChain]? {
        var taken = Array(repeating: false, count: size)
        var chains = inFlightEntries()
        for index in chains.indices {
            var current = Int(chains[index].head)
            let count = unsafe Int(clinux_load16_relaxed(entry(current) + Field.number))
            guard count > 0, count <= size else { return nil }
            for _ in 0..<count {
                guard current < size, !taken[current] else { return nil }
                taken[current] = true
                let place = unsafe entry(current)
                let rest =
                    unsafe UInt64(clinux_load32_relaxed(place + Field.length))
                    | UInt64(clinux_load16_relaxed(place + Field.identifier)) << 32
                    | UInt64(clinux_load16_relaxed(place + Field.flags)) << 48
                unsafe chains[index].descriptors.append((clinux_load64_relaxed(place + Field.address), rest))
                lasts[Int(chains[index].head)] = UInt16(current)
                links[current] = unsafe clinux_load16_relaxed(place + Field.next)
                current = Int(links[current])
            }
        }
        return chains
    }

    /// Makes the list of free entries anew, of all that are not in flight.
    private func rebuild(_ chains: [InflightChain]) {
        var taken = Array(repeating: false, count: size)
        for chain in chains {
            var current = Int(chain.head)
            for number in chain.descriptors.indices {
                taken[current] = true
                if number + 1 < chain.descriptors.count { current = Int(links[current]) }
            }
        }
        let free = (0..<size).filter { !taken[$0] }
        for (index, next) in zip(free, free.dropFirst() + free.prefix(1)) {
            links[index] = UInt16(next)
            unsafe clinux_store16_relaxed(entry(index) + Field.next, UInt16(next))
        }
        freeHead = UInt16(free.first ?? 0)
        store(Field.freeHead, freeHead)
        store(Field.oldFreeHead, freeHead)
    }
}
