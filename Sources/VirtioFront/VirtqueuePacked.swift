// VirtqueuePacked: what is peculiar to packed virtqueues (virtio 1.2 clause 2.8): one ring of descriptors that both
// sides write, wrap counters, event suppression.
//
// Owns: nothing but Virtqueue's fields for it. Called by: Virtqueue. Must not know: SCSI, what the chains hold.

import CIOVector
import CLinux
import Glibc

extension Virtqueue {
    /// Both positions 0, both wrap counters 1.
    static let packedBeginning: UInt32 = 1 << 15 | 1 << 31

    private static let availableFlag: UInt16 = 1 << UInt16(VRING_PACKED_DESC_F_AVAIL)
    private static let usedFlag: UInt16 = 1 << UInt16(VRING_PACKED_DESC_F_USED)
    private static let writeFlag = UInt16(VRING_DESC_F_WRITE)

    func beginPacked(base: UInt32) throws(VirtqueueFault) {
        lastAvailable = UInt16(base & 0x7fff)
        availableWrap = base & 1 << 15 != 0
        usedIndex = UInt16(base >> 16 & 0x7fff)
        usedWrap = base & 1 << 31 != 0
        guard Int(lastAvailable) < size, Int(usedIndex) < size else { throw .position }
        guard let inflight else { return }
        guard inflight.isResumed else { return inflight.begin(UsedPosition(index: usedIndex, wrap: usedWrap)) }
        guard
            let (chains, position) = inflight.recoverPacked(flagsAt: {
                unsafe clinux_load16_relaxed(descriptors + 16 * $0 + 14)
            })
        else { throw .inflight }
        setRecovered(chains)
        (usedIndex, usedWrap) = (position.index, position.wrap)
        // All that was taken was used, or is noted.
        let taken = chains.reduce(0) { $0 + $1.descriptors.count }
        (lastAvailable, availableWrap) = advanced(usedIndex, usedWrap, by: taken)
    }

    /// A position moved on in the ring.
    @inline(__always)
    private func advanced(_ position: UInt16, _ wrap: Bool, by count: Int) -> (UInt16, Bool) {
        let next = Int(position) + count
        return next >= size ? (UInt16(next - size), !wrap) : (UInt16(next), wrap)
    }

    // MARK: Available descriptors

    @inline(__always)
    private func isAvailable(_ flags: UInt16) -> Bool {
        (flags & Self.availableFlag != 0) == availableWrap && (flags & Self.usedFlag != 0) != availableWrap
    }

    var hasAvailablePacked: Bool {
        unsafe isAvailable(clinux_load16_acquire(descriptors + 16 * Int(lastAvailable) + 14))
    }

    func popPacked() -> Popped {
        guard hasAvailablePacked else { return .nothing }
        guard freeSlotCount > 0 else { return .broken(.availableIndex) }
        let slot = unsafe self.slot(Int(freeSlots[freeSlotCount - 1]))
        if let fault = unsafe walkPacked(slot, UnsafeRawPointer(descriptors), from: Int(lastAvailable)) {
            return .broken(fault)
        }
        let count = unsafe Int(slot.pointee.descriptorCount)
        // A driver that makes descriptors available again while they are in flight.
        guard descriptorsInFlight + count <= size else { return .broken(.availableIndex) }
        (lastAvailable, availableWrap) = advanced(lastAvailable, availableWrap, by: count)
        if let inflight {
            unsafe slot.pointee.inflightEntry = inflight.take(descriptors: scratch, count: count)
        }
        unsafe takePacked(slot)
        return unsafe .chain(slot)
    }

    func popRecoveredPacked(_ chain: InflightChain) -> Popped {
        guard freeSlotCount > 0 else { return .broken(.inflight) }
        let slot = unsafe self.slot(Int(freeSlots[freeSlotCount - 1]))
        let words = chain.descriptors.flatMap { [$0.0, $0.1] }
        let fault = unsafe words.withUnsafeBytes { bytes in unsafe walkPacked(slot, bytes.baseAddress!, from: 0) }
        if let fault { return .broken(fault) }
        guard unsafe Int(slot.pointee.descriptorCount) == chain.descriptors.count else { return .broken(.inflight) }
        unsafe slot.pointee.inflightEntry = chain.head
        unsafe takePacked(slot)
        return unsafe .chain(slot)
    }

    @inline(__always)
    private func takePacked(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        freeSlotCount -= 1
        descriptorsInFlight += unsafe Int(slot.pointee.descriptorCount)
        unsafe take(slot)
    }

    func unpopPacked(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        let position = unsafe Int(lastAvailable) - Int(slot.pointee.descriptorCount)
        if position < 0 { availableWrap.toggle() }
        lastAvailable = UInt16(position < 0 ? position + size : position)
        if let inflight { unsafe inflight.putBack(entry: slot.pointee.inflightEntry) }
    }

    func releasePacked(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        descriptorsInFlight -= unsafe Int(slot.pointee.descriptorCount)
        unsafe freeSlots[freeSlotCount] = slot.pointee.number
        freeSlotCount += 1
    }

    /// Walks a chain in the ring or in a copy of it; the last descriptor has the buffer ID.
    private func walkPacked(
        _ slot: UnsafeMutablePointer<VirtqueueSlot>, _ table: UnsafeRawPointer, from first: Int
    ) -> VirtqueueFault? {
        var walk = unsafe chainWalk(slot)
        var position = first
        var count = 0
        while true {
            guard count < size else { return .loop }
            let address = unsafe clinux_load64_relaxed(table + 16 * position)
            let rest = unsafe clinux_load64_relaxed(table + 16 * position + 8)
            unsafe scratch[2 * count] = address
            unsafe scratch[2 * count + 1] = rest
            count += 1
            let length = UInt64(UInt32(truncatingIfNeeded: rest))
            let flags = Int32(truncatingIfNeeded: rest >> 48)
            let fault: VirtqueueFault?
            if flags & VRING_DESC_F_INDIRECT != 0 {
                guard flags & VRING_DESC_F_NEXT == 0 else { return .indirect }
                fault = walkIndirectPacked(&walk, address, length)
            } else {
                fault = walk.append(address, length, writable: flags & VRING_DESC_F_WRITE != 0)
            }
            if let fault { return fault }
            unsafe slot.pointee.identifier = UInt16(truncatingIfNeeded: rest >> 32)
            if flags & VRING_DESC_F_NEXT == 0 { break }
            position = position + 1 == size ? 0 : position + 1
        }
        unsafe slot.pointee.descriptorCount = UInt16(count)
        unsafe walk.store(slot)
        return nil
    }

    /// An indirect table has its descriptors one after the other (2.8.8); of their flags only WRITE counts.
    private func walkIndirectPacked(_ walk: inout ChainWalk, _ address: UInt64, _ length: UInt64) -> VirtqueueFault? {
        guard let table = unsafe indirectTable(address, length) else { return .indirect }
        let count = Int(length / 16)
        guard count <= size else { return .loop }
        for index in 0..<count {
            let address = unsafe clinux_load64_relaxed(table + 16 * index)
            let rest = unsafe clinux_load64_relaxed(table + 16 * index + 8)
            let flags = Int32(truncatingIfNeeded: rest >> 48)
            guard flags & VRING_DESC_F_INDIRECT == 0 else { return .indirect }
            let length = UInt64(UInt32(truncatingIfNeeded: rest))
            if let fault = walk.append(address, length, writable: flags & VRING_DESC_F_WRITE != 0) { return fault }
        }
        return nil
    }

    // MARK: Used descriptors

    func writeUsedPacked(_ slot: UnsafeMutablePointer<VirtqueueSlot>, _ length: UInt32) {
        let index = Int(usedIndex)
        let element = unsafe descriptors + 16 * index
        let count = unsafe Int(slot.pointee.descriptorCount)
        let flags =
            (usedWrap ? Self.availableFlag | Self.usedFlag : 0) | (length > 0 ? Self.writeFlag : 0)
        unsafe clinux_store32_relaxed(element + 8, length)
        unsafe clinux_store16_relaxed(element + 12, slot.pointee.identifier)
        (usedIndex, usedWrap) = advanced(usedIndex, usedWrap, by: count)
        usedSinceSignal += count
        if let inflight {
            unsafe inflight.willUse(
                entry: slot.pointee.inflightEntry, UsedPosition(index: usedIndex, wrap: usedWrap))
            unsafe clinux_store16_release(element + 14, flags)
            unsafe inflight.didUse(entry: slot.pointee.inflightEntry)
        } else {
            unsafe clinux_store16_release(element + 14, flags)
        }
        if isLogged { logDescriptor(index) }
    }

    // MARK: Event suppression (2.8.10)

    func takeNotificationPacked() -> Bool {
        guard usedSinceSignal > 0, !isDetached else { return false }
        clinux_fence()
        let count = usedSinceSignal
        usedSinceSignal = 0
        let flags = unsafe Int32(clinux_load16_acquire(available + 2)) & 3
        guard eventIndex, flags == VRING_PACKED_EVENT_FLAG_DESC else { return flags != VRING_PACKED_EVENT_FLAG_DISABLE }
        let wish = unsafe clinux_load16_relaxed(available)
        // The position where the driver wants to be told, in laps of the ring like ours.
        let isOurLap = (wish >> UInt16(VRING_PACKED_EVENT_F_WRAP_CTR) != 0) == usedWrap
        let event = Int(wish & 0x7fff) - (isOurLap ? 0 : size)
        let new = Int(usedIndex)
        return new - event > 0 && new - event <= count
    }

    func stopNotificationsPacked() {
        unsafe clinux_store16_relaxed(used + 2, UInt16(VRING_PACKED_EVENT_FLAG_DISABLE))
        if isLogged { logUsed(2, 2) }
    }

    func wantNotificationsPacked() {
        if eventIndex {
            unsafe clinux_store16_relaxed(used, lastAvailable | (availableWrap ? 1 << 15 : 0))
            unsafe clinux_store16_release(used + 2, UInt16(VRING_PACKED_EVENT_FLAG_DESC))
        } else {
            unsafe clinux_store16_release(used + 2, UInt16(VRING_PACKED_EVENT_FLAG_ENABLE))
        }
        if isLogged { logUsed(0, 4) }
    }
}
