// ResponseTests: each response code where the specification says so (Docs/VIRTIO.md has the table); those that are not
// here are among the command tests.
//
// Called by: swift test. Must not know: the server's inside.

import Backstores
import CLinux
import Testing
import VhostUserInitiator

@testable import SCSICore
@testable import VirtioFront

@Suite
struct ResponseTests {
    @Test
    func aCommandWhoseTargetIsTakenAwayIsATransportFailure() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            daemon.inject(0, .hold)
            let read = frontEnd.requests.submit(read10(unit(0), block: 0, count: 1))
            try daemon.waitForHeld(1)
            daemon.performOnServers { $0.servers[0].detach(number: 0) }
            let late = frontEnd.requests.submit(testUnitReady(unit(0)))
            #expect(try late.wait().response == UInt8(VIRTIO_SCSI_S_BAD_TARGET))
            #expect(!read.chain.isComplete, "the medium still uses the command's memory")
            daemon.release()
            #expect(try read.wait().response == UInt8(VIRTIO_SCSI_S_TRANSPORT_FAILURE))
        }
    }

    @Test
    func aTargetsFailureIsTold() {
        let response = VirtioSCSIResponse(ServiceResponse.targetFailure.rawValue)
        #expect(response.rawValue == UInt8(VIRTIO_SCSI_S_TARGET_FAILURE))
    }

    @Test
    func withoutANexusEverythingIsANexusFailure() throws {
        let nexuses = Limits.nexusesPerTarget
        try withDaemon(sockets: nexuses + 1) { daemon in
            var options = VhostUserFrontEnd.Options()
            options.memorySize = 1 << 20
            options.queues = 6
            // Those that are connected keep their nexus.
            let others = try (0..<nexuses).map { index in
                try VhostUserFrontEnd.started(path: daemon.paths[index], options: options)
            }
            let frontEnd = try VhostUserFrontEnd.started(path: daemon.paths[nexuses], options: options)
            let failure = UInt8(VIRTIO_SCSI_S_NEXUS_FAILURE)
            for queue in frontEnd.queues[2...] {
                #expect(try queue.run(testUnitReady(unit(0))).response == failure)
            }
            let control = frontEnd.control
            #expect(try control.taskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit(0)) == failure)
            let query = try control.asynchronousNotification(VIRTIO_SCSI_T_AN_QUERY, unit(0), events: 2)
            #expect(query.response == failure)
            let absent = VirtioSCSIAddress.flat(target: 1, lun: 0)
            #expect(try frontEnd.requests.run(testUnitReady(absent)).response == UInt8(VIRTIO_SCSI_S_BAD_TARGET))
            for other in others { other.disconnect() }
        }
    }

    @Test
    func aControlRequestThatIsTooShortIsAFailure() throws {
        try withDaemon { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let failure = UInt8(VIRTIO_SCSI_S_FAILURE)
            for type in [VIRTIO_SCSI_T_TMF, VIRTIO_SCSI_T_AN_QUERY, VIRTIO_SCSI_T_AN_SUBSCRIBE] {
                let chain = frontEnd.control.submit(readable: WireBytes.of(UInt32(type), 0), writable: 5)
                try frontEnd.control.wait(for: chain)
                #expect(chain.written[type == VIRTIO_SCSI_T_TMF ? 0 : 4] == failure)
            }
        }
    }

    @Test
    func oneFunctionTooManyIsBusy() throws {
        let daemon = try TestDaemon(isSpread: true)
        defer { daemon.stop() }
        var options = VhostUserFrontEnd.Options()
        options.ringSize = 1024
        let frontEnd = try VhostUserFrontEnd.ready(daemon, options: options)
        daemon.inject(0, .hold)
        let read = frontEnd.requests.submit(read10(unit(0), block: 0, count: 1))
        try daemon.waitForHeld(1)
        // Each waits for the read that the medium holds.
        let functions = (0...Limits.functionsPerLink).map { _ in
            frontEnd.control.submitTaskManagement(VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, unit(0))
        }
        try frontEnd.control.wait(for: functions[Limits.functionsPerLink])
        #expect(functions[Limits.functionsPerLink].written == [UInt8(VIRTIO_SCSI_S_BUSY)])
        #expect(functions[..<Limits.functionsPerLink].allSatisfy { !$0.isComplete })
        daemon.release()
        for function in functions.dropLast() {
            try frontEnd.control.wait(for: function)
            #expect(function.written == [0])
        }
        #expect(try read.wait().response == UInt8(VIRTIO_SCSI_S_RESET))
    }

    /// 65 units, seen at 255 target numbers: a few addresses more than can be subscribed to.
    @Test
    func oneSubscriptionTooManyIsBusy() throws {
        let daemon = try TestDaemon()
        defer { daemon.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(daemon)
        daemon.perform { objects in
            let targets = (1...4).map { objects.addTarget(UInt64($0), units: 65) }
            // A target has room for 64 nexuses.
            for number in 1...255 { objects.servers[0].attach(targets[number / 64], number: UInt8(number)) }
        }
        var addresses = (1...255).flatMap { target in
            (0..<65).map { VirtioSCSIAddress.flat(target: UInt8(target), lun: $0) }
        }[...]
        let capacity = 16_384
        while addresses.count > 255 * 65 - capacity {
            let batch = addresses.prefix(min(64, addresses.count - (255 * 65 - capacity)))
            addresses.removeFirst(batch.count)
            let chains = batch.map { address in
                frontEnd.control.submit(
                    readable: WireBytes.of(UInt32(VIRTIO_SCSI_T_AN_SUBSCRIBE)) + address.bytes + WireBytes.of(2),
                    writable: 5)
            }
            for chain in chains { try frontEnd.control.wait(for: chain) }
            try #require(chains.allSatisfy { $0.written == [2, 0, 0, 0, UInt8(VIRTIO_SCSI_S_OK)] })
        }
        func subscribe(_ address: VirtioSCSIAddress, _ events: UInt32 = 2) throws -> UInt8 {
            try frontEnd.control.asynchronousNotification(VIRTIO_SCSI_T_AN_SUBSCRIBE, address, events: events).response
        }
        let (one, other) = (VirtioSCSIAddress.flat(target: 1, lun: 0), addresses.first!)
        #expect(try subscribe(other) == UInt8(VIRTIO_SCSI_S_BUSY))
        // One that is there may be renewed, and its end makes room.
        #expect(try subscribe(one) == UInt8(VIRTIO_SCSI_S_OK))
        #expect(try subscribe(one, 0) == UInt8(VIRTIO_SCSI_S_OK))
        #expect(try subscribe(other) == UInt8(VIRTIO_SCSI_S_OK))
        #expect(try subscribe(one) == UInt8(VIRTIO_SCSI_S_BUSY))
        // So does the end of a target.
        daemon.perform { $0.servers[0].detach(number: 2) }
        #expect(try subscribe(one) == UInt8(VIRTIO_SCSI_S_OK))
    }
}
