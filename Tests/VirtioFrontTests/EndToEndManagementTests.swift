// EndToEndManagementTests: task management, events, stopping queues, reconnection.
//
// Called by: swift test. Must not know: the server's inside.

import Backstores
import CLinux
import Glibc
import Testing
import VhostUserInitiator

@Suite
struct EndToEndManagementTests {
    private let aborted = UInt8(VIRTIO_SCSI_S_ABORTED)
    private let reset = UInt8(VIRTIO_SCSI_S_RESET)

    /// A read of unit 0 that the medium holds.
    private func heldRead(_ daemon: TestDaemon, _ frontEnd: VhostUserFrontEnd, tag: UInt64) throws -> SCSIInFlight {
        let before = daemon.perform { $0.faults[0].heldCount }
        daemon.inject(0, .hold)
        var command = read10(unit(0), block: UInt32(tag), count: 1)
        command.tag = tag
        let inFlight = frontEnd.requests.submit(command)
        try daemon.waitForHeld(before + 1)
        return inFlight
    }

    @Test
    func abortTaskIsAnsweredAfterTheCommand() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let read = try heldRead(daemon, frontEnd, tag: 7)
            let abort = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_ABORT_TASK, unit(0), tag: 7)
            // Another control request overtakes it, so the abort has been looked at.
            #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(1), tag: 1) == 0)
            try frontEnd.control.collect()
            #expect(!abort.isComplete, "the medium still uses the command's memory")
            daemon.release()
            try frontEnd.control.wait(for: abort)
            try frontEnd.requests.collect()
            #expect(read.chain.isComplete, "the command is answered before the abort is")
            #expect(try read.wait().response == aborted)
            #expect(abort.written == [0])
        }
    }

    @Test
    func abortTaskLeavesOtherCommandsAlone() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let first = try heldRead(daemon, frontEnd, tag: 1)
            let second = try heldRead(daemon, frontEnd, tag: 2)
            let abort = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_ABORT_TASK, unit(0), tag: 1)
            #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(0), tag: 2) == 10)
            daemon.release()
            try frontEnd.control.wait(for: abort)
            #expect(try first.wait().response == aborted)
            #expect(try second.wait().isGood)
        }
    }

    @Test
    func abortOfAnUnknownTaskIsComplete() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_ABORT_TASK, unit(0), tag: 99) == 0)
        }
    }

    @Test
    func logicalUnitResetEndsAllItsCommandsAndSaysSo() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let reads = [
                try heldRead(daemon, frontEnd, tag: 1), try heldRead(daemon, frontEnd, tag: 2),
            ]
            let function = frontEnd.control.submitTaskManagement(
                VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit(0), layout: ChainLayout(readable: [3, 10]))
            #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK_SET, unit(1)) == 0)
            daemon.release()
            try frontEnd.control.wait(for: function)
            #expect(function.written == [0])
            for read in reads { #expect(try read.wait().response == reset) }
            let attention = try frontEnd.requests.run(testUnitReady(unit(0)))
            #expect(attention.status == 2 && attention.senseKey == 6 && attention.additionalSense! >> 8 == 0x29)
            #expect(try frontEnd.requests.run(testUnitReady(unit(1))).isGood)
        }
    }

    @Test
    func functionsForNothingSaySo() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let control = frontEnd.control
            #expect(try control.taskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit(5)) == 12)
            let absent = VirtioSCSIAddress.flat(target: 9, lun: 0)
            #expect(try control.taskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, absent) == 3)
            // There is no ACA condition to clear: FUNCTION COMPLETE (SAM-6 7.4).
            #expect(try control.taskManagement(VIRTIO_SCSI_T_TMF_CLEAR_ACA, unit(0)) == 0)
            #expect(try control.taskManagement(77, unit(0)) == 11)
        }
    }

    @Test
    func notificationRequestsAreAnswered() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let control = frontEnd.control
            for type in [VIRTIO_SCSI_T_AN_QUERY, VIRTIO_SCSI_T_AN_SUBSCRIBE] {
                let known = try control.asynchronousNotification(type, unit(0), events: 0xffff_ffff)
                #expect(known.response == 0 && known.events == 0x12)
                let absent = try control.asynchronousNotification(
                    type, .flat(target: 4, lun: 0), events: 0xffff_ffff)
                #expect(absent.response == 3)
            }
        }
    }

    @Test
    func aRemovedLogicalUnitIsAnEvent() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let buffer = frontEnd.events.offerEventBuffer()
            daemon.removeUnit(1)
            try frontEnd.events.wait(for: buffer)
            #expect(WireBytes.read(UInt32.self, buffer.written, at: 0) == 1)
            // Drivers read the number from bytes 2 and 3, without the flag of flat addressing below 256.
            #expect(Array(buffer.written[4..<12]) == VirtioSCSIAddress.peripheral(target: 0, lun: 1).bytes)
            #expect(WireBytes.read(UInt32.self, buffer.written, at: 12) == 2)
        }
    }

    // MARK: Queues that stop and go on

    @Test
    func stoppingAQueueWaitsForItsCommands() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let before = frontEnd.requests.ring.usedIndex
            let read = try heldRead(daemon, frontEnd, tag: 3)
            try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(2), 0))
            // A message to another server's thread would prove nothing; the held command does: it is not answered.
            #expect(!read.chain.isComplete && !frontEnd.requests.ring.hasUsed)
            daemon.release()
            let reply = try frontEnd.channel.receive()
            #expect(reply.payload == WireBytes.of(UInt32(2), UInt32(before &+ 1)))
            try frontEnd.requests.collect()
            #expect(try read.result().isGood, "the command was answered before its queue's base")
        }
    }

    @Test
    func aStoppedQueueGoesOnWhereItWas() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            for _ in 0..<5 {
                let base = try frontEnd.stop(frontEnd.requests)
                #expect(base == frontEnd.requests.ring.availableIndex)
                let pending = frontEnd.requests.submit(testUnitReady(unit(0)))
                try frontEnd.start(frontEnd.requests)
                #expect(try pending.wait().isGood)
                #expect(try frontEnd.requests.run(read10(unit(0), block: 1, count: 1)).isGood)
            }
        }
    }

    @Test
    func aResetQueueBeginsAnew() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            _ = try frontEnd.stop(frontEnd.requests)
            frontEnd.requests.reset()
            try frontEnd.start(frontEnd.requests)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 1, count: 1)).isGood)
        }
    }

    @Test
    func aDisabledQueueRestsUntilItIsEnabled() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            try frontEnd.enable(frontEnd.requests, false)
            let command = frontEnd.requests.submit(testUnitReady(unit(0)))
            #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(0)) == 0)
            #expect(!frontEnd.requests.ring.hasUsed)
            try frontEnd.enable(frontEnd.requests, true)
            #expect(try command.wait().isGood)
        }
    }

    @Test
    func memoryIsAddedUnderLoad() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let read = try heldRead(daemon, frontEnd, tag: 1)
            let more = try SharedMemory(size: 1 << 20, guestAddress: 0x10_0000_0000)
            try frontEnd.addRegion(more)
            for number: UInt32 in 0..<10 {
                #expect(try frontEnd.requests.run(read10(unit(0), block: number, count: 1)).isGood)
            }
            daemon.release()
            #expect(try read.wait().isGood)
            for number: UInt32 in 0..<10 {
                #expect(try frontEnd.requests.run(read10(unit(0), block: number, count: 1)).isGood)
            }
            try frontEnd.removeRegion(more)
            #expect(try frontEnd.requests.run(testUnitReady(unit(0))).isGood)
        }
    }

    @Test
    func aRunningQueueGetsTheSameMemoryAgain() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let read = try heldRead(daemon, frontEnd, tag: 1)
            try frontEnd.shareMemory()
            let other = frontEnd.requests.submit(testUnitReady(unit(0)))
            #expect(try other.wait().isGood)
            daemon.release()
            #expect(try read.wait().isGood)
        }
    }

    @Test
    func theOrderOfUserSpaceDriversWorks() throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.enablesBeforeSetup = true
            options.protocolFeatures &= ~VhostUserProtocolBit.replyAcknowledge
            let frontEnd = try VhostUserFrontEnd.started(path: daemon.paths[0], options: options)
            _ = try frontEnd.askNumber(.getFeatures)
            for target in 0..<64 {
                let inquiry = SCSICommand(
                    .peripheral(target: UInt8(target), lun: 0), [0x12, 0, 0, 0, 36, 0], dataIn: 36)
                #expect(try frontEnd.requests.run(inquiry).response == (target == 0 ? 0 : 3))
            }
            for queue in frontEnd.queues { _ = try frontEnd.stop(queue) }
            try frontEnd.channel.send(.setMemoryTable, WireBytes.of(UInt32(0), 0))
            _ = try frontEnd.askNumber(.getFeatures)
        }
    }

    /// An initiator in user space, step by step: GET_QUEUE_NUM before anything else and without MQ, no REPLY_ACK, rings
    /// enabled before they are described, all call descriptors before the memory, GET_FEATURES as the barrier, chains
    /// of three descriptors without indirect tables, targets 0 to 63 looked for on LUN 0 as {1, t, 0, 0}; in the end
    /// GET_VRING_BASE for each ring, and a memory table without regions.
    @Test
    func anInitiatorInUserSpaceIsServedInItsOwnOrder() throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.features = VirtioFeatureBit.version1 | VirtioFeatureBit.protocolFeatures | VirtioFeatureBit.hotplug
            options.protocolFeatures = VhostUserProtocolBit.configuration
            options.queues = 2 + TestDaemon.requestQueues
            for _ in 0..<3 {
                let frontEnd = try VhostUserFrontEnd(path: daemon.paths[0], options: options)
                #expect(try frontEnd.askNumber(.getQueueNumber) == UInt64(options.queues))
                try frontEnd.negotiate()
                frontEnd.makeQueues()
                for queue in frontEnd.queues { try frontEnd.enable(queue, true) }
                for queue in frontEnd.queues {
                    try frontEnd.tell(
                        .setVringCall, WireBytes.of(UInt64(queue.index)), descriptors: [queue.callDescriptor])
                }
                try frontEnd.shareMemory()
                for queue in frontEnd.queues {
                    try frontEnd.setUp(queue, base: 0)
                    try frontEnd.tell(
                        .setVringKick, WireBytes.of(UInt64(queue.index)), descriptors: [queue.kickDescriptor])
                }
                _ = try frontEnd.askNumber(.getFeatures)
                _ = frontEnd.events.offerEventBuffer()
                for target in 0..<64 {
                    let inquiry = SCSICommand(
                        .peripheral(target: UInt8(target), lun: 0), [0x12, 0, 0, 0, 36, 0], dataIn: 36)
                    let queue = frontEnd.queues[2 + target % TestDaemon.requestQueues]
                    let response = try queue.run(inquiry).response
                    #expect(response == UInt8(target == 0 ? VIRTIO_SCSI_S_OK : VIRTIO_SCSI_S_BAD_TARGET))
                }
                #expect(try frontEnd.requests.runPastUnitAttentions(testUnitReady(unit(0))).isGood)
                let data = pattern(4096, seed: 5)
                for queue in frontEnd.queues[2...] {
                    #expect(try queue.run(write10(unit(0), block: 8, data)).isGood)
                    #expect(try queue.run(read10(unit(0), block: 8, count: 8)).dataIn == data)
                }
                for queue in frontEnd.queues { _ = try frontEnd.stop(queue) }
                try frontEnd.channel.send(.setMemoryTable, WireBytes.of(UInt32(0), 0))
                _ = try frontEnd.askNumber(.getFeatures)
                frontEnd.disconnect()
                try daemon.waitForDisconnection()
            }
            #expect(daemon.complaints().isEmpty)
        }
    }

    // MARK: Connections that end

    @Test
    func aFrontEndThatComesAgainGoesOn() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let data = pattern(512, seed: 9)
            #expect(try frontEnd.requests.run(write10(unit(0), block: 3, data)).isGood)
            for _ in 0..<3 {
                frontEnd.disconnect()
                try daemon.waitForDisconnection()
                try frontEnd.reconnect()
                let attention = try frontEnd.requests.run(testUnitReady(unit(0)))
                #expect(attention.senseKey == 6 && attention.additionalSense == 0x2907)
                #expect(try frontEnd.requests.run(read10(unit(0), block: 3, count: 1)).dataIn == data)
            }
        }
    }

    @Test
    func aFrontEndThatGoesLeavesItsCommandsToTheirEnd() throws {
        try withDaemon { daemon in
            let read: SCSIInFlight
            do {
                let frontEnd = try VhostUserFrontEnd.ready(daemon)
                read = try heldRead(daemon, frontEnd, tag: 1)
                frontEnd.disconnect()
                try daemon.waitForDisconnection()
                daemon.release()
                let next = try VhostUserFrontEnd.started(path: daemon.paths[0])
                #expect(try next.requests.runPastUnitAttentions(testUnitReady(unit(0))).isGood)
                #expect(!frontEnd.requests.ring.hasUsed, "nobody writes into the memory of a front-end that is gone")
            }
            #expect(!read.chain.isComplete)
        }
    }

    @Test
    func aFrontEndThatGoesDuringATaskManagementFunctionLeavesNothing() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let read = try heldRead(daemon, frontEnd, tag: 1)
            let abort = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_ABORT_TASK, unit(0), tag: 1)
            #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(1), tag: 1) == 0)
            frontEnd.disconnect()
            try daemon.waitForDisconnection()
            daemon.release()
            #expect(!abort.isComplete && !read.chain.isComplete)
        }
    }

    @Test
    func aFrontEndMayGoWhileItsQueueIsBeingStopped() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            _ = try heldRead(daemon, frontEnd, tag: 1)
            try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(2), 0))
            frontEnd.disconnect()
            try daemon.waitForDisconnection()
            daemon.release()
        }
    }

    @Test
    func theDaemonStopsWithAFrontEndConnected() throws {
        let frontEnd = try withDaemon { daemon in try VhostUserFrontEnd.ready(daemon) }
        #expect(!frontEnd.channel.isOpen)
    }
}
