// Virtqueue: one virtqueue, split or packed (virtio 1.2 clauses 2.7 and 2.8): descriptor chains in, used elements out,
// notifications both ways.
//
// Owns: the ring's positions, and slots with the host addresses of the chains that were taken. Called by:
// VirtioSCSIDevice. Must not know: SCSI, what the chains hold. What is peculiar to the packed format is in
// VirtqueuePacked.
//
// Everything in the rings may change while it is read. Each field is loaded once; an index is checked before it is
// used; a walk is bounded by the size of the table that it is in.

import CIOVector
import CLinux
import Glibc

/// Why a virtqueue is broken: the driver did what virtio forbids. It is not served again before it is set up anew.
enum VirtqueueFault: String, Error {
    case availableIndex = "the available index is further ahead than the queue is long"
    case headIndex = "a descriptor index outside of the table"
    case headInFlight = "a descriptor chain made available again before it was used"
    case nextIndex = "a next field outside of the table"
    case loop = "a descriptor chain that is a loop, or longer than the queue"
    case address = "a descriptor that leads outside of the guest's memory"
    case order = "a device-readable descriptor behind a device-writable one"
    case indirect = "an indirect table that is nested, empty, of wrong length, or not negotiated"
    case segments = "a descriptor chain in too many pieces"
    case header = "a chain too short for its request or response"
    case areas = "its areas do not lie in the memory that was shared"
    case position = "a position outside of the ring"
    case inflight = "notes of what is in flight that contradict each other"
}

/// A descriptor chain as host addresses. Lives in the queue from `pop` to `pushUsed`.
@safe
struct VirtqueueSlot {
    /// The queue, unretained: the session keeps it while requests are in flight.
    let queue: Unmanaged<Virtqueue>
    /// The slot's own number, from 0.
    let number: UInt16
    /// What the driver calls the chain: the index of its first descriptor, which is the slot's number (split), or its
    /// buffer ID (packed).
    var identifier: UInt16
    /// Descriptors of the ring that the chain takes; packed only.
    var descriptorCount: UInt16 = 1
    /// Its first entry in the inflight region; packed only.
    var inflightEntry: UInt16 = 0
    /// With IN_ORDER: it has ended, and waits for those before it.
    var isUsed = false
    var usedLength: UInt32 = 0
    var inFlight = false
    /// The memory that the pieces lie in, unretained: its count of references keeps it.
    var memory: Unmanaged<GuestMemory>?
    var readable: UnsafeMutablePointer<iovec>
    var readableCount = 0
    var readableLength: UInt64 = 0
    var writable: UnsafeMutablePointer<iovec>
    var writableCount = 0
    var writableLength: UInt64 = 0
}

@safe
final class Virtqueue {
    /// What `pop` found.
    @safe
    enum Popped {
        case nothing
        case chain(UnsafeMutablePointer<VirtqueueSlot>)
        case broken(VirtqueueFault)
    }

    /// Descriptors of the ring: a power of two (split), any number (packed).
    let size: Int
    let isPacked: Bool
    private(set) var memory: GuestMemory
    private(set) var hotMemory: Unmanaged<GuestMemory>
    let eventIndex: Bool
    let indirect: Bool
    /// Chains are used in the order in which they were made available.
    private let isInOrder: Bool
    /// The descriptor table, the available ring, the used ring; of a packed ring its descriptors, the driver's and the
    /// device's event suppression.
    private(set) var descriptors: UnsafeMutableRawPointer
    private(set) var available: UnsafeMutableRawPointer
    private(set) var used: UnsafeMutableRawPointer
    private let slots: UnsafeMutablePointer<VirtqueueSlot>
    private let segments: UnsafeMutablePointer<iovec>
    private let segmentsPerSlot: Int

    /// The next available element to look at: free-running (split), a position in the ring (packed).
    var lastAvailable: UInt16
    /// Where the next used element goes, likewise.
    var usedIndex: UInt16
    private var signalled: UInt16
    // Packed only.
    var availableWrap = true
    var usedWrap = true
    /// Descriptors that were used since the driver was last told.
    var usedSinceSignal = 0
    /// Slots that have no chain, as a stack.
    let freeSlots: UnsafeMutablePointer<UInt16>
    var freeSlotCount = 0
    var descriptorsInFlight = 0
    /// Copies of the descriptors of the chain that is being taken, for the inflight region.
    let scratch: UnsafeMutablePointer<UInt64>
    /// With IN_ORDER: the slots in the order in which they were taken.
    private let order: UnsafeMutablePointer<UInt16>
    private var orderFirst = 0
    private var orderCount = 0

    /// Where to note what is in flight.
    let inflight: InflightQueue?
    /// What was in flight when the last back-end ended, the first to be taken last.
    private(set) var recovered: [InflightChain] = []
    /// Where to note writes to the used ring, at which guest address.
    private var usedLog: (log: DirtyLog, address: UInt64)?
    private(set) var isLogged = false

    var notificationsWanted = true
    /// Chains popped and not used yet.
    private(set) var inFlight = 0
    /// The device's side of this queue, unretained: it owns the ring.
    var owner: Unmanaged<DeviceQueue>?
    /// Set when the front-end is gone: what is in flight ends without a word to the guest.
    private(set) var isDetached = false
    /// Set when the ring stops and need not be drained: what is given back by `suspend` stays noted as in flight.
    private(set) var isSuspending = false
    /// Whether one of them is set: not every end goes to the guest.
    private(set) var isQuiet = false
    private var hasSuspended = false

    /// Bytes of the three areas (virtio 1.2, tables in 2.7 and 2.8).
    static func areas(size: Int, isPacked: Bool) -> (descriptors: UInt64, available: UInt64, used: UInt64) {
        isPacked ? (UInt64(16 * size), 4, 4) : (UInt64(16 * size), UInt64(6 + 2 * size), UInt64(6 + 8 * size))
    }

    /// Where the three areas lie.
    @safe
    struct Areas {
        let descriptors: UnsafeMutableRawPointer
        let available: UnsafeMutableRawPointer
        let used: UnsafeMutableRawPointer
    }

    /// A queue that goes on at `base` (as SET_VRING_BASE has it; `nil`: at the beginning), or where a back-end that
    /// ended has left its notes.
    init(
        size: Int, memory: GuestMemory, areas: Areas, base: UInt32?, features: UInt64, inflight: InflightQueue? = nil
    ) throws(VirtqueueFault) {
        self.size = size
        self.memory = memory
        self.inflight = inflight
        unsafe hotMemory = Unmanaged.passUnretained(memory)
        isPacked = features & VirtioFeature.ringPacked != 0
        eventIndex = features & VirtioFeature.eventIndex != 0
        indirect = features & VirtioFeature.indirectDescriptors != 0
        isInOrder = features & VirtioFeature.inOrder != 0
        unsafe descriptors = areas.descriptors
        unsafe available = areas.available
        unsafe used = areas.used
        (lastAvailable, usedIndex, signalled) = (0, 0, 0)
        // A chain as long as the ring; a piece more where a descriptor spans regions, and one for splitting the
        // response.
        segmentsPerSlot = size + 16
        unsafe segments = .allocate(capacity: size * segmentsPerSlot)
        unsafe slots = .allocate(capacity: size)
        unsafe freeSlots = .allocate(capacity: size)
        unsafe order = .allocate(capacity: size)
        unsafe scratch = .allocate(capacity: 2 * size)
        let reference = unsafe Unmanaged.passUnretained(self)
        for number in 0..<size {
            let memory = unsafe segments + number * segmentsPerSlot
            unsafe (slots + number).initialize(
                to: VirtqueueSlot(
                    queue: reference, number: UInt16(number), identifier: UInt16(number), readable: memory,
                    writable: memory))
            unsafe freeSlots[size - 1 - number] = UInt16(number)
        }
        freeSlotCount = size
        if isPacked { try beginPacked(base: base ?? Self.packedBeginning) } else { beginSplit(base: base ?? 0) }
    }

    deinit {
        precondition(inFlight == 0, "a virtqueue went away with requests in flight")
        unsafe slots.deallocate()
        unsafe segments.deallocate()
        unsafe freeSlots.deallocate()
        unsafe order.deallocate()
        unsafe scratch.deallocate()
    }

    private func beginSplit(base: UInt32) {
        lastAvailable = UInt16(truncatingIfNeeded: base)
        // What the driver has been told so far stands in the ring: after a restart of the back-end, too.
        usedIndex = unsafe clinux_load16_relaxed(used + 2)
        signalled = usedIndex
        guard let inflight else { return }
        if inflight.isResumed {
            setRecovered(inflight.recoverSplit(usedIndex: usedIndex))
            // All that was taken was used, or is noted; the front-end's own view may be older.
            lastAvailable = usedIndex &+ UInt16(recovered.count)
        } else {
            inflight.begin(UsedPosition(index: usedIndex, wrap: false))
        }
    }

    /// What `popRecovered` will give.
    func setRecovered(_ chains: [InflightChain]) { recovered = chains.reversed() }

    var hasRecovered: Bool { !recovered.isEmpty }

    /// What GET_VRING_BASE reports.
    var base: UInt32 {
        guard isPacked else { return UInt32(lastAvailable) }
        return UInt32(lastAvailable) | (availableWrap ? 1 << 15 : 0) | UInt32(usedIndex) << 16
            | (usedWrap ? 1 << 31 : 0)
    }

    /// Goes on in other memory: the front-end has changed its memory map, or where the ring lies, while requests are in
    /// flight. The positions stay, and requests in flight keep the memory that they lead into.
    func move(to memory: GuestMemory, areas: Areas) {
        self.memory = memory
        unsafe hotMemory = Unmanaged.passUnretained(memory)
        unsafe descriptors = areas.descriptors
        unsafe available = areas.available
        unsafe used = areas.used
    }

    /// Ends what is in flight without a word to the guest; the queue must be detached.
    func abandon() {
        precondition(isDetached)
        for number in 0..<size {
            let slot = unsafe slots + number
            if unsafe slot.pointee.inFlight { unsafe release(slot) }
        }
    }

    /// The slot of a number.
    func slot(_ number: Int) -> UnsafeMutablePointer<VirtqueueSlot> {
        precondition(number >= 0 && number < size)
        return unsafe slots + number
    }

    // MARK: Available ring

    /// Whether the driver has made something available.
    @inline(__always)
    var hasAvailable: Bool {
        isPacked ? hasAvailablePacked : unsafe clinux_load16_acquire(available + 2) != lastAvailable
    }

    /// Takes the next chain.
    @inline(__always)
    func pop() -> Popped {
        if isPacked { return popPacked() }
        let index = unsafe clinux_load16_acquire(available + 2)
        if index == lastAvailable { return .nothing }
        guard Int(index &- lastAvailable) <= size else { return .broken(.availableIndex) }
        let entry = Int(lastAvailable) & (size - 1)
        let head = unsafe Int(clinux_load16_relaxed(available + 4 + 2 * entry))
        guard head < size else { return .broken(.headIndex) }
        let slot = unsafe slots + head
        guard unsafe !slot.pointee.inFlight else { return .broken(.headInFlight) }
        if let fault = unsafe walk(slot, head) { return .broken(fault) }
        lastAvailable &+= 1
        if let inflight { inflight.take(UInt16(head)) }
        unsafe take(slot)
        return unsafe .chain(slot)
    }

    /// Takes the next chain that was in flight when the last back-end ended, in the order of then.
    func popRecovered() -> Popped {
        guard let chain = recovered.popLast() else { return .nothing }
        if isPacked { return popRecoveredPacked(chain) }
        let slot = unsafe slots + Int(chain.head)
        guard unsafe !slot.pointee.inFlight else { return .broken(.headInFlight) }
        if let fault = unsafe walk(slot, Int(chain.head)) { return .broken(fault) }
        unsafe take(slot)
        return unsafe .chain(slot)
    }

    @inline(__always)
    func take(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        inFlight += 1
        unsafe slot.pointee.inFlight = true
        unsafe slot.pointee.memory = hotMemory
        memory.references += 1
        if isInOrder {
            unsafe order[(orderFirst + orderCount) % size] = slot.pointee.number
            orderCount += 1
        }
    }

    /// Puts the chain that was popped last back; only before anything of it was used.
    func unpop(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        if isPacked { unsafe unpopPacked(slot) } else { lastAvailable &-= 1 }
        if !isPacked, let inflight { unsafe inflight.putBack(slot.pointee.number) }
        if isInOrder { orderCount -= 1 }
        unsafe release(slot)
    }

    /// Begins the walk of a chain whose pieces go to a slot.
    @inline(__always)
    func chainWalk(_ slot: UnsafeMutablePointer<VirtqueueSlot>) -> ChainWalk {
        unsafe ChainWalk(
            segments: segments + Int(slot.pointee.number) * segmentsPerSlot, capacity: segmentsPerSlot,
            memory: hotMemory)
    }

    private func walk(_ slot: UnsafeMutablePointer<VirtqueueSlot>, _ head: Int) -> VirtqueueFault? {
        var walk = unsafe chainWalk(slot)
        var table = unsafe UnsafeRawPointer(descriptors)
        var limit = size
        var next = head
        var steps = 0
        var isIndirect = false
        while true {
            // A chain is no longer than the queue (2.7.5.3.1), also in an indirect table; this ends a loop, too.
            steps += 1
            guard steps <= size + 1 else { return .loop }
            let address = unsafe clinux_load64_relaxed(table + 16 * next)
            let rest = unsafe clinux_load64_relaxed(table + 16 * next + 8)
            let length = UInt64(UInt32(truncatingIfNeeded: rest))
            let flags = Int32(truncatingIfNeeded: rest >> 32 & 0xffff)
            if flags & VRING_DESC_F_INDIRECT != 0 {
                guard !isIndirect, flags & VRING_DESC_F_NEXT == 0,
                    let piece = unsafe indirectTable(address, length)
                else { return .indirect }
                unsafe table = piece
                limit = Int(length / 16)
                (next, isIndirect) = (0, true)
                continue
            }
            if let fault = walk.append(address, length, writable: flags & VRING_DESC_F_WRITE != 0) { return fault }
            if flags & VRING_DESC_F_NEXT == 0 { break }
            next = Int(truncatingIfNeeded: rest >> 48)
            guard next < limit else { return .nextIndex }
        }
        unsafe walk.store(slot)
        return nil
    }

    /// An indirect table, in one piece.
    @inline(__always)
    func indirectTable(_ address: UInt64, _ length: UInt64) -> UnsafeRawPointer? {
        guard indirect, length > 0, length % 16 == 0, length / 16 <= UInt64(UInt16.max) + 1,
            let piece = unsafe memory.piece(address, length), UInt64(piece.count) == length
        else { return nil }
        return unsafe UnsafeRawPointer(piece.baseAddress!)
    }

    // MARK: Used ring

    /// Gives a chain back.
    ///
    /// - Parameter length: How many bytes the device wrote into it.
    @inline(__always)
    func pushUsed(_ slot: UnsafeMutablePointer<VirtqueueSlot>, length: UInt32) {
        if isInOrder { return unsafe pushInOrder(slot, length) }
        if !isDetached { unsafe writeUsed(slot, length) }
        unsafe release(slot)
    }

    @inline(__always)
    private func writeUsed(_ slot: UnsafeMutablePointer<VirtqueueSlot>, _ length: UInt32) {
        if isPacked { return unsafe writeUsedPacked(slot, length) }
        let offset = 4 + 8 * (Int(usedIndex) & (size - 1))
        let element = unsafe used + offset
        unsafe clinux_store32_relaxed(element, UInt32(slot.pointee.identifier))
        unsafe clinux_store32_relaxed(element + 4, length)
        if isLogged { logUsed(offset, 8) }
        usedIndex &+= 1
        if let inflight {
            unsafe inflight.willUse(slot.pointee.number)
            unsafe clinux_store16_release(used + 2, usedIndex)
            unsafe inflight.didUse(slot.pointee.number, usedIndex: usedIndex)
        } else {
            unsafe clinux_store16_release(used + 2, usedIndex)
        }
        if isLogged { logUsed(2, 2) }
    }

    /// Gives back what has ended, as far as nothing before it is in flight.
    private func pushInOrder(_ slot: UnsafeMutablePointer<VirtqueueSlot>, _ length: UInt32) {
        guard !isDetached else { return unsafe release(slot) }
        unsafe slot.pointee.isUsed = true
        unsafe slot.pointee.usedLength = length
        while orderCount > 0 {
            let first = unsafe slots + Int(order[orderFirst])
            guard unsafe first.pointee.isUsed else { return }
            orderFirst = (orderFirst + 1) % size
            orderCount -= 1
            unsafe writeUsed(first, first.pointee.usedLength)
            unsafe release(first)
        }
    }

    /// The front-end is gone: what is in flight ends without a word, what waits for its turn has ended.
    func detach() {
        (isDetached, isQuiet) = (true, true)
        for number in 0..<size {
            let slot = unsafe slots + number
            if unsafe slot.pointee.inFlight, unsafe slot.pointee.isUsed { unsafe release(slot) }
        }
    }

    @inline(__always)
    private func release(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        unsafe slot.pointee.inFlight = false
        unsafe slot.pointee.isUsed = false
        unsafe slot.pointee.memory?._withUnsafeGuaranteedRef { $0.references -= 1 }
        unsafe slot.pointee.memory = nil
        inFlight -= 1
        if isPacked { unsafe releasePacked(slot) }
    }

    /// Begins to stop without being drained, if the ring can: what is in flight is noted, and nothing that has ended
    /// waits for what has not (IN_ORDER), because it would be carried out again.
    ///
    /// - Returns: Whether it can.
    func beginSuspension() -> Bool {
        guard inflight != nil, !isInOrder else { return false }
        (isSuspending, isQuiet) = (true, true)
        return true
    }

    /// Lets go of a chain that was not carried out. Whoever serves the ring next finds it in the notes.
    func suspend(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        precondition(isSuspending)
        hasSuspended = true
        unsafe release(slot)
    }

    /// Whether the notes of what is in flight are for whoever serves the ring next.
    var leavesNotes: Bool { hasSuspended || hasRecovered }

    /// The queue has stopped with nothing in flight.
    func finish() { inflight?.finish() }

    // MARK: Dirty logging

    /// Notes writes to the used ring from now on, or no longer.
    func log(to log: DirtyLog?, usedAddress: UInt64) {
        usedLog = log.map { ($0, usedAddress) }
        isLogged = log != nil
    }

    /// Notes a write to the used area.
    func logUsed(_ offset: Int, _ length: UInt64) {
        guard let usedLog else { return }
        usedLog.log.mark(usedLog.address &+ UInt64(offset), length)
    }

    /// Notes a write to a packed ring's descriptor.
    func logDescriptor(_ index: Int) {
        unsafe usedLog?.log.mark(descriptors + 16 * index, 16, in: memory)
    }

    // MARK: Notifications

    /// Whether the driver wants to be told of what was used since the last time this was asked (2.7.7, 2.7.10).
    @inline(__always)
    func takeNotification() -> Bool {
        if isPacked { return takeNotificationPacked() }
        guard usedIndex != signalled, !isDetached else { return false }
        clinux_fence()
        let old = signalled
        signalled = usedIndex
        if eventIndex {
            let event = unsafe clinux_load16_relaxed(available + 4 + 2 * size)
            return usedIndex &- event &- 1 < usedIndex &- old
        }
        return unsafe Int32(clinux_load16_relaxed(available)) & VRING_AVAIL_F_NO_INTERRUPT == 0
    }

    /// Tells the driver not to notify, because the queue is being polled.
    @inline(__always)
    func stopNotifications() {
        guard notificationsWanted else { return }
        notificationsWanted = false
        // With the event index, not moving the index on is enough.
        if isPacked {
            stopNotificationsPacked()
        } else if !eventIndex {
            unsafe clinux_store16_relaxed(used, UInt16(VRING_USED_F_NO_NOTIFY))
            if isLogged { logUsed(0, 2) }
        }
    }

    /// Asks the driver to notify, and looks again.
    ///
    /// - Returns: Whether something became available meanwhile.
    func wantNotifications() -> Bool {
        notificationsWanted = true
        if isPacked {
            wantNotificationsPacked()
        } else if eventIndex {
            unsafe clinux_store16_relaxed(used + 4 + 8 * size, lastAvailable)
            if isLogged { logUsed(4 + 8 * size, 2) }
        } else {
            unsafe clinux_store16_relaxed(used, 0)
            if isLogged { logUsed(0, 2) }
        }
        clinux_fence()
        return hasAvailable
    }
}

/// The pieces of the chain that is being walked.
@safe
struct ChainWalk {
    private let segments: UnsafeMutablePointer<iovec>
    private let capacity: Int
    private let memory: Unmanaged<GuestMemory>
    private var count = 0
    private var readableCount = -1
    private var lengths: (readable: UInt64, writable: UInt64) = (0, 0)

    init(segments: UnsafeMutablePointer<iovec>, capacity: Int, memory: Unmanaged<GuestMemory>) {
        unsafe self.segments = segments
        self.capacity = capacity
        unsafe self.memory = memory
    }

    @inline(__always)
    mutating func append(_ address: UInt64, _ length: UInt64, writable: Bool) -> VirtqueueFault? {
        if writable {
            if readableCount < 0 {
                // One element stays free in front of the writable ones: for the response, when it ends in the middle
                // of one.
                readableCount = count
                count += 1
            }
            lengths.writable += length
        } else {
            guard readableCount < 0 else { return .order }
            lengths.readable += length
        }
        var address = address
        var left = length
        while left > 0 {
            guard count < capacity else { return .segments }
            guard let piece = unsafe memory._withUnsafeGuaranteedRef({ unsafe $0.piece(address, left) }) else {
                return .address
            }
            let size = UInt64(piece.count)
            unsafe segments[count] = unsafe iovec(iov_base: piece.baseAddress!, iov_len: piece.count)
            count += 1
            left -= size
            let end = address.addingReportingOverflow(size)
            guard !end.overflow || left == 0 else { return .address }
            address = end.partialValue
        }
        return nil
    }

    @inline(__always)
    func store(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        let readers = readableCount < 0 ? count : readableCount
        unsafe slot.pointee.readable = segments
        unsafe slot.pointee.readableCount = readers
        unsafe slot.pointee.readableLength = lengths.readable
        unsafe slot.pointee.writable = segments + readers + 1
        unsafe slot.pointee.writableCount = readableCount < 0 ? 0 : count - readers - 1
        unsafe slot.pointee.writableLength = lengths.writable
    }
}

// MARK: Headers in any descriptor layout

extension VirtqueueSlot {
    /// Copies the first bytes of the readable part, once, and takes them away from it.
    ///
    /// - Returns: Whether there were as many.
    @inline(__always)
    mutating func takeHeader(_ buffer: UnsafeMutableRawBufferPointer) -> Bool {
        guard readableLength >= UInt64(buffer.count) else { return false }
        var done = 0
        while done < buffer.count {
            let size = unsafe min(readable.pointee.iov_len, buffer.count - done)
            unsafe (buffer.baseAddress! + done).copyMemory(from: readable.pointee.iov_base, byteCount: size)
            done += size
            unsafe readable.pointee.iov_base += size
            unsafe readable.pointee.iov_len -= size
            if unsafe readable.pointee.iov_len == 0 {
                unsafe readable += 1
                readableCount -= 1
            }
        }
        readableLength -= UInt64(buffer.count)
        return true
    }

    /// Splits the writable part into a response of `length` bytes and the rest, which stays in `writable`.
    ///
    /// - Returns: The response's pieces, or `nil` if there are not as many bytes.
    @inline(__always)
    mutating func takeResponse(_ length: Int) -> ResponsePieces? {
        guard writableLength >= UInt64(length) else { return nil }
        let first = unsafe writable - 1  // the element that ChainWalk left free
        var left = length
        var count = 0
        while left > 0 {
            let size = unsafe min(writable.pointee.iov_len, left)
            unsafe first[count] = unsafe iovec(iov_base: writable.pointee.iov_base, iov_len: size)
            count += 1
            left -= size
            unsafe writable.pointee.iov_base += size
            unsafe writable.pointee.iov_len -= size
            if unsafe writable.pointee.iov_len == 0 {
                unsafe writable += 1
                writableCount -= 1
            }
        }
        writableLength -= UInt64(length)
        return unsafe ResponsePieces(first: first, count: count)
    }
}

/// Where a response goes.
@safe
struct ResponsePieces {
    let first: UnsafeMutablePointer<iovec>
    let count: Int

    /// Copies the response there. It is not longer than the pieces.
    @inline(__always)
    func write(_ bytes: UnsafeRawBufferPointer) {
        var done = 0
        var piece = unsafe first
        while done < bytes.count {
            let size = unsafe min(piece.pointee.iov_len, bytes.count - done)
            unsafe piece.pointee.iov_base.copyMemory(from: bytes.baseAddress! + done, byteCount: size)
            done += size
            unsafe piece += 1
        }
    }
}
