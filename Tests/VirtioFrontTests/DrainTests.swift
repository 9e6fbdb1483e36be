// DrainTests: rings that must be drained when they stop, and whose commands cannot end while the guest stands still.
// Without an answer to GET_VRING_BASE a monitor such as QEMU does nothing at all.
//
// Called by: swift test. Must not know: the server's inside.

import Backstores
import CLinux
import CoreTestSupport
import SCSICore
import Testing
import VhostUserInitiator

@testable import VirtioFront

@Suite struct DrainTests {
    /// Over soon, and long enough for a turn to come between two stops.
    private static let patience: UInt64 = 20_000_000
    private static let busy = UInt8(VIRTIO_SCSI_S_BUSY)

    private func options(isPacked: Bool, isInOrder: Bool = false) -> VhostUserFrontEnd.Options {
        var options = VhostUserFrontEnd.Options()
        options.queues = 2 + TestDaemon.requestQueues
        if isPacked { options.features |= VirtioFeatureBit.ringPacked }
        if isInOrder { options.features |= VirtioFeatureBit.inOrder }
        return options
    }

    /// Three writes on each request queue, of which nothing must be found on the disk.
    private func submitWrites(_ frontEnd: VhostUserFrontEnd) -> [SCSIInFlight] {
        frontEnd.queues[2...].flatMap { queue in
            (0..<3).map { queue.submit(write10(unit(0), block: UInt32($0), pattern(512, seed: UInt8(queue.index)))) }
        }
    }

    @Test(arguments: [false, true], [false, true])
    func theCommandsOfAFrozenDiskAreAnsweredBusyAndNeverCarriedOut(_ isPacked: Bool, _ isInOrder: Bool) throws {
        try withDaemon(drainPatience: Self.patience) { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(
                daemon, options: options(isPacked: isPacked, isInOrder: isInOrder))
            for _ in 0..<3 {
                daemon.freeze()
                let writes = submitWrites(frontEnd)
                let read = frontEnd.requests.submit(read10(unit(0), block: 9, count: 1))
                try daemon.waitForTasks(writes.count + 1)
                let bases = try frontEnd.stopAll()
                try daemon.waitForTasks(0)
                for queue in frontEnd.queues[2...] { try queue.collect() }
                for write in writes {
                    let result = try write.result()
                    #expect(result.response == Self.busy && result.residual == 512)
                }
                let result = try read.result()
                #expect(result.response == Self.busy && result.residual == 512)
                #expect(result.dataIn.allSatisfy { $0 == DriverQueue.untouched })
                daemon.thaw()
                try frontEnd.startAgain(bases)
                let blocks = try frontEnd.requests.run(read10(unit(0), block: 0, count: 3))
                #expect(blocks.isGood && blocks.dataIn.allSatisfy { $0 == 0 })
            }
            #expect(daemon.perform { $0.target.logicalUnits[0].unit.statistics.writes } == 0)
            #expect(daemon.complaints().isEmpty)
        }
    }

    @Test(arguments: [false, true])
    func whatTheMediumHasIsWaitedForAllTheSame(_ isPacked: Bool) throws {
        try withDaemon(drainPatience: Self.patience) { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options(isPacked: isPacked))
            daemon.inject(0, .hold)
            let held = frontEnd.requests.submit(write10(unit(0), block: 1, pattern(512, seed: 1)))
            let behind = frontEnd.requests.submit(write10(unit(0), block: 1, pattern(512, seed: 2)))
            try daemon.waitForTasks(2)
            try daemon.waitForHeld(1)
            try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(2), 0))
            // The patience is over.
            try daemon.waitForTasks(1)
            daemon.release()
            let base = try #require(WireBytes.read(UInt32.self, try frontEnd.channel.receive().payload, at: 4))
            try frontEnd.requests.collect()
            #expect(try held.result().isGood)
            #expect(try behind.result().response == Self.busy)
            try frontEnd.setUp(frontEnd.requests, base: base)
            try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2)), descriptors: [frontEnd.requests.kickDescriptor])
            let read = try frontEnd.requests.run(read10(unit(0), block: 1, count: 1))
            #expect(read.isGood && read.dataIn == pattern(512, seed: 1))
        }
    }

    /// SAM-6 5.9.2: what an ACA condition blocks does not end, and what has ended is not answered, until the initiator
    /// clears it; a guest that stands still does not.
    @Test(arguments: [false, true])
    func anACAConditionDoesNotHoldAStopUp(_ isPacked: Bool) throws {
        let world = try ServerWorld(drainPatience: Self.patience)
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        if isPacked { options.features |= VirtioFeatureBit.ringPacked }
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        world.hold(true)
        let medium = frontEnd.requests.submit(write10(unit0, block: 1, pattern(512, seed: 1)))
        world.wait { $0.backstore.pending.count == 1 }
        let dormant = frontEnd.requests.submit(write10(unit0, block: 1, pattern(512, seed: 2)))
        world.wait { $0.unit.tasksInFlight == 2 }
        // NACA, and an operation code that there is not.
        let fault = frontEnd.requests.submit(SCSICommand(unit0, [0x1f, 0, 0, 0, 0, 4]))
        #expect(try fault.wait().senseKey == 5)
        world.hold(false)
        world.wait { $0.backstore.pending.isEmpty }
        #expect(!frontEnd.requests.hasUsed)
        let base = try frontEnd.stopAnywhere(frontEnd.requests)
        try frontEnd.requests.collect()
        #expect(try medium.result().isGood, "it has been done, and only its answer was withheld")
        #expect(try dormant.result().response == Self.busy)
        try frontEnd.setUp(frontEnd.requests, base: base)
        try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2)), descriptors: [frontEnd.requests.kickDescriptor])
        // The condition is still there.
        #expect(try frontEnd.requests.run(testUnitReady(unit0)).status == 0x30)
        #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_CLEAR_ACA, unit0) == 0)
        let read = try frontEnd.requests.run(read10(unit0, block: 1, count: 1))
        #expect(read.isGood && read.dataIn == pattern(512, seed: 1))
    }

    @Test(arguments: [false, true])
    func aResetOfTheDeviceWaitsNoLongerThanAStop(_ isPacked: Bool) throws {
        try withDaemon(drainPatience: Self.patience) { daemon in
            var options = options(isPacked: isPacked)
            options.protocolFeatures |= VhostUserProtocolBit.resetDevice
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            daemon.freeze()
            let writes = submitWrites(frontEnd)
            try daemon.waitForTasks(writes.count)
            try frontEnd.tell(.resetDevice)
            try daemon.waitForTasks(0)
            daemon.thaw()
        }
    }

    @Test
    func aFrontEndThatGoesWhileItIsWaitedForLeavesNothing() throws {
        for isSpread in [false, true] {
            let daemon = try TestDaemon(isSpread: isSpread)
            defer { daemon.stop() }
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options(isPacked: false))
            daemon.freeze()
            try daemon.waitForTasks(submitWrites(frontEnd).count)
            try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(3), 0))
            #expect(daemon.performOnServers { $0.servers[0].isConnected })
            frontEnd.disconnect()
            try daemon.waitForDisconnection()
            try daemon.waitForTasks(0)
            daemon.thaw()
        }
    }
}
