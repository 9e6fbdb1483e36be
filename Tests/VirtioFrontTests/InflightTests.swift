// InflightTests: what was in flight when a connection ended is answered at the next one, once and in order; and the
// notes of it may hold anything.
//
// Called by: swift test. Must not know: how the server is written.

import CBackstore
import CLinux
import Glibc
import CoreTestSupport
import Testing
import VhostUserInitiator
import VirtioFront

@Suite struct InflightTests {
    private func options(isPacked: Bool, isInOrder: Bool = false) -> VhostUserFrontEnd.Options {
        var options = VhostUserFrontEnd.Options()
        options.ringSize = 32
        options.protocolFeatures |= VhostUserProtocolBit.inflightSharedMemory
        if isPacked { options.features |= VirtioFeatureBit.ringPacked }
        if isInOrder { options.features |= VirtioFeatureBit.inOrder }
        return options
    }

    private func write(_ block: Int) -> SCSICommand {
        SCSICommand(unit0, CDB.write(.ten, UInt64(block), 1), dataOut: pattern(512, seed: UInt8(block)))
    }

    @Test(arguments: [(false, false), (true, false), (false, true), (true, true)])
    func whatWasInFlightIsSentAgainInOrderAndAnsweredOnce(_ isPacked: Bool, _ isInOrder: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world, options(isPacked: isPacked, isInOrder: isInOrder))
        for round in 0..<5 {
            // Some requests before, so that positions and entries differ from round to round.
            for block in 0..<round * 3 { #expect(try frontEnd.requests.run(write(block)).isGood) }
            world.hold(true)
            let blocks = [7, 3, 9, 1, 5].map { $0 + round }
            let requests = blocks.map { frontEnd.requests.submit(write($0)) }
            world.wait { $0.backstore.pending.count == 5 }
            let before = world.perform { $0.backstore.accepted.count }
            frontEnd.disconnect()
            world.wait { !$0.server.isConnected }
            // What the old connection had sent ends first, without a word to the guest.
            world.hold(false)
            try frontEnd.reconnect()
            for request in requests { #expect(try request.wait().response == 0) }
            #expect(frontEnd.requests.inFlightCount == 0)
            let again = world.perform { objects in
                objects.backstore.accepted.dropFirst(before).filter { $0.operation == .write }.map {
                    Int($0.offset / 512)
                }
            }
            // A unit attention of the lost nexus takes the first one's place.
            #expect(again == blocks || again == Array(blocks.dropFirst()))
            _ = try frontEnd.requests.runPastUnitAttentions(SCSICommand(unit0, [0]))
        }
    }

    @Test(arguments: [false, true])
    func whatWouldDoSomethingElseTheSecondTimeIsNotDoneAgain(_ isPacked: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = options(isPacked: isPacked)
        options.features |= VirtioFeatureBit.inOut
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        let old = pattern(512, seed: 1), new = pattern(512, seed: 2)
        world.perform { objects in for block: UInt64 in 1..<4 { objects.backstore.setBlock(block, old) } }
        world.hold(true)
        var reservation = SCSICommand(
            unit0, CDB.persistentReserveOut(.register), dataOut: ReservationParameters(0, 1).bytes)
        reservation.attribute = UInt8(VIRTIO_SCSI_S_ORDERED)
        let commands = [
            // Takes the unit attention condition of the new nexus.
            SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512),
            SCSICommand(unit0, CDB.xdWriteRead(1, 1), dataOut: new, dataIn: 512),
            SCSICommand(unit0, CDB.xpWrite(2, 1), dataOut: new),
            SCSICommand(unit0, [0x89, 0] + CDB.bytes(3, 8) + [0, 0, 0, 1, 0, 0], dataOut: old + new),
            SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512),
            // Waits for all of them.
            reservation,
        ]
        let requests = commands.map { frontEnd.requests.submit($0) }
        world.wait { $0.backstore.pending.count == 5 }
        frontEnd.disconnect()
        world.wait { !$0.server.isConnected }
        // The old connection's commands end where they are, at their first step.
        world.hold(false)
        try frontEnd.reconnect()
        let results = try requests.map { try $0.wait() }
        #expect(results[0].senseKey == 6)
        for result in results[1..<4] + results[5...] {
            #expect(result.response == 0 && result.senseKey == 0xb && result.additionalSense == 0x0800)
        }
        #expect(results[4].isGood)
        let blocks = world.perform { objects in (1..<4 as Range<UInt64>).map { objects.backstore.block($0) } }
        #expect(blocks == [old, old, old])
        // What comes new is carried out, in the same places of the ring.
        for _ in 0..<2 {
            for command in commands[1...2] { #expect(try frontEnd.requests.run(command).isGood) }
            #expect(try frontEnd.requests.run(SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512)).isGood)
        }
        #expect(world.perform { $0.backstore.block(2) } == old)
        #expect(world.perform { $0.backstore.block(1) } == new)
    }

    @Test(arguments: [false, true])
    func aRingThatWasStoppedLeavesNoNotes(_ isPacked: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world, options(isPacked: isPacked))
        for block in 0..<7 { #expect(try frontEnd.requests.run(write(block)).isGood) }
        _ = try frontEnd.stopAnywhere(frontEnd.requests)
        // The driver resets the ring: positions begin anew.
        frontEnd.requests.reset()
        try frontEnd.start(frontEnd.requests)
        #expect(try frontEnd.requests.run(write(1)).isGood)
    }

    @Test(arguments: [false, true])
    func notesOfAnyKindBreakAtMostTheirRing(_ isPacked: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world, options(isPacked: isPacked))
        let notes = try #require(frontEnd.inflight)
        let size = Int(try #require(WireBytes.read(UInt64.self, notes.payload, at: 0)))
        var state: UInt64 = 88172645463325252
        for _ in 0..<200 {
            frontEnd.disconnect()
            world.wait { !$0.server.isConnected }
            var bytes = [UInt8](repeating: 0, count: size)
            for index in bytes.indices {
                state ^= state << 13
                state ^= state >> 7
                state ^= state << 17
                // Small numbers are likelier to pass the checks.
                bytes[index] = state & 0x300 == 0 ? UInt8(truncatingIfNeeded: state) : UInt8(state & 3)
            }
            // Version 1 in each queue's part, so that the notes count.
            for part in 0..<3 { bytes.replaceSubrange(part * (size / 3) + 8..<part * (size / 3) + 10, with: [1, 0]) }
            let written = unsafe pwrite(notes.descriptor, bytes, size, 0)
            #expect(written == size)
            for queue in frontEnd.queues { queue.reset() }
            try frontEnd.reconnect()
        }
        // Another front-end with notes of its own is served.
        frontEnd.disconnect()
        world.wait { !$0.server.isConnected }
        let other = try VhostUserFrontEnd.ready(world, options(isPacked: isPacked))
        #expect(try other.requests.run(write(2)).isGood)
    }

    @Test func theNewConnectionIsServedAfterTheOldOnesLastRequest() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let old = try VhostUserFrontEnd.ready(world, options(isPacked: false))
        world.hold(true)
        _ = old.requests.submit(write(1))
        world.wait { $0.backstore.pending.count == 1 }
        let used = old.requests.ring.deviceUsedIndex
        old.disconnect()
        world.wait { !$0.server.isConnected }
        let new = try VhostUserFrontEnd(path: world.socketPath)
        try new.channel.send(.getFeatures)
        #expect(world.sleeps())
        #expect(!world.perform { $0.server.isConnected })
        world.hold(false)
        #expect(try new.channel.receive().number != nil)
        try new.start()
        #expect(try new.requests.runPastUnitAttentions(write(3)).isGood)
        // The old guest's rings are not written after its connection.
        #expect(old.requests.ring.deviceUsedIndex == used)
    }
}
