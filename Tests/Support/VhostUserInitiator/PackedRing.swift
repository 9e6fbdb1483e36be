// PackedRing: the driver's half of one packed virtqueue (virtio 1.2 clause 2.8).
//
// Owns: the driver's positions and wrap counters, and where the ring lies in shared memory. Called by: DriverQueue,
// tests that write what no driver would. Must not know: what the buffers hold, or how notifications travel.

import CLinux
import Glibc

/// One buffer of a chain.
public struct PackedBuffer: Sendable {
    /// Guest-physical address, bytes, flags without those of availability.
    let address: UInt64, length: UInt32, flags: UInt16

    /// A buffer, or an indirect table.
    public init(address: UInt64, length: UInt32, flags: UInt16) {
        (self.address, self.length, self.flags) = (address, length, flags)
    }
}

/// The driver's half of one packed virtqueue. Nothing here is checked for sense: a test may write what it likes.
@safe
public final class PackedRing {
    private static let availableFlag = UInt16(1) << UInt16(VRING_PACKED_DESC_F_AVAIL)
    private static let usedFlag = UInt16(1) << UInt16(VRING_PACKED_DESC_F_USED)

    /// Descriptors; any number.
    public let size: Int
    /// Guest-physical addresses of the descriptors, of the driver's and of the device's event suppression.
    public let descriptorAddress: UInt64, driverAddress: UInt64, deviceAddress: UInt64
    private let usesEventIndex: Bool
    private let descriptors: UnsafeMutableRawPointer
    private let driver: UnsafeMutableRawPointer
    private let device: UnsafeMutableRawPointer
    private var position = 0
    private var wrap = true
    private var usedPosition = 0
    private var usedWrap = true
    /// Descriptors of each buffer ID that is in flight.
    private var counts: [Int]
    /// Descriptors that no chain has.
    public private(set) var free: Int
    /// Heads of chains that are not shown yet: where, and with which flags.
    private var pending: [(position: Int, flags: UInt16)] = []
    private var pendingDescriptors = 0

    /// Lays a ring out in shared memory.
    public init(size: Int, memory: SharedMemory, usesEventIndex: Bool) {
        self.size = size
        self.usesEventIndex = usesEventIndex
        descriptorAddress = memory.allocate(16 * size, alignment: 4096)
        driverAddress = memory.allocate(4, alignment: 4096)
        deviceAddress = memory.allocate(4, alignment: 4096)
        unsafe descriptors = memory.pointer(descriptorAddress, 16 * size)
        unsafe driver = memory.pointer(driverAddress, 4)
        unsafe device = memory.pointer(deviceAddress, 4)
        counts = Array(repeating: 0, count: size)
        free = size
        reset()
    }

    /// Begins anew.
    public func reset() {
        unsafe descriptors.initializeMemory(as: UInt8.self, repeating: 0, count: 16 * size)
        unsafe driver.initializeMemory(as: UInt8.self, repeating: 0, count: 4)
        unsafe device.initializeMemory(as: UInt8.self, repeating: 0, count: 4)
        (position, wrap, usedPosition, usedWrap, free) = (0, true, 0, true, size)
        counts = Array(repeating: 0, count: size)
        pending = []
        pendingDescriptors = 0
    }

    /// What SET_VRING_BASE says of a ring with nothing in flight, of a device that has used all that the driver took.
    public var base: UInt32 {
        let half = UInt32(usedPosition) | (usedWrap ? 1 << 15 : 0)
        return half | half << 16
    }

    /// Where the driver will put its next descriptor, as the lower half of `base` has it.
    public var nextPosition: UInt32 { UInt32(position) | (wrap ? 1 << 15 : 0) }

    /// Puts a chain into the ring; the device sees it when it is published.
    public func add(_ buffers: [PackedBuffer], identifier: UInt16) {
        precondition(free >= buffers.count, "the ring has no \(buffers.count) free descriptors; wait for completions")
        free -= buffers.count
        counts[Int(identifier)] = buffers.count
        for (number, buffer) in buffers.enumerated() {
            let last = number + 1 == buffers.count
            let flags =
                buffer.flags | (last ? 0 : DescriptorFlag.next) | (wrap ? Self.availableFlag : Self.usedFlag)
            setDescriptor(
                position, address: buffer.address, length: buffer.length, identifier: identifier,
                flags: number == 0 ? nil : flags)
            if number == 0 { pending.append((position, flags)) }
            position += 1
            if position == size {
                position = 0
                wrap.toggle()
            }
        }
        pendingDescriptors += buffers.count
    }

    /// Writes one descriptor; without flags those in the ring stay.
    public func setDescriptor(_ index: Int, address: UInt64, length: UInt32, identifier: UInt16, flags: UInt16?) {
        precondition(index >= 0 && index < size)
        let entry = unsafe descriptors + 16 * index
        unsafe entry.storeBytes(of: address, as: UInt64.self)
        unsafe entry.storeBytes(of: length, toByteOffset: 8, as: UInt32.self)
        unsafe entry.storeBytes(of: identifier, toByteOffset: 12, as: UInt16.self)
        if let flags { unsafe clinux_store16_release(entry + 14, flags) }
    }

    /// Shows the device what was added, the first chain last. Returns whether it wants to be notified.
    public func publish() -> Bool {
        guard !pending.isEmpty else { return false }
        for head in pending.reversed() {
            unsafe clinux_store16_release(descriptors + 16 * head.position + 14, head.flags)
        }
        let count = pendingDescriptors
        pending.removeAll(keepingCapacity: true)
        pendingDescriptors = 0
        clinux_fence()
        let flags = unsafe Int32(clinux_load16_acquire(device + 2)) & 3
        guard flags == VRING_PACKED_EVENT_FLAG_DESC else { return flags == VRING_PACKED_EVENT_FLAG_ENABLE }
        let wish = unsafe clinux_load16_relaxed(device)
        let event = Int(wish & 0x7fff) - ((wish >> 15 != 0) == wrap ? 0 : size)
        return position - event > 0 && position - event <= count
    }

    /// Whether the device has used something that was not taken yet.
    public var hasUsed: Bool {
        let flags = unsafe clinux_load16_acquire(descriptors + 16 * usedPosition + 14)
        return (flags & Self.availableFlag != 0) == usedWrap && (flags & Self.usedFlag != 0) == usedWrap
    }

    /// Takes the next used element.
    public func nextUsed() -> UsedElement? {
        guard hasUsed else { return nil }
        let entry = unsafe descriptors + 16 * usedPosition
        let identifier = unsafe clinux_load16_relaxed(entry + 12)
        let length = unsafe clinux_load32_relaxed(entry + 8)
        let count = Int(identifier) < size ? counts[Int(identifier)] : 0
        if count > 0 {
            counts[Int(identifier)] = 0
            free += count
            usedPosition += count
            if usedPosition >= size {
                usedPosition -= size
                usedWrap.toggle()
            }
        }
        return UsedElement(head: UInt32(identifier), length: length)
    }

    /// Asks the device to notify at its next used element. Look for used elements once more before sleeping.
    public func enableNotification() {
        if usesEventIndex {
            unsafe clinux_store16_relaxed(driver, UInt16(usedPosition) | (usedWrap ? 1 << 15 : 0))
            unsafe clinux_store16_release(driver + 2, UInt16(VRING_PACKED_EVENT_FLAG_DESC))
        } else {
            unsafe clinux_store16_release(driver + 2, UInt16(VRING_PACKED_EVENT_FLAG_ENABLE))
        }
        clinux_fence()
    }

    /// Asks the device not to notify.
    public func disableNotification() {
        unsafe clinux_store16_release(driver + 2, UInt16(VRING_PACKED_EVENT_FLAG_DISABLE))
    }
}
