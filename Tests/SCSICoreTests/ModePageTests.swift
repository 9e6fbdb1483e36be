// Mode pages: properties of each page and bit, from what the unit says of them; saved values; informational exceptions.

import CBackstore
import CoreTestSupport
@testable import SCSICore
import Testing

/// A mode page as MODE SENSE returns it.
struct SensedPage: Equatable {
    let code: UInt8
    let subpage: UInt8
    let isSaveable: Bool
    let values: [UInt8]

    /// The pages behind the header of MODE SENSE(10) without block descriptors; `nil` if a length does not fit.
    static func parse(_ data: [UInt8]) -> [SensedPage]? {
        guard data.count >= 8, Int(data[0]) << 8 | Int(data[1]) == data.count - 2 else { return nil }
        var pages: [SensedPage] = []
        var rest = Array(data[8...])
        while !rest.isEmpty {
            let header = rest[0] & 0x40 == 0 ? 2 : 4
            guard rest.count >= header else { return nil }
            let length = header == 2 ? Int(rest[1]) : Int(rest[2]) << 8 | Int(rest[3])
            guard rest.count >= header + length else { return nil }
            pages.append(
                SensedPage(
                    code: rest[0] & 0x3f, subpage: header == 2 ? 0 : rest[1], isSaveable: rest[0] & 0x80 != 0,
                    values: Array(rest[header..<header + length])))
            rest.removeFirst(header + length)
        }
        return pages
    }

    /// The page with other values, as MODE SELECT takes it.
    func list(_ values: [UInt8]) -> [UInt8] {
        subpage == 0
            ? [code, UInt8(values.count)] + values
            : [0x40 | code, subpage] + CDB.bytes(UInt64(values.count), 2) + values
    }
}

extension TestTarget {
    /// All pages with one kind of values.
    func modePages(control: UInt8 = 0) -> [SensedPage] {
        SensedPage.parse(run(CDB.modeSense10(0x3f, 0xff, control: control), dataIn: 4096).data) ?? []
    }

    func modePage(_ code: UInt8, _ subpage: UInt8 = 0, control: UInt8 = 0) -> SensedPage {
        modePages(control: control).first { $0.code == code && $0.subpage == subpage }!
    }

    /// MODE SELECT(10) of one page.
    func select(_ page: SensedPage, _ values: [UInt8], save: Bool = false, on port: MockPort? = nil) -> Completion {
        let list = [0, 0, 0, 0, 0, 0, 0, 0] + page.list(values)
        return run(CDB.modeSelect10(listLength: list.count, flags: save ? 0x11 : 0x10), dataOut: list, on: port)
    }

    /// MODE SELECT of a page with some bits set or cleared.
    func change(_ code: UInt8, byte: Int, set: UInt8 = 0, clear: UInt8 = 0, save: Bool = false) {
        let page = modePage(code)
        var values = page.values
        values[byte] = values[byte] & ~clear | set
        let end = select(page, values, save: save)
        #expect(end.summary == "good")
        _ = run(CDB.requestSense(), dataIn: 18, on: b)
    }
}

@Suite("Mode pages")
struct ModePageTests {
    /// The pages that every unit has.
    static let codes: [[UInt8]] = [
        [0x01, 0], [0x07, 0], [0x08, 0], [0x0a, 0], [0x0a, 1], [0x1a, 0], [0x1c, 0],
    ]

    @Test("MODE SENSE of all pages and subpages lists them in order with the same lengths for each PC")
    func allPages() {
        let world = TestTarget(savesState: true)
        for control in 0..<4 as Range<UInt8> {
            let pages = world.modePages(control: control)
            #expect(pages.map { [$0.code, $0.subpage] } == Self.codes)
            #expect(pages.map(\.values.count) == world.modePages().map(\.values.count))
        }
        let withoutSubpages = SensedPage.parse(world.run(CDB.modeSense10(0x3f), dataIn: 4096).data)
        #expect(withoutSubpages?.map(\.code) == Self.codes.filter { $0[1] == 0 }.map { $0[0] })
        let control = SensedPage.parse(world.run(CDB.modeSense10(0x0a, 0xff), dataIn: 4096).data)
        #expect(control?.map(\.subpage) == [0, 1])
    }

    @Test(
        "PS: pages with something to change are saveable, if there is a store; else none is", arguments: [false, true])
    func parametersSaveable(store: Bool) {
        let world = TestTarget(savesState: store)
        for (page, mask) in zip(world.modePages(), world.modePages(control: 1)) {
            #expect(page.isSaveable == (store && mask.values.contains { $0 != 0 }), "page \(page.code)")
        }
    }

    @Test(
        "Each bit: one that is not changeable is refused at its byte; one that is comes back, alone", arguments: codes)
    func eachBit(code: [UInt8]) {
        let world = TestTarget(savesState: true)
        let mask = world.modePage(code[0], code[1], control: 1).values
        let defaults = world.modePage(code[0], code[1], control: 2).values
        for byte in mask.indices {
            for bit in 0..<8 as Range<UInt8> {
                let page = world.modePage(code[0], code[1])
                var values = page.values
                values[byte] ^= 1 << bit
                let end = world.select(page, values)
                let offset = 8 + (code[1] == 0 ? 2 : 4) + byte
                guard mask[byte] & 1 << bit != 0, end.summary == "good" else {
                    // A field of several bits may not have all the values that its bits have.
                    #expect(end.summary == "5/2600 list \(offset)", "byte \(byte) bit \(bit)")
                    #expect(world.modePage(code[0], code[1]) == page)
                    continue
                }
                #expect(world.modePage(code[0], code[1]).values == values)
                #expect(world.modePage(code[0], code[1], control: 2).values == defaults)
                #expect(world.modePage(code[0], code[1], control: 3).values == defaults)
                #expect(world.select(page, page.values).summary == "good")
            }
        }
    }

    // The control mode page's fields are changeable as wholes, and do not have all the values that their bits have.
    @Test(
        "Every changeable bit can be changed, from one or another value of its field",
        arguments: codes.filter { $0 != [0x0a, 0] })
    func everyChangeableBit(code: [UInt8]) {
        let world = TestTarget()
        let mask = world.modePage(code[0], code[1], control: 1).values
        for byte in mask.indices where mask[byte] != 0 {
            let page = world.modePage(code[0], code[1])
            var (everSet, everClear): (UInt8, UInt8) = (0, 0)
            for value in 0...255 as ClosedRange<UInt8> where value & ~mask[byte] == page.values[byte] & ~mask[byte] {
                var values = page.values
                values[byte] = value
                guard world.select(page, values).summary == "good" else { continue }
                everSet |= value
                everClear |= ~value
            }
            #expect(everSet & mask[byte] == mask[byte] && everClear & mask[byte] == mask[byte], "byte \(byte)")
        }
    }

    @Test("A page with a length other than its own is refused at the length", arguments: codes)
    func lengths(code: [UInt8]) {
        let world = TestTarget()
        let page = world.modePage(code[0], code[1])
        for count in [0, page.values.count - 1, page.values.count + 1] {
            let end = world.select(page, Array((page.values + [0])[..<count]))
            #expect(end.summary == "5/2600 list \(code[1] == 0 ? 9 : 10)")
        }
    }

    @Test("A long LBA descriptor that would change the medium is refused at its field")
    func longDescriptor() {
        let world = TestTarget()
        func select(_ blocks: UInt64, _ length: UInt64, _ count: Int = 16) -> String {
            let list =
                [0, 0, 0, 0, 1, 0, 0, UInt8(count)] + CDB.bytes(blocks, 8) + [0, 0, 0, 0] + CDB.bytes(length, 4)
            return world.run(CDB.modeSelect10(listLength: 24), dataOut: list).summary
        }
        #expect(select(0, 512) == "good")
        #expect(select(4096, 512) == "good")
        #expect(select(.max, 512) == "good")
        #expect(select(4097, 512) == "5/2600 list 8")
        #expect(select(0, 520) == "5/2600 list 20")
        #expect(select(0, 512, 8) == "5/2600 list 6")
    }

    @Test("Random lists are refused or take effect as a whole", arguments: 0..<40)
    func hostile(seed: UInt64) {
        let world = TestTarget(savesState: true)
        var random = SplitMix64(seed: seed)
        let pages = world.modePages()
        for _ in 0..<30 {
            var list: [UInt8] = [0, 0, 0, 0, 0, 0, 0, 0]
            for _ in 0...random.next() % 3 {
                let page = pages[Int(random.next() % UInt64(pages.count))]
                list += page.list(page.values)
            }
            for _ in 0..<random.next() % 3 {
                list[Int(random.next() % UInt64(list.count))] = UInt8(truncatingIfNeeded: random.next())
            }
            list = Array(list.prefix(Int(random.next() % UInt64(list.count + 20))))
            let before = world.modePages()
            let save: UInt8 = random.next() % 2 == 0 ? 0x10 : 0x11
            let end = world.run(CDB.modeSelect10(listLength: list.count, flags: save), dataOut: list)
            #expect(end.summary == "good" || end.summary.hasPrefix("5/"), "\(list)")
            if end.summary != "good" { #expect(world.modePages() == before) }
        }
    }
}

@Suite("Saved mode pages")
struct SavedModePageTests {
    @Test("SP saves: the values survive a power loss, become current at power on, and PC 11b tells them")
    func powerLoss() {
        let world = TestTarget(savesState: true)
        world.change(0x0a, byte: 0, set: 0x04, save: true)
        world.change(0x08, byte: 0, clear: 0x04)
        #expect(world.modePage(0x0a, control: 3).values[0] == 0x04)
        #expect(world.modePage(0x08, control: 3).values[0] == 0x04, "not saved")
        let later = TestTarget(kept: world.store!.kept)
        #expect(later.modePage(0x0a).values[0] == 0x04)
        #expect(later.modePage(0x0a, control: 3).values[0] == 0x04)
        #expect(later.modePage(0x0a, control: 2).values[0] == 0x00)
        #expect(later.modePage(0x08).values[0] == 0x04)
        #expect(later.run(CDB.read(.ten, 5000, 1)).sense?.isDescriptorFormat == true)
    }

    @Test("SP without a list saves what is current; SP saves every page and not only those in the list")
    func savesAll() {
        let world = TestTarget(savesState: true)
        world.change(0x08, byte: 0, clear: 0x04)
        #expect(world.run(CDB.modeSelect6(listLength: 0, flags: 0x11)).summary == "good")
        #expect(world.modePage(0x08, control: 3).values[0] == 0)
        world.change(0x0a, byte: 0, set: 0x04)
        world.change(0x1c, byte: 0, set: 0x08, save: true)
        #expect(world.modePage(0x0a, control: 3).values[0] == 0x04)
        #expect(world.store?.saves == 2)
    }

    @Test("Status comes when the values are durable, and until then nobody sees the new ones")
    func statusAfterSave() {
        let world = TestTarget(savesState: true)
        let page = world.modePage(0x0a)
        var values = page.values
        values[0] = 0x04
        let list = [0, 0, 0, 0, 0, 0, 0, 0] + page.list(values)
        let tag = world.a.send(CDB.modeSelect10(listLength: list.count, flags: 0x11), dataOut: list)
        #expect(world.a.tagsInFlight == [tag])
        #expect(world.unit.modePages.descriptorSense == false)
        world.store?.complete()
        #expect(world.a.completions.last?.summary == "good")
        #expect(world.unit.modePages.descriptorSense)
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/2a01")
    }

    @Test(
        "A save that fails changes nothing, and says so",
        arguments: zip([28, 122, 5] as [Int32], ["5/5503", "5/5503", "4/4400"]))
    func saveFails(error: Int32, sense: String) {
        let world = TestTarget(savesState: true)
        world.store?.errors = [error]
        let page = world.modePage(0x0a)
        #expect(world.select(page, [0x04] + page.values[1...], save: true).summary == sense)
        #expect(world.modePage(0x0a) == page)
        #expect(world.modePage(0x0a, control: 3).values == page.values)
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("A MODE SELECT that arrives while another is being saved waits for it")
    func twoSaves() {
        let world = TestTarget(savesState: true)
        let (control, caching) = (world.modePage(0x0a), world.modePage(0x08))
        func send(_ page: SensedPage, _ values: [UInt8], flags: UInt8) {
            let list = [0, 0, 0, 0, 0, 0, 0, 0] + page.list(values)
            world.a.send(CDB.modeSelect10(listLength: list.count, flags: flags), dataOut: list)
        }
        send(control, [0x04] + control.values[1...], flags: 0x11)
        send(caching, [0x00] + caching.values[1...], flags: 0x10)
        #expect(world.a.completions.last?.summary != nil && world.a.tagsInFlight.count == 2)
        world.drain()
        #expect(world.modePage(0x0a).values[0] == 0x04)
        #expect(world.modePage(0x08).values[0] == 0x00)
        #expect(world.modePage(0x08, control: 3).values[0] == 0x04)
    }

    @Test("A saved WCE of zero flushes before status; the write after it is stable")
    func writeCache() {
        let world = TestTarget(savesState: true)
        world.change(0x08, byte: 0, clear: 0x04, save: true)
        #expect(world.backstore.accepted.map(\.operation) == [.flush])
        _ = world.run(CDB.write(.ten, 0, 1), dataOut: [UInt8](repeating: 1, count: 512))
        #expect(world.backstore.accepted.last?.forcesUnitAccess == true)
    }

    @Test("LOGICAL UNIT RESET restores the saved values")
    func reset() {
        let world = TestTarget(savesState: true)
        world.change(0x0a, byte: 0, set: 0x04, save: true)
        world.change(0x0a, byte: 0, clear: 0x04)
        world.a.manage(.logicalUnitReset)
        _ = world.run(CDB.requestSense(), dataIn: 18)
        #expect(world.modePage(0x0a).values[0] == 0x04)
    }

    @Test(
        "Without a store SP is INVALID FIELD IN CDB, and so REPORT SUPPORTED OPERATION CODES says",
        arguments: [false, true])
    func withoutStore(store: Bool) {
        let world = TestTarget(savesState: store)
        for code in [0x15, 0x55] as [UInt8] {
            let data = world.run(CDB.reportSupportedOperationCodes(options: 1, code: code), dataIn: 64).data
            #expect(data[5] == (store ? 0x11 : 0x10))
        }
        let end = world.run(CDB.modeSelect6(listLength: 4, flags: 0x11), dataOut: [0, 0, 0, 0])
        #expect(end.summary == (store ? "good" : "5/2400 CDB 1.0"))
        #expect(world.run(CDB.modeSense6(0x08, control: 3), dataIn: 255).summary == (store ? "good" : "5/3900"))
    }

    @Test("Values that an earlier life saved and this one does not have are left out")
    func foreignValues() {
        func kept(_ bytes: [UInt8]) -> [UInt8] {
            var state = UnitState(name: TestTarget().unit.configuration.name)
            state.set(.savedModePages, version: 1, bytes)
            return state.encoded
        }
        let control = TestTarget().modePage(0x0a).values
        let bytes: [UInt8] =
            [0x0a, 0, 0, 10] + [0xff] + control[1...]  // bits that are not changeable
            + [0x08, 0, 0, 2, 0, 0]  // another length
            + [0x1c, 0, 0, 10] + [0x0c] + [UInt8](repeating: 0, count: 9)  // a combination that is not allowed
            + [0x3e, 0, 0, 1, 7]  // no such page
        let world = TestTarget(kept: kept(bytes))
        let mask = world.modePage(0x0a, control: 1).values[0]
        #expect(
            world.modePage(0x0a).values[0] == control[0] & ~mask | 0xff & mask || world.modePage(0x0a).values == control
        )
        #expect(world.modePage(0x08).values == world.modePage(0x08, control: 2).values)
        #expect(world.modePage(0x1c).values == world.modePage(0x1c, control: 2).values)
        #expect(throws: UnitStateError.damaged("the saved mode pages are cut off")) {
            try UnitState(parsing: kept([0x0a, 0, 0, 10, 1]), name: world.unit.configuration.name)
        }
    }
}

@Suite("Informational exceptions")
struct InformationalExceptionTests {
    let world = TestTarget()

    private func requestSense(on port: MockPort? = nil) -> String? {
        Sense(world.run(CDB.requestSense(), dataIn: 18, on: port).data)?.description
    }

    @Test("MRIE 6: REQUEST SENSE tells of a predicted failure, as often as it is asked (SBC-4 6.5.8)")
    func onRequest() {
        #expect(requestSense() == "0/0000")
        _ = world.fail(CDB.read(.ten, 0, 1), dataIn: 512)
        for port in [world.a, world.b, world.a] { #expect(requestSense(on: port) == "0/5d00") }
        #expect(world.run(CDB.testUnitReady).summary == "good")
    }

    @Test("MRIE 2: a unit attention condition for each nexus, once for all medium errors")
    func unitAttention() {
        world.change(0x1c, byte: 1, set: 0x02, clear: 0x04)
        _ = world.fail(CDB.read(.ten, 0, 1), dataIn: 512)
        for port in [world.a, world.b] { #expect(world.run(CDB.testUnitReady, on: port).summary == "6/5d00") }
        _ = world.fail(CDB.read(.ten, 0, 1), dataIn: 512)
        for port in [world.a, world.b] { #expect(world.run(CDB.testUnitReady, on: port).summary == "good") }
        #expect(requestSense() == "0/0000")
    }

    @Test("TEST: FAILURE PREDICTION THRESHOLD EXCEEDED (FALSE) by the method that MRIE names, until TEST is zero")
    func test() {
        world.change(0x1c, byte: 0, set: 0x04)
        #expect(requestSense() == "0/5dff")
        #expect(world.log(0x2f).parameters.first?.value == [0x5d, 0xff, 0xff, 0])
        world.change(0x1c, byte: 0, clear: 0x04)
        #expect(requestSense() == "0/0000")
        let page = world.modePage(0x1c)
        #expect(world.select(page, [0x04, 0x02] + page.values[2...]).summary == "good")
        #expect(world.run(CDB.testUnitReady).summary == "6/5dff")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/2a01")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/5dff")
        #expect(world.run(CDB.testUnitReady).summary == "good")
    }

    @Test("DEXCPT and MRIE 0 report nothing; the log page tells all the same; TEST with DEXCPT is refused")
    func disabled() {
        world.change(0x1c, byte: 0, set: 0x08)
        _ = world.fail(CDB.read(.ten, 0, 1), dataIn: 512)
        #expect(requestSense() == "0/0000")
        #expect(world.log(0x2f).parameters.first?.value == [0x5d, 0, 0xff, 0])
        let page = world.modePage(0x1c)
        #expect(world.select(page, [0x0c] + page.values[1...]).summary == "5/2600 list 10")
        #expect(world.select(page, [0x00, 0x00] + page.values[2...]).summary == "good")
        #expect(requestSense() == "0/0000")
        for method in [1, 3, 4, 5, 7, 15] as [UInt8] {
            #expect(world.select(page, [0, method] + page.values[2...]).summary == "5/2600 list 11")
        }
    }
}
