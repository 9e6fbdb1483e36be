// LoadQueue: a request queue for load: a fixed number of slots, each with its descriptors, headers and data made once.
//
// Owns: the slots and their shared memory; it has the ring for itself. Called by: vhost-user-load. Must not know: what
// to send, or how to count. Nothing here allocates after the start.

import CLinux
import Glibc

/// Reads and writes of blocks at a depth, by virtio-scsi or virtio-blk.
@safe
public final class LoadQueue {
    /// What the requests look like.
    public enum Device: Sendable {
        /// SCSI READ(16) and WRITE(16) to a logical unit with this block length in bytes.
        case scsi(VirtioSCSIAddress, blockLength: Int)
        /// virtio-blk, whose sectors have 512 bytes.
        case block
    }

    private enum Limit {
        static let header = 64
        static let response = 128
        static let descriptors = 3
    }

    /// What a slot does now.
    private enum Phase: UInt8 {
        case never, read, write
    }

    @unsafe
    private struct Slot {
        var header: UnsafeMutableRawPointer
        var response: UnsafeMutableRawPointer
        var data: UnsafeMutableRawPointer
        var headerAddress: UInt64
        var responseAddress: UInt64
        var dataAddress: UInt64
        var table: UnsafeMutableRawPointer
        var tableAddress: UInt64
        var phase: Phase = .never
        var submitted = false
    }

    /// Requests in flight at most: the slots are numbered from 0.
    public let depth: Int
    /// Bytes of each request.
    public let requestLength: Int
    private let queue: DriverQueue
    private let ring: SplitRing
    /// The ring that is used instead, if that was negotiated, and each slot's descriptors in it.
    private let packed: PackedRing?
    private var chains: [[PackedBuffer]]
    private let slots: UnsafeMutablePointer<Slot>
    private let done: UnsafeMutablePointer<UInt16>
    private let isBlock: Bool
    private let unit: UInt64
    private let isIndirect: Bool
    private let headerLength: UInt32
    private let responseLength: UInt32
    /// The response byte that says how it went: SCSI's response, or virtio-blk's status.
    private let verdictOffset: Int

    /// Bytes of shared memory that one slot needs.
    public static func memoryNeeded(requestLength: Int) -> Int {
        (requestLength + 4095) / 4096 * 4096 + Limit.header + Limit.response + 64
    }

    /// Descriptors in the ring that one slot needs.
    public static func descriptorsNeeded(isIndirect: Bool) -> Int { isIndirect ? 1 : Limit.descriptors }

    /// Makes the slots. The queue must have nothing in flight, and be used by nobody else until this is gone.
    public init(
        queue: DriverQueue, memory: SharedMemory, depth: Int, requestLength: Int, device: Device, isIndirect: Bool
    ) {
        precondition(queue.inFlightCount == 0)
        precondition(depth > 0 && depth * Self.descriptorsNeeded(isIndirect: isIndirect) <= queue.ring.size)
        self.queue = queue
        self.depth = depth
        self.requestLength = requestLength
        self.isIndirect = isIndirect
        ring = queue.ring
        packed = queue.packed
        chains = Array(repeating: [], count: depth)
        switch device {
        case .scsi(_, let blockLength):
            (isBlock, unit, headerLength, responseLength, verdictOffset) = (false, UInt64(blockLength), 51, 108, 11)
        case .block:
            (isBlock, unit, headerLength, responseLength, verdictOffset) = (true, 512, 16, 1, 0)
        }
        precondition(requestLength % Int(unit) == 0)
        unsafe slots = .allocate(capacity: depth)
        unsafe done = .allocate(capacity: queue.ring.size)
        for number in 0..<depth {
            unsafe (slots + number).initialize(to: Self.makeSlot(memory, requestLength))
            if case .scsi(let address, _) = device { prepareHeader(number, address) }
        }
    }

    deinit {
        unsafe slots.deallocate()
        unsafe done.deallocate()
    }

    private static func makeSlot(_ memory: SharedMemory, _ requestLength: Int) -> Slot {
        let header = memory.allocate(Limit.header)
        let response = memory.allocate(Limit.response)
        let table = memory.allocate(SplitRing.descriptorSize * Limit.descriptors)
        let data = memory.allocate(requestLength, alignment: 4096)
        memory.fill(Limit.header, with: 0, at: header)
        memory.fill(requestLength, with: 0, at: data)
        return unsafe Slot(
            header: memory.pointer(header, Limit.header), response: memory.pointer(response, Limit.response),
            data: memory.pointer(data, requestLength), headerAddress: header, responseAddress: response,
            dataAddress: data, table: memory.pointer(table, SplitRing.descriptorSize * Limit.descriptors),
            tableAddress: table)
    }

    private func prepareHeader(_ number: Int, _ address: VirtioSCSIAddress) {
        let header = unsafe slots[number].header
        for (index, byte) in address.bytes.enumerated() {
            unsafe header.storeBytes(of: byte, toByteOffset: index, as: UInt8.self)
        }
        unsafe header.storeBytes(of: UInt64(number), toByteOffset: 8, as: UInt64.self)
    }

    // MARK: - Hot path

    /// The data of a slot: to fill before a write, to look at after a read.
    @unsafe
    public func data(_ slot: Int) -> UnsafeMutableRawPointer {
        precondition(slot >= 0 && slot < depth)
        return unsafe slots[slot].data
    }

    /// Puts a read of the slot's length into the ring. `offset` is in bytes, a multiple of the block length.
    public func submitRead(_ slot: Int, offset: UInt64) { submit(slot, offset, .read) }

    /// Puts a write of the slot's length into the ring. `offset` is in bytes, a multiple of the block length.
    public func submitWrite(_ slot: Int, offset: UInt64) { submit(slot, offset, .write) }

    private func submit(_ number: Int, _ offset: UInt64, _ phase: Phase) {
        precondition(number >= 0 && number < depth)
        let slot = unsafe slots + number
        unsafe precondition(!slot.pointee.submitted, "the slot is in flight")
        unsafe slot.pointee.submitted = true
        let header = unsafe slot.pointee.header
        let block = offset / unit
        if isBlock {
            unsafe header.storeBytes(
                of: UInt32(phase == .write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN), as: UInt32.self)
            unsafe header.storeBytes(of: block, toByteOffset: 8, as: UInt64.self)
        } else {
            unsafe header.storeBytes(of: phase == .write ? 0x8a : 0x88, toByteOffset: 19, as: UInt8.self)
            unsafe header.storeBytes(of: block.bigEndian, toByteOffset: 21, as: UInt64.self)
            unsafe header.storeBytes(
                of: UInt32(UInt64(requestLength) / unit).bigEndian, toByteOffset: 29, as: UInt32.self)
        }
        unsafe slot.pointee.response.storeBytes(of: 0xff, toByteOffset: verdictOffset, as: UInt8.self)
        if unsafe slot.pointee.phase != phase { describe(number, phase) }
        if let packed { return packed.add(chains[number], identifier: UInt16(number)) }
        ring.makeAvailable(UInt16(isIndirect ? number : number * Limit.descriptors))
    }

    /// Writes the three descriptors, whose order depends on the direction and on the device.
    private func describe(_ number: Int, _ phase: Phase) {
        let slot = unsafe slots[number]
        unsafe slots[number].phase = phase
        chains[number] = []
        let data = unsafe (slot.dataAddress, UInt32(requestLength), phase == .read ? DescriptorFlag.write : 0)
        let response = unsafe (slot.responseAddress, responseLength, DescriptorFlag.write)
        put(number, 0, unsafe (slot.headerAddress, headerLength, 0))
        // virtio-blk's status comes last; virtio-scsi's response comes before data in.
        let dataFirst = isBlock || phase == .write
        put(number, 1, dataFirst ? data : response)
        put(number, 2, dataFirst ? response : data)
        if isIndirect, packed != nil {
            let length = UInt32(SplitRing.descriptorSize * Limit.descriptors)
            unsafe chains[number].append(
                PackedBuffer(address: slot.tableAddress, length: length, flags: DescriptorFlag.indirect))
        } else if isIndirect {
            unsafe ring.setDescriptor(
                number, address: slot.tableAddress, length: UInt32(SplitRing.descriptorSize * Limit.descriptors),
                flags: DescriptorFlag.indirect, next: 0)
        }
    }

    private func put(_ number: Int, _ place: Int, _ buffer: (UInt64, UInt32, UInt16)) {
        let last = place == Limit.descriptors - 1
        let flags = buffer.2 | (last ? 0 : DescriptorFlag.next)
        if packed != nil {
            guard isIndirect else {
                chains[number].append(PackedBuffer(address: buffer.0, length: buffer.1, flags: buffer.2))
                return
            }
            // A packed table has its flags last, and no chain.
            unsafe SplitRing.store(
                slots[number].table + SplitRing.descriptorSize * place, address: buffer.0, length: buffer.1,
                flags: 0, next: buffer.2)
        } else if isIndirect {
            unsafe SplitRing.store(
                slots[number].table + SplitRing.descriptorSize * place, address: buffer.0, length: buffer.1,
                flags: flags, next: last ? 0 : UInt16(place + 1))
        } else {
            let index = number * Limit.descriptors + place
            ring.setDescriptor(
                index, address: buffer.0, length: buffer.1, flags: flags, next: last ? 0 : UInt16(index + 1))
        }
    }

    /// Shows the device what was put into the ring, and notifies it if it wants that.
    public func publish() { queue.publish() }

    /// Takes what the device has used. Returns how many slots; `completed` tells which.
    public func pollCompletions() throws(InitiatorError) -> Int {
        guard queue.hasUsed else { return 0 }
        var count = 0
        let divisor = UInt32(isIndirect || packed != nil ? 1 : Limit.descriptors)
        while count < depth, let element = packed == nil ? ring.nextUsed() : packed!.nextUsed() {
            let number = Int(element.head / divisor)
            guard element.head % divisor == 0, number < depth, unsafe slots[number].submitted else {
                throw .protocolViolation("it used chain \(element.head), which is not in flight")
            }
            unsafe slots[number].submitted = false
            unsafe done[count] = UInt16(number)
            count += 1
        }
        return count
    }

    /// The slot that is the `index`th of those that the last `pollCompletions` found.
    public func completed(_ index: Int) -> Int {
        precondition(index >= 0 && index < depth)
        return unsafe Int(done[index])
    }

    /// Whether a completed slot's request succeeded.
    public func succeeded(_ slot: Int) -> Bool {
        precondition(slot >= 0 && slot < depth)
        let response = unsafe slots[slot].response
        let verdict = unsafe response.load(fromByteOffset: verdictOffset, as: UInt8.self)
        let status = unsafe isBlock ? 0 : response.load(fromByteOffset: 10, as: UInt8.self)
        return verdict == 0 && status == 0
    }

    /// What a completed slot's response says, for a message.
    public func verdict(_ slot: Int) -> String {
        precondition(slot >= 0 && slot < depth)
        let bytes = unsafe [UInt8](UnsafeRawBufferPointer(start: slots[slot].response, count: Int(responseLength)))
        guard !isBlock else { return "virtio-blk status \(bytes[0])" }
        let sense = bytes[12..<30].map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }
        return "response \(bytes[11]), SCSI status \(bytes[10]), sense \(sense.joined())"
    }

    /// Whether the device is asked to notify.
    public func wantNotifications(_ wanted: Bool) {
        if wanted {
            queue.enableNotification()
        } else if let packed {
            packed.disableNotification()
        } else {
            ring.disableNotification()
        }
    }

    /// Sleeps until the device has used something on one of the queues.
    public static func waitForUsed(_ queues: [LoadQueue]) throws(InitiatorError) {
        for queue in queues { queue.queue.enableNotification() }
        if queues.contains(where: { $0.queue.hasUsed }) { return }
        try Deadline.waitForInput(anyOf: queues.map(\.queue.callDescriptor), "a completion")
        for queue in queues { queue.queue.drain(queue.queue.callDescriptor) }
    }
}
