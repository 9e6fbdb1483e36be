// HostileMessageTests: messages of wrong size, order and content, and a peer that goes away at any byte.
//
// Called by: swift test. Must not know: how the server is written.

import CLinux
import CoreTestSupport
import Glibc
import Testing
import VhostUserInitiator
import VirtioFront

/// The reading end of a pipe whose writing end went to the server: it ends when the server has closed its own.
private struct Tracer {
    let reader: Int32
    let writer: Int32

    init() {
        var ends: [Int32] = [-1, -1]
        precondition(unsafe pipe2(&ends, Int32(O_CLOEXEC)) == 0)
        (reader, writer) = (ends[0], ends[1])
    }

    /// Closes our writing end, and waits for the end of the pipe.
    func waitUntilClosed() -> Bool {
        close(writer)
        defer { close(reader) }
        var entry = pollfd(fd: reader, events: Int16(POLLIN), revents: 0)
        return unsafe poll(&entry, 1, 30_000) == 1 && Int32(entry.revents) & POLLHUP != 0
    }
}

@Suite struct HostileMessageTests {
    /// Messages that are right in size and that the server refuses; it says so when it is asked to.
    // swift-format-ignore
    static let refused: [(VhostUserRequest, [UInt8], String)] = [
        (.setVringNumber, WireBytes.of(UInt32(99), 128), "no ring 99"),
        (.setVringNumber, WireBytes.of(UInt32(2), 0), "a ring of 0"),
        (.setVringNumber, WireBytes.of(UInt32(2), 100), "no power of two"),
        (.setVringNumber, WireBytes.of(UInt32(2), 2048), "a ring too long"),
        (.setVringAddress, WireBytes.of(UInt32(99), 0) + WireBytes.of(UInt64(0), 0, 0, 0), "addresses of no ring"),
        (.setVringBase, WireBytes.of(UInt32(99), 0), "base of no ring"),
        (.setVringEnable, WireBytes.of(UInt32(99), 1), "enable no ring"),
        (.setVringKick, WireBytes.of(UInt64(99 | 0x100)), "kick of no ring"),
        (.setVringKick, WireBytes.of(UInt64(2)), "kick without a descriptor"),
        (.setVringCall, WireBytes.of(UInt64(2)), "call without a descriptor"),
        (.setVringError, WireBytes.of(UInt64(2)), "error without a descriptor"),
        (.setMemoryTable, WireBytes.of(UInt32(1), 0) + WireBytes.of(UInt64(0), 4096, 0, 0), "a region without a descriptor"),
        (.setMemoryTable, WireBytes.of(UInt32(32), 0), "a table shorter than it says"),
        (.addMemoryRegion, WireBytes.of(UInt64(0), 0, 4096, 0, 0), "a region without a descriptor"),
        (.removeMemoryRegion, WireBytes.of(UInt64(0), 0, 4096, 0, 0), "a region that is not there"),
        (.setFeatures, WireBytes.of(UInt64.max), "features not offered"),
        (.setProtocolFeatures, WireBytes.of(UInt64.max), "protocol features not offered"),
        (.number(77), [], "a message that nobody knows"),
        (.number(0), [], "message 0"),
    ]

    private func acknowledging(_ world: ServerWorld) throws -> VhostUserFrontEnd {
        let frontEnd = try VhostUserFrontEnd(path: world.socketPath)
        try frontEnd.negotiate()
        return frontEnd
    }

    @Test(arguments: refused.indices)
    func aMessageThatMakesNoSenseIsRefusedAndTheConnectionLives(_ index: Int) throws {
        let (request, payload, _) = Self.refused[index]
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try acknowledging(world)
        let error = #expect(throws: InitiatorError.self) { try frontEnd.tell(request, payload) }
        guard case .refused = error else {
            Issue.record("\(String(describing: error))")
            return
        }
        #expect(world.faults.count == 1)
        try frontEnd.shareMemory()
        frontEnd.makeQueues()
        try frontEnd.startQueues()
        #expect(try frontEnd.requests.runPastUnitAttentions(SCSICommand(unit0, [0])).isGood)
    }

    @Test(arguments: refused.indices)
    func aRefusalThatNobodyAskedForEndsTheConnection(_ index: Int) throws {
        let (request, payload, _) = Self.refused[index]
        let world = try ServerWorld()
        defer { world.stop() }
        let channel = try VhostUserChannel(path: world.socketPath)
        try channel.send(request, payload)
        try channel.waitForClose()
        #expect(!world.faults.isEmpty)
    }

    @Test(arguments: 1...18)
    func aPayloadOfWrongSizeEndsTheConnection(_ number: Int) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let channel = try VhostUserChannel(path: world.socketPath)
        try channel.send(.number(UInt32(number)), [UInt8](repeating: 0, count: 7 + (number == 7 ? 20 : 0)))
        try channel.waitForClose()
        #expect(world.faults.contains { $0.contains("payload") })
    }

    @Test(arguments: [[0, 0], [2, 0], [5, 0], [1, 0xffff_ffff], [1, 1 << 20]] as [[UInt32]])
    func aHeaderOfAnotherVersionOrSizeEndsTheConnection(_ fields: [UInt32]) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let channel = try VhostUserChannel(path: world.socketPath)
        try channel.sendRaw(WireBytes.of(1, fields[0], fields[1]))
        try channel.waitForClose()
    }

    @Test func descriptorsThatAMessageHasNoUseForAreClosed() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try acknowledging(world)
        let tracer = Tracer()
        try frontEnd.tell(.setVringBase, WireBytes.of(UInt32(2), 0), descriptors: [tracer.writer, tracer.writer])
        #expect(tracer.waitUntilClosed())
    }

    @Test func descriptorsOfARefusedMessageAreClosed() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try acknowledging(world)
        let tracer = Tracer()
        #expect(throws: InitiatorError.self) {
            try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(99)), descriptors: [tracer.writer])
        }
        #expect(tracer.waitUntilClosed())
    }

    @Test func moreDescriptorsThanAMessageCanHaveAreClosed() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let channel = try VhostUserChannel(path: world.socketPath)
        let tracer = Tracer()
        try channel.send(
            .setMemoryTable, WireBytes.of(UInt32(100), 0), descriptors: Array(repeating: tracer.writer, count: 100))
        try channel.waitForClose()
        #expect(tracer.waitUntilClosed())
    }

    @Test func descriptorsOfAMessageThatNeverEndsAreClosed() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let channel = try VhostUserChannel(path: world.socketPath)
        let tracer = Tracer()
        let bytes = VhostUserChannel.message(.setVringKick, WireBytes.of(UInt64(2)))
        try channel.sendRaw(Array(bytes[..<5]), descriptors: [tracer.writer])
        channel.shutDown()
        #expect(tracer.waitUntilClosed())
    }

    @Test func aKickDescriptorThatIsAFileIsRefused() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try acknowledging(world)
        let file = unsafe open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0o600)
        defer { close(file) }
        let error = #expect(throws: InitiatorError.self) {
            try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2)), descriptors: [file])
        }
        guard case .refused = error else {
            Issue.record("\(String(describing: error))")
            return
        }
    }

    @Test func aKickDescriptorThatIsAClosedPipeIsRefused() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try acknowledging(world)
        var ends: [Int32] = [-1, -1]
        precondition(unsafe pipe2(&ends, Int32(O_CLOEXEC)) == 0)
        close(ends[1])
        #expect(throws: InitiatorError.refused(.setVringKick, code: 1)) {
            try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2)), descriptors: [ends[0]])
        }
        close(ends[0])
        #expect(world.sleeps())
        #expect(world.faults.contains { $0.contains("is no eventfd") })
    }

    @Test(
        arguments: [
            (0x4000_0000, 0, 0x7000_0000, 0), (.max - 100, 4096, 0x7000_0000, 0), (0x4000_0000, 4096, .max - 100, 0),
            (0x4000_0000, 4096, 0x7000_0000, .max - 100), (0x4000_0000, 1 << 40, 0x7000_0000, 0),
            (0x4000_0000, 4096, 0x7000_0000, 1 << 20), (0x4000_0000, .max, 0x7000_0000, 0),
        ] as [(UInt64, UInt64, UInt64, UInt64)])
    func aRegionThatDoesNotFitItsFileOrItsAddressesIsRefused(_ region: (UInt64, UInt64, UInt64, UInt64)) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try acknowledging(world)
        let memory = try SharedMemory(size: 1 << 20, guestAddress: 0x4000_0000)
        let error = #expect(throws: InitiatorError.self) {
            try frontEnd.tell(
                .addMemoryRegion, WireBytes.of(UInt64(0), region.0, region.1, region.2, region.3),
                descriptors: [memory.descriptor])
        }
        guard case .refused = error else {
            Issue.record("\(String(describing: error))")
            return
        }
        #expect(try mappings(of: memory) == 1)
    }

    @Test func overlappingRegionsAreRefusedAndTheOldTableStays() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let memory = try SharedMemory(size: 1 << 20, guestAddress: frontEnd.memories[0].guestAddress + 4096)
        #expect(throws: InitiatorError.self) { try frontEnd.addRegion(memory) }
        #expect(try mappings(of: memory) == 1)
        #expect(try frontEnd.requests.run(SCSICommand(unit0, [0])).isGood)
    }

    @Test func aPeerThatSendsByteByByteIsServed() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let channel = try VhostUserChannel(path: world.socketPath)
        for byte in VhostUserChannel.message(.getFeatures, []) { try channel.sendRaw([byte]) }
        #expect(try channel.receive().number != nil)
    }

    @Test func aPeerThatDisconnectsAtAnyByteLeavesNothingBehind() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        // What a front-end says in its life, as it said it.
        let whole = try VhostUserFrontEnd.ready(world)
        let sent = whole.channel.sent
        whole.disconnect()
        for (number, message) in sent.enumerated() {
            for length in Set([1, 11, 12, 13, message.bytes.count - 1]) where length < message.bytes.count {
                world.wait { !$0.server.isConnected }
                let channel = try VhostUserChannel(path: world.socketPath)
                for earlier in sent[..<number] {
                    try channel.sendRaw(earlier.bytes, descriptors: earlier.descriptors)
                    if earlier.awaitedReply { _ = try channel.receive() }
                }
                try channel.sendRaw(Array(message.bytes[..<length]), descriptors: message.descriptors)
                channel.shutDown()
                world.wait { !$0.server.isConnected }
            }
        }
        world.onReactor {}
        #expect(try mappings(of: whole.memories[0]) == 1)
        let next = try VhostUserFrontEnd.ready(world)
        #expect(try next.requests.run(SCSICommand(unit0, [0])).isGood)
    }

    @Test func aSecondFrontEndIsTurnedAwayAndTheFirstGoesOn() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let first = try VhostUserFrontEnd.ready(world)
        let second = try VhostUserChannel(path: world.socketPath)
        try second.waitForClose()
        #expect(try first.requests.run(SCSICommand(unit0, [0])).isGood)
    }

    @Test func spdksOrderOfMessagesWorks() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        // GET_FEATURES is its barrier: no acknowledgements; rings are enabled before they are described.
        options.protocolFeatures = VhostUserProtocolBit.multiqueue
        options.enablesBeforeSetup = true
        let frontEnd = try VhostUserFrontEnd.started(path: world.socketPath, options: options)
        _ = try frontEnd.askNumber(.getFeatures)
        for target in 0..<64 {
            let address = VirtioSCSIAddress.peripheral(target: UInt8(target), lun: 0)
            let result = try frontEnd.requests.runPastUnitAttentions(SCSICommand(address, CDB.inquiry(), dataIn: 255))
            #expect(result.response == (target == 0 ? 0 : UInt8(VIRTIO_SCSI_S_BAD_TARGET)))
        }
        for queue in frontEnd.queues { _ = try frontEnd.stop(queue) }
        try frontEnd.tell(.setMemoryTable, WireBytes.of(UInt32(0), 0))
        _ = try frontEnd.askNumber(.getFeatures)
        #expect(try mappings(of: frontEnd.memories[0]) == 1)
    }
}
