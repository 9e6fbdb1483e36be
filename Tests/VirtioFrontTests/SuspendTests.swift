// SuspendTests: GET_VRING_BASE with GET_VRING_BASE_INFLIGHT: rings stop although their commands cannot end, and each
// command is carried out once and in its ring's order when the rings run again, here or elsewhere.
//
// Called by: swift test. Must not know: the server's inside.

import Backstores
import CLinux
import CoreTestSupport
import SCSICore
import Testing
import VhostUserInitiator

@testable import VirtioFront

/// Where the rings run again.
enum Resumption: CaseIterable, Sendable {
    case sameConnection, newConnection, otherDaemon
}

@Suite struct SuspendTests {
    private func options(isPacked: Bool, suspends: Bool = true, ringSize: Int = 64) -> VhostUserFrontEnd.Options {
        var options = VhostUserFrontEnd.Options()
        options.queues = 4
        options.ringSize = ringSize
        options.protocolFeatures |= VhostUserProtocolBit.inflightSharedMemory
        if suspends { options.protocolFeatures |= VhostUserProtocolBit.getVringBaseInflight }
        if isPacked { options.features |= VirtioFeatureBit.ringPacked }
        return options
    }

    /// What a block holds: LBA, writer and sequence, over and over.
    private func content(_ block: UInt32, _ writer: Int, _ sequence: Int) -> [UInt8] {
        let words = WireBytes.of(UInt64(block), UInt64(writer), UInt64(sequence), ~UInt64(sequence))
        return (0..<16).flatMap { _ in words }
    }

    private func resume(
        _ frontEnd: VhostUserFrontEnd, _ bases: [UInt32], _ resumption: Resumption, _ daemon: TestDaemon,
        _ other: TestDaemon
    ) throws {
        guard resumption != .sameConnection else { return try frontEnd.startAgain(bases) }
        frontEnd.disconnect()
        try daemon.waitForDisconnection()
        try frontEnd.reconnect(to: resumption == .otherDaemon ? other.paths[0] : nil)
    }

    // MARK: What waits

    @Test(arguments: [false, true], Resumption.allCases)
    func aFrozenDisksRingsStopAndItsCommandsAreCarriedOutOnceWhenTheyRunAgain(
        _ isPacked: Bool, _ resumption: Resumption
    ) throws {
        let other = try TestDaemon()
        defer { other.stop() }
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options(isPacked: isPacked))
            let queues = frontEnd.queues[2...]
            var sequence = 0
            // The last round leaves everything on the first daemon: the other one has been migrated to.
            for round in 0..<(resumption == .otherDaemon ? 1 : 3) {
                for block in 0..<round * 3 {
                    _ = try frontEnd.requests.run(read10(unit(0), block: UInt32(block), count: 1))
                }
                daemon.freeze()
                // They take the unit attention conditions of another nexus.
                let first = (0..<4).map { frontEnd.requests.submit(read10(unit(0), block: $0, count: 1)) }
                var expected: [UInt32: [UInt8]] = [:]
                var writes: [SCSIInFlight] = []
                for number in 0..<6 {
                    for queue in queues {
                        sequence += 1
                        // Of each queue three blocks, each written twice.
                        let block = UInt32(16 * queue.index + number % 3)
                        expected[block] = content(block, queue.index, sequence)
                        var command = write10(unit(0), block: block, expected[block]!)
                        command.layout.isIndirect = number % 2 == 0
                        writes.append(queue.submit(command))
                    }
                }
                try daemon.waitForTasks(4 + writes.count)
                let bases = try frontEnd.stopAll()
                try daemon.waitForTasks(0)
                #expect(frontEnd.queues.allSatisfy { !$0.hasUsed })
                daemon.thaw()
                #expect(
                    daemon.perform { $0.target.logicalUnits[0].unit.statistics.writes } == UInt64(round * writes.count))
                try resume(frontEnd, bases, resumption, daemon, other)
                for read in first { #expect(try read.wait().response == 0) }
                for write in writes { #expect(try write.wait().isGood) }
                #expect(queues.allSatisfy { $0.inFlightCount == 0 })
                for (block, data) in expected {
                    #expect(try frontEnd.requests.run(read10(unit(0), block: block, count: 1)).dataIn == data)
                }
            }
            let last = resumption == .otherDaemon ? other : daemon
            #expect(last.complaints().isEmpty && daemon.complaints().isEmpty)
            frontEnd.disconnect()
            try last.waitForDisconnection()
        }
    }

    @Test(arguments: [false, true])
    func aRingThatStopsManyTimesWithTheSameCommandsKeepsTheirOrder(_ isPacked: Bool) throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options(isPacked: isPacked))
            daemon.freeze()
            var writes: [SCSIInFlight] = []
            for round in 0..<10 {
                for number in 0..<2 {
                    let sequence = 2 * round + number
                    writes.append(frontEnd.requests.submit(write10(unit(0), block: 5, content(5, 2, sequence))))
                }
                try daemon.waitForTasks(writes.count)
                try frontEnd.startAgain(try frontEnd.stopAll())
            }
            daemon.thaw()
            for write in writes { #expect(try write.wait().isGood) }
            #expect(writes.map(\.chain.usedNumber) == writes.map(\.chain.usedNumber).sorted())
            #expect(try frontEnd.requests.run(read10(unit(0), block: 5, count: 1)).dataIn == content(5, 2, 19))
        }
    }

    @Test(arguments: [false, true])
    func commandsThatALimitHoldsBackStayInFlight(_ isPacked: Bool) throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options(isPacked: isPacked))
            daemon.perform { objects in
                var limits = RateLimits()
                (limits.operationsPerSecond, limits.burstNanoseconds) = (1, 0)
                objects.target.logicalUnits[0].unit.setLimits(limits)
            }
            // Nobody lets them go here, so that the first alone is carried out.
            let writes = (0..<4).map { frontEnd.requests.submit(write10(unit(0), block: 1, content(1, 2, $0))) }
            #expect(try writes[0].wait().isGood)
            let bases = try frontEnd.stopAll()
            try daemon.waitForTasks(0)
            daemon.perform { $0.target.logicalUnits[0].unit.setLimits(RateLimits()) }
            try frontEnd.startAgain(bases)
            for write in writes { #expect(try write.wait().isGood) }
            #expect(try frontEnd.requests.run(read10(unit(0), block: 1, count: 1)).dataIn == content(1, 2, 3))
        }
    }

    // MARK: What the medium has

    @Test(arguments: [false, true])
    func whatTheMediumHasIsWaitedForAndAnsweredIfItHasEnded(_ isPacked: Bool) throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options(isPacked: isPacked))
            daemon.inject(0, .hold, times: 2)
            let held = [1, 3].map { frontEnd.requests.submit(write10(unit(0), block: $0, content($0, 2, 1))) }
            let behind = frontEnd.requests.submit(write10(unit(0), block: 1, content(1, 2, 2)))
            try daemon.waitForTasks(3)
            try daemon.waitForHeld(2)
            try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(2), 0))
            try daemon.waitForTasks(2)
            // The medium has done them; what it says when it is asked to let go of them comes too late.
            daemon.release()
            let reply = try frontEnd.channel.receive()
            let base = try #require(WireBytes.read(UInt32.self, reply.payload, at: 4))
            try frontEnd.requests.collect()
            #expect(try held.allSatisfy { try $0.result().isGood } && !behind.chain.isComplete)
            try frontEnd.setUp(frontEnd.requests, base: base)
            try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2)), descriptors: [frontEnd.requests.kickDescriptor])
            #expect(try behind.wait().isGood)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 1, count: 1)).dataIn == content(1, 2, 2))
        }
    }

    @Test(arguments: [false, true])
    func aReadThatTheMediumGivesUpIsCarriedOutAnew(_ isPacked: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world, options(isPacked: isPacked))
        #expect(try frontEnd.requests.run(write10(unit0, block: 9, content(9, 2, 1))).isGood)
        world.hold(true)
        let read = frontEnd.requests.submit(read10(unit0, block: 9, count: 1))
        world.wait { $0.backstore.pending.count == 1 }
        try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(2), 0))
        world.wait { $0.backstore.cancellations == 1 }
        #expect(world.sleeps(), "nobody asks again and again")
        world.hold(false)
        let base = try #require(WireBytes.read(UInt32.self, try frontEnd.channel.receive().payload, at: 4))
        #expect(!frontEnd.requests.hasUsed)
        try frontEnd.setUp(frontEnd.requests, base: base)
        try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2)), descriptors: [frontEnd.requests.kickDescriptor])
        let result = try read.wait()
        #expect(result.isGood && result.dataIn == content(9, 2, 1))
    }

    // MARK: Without the feature

    @Test(arguments: [false, true], [false, true])
    func withoutTheFeatureOrInOrderARingIsDrained(_ isPacked: Bool, _ isInOrder: Bool) throws {
        try withDaemon { daemon in
            var options = options(isPacked: isPacked, suspends: isInOrder)
            if isInOrder { options.features |= VirtioFeatureBit.inOrder }
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            daemon.freeze()
            let writes = (0..<3).map { frontEnd.requests.submit(write10(unit(0), block: 1, content(1, 2, $0))) }
            try daemon.waitForTasks(3)
            try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(2), 0))
            // The server has seen the message when it sees the next connection.
            #expect(daemon.performOnServers { $0.servers[0].isConnected })
            daemon.thaw()
            _ = try frontEnd.channel.receive()
            try frontEnd.requests.collect()
            #expect(try writes.allSatisfy { try $0.result().isGood })
        }
    }

    @Test
    func theFeatureIsRefusedWithoutAMemoryForTheNotes() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd(path: world.socketPath)
        #expect(throws: InitiatorError.self) {
            try frontEnd.channel.send(
                .setProtocolFeatures, WireBytes.of(VhostUserProtocolBit.getVringBaseInflight))
            _ = try frontEnd.channel.receive()
        }
        #expect(world.faults.contains { $0.contains("INFLIGHT_SHMFD") })
    }

    @Test
    func withoutNotesARingIsDrained() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd(path: daemon.paths[0], options: options(isPacked: false))
            try frontEnd.negotiate()
            try frontEnd.shareMemory()
            frontEnd.makeQueues()
            try frontEnd.startQueues()
            for number: UInt16 in 0..<2 { _ = try frontEnd.requests.runPastUnitAttentions(testUnitReady(unit(number))) }
            daemon.freeze()
            let write = frontEnd.requests.submit(write10(unit(0), block: 1, content(1, 2, 1)))
            try daemon.waitForTasks(1)
            try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(2), 0))
            daemon.thaw()
            _ = try frontEnd.channel.receive()
            try frontEnd.requests.collect()
            #expect(try write.result().isGood)
        }
    }

    // MARK: Functions, resets, ends

    @Test(arguments: [false, true])
    func aFunctionWaitsForTheCommandsThatAreNotedInFlight(_ isPacked: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world, options(isPacked: isPacked))
        world.perform { $0.unit.freeze() }
        var command = write10(unit0, block: 1, content(1, 2, 1))
        command.tag = 77
        let write = frontEnd.requests.submit(command)
        world.wait { $0.unit.tasksInFlight == 1 }
        let base = try frontEnd.stopAnywhere(frontEnd.requests)
        // An abort that found nothing now would give the driver memory that the command uses later.
        let abort = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_ABORT_TASK, unit0, tag: 77)
        #expect(world.sleeps(), "nobody looks at it again and again")
        #expect(!frontEnd.control.hasUsed)
        // The control queue stops and runs all the same.
        let controlBase = try frontEnd.stopAnywhere(frontEnd.control)
        try frontEnd.setUp(frontEnd.control, base: controlBase)
        try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(0)), descriptors: [frontEnd.control.kickDescriptor])
        #expect(!frontEnd.control.hasUsed)
        try frontEnd.setUp(frontEnd.requests, base: base)
        try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2)), descriptors: [frontEnd.requests.kickDescriptor])
        try frontEnd.control.wait(for: abort)
        #expect(abort.written == [0])
        try frontEnd.requests.collect()
        #expect(try write.result().response == UInt8(VIRTIO_SCSI_S_ABORTED))
        world.perform { $0.unit.thaw() }
    }

    @Test(arguments: [false, true])
    func aFunctionOfABackEndThatDiedDoesNotOvertakeTheCommandsOfThen(_ isPacked: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world, options(isPacked: isPacked))
        world.hold(true)
        var command = write10(unit0, block: 1, content(1, 2, 1))
        command.tag = 77
        let write = frontEnd.requests.submit(command)
        world.wait { $0.backstore.pending.count == 1 }
        frontEnd.disconnect()
        world.wait { !$0.server.isConnected }
        // Available while nobody is there, so that the next connection finds it before the command.
        let abort = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_ABORT_TASK, unit0, tag: 77)
        world.hold(false)
        world.perform { $0.unit.freeze() }
        try frontEnd.reconnect(startsQueues: false)
        for queue in frontEnd.queues[..<2] {
            try frontEnd.start(queue)
            try frontEnd.enable(queue, true)
        }
        #expect(world.sleeps() && !frontEnd.control.hasUsed)
        for queue in frontEnd.queues[2...] {
            try frontEnd.start(queue)
            try frontEnd.enable(queue, true)
        }
        try frontEnd.control.wait(for: abort)
        try frontEnd.requests.collect()
        // A unit attention condition of the new nexus may have been first.
        let result = try write.result()
        #expect(result.response == UInt8(VIRTIO_SCSI_S_ABORTED) || result.status == 2)
        world.perform { $0.unit.thaw() }
    }

    @Test(arguments: [false, true])
    func aResetForgetsWhatWasSuspended(_ isPacked: Bool) throws {
        try withDaemon { daemon in
            var options = options(isPacked: isPacked)
            options.protocolFeatures |= VhostUserProtocolBit.resetDevice
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            daemon.freeze()
            _ = frontEnd.requests.submit(write10(unit(0), block: 1, content(1, 2, 1)))
            try daemon.waitForTasks(1)
            _ = try frontEnd.stopAll()
            try frontEnd.tell(.resetDevice)
            daemon.thaw()
            for queue in frontEnd.queues { queue.reset() }
            try frontEnd.shareInflight()
            try frontEnd.startQueues()
            let result = try frontEnd.requests.runPastUnitAttentions(read10(unit(0), block: 1, count: 1))
            #expect(result.isGood && result.dataIn == [UInt8](repeating: 0, count: 512))
            // A function has nothing to wait for.
            #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit(0)) == 0)
        }
    }

    @Test(arguments: [false, true])
    func aFrontEndThatGoesWhileItsRingStopsLeavesItsCommandsNoted(_ isPacked: Bool) throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options(isPacked: isPacked))
            for round in 0..<3 {
                daemon.inject(0, .hold)
                let writes = (0..<3).map {
                    frontEnd.queues[3].submit(write10(unit(0), block: 1, content(1, 3, 3 * round + $0)))
                }
                try daemon.waitForTasks(3)
                try daemon.waitForHeld(1)
                try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(3), 0))
                try daemon.waitForTasks(1)
                frontEnd.disconnect()
                try daemon.waitForDisconnection()
                daemon.release()
                try frontEnd.reconnect()
                for write in writes { #expect(try write.wait().response == 0) }
                _ = try frontEnd.requests.runPastUnitAttentions(testUnitReady(unit(0)))
                let read = try frontEnd.requests.run(read10(unit(0), block: 1, count: 1))
                #expect(read.dataIn == content(1, 3, 3 * round + 2))
            }
        }
    }

    @Test
    func messagesInAnyOrderAreAnswered() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options(isPacked: false))
            daemon.freeze()
            let write = frontEnd.requests.submit(write10(unit(0), block: 1, content(1, 2, 1)))
            try daemon.waitForTasks(1)
            try frontEnd.enable(frontEnd.requests, false)
            let base = try frontEnd.stopAnywhere(frontEnd.requests)
            #expect(try frontEnd.stopAnywhere(frontEnd.requests) == base, "a ring that has stopped")
            // Another ring goes on meanwhile, past the command that is suspended.
            daemon.thaw()
            #expect(try frontEnd.queues[3].run(write10(unit(0), block: 1, content(1, 3, 1))).isGood)
            // Notes cannot be exchanged while rings are in service.
            #expect(throws: InitiatorError.self) { try frontEnd.shareInflight() }
            // An older position than that of the notes does not count.
            try frontEnd.setUp(frontEnd.requests, base: base &- 1)
            try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2)), descriptors: [frontEnd.requests.kickDescriptor])
            #expect(!write.chain.isComplete)
            try frontEnd.enable(frontEnd.requests, true)
            #expect(try write.wait().isGood)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 1, count: 1)).dataIn == content(1, 2, 1))
        }
    }

    // MARK: Many commands

    @Test(arguments: [false, true])
    func moreCommandsThanALinkTakesAreSuspendedAndResumed(_ isPacked: Bool) throws {
        let single = try TestDaemon()
        defer { single.stop() }
        let spread = try TestDaemon(isSpread: true)
        defer { spread.stop() }
        var options = options(isPacked: isPacked, ringSize: 1024)
        options.queues = 2 + TestDaemon.requestQueues
        options.memorySize = 64 << 20
        let frontEnd = try VhostUserFrontEnd.ready(single, options: options)
        single.freeze()
        spread.freeze()
        var writes: [(block: UInt32, data: [UInt8], flight: SCSIInFlight)] = []
        for queue in frontEnd.queues[2...] {
            // They take the unit attention conditions of the nexus with the other daemon.
            for _ in 0..<4 { _ = queue.enqueue(indirect(read10(unit(0), block: 0, count: 1))) }
            for number in 0..<900 {
                let block = UInt32(queue.index * 1000 + number)
                let data = content(block, queue.index, number)
                writes.append((block, data, queue.enqueue(indirect(write10(unit(0), block: block, data)))))
            }
            queue.publish()
        }
        try single.waitForTasks(904 * TestDaemon.requestQueues)
        _ = try frontEnd.stopAll()
        try single.waitForTasks(0)
        single.thaw()
        frontEnd.disconnect()
        try single.waitForDisconnection()
        // What finds no room in a link waits for it, and stays noted when the ring stops before there is some.
        for _ in 0..<3 {
            try frontEnd.reconnect(to: spread.paths[0])
            try spread.waitForTasks(2 * ShardReactor.linkCapacity)
            _ = try frontEnd.stopAll()
            try spread.waitForTasks(0)
            frontEnd.disconnect()
            try spread.waitForDisconnection()
        }
        try frontEnd.reconnect(to: spread.paths[0])
        spread.thaw()
        for write in writes { #expect(try write.flight.wait().response == 0) }
        #expect(writes.filter { (try? $0.flight.result().isGood) != true }.count <= 8, "unit attention conditions")
        for write in writes where try write.flight.result().isGood {
            #expect(try frontEnd.requests.run(read10(unit(0), block: write.block, count: 1)).dataIn == write.data)
        }
    }

    private func indirect(_ command: SCSICommand) -> SCSICommand {
        var command = command
        command.layout.isIndirect = true
        return command
    }
}
