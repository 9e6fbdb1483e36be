// SpreadTests: devices whose queues and targets are on several reactors at once. What every device does is shown by the
// other tests, which run over two reactors too (withDaemon).
//
// Called by: swift test. Must not know: the server's inside.

import Backstores
import CLinux
import CoreTestSupport
import Glibc
import Testing
import VhostUserInitiator

@testable import SCSICore
@testable import VirtioFront

@Suite
struct SpreadTests {
    /// A front-end that uses all request queues: the even ones are served by the servers' reactor, the odd ones by that
    /// of the disks.
    private func ready(_ daemon: TestDaemon, _ options: VhostUserFrontEnd.Options = .init()) throws -> VhostUserFrontEnd
    {
        var options = options
        options.queues = 2 + TestDaemon.requestQueues
        return try .ready(daemon, options: options)
    }

    private func withSpread(sockets: Int = 1, _ body: (TestDaemon) throws -> Void) throws {
        let daemon = try TestDaemon(sockets: sockets, isSpread: true)
        defer { daemon.stop() }
        try body(daemon)
    }

    @Test(arguments: [false, true])
    func whatIsWrittenThroughOneQueueIsReadThroughAnother(_ isPacked: Bool) throws {
        try withSpread { daemon in
            var options = VhostUserFrontEnd.Options()
            if isPacked { options.features |= VirtioFeatureBit.ringPacked }
            let frontEnd = try ready(daemon, options)
            let queues = frontEnd.queues[2...]
            for round in 0..<100 {
                var writes: [(queue: Int, block: UInt32, data: [UInt8], flight: SCSIInFlight)] = []
                for queue in queues {
                    for number in 0..<4 {
                        let block = UInt32((queue.index - 2) * 4 + number)
                        let data = pattern(512, seed: UInt8(truncatingIfNeeded: round &* 17 &+ Int(block)))
                        let flight = queue.enqueue(write10(unit(0), block: block, data))
                        writes.append((queue.index, block, data, flight))
                    }
                    queue.publish()
                }
                for write in writes { #expect(try write.flight.wait().isGood) }
                for write in writes {
                    let other = frontEnd.queues[2 + (write.queue - 1) % TestDaemon.requestQueues]
                    #expect(try other.run(read10(unit(0), block: write.block, count: 1)).dataIn == write.data)
                }
            }
        }
    }

    @Test
    func aFunctionFindsTheCommandsOfAllQueuesAndIsAnsweredAfterThem() throws {
        try withSpread { daemon in
            let frontEnd = try ready(daemon)
            for _ in 0..<50 {
                daemon.inject(0, .hold, times: TestDaemon.requestQueues)
                let reads = frontEnd.queues[2...].map { $0.submit(read10(unit(0), block: 0, count: 1)) }
                try daemon.waitForHeld(TestDaemon.requestQueues)
                let reset = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit(0))
                #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(1), tag: 1) == 0)
                #expect(!reset.isComplete)
                daemon.release()
                try frontEnd.control.wait(for: reset)
                // No waiting here: the answers are in the rings already.
                for queue in frontEnd.queues[2...] { try queue.collect() }
                #expect(
                    reads.allSatisfy { $0.chain.isComplete }, "a command is answered after the function that ended it")
                for read in reads { #expect(try read.result().response == UInt8(VIRTIO_SCSI_S_RESET)) }
                let attention = try frontEnd.queues[3].run(testUnitReady(unit(0)))
                #expect(attention.senseKey == 6 && attention.additionalSense! >> 8 == 0x29)
            }
        }
    }

    /// The commands lie in their rings, of which nobody has been told, when the function is sent.
    @Test
    func aFunctionFindsWhatIsStillInTheRings() throws {
        try withSpread { daemon in
            let frontEnd = try ready(daemon)
            for round in 0..<50 {
                daemon.inject(0, .hold, times: TestDaemon.requestQueues)
                let reads = frontEnd.queues[2...].map { queue in
                    var command = read10(unit(0), block: 0, count: 1)
                    command.tag = UInt64(round * 16 + queue.index)
                    let flight = queue.enqueue(command)
                    _ = queue.packed == nil ? queue.ring.publish() : false
                    return flight
                }
                let abort = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_ABORT_TASK_SET, unit(0))
                try daemon.waitForHeld(TestDaemon.requestQueues)
                // The function follows the commands to the unit's reactor: it is there when one behind it is answered.
                #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(1), tag: 1) == 0)
                daemon.release()
                try frontEnd.control.wait(for: abort)
                for queue in frontEnd.queues[2...] { try queue.collect() }
                #expect(reads.allSatisfy { $0.chain.isComplete })
                for read in reads { #expect(try read.result().response == UInt8(VIRTIO_SCSI_S_ABORTED)) }
            }
        }
    }

    @Test
    func oneQueueStopsAndGoesOnWhileTheOthersWork() throws {
        try withSpread { daemon in
            let frontEnd = try ready(daemon)
            for index in 2..<2 + TestDaemon.requestQueues {
                let queue = frontEnd.queues[index]
                let other = frontEnd.queues[2 + (index - 1) % TestDaemon.requestQueues]
                daemon.inject(0, .hold)
                let read = queue.submit(read10(unit(0), block: 0, count: 1))
                try daemon.waitForHeld(1)
                try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(index), 0))
                #expect(try other.run(read10(unit(0), block: 1, count: 1)).isGood)
                #expect(!read.chain.isComplete)
                daemon.release()
                let reply = try frontEnd.channel.receive()
                #expect(reply.payload == WireBytes.of(UInt32(index), UInt32(queue.ring.availableIndex)))
                try queue.collect()
                #expect(try read.result().isGood, "the command was answered before its queue's base")
                let pending = queue.submit(testUnitReady(unit(0)))
                try frontEnd.start(queue)
                #expect(try pending.wait().isGood)
            }
        }
    }

    @Test
    func memoryMovesUnderTheQueuesOfAllReactors() throws {
        try withSpread { daemon in
            let frontEnd = try ready(daemon)
            for round in 0..<20 {
                daemon.inject(0, .hold, times: TestDaemon.requestQueues)
                let reads = frontEnd.queues[2...].map { $0.submit(read10(unit(0), block: 0, count: 1)) }
                try daemon.waitForHeld(TestDaemon.requestQueues)
                let more = try SharedMemory(size: 1 << 20, guestAddress: 0x10_0000_0000 + UInt64(round) << 24)
                try frontEnd.addRegion(more)
                for queue in frontEnd.queues[2...] {
                    #expect(try queue.run(read10(unit(0), block: 1, count: 1)).isGood)
                }
                try frontEnd.removeRegion(more)
                daemon.release()
                for read in reads { #expect(try read.wait().isGood) }
                // Nobody has a request there: with the next table the last mapping goes.
                try frontEnd.shareMemory()
                #expect(try mappings(of: more) == 1)
            }
        }
    }

    @Test
    func aBrokenQueueIsToldAndTheOthersGoOn() throws {
        try withSpread { daemon in
            let frontEnd = try ready(daemon)
            let broken = frontEnd.queues[3]
            // A response that does not fit.
            _ = broken.submit(readable: [UInt8](repeating: 0, count: 51), writable: 1)
            try broken.waitForError()
            for queue in frontEnd.queues[2...] where queue !== broken {
                #expect(try queue.run(testUnitReady(unit(0))).isGood)
            }
            #expect(daemon.complaints().contains { $0.contains("Ring 3 is out of service") })
        }
    }

    @Test
    func aFrontEndThatGoesLeavesItsCommandsToTheirEndOnAllReactors() throws {
        try withSpread { daemon in
            for _ in 0..<20 {
                let frontEnd = try ready(daemon)
                daemon.inject(0, .hold, times: TestDaemon.requestQueues)
                let reads = frontEnd.queues[2...].map { $0.submit(read10(unit(0), block: 0, count: 1)) }
                try daemon.waitForHeld(TestDaemon.requestQueues)
                let reset = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit(0))
                #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_QUERY_TASK, unit(1), tag: 1) == 0)
                frontEnd.disconnect()
                try daemon.waitForDisconnection()
                daemon.release()
                // It is served only when nothing of the other is left.
                let next = try ready(daemon)
                #expect(try next.requests.run(testUnitReady(unit(0))).isGood)
                #expect(!reset.isComplete && reads.allSatisfy { !$0.chain.isComplete })
                #expect(frontEnd.queues[2...].allSatisfy { !$0.hasUsed })
                next.disconnect()
                try daemon.waitForDisconnection()
            }
        }
    }

    @Test
    func aResetBeginsAnewOnAllReactors() throws {
        try withSpread { daemon in
            var options = VhostUserFrontEnd.Options()
            options.protocolFeatures |= VhostUserProtocolBit.resetDevice
            let frontEnd = try ready(daemon, options)
            for _ in 0..<20 {
                daemon.inject(0, .hold, times: TestDaemon.requestQueues)
                let reads = frontEnd.queues[2...].map { $0.submit(read10(unit(0), block: 0, count: 1)) }
                try daemon.waitForHeld(TestDaemon.requestQueues)
                try frontEnd.channel.send(.resetDevice, [], needReply: true)
                daemon.release()
                _ = try frontEnd.channel.receive()
                for queue in frontEnd.queues[2...] { try queue.collect() }
                for read in reads { #expect(try read.result().isGood) }
                for queue in frontEnd.queues { queue.reset() }
                try frontEnd.startQueues()
                let attention = try frontEnd.queues[3].run(testUnitReady(unit(0)))
                #expect(attention.senseKey == 6 && attention.additionalSense == 0x2907)
                #expect(try frontEnd.queues[2].run(testUnitReady(unit(0))).isGood)
                #expect(try frontEnd.queues[2].runPastUnitAttentions(testUnitReady(unit(1))).isGood)
            }
        }
    }

    @Test
    func moreCommandsThanALinkTakesAreAllAnswered() throws {
        try withSpread { daemon in
            var options = VhostUserFrontEnd.Options()
            options.ringSize = 1024
            options.memorySize = 64 << 20
            let frontEnd = try ready(daemon, options)
            // Each reactor has two of the queues, and one link into that of the disks.
            daemon.inject(0, .hold, times: .max)
            var reads: [SCSIInFlight] = []
            for queue in frontEnd.queues[2...] {
                for _ in 0..<1024 { reads.append(queue.enqueue(testSmallRead())) }
                queue.publish()
            }
            try daemon.eventually("both links to be full") { objects in
                objects.target.logicalUnits[0].unit.tasksInFlight == 2 * ShardReactor.linkCapacity
            }
            daemon.perform { $0.faults[0].clearFaults() }
            // What had no room waits in the rings, without anybody looking at them again and again.
            for read in reads {
                while !read.chain.isComplete {
                    daemon.release()
                    for queue in frontEnd.queues[2...] { try queue.collect() }
                }
            }
            for read in reads { #expect(try read.result().isGood) }
        }
    }

    private func testSmallRead() -> SCSICommand {
        var command = read10(unit(0), block: 0, count: 1)
        command.layout.isIndirect = true
        return command
    }

    @Test
    func manyFrontEndsComeAndGoUnderLoad() throws {
        try withSpread(sockets: 4) { daemon in
            for _ in 0..<10 {
                let frontEnds = try daemon.paths.indices.map { index -> VhostUserFrontEnd in
                    var options = VhostUserFrontEnd.Options()
                    options.queues = 2 + TestDaemon.requestQueues
                    options.memorySize = 2 << 20
                    return try .ready(daemon, socket: index, options: options)
                }
                for frontEnd in frontEnds {
                    for queue in frontEnd.queues[2...] {
                        for number in 0..<16 {
                            _ = queue.enqueue(read10(unit(UInt16(number % 2)), block: UInt32(number), count: 1))
                        }
                        queue.publish()
                    }
                }
                for (index, frontEnd) in frontEnds.enumerated() {
                    frontEnd.disconnect()
                    try daemon.waitForDisconnection(index)
                }
            }
        }
    }
}
