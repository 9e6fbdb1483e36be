// RingFeatureTests: every combination of ring features under verified reads and writes, and what is peculiar to packed
// rings and to IN_ORDER.
//
// Called by: swift test. Must not know: how the server is written.

import Backstores
import CLinux
import Testing
import VhostUserInitiator
import VirtioFront

/// One way to negotiate rings.
struct RingFeatures: CustomStringConvertible, Sendable {
    let isPacked: Bool, isIndirect: Bool, usesEventIndex: Bool, isInOrder: Bool
    let ringSize: Int
    /// A driver of before virtio 1.0: without VERSION_1, with ANY_LAYOUT.
    var isLegacy = false

    var description: String {
        let names = [
            isPacked ? "packed" : "split", isIndirect ? "indirect" : "direct",
            usesEventIndex ? "event index" : "event flags", isInOrder ? "in order" : "any order",
        ]
        return names.joined(separator: ", ") + ", \(ringSize) descriptors" + (isLegacy ? ", legacy" : "")
    }

    /// All combinations; packed rings also of a length that is no power of two; and what drivers had before virtio 1.0.
    static let all =
        modern
        + [false, true].map {
            RingFeatures(
                isPacked: false, isIndirect: $0, usesEventIndex: $0, isInOrder: false, ringSize: 16, isLegacy: true)
        }

    private static let modern: [RingFeatures] = [false, true].flatMap { packed in
        [false, true].flatMap { indirect in
            [false, true].flatMap { event in
                [false, true].flatMap { order in
                    (packed ? [16, 13] : [16]).map {
                        RingFeatures(
                            isPacked: packed, isIndirect: indirect, usesEventIndex: event, isInOrder: order,
                            ringSize: $0)
                    }
                }
            }
        }
    }

    var options: VhostUserFrontEnd.Options {
        var options = VhostUserFrontEnd.Options()
        options.features &= ~(VirtioFeatureBit.indirectDescriptors | VirtioFeatureBit.eventIndex)
        options.features |= isPacked ? VirtioFeatureBit.ringPacked : 0
        options.features |= isIndirect ? VirtioFeatureBit.indirectDescriptors : 0
        options.features |= usesEventIndex ? VirtioFeatureBit.eventIndex : 0
        options.features |= isInOrder ? VirtioFeatureBit.inOrder : 0
        options.ringSize = ringSize
        if isLegacy { options.features ^= VirtioFeatureBit.version1 | VirtioFeatureBit.anyLayout }
        return options
    }
}

@Suite struct RingFeatureTests {
    /// Numbers that are the same in each run.
    private struct Random: RandomNumberGenerator {
        var state: UInt64
        mutating func next() -> UInt64 {
            state = state &* 6_364_136_223_846_793_005 &+ 1_442_695_040_888_963_407
            return state ^ state >> 29
        }
    }

    private static func layout(_ random: inout Random, _ ring: RingFeatures) -> ChainLayout {
        // At most six descriptors, of lengths that cut headers.
        let isIndirect = ring.isIndirect && Bool.random(using: &random)
        return ChainLayout(
            readable: [Int.random(in: 1...60, using: &random)], writable: [Int.random(in: 1...120, using: &random)],
            isIndirect: isIndirect)
    }

    @Test(arguments: RingFeatures.all)
    func whatWasWrittenIsReadInEveryCombinationOfFeatures(_ ring: RingFeatures) throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: ring.options)
            #expect(frontEnd.features & ring.options.features == ring.options.features & frontEnd.offeredFeatures)
            #expect((frontEnd.features & VirtioFeatureBit.ringPacked != 0) == ring.isPacked)
            #expect((frontEnd.features & VirtioFeatureBit.version1 == 0) == ring.isLegacy)
            var random = Random(state: 7)
            var model: [UInt32: [UInt8]] = [:]
            let queue = frontEnd.requests
            for round in 0..<120 {
                // Blocks of one batch are all different, so that order does not matter.
                let blocks = Array(Set((0..<2).map { _ in UInt32.random(in: 0..<64, using: &random) }))
                let writes = blocks.map { block in
                    var command = write10(unit(0), block: block, pattern(512, seed: UInt8(truncatingIfNeeded: round)))
                    command.layout = Self.layout(&random, ring)
                    model[block] = command.dataOut
                    return queue.enqueue(command)
                }
                queue.publish()
                for write in writes { #expect(try write.wait().isGood) }
                let reads = blocks.map { block in
                    var command = read10(unit(0), block: block, count: 1)
                    command.layout = Self.layout(&random, ring)
                    return (block, queue.submit(command))
                }
                for (block, read) in reads {
                    let result = try read.wait()
                    #expect(result.isGood && result.dataIn == model[block])
                }
            }
            #expect(queue.inFlightCount == 0)
        }
    }

    @Test(arguments: [false, true])
    func inOrderHoldsBackWhatEndsBeforeItsTurn(_ isPacked: Bool) throws {
        let ring = RingFeatures(
            isPacked: isPacked, isIndirect: false, usesEventIndex: true, isInOrder: true, ringSize: 32)
        try withDaemon { daemon in
            var options = ring.options
            options.queues = 4
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            daemon.inject(0, .hold)
            let first = frontEnd.requests.submit(write10(unit(0), block: 1, pattern(512, seed: 1)))
            try daemon.waitForHeld(1)
            let second = frontEnd.requests.submit(write10(unit(1), block: 1, pattern(512, seed: 2)))
            // Another queue shows when the second has been carried out.
            let other = frontEnd.queues[3]
            var tries = 0
            while try other.run(read10(unit(1), block: 1, count: 1)).dataIn != pattern(512, seed: 2), tries < 10_000 {
                tries += 1
            }
            #expect(tries < 10_000)
            #expect(!frontEnd.requests.hasUsed)
            daemon.release()
            #expect(try first.wait().isGood)
            #expect(try second.wait().isGood)
        }
    }

    @Test(arguments: [false, true])
    func anAbortIsAnsweredAlthoughItsCommandWaitsForItsTurn(_ isPacked: Bool) throws {
        let ring = RingFeatures(
            isPacked: isPacked, isIndirect: false, usesEventIndex: false, isInOrder: true, ringSize: 32)
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: ring.options)
            daemon.inject(0, .hold, times: 2)
            var command = write10(unit(0), block: 1, pattern(512, seed: 1))
            command.tag = 1
            let first = frontEnd.requests.submit(command)
            command = write10(unit(0), block: 2, pattern(512, seed: 2))
            command.tag = 2
            let second = frontEnd.requests.submit(command)
            try daemon.waitForHeld(2)
            let abort = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_ABORT_TASK, unit(0), tag: 2)
            try daemon.eventually("the abort to be there", onServers: true) {
                $0.servers[0].statistics.taskManagementFunctions == 1
            }
            daemon.release()
            try frontEnd.control.wait(for: abort)
            #expect(abort.written == [0])
            #expect(try first.wait().isGood)
            #expect(try second.wait().response == UInt8(VIRTIO_SCSI_S_ABORTED))
        }
    }

    @Test func aPackedRingGoesOnWhereItWasStopped() throws {
        let ring = RingFeatures(
            isPacked: true, isIndirect: false, usesEventIndex: true, isInOrder: false, ringSize: 7)
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: ring.options)
            let queue = frontEnd.requests
            for round in 0..<20 {
                #expect(try queue.run(write10(unit(0), block: 1, pattern(512, seed: UInt8(round)))).isGood)
                let base = try frontEnd.stopAnywhere(queue)
                #expect(base == queue.packed?.base)
                try frontEnd.start(queue)
            }
            #expect(try queue.run(read10(unit(0), block: 1, count: 1)).dataIn == pattern(512, seed: 19))
        }
    }

    /// What a driver must not do with a packed ring, and what the ring is out of service for.
    enum PackedAttack: String, CaseIterable, Sendable {
        case address, loop, nestedIndirect, indirectWithNext, indirectOfOddLength, writableBeforeReadable, shortChain

        func attack(_ ring: PackedRing, _ memory: SharedMemory) {
            let address = memory.allocate(4096)
            func add(_ buffers: [PackedBuffer]) { ring.add(buffers, identifier: 3) }
            func buffer(_ length: UInt32, _ flags: UInt16 = 0, at place: UInt64? = nil) -> PackedBuffer {
                PackedBuffer(address: place ?? address, length: length, flags: flags)
            }
            switch self {
            case .address: add([buffer(51, at: 1 << 50), buffer(108, DescriptorFlag.write)])
            case .loop: add((0..<ring.size).map { _ in buffer(16, DescriptorFlag.next) })
            case .nestedIndirect:
                memory.write(
                    WireBytes.of(address) + WireBytes.of(UInt32(16)) + WireBytes.of(UInt16(0), DescriptorFlag.indirect),
                    at: address)
                add([buffer(16, DescriptorFlag.indirect)])
            case .indirectWithNext: add([buffer(16, DescriptorFlag.indirect), buffer(16)])
            case .indirectOfOddLength: add([buffer(17, DescriptorFlag.indirect)])
            case .writableBeforeReadable: add([buffer(108, DescriptorFlag.write), buffer(51)])
            case .shortChain: add([buffer(20)])
            }
        }
    }

    @Test(arguments: PackedAttack.allCases)
    func aPackedRingThatBreaksTheRulesIsTakenOutOfServiceAlone(_ attack: PackedAttack) throws {
        let ring = RingFeatures(
            isPacked: true, isIndirect: true, usesEventIndex: false, isInOrder: false, ringSize: 8)
        try withDaemon { daemon in
            var options = ring.options
            options.queues = 4
            let frontEnd = try VhostUserFrontEnd.started(path: daemon.paths[0], options: options)
            let victim = frontEnd.queues[3]
            attack.attack(try #require(victim.packed), frontEnd.memories[0])
            _ = victim.packed?.publish()
            victim.kick()
            try victim.waitForError()
            // The others go on.
            #expect(try frontEnd.requests.runPastUnitAttentions(testUnitReady(unit(0))).isGood)
            // And the ring itself does when it is set up anew.
            _ = try frontEnd.stopAnywhere(victim)
            victim.reset()
            try frontEnd.start(victim)
            #expect(try victim.runPastUnitAttentions(testUnitReady(unit(0))).isGood)
        }
    }

    @Test func descriptorsMadeAvailableAgainWhileTheyAreInFlightBreakTheRing() throws {
        let ring = RingFeatures(
            isPacked: true, isIndirect: false, usesEventIndex: false, isInOrder: false, ringSize: 8)
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: ring.options)
            _ = try frontEnd.stopAnywhere(frontEnd.requests)
            frontEnd.requests.reset()
            try frontEnd.start(frontEnd.requests)
            daemon.inject(0, .hold, times: 4)
            // Two descriptors each: the ring is full.
            for block: UInt32 in 0..<4 {
                _ = frontEnd.requests.submit(write10(unit(0), block: block, pattern(512, seed: 1)))
            }
            try daemon.waitForHeld(4)
            let packed = try #require(frontEnd.requests.packed)
            let memory = frontEnd.memories[0]
            for index in 0..<8 {
                // As the driver's next lap would have them, and nothing was used.
                let flags = memory.load16(packed.descriptorAddress + UInt64(16 * index + 14))
                memory.store16(
                    flags & 3 | UInt16(1) << UInt16(VRING_PACKED_DESC_F_USED),
                    at: packed.descriptorAddress + UInt64(16 * index + 14))
            }
            frontEnd.requests.kick()
            try frontEnd.requests.waitForError()
            daemon.release()
            _ = try frontEnd.stopAnywhere(frontEnd.requests)
        }
    }
}
