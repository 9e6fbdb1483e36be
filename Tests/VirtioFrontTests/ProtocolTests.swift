// ProtocolTests: the smaller protocol features: status, reset, configuration space, notifications in band, RING_RESET.
//
// Called by: swift test. Must not know: how the server is written.

import CLinux
import CoreTestSupport
import Glibc
import Testing
import VhostUserInitiator
import VirtioFront

@Suite struct ProtocolTests {
    private static let configurable: VhostUserSCSIServer.Options = {
        var options = VhostUserSCSIServer.Options()
        options.offersConfiguration = true
        return options
    }()

    private func options(_ features: UInt64) -> VhostUserFrontEnd.Options {
        var options = VhostUserFrontEnd.Options()
        options.protocolFeatures |= features
        return options
    }

    private func write(_ block: Int) -> SCSICommand { write10(unit0, block: UInt32(block), pattern(512, seed: 3)) }

    @Test func theStatusIsWhatTheDriverWrote() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world, options(VhostUserProtocolBit.status))
        #expect(try frontEnd.askNumber(.getStatus) == 0)
        try frontEnd.tell(.setStatus, WireBytes.of(UInt64(0x0f)))
        #expect(try frontEnd.askNumber(.getStatus) == 0x0f)
    }

    @Test(arguments: [VhostUserRequest.resetDevice, .setStatus])
    func aResetIsAcknowledgedAfterTheLastRequestAndBeginsAnew(_ request: VhostUserRequest) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let reset = request == .resetDevice ? VhostUserProtocolBit.resetDevice : 0
        let frontEnd = try VhostUserFrontEnd.ready(world, options(VhostUserProtocolBit.status | reset))
        try frontEnd.tell(.setStatus, WireBytes.of(UInt64(0x0f)))
        world.hold(true)
        _ = frontEnd.requests.submit(write(1))
        world.wait { $0.backstore.pending.count == 1 }
        let payload = request == .setStatus ? WireBytes.of(UInt64(0)) : []
        try frontEnd.channel.send(request, payload, needReply: true)
        #expect(world.sleeps())
        world.hold(false)
        #expect(try frontEnd.channel.receive().number == 0)
        #expect(try frontEnd.askNumber(.getStatus) == 0)
        for queue in frontEnd.queues { queue.reset() }
        try frontEnd.startQueues()
        // The nexus is a new one.
        let first = try frontEnd.requests.run(SCSICommand(unit0, [0]))
        #expect(first.senseKey == 6)
        #expect(try frontEnd.requests.runPastUnitAttentions(write(2)).isGood)
    }

    @Test func aStatusOfZeroIsNoResetWhereThereIsAMessageForThat() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(
            world, options(VhostUserProtocolBit.status | VhostUserProtocolBit.resetDevice))
        // As QEMU does for a pause.
        for queue in frontEnd.queues { _ = try frontEnd.stop(queue) }
        try frontEnd.tell(.setStatus, WireBytes.of(UInt64(0)))
        try frontEnd.startQueues()
        #expect(try frontEnd.requests.run(write(1)).isGood)
    }

    @Test func theConfigurationSpaceIsOfferedWhereItIsConfigured() throws {
        let plain = try ServerWorld()
        defer { plain.stop() }
        let without = try VhostUserFrontEnd.ready(plain)
        #expect(without.offeredProtocolFeatures & VhostUserProtocolBit.configuration == 0)
        let world = try ServerWorld(requestQueues: 3, options: Self.configurable)
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let bytes = try frontEnd.configuration(36)
        let words = (0..<7).map { WireBytes.read(UInt32.self, bytes, at: 4 * $0) }
        #expect(words == [3, 126, 0xffff, 128, 16, 96, 32])
        #expect(Array(bytes[28...]) == WireBytes.of(UInt16(0), 255) + WireBytes.of(UInt32(16_383)))
    }

    @Test func theSizesOfTheFieldsAreWritable() throws {
        let world = try ServerWorld(options: Self.configurable)
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        func set(_ offset: Int, _ values: [UInt32]) throws {
            let data = values.flatMap { WireBytes.of($0) }
            try frontEnd.tell(
                .setConfiguration, WireBytes.of(UInt32(offset), UInt32(data.count), 0) + data)
        }
        // Not under a queue in service.
        #expect(throws: InitiatorError.self) { try set(20, [18, 16]) }
        _ = try frontEnd.stop(frontEnd.requests)
        for (offset, values) in [(20, [UInt32(253)]), (24, [5]), (24, [261]), (0, [1]), (18, [96]), (24, [32, 0])] {
            #expect(throws: InitiatorError.self) { try set(offset, values) }
        }
        try set(20, [18, 16])
        #expect(Array(try frontEnd.configuration(36)[20..<28]) == WireBytes.of(UInt32(18), 16))
        try frontEnd.start(frontEnd.requests)
        var command = SCSICommand(unit0, [0xff])
        (command.cdbSize, command.senseSize) = (16, 18)
        let result = try frontEnd.requests.run(command)
        #expect(result.sense.count == 18 && result.senseKey == 5 && result.usedLength == 30)
        (command.cdbSize, command.senseSize) = (260, 8)
        _ = try frontEnd.stop(frontEnd.requests)
        try set(20, [8, 260])
        try frontEnd.start(frontEnd.requests)
        let long = try frontEnd.requests.run(command)
        #expect(long.sense.count == 8 && long.senseKey == 5)
    }

    @Test func aRingIsKickedAndAnsweredInBand() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(
            world, options(VhostUserProtocolBit.inbandNotifications | VhostUserProtocolBit.backendRequests))
        var ends: [Int32] = [-1, -1]
        precondition(unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
        defer { for end in ends { close(end) } }
        try frontEnd.tell(.setBackendChannel, descriptors: [ends[1]])
        let queue = frontEnd.requests
        _ = try frontEnd.stop(queue)
        try frontEnd.setUp(queue, base: UInt32(queue.ring.usedIndex))
        try frontEnd.tell(.setVringCall, WireBytes.of(UInt64(2 | 0x100)))
        try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2 | 0x100)))
        #expect(world.sleeps(), "the ring is not polled")
        queue.enableNotification()
        let request = queue.enqueue(write(1))
        _ = queue.ring.publish()
        try frontEnd.tell(.vringKick, WireBytes.of(UInt32(2), 0))
        var entry = pollfd(fd: ends[0], events: Int16(POLLIN), revents: 0)
        #expect(unsafe poll(&entry, 1, 30_000) == 1)
        var message = [UInt8](repeating: 0, count: 64)
        let count = unsafe recv(ends[0], &message, 64, 0)
        // VHOST_USER_BACKEND_VRING_CALL of ring 2.
        #expect(Array(message[..<max(count, 0)]) == WireBytes.of(UInt32(4), 1, 8, 2, 0))
        try queue.collect()
        #expect(try request.result().isGood)
    }

    @Test func oneRingIsResetWhileTheOthersGoOn() throws {
        var offered = VhostUserSCSIServer.Options()
        offered.offersRingReset = true
        let world = try ServerWorld(requestQueues: 2, options: offered)
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        options.queues = 4
        options.features |= VirtioFeatureBit.ringReset
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        #expect(frontEnd.features & VirtioFeatureBit.ringReset != 0)
        #expect(try frontEnd.queues[3].run(write(1)).isGood)
        _ = try frontEnd.stop(frontEnd.queues[3])
        frontEnd.queues[3].reset()
        #expect(try frontEnd.requests.run(write(2)).isGood)
        try frontEnd.start(frontEnd.queues[3])
        #expect(try frontEnd.queues[3].run(write(3)).isGood)
    }

    @Test func whatWasNotNegotiatedIsRefused() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let requests: [(VhostUserRequest, [UInt8])] = [
            (.resetDevice, []), (.setStatus, WireBytes.of(UInt64(0))), (.vringKick, WireBytes.of(UInt32(2), 0)),
            (.setInflight, [UInt8](repeating: 0, count: 20)), (.setLogBase, WireBytes.of(UInt64(4096), 0)),
        ]
        for (request, payload) in requests {
            #expect(throws: InitiatorError.refused(request, code: 1)) { try frontEnd.tell(request, payload) }
        }
        #expect(try frontEnd.requests.run(write(1)).isGood)
    }

    @Test func aSecondSessionOnOneConnectionAddsItsMemoryAnew() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        options.addsRegionsSingly = true
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        // As QEMU does when a device is unplugged and another one takes its socket.
        for queue in frontEnd.queues { _ = try frontEnd.stop(queue) }
        for queue in frontEnd.queues { queue.reset() }
        try frontEnd.negotiate()
        try frontEnd.shareMemory()
        try frontEnd.startQueues()
        #expect(try frontEnd.requests.runPastUnitAttentions(write(1)).isGood)
    }
}
