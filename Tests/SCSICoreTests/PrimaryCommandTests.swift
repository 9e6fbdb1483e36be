// The commands of SPC-6, and READ CAPACITY and START STOP UNIT: the bytes that they return.

import CBackstore
import CoreTestSupport
import SCSICore
import Testing

@Suite("INQUIRY")
struct InquiryTests {
    let world = TestTarget()

    @Test("Standard data: device type, version, format, length, flags, names (SPC-4 6.6.2)")
    func standard() {
        let data = world.run(CDB.inquiry(), dataIn: 255).data
        #expect(data[0] == 0x00)
        #expect(data[1] == 0x00)
        #expect(data[2] == 0x06)
        #expect(data[3] & 0x0f == 2)
        #expect(Int(data[4]) == data.count - 5)
        #expect(data[7] & 0x02 == 0x02)
        #expect(String(decoding: data[8..<36], as: UTF8.self) == "TARGETD VIRTUAL DISK    1   ")
    }

    @Test(
        "Allocation lengths cut the data and leave the length fields as they are",
        arguments: [0, 1, 5, 36, 95, 96, 200])
    func allocationLength(length: UInt16) {
        let end = world.run(CDB.inquiry(allocation: length), dataIn: 255)
        #expect(end.summary == "good")
        #expect(end.data.count == min(Int(length), 96))
        if length > 4 { #expect(end.data[4] == 91) }
    }

    @Test("Data goes into segments of any length")
    func segments() {
        let whole = world.run(CDB.inquiry(), dataIn: 96).data
        #expect(world.run(CDB.inquiry(), dataIn: 96, inLayout: [0, 1, 3, 0, 7, 85]).data == whole)
    }

    @Test("Buffers shorter than what there is to return are an overrun")
    func overrun() {
        #expect(world.run(CDB.inquiry(allocation: 96), dataIn: 95).summary == "overrun")
        #expect(world.run(CDB.inquiry(allocation: 95), dataIn: 95).summary == "good")
    }

    @Test("A page code without EVPD is INVALID FIELD IN CDB at byte 2 (SPC-4 6.6.1)")
    func pageWithoutEVPD() { #expect(world.run([0x12, 0, 0x80, 0, 255, 0], dataIn: 255).summary == "5/2400 CDB 2") }

    @Test("An unknown page is INVALID FIELD IN CDB at byte 2")
    func unknownPage() { #expect(world.run(CDB.inquiry(page: 0x42), dataIn: 255).summary == "5/2400 CDB 2") }

    @Test("Page 00h lists the pages in ascending order, and each of them can be asked for (SPC-4)")
    func supportedPages() {
        let pages = world.run(CDB.inquiry(page: 0), dataIn: 255).data
        #expect(pages[1] == 0)
        #expect(Int(pages[3]) == pages.count - 4)
        let codes = Array(pages[4...])
        #expect(codes == codes.sorted())
        #expect(Set(codes).isSuperset(of: [0x00, 0x80, 0x83, 0x86, 0x87, 0x88, 0x92, 0xb0, 0xb1, 0xb2, 0xb7]))
        for code in 0...255 as ClosedRange<UInt8> {
            let end = world.run(CDB.inquiry(page: code, allocation: 1024), dataIn: 1024)
            #expect((end.summary == "good") == codes.contains(code), "page \(code)")
            guard end.summary == "good" else { continue }
            #expect(end.data[1] == code)
            #expect(Int(end.data[2]) << 8 + Int(end.data[3]) == end.data.count - 4, "page \(code)")
        }
    }

    @Test("Page 80h is the serial number")
    func serialNumber() {
        let data = world.run(CDB.inquiry(page: 0x80), dataIn: 255).data
        #expect(String(decoding: data[4...], as: UTF8.self) == "SERIAL0001")
    }

    @Test("Page 83h names the unit by NAA and T10 vendor, and the target device (SPC-4 7.8.6)")
    func deviceIdentification() {
        let data = world.run(CDB.inquiry(page: 0x83), dataIn: 255).data
        var designators: [(kind: [UInt8], value: [UInt8])] = []
        var rest = data[4...]
        while rest.count >= 4 {
            let bytes = Array(rest)
            designators.append((kind: Array(bytes[..<2]), value: Array(bytes[4..<4 + Int(bytes[3])])))
            rest = rest.dropFirst(4 + Int(bytes[3]))
        }
        #expect(rest.isEmpty)
        let naa = designators.first { $0.kind == [0x01, 0x03] }
        #expect(naa?.value == CDB.bytes(world.unit.configuration.name, 8))
        let vendor = designators.first { $0.kind == [0x02, 0x01] }
        #expect(vendor.map { String(decoding: $0.value, as: UTF8.self) } == "TARGETD SERIAL0001")
        let target = designators.first { $0.kind == [0x01, 0x23] }
        #expect(target?.value == CDB.bytes(world.target.name, 8))
    }

    @Test("Page B0h carries the limits that the commands keep (SBC-4 6.6.4)")
    func blockLimits() {
        let world = TestTarget {
            $0.geometry.maximum_transfer = 1 << 20
            $0.geometry.optimal_transfer = 1 << 16
            $0.geometry.optimal_transfer_granularity = 4096
            $0.geometry.discard_granularity = 8192
            $0.geometry.discard_alignment = 1024
        }
        let data = world.run(CDB.inquiry(page: 0xb0), dataIn: 255).data
        func number(_ range: Range<Int>) -> UInt64 { data[range].reduce(0) { $0 << 8 | UInt64($1) } }
        #expect(data.count == 64)
        #expect(data[4] & 1 == 1)
        #expect(number(6..<8) == 8)
        #expect(number(8..<12) == 2048)
        #expect(number(12..<16) == 128)
        #expect(number(20..<24) == Limits.unmapBlocks)
        #expect(number(24..<28) == UInt64(Limits.unmapDescriptors))
        #expect(number(28..<32) == 16)
        #expect(number(32..<36) == 0x8000_0002)
        #expect(number(36..<44) == Limits.writeSameBytes / 512)
    }

    @Test("Page B1h: not rotating is 1")
    func characteristics() {
        #expect(Array(world.run(CDB.inquiry(page: 0xb1), dataIn: 255).data[..<6]) == [0, 0xb1, 0, 60, 0, 1])
    }

    @Test("Page B2h: UNMAP, WRITE SAME with UNMAP, zeros after them, anchoring, thin (SBC-4 6.6.7)")
    func provisioning() {
        #expect(world.run(CDB.inquiry(page: 0xb2), dataIn: 255).data == [0, 0xb2, 0, 4, 0, 0xe6, 2, 0])
    }

    @Test("Page 86h: attributes supported, volatile cache, sense data length (SPC-4 7.8.7)")
    func extended() {
        let data = world.run(CDB.inquiry(page: 0x86), dataIn: 255).data
        #expect(data.count == 64)
        #expect(data[5] & 0x07 == 0x07)
        #expect(data[6] & 0x01 == 0x01)
        #expect(data[13] == 252)
    }
}

@Suite("READ CAPACITY, START STOP UNIT, TEST UNIT READY")
struct CapacityTests {
    @Test("READ CAPACITY(10) returns the last LBA and the block length")
    func readCapacity10() {
        #expect(TestTarget().run(CDB.readCapacity10, dataIn: 8).data == [0, 0, 0x0f, 0xff, 0, 0, 2, 0])
    }

    @Test(
        "READ CAPACITY(10) returns FFFFFFFFh if the last LBA does not fit",
        arguments: zip([0xffff_ffff, 0x1_0000_0000, 1 << 40] as [UInt64], [0xffff_fffe, 0xffff_ffff, 0xffff_ffff]))
    func largeMedium(blocks: UInt64, last: UInt64) {
        let world = TestTarget(blocks: blocks)
        #expect(world.run(CDB.readCapacity10, dataIn: 8).data == CDB.bytes(last, 4) + CDB.bytes(512, 4))
        #expect(Array(world.run(CDB.readCapacity16(), dataIn: 32).data[..<8]) == CDB.bytes(blocks - 1, 8))
    }

    @Test("READ CAPACITY(16) returns the physical block exponent, alignment, LBPME and LBPRZ")
    func readCapacity16() {
        let world = TestTarget { $0.geometry.lowest_aligned_offset = 3584 }
        let data = world.run(CDB.readCapacity16(), dataIn: 32).data
        #expect(data == CDB.bytes(4095, 8) + CDB.bytes(512, 4) + [0, 3, 0xc0, 7] + Array(repeating: 0, count: 16))
        #expect(world.run(CDB.readCapacity16(allocation: 12), dataIn: 32).data.count == 12)
    }

    @Test("A medium of no blocks is not present, and nothing traps")
    func emptyMedium() {
        let world = TestTarget(blocks: 0)
        #expect(world.run(CDB.readCapacity10, dataIn: 8).summary == "2/3a00")
        #expect(world.run(CDB.readCapacity16(), dataIn: 32).summary == "2/3a00")
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "5/2100 CDB 2")
        #expect(world.run(CDB.inquiry(page: 0xb0), dataIn: 64).summary == "good")
    }

    @Test("A stopped unit is not ready for the medium and answers the rest; START makes it ready")
    func stopped() {
        let world = TestTarget()
        #expect(world.run(CDB.startStopUnit(start: false)).summary == "good")
        #expect(world.backstore.accepted.map(\.operation) == [.flush])
        #expect(world.run(CDB.testUnitReady).summary == "2/0402")
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).summary == "2/0402")
        #expect(world.run(CDB.inquiry(), dataIn: 96).summary == "good")
        #expect(Sense(world.run(CDB.requestSense(), dataIn: 18).data)?.description == "2/0402")
        #expect(world.run(CDB.startStopUnit(start: true)).summary == "good")
        #expect(world.run(CDB.testUnitReady).summary == "good")
    }

    @Test("NO_FLUSH stops without a flush; a flush that fails leaves the unit started")
    func stopWithoutFlush() {
        let world = TestTarget()
        _ = world.a.send(CDB.startStopUnit(start: false))
        world.backstore.complete(error: 5)
        #expect(world.a.completions.last?.summary == "3/0c00")
        #expect(world.run(CDB.testUnitReady).summary == "good")
        #expect(world.run(CDB.startStopUnit(start: false, noFlush: true)).summary == "good")
        #expect(world.backstore.accepted.count == 1)
        #expect(world.run(CDB.testUnitReady).summary == "2/0402")
    }
}

@Suite("MODE SENSE, MODE SELECT")
struct ModeTests {
    let world = TestTarget()

    @Test("MODE SENSE(6) of all pages: header, descriptor, every page whole")
    func allPages() {
        let data = world.run(CDB.modeSense6(0x3f, noDescriptors: false), dataIn: 255).data
        #expect(Int(data[0]) == data.count - 1)
        #expect(data[2] == 0x10)
        #expect(data[3] == 8)
        #expect(Array(data[4..<12]) == CDB.bytes(4096, 4) + CDB.bytes(512, 4))
        var codes: [UInt8] = []
        var rest = data[12...]
        while rest.count >= 2 {
            codes.append(rest[rest.startIndex] & 0x3f)
            rest = rest.dropFirst(2 + Int(rest[rest.startIndex + 1]))
        }
        #expect(rest.isEmpty)
        #expect(codes == codes.sorted())
        #expect(Set(codes).isSuperset(of: [0x01, 0x07, 0x08, 0x0a, 0x1c]))
    }

    @Test("MODE SENSE(10) with LLBAA has a long LBA descriptor; without descriptors there is none")
    func longDescriptor() {
        let long = world.run(CDB.modeSense10(0x08, flags: 0x10), dataIn: 255).data
        #expect(Int(long[0]) << 8 + Int(long[1]) == long.count - 2)
        #expect(long[4] == 1)
        #expect(Array(long[6..<8]) == [0, 16])
        #expect(Array(long[8..<24]) == CDB.bytes(4096, 8) + CDB.bytes(0, 4) + CDB.bytes(512, 4))
        let none = world.run(CDB.modeSense10(0x08), dataIn: 255).data
        #expect(Array(none[6..<8]) == [0, 0])
        #expect(Array(none[8...]) == Array(long[24...]))
    }

    @Test("Changeable values have the bits that MODE SELECT takes; defaults are what a new unit has (SPC-4 6.13)")
    func pageControl() {
        let current = world.run(CDB.modeSense6(0x0a), dataIn: 255).data
        #expect(world.run(CDB.modeSense6(0x0a, control: 2), dataIn: 255).data == current)
        // UA_INTLCK_CTRL has no value 01b.
        let reserved = ["4.4"]
        for byte in 2..<12 {
            let mask = world.run(CDB.modeSense6(0x0a, control: 1), dataIn: 255).data[4 + byte]
            for bit in 0..<8 {
                var list = [0, 0, 0, 0] + Array(world.run(CDB.modeSense6(0x0a), dataIn: 255).data[4...])
                list[4 + byte] ^= 1 << bit
                let end = world.run(CDB.modeSelect6(listLength: list.count), dataOut: list)
                let isTaken = mask & 1 << bit != 0 && !reserved.contains("\(byte).\(bit)")
                #expect((end.summary == "good") == isTaken, "byte \(byte) bit \(bit)")
                if end.summary != "good" { #expect(end.summary.hasPrefix("5/2600 list \(4 + byte)")) }
            }
        }
    }

    @Test("Saved values are not supported: SAVING PARAMETERS NOT SUPPORTED")
    func savedValues() { #expect(world.run(CDB.modeSense6(0x08, control: 3), dataIn: 255).summary == "5/3900") }

    @Test("An unknown page or subpage is INVALID FIELD IN CDB at its field")
    func unknownPage() {
        #expect(world.run(CDB.modeSense6(0x0b), dataIn: 255).summary == "5/2400 CDB 2.5")
        #expect(world.run(CDB.modeSense6(0x3f, 0x01), dataIn: 255).summary == "5/2400 CDB 3")
        #expect(world.run(CDB.modeSense6(0x08, 0x07), dataIn: 255).summary == "5/2400 CDB 3")
        #expect(world.run(CDB.modeSense6(0x3f, 0xff), dataIn: 255).summary == "good")
    }

    @Test("Allocation lengths cut the data", arguments: [0, 1, 4, 20])
    func allocationLength(length: UInt8) {
        let end = world.run(CDB.modeSense6(0x3f, allocation: length), dataIn: 255)
        #expect(end.summary == "good")
        #expect(end.data.count == Int(length))
    }

    @Test("A write protected medium has the WP bit")
    func writeProtected() {
        let world = TestTarget { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_WRITABLE) }
        #expect(world.run(CDB.modeSense6(0x08), dataIn: 255).data[2] == 0x90)
    }

    @Test("SWP protects from writes, for every nexus, until it is cleared (SPC-4 7.5.8)")
    func softwareWriteProtect() {
        let write = CDB.write(.ten, 0, 1)
        let data = [UInt8](repeating: 1, count: 512)
        world.setControlMode(byte: 2, to: 0x08)
        #expect(world.run(write, dataOut: data, on: world.b).summary == "7/2700")
        #expect(world.run(CDB.modeSense6(0x08), dataIn: 255).data[2] == 0x90)
        world.setControlMode(byte: 2, to: 0x00)
        #expect(world.run(write, dataOut: data, on: world.b).summary == "good")
    }

    @Test("D_SENSE selects the format of sense data (SPC-4 7.5.8), not of REQUEST SENSE, whose DESC bit does")
    func descriptorSense() {
        #expect(world.run(CDB.read(.ten, 5000, 1)).sense?.isDescriptorFormat == false)
        world.setControlMode(byte: 0, to: 0x04)
        let end = world.run(CDB.read(.sixteen, 1 << 40, 1))
        #expect(end.sense?.isDescriptorFormat == true)
        #expect(end.summary == "5/2100 CDB 2")
        #expect(end.sense?.information == 1 << 40)
        #expect(Sense(world.run(CDB.requestSense(), dataIn: 252).data)?.isDescriptorFormat == false)
        #expect(
            Sense(world.run(CDB.requestSense(descriptorFormat: true), dataIn: 252).data)?.isDescriptorFormat == true)
    }

    @Test("A command for a LUN without a unit has sense data in fixed format, whatever its task was used for before")
    func formatWithoutUnit() {
        world.setControlMode(byte: 0, to: 0x04)
        #expect(world.run(CDB.read(.ten, 5000, 1)).sense?.isDescriptorFormat == true)
        #expect(world.run(CDB.testUnitReady, lun: 7 << 48).sense?.isDescriptorFormat == false)
    }

    @Test("A list with a wrong page takes no effect, not even the right page before it (SPC-4 6.11)")
    func allOrNothing() {
        var control = Array(world.run(CDB.modeSense6(0x0a), dataIn: 255).data[4...])
        control[2] |= 0x04
        let list = [0, 0, 0, 0] + control + [0x1c, 10, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        #expect(world.run(CDB.modeSelect6(listLength: list.count), dataOut: list).summary == "5/2600 list 18")
        #expect(world.run(CDB.modeSense6(0x0a), dataIn: 255).data[6] == 0)
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("A list cut at any byte is an error or whole, and never takes half an effect")
    func truncatedLists() {
        let page = Array(world.run(CDB.modeSense6(0x0a), dataIn: 255).data[4...])
        let list = [0, 0, 0, 8] + CDB.bytes(0, 4) + CDB.bytes(512, 4) + page
        for length in 1..<list.count {
            let end = world.run(CDB.modeSelect6(listLength: length), dataOut: Array(list[..<length]))
            let whole = length == 12
            #expect(end.summary == (whole ? "good" : "5/1a00"), "length \(length)")
        }
        #expect(world.run(CDB.modeSelect6(listLength: list.count), dataOut: list).summary == "good")
        #expect(world.run(CDB.modeSelect6(listLength: 0)).summary == "good")
        #expect(world.run(CDB.modeSelect6(listLength: 28), dataOut: Array(list[..<20])).summary == "overrun")
    }

    @Test("A block descriptor that would change the medium is refused at its field")
    func blockDescriptor() {
        func select(_ blocks: UInt64, _ length: UInt64) -> String {
            let list = [0, 0, 0, 8] + CDB.bytes(blocks, 4) + CDB.bytes(length, 4)
            return world.run(CDB.modeSelect6(listLength: 12), dataOut: list).summary
        }
        #expect(select(0, 512) == "good")
        #expect(select(4096, 512) == "good")
        #expect(select(0xffff_ffff, 512) == "good")
        #expect(select(4095, 512) == "5/2600 list 4")
        #expect(select(0, 4096) == "5/2600 list 8")
    }

    @Test("MODE SELECT(10) takes a long LBA descriptor and a page")
    func selectTen() {
        var page = Array(world.run(CDB.modeSense10(0x0a), dataIn: 255).data[8...])
        page[2] |= 4
        let list =
            [0, 0, 0, 0, 1, 0, 0, 16] + CDB.bytes(4096, 8) + CDB.bytes(0, 4) + CDB.bytes(512, 4) + page
        #expect(world.run(CDB.modeSelect10(listLength: list.count), dataOut: list).summary == "good")
        #expect(world.run(CDB.modeSense10(0x0a), dataIn: 255).data[10] == 4)
    }

    @Test("PF zero and SP one are INVALID FIELD IN CDB")
    func flags() {
        #expect(world.run(CDB.modeSelect6(listLength: 4, flags: 0), dataOut: [0, 0, 0, 0]).summary == "5/2400 CDB 1.4")
        #expect(
            world.run(CDB.modeSelect6(listLength: 4, flags: 0x11), dataOut: [0, 0, 0, 0]).summary == "5/2400 CDB 1.0")
    }
}

@Suite("REPORT LUNS, missing logical units")
struct AddressingTests {
    let world = TestTarget()

    @Test("REPORT LUNS lists the units in order, flat above 255, from any LUN (SPC-4 6.33)")
    func reportLUNs() {
        for lun in [300, 2, 255, 256] { _ = world.addUnit(at: lun) }
        let fields = [0, 2 << 48, 255 << 48, 0x4100 << 48, 0x412c << 48] as [UInt64]
        let expected = CDB.bytes(40, 4) + CDB.bytes(0, 4) + fields.flatMap { CDB.bytes($0, 8) }
        for lun in [0, 5 << 48, 0xc101 << 48, 0x412c << 48] as [UInt64] {
            #expect(world.run(CDB.reportLUNs(), lun: lun, dataIn: 64).data == expected)
        }
        #expect(world.run(CDB.reportLUNs(allocation: 16), dataIn: 64).data == Array(expected[..<16]))
    }

    @Test("SELECT REPORT 01h lists the well-known unit, 02h both, others are INVALID FIELD IN CDB")
    func selectReport() {
        let wellKnown = [0xc1, 0x01, 0, 0, 0, 0, 0, 0] as [UInt8]
        #expect(Array(world.run(CDB.reportLUNs(select: 1), dataIn: 64).data[8...]) == wellKnown)
        #expect(
            Array(world.run(CDB.reportLUNs(select: 2), dataIn: 64).data[8...]) == [0, 0, 0, 0, 0, 0, 0, 0] + wellKnown)
        #expect(world.run(CDB.reportLUNs(select: 3), dataIn: 64).summary == "5/2400 CDB 2")
    }

    @Test("Peripheral and flat addressing name the same unit")
    func twoNames() {
        _ = world.addUnit(at: 3)
        _ = world.run(CDB.requestSense(), lun: 3 << 48, dataIn: 18)
        #expect(world.run(CDB.testUnitReady, lun: 0x0003 << 48).summary == "good")
        #expect(world.run(CDB.testUnitReady, lun: 0x4003 << 48).summary == "good")
    }

    @Test(
        "LUN fields that name nothing are LOGICAL UNIT NOT SUPPORTED",
        arguments: [1 << 48, 0x0100 << 48, 0x8000 << 48, 0xc102 << 48, 1, 1 << 32, UInt64.max] as [UInt64])
    func missing(lun: UInt64) {
        #expect(world.run(CDB.testUnitReady, lun: lun).summary == "5/2500")
        #expect(world.run([0xff, 0, 0, 0, 0, 0], lun: lun).summary == "5/2500")
        #expect(world.run(CDB.read(.ten, 0, 1), lun: lun, dataIn: 512).summary == "5/2500")
    }

    @Test("INQUIRY of a missing unit returns peripheral 7Fh (SPC-4 6.6.2); REQUEST SENSE says why")
    func inquiryOfMissing() {
        let end = world.run(CDB.inquiry(), lun: 9 << 48, dataIn: 255)
        #expect(end.summary == "good")
        #expect(end.data[0] == 0x7f)
        #expect(end.data.count == 96)
        let sense = world.run(CDB.requestSense(), lun: 9 << 48, dataIn: 18)
        #expect(sense.summary == "good")
        #expect(Sense(sense.data)?.description == "5/2500")
    }

    @Test("The REPORT LUNS well-known unit answers INQUIRY with type 1Eh, TEST UNIT READY, and nothing of a disk")
    func wellKnownUnit() {
        let lun = 0xc101 << 48 as UInt64
        #expect(world.run(CDB.inquiry(), lun: lun, dataIn: 255).data[0] == 0x1e)
        #expect(world.run(CDB.testUnitReady, lun: lun).summary == "good")
        #expect(Sense(world.run(CDB.requestSense(), lun: lun, dataIn: 18).data)?.description == "0/0000")
        #expect(world.run(CDB.read(.ten, 0, 1), lun: lun, dataIn: 512).summary == "5/2000 CDB 0")
    }

    @Test("Reserved bits are refused without a unit as well")
    func reservedBits() {
        #expect(world.run([0x12, 0x80, 0, 0, 96, 0], lun: 9 << 48, dataIn: 96).summary == "5/2400 CDB 1.7")
    }

    @Test("A unit that is removed refuses what waits, ends what the medium has, and is then drained")
    func removal() {
        var drained = false
        let transferring = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        let waiting = world.a.send(CDB.read(.ten, 1, 1), attribute: .ordered, dataIn: 512)
        world.target.remove(at: LUN(0)!) { drained = true }
        #expect(world.a.completions.last?.tag == waiting)
        #expect(world.a.completions.last?.summary == "5/2500")
        #expect(world.run(CDB.testUnitReady).summary == "5/2500")
        #expect(drained)
        #expect(world.a.completions.first { $0.tag == transferring }?.summary == "good")
    }

    @Test("A LOGICAL UNIT RESET in progress, then a TARGET RESET, wait for a removed unit's commands")
    func functionsReachDrainingUnits() {
        let tag = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.target.remove(at: LUN(0)!) {}
        world.a.manage(.targetReset, cookie: 1)
        world.a.manage(.nexusReset, cookie: 2)
        #expect(world.a.answers.isEmpty)
        world.backstore.complete()
        #expect(world.a.completions.last?.tag == tag)
        #expect(world.a.completions.last?.summary == "reset")
        #expect(world.a.answers.map(\.response) == [.functionComplete, .functionComplete])
    }

    @Test("A unit that has drained can be mapped again and begins with POWER ON")
    func addedAgain() {
        world.target.remove(at: LUN(0)!) {}
        let added = world.target.add(world.unit, at: LUN(4)!)
        #expect(added)
        #expect(world.run(CDB.testUnitReady, lun: 4 << 48).summary == "6/2901")
        let occupied = world.target.add(world.unit, at: LUN(4)!)
        #expect(!occupied)
    }
}
