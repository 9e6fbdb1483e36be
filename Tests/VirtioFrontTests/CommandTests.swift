// CommandTests: requests and responses of virtio-scsi in any descriptor layout, response codes, task management.
//
// Called by: swift test. Must not know: how the server is written.

import CLinux
import CoreTestSupport
import Testing
import VhostUserInitiator
import VirtioFront

@Suite struct CommandTests {
    private static let pattern = (0..<1024).map { UInt8(truncatingIfNeeded: $0 * 7 + $0 / 256) }

    static let layouts: [ChainLayout] = [
        ChainLayout(), ChainLayout(isIndirect: true),
        ChainLayout(readable: [51], writable: [108]), ChainLayout(readable: [51], writable: [108], isIndirect: true),
        ChainLayout(readable: [1, 2, 3, 40], writable: [1, 10, 2, 90, 30]),
        ChainLayout(readable: [50, 2], writable: [107, 2]),
        ChainLayout(readable: [50, 2], writable: [107, 2, 511, 3]),
        ChainLayout(
            readable: Array(repeating: 20, count: 53), writable: Array(repeating: 18, count: 62), isIndirect: true),
        ChainLayout(readable: Array(repeating: 1, count: 51), writable: Array(repeating: 2, count: 54)),
    ]

    @Test(arguments: layouts.indices, [1, 3])
    func dataSurvivesEveryLayoutOfTheChain(_ layout: Int, _ regions: Int) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        options.memoryRegions = regions
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        var write = SCSICommand(unit0, CDB.write(.ten, 5, 2), dataOut: Self.pattern)
        write.layout = Self.layouts[layout]
        #expect(try frontEnd.requests.run(write).isGood)
        var read = SCSICommand(unit0, CDB.read(.ten, 5, 2), dataIn: 1024)
        read.layout = Self.layouts[layout]
        let result = try frontEnd.requests.run(read)
        #expect(result.isGood && result.residual == 0)
        #expect(result.dataIn == Self.pattern)
        #expect(result.usedLength == 108 + 1024)
    }

    @Test(
        arguments: [
            (0, true), (VirtioFeatureBit.eventIndex, true), (VirtioFeatureBit.indirectDescriptors, true),
            (VirtioFeatureBit.version1, true), (VirtioFeatureBit.protocolFeatures, false),
        ] as [(UInt64, Bool)])
    func aDriverWithoutAFeatureIsServed(_ missing: UInt64, _ several: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        options.features &= ~missing
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        for round in 0..<300 {
            let result = try frontEnd.requests.run(SCSICommand(unit0, CDB.read(.ten, UInt64(round), 1), dataIn: 512))
            #expect(result.isGood)
        }
    }

    @Test func theLogicalUnitIsFoundInBothFormats() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        world.perform {
            $0.addUnit(at: 3)
            $0.addUnit(at: 300)
        }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        for address in [
            VirtioSCSIAddress.flat(target: 0, lun: 3), .peripheral(target: 0, lun: 3), .flat(target: 0, lun: 300),
        ] {
            #expect(try frontEnd.requests.runPastUnitAttentions(SCSICommand(address, [0])).isGood)
        }
        let known = try frontEnd.requests.runPastUnitAttentions(
            SCSICommand(.reportLUNs, CDB.reportLUNs(), dataIn: 64))
        #expect(known.isGood)
        #expect(known.dataIn[3] == 24)
    }

    @Test func anAbsentTargetIsABadTargetAndAnAbsentUnitIsNot() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        for bytes in [[1, 1, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]] as [[UInt8]] {
            let result = try frontEnd.requests.run(SCSICommand(VirtioSCSIAddress(bytes: bytes), [0]))
            #expect(result.response == UInt8(VIRTIO_SCSI_S_BAD_TARGET))
        }
        let unit = try frontEnd.requests.run(SCSICommand(.flat(target: 0, lun: 9), [0]))
        #expect(unit.response == 0 && unit.status == 2 && unit.additionalSense == 0x2500)
        // The lower levels of the LUN field must be zero.
        let deep = try frontEnd.requests.run(SCSICommand(VirtioSCSIAddress(bytes: [1, 0, 0x40, 0, 0, 1, 0, 0]), [0]))
        #expect(deep.response == 0 && deep.status == 2 && deep.additionalSense == 0x2500)
    }

    @Test func aRequestHeaderThatIsTooShortIsAFailure() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let chain = frontEnd.requests.submit(readable: [UInt8](repeating: 1, count: 50), writable: 108)
        try frontEnd.requests.wait(for: chain)
        #expect(chain.written[11] == UInt8(VIRTIO_SCSI_S_FAILURE))
    }

    @Test func aCommandWithDataBothWaysIsAFailure() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let command = SCSICommand(unit0, [0], dataOut: [1], dataIn: 1)
        #expect(try frontEnd.requests.run(command).response == UInt8(VIRTIO_SCSI_S_FAILURE))
    }

    @Test func aReadThatAsksForMoreThanTheBuffersHoldIsAnOverrun() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let result = try frontEnd.requests.run(SCSICommand(unit0, CDB.read(.ten, 0, 2), dataIn: 512))
        #expect(result.response == UInt8(VIRTIO_SCSI_S_OVERRUN))
    }

    @Test func whatIsNotUsedOfABufferIsItsResidual() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let result = try frontEnd.requests.run(SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 4096))
        #expect(result.isGood && result.residual == 4096 - 512)
        #expect(result.dataIn[512...].allSatisfy { $0 == DriverQueue.untouched })
        #expect(result.usedLength == 108 + 512)
    }

    @Test func theSenseFieldIsWrittenWholeWhetherThereIsSenseOrNot() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let bad = try frontEnd.requests.run(SCSICommand(unit0, [0xff]))
        #expect(bad.status == 2 && bad.senseKey == 5 && bad.additionalSense == 0x2000)
        for cdb in [[0], [0xff]] as [[UInt8]] {
            let request = frontEnd.requests.submit(SCSICommand(unit0, cdb))
            let result = try request.wait()
            #expect(result.usedLength == 108)
            #expect(!request.chain.written[(12 + result.sense.count)...].contains(DriverQueue.untouched))
        }
    }

    @Test func anAbortedCommandIsAnsweredBeforeItsAbort() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        var command = SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512)
        command.tag = 0x1234_5678_9abc_def0
        let request = frontEnd.requests.submit(command)
        world.wait { $0.backstore.pending.count == 1 }
        let abort = frontEnd.control.submitTaskManagement(
            VIRTIO_SCSI_T_TMF_ABORT_TASK, unit0, tag: command.tag, layout: ChainLayout(readable: [3, 9]))
        world.wait { $0.backstore.cancellations == 1 }
        try frontEnd.control.collect()
        #expect(!abort.isComplete)
        world.hold(false)
        try frontEnd.control.wait(for: abort)
        // No waiting: when the function is answered, the command has been.
        try frontEnd.requests.collect()
        #expect(try request.result().response == UInt8(VIRTIO_SCSI_S_ABORTED))
        #expect(abort.written == [UInt8(VIRTIO_SCSI_S_OK)])
    }

    @Test func aCommandEndedByAResetSaysSo() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        let request = frontEnd.requests.submit(SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512))
        world.wait { $0.backstore.pending.count == 1 }
        let reset = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit0)
        world.wait { $0.backstore.cancellations == 1 }
        world.hold(false)
        try frontEnd.control.wait(for: reset)
        try frontEnd.requests.collect()
        #expect(try request.result().response == UInt8(VIRTIO_SCSI_S_RESET))
    }

    @Test func taskManagementAnswersByTheSpecification() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let absent = VirtioSCSIAddress.flat(target: 7, lun: 0)
        let noUnit = VirtioSCSIAddress.flat(target: 0, lun: 7)
        let reset = VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET
        #expect(try frontEnd.control.taskManagement(reset, absent) == UInt8(VIRTIO_SCSI_S_BAD_TARGET))
        #expect(try frontEnd.control.taskManagement(reset, noUnit) == UInt8(VIRTIO_SCSI_S_INCORRECT_LUN))
        #expect(try frontEnd.control.taskManagement(99, unit0) == UInt8(VIRTIO_SCSI_S_FUNCTION_REJECTED))
        let query = VIRTIO_SCSI_T_TMF_QUERY_TASK
        #expect(try frontEnd.control.taskManagement(query, unit0, tag: 5) == UInt8(VIRTIO_SCSI_S_OK))
        world.hold(true)
        var command = SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512)
        command.tag = 5
        let request = frontEnd.requests.submit(command)
        world.wait { $0.backstore.pending.count == 1 }
        #expect(try frontEnd.control.taskManagement(query, unit0, tag: 5) == UInt8(VIRTIO_SCSI_S_FUNCTION_SUCCEEDED))
        world.hold(false)
        #expect(try request.wait().isGood)
    }

    @Test func asynchronousNotificationsAreGrantedAsFarAsThereAreSuch() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        for type in [VIRTIO_SCSI_T_AN_QUERY, VIRTIO_SCSI_T_AN_SUBSCRIBE] {
            let answer = try frontEnd.control.asynchronousNotification(type, unit0, events: 0x7e)
            // Operational change and media change, of the six that there are.
            #expect(answer.events == 0x12 && answer.response == 0)
            let noUnit = try frontEnd.control.asynchronousNotification(type, .flat(target: 0, lun: 7), events: 2)
            #expect(noUnit.events == 0 && noUnit.response == UInt8(VIRTIO_SCSI_S_INCORRECT_LUN))
            let absent = try frontEnd.control.asynchronousNotification(type, .flat(target: 9, lun: 0), events: 2)
            #expect(absent.response == UInt8(VIRTIO_SCSI_S_BAD_TARGET))
        }
    }

    @Test func theLastUnitOfTheLastTargetIsReachedAndNoneIsBeyond() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        world.perform { objects in
            objects.addUnit(at: 16_383)
            objects.addUnit(at: 200)
            objects.server.attach(objects.target, number: 255)
        }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        for address in [
            VirtioSCSIAddress.flat(target: 255, lun: 16_383), .flat(target: 255, lun: 200),
            .peripheral(target: 255, lun: 200), .flat(target: 0, lun: 16_383),
        ] {
            #expect(try frontEnd.requests.runPastUnitAttentions(SCSICommand(address, [0])).isGood)
        }
        let absent = try frontEnd.requests.run(SCSICommand(.flat(target: 254, lun: 0), [0]))
        #expect(absent.response == UInt8(VIRTIO_SCSI_S_BAD_TARGET))
        let inquiry = try frontEnd.requests.run(
            SCSICommand(.flat(target: 255, lun: 16_382), CDB.inquiry(), dataIn: 255))
        #expect(inquiry.dataIn[0] == 0x7f)
        let units = try frontEnd.requests.run(
            SCSICommand(.reportLUNs, [0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], dataIn: 256))
        #expect(units.isGood && WireBytes.read(UInt32.self, units.dataIn, at: 0) == UInt32(24).bigEndian)
    }

    @Test func aControlRequestOfUnknownTypeComesBackEmpty() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let chain = frontEnd.control.submit(readable: WireBytes.of(UInt32(77), 0, 0, 0, 0, 0), writable: 5)
        try frontEnd.control.wait(for: chain)
        #expect(chain.usedLength == 0)
        #expect(chain.written.allSatisfy { $0 == DriverQueue.untouched })
    }

    @Test func aFunctionThatWaitsForATargetThatGoesAwayIsAnsweredAfterItsTasks() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        let request = frontEnd.requests.submit(SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512))
        world.wait { $0.backstore.pending.count == 1 }
        let reset = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit0)
        world.wait { $0.backstore.cancellations == 1 }
        world.perform { $0.server.detach(number: 0) }
        try frontEnd.control.collect()
        #expect(!reset.isComplete)
        world.hold(false)
        try frontEnd.control.wait(for: reset)
        #expect(reset.written == [UInt8(VIRTIO_SCSI_S_BAD_TARGET)])
        try frontEnd.requests.collect()
        #expect(request.chain.isComplete)
    }

    @Test func aStopDoesNotWaitForAFunctionOfAFrontEndThatIsGone() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        _ = frontEnd.requests.submit(SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512))
        world.wait { $0.backstore.pending.count == 1 }
        _ = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit0)
        world.wait { $0.backstore.cancellations == 1 }
        frontEnd.disconnect()
        world.wait { !$0.server.isConnected }
        world.hold(false)
        world.stop()
    }

    @Test func everyReferenceNumberIsAccepted() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        // In order, with a gap, backwards, repeated, and the number that says nothing.
        for reference: UInt8 in [1, 2, 9, 3, 3, 255, 0, 1] {
            var command = SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512)
            command.reference = reference
            command.priority = reference
            #expect(try frontEnd.requests.run(command).isGood)
        }
    }

    @Test func manyCommandsOnSeveralQueuesAreAllAnswered() throws {
        let world = try ServerWorld(requestQueues: 4, pollMicroseconds: 20)
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        options.queues = 6
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        for round in 0..<200 {
            var inFlight: [SCSIInFlight] = []
            for (number, queue) in frontEnd.queues[2...].enumerated() {
                for depth in 0..<20 {
                    let block = UInt64((round * 80 + number * 20 + depth) % 4096)
                    inFlight.append(queue.enqueue(SCSICommand(unit0, CDB.read(.ten, block, 1), dataIn: 512)))
                }
                queue.publish()
            }
            for request in inFlight { #expect(try request.wait().isGood) }
        }
    }
}
