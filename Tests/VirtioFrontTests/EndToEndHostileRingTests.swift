// EndToEndHostileRingTests: what a driver may write into rings and buffers, and that it harms nobody but itself.
//
// Called by: swift test. Must not know: the server's inside.

import Backstores
import CLinux
import Testing
import VhostUserInitiator

/// A ring that a driver has spoilt, and how.
struct SpoiltRing: CustomTestStringConvertible, Sendable {
    let testDescription: String
    /// Writes into the ring and the memory, and publishes.
    let spoil: @Sendable (SplitRing, SharedMemory) -> Void

    /// Whether it spoils what only the request queues have.
    var isAboutCommands: Bool { testDescription.contains("no response") || testDescription.contains("too short") }

    private init(_ name: String, _ spoil: @escaping @Sendable (SplitRing, SharedMemory) -> Void) {
        testDescription = name
        self.spoil = spoil
    }

    /// Descriptor 0 and 1 are a TEST UNIT READY; `change` spoils them.
    private static func command(_ name: String, _ change: @escaping @Sendable (SplitRing, SharedMemory) -> Void) -> Self
    {
        Self(name) { ring, memory in
            let header = memory.allocate(64)
            let response = memory.allocate(128)
            memory.write(testUnitReady(unit(0)).header, at: header)
            ring.setDescriptor(0, address: header, length: 51, flags: DescriptorFlag.next, next: 1)
            ring.setDescriptor(1, address: response, length: 108, flags: DescriptorFlag.write, next: 0)
            change(ring, memory)
            ring.makeAvailable(0)
            _ = ring.publish()
        }
    }

    private static func indirect(
        _ name: String, length: UInt32, address: UInt64? = nil, flags: UInt16 = 0,
        _ fill: @escaping @Sendable (UInt64, SharedMemory) -> Void = { _, _ in }
    ) -> Self {
        command(name) { ring, memory in
            let table = memory.allocate(4096)
            memory.fill(4096, with: 0, at: table)
            fill(table, memory)
            ring.setDescriptor(
                0, address: address ?? table, length: length, flags: DescriptorFlag.indirect | flags, next: 1)
        }
    }

    private static func entry(_ address: UInt64, _ length: UInt32, _ flags: UInt16, _ next: UInt16) -> [UInt8] {
        WireBytes.of(address) + WireBytes.of(length) + WireBytes.of(flags, next)
    }

    static let outside: UInt64 = 0x7000_0000_0000

    static let all: [SpoiltRing] = [
        Self("a head outside of the table") { ring, _ in
            ring.makeAvailable(UInt16(ring.size))
            _ = ring.publish()
        },
        Self("the greatest head") { ring, _ in
            ring.makeAvailable(0xffff)
            _ = ring.publish()
        },
        Self("an available index too far ahead") { ring, _ in
            ring.forceAvailableIndex(ring.availableIndex &+ UInt16(ring.size) &+ 1)
        },
        Self("an available index behind") { ring, _ in ring.forceAvailableIndex(ring.availableIndex &- 1) },
        command("a loop of one descriptor") { ring, memory in
            ring.setDescriptor(0, address: memory.guestAddress, length: 51, flags: DescriptorFlag.next, next: 0)
        },
        command("a loop of two descriptors") { ring, memory in
            ring.setDescriptor(
                1, address: memory.guestAddress, length: 16, flags: DescriptorFlag.write | DescriptorFlag.next, next: 1)
        },
        command("a loop of empty descriptors") { ring, memory in
            ring.setDescriptor(0, address: memory.guestAddress, length: 0, flags: DescriptorFlag.next, next: 0)
        },
        command("a next outside of the table") { ring, memory in
            ring.setDescriptor(
                0, address: memory.guestAddress, length: 51, flags: DescriptorFlag.next, next: UInt16(ring.size))
        },
        command("a header outside of memory") { ring, _ in
            ring.setDescriptor(0, address: outside, length: 51, flags: DescriptorFlag.next, next: 1)
        },
        command("a header at address 0") { ring, _ in
            ring.setDescriptor(0, address: 0, length: 51, flags: DescriptorFlag.next, next: 1)
        },
        command("a header that leaves memory") { ring, memory in
            ring.setDescriptor(
                0, address: memory.guestAddress + UInt64(memory.size) - 50, length: 51, flags: DescriptorFlag.next,
                next: 1)
        },
        command("a response outside of memory") { ring, _ in
            ring.setDescriptor(1, address: outside, length: 108, flags: DescriptorFlag.write, next: 0)
        },
        command("a response that leaves memory") { ring, memory in
            ring.setDescriptor(
                1, address: memory.guestAddress + UInt64(memory.size) - 107, length: 108, flags: DescriptorFlag.write,
                next: 0)
        },
        command("an address whose end wraps around") { ring, _ in
            ring.setDescriptor(1, address: UInt64.max - 50, length: 108, flags: DescriptorFlag.write, next: 0)
        },
        command("the longest length") { ring, memory in
            ring.setDescriptor(
                1, address: memory.guestAddress, length: UInt32.max, flags: DescriptorFlag.write, next: 0)
        },
        command("no response") { ring, memory in
            ring.setDescriptor(0, address: memory.guestAddress, length: 51, flags: 0, next: 0)
        },
        command("a response that is too short") { ring, memory in
            ring.setDescriptor(1, address: memory.guestAddress, length: 107, flags: DescriptorFlag.write, next: 0)
        },
        command("a readable descriptor behind a writable one") { ring, memory in
            ring.setDescriptor(
                0, address: memory.guestAddress, length: 108, flags: DescriptorFlag.write | DescriptorFlag.next,
                next: 1)
            ring.setDescriptor(1, address: memory.guestAddress, length: 51, flags: 0, next: 0)
        },
        indirect("an empty indirect table", length: 0),
        indirect("an indirect table of no whole descriptors", length: 31),
        indirect("an indirect table outside of memory", length: 32, address: outside),
        indirect("an indirect table at a wrapping address", length: 32, address: UInt64.max - 15),
        indirect("an indirect table with a next descriptor", length: 32, flags: DescriptorFlag.next) { table, memory in
            memory.write(entry(memory.guestAddress, 51, 0, 0), at: table)
        },
        indirect("a nested indirect table", length: 32) { table, memory in
            memory.write(entry(table, 32, DescriptorFlag.indirect, 0), at: table)
        },
        indirect("a loop in an indirect table", length: 32) { table, memory in
            memory.write(entry(memory.guestAddress, 51, DescriptorFlag.next, 1), at: table)
            memory.write(entry(memory.guestAddress, 16, DescriptorFlag.next, 0), at: table + 16)
        },
        indirect("a next outside of an indirect table", length: 32) { table, memory in
            memory.write(entry(memory.guestAddress, 51, DescriptorFlag.next, 2), at: table)
        },
        indirect("an indirect table longer than memory", length: 0xffff_fff0),
        indirect("an indirect chain longer than the ring", length: 4096) { table, memory in
            for index in 0..<256 {
                let bytes = entry(memory.guestAddress, 1, index < 255 ? DescriptorFlag.next : 0, UInt16(index + 1))
                memory.write(bytes, at: table + UInt64(16 * index))
            }
        },
    ]
}

@Suite
struct EndToEndHostileRingTests {
    /// The spoilt ring is out of service and the driver learns of it; the guest's other queues, another guest and the
    /// daemon go on; after a reset the ring serves again.
    @Test(arguments: SpoiltRing.all, [2, 0])
    func aSpoiltRingStopsAloneAndComesBackAfterAReset(spoilt: SpoiltRing, index: Int) throws {
        // What these send is no request of the control queue.
        if index == 0, spoilt.isAboutCommands { return }
        try withDaemon(sockets: 2) { daemon in
            var options = VhostUserFrontEnd.Options()
            options.queues = 4
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            let other = try VhostUserFrontEnd.ready(daemon, socket: 1)
            let queue = frontEnd.queues[index]
            spoilt.spoil(queue.ring, frontEnd.memories[0])
            queue.kick()
            try queue.waitForError()
            #expect(!queue.ring.hasUsed)
            #expect(try frontEnd.queues[3].run(read10(unit(0), block: 1, count: 1)).isGood)
            #expect(try other.requests.run(read10(unit(0), block: 1, count: 1)).isGood)
            #expect(daemon.complaints(0).count == 1 && daemon.complaints(1).isEmpty)

            _ = try frontEnd.stop(queue)
            queue.reset()
            try frontEnd.start(queue)
            if index == 0 {
                #expect(try queue.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(0)) == 0)
            } else {
                #expect(try queue.run(read10(unit(0), block: 1, count: 1)).isGood)
            }
        }
    }

    @Test
    func aChainThatIsInFlightCannotBeMadeAvailableAgain() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            daemon.inject(0, .hold)
            let read = frontEnd.requests.submit(read10(unit(0), block: 0, count: 1))
            try daemon.waitForHeld(1)
            frontEnd.requests.ring.makeAvailable(read.chain.head)
            frontEnd.requests.publish()
            frontEnd.requests.kick()
            try frontEnd.requests.waitForError()
            daemon.release()
            #expect(try read.wait().isGood, "what was in flight is still answered")
        }
    }

    @Test
    func indirectTablesWithoutTheFeatureAreRefused() throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.features &= ~VirtioFeatureBit.indirectDescriptors
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            var command = testUnitReady(unit(0))
            command.layout.isIndirect = true
            _ = frontEnd.requests.submit(command)
            try frontEnd.requests.waitForError()
        }
    }

    @Test(arguments: [0, 1, 18, 50])
    func aTruncatedHeaderIsAFailureOfThatRequest(length: Int) throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let bytes = Array(testUnitReady(unit(0)).header[..<length])
            let chain = frontEnd.requests.submit(readable: bytes, writable: 108)
            try frontEnd.requests.wait(for: chain)
            #expect(chain.written[11] == UInt8(VIRTIO_SCSI_S_FAILURE))
            #expect(try frontEnd.requests.run(testUnitReady(unit(0))).isGood)
        }
    }

    @Test(arguments: [4, 7, 23])
    func aTruncatedTaskManagementRequestIsAFailureOfThatRequest(length: Int) throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let control = frontEnd.control
            let bytes = [UInt8](repeating: 0, count: length)
            let chain = control.submit(readable: bytes, writable: 1)
            try control.wait(for: chain)
            #expect(chain.written == [UInt8(VIRTIO_SCSI_S_FAILURE)])
            #expect(try control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(0)) == 0)
        }
    }

    @Test
    func anUnknownControlRequestComesBackUnanswered() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let control = frontEnd.control
            let chain = control.submit(
                readable: WireBytes.of(UInt32(99)) + [UInt8](repeating: 0, count: 20), writable: 8)
            try control.wait(for: chain)
            #expect(chain.usedLength == 0)
            #expect(try control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(0)) == 0)
        }
    }

    /// Header, CDB and LUN of any bytes: every request is answered with something, and the daemon lives.
    @Test(arguments: UInt64(1)...4)
    func anyBytesAsRequestsAreAnswered(seed: UInt64) throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            var random = seed &* 0x9e37_79b9_7f4a_7c15
            func next() -> UInt64 {
                random ^= random << 13
                random ^= random >> 7
                random ^= random << 17
                return random
            }
            for _ in 0..<2000 {
                var header = (0..<51).map { _ in UInt8(truncatingIfNeeded: next()) }
                // Most go to a logical unit that is there.
                if next() % 4 != 0 { header.replaceSubrange(0..<8, with: unit(UInt16(next() % 2)).bytes) }
                let dataOut = [UInt8](repeating: 0x5a, count: Int(next() % 3) * 300)
                let dataIn = Int(next() % 3) * 300
                let isIndirect = next() % 2 == 0
                let chain = frontEnd.requests.submit(
                    readable: header + dataOut, writable: 108 + dataIn,
                    layout: ChainLayout(
                        readable: [Int(next() % 60), Int(next() % 200)],
                        writable: [Int(next() % 120), Int(next() % 200)].filter { $0 > 0 }, isIndirect: isIndirect))
                try frontEnd.requests.wait(for: chain)
                #expect(chain.written[11] <= 12)
            }
            #expect(daemon.complaints().isEmpty)
        }
    }
}
