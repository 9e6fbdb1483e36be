// DriverQueue: one virtqueue as a driver uses it: chains of any layout in, completions out, notifications both ways.
//
// Owns: the ring, its free descriptors, the three eventfds, the buffers of what is in flight. Called by:
// VhostUserFrontEnd, the SCSI layer, tests. Must not know: what the buffers hold. LoadQueue drives the same ring
// without any of the arrays here.

import CLinux
import Glibc

/// How a chain is cut into descriptors.
public struct ChainLayout: Sendable {
    /// Lengths of the device-readable descriptors; what is left of the bytes goes into one more.
    public var readable: [Int]
    /// Lengths of the device-writable descriptors; what is left of the bytes goes into one more.
    public var writable: [Int]
    /// Whether the descriptors are in a table of their own.
    public var isIndirect: Bool

    /// Cuts at the given lengths.
    public init(readable: [Int] = [], writable: [Int] = [], isIndirect: Bool = false) {
        self.readable = readable
        self.writable = writable
        self.isIndirect = isIndirect
    }

    /// Lengths that sum up to `total`.
    static func pieces(_ lengths: [Int], _ total: Int) -> [Int] {
        var rest = total
        var pieces: [Int] = []
        for length in lengths where rest > 0 {
            pieces.append(min(length, rest))
            rest -= pieces[pieces.count - 1]
        }
        return rest > 0 ? pieces + [rest] : pieces
    }
}

/// A chain that was made available.
public final class Chain {
    /// One descriptor's buffer.
    struct Piece {
        let memory: SharedMemory
        let address: UInt64
        let length: Int
    }

    /// The first descriptor.
    public let head: UInt16
    let descriptors: [UInt16]
    let pieces: [Piece]
    let readableCount: Int
    let table: Piece?
    /// What the device said it wrote, once it has used the chain.
    public fileprivate(set) var usedLength: UInt32?
    /// The number of the chain among all that the device has used of the queue, once it has.
    public fileprivate(set) var usedNumber = 0
    /// The device-writable bytes, once the device has used the chain.
    public fileprivate(set) var written: [UInt8] = []

    init(head: UInt16, descriptors: [UInt16], pieces: [Piece], readableCount: Int, table: Piece?) {
        self.head = head
        self.descriptors = descriptors
        self.pieces = pieces
        self.readableCount = readableCount
        self.table = table
    }

    /// Whether the device has used it.
    public var isComplete: Bool { usedLength != nil }

    /// The guest-physical address and length of each device-writable buffer.
    public var writableBuffers: [(memory: SharedMemory, address: UInt64, length: Int)] {
        pieces[readableCount...].map { ($0.memory, $0.address, $0.length) }
    }
}

/// One virtqueue as a driver uses it.
public final class DriverQueue {
    /// What device-writable buffers hold before the device writes, and what stands behind each buffer.
    public static let untouched: UInt8 = 0xee
    private static let guardBytes = 32

    /// The queue's number.
    public let index: Int
    /// The ring; tests may write into it.
    public let ring: SplitRing
    /// The packed ring that is used instead, if that was negotiated.
    public let packed: PackedRing?
    /// The eventfds: ours to the device, the device's to us, the device's when the ring is broken.
    public let kickDescriptor: Int32, callDescriptor: Int32, errorDescriptor: Int32
    private let memories: [SharedMemory]
    private var nextMemory = 0
    private var usedCount = 0
    private var free: [UInt16]
    private var inFlight: [UInt16: Chain] = [:]

    init(index: Int, size: Int, memories: [SharedMemory], usesEventIndex: Bool, isPacked: Bool = false) {
        self.index = index
        self.memories = memories
        ring = SplitRing(size: size, memory: memories[0], usesEventIndex: usesEventIndex)
        packed =
            isPacked ? PackedRing(size: size, memory: memories[0], usesEventIndex: usesEventIndex) : nil
        free = (0..<UInt16(size)).reversed()
        kickDescriptor = eventfd(0, Int32(EFD_NONBLOCK | EFD_CLOEXEC))
        callDescriptor = eventfd(0, Int32(EFD_NONBLOCK | EFD_CLOEXEC))
        errorDescriptor = eventfd(0, Int32(EFD_NONBLOCK | EFD_CLOEXEC))
        precondition(kickDescriptor >= 0 && callDescriptor >= 0 && errorDescriptor >= 0, "no eventfd")
    }

    deinit {
        close(kickDescriptor)
        close(callDescriptor)
        close(errorDescriptor)
    }

    /// Chains that the device has not used yet.
    public var inFlightCount: Int { inFlight.count }

    // MARK: - Chains

    /// Makes a chain available without telling the device.
    public func enqueue(readable: [UInt8], writable: Int, layout: ChainLayout = ChainLayout()) -> Chain {
        let readableLengths = ChainLayout.pieces(layout.readable, readable.count)
        let writableLengths = ChainLayout.pieces(layout.writable, writable)
        let pieces = (readableLengths + writableLengths).map(makePiece)
        precondition(!pieces.isEmpty, "a chain without a buffer")
        var offset = 0
        for piece in pieces[..<readableLengths.count] {
            piece.memory.write(Array(readable[offset..<offset + piece.length]), at: piece.address)
            offset += piece.length
        }
        let chain =
            layout.isIndirect
            ? indirectChain(pieces, readableLengths.count) : directChain(pieces, readableLengths.count)
        inFlight[chain.head] = chain
        if packed == nil { ring.makeAvailable(chain.head) }
        return chain
    }

    /// Makes a chain available and notifies the device if it wants that.
    public func submit(readable: [UInt8], writable: Int, layout: ChainLayout = ChainLayout()) -> Chain {
        let chain = enqueue(readable: readable, writable: writable, layout: layout)
        publish()
        return chain
    }

    /// Shows what was enqueued and notifies the device if it wants that.
    public func publish() {
        if packed?.publish() ?? ring.publish() { kick() }
    }

    private func makePiece(_ length: Int) -> Chain.Piece {
        let memory = memories[nextMemory]
        nextMemory = (nextMemory + 1) % memories.count
        let address = memory.allocate(length + Self.guardBytes, alignment: 1)
        memory.fill(length + Self.guardBytes, with: Self.untouched, at: address)
        return Chain.Piece(memory: memory, address: address, length: length)
    }

    private func takeDescriptors(_ count: Int) -> [UInt16] {
        precondition(free.count >= count, "the ring has no \(count) free descriptors; wait for completions")
        defer { free.removeLast(count) }
        return free.suffix(count).reversed()
    }

    private static func flags(_ number: Int, _ readableCount: Int, _ count: Int) -> UInt16 {
        (number >= readableCount ? DescriptorFlag.write : 0) | (number + 1 < count ? DescriptorFlag.next : 0)
    }

    private func packedChain(
        _ pieces: [Chain.Piece], _ readableCount: Int, _ buffers: [PackedBuffer], _ table: Chain.Piece?
    )
        -> Chain
    {
        let identifier = takeDescriptors(1)
        packed!.add(buffers, identifier: identifier[0])
        return Chain(
            head: identifier[0], descriptors: identifier, pieces: pieces, readableCount: readableCount, table: table)
    }

    private func directChain(_ pieces: [Chain.Piece], _ readableCount: Int) -> Chain {
        if packed != nil {
            let buffers = pieces.enumerated().map { number, piece in
                PackedBuffer(
                    address: piece.address, length: UInt32(piece.length),
                    flags: number >= readableCount ? DescriptorFlag.write : 0)
            }
            return packedChain(pieces, readableCount, buffers, nil)
        }
        let indices = takeDescriptors(pieces.count)
        for (number, piece) in pieces.enumerated() {
            ring.setDescriptor(
                Int(indices[number]), address: piece.address, length: UInt32(piece.length),
                flags: Self.flags(number, readableCount, pieces.count),
                next: number + 1 < pieces.count ? indices[number + 1] : 0)
        }
        return Chain(
            head: indices[0], descriptors: indices, pieces: pieces, readableCount: readableCount, table: nil)
    }

    private func indirectChain(_ pieces: [Chain.Piece], _ readableCount: Int) -> Chain {
        let memory = memories[0]
        let bytes = SplitRing.descriptorSize * pieces.count
        let table = Chain.Piece(memory: memory, address: memory.allocate(bytes), length: bytes)
        for (number, piece) in pieces.enumerated() {
            let next = number + 1 < pieces.count ? number + 1 : 0
            let flags = Self.flags(number, readableCount, pieces.count)
            memory.write(
                WireBytes.of(piece.address) + WireBytes.of(UInt32(piece.length))
                    + (packed == nil ? WireBytes.of(flags, UInt16(next)) : WireBytes.of(UInt16(0), flags)),
                at: table.address + UInt64(SplitRing.descriptorSize * number))
        }
        if packed != nil {
            let buffer = PackedBuffer(
                address: table.address, length: UInt32(bytes), flags: DescriptorFlag.indirect)
            return packedChain(pieces, readableCount, [buffer], table)
        }
        let index = takeDescriptors(1)
        ring.setDescriptor(
            Int(index[0]), address: table.address, length: UInt32(bytes), flags: DescriptorFlag.indirect, next: 0)
        return Chain(
            head: index[0], descriptors: index, pieces: pieces, readableCount: readableCount, table: table)
    }

    // MARK: - Completions

    /// Takes what the device has used. Throws if it used what was not its own, or wrote where it must not.
    public func collect() throws(InitiatorError) {
        while let element = packed == nil ? ring.nextUsed() : packed?.nextUsed() {
            guard element.head < UInt32(ring.size), let chain = inFlight.removeValue(forKey: UInt16(element.head))
            else {
                throw .protocolViolation("it used chain \(element.head) of queue \(index), which is not in flight")
            }
            try complete(chain, element.length)
        }
    }

    private func complete(_ chain: Chain, _ length: UInt32) throws(InitiatorError) {
        let writable = chain.pieces[chain.readableCount...]
        guard Int(length) <= writable.reduce(0, { $0 + $1.length }) else {
            throw .protocolViolation("it wrote \(length) bytes, more than the chain has")
        }
        for piece in chain.pieces {
            let behind = piece.memory.read(Self.guardBytes, at: piece.address + UInt64(piece.length))
            guard behind.allSatisfy({ $0 == Self.untouched }) else {
                throw .protocolViolation("it wrote behind the end of a buffer")
            }
        }
        chain.written = writable.flatMap { $0.memory.read($0.length, at: $0.address) }
        chain.usedLength = length
        usedCount += 1
        chain.usedNumber = usedCount
        release(chain)
    }

    private func release(_ chain: Chain) {
        for piece in chain.pieces { piece.memory.deallocate(piece.address, piece.length + Self.guardBytes) }
        if let table = chain.table { table.memory.deallocate(table.address, table.length) }
        free += chain.descriptors.reversed()
    }

    /// Forgets what is in flight and begins the ring anew: a reset of the driver. The device must have stopped the
    /// queue.
    public func reset() {
        for chain in inFlight.values { release(chain) }
        inFlight = [:]
        free = (0..<UInt16(ring.size)).reversed()
        ring.reset()
        packed?.reset()
        drain(callDescriptor)
        drain(kickDescriptor)
        drain(errorDescriptor)
    }

    /// Waits until the device has used the chain, asleep on the call eventfd.
    public func wait(for chain: Chain) throws(InitiatorError) {
        while true {
            enableNotification()
            try collect()
            if chain.isComplete { return }
            try Deadline.waitForInput(callDescriptor, "a completion on queue \(index)")
            drain(callDescriptor)
        }
    }

    /// Whether the device has used something that was not taken yet.
    public var hasUsed: Bool { packed?.hasUsed ?? ring.hasUsed }

    /// Asks the device to notify at its next used element.
    public func enableNotification() {
        if let packed { packed.enableNotification() } else { ring.enableNotification() }
    }

    /// Waits until the device has used anything more.
    public func waitForUsed() throws(InitiatorError) {
        enableNotification()
        while !hasUsed {
            try Deadline.waitForInput(callDescriptor, "a completion on queue \(index)")
            drain(callDescriptor)
        }
    }

    /// Waits until the device says through the error eventfd that the ring is broken.
    public func waitForError() throws(InitiatorError) {
        try Deadline.waitForInput(errorDescriptor, "the error eventfd of queue \(index)")
        drain(errorDescriptor)
    }

    /// Notifies the device.
    public func kick() {
        var one: UInt64 = 1
        _ = unsafe write(kickDescriptor, &one, 8)
    }

    /// Sets an eventfd back.
    public func drain(_ descriptor: Int32) {
        var count: UInt64 = 0
        _ = unsafe read(descriptor, &count, 8)
    }
}
