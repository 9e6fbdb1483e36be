// BidirectionalTests: VIRTIO_SCSI_F_INOUT: requests with data both ways, on every kind of ring.
//
// Called by: swift test. Must not know: how the server is written.

import Backstores
import CLinux
import CoreTestSupport
import Testing
import VhostUserInitiator
import VirtioFront

@Suite struct BidirectionalTests {
    private static let old = pattern(512, seed: 3)
    private static let new = pattern(512, seed: 101)
    private static var difference: [UInt8] { zip(old, new).map { $0 ^ $1 } }

    private func options(_ ring: RingFeatures? = nil) -> VhostUserFrontEnd.Options {
        var options = ring?.options ?? VhostUserFrontEnd.Options()
        options.features |= VirtioFeatureBit.inOut
        options.queues = 4
        return options
    }

    private func writeRead(_ block: UInt64, _ dataOut: [UInt8], dataIn: Int, flags: UInt8 = 0) -> SCSICommand {
        SCSICommand(
            unit(0), CDB.xdWriteRead(block, UInt64(dataOut.count / 512), flags: flags), dataOut: dataOut,
            dataIn: dataIn)
    }

    /// A started front-end; `old` is in the first blocks.
    private func ready(_ daemon: TestDaemon, _ options: VhostUserFrontEnd.Options) throws -> VhostUserFrontEnd {
        let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
        for block: UInt32 in 0..<8 {
            #expect(try frontEnd.requests.run(write10(unit(0), block: block, Self.old)).isGood)
        }
        return frontEnd
    }

    @Test func aRequestWithDataBothWaysIsCarriedOutOnlyWhereThatWasNegotiated() throws {
        try withDaemon { daemon in
            var without = options()
            without.features &= ~VirtioFeatureBit.inOut
            let frontEnd = try ready(daemon, without)
            #expect(frontEnd.offeredFeatures & VirtioFeatureBit.inOut != 0)
            for queue in frontEnd.queues[2...] {
                let result = try queue.run(writeRead(1, Self.new, dataIn: 512))
                #expect(result.response == UInt8(VIRTIO_SCSI_S_FAILURE))
                #expect(result.residual == 1024)
                #expect(result.dataIn.allSatisfy { $0 == DriverQueue.untouched })
            }
            #expect(try frontEnd.requests.run(read10(unit(0), block: 1, count: 1)).dataIn == Self.old)
        }
    }

    @Test(arguments: RingFeatures.all)
    func dataGoesBothWaysInEveryCombinationOfRingFeatures(_ ring: RingFeatures) throws {
        try withDaemon { daemon in
            let frontEnd = try ready(daemon, options(ring))
            #expect(frontEnd.features & VirtioFeatureBit.inOut != 0)
            let layouts = [
                ChainLayout(), ChainLayout(readable: [51, 100], writable: [108, 7]),
                ChainLayout(readable: [3, 60], writable: [1, 200]),
            ]
            // The second request queue is served by the other thread, if there are two.
            for (number, queue) in frontEnd.queues[2...].enumerated() {
                for (index, layout) in layouts.enumerated() {
                    let block = UInt64(number * layouts.count + index)
                    var command = writeRead(block, Self.new, dataIn: 512)
                    command.layout = layout
                    command.layout.isIndirect = ring.isIndirect
                    let result = try queue.run(command)
                    #expect(result.isGood && result.residual == 0 && result.usedLength == 108 + 512)
                    #expect(result.dataIn == Self.difference)
                    #expect(
                        try queue.run(read10(unit(0), block: UInt32(block), count: 1)).dataIn == Self.new)
                }
            }
        }
    }

    @Test(arguments: [false, true], [false, true])
    func aChainMayBeAsLongAsTheRing(_ isPacked: Bool, _ isIndirect: Bool) throws {
        let ring = RingFeatures(
            isPacked: isPacked, isIndirect: isIndirect, usesEventIndex: true, isInOrder: false, ringSize: 16)
        try withDaemon { daemon in
            let frontEnd = try ready(daemon, options(ring))
            // Header and response, and seven descriptors of data each way.
            var command = writeRead(2, Self.new, dataIn: 512)
            command.layout = ChainLayout(
                readable: [51] + Array(repeating: 73, count: 6), writable: [108] + Array(repeating: 73, count: 6),
                isIndirect: isIndirect)
            let result = try frontEnd.requests.run(command)
            #expect(result.isGood)
            #expect(result.dataIn == Self.difference)
        }
    }

    @Test func theResidualIsWhatWasNotMovedEitherWay() throws {
        try withDaemon { daemon in
            let frontEnd = try ready(daemon, options())
            var command = writeRead(1, Self.new + Self.new + Self.new, dataIn: 1000)
            command.cdb = CDB.xdWriteRead(1, 1)
            let result = try frontEnd.requests.run(command)
            #expect(result.isGood && result.residual == 1024 + 488 && result.usedLength == 108 + 512)
            #expect(Array(result.dataIn.prefix(512)) == Self.difference)
            #expect(result.dataIn[512...].allSatisfy { $0 == DriverQueue.untouched })
        }
    }

    @Test(arguments: [(511, 512), (512, 511)])
    func aBufferThatIsTooShortIsAnOverrunWhicheverItIs(_ out: Int, _ into: Int) throws {
        try withDaemon { daemon in
            let frontEnd = try ready(daemon, options())
            let command = SCSICommand(
                unit(0), CDB.xdWriteRead(1, 1), dataOut: Array(Self.new.prefix(out)), dataIn: into)
            let result = try frontEnd.requests.run(command)
            #expect(result.response == UInt8(VIRTIO_SCSI_S_OVERRUN))
            #expect(result.residual == 1023)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 1, count: 1)).dataIn == Self.old)
        }
    }

    @Test func aCommandOfOneWayLeavesTheOtherBufferAlone() throws {
        try withDaemon { daemon in
            let frontEnd = try ready(daemon, options())
            var read = read10(unit(0), block: 1, count: 1)
            read.dataOut = Self.new
            let wasRead = try frontEnd.requests.run(read)
            #expect(wasRead.isGood && wasRead.residual == 512 && wasRead.dataIn == Self.old)
            var write = write10(unit(0), block: 1, Self.new)
            write.dataIn = 512
            let written = try frontEnd.requests.run(write)
            #expect(written.isGood && written.residual == 512 && written.usedLength == 108)
            #expect(written.dataIn.allSatisfy { $0 == DriverQueue.untouched })
            var none = testUnitReady(unit(0))
            (none.dataOut, none.dataIn) = ([1], 1)
            let result = try frontEnd.requests.run(none)
            #expect(result.isGood && result.residual == 2 && result.usedLength == 108)
        }
    }

    @Test func whatIsReturnedIsInTheDirtyLog() throws {
        try withDaemon { daemon in
            var logged = options()
            logged.protocolFeatures |= VhostUserProtocolBit.logSharedMemory
            logged.memorySize = 1 << 20
            let frontEnd = try ready(daemon, logged)
            let log = try frontEnd.startLogging()
            let request = frontEnd.requests.submit(
                writeRead(0, (0..<64).flatMap { _ in Self.new }, dataIn: 64 * 512))
            #expect(try request.wait().isGood)
            let bits = log.read(log.size, at: 0)
            for buffer in request.chain.writableBuffers {
                for page in buffer.address / 4096...(buffer.address + UInt64(buffer.length) - 1) / 4096 {
                    #expect(bits[Int(page / 8)] & 1 << UInt8(page % 8) != 0)
                }
            }
        }
    }

    @Test func anAbortedRequestClaimsNoBytes() throws {
        try withDaemon { daemon in
            let frontEnd = try ready(daemon, options())
            daemon.inject(0, .hold)
            var command = writeRead(1, Self.new, dataIn: 512)
            command.tag = 77
            let request = frontEnd.requests.submit(command)
            try daemon.waitForHeld(1)
            let abort = frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_ABORT_TASK, unit(0), tag: 77)
            daemon.release()
            try frontEnd.control.wait(for: abort)
            let result = try request.wait()
            // The medium may have been faster than the function.
            let isAborted = result.response == UInt8(VIRTIO_SCSI_S_ABORTED)
            #expect(isAborted || result.isGood)
            if isAborted { #expect(result.usedLength == 108 && result.residual >= 512) }
        }
    }
}
