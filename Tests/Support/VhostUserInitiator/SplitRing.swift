// SplitRing: the driver's half of one split virtqueue (virtio 1.2 clause 2.7).
//
// Owns: the driver's positions, and where the ring lies in shared memory. Called by: DriverQueue, LoadQueue, tests that
// write what no driver would. Must not know: what the buffers hold, or how notifications travel.

import CLinux
import Glibc

/// One element of a used ring.
public struct UsedElement: Equatable, Sendable {
    /// The head of the chain that was used.
    public let head: UInt32
    /// Bytes that the device says it wrote.
    public let length: UInt32
}

/// The flags of a descriptor.
public enum DescriptorFlag {
    /// `next` is valid.
    public static let next = UInt16(VRING_DESC_F_NEXT)
    /// The device writes.
    public static let write = UInt16(VRING_DESC_F_WRITE)
    /// The buffer is a table of descriptors.
    public static let indirect = UInt16(VRING_DESC_F_INDIRECT)
}

/// The driver's half of one split virtqueue. Nothing here is checked for sense: a test may write what it likes.
@safe
public final class SplitRing {
    /// Bytes of one descriptor.
    public static let descriptorSize = 16

    /// Descriptors, a power of two for an honest driver.
    public let size: Int
    /// Guest-physical addresses of the three areas.
    public let descriptorAddress: UInt64, availableAddress: UInt64, usedAddress: UInt64
    /// Whether notifications are asked for by index (EVENT_IDX).
    public let usesEventIndex: Bool
    private let memory: SharedMemory
    private let descriptors: UnsafeMutableRawPointer
    private let available: UnsafeMutableRawPointer
    private let used: UnsafeMutableRawPointer
    private let mask: UInt16

    /// The available index with what is not published yet.
    public private(set) var availableIndex: UInt16 = 0
    private var publishedIndex: UInt16 = 0
    /// The next used element to look at.
    public private(set) var usedIndex: UInt16 = 0

    /// Lays a ring out in shared memory; everything in it is zero.
    public init(size: Int, memory: SharedMemory, usesEventIndex: Bool) {
        self.size = size
        self.memory = memory
        self.usesEventIndex = usesEventIndex
        mask = UInt16(truncatingIfNeeded: size - 1)
        let bytes = (16 * size, 6 + 2 * size, 6 + 8 * size)
        // Each area on pages of its own, so that a device's wild write shows as a broken neighbour of no meaning.
        descriptorAddress = memory.allocate(bytes.0, alignment: 4096)
        availableAddress = memory.allocate(bytes.1, alignment: 4096)
        usedAddress = memory.allocate(bytes.2, alignment: 4096)
        unsafe descriptors = memory.pointer(descriptorAddress, bytes.0)
        unsafe available = memory.pointer(availableAddress, bytes.1)
        unsafe used = memory.pointer(usedAddress, bytes.2)
        reset()
    }

    /// Begins anew: the areas zeroed, the positions at 0.
    public func reset() {
        unsafe descriptors.initializeMemory(as: UInt8.self, repeating: 0, count: 16 * size)
        unsafe available.initializeMemory(as: UInt8.self, repeating: 0, count: 6 + 2 * size)
        unsafe used.initializeMemory(as: UInt8.self, repeating: 0, count: 6 + 8 * size)
        (availableIndex, publishedIndex, usedIndex) = (0, 0, 0)
    }

    /// Writes one descriptor of the table.
    public func setDescriptor(_ index: Int, address: UInt64, length: UInt32, flags: UInt16, next: UInt16) {
        precondition(index >= 0 && index < size)
        unsafe Self.store(descriptors + 16 * index, address: address, length: length, flags: flags, next: next)
    }

    /// Writes one descriptor anywhere: an indirect table's.
    @unsafe
    static func store(
        _ entry: UnsafeMutableRawPointer, address: UInt64, length: UInt32, flags: UInt16, next: UInt16
    ) {
        unsafe entry.storeBytes(of: address, as: UInt64.self)
        unsafe entry.storeBytes(of: length, toByteOffset: 8, as: UInt32.self)
        unsafe entry.storeBytes(of: flags, toByteOffset: 12, as: UInt16.self)
        unsafe entry.storeBytes(of: next, toByteOffset: 14, as: UInt16.self)
    }

    /// Puts a chain into the available ring; the device sees it when it is published.
    public func makeAvailable(_ head: UInt16) {
        unsafe clinux_store16_relaxed(available + 4 + 2 * Int(availableIndex & mask), head)
        availableIndex &+= 1
    }

    /// Shows the device what was made available. Returns whether it wants to be notified.
    public func publish() -> Bool {
        let old = publishedIndex
        guard old != availableIndex else { return false }
        unsafe clinux_store16_release(available + 2, availableIndex)
        publishedIndex = availableIndex
        // The device stores its wish and then loads our index; we do it the other way round.
        clinux_fence()
        if usesEventIndex {
            let event = unsafe clinux_load16_relaxed(used + 4 + 8 * size)
            return availableIndex &- event &- 1 < availableIndex &- old
        }
        return unsafe clinux_load16_relaxed(used) & UInt16(VRING_USED_F_NO_NOTIFY) == 0
    }

    /// Sets the available index to any value, as a hostile driver would.
    public func forceAvailableIndex(_ value: UInt16) {
        availableIndex = value
        publishedIndex = value
        unsafe clinux_store16_release(available + 2, value)
    }

    /// Whether the device has used something that was not taken yet.
    public var hasUsed: Bool { unsafe clinux_load16_acquire(used + 2) != usedIndex }

    /// The device's used index.
    public var deviceUsedIndex: UInt16 { unsafe clinux_load16_acquire(used + 2) }

    /// Takes the next used element.
    public func nextUsed() -> UsedElement? {
        guard hasUsed else { return nil }
        let element = unsafe used + 4 + 8 * Int(usedIndex & mask)
        usedIndex &+= 1
        return unsafe UsedElement(
            head: clinux_load32_relaxed(element), length: clinux_load32_relaxed(element + 4))
    }

    /// Asks the device to notify at its next used element. Look for used elements once more before sleeping.
    public func enableNotification() {
        if usesEventIndex {
            unsafe clinux_store16_relaxed(available + 4 + 2 * size, usedIndex)
        } else {
            unsafe clinux_store16_relaxed(available, 0)
        }
        clinux_fence()
    }

    /// Asks the device not to notify. With EVENT_IDX this holds for the next 65,000 elements.
    public func disableNotification() {
        if usesEventIndex {
            unsafe clinux_store16_relaxed(available + 4 + 2 * size, usedIndex &- 1)
        } else {
            unsafe clinux_store16_relaxed(available, UInt16(VRING_AVAIL_F_NO_INTERRUPT))
        }
    }
}
