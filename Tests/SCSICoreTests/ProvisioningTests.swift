// Logical block provisioning: log page 0Ch, thresholds, and a medium that is full.

import CBackstore
import CoreTestSupport
@testable import SCSICore
import Testing

/// A thin medium of 1 GiB that tells its space.
private func thinWorld(blocks: UInt64 = 1 << 21, blockLength: UInt32 = 512) -> TestTarget {
    let world = TestTarget(blocks: blocks, blockLength: blockLength) {
        $0.geometry.capabilities |= UInt32(SCSI_BACKSTORE_CAN_REPORT_SPACE)
    }
    world.setSpace(used: 0, available: 1 << 30)
    return world
}

extension TestTarget {
    /// In bytes.
    fileprivate func setSpace(used: UInt64, available: UInt64, shared: Bool = true) {
        backstore.space = scsi_backstore_space(
            used: used, available: available, flags: shared ? UInt32(SCSI_BACKSTORE_SPACE_SHARED) : 0, reserved: 0)
    }

    /// Enables thresholds, in MiB; 0 is none.
    fileprivate func setThresholds(available: UInt32 = 0, used: UInt32 = 0) {
        let page = modePage(0x1c, 2)
        var values = page.values
        for (offset, count) in [(12, available), (20, used)] {
            values[offset] = values[offset] & 0x7f | (count == 0 ? 0 : 0x80)
            values.replaceSubrange(offset + 4..<offset + 8, with: CDB.bytes(UInt64(count), 4))
        }
        #expect(select(page, values).summary == "good")
        _ = run(CDB.requestSense(), dataIn: 18, on: b)
    }

    /// WRITE of a MiB.
    fileprivate func writeMiB(_ index: UInt64) {
        let block = UInt64(backstore.geometry.logical_block_size)
        let count = (1 << 20) / block
        _ = a.send(CDB.write(.ten, index * count, count), dataOut: [UInt8](repeating: 1, count: 1 << 20))
        drain()
    }

    /// The unit attention condition of each nexus, taken.
    fileprivate var attentions: [String?] { [a, b].map { run(CDB.testUnitReady, on: $0).summary } }
}

@Suite("Logical block provisioning")
struct ProvisioningTests {
    @Test("Without numbers there is no threshold exponent, no page 0Ch, no page 1Ch/02h and no LBPERE")
    func without() {
        let world = TestTarget()
        #expect(world.run(CDB.inquiry(page: 0xb2), dataIn: 64).data[4] == 0)
        #expect(world.run(CDB.logSense(0x0c), dataIn: 64).summary == "5/2400 CDB 2.5")
        #expect(world.run(CDB.modeSense10(0x1c, 2), dataIn: 64).summary == "5/2400 CDB 3")
        #expect(world.modePage(0x01, control: 1).values.allSatisfy { $0 == 0 })
    }

    @Test(
        "The threshold exponent makes sets of 1 MiB, larger where there would be too many for 32 bits",
        arguments: [(1 << 21, 512, 11), (1 << 18, 4096, 8), (1 << 44, 512, 13), (1 << 54, 512, 23)]
            as [(UInt64, UInt32, UInt8)])
    func exponent(blocks: UInt64, blockLength: UInt32, exponent: UInt8) {
        let world = thinWorld(blocks: blocks, blockLength: blockLength)
        #expect(world.run(CDB.inquiry(page: 0xb2), dataIn: 64).data[4] == exponent)
        #expect(blocks >> UInt64(exponent) <= UInt64(UInt32.max))
    }

    @Test("Page 0Ch is what the medium says at this moment, in threshold sets, with its scope")
    func logPage() {
        let world = thinWorld()
        for (used, available, shared, scope) in [
            (0, 0, true, 2), (5 << 20, 100 << 20, true, 2), ((6 << 20) - 1, 1, false, 1), (1 << 62, 1 << 63, true, 2),
        ] as [(UInt64, UInt64, Bool, UInt8)] {
            world.setSpace(used: used, available: available, shared: shared)
            let log = world.log(0x0c)
            #expect(log.number(1, 0..<4) == min(available >> 20, UInt64(UInt32.max)))
            #expect(log.number(2, 0..<4) == min(used >> 20, UInt64(UInt32.max)))
            #expect(log.parameters.map { $0.value[4] } == [scope, 1])
            #expect(world.unit.measuredSpace == MediumSpace(used: used, available: available, isShared: shared))
        }
        #expect(world.run(CDB.logSense(0, 0xff), dataIn: 64).data.count > 4)
        let pages = world.run(CDB.logSense(0), dataIn: 64).data
        #expect(pages[4...].contains(0x0c))
    }

    @Test("A medium that cannot tell its space at the moment fails the LOG SENSE that asks for it")
    func logPageFails() {
        let world = thinWorld()
        #expect(world.fail(CDB.logSense(0x0c), dataIn: 64).sense?.key == 3)
    }

    @Test("A threshold that is reached by writing is told to every nexus, once, and again after it was left")
    func usedThreshold() {
        let world = thinWorld()
        world.setThresholds(used: 3)
        let steps = [(1, false), (2, false), (3, true), (4, false), (2, false), (5, true)]
        for (index, (used, reached)) in steps.enumerated() {
            world.setSpace(used: UInt64(used) << 20, available: 1 << 30)
            world.writeMiB(UInt64(index))
            #expect(world.attentions == (reached ? ["6/3807", "6/3807"] : ["good", "good"]), "\(index)")
        }
    }

    @Test("The same for what is available, which falls; both are told as one condition")
    func availableThreshold() {
        let world = thinWorld()
        world.setThresholds(available: 10, used: 4)
        world.setSpace(used: 1 << 20, available: 11 << 20)
        world.writeMiB(0)
        #expect(world.attentions == ["good", "good"])
        world.setSpace(used: 2 << 20, available: 10 << 20)
        world.writeMiB(1)
        #expect(world.attentions == ["6/3807", "6/3807"])
        world.setSpace(used: 4 << 20, available: 9 << 20)
        world.writeMiB(2)
        #expect(world.attentions == ["6/3807", "6/3807"])
        world.writeMiB(3)
        #expect(world.attentions == ["good", "good"])
    }

    @Test("The medium is asked once for each threshold set that is written, and not at all while nothing is enabled")
    func measurements() {
        let world = thinWorld()
        func count() -> Int { world.backstore.accepted.count { $0.operation == .space } }
        world.writeMiB(0)
        #expect(count() == 0)
        world.setThresholds(used: 100)
        let before = count()
        #expect(before == 1, "at once, for what is written already")
        for index in 0..<16 as Range<UInt64> {
            _ = world.run(CDB.write(.ten, index * 256, 256), dataOut: [UInt8](repeating: 1, count: 1 << 17))
        }
        #expect(count() == before + 2)
        world.setThresholds()
        world.writeMiB(3)
        #expect(count() == before + 2)
    }

    @Test("LBPERE zero reports nothing (SBC-4 6.5.10)")
    func reportingDisabled() {
        let world = thinWorld()
        world.change(0x01, byte: 5, clear: 0x80)
        world.setThresholds(used: 1)
        world.setSpace(used: 1 << 29, available: 0)
        world.writeMiB(0)
        #expect(world.attentions == ["good", "good"])
    }

    @Test("A threshold that is reached when it is enabled is told at once")
    func reachedBefore() {
        let world = thinWorld()
        world.setSpace(used: 8 << 20, available: 1 << 30)
        world.setThresholds(used: 8)
        #expect(world.attentions[0] == "6/3807")
    }

    @Test("SPACE ALLOCATION FAILED WRITE PROTECT while the medium is full, then writes as ever (SBC-4 4.7.3.6)")
    func fullMedium() {
        let world = thinWorld()
        world.setThresholds(available: 1)
        let block = [UInt8](repeating: 4, count: 512)
        for error in [28, 122] as [Int32] {
            world.setSpace(used: 1 << 30, available: 0)
            #expect(world.fail(CDB.write(.ten, 0, 1), dataOut: block, error: error).summary == "7/2707")
            #expect(world.attentions == ["6/3807", "6/3807"], "and the threshold is seen")
            #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "good")
            #expect(world.run(CDB.unmap(listLength: 0)).summary == "good")
            world.setSpace(used: 1 << 20, available: 1 << 30)
            #expect(world.run(CDB.write(.ten, 0, 1), dataOut: block).summary == "good")
            _ = world.log(0x0c)
        }
        #expect(world.unit.statistics.writeErrors.uncorrected == 0, "a full medium is not a broken one")
    }

    @Test("A unit that is removed, and a medium that is taken away, wait for the unit's own request")
    func draining() throws {
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "S")
        configuration.removable = true
        let world = TestTarget(blocks: 1 << 21, configuration: configuration) {
            $0.geometry.capabilities |= UInt32(SCSI_BACKSTORE_CAN_REPORT_SPACE)
        }
        world.setThresholds(used: 1)
        func ask() {
            world.a.send(CDB.write(.ten, 0, 2048), dataOut: [UInt8](repeating: 1, count: 1 << 20))
            world.backstore.complete()
            #expect(world.backstore.pending.map(\.operation) == [.space])
        }
        ask()
        var gone = false
        try world.unit.removeMedium { gone = true }
        #expect(!gone)
        world.backstore.complete()
        #expect(gone)
        world.unit.insertMedium(world.backstore.handle)
        _ = world.run(CDB.requestSense(), dataIn: 18)
        ask()
        var drained = false
        world.target.remove(at: LUN(0)!) { drained = true }
        #expect(!drained)
        world.backstore.complete()
        #expect(drained)
    }
}

@Suite("Logical block provisioning mode page")
struct ProvisioningModePageTests {
    @Test("Threshold type, arming and resource are as they are; ENABLED and THRESHOLD COUNT can be set (SBC-4 6.5.9)")
    func descriptors() {
        let world = thinWorld()
        let page = world.modePage(0x1c, 2)
        #expect(page.values.count == 28)
        #expect(page.values[12...13] == [0x00, 1] && page.values[20...21] == [0x01, 2])
        for byte in page.values.indices {
            var values = page.values
            values[byte] ^= 0x40
            let settable = (16..<20).contains(byte) || (24..<28).contains(byte)
            #expect(world.select(page, values).summary == (settable ? "good" : "5/2600 list \(12 + byte)"))
            #expect(world.select(page, page.values).summary == "good")
        }
    }
}
