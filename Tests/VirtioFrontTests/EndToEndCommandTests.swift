// EndToEndCommandTests: commands over a real socket: layouts, queues, residuals, response codes.
//
// Called by: swift test. Must not know: the server's inside.

import Backstores
import Testing
import VhostUserInitiator

@Suite
struct EndToEndCommandTests {
    /// COMPARE AND WRITE of two blocks: `old` becomes `new`.
    private func compareAndWrite(_ old: [UInt8], _ new: [UInt8]) -> SCSICommand {
        SCSICommand(unit(0), [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0, 2, 0, 0], dataOut: old + new)
    }

    @Test
    func compareAndWriteThroughTwoFrontsLosesNoUpdate() throws {
        try withDaemon(sockets: 2) { daemon in
            let frontEnds = try (0..<2).map { try VhostUserFrontEnd.ready(daemon, socket: $0) }
            for frontEnd in frontEnds { _ = try frontEnd.requests.runPastUnitAttentions(testUnitReady(unit(0))) }
            // Between the read and the write of one there is time for all the others.
            daemon.inject(0, .delay(nanoseconds: 20_000), times: .max)
            var current = [UInt8](repeating: 0, count: 1024)
            var next: UInt8 = 0
            var wins = [0, 0]
            for round in 0..<100 {
                var contenders: [(front: Int, new: [UInt8], flight: SCSIInFlight)] = []
                for turn in 0..<6 {
                    next &+= 1
                    let new = pattern(1024, seed: next)
                    let front = (turn + round) % 2
                    let command = compareAndWrite(current, new)
                    contenders.append((front: front, new: new, flight: frontEnds[front].requests.submit(command)))
                }
                let ends = try contenders.map { (contender: $0, result: try $0.flight.wait()) }
                let winners = ends.filter(\.result.isGood)
                #expect(winners.count == 1, "\(winners.count) of six that compare with the same data have won")
                let losers = ends.filter { $0.result.senseKey == 0xe && $0.result.additionalSense == 0x1d00 }
                #expect(losers.count == 5)
                guard let winner = winners.first?.contender else { return }
                wins[winner.front] += 1
                current = winner.new
                let read = try frontEnds[round % 2].requests.run(read10(unit(0), block: 40, count: 2))
                #expect(read.dataIn == current, "the medium does not hold what the winner has written")
            }
            #expect(wins[0] > 0 && wins[1] > 0, "one front has never won: \(wins)")
            daemon.perform { $0.faults[0].clearFaults() }
        }
    }

    @Test
    func inquiryAnswersAndTellsTheResidual() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let result = try frontEnd.requests.run(SCSICommand(unit(0), [0x12, 0, 0, 0, 255, 0], dataIn: 255))
            #expect(result.isGood)
            #expect(result.dataIn[0] == 0 && Array(result.dataIn[8..<15]) == Array("TARGETD".utf8))
            let length = 5 + Int(result.dataIn[4])
            #expect(Int(result.residual) == 255 - length)
            #expect(Int(result.usedLength) == 108 + length)
            #expect(result.dataIn[length...].allSatisfy { $0 == DriverQueue.untouched })
        }
    }

    /// Rings with each combination of features.
    static let featureSets: [UInt64] = [
        0, VirtioFeatureBit.eventIndex, VirtioFeatureBit.indirectDescriptors,
        VirtioFeatureBit.eventIndex | VirtioFeatureBit.indirectDescriptors,
    ]

    /// Cuts of header with data out, and of response with data in.
    static let layouts: [ChainLayout] = [
        ChainLayout(readable: [51], writable: [108]),
        ChainLayout(readable: [1, 7, 43], writable: [11, 1, 96]),
        ChainLayout(readable: [19, 16, 16, 512], writable: [108, 3, 509, 512]),
        ChainLayout(readable: [], writable: []),
        ChainLayout(readable: [50, 2, 1000], writable: [107, 2, 1000]),
        ChainLayout(readable: Array(repeating: 51, count: 12), writable: Array(repeating: 54, count: 12)),
        ChainLayout(readable: [51 + 777, 778], writable: [108 + 777, 778]),
    ]

    @Test(arguments: featureSets, [false, true])
    func dataSurvivesEveryLayout(features: UInt64, manyRegions: Bool) throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.features &= ~(VirtioFeatureBit.eventIndex | VirtioFeatureBit.indirectDescriptors)
            options.features |= features
            options.memoryRegions = manyRegions ? 5 : 1
            options.addsRegionsSingly = manyRegions
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            for (number, layout) in Self.layouts.enumerated() {
                var layout = layout
                layout.isIndirect = features & VirtioFeatureBit.indirectDescriptors != 0
                let data = pattern(2048, seed: UInt8(number))
                var write = write10(unit(0), block: UInt32(8 * number), data)
                write.layout = layout
                let written = try frontEnd.requests.run(write)
                #expect(written.isGood && written.residual == 0 && written.usedLength == 108)
                var read = read10(unit(0), block: UInt32(8 * number), count: 4)
                read.layout = layout
                let result = try frontEnd.requests.run(read)
                #expect(result.isGood && result.residual == 0 && result.usedLength == 108 + 2048)
                #expect(result.dataIn == data)
            }
        }
    }

    @Test
    func severalQueuesWorkAtOnce() throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.queues = 2 + TestDaemon.requestQueues
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            var writes: [SCSIInFlight] = []
            for number in 0..<20 {
                for queue in frontEnd.queues[2...] {
                    let block = UInt32(number * TestDaemon.requestQueues + queue.index)
                    writes.append(queue.enqueue(write10(unit(1), block: block, pattern(512, seed: UInt8(block)))))
                }
            }
            for queue in frontEnd.queues[2...] { queue.publish() }
            for write in writes { #expect(try write.wait().isGood) }
            for queue in frontEnd.queues[2...] {
                let result = try queue.run(read10(unit(1), block: 2, count: 80))
                #expect(result.isGood)
                #expect(result.dataIn == (2..<82).flatMap { pattern(512, seed: UInt8($0)) })
            }
        }
    }

    @Test
    func indicesWrapAround() throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.ringSize = 4
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            var command = testUnitReady(unit(0))
            command.layout.isIndirect = true
            for _ in 0..<70_000 / 4 {
                let batch = (0..<4).map { _ in frontEnd.requests.enqueue(command) }
                frontEnd.requests.publish()
                for inFlight in batch { #expect(try inFlight.wait().isGood) }
            }
        }
    }

    @Test
    func dataShorterThanTheCommandWantsIsAnOverrun() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let read = try frontEnd.requests.run(read10(unit(0), block: 0, count: 4, dataIn: 1024))
            #expect(read.response == 1)
            var write = write10(unit(0), block: 0, pattern(2048, seed: 1))
            write.dataOut = Array(write.dataOut[..<1024])
            #expect(try frontEnd.requests.run(write).response == 1)
        }
    }

    @Test
    func dataLongerThanTheCommandWantsIsAResidual() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let read = try frontEnd.requests.run(read10(unit(0), block: 0, count: 1, dataIn: 2048))
            #expect(read.isGood && read.residual == 1536 && read.usedLength == 108 + 512)
            #expect(read.dataIn[512...].allSatisfy { $0 == DriverQueue.untouched })
        }
    }

    @Test
    func aBadCommandHasSense() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let result = try frontEnd.requests.run(read10(unit(0), block: 0x00ff_ffff, count: 1))
            #expect(result.response == 0 && result.status == 2)
            #expect(result.senseKey == 5 && result.additionalSense == 0x2100)
            #expect(result.residual == 512)
        }
    }

    @Test
    func absentTargetsAreBadTargets() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            for target: UInt8 in [1, 2, 63, 255] {
                let inquiry = SCSICommand(.peripheral(target: target, lun: 0), [0x12, 0, 0, 0, 36, 0], dataIn: 36)
                #expect(try frontEnd.requests.run(inquiry).response == 3)
            }
            let strange = VirtioSCSIAddress(bytes: [2, 0, 0x40, 0, 0, 0, 0, 0])
            #expect(try frontEnd.requests.run(testUnitReady(strange)).response == 3)
        }
    }

    @Test
    func bothLUNFormatsAddressTheSameUnit() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let data = pattern(512, seed: 77)
            #expect(try frontEnd.requests.run(write10(.flat(target: 0, lun: 1), block: 5, data)).isGood)
            let result = try frontEnd.requests.run(read10(.peripheral(target: 0, lun: 1), block: 5, count: 1))
            #expect(result.isGood && result.dataIn == data)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 5, count: 1)).dataIn != data)
        }
    }

    @Test
    func anAbsentLogicalUnitIsNotSupported() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            for address in [unit(2), unit(16_383), .peripheral(target: 0, lun: 9)] {
                let result = try frontEnd.requests.run(testUnitReady(address))
                #expect(result.response == 0 && result.status == 2 && result.additionalSense == 0x2500)
            }
        }
    }

    @Test
    func reportLUNsIsAnsweredEverywhere() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let cdb: [UInt8] = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0]
            for address in [unit(0), unit(7), .reportLUNs] {
                let result = try frontEnd.requests.run(SCSICommand(address, cdb, dataIn: 64))
                #expect(result.isGood && Array(result.dataIn[0..<4]) == [0, 0, 0, 16])
                #expect(Array(result.dataIn[8..<24]) == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
            }
        }
    }

    @Test
    func aFailingMediumIsAMediumError() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            daemon.inject(0, .fail(errno: 5))
            let result = try frontEnd.requests.run(read10(unit(0), block: 0, count: 1))
            #expect(result.response == 0 && result.status == 2 && result.senseKey == 3)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 0, count: 1)).isGood)
        }
    }

    @Test
    func completionsComeInTheOrderOfTheMedium() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            daemon.inject(0, .hold)
            let first = frontEnd.requests.submit(read10(unit(0), block: 0, count: 1))
            try daemon.waitForHeld(1)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 8, count: 1)).isGood)
            #expect(!first.chain.isComplete)
            daemon.release()
            #expect(try first.wait().isGood)
        }
    }
}
