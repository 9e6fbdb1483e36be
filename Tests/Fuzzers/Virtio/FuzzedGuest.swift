// FuzzedGuest: a guest's memory, shared as a front-end would, with rings and buffers that the input fills.
//
// Owns: two memfds that lie side by side in the guest's physical memory, their mappings, the driver's positions in each
// ring. Called by: the fuzzers of the virtio front. Must not know: how the front reads any of it.

import CFuzzer
import Glibc

/// How the driver of a ring writes its chains.
struct RingShape {
    var size: Int
    var isPacked = false
}

/// One descriptor as the driver means it.
struct FuzzedDescriptor {
    var address: UInt64
    var length: UInt32
    var flags: UInt16
    var next: UInt16 = 0
}

@safe
final class FuzzedGuest {
    /// Bytes in both files together, and in the first.
    static let size = 0x40000, split = 0x30000
    static let guestAddress: UInt64 = 0x10_0000, userAddress: UInt64 = 0x7000_0000_0000
    /// Where a ring's areas lie; behind those of the last ring are the buffers.
    static let ringBytes = 0x4000, rings = 4, buffers = 0x10000, longestRing = 128

    let descriptors: [Int32]
    private let parts: [UnsafeMutableRawPointer]
    var shapes = Array(repeating: RingShape(size: 16), count: rings)
    /// The next available element of each ring; of a packed one its position.
    private var available = [UInt16](repeating: 0, count: rings)
    private var wraps = [Bool](repeating: true, count: rings)
    private var nextBuffer = 0
    /// The books of a driver that keeps the rules; `nil`: it does not.
    var honest: HonestDriver?

    init() {
        let made = unsafe [Self.split, Self.size - Self.split].map { size in
            let descriptor = fuzzer_memory(size)
            return unsafe (descriptor, clinux_map_shared(size, descriptor)!)
        }
        descriptors = unsafe made.map(\.0)
        unsafe parts = unsafe made.map(\.1)
    }

    /// The two files as memory regions.
    var regions: [(guestAddress: UInt64, size: UInt64, userAddress: UInt64, descriptor: Int32)] {
        let (split, size) = (UInt64(Self.split), UInt64(Self.size))
        return [
            (Self.guestAddress, split, Self.userAddress, descriptors[0]),
            (Self.guestAddress + split, size - split, Self.userAddress + split, descriptors[1]),
        ]
    }

    /// Gives the mappings back; nobody else may have one then.
    func release() {
        unsafe munmap(parts[0], Self.split)
        unsafe munmap(parts[1], Self.size - Self.split)
        for descriptor in descriptors {
            precondition(fuzzer_is_mapped(descriptor) == 0, "the guest's memory is still mapped")
            close(descriptor)
        }
    }

    // MARK: Memory

    /// Where an offset of the guest's memory is here.
    @unsafe
    func pointer(_ offset: Int) -> UnsafeMutableRawPointer {
        let offset = offset % Self.size
        return unsafe offset < Self.split ? parts[0] + offset : parts[1] + (offset - Self.split)
    }

    func write(_ bytes: [UInt8], at offset: Int) {
        for (index, byte) in bytes.enumerated() {
            unsafe pointer(offset + index).storeBytes(of: byte, as: UInt8.self)
        }
    }

    /// An aligned number; one load or store as far as the processor is concerned.
    func store<Value: FixedWidthInteger>(_ value: Value, at offset: Int) {
        unsafe pointer(offset & ~(MemoryLayout<Value>.size - 1)).storeBytes(of: value, as: Value.self)
    }

    func load<Value: FixedWidthInteger>(_: Value.Type, at offset: Int) -> Value {
        unsafe pointer(offset & ~(MemoryLayout<Value>.size - 1)).load(as: Value.self)
    }

    // MARK: Rings

    static func descriptorArea(_ ring: Int) -> Int { ring * ringBytes }
    static func availableArea(_ ring: Int) -> Int { ring * ringBytes + 0x1000 }
    static func usedArea(_ ring: Int) -> Int { ring * ringBytes + 0x2000 }

    /// The driver begins a ring anew.
    func resetRing(_ ring: Int, _ shape: RingShape) {
        for offset in stride(from: 0, to: Self.ringBytes, by: 8) {
            store(UInt64(0), at: ring * Self.ringBytes + offset)
        }
        shapes[ring] = shape
        (available[ring], wraps[ring]) = (0, true)
        honest?.reset(ring, shape)
    }

    private func store(_ descriptor: FuzzedDescriptor, at offset: Int) {
        store(descriptor.address, at: offset)
        store(descriptor.length, at: offset + 8)
        store(descriptor.flags, at: offset + 12)
        store(descriptor.next, at: offset + 14)
    }

    /// Makes a request of the input's available on a ring.
    func put(_ ring: Int, _ input: inout FuzzInput) {
        if let honest { return put(ring, &input, honest) }
        var chain = makeChain(ring, &input).descriptors
        if input.rarely(4) {
            let length: UInt32? = input.rarely(16) ? input.number() : nil
            chain = [makeIndirect(chain, isPacked: shapes[ring].isPacked, length)]
        }
        if input.rarely(6), !chain.isEmpty { spoil(&chain[input.below(chain.count)], &input) }
        let shape = shapes[ring]
        Trace.note("ring \(ring), \(shape): \(chain)")
        guard chain.count <= shape.size else { return }
        if shape.isPacked { putPacked(ring, chain, &input) } else { putSplit(ring, chain, &input) }
    }

    private func put(_ ring: Int, _ input: inout FuzzInput, _ honest: HonestDriver) {
        guard honest.hasRoom else { return }
        let request = makeChain(ring, &input)
        var chain = request.descriptors
        let room = chain.reduce(0) { $0 + ($1.flags & 2 != 0 ? $1.length : 0) }
        if input.rarely(4), honest.mayBeIndirect, chain.count <= shapes[ring].size {
            chain = [makeIndirect(chain, isPacked: shapes[ring].isPacked, nil)]
        }
        let found = honest.begin(
            ring, descriptors: chain.count, bytes: request.bytes, answer: request.answer, room: room)
        guard let (identifier, places) = found else { return }
        Trace.note("ring \(ring), \(shapes[ring]): \(identifier) is \(chain)")
        if shapes[ring].isPacked {
            for (number, descriptor) in chain.enumerated() {
                storePacked(ring, descriptor, UInt16(identifier), isLast: number + 1 == chain.count, flags: nil)
            }
        } else {
            for (number, (descriptor, place)) in zip(chain, places).enumerated() {
                var descriptor = descriptor
                if number + 1 < places.count {
                    descriptor.next = UInt16(places[number + 1])
                    descriptor.flags |= 1
                }
                store(descriptor, at: Self.descriptorArea(ring) + place * 16)
            }
            makeAvailable(ring, UInt16(identifier), by: 1)
        }
    }

    /// Makes one descriptor something that no driver should.
    private func spoil(_ descriptor: inout FuzzedDescriptor, _ input: inout FuzzInput) {
        switch input.below(6) {
        case 0: descriptor.address = input.number()
        case 1: descriptor.address = Self.guestAddress + UInt64(Self.size) - UInt64(input.byte())
        case 2: descriptor.length = input.number()
        case 3: descriptor.length = UInt32(input.byte())
        case 4: descriptor.flags ^= UInt16(input.byte())
        default: descriptor.flags = input.number()
        }
    }

    private func putSplit(_ ring: Int, _ chain: [FuzzedDescriptor], _ input: inout FuzzInput) {
        let size = shapes[ring].size
        let head = input.below(size)
        for (number, descriptor) in chain.enumerated() {
            var descriptor = descriptor
            descriptor.next = UInt16((head + number + 1) % size)
            if number + 1 < chain.count { descriptor.flags |= 1 }
            if input.rarely(64) { descriptor.next = input.number() }
            store(descriptor, at: Self.descriptorArea(ring) + (head + number) % size * 16)
        }
        let entry: UInt16 = input.rarely(64) ? input.number() : UInt16(head)
        makeAvailable(ring, entry, by: input.rarely(64) ? input.number() : 1)
    }

    private func makeAvailable(_ ring: Int, _ head: UInt16, by count: UInt16) {
        store(head, at: Self.availableArea(ring) + 4 + Int(available[ring]) % shapes[ring].size * 2)
        available[ring] &+= count
        store(available[ring], at: Self.availableArea(ring) + 2)
    }

    private func putPacked(_ ring: Int, _ chain: [FuzzedDescriptor], _ input: inout FuzzInput) {
        let identifier: UInt16 = input.rarely(16) ? input.number() : UInt16(available[ring])
        for (number, descriptor) in chain.enumerated() {
            let flags: UInt16? = input.rarely(64) ? input.number() : nil
            storePacked(ring, descriptor, identifier, isLast: number + 1 == chain.count, flags: flags)
        }
    }

    /// - Parameter flags: Instead of those that it should have.
    private func storePacked(
        _ ring: Int, _ descriptor: FuzzedDescriptor, _ identifier: UInt16, isLast: Bool, flags: UInt16?
    ) {
        var descriptor = descriptor
        descriptor.next = descriptor.flags
        if !isLast { descriptor.next |= 1 }
        // AVAIL is bit 7, USED bit 15.
        descriptor.next = flags ?? descriptor.next & 0x7f7f | (wraps[ring] ? 0x80 : 0x8000)
        // A packed descriptor has its identifier where a split one has its flags.
        descriptor.flags = identifier
        store(descriptor, at: Self.descriptorArea(ring) + Int(available[ring]) * 16)
        available[ring] += 1
        guard Int(available[ring]) >= shapes[ring].size else { return }
        available[ring] = 0
        wraps[ring].toggle()
    }

    /// Moves a chain into a table.
    ///
    /// - Parameter length: Instead of that of the table.
    private func makeIndirect(_ chain: [FuzzedDescriptor], isPacked: Bool, _ length: UInt32?) -> FuzzedDescriptor {
        let table = takeBuffer()
        for (number, descriptor) in chain.enumerated() {
            var descriptor = descriptor
            descriptor.next = UInt16(number + 1)
            if number + 1 < chain.count { descriptor.flags |= 1 }
            if isPacked { (descriptor.flags, descriptor.next) = (0, descriptor.flags) }
            store(descriptor, at: table + 16 * number)
        }
        return FuzzedDescriptor(
            address: Self.guestAddress + UInt64(table), length: length ?? UInt32(16 * chain.count), flags: 4)
    }

    /// 1 KiB of the buffers in turn: more than may be in flight share one, as it is with a hostile guest.
    private func takeBuffer() -> Int {
        if let honest { return honest.takeBuffer() }
        nextBuffer += 1
        return Self.buffers + nextBuffer * 0x400 % (Self.size - Self.buffers)
    }

    // MARK: Requests of virtio-scsi

    private func makeChain(
        _ ring: Int, _ input: inout FuzzInput
    ) -> (descriptors: [FuzzedDescriptor], bytes: [UInt8], answer: Int) {
        let header = takeBuffer(), answer = takeBuffer()
        var readable: [UInt8]
        var writable = 108
        switch ring {
        case 0: readable = control(&input, &writable)
        case 1: (readable, writable) = ([], 16)
        default: readable = command(&input)
        }
        if input.rarely(16), honest == nil { writable = input.below(128) }
        write(readable, at: header)
        var chain: [FuzzedDescriptor] = []
        append(&chain, header, readable.count, flags: 0, &input)
        var isOut = input.flag(), length = [0, 36, 96, 252, 512, 1024, 4096, 8192][input.below(8)]
        // What these commands ask for, mostly: the medium shall have something to do. Offset 19 is the operation code.
        let code = ring > 1 && readable.count > 27 ? readable[19] : 0
        if Self.mediumCodes.contains(code), !input.rarely(4) {
            (isOut, length) = (code != 0x28, Int(readable[27]) * 512)
        }
        let isBoth = code == 0x53
        if ring > 1, isOut || isBoth, length > 0 { append(&chain, dataPlace(&input), length, flags: 0, &input) }
        append(&chain, answer, writable, flags: 2, &input)
        if ring > 1, !isOut || isBoth, length > 0 { append(&chain, dataPlace(&input), length, flags: 2, &input) }
        return (chain, readable, answer)
    }

    private func dataPlace(_ input: inout FuzzInput) -> Int {
        let start = Self.buffers + (honest == nil ? 0 : HonestDriver.buffers * HonestDriver.bufferBytes)
        return start + Int(input.number(UInt16.self)) % (Self.size - start - 8192)
    }

    /// A buffer as one descriptor, or as two.
    private func append(
        _ chain: inout [FuzzedDescriptor], _ offset: Int, _ length: Int, flags: UInt16, _ input: inout FuzzInput
    ) {
        let address = Self.guestAddress + UInt64(offset)
        guard length > 1, input.rarely(4) else {
            if length > 0 { chain.append(FuzzedDescriptor(address: address, length: UInt32(length), flags: flags)) }
            return
        }
        let first = input.below(min(length, 256))
        chain.append(FuzzedDescriptor(address: address, length: UInt32(first), flags: flags))
        chain.append(
            FuzzedDescriptor(address: address + UInt64(first), length: UInt32(length - first), flags: flags))
    }

    private static let luns: [[UInt8]] = [
        [1, 0, 0x40, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0x40, 1, 0, 0, 0, 0], [1, 9, 0, 0, 0, 0, 0, 0],
        [0xc1, 1, 0, 0, 0, 0, 0, 0],
    ]

    private static let operationCodes: [UInt8] = [
        0x28, 0x2a, 0x28, 0x2a, 0x00, 0x12, 0xa0, 0x25, 0x1a, 0x35, 0x2f, 0x42, 0x41, 0x89, 0x5f, 0x5e, 0x1b, 0xa3,
        0x51, 0x53,
    ]
    /// Those of READ, WRITE, XPWRITE and XDWRITEREAD (10): mostly with few blocks in range.
    private static let mediumCodes: [UInt8] = [0x28, 0x2a, 0x51, 0x53]

    private func lun(_ input: inout FuzzInput) -> [UInt8] {
        let choice = input.below(12)
        return choice < 5 ? Self.luns[choice] : choice == 11 ? input.exactly(8) : Self.luns[0]
    }

    /// lun, id, task_attr, prio, crn, cdb.
    private func command(_ input: inout FuzzInput) -> [UInt8] {
        var bytes = lun(&input) + [input.byte(), 0, 0, 0, 0, 0, 0, 0, input.below(5) == 4 ? input.byte() : 0, 0, 0]
        let code = input.rarely(8) ? input.byte() : Self.operationCodes[input.below(Self.operationCodes.count)]
        var cdb = [code] + input.exactly(Self.mediumCodes.contains(code) ? 5 : 9)
        if Self.mediumCodes.contains(code) { cdb = [code, 0, 0, 0, 0, cdb[1] & 0x7f, 0, 0, cdb[2] & 0x0f, 0] }
        bytes += cdb + [UInt8](repeating: 0, count: 32 - cdb.count)
        return input.rarely(16) ? Array(bytes.prefix(input.below(52))) : bytes
    }

    private func control(_ input: inout FuzzInput, _ writable: inout Int) -> [UInt8] {
        let type = input.rarely(16) ? input.byte() : UInt8(input.below(3))
        writable = type == 0 ? 1 : 5
        guard type == 0 else { return [type, 0, 0, 0] + lun(&input) + input.exactly(4) }
        return [0, 0, 0, 0, input.byte() % 10, 0, 0, 0] + lun(&input) + [input.byte(), 0, 0, 0, 0, 0, 0, 0]
    }
}

extension FuzzedGuest: SharedWithMutator {
    /// The places are the areas of the rings, each with more weight at its beginning, and the buffers.
    func exchange(_ mutation: Mutation, _ value: UInt64) -> UInt64 {
        let ring = Int(mutation.place & 3)
        let (start, length) =
            switch mutation.place >> 2 & 7 {
            case 0...2: (Self.descriptorArea(ring), 16 * shapes[ring].size)
            case 3, 4: (Self.availableArea(ring), 6 + 2 * shapes[ring].size)
            case 5: (Self.usedArea(ring), 6 + 8 * shapes[ring].size)
            default: (Self.buffers, Self.size - Self.buffers)
            }
        let offset = start + mutation.offset % length
        switch mutation.width {
        case 1: return UInt64(exchange(UInt8(truncatingIfNeeded: value), at: offset))
        case 2: return UInt64(exchange(UInt16(truncatingIfNeeded: value), at: offset))
        case 4: return UInt64(exchange(UInt32(truncatingIfNeeded: value), at: offset))
        default: return exchange(value, at: offset)
        }
    }

    private func exchange<Value: FixedWidthInteger>(_ value: Value, at offset: Int) -> Value {
        let old = load(Value.self, at: offset)
        store(value, at: offset)
        return old
    }
}
