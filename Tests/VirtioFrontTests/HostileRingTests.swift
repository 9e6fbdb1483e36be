// HostileRingTests: what no driver may write into a ring. The ring goes out of service with a message and its error
// eventfd; the guest's other rings and other guests go on.
//
// Called by: swift test. Must not know: how the server is written.

import CLinux
import CoreTestSupport
import Testing
import VhostUserInitiator
import VirtioFront

/// One way to break a ring: writes into the ring and the memory of a front-end, whose buffers are at `memory`.
struct RingAttack: CustomTestStringConvertible, Sendable {
    let testDescription: String
    let attack: @Sendable (SplitRing, SharedMemory) -> Void

    init(_ testDescription: String, _ attack: @escaping @Sendable (SplitRing, SharedMemory) -> Void) {
        self.testDescription = testDescription
        self.attack = attack
    }

    /// One chain whose descriptors are given as (address, length, flags, next).
    static func chain(
        _ name: String, _ descriptors: @escaping @Sendable (SharedMemory) -> [(UInt64, UInt32, UInt16, UInt16)]
    ) -> Self {
        Self(name) { ring, memory in
            for (index, descriptor) in descriptors(memory).enumerated() {
                ring.setDescriptor(
                    index, address: descriptor.0, length: descriptor.1, flags: descriptor.2, next: descriptor.3)
            }
            ring.makeAvailable(0)
        }
    }

    /// One chain that is an indirect table.
    static func table(
        _ name: String, length: UInt32? = nil, flags: UInt16 = 0,
        _ descriptors: @escaping @Sendable (SharedMemory) -> [(UInt64, UInt32, UInt16, UInt16)]
    ) -> Self {
        Self(name) { ring, memory in
            let entries = descriptors(memory)
            let table = memory.allocate(16 * max(entries.count, 1))
            for (index, entry) in entries.enumerated() {
                memory.write(
                    WireBytes.of(entry.0) + WireBytes.of(entry.1) + WireBytes.of(entry.2, entry.3),
                    at: table + UInt64(16 * index))
            }
            ring.setDescriptor(
                0, address: table, length: length ?? UInt32(16 * entries.count),
                flags: DescriptorFlag.indirect | flags, next: 1)
            ring.setDescriptor(1, address: memory.guestAddress, length: 512, flags: DescriptorFlag.write, next: 0)
            ring.makeAvailable(0)
        }
    }

    private static let next = DescriptorFlag.next
    private static let write = DescriptorFlag.write
    private static let indirect = DescriptorFlag.indirect

    static let all: [RingAttack] = [
        Self("available index jumps over the queue") { ring, _ in ring.forceAvailableIndex(ring.availableIndex &+ 129)
        },
        Self("available index goes back") { ring, _ in ring.forceAvailableIndex(ring.availableIndex &- 1) },
        Self("head index outside of the table") { ring, _ in ring.makeAvailable(128) },
        Self("head index 65535") { ring, _ in ring.makeAvailable(65535) },
        .chain("next outside of the table") { [($0.guestAddress, 64, next, 128)] },
        .chain("loop of one") { [($0.guestAddress, 64, next, 0)] },
        .chain("loop of two") { [($0.guestAddress, 64, next, 1), ($0.guestAddress, 64, next, 0)] },
        .chain("loop of empty descriptors") { [($0.guestAddress, 0, next, 1), ($0.guestAddress, 0, next, 0)] },
        .chain("address outside of memory") { _ in [(0xffff_0000_0000, 64, 0, 0)] },
        .chain("address 0") { _ in [(0, 64, 0, 0)] },
        .chain("end outside of memory") { [($0.guestAddress + UInt64($0.size) - 10, 64, 0, 0)] },
        .chain("length 4 GiB") { [($0.guestAddress, .max, 0, 0)] },
        .chain("end beyond 64 bits") { _ in [(.max - 10, 64, 0, 0)] },
        .chain("readable behind writable") {
            [($0.guestAddress, 108, write | next, 1), ($0.guestAddress + 4096, 51, 0, 0)]
        },
        .chain("no response") { [($0.guestAddress, 51, 0, 0)] },
        .chain("response too short") {
            [($0.guestAddress, 51, next, 1), ($0.guestAddress + 4096, 107, write, 0)]
        },
        .chain("one empty descriptor") { [($0.guestAddress, 0, 0, 0)] },
        .table("indirect table of no length", length: 0) { _ in [] },
        .table("indirect table not a multiple of 16", length: 24) { [($0.guestAddress, 64, 0, 0)] },
        .table("indirect in indirect") { [($0.guestAddress, 16, indirect, 0)] },
        .table("indirect and next", flags: next) { [($0.guestAddress, 64, 0, 0)] },
        .table("indirect loop") { [($0.guestAddress, 64, next, 1), ($0.guestAddress, 64, next, 0)] },
        .table("indirect next outside of its table") { [($0.guestAddress, 64, next, 1)] },
        .table("indirect table outside of memory", length: 16 << 20) { [($0.guestAddress, 64, 0, 0)] },
        .table("indirect table of 65535 empty descriptors", length: 16 * 65535) {
            _ in (0..<65535).map { (0x4000_0000, 0, next, UInt16(truncatingIfNeeded: $0 + 1)) }
        },
    ]
}

@Suite struct HostileRingTests {
    private func check(_ world: ServerWorld, _ queue: Int, _ attack: RingAttack) throws {
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let victim = frontEnd.queues[queue]
        let base = victim.ring.availableIndex
        attack.attack(victim.ring, frontEnd.memories[0])
        _ = victim.ring.publish()
        victim.kick()
        try victim.waitForError()
        #expect(!victim.ring.hasUsed)
        #expect(world.faults.contains { $0.hasPrefix("Ring \(queue) is out of service") })
        #expect(world.sleeps())
        // The other rings of the same guest go on.
        if queue == 2 {
            #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit0) == 0)
        } else {
            #expect(try frontEnd.requests.runPastUnitAttentions(SCSICommand(unit0, [0])).isGood)
        }
        // The driver resets the device; the ring works again. What broke it was not taken.
        #expect(try frontEnd.stop(victim) == base)
        victim.reset()
        try frontEnd.start(victim)
        _ = try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit0)
        #expect(try frontEnd.requests.runPastUnitAttentions(SCSICommand(unit0, [0])).isGood)
    }

    @Test(arguments: RingAttack.all)
    func aBrokenRequestRingIsTakenOutOfService(_ attack: RingAttack) throws {
        try check(ServerWorld(), 2, attack)
    }

    // A control request's response may be shorter, or none if its type is unknown.
    @Test(arguments: RingAttack.all.filter { !["no response", "response too short"].contains($0.testDescription) })
    func aBrokenControlRingIsTakenOutOfService(_ attack: RingAttack) throws {
        try check(ServerWorld(), 0, attack)
    }

    @Test func aHeadMadeAvailableTwiceBreaksTheRingAndTheFirstIsStillAnswered() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        let first = frontEnd.requests.submit(SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512))
        world.wait { $0.backstore.pending.count == 1 }
        frontEnd.requests.ring.makeAvailable(first.chain.head)
        frontEnd.requests.publish()
        try frontEnd.requests.waitForError()
        world.hold(false)
        #expect(try first.wait().isGood)
    }

    @Test func anIndirectTableWithoutTheFeatureBreaksTheRing() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        options.features &= ~VirtioFeatureBit.indirectDescriptors
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        var command = SCSICommand(unit0, [0])
        command.layout.isIndirect = true
        _ = frontEnd.requests.submit(command)
        try frontEnd.requests.waitForError()
    }

    @Test func anEventBufferThatIsTooShortBreaksTheEventRingOnly() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        _ = frontEnd.events.submit(readable: [], writable: 15)
        world.perform { $0.addUnit(at: 1) }
        try frontEnd.events.waitForError()
        #expect(try frontEnd.requests.runPastUnitAttentions(SCSICommand(unit0, [0])).isGood)
    }

    @Test func aRingOutsideOfTheSharedMemoryIsNotServedUntilItsAddressIsRight() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let queue = frontEnd.requests
        _ = try frontEnd.stop(queue)
        try frontEnd.tell(.setVringAddress, WireBytes.of(UInt32(2), 0) + WireBytes.of(UInt64(16), 16, 16, 0))
        try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2)), descriptors: [queue.kickDescriptor])
        try queue.waitForError()
        try frontEnd.start(queue)
        #expect(try queue.run(SCSICommand(unit0, [0])).isGood)
    }
}
