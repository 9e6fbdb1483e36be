// DirtyLogTests: each page of the guest's memory that the device has changed is in the dirty log.
//
// Called by: swift test. Must not know: how the server is written.

import Backstores
import CLinux
import Testing
import VhostUserInitiator

@Suite struct DirtyLogTests {
    private static let page = 4096

    /// Pages of all memory that differ from a copy.
    private func changed(_ frontEnd: VhostUserFrontEnd, since copies: [[UInt8]]) -> Set<UInt64> {
        var pages: Set<UInt64> = []
        for (memory, copy) in zip(frontEnd.memories, copies) {
            let now = memory.read(memory.size, at: memory.guestAddress)
            for start in stride(from: 0, to: memory.size, by: Self.page)
            where now[start..<start + Self.page] != copy[start..<start + Self.page] {
                pages.insert((memory.guestAddress + UInt64(start)) / UInt64(Self.page))
            }
        }
        return pages
    }

    private func logged(_ log: SharedMemory) -> Set<UInt64> {
        var pages: Set<UInt64> = []
        for (index, byte) in log.read(log.size, at: 0).enumerated() where byte != 0 {
            for bit in 0..<8 where byte & 1 << UInt8(bit) != 0 { pages.insert(UInt64(index * 8 + bit)) }
        }
        return pages
    }

    @Test(arguments: [(false, false), (false, true), (true, false), (true, true)])
    func everyPageThatTheDeviceChangesIsLogged(_ isPacked: Bool, _ usesEventIndex: Bool) throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.protocolFeatures |= VhostUserProtocolBit.logSharedMemory
            options.memorySize = 1 << 20
            options.memoryRegions = 2
            options.ringSize = 32
            if isPacked { options.features |= VirtioFeatureBit.ringPacked }
            if !usesEventIndex { options.features &= ~VirtioFeatureBit.eventIndex }
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            #expect(try frontEnd.requests.run(write10(unit(0), block: 0, pattern(65_536, seed: 5))).isGood)
            let log = try frontEnd.startLogging()
            // What is made available is written by the driver: the copies are made behind that.
            daemon.inject(0, .hold)
            let held = frontEnd.requests.enqueue(read10(unit(0), block: 0, count: 64))
            let refused = frontEnd.requests.enqueue(SCSICommand(.flat(target: 9, lun: 0), [0]))
            let sense = frontEnd.requests.enqueue(SCSICommand(unit(0), [0xff]))
            let event = frontEnd.events.enqueue(readable: [], writable: 16)
            let function = frontEnd.control.enqueue(
                readable: WireBytes.of(UInt32(VIRTIO_SCSI_T_TMF), UInt32(VIRTIO_SCSI_T_TMF_QUERY_TASK))
                    + unit(0).bytes + WireBytes.of(UInt64(0)), writable: 1)
            let copies = frontEnd.memories.map { $0.read($0.size, at: $0.guestAddress) }
            for queue in [frontEnd.requests, frontEnd.events, frontEnd.control] { queue.publish() }
            try daemon.waitForHeld(1)
            daemon.release()
            daemon.removeUnit(1)
            for queue in [frontEnd.requests, frontEnd.events, frontEnd.control] { try queue.waitForUsed() }
            try daemon.eventually("the requests to end") { _ in true }
            // Compared before the driver touches anything; its own publishing has changed rings, which are logged too
            // or not changed by the device.
            var pages = changed(frontEnd, since: copies)
            for queue in frontEnd.queues {
                let driver = queue.packed.map { [$0.driverAddress] } ?? [queue.ring.availableAddress]
                for address in driver { pages.remove(address / UInt64(Self.page)) }
            }
            let dirty = logged(log)
            #expect(pages.count > 12)
            #expect(pages.subtracting(dirty).isEmpty)
            // And the log does not name all there is.
            #expect(dirty.count < 64)
            for request in [held, refused, sense] { _ = try request.wait() }
            try frontEnd.events.wait(for: event)
            try frontEnd.control.wait(for: function)
        }
    }

    @Test func nothingIsLoggedBeforeTheFeatureIsOnAndAfterItIsOff() throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.protocolFeatures |= VhostUserProtocolBit.logSharedMemory
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            let log = try frontEnd.startLogging()
            try frontEnd.tell(.setFeatures, WireBytes.of(frontEnd.features & ~VirtioFeatureBit.logAll))
            for queue in frontEnd.queues { try frontEnd.tell(.setVringAddress, frontEnd.addresses(queue)) }
            log.fill(log.size, with: 0, at: 0)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 0, count: 8)).isGood)
            #expect(logged(log).isEmpty)
        }
    }

    @Test func aLogThatIsTooShortForItsFileIsRefused() throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.protocolFeatures |= VhostUserProtocolBit.logSharedMemory
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            let file = try SharedMemory(size: 4096, guestAddress: 0)
            try frontEnd.channel.send(.setLogBase, WireBytes.of(UInt64(8192), 0), descriptors: [file.descriptor])
            try frontEnd.channel.waitForClose()
        }
    }

    @Test func aLogThatIsTooShortForTheMemoryLosesOnlyWhatItCannotHold() throws {
        try withDaemon { daemon in
            var options = VhostUserFrontEnd.Options()
            options.protocolFeatures |= VhostUserProtocolBit.logSharedMemory
            let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
            _ = try frontEnd.startLogging()
            let short = try SharedMemory(size: 64, guestAddress: 0)
            try frontEnd.channel.send(.setLogBase, WireBytes.of(UInt64(64), 0), descriptors: [short.descriptor])
            #expect(try frontEnd.channel.receive().number == 0)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 0, count: 8)).isGood)
        }
    }
}
