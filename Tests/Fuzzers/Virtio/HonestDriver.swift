// HonestDriver: the books of a driver that keeps virtio's rules: what it has made available and what must hold of what
// comes back.
//
// Oracles: what is used was available, and is used once, with no more bytes than it had room for; a response is one of
// virtio's; when a task management function is answered, the commands that it has ended are back; in the end all is.
//
// Owns: which descriptors, identifiers and buffers are free. Called by: FuzzedGuest, RingFuzzer. Must not know: how the
// device reads its rings.

final class HonestDriver {
    /// Bytes of a buffer; and how many there are. Headers, answers and indirect tables have buffers of their own, so
    /// that an answer is what the device has written there.
    static let bufferBytes = 0x400, buffers = 96

    private struct Request {
        /// Counts all requests of all rings.
        let number: Int
        /// Those of the ring, or, on a packed one, as many numbers.
        let descriptors: [Int]
        let buffers: [Int]
        /// What the device reads.
        let bytes: [UInt8]
        let answer: Int
        let room: UInt32
    }

    private struct Ring {
        var shape = RingShape(size: 0)
        /// By head, or by buffer identifier.
        var outstanding: [Int: Request] = [:]
        var free: [Int] = []
        /// The next used element.
        var position = 0
        var wrap = true
    }

    let mayBeIndirect: Bool
    /// Used elements may wait for older ones of the ring, while a function is answered on another one.
    private let isInOrder: Bool
    private var rings = Array(repeating: Ring(), count: FuzzedGuest.rings)
    private var freeBuffers = Array(0..<HonestDriver.buffers)
    /// Buffers of the request that is being made.
    private var taken: [Int] = []
    private var count = 0

    init(mayBeIndirect: Bool, isInOrder: Bool) {
        self.mayBeIndirect = mayBeIndirect
        self.isInOrder = isInOrder
    }

    /// The ring begins anew, and what was on it is the driver's again.
    func reset(_ ring: Int, _ shape: RingShape) {
        for request in rings[ring].outstanding.values { freeBuffers += request.buffers }
        rings[ring] = Ring(shape: shape, free: Array(0..<shape.size))
    }

    // MARK: Making available

    /// Whether there are buffers for one more request.
    var hasRoom: Bool { freeBuffers.count >= 3 }

    /// The offset of a buffer.
    func takeBuffer() -> Int {
        taken.append(freeBuffers.removeLast())
        return FuzzedGuest.buffers + taken.last! * Self.bufferBytes
    }

    /// Takes descriptors for a chain with the buffers that were taken since the last one.
    ///
    /// - Returns: The chain's identifier, and the descriptors' places in a split ring; `nil` if there are too few.
    func begin(
        _ ring: Int, descriptors wanted: Int, bytes: [UInt8], answer: Int, room: UInt32
    ) -> (identifier: Int, places: [Int])? {
        defer { taken = [] }
        guard wanted > 0, rings[ring].free.count >= wanted else {
            freeBuffers += taken
            return nil
        }
        let places = Array(rings[ring].free.suffix(wanted))
        rings[ring].free.removeLast(wanted)
        count += 1
        rings[ring].outstanding[places[0]] = Request(
            number: count, descriptors: places, buffers: taken, bytes: bytes, answer: answer, room: room)
        return (places[0], places)
    }

    // MARK: What comes back

    /// Takes what was used, functions first: what they have ended must be there when their answer is.
    func collect(_ guest: FuzzedGuest) {
        let functions = collect(0, guest)
        for ring in 1..<rings.count { _ = collect(ring, guest) }
        for function in functions { check(function, guest) }
    }

    private func collect(_ ring: Int, _ guest: FuzzedGuest) -> [Request] {
        var found: [Request] = []
        while let (identifier, length) = next(ring, guest) {
            guard let request = rings[ring].outstanding.removeValue(forKey: identifier) else {
                preconditionFailure("ring \(ring) uses \(identifier), which is not available")
            }
            precondition(length <= request.room, "more was written than there was room for")
            rings[ring].free += request.descriptors
            freeBuffers += request.buffers
            advance(ring, by: request.descriptors.count)
            if ring > 1 {
                precondition(guest.load(UInt8.self, at: request.answer + 11) <= 11, "a response that virtio has not")
            }
            Trace.note("ring \(ring) gives \(identifier) back with \(length) bytes")
            found.append(request)
        }
        return found
    }

    private func next(_ ring: Int, _ guest: FuzzedGuest) -> (Int, UInt32)? {
        let (shape, position) = (rings[ring].shape, rings[ring].position)
        if shape.isPacked {
            let descriptor = FuzzedGuest.descriptorArea(ring) + 16 * position
            let flags = guest.load(UInt16.self, at: descriptor + 14)
            guard flags & 0x8080 == (rings[ring].wrap ? 0x8080 : 0) else { return nil }
            return (Int(guest.load(UInt16.self, at: descriptor + 12)), guest.load(UInt32.self, at: descriptor + 8))
        }
        guard guest.load(UInt16.self, at: FuzzedGuest.usedArea(ring) + 2) != UInt16(position & 0xffff) else {
            return nil
        }
        let element = FuzzedGuest.usedArea(ring) + 4 + 8 * (position % shape.size)
        return (Int(guest.load(UInt32.self, at: element)), guest.load(UInt32.self, at: element + 4))
    }

    private func advance(_ ring: Int, by descriptors: Int) {
        guard rings[ring].shape.isPacked else {
            rings[ring].position += 1
            return
        }
        rings[ring].position += descriptors
        guard rings[ring].position >= rings[ring].shape.size else { return }
        rings[ring].position -= rings[ring].shape.size
        rings[ring].wrap.toggle()
    }

    /// Virtio 1.2 5.6.6.2: of what a function has ended nothing is with the device any more.
    private func check(_ function: Request, _ guest: FuzzedGuest) {
        let bytes = function.bytes
        guard !isInOrder, bytes.count >= 24, bytes[0] == 0, guest.load(UInt8.self, at: function.answer) == 0 else {
            return
        }
        let unit = Self.unit(bytes[8...])
        for request in rings[2...].flatMap(\.outstanding.values) where request.number < function.number {
            guard request.bytes.count >= 9, let other = Self.unit(request.bytes[...]) else { continue }
            let isEnded =
                switch bytes[4] {
                case 0: other == unit && request.bytes[8] == bytes[16]
                case 1, 3, 5: other == unit
                case 4: true
                default: false
                }
            precondition(!isEnded, "the function \(bytes[4]) is answered before a command that it has ended")
        }
    }

    /// The unit of target 0 that a LUN field names.
    private static func unit(_ lun: ArraySlice<UInt8>) -> UInt8? {
        let lun = Array(lun.prefix(8))
        guard lun[0] == 1, lun[1] == 0, lun[2] & 0xbf == 0, lun[4...].allSatisfy({ $0 == 0 }) else { return nil }
        return lun[3]
    }

    /// Nothing but buffers for events may be with the device.
    func checkEverythingIsBack() {
        for ring in [0, 2, 3] {
            precondition(rings[ring].outstanding.isEmpty, "ring \(ring): requests were never given back")
        }
    }
}
