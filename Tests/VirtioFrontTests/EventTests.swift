// EventTests: the event queue: what the guest is told about units that come, go and change.
//
// Called by: swift test. Must not know: how the server is written.

import CBackstore
import CLinux
import CoreTestSupport
import SCSICore
import Testing
import VhostUserInitiator
import VirtioFront

@Suite struct EventTests {
    /// Event, LUN bytes, reason.
    private func event(_ event: UInt32, _ lun: [UInt8], _ reason: UInt32) -> [UInt8] {
        WireBytes.of(event) + [1, 0] + lun + [0, 0, 0, 0] + WireBytes.of(reason)
    }

    private func next(_ frontEnd: VhostUserFrontEnd, _ buffer: Chain) throws -> [UInt8] {
        try frontEnd.events.wait(for: buffer)
        return buffer.written
    }

    @Test func aUnitThatComesAndGoesIsAnnouncedInTheEncodingOfReportLUNs() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let buffers = (0..<3).map { _ in frontEnd.events.offerEventBuffer() }
        world.perform { $0.addUnit(at: 1) }
        #expect(try next(frontEnd, buffers[0]) == event(1, [0, 1], 1))
        world.perform { $0.addUnit(at: 300) }
        #expect(try next(frontEnd, buffers[1]) == event(1, [0x41, 0x2c], 1))
        world.perform { _ = $0.target.remove(at: LUN(1)!) {} }
        #expect(try next(frontEnd, buffers[2]) == event(1, [0, 1], 2))
    }

    @Test func aChangedCapacityIsAParameterChange() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let buffer = frontEnd.events.offerEventBuffer()
        world.perform {
            $0.backstore.geometry.size *= 2
            $0.unit.backstoreGeometryChanged()
        }
        #expect(try next(frontEnd, buffer) == event(3, [0, 0], 0x092a))
    }

    @Test(arguments: [VirtioFeatureBit.eventIndex, 0])
    func eventsWaitForBuffersAndComeInOrder(_ missing: UInt64) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        options.features &= ~missing
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        world.perform { objects in for lun in 1...20 { objects.addUnit(at: lun) } }
        // One buffer after the other: each must wake the device.
        for lun in 1...20 {
            let buffer = frontEnd.events.offerEventBuffer()
            #expect(try next(frontEnd, buffer) == event(1, [0, UInt8(lun)], 1))
        }
    }

    @Test func aWholeTargetOfUnitsThatVanishesLosesNoEvent() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let units = 300
        world.perform { objects in for lun in 1..<units { objects.addUnit(at: lun) } }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.perform { $0.server.detach(number: 0) }
        var told: Set<[UInt8]> = []
        for _ in 0..<units {
            let bytes = try next(frontEnd, frontEnd.events.offerEventBuffer())
            #expect(bytes[0] == 1 && bytes[3] == 0 && bytes[12] == 2)
            told.insert(Array(bytes[4..<12]))
        }
        #expect(told.count == units)
        #expect(world.perform { $0.server.statistics.eventsMissed } == 0)
    }

    @Test func moreEventsThanAreKeptEndInEventsMissed() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        world.perform { objects in for lun in 1..<128 { objects.addUnit(at: lun) } }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        // Each time 256 events, of which 65 536 are kept.
        for _ in 0..<257 {
            world.perform { objects in
                objects.server.detach(number: 0)
                objects.server.attach(objects.target, number: 0)
            }
        }
        let first = try next(frontEnd, frontEnd.events.offerEventBuffer())
        #expect(first[0] == 1 && first[3] == 0x80)
        #expect(world.perform { $0.server.statistics.eventsMissed } == 256)
    }

    @Test func aSubscriberIsNotifiedUntilItUnsubscribes() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        func resize() {
            world.perform {
                $0.backstore.geometry.size *= 2
                $0.unit.backstoreGeometryChanged()
            }
        }
        func subscribe(_ events: UInt32) throws {
            let answer = try frontEnd.control.asynchronousNotification(
                VIRTIO_SCSI_T_AN_SUBSCRIBE, .peripheral(target: 0, lun: 0), events: events)
            #expect(answer.response == 0 && answer.events == events & 0x12)
        }
        try subscribe(0x06)
        var buffers = (0..<3).map { _ in frontEnd.events.offerEventBuffer() }
        resize()
        #expect(try next(frontEnd, buffers[0]) == event(3, [0, 0], 0x092a))
        #expect(try next(frontEnd, buffers[1]) == event(2, [0, 0], 2))
        try subscribe(0x10)
        resize()
        #expect(try next(frontEnd, buffers[2]) == event(3, [0, 0], 0x092a))
        try subscribe(0)
        resize()
        buffers = (0..<2).map { _ in frontEnd.events.offerEventBuffer() }
        #expect(try next(frontEnd, buffers[0]) == event(3, [0, 0], 0x092a))
        #expect(!buffers[1].isComplete)
    }

    /// With buffers, and when they come later.
    @Test(arguments: [false, true])
    func aHardResetIsTold(_ hasBuffers: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let early = hasBuffers ? frontEnd.events.offerEventBuffer() : nil
        world.perform { $0.target.hardReset() }
        let buffer = early ?? frontEnd.events.offerEventBuffer()
        let told = try next(frontEnd, buffer)
        #expect(told == event(1, [0, 0], 0))
        let attention = try frontEnd.requests.run(SCSICommand(unit0, [0]))
        #expect(attention.senseKey == 6 && attention.additionalSense == 0x2902)
    }

    @Test(arguments: [false, true])
    func changedModeParametersAreTold(_ hasBuffers: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let early = hasBuffers ? frontEnd.events.offerEventBuffer() : nil
        // Write protection is a bit of the mode parameter header.
        world.perform { $0.unit.setReadOnly(true) }
        let buffer = early ?? frontEnd.events.offerEventBuffer()
        let told = try next(frontEnd, buffer)
        #expect(told == event(3, [0, 0], 0x012a))
    }

    @Test func aDriverWithoutHotplugIsNotTold() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        options.features &= ~VirtioFeatureBit.hotplug
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        let buffer = frontEnd.events.offerEventBuffer()
        world.perform {
            $0.addUnit(at: 1)
            $0.backstore.geometry.size *= 2
            $0.unit.backstoreGeometryChanged()
        }
        // The first event is the change of capacity.
        #expect(try next(frontEnd, buffer) == event(3, [0, 0], 0x092a))
    }

    @Test func aTargetThatGoesAwayIsAnnouncedWithAllItsUnits() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        world.perform { $0.addUnit(at: 5) }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let buffers = (0..<2).map { _ in frontEnd.events.offerEventBuffer() }
        world.perform { $0.server.detach(number: 0) }
        let told = try buffers.map { try next(frontEnd, $0) }
        #expect(told.contains(event(1, [0, 0], 2)) && told.contains(event(1, [0, 5], 2)))
        let result = try frontEnd.requests.run(SCSICommand(unit0, [0]))
        #expect(result.response == UInt8(VIRTIO_SCSI_S_BAD_TARGET))
    }
}
