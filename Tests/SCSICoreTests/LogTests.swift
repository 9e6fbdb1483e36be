// LOG SENSE and LOG SELECT: the pages, their parameters, and that these are what the unit has counted.

import CoreTestSupport
@testable import SCSICore
import Testing

/// A log page read back from its bytes.
struct LogPage {
    var page: UInt8 = 0
    var subpage: UInt8 = 0
    var parameters: [(code: UInt16, control: UInt8, value: [UInt8])] = []

    /// `nil` if lengths do not fit or parameters are not in ascending order.
    init?(_ data: [UInt8]) {
        guard data.count >= 4, Int(data[2]) << 8 | Int(data[3]) == data.count - 4 else { return nil }
        (page, subpage) = (data[0] & 0x3f, data[1])
        guard (data[0] & 0x40 != 0) == (subpage != 0), data[0] & 0x80 != 0 else { return nil }
        var rest = Array(data[4...])
        while !rest.isEmpty {
            guard rest.count >= 4, rest.count >= 4 + Int(rest[3]) else { return nil }
            let code = UInt16(rest[0]) << 8 | UInt16(rest[1])
            if let last = parameters.last, last.code >= code { return nil }
            parameters.append((code: code, control: rest[2], value: Array(rest[4..<4 + Int(rest[3])])))
            rest.removeFirst(4 + Int(rest[3]))
        }
    }

    /// A field of a parameter as a number.
    func number(_ code: UInt16, _ range: Range<Int>? = nil) -> UInt64? {
        parameters.first { $0.code == code }.map { parameter in
            parameter.value[range ?? 0..<parameter.value.count].reduce(0) { $0 << 8 | UInt64($1) }
        }
    }
}

extension TestTarget {
    /// Reads a log page; an empty one, and a failed test, if it is malformed.
    func log(_ page: UInt8, control: UInt8 = 1, on port: MockPort? = nil) -> LogPage {
        let data = run(CDB.logSense(page, control: control), dataIn: 4096, on: port).data
        let parsed = LogPage(data)
        #expect(parsed != nil, "page \(page): \(data)")
        return parsed ?? LogPage([0x80, 0, 0, 0])!
    }

    /// The medium fails the next request of a command that is sent now.
    func fail(_ cdb: [UInt8], dataOut: [UInt8] = [], dataIn: Int = 0, error: Int32 = 5) -> Completion {
        let tag = a.send(cdb, dataOut: dataOut, dataIn: dataIn)
        backstore.complete(error: error)
        drain()
        return a.completions.last { $0.tag == tag }!
    }
}

@Suite("LOG SENSE")
struct LogSenseTests {
    let world = TestTarget()

    /// The pages with parameters.
    static let pages: [UInt8] = [0x02, 0x03, 0x05, 0x0d, 0x0e, 0x15, 0x18, 0x19, 0x2f]

    @Test("Page 00h lists the pages in ascending order, and exactly those can be asked for (SPC-4)")
    func supportedPages() {
        let data = world.run(CDB.logSense(0), dataIn: 256).data
        #expect(Int(data[3]) == data.count - 4)
        let codes = Array(data[4...])
        #expect(codes == [0] + Self.pages)
        for code in 0..<64 as Range<UInt8> {
            let end = world.run(CDB.logSense(code), dataIn: 4096)
            #expect(end.summary == (codes.contains(code) ? "good" : "5/2400 CDB 2.5"), "page \(code)")
        }
    }

    @Test("Page 00h/FFh lists pages and subpages, and exactly those can be asked for (SPC-4)")
    func supportedSubpages() {
        let data = world.run(CDB.logSense(0, 0xff), dataIn: 256).data
        #expect(Array(data[..<2]) == [0xc0, 0xff])
        #expect(Int(data[3]) == data.count - 4)
        let entries = stride(from: 4, to: data.count, by: 2).map { [data[$0], data[$0 + 1]] }
        #expect(entries == entries.sorted { ($0[0], $0[1]) < ($1[0], $1[1]) })
        for page in [0] + Self.pages {
            for subpage in 0...255 as ClosedRange<UInt8> {
                let end = world.run(CDB.logSense(page, subpage), dataIn: 4096)
                let known = entries.contains([page, subpage])
                #expect(end.summary == (known ? "good" : "5/2400 CDB 3"), "page \(page) subpage \(subpage)")
            }
        }
    }

    @Test("Subpage FFh of a page lists that page's subpages", arguments: pages)
    func subpagesOfOne(page: UInt8) {
        let data = world.run(CDB.logSense(page, 0xff), dataIn: 256).data
        #expect(data == [0xc0 | page, 0xff, 0, 4, page, 0, page, 0xff])
    }

    @Test("Each page is well formed with each PC, saves nothing, and its header names it", arguments: pages)
    func wellFormed(page: UInt8) {
        for control in 0..<4 as Range<UInt8> {
            let end = world.run(CDB.logSense(page, control: control), dataIn: 4096)
            if page == 0x19, control == 0 || control == 2 {
                #expect(end.summary == "5/2400 CDB 2.7", "unbounded counters have no thresholds")
                continue
            }
            let parsed = LogPage(end.data)
            #expect(parsed?.page == page)
            for parameter in parsed?.parameters ?? [] { #expect(parameter.control & 0xe0 == 0x20) }
        }
    }

    @Test("PARAMETER POINTER leaves out what is before it; beyond the last it is refused", arguments: pages)
    func parameterPointer(page: UInt8) {
        let codes = world.log(page).parameters.map(\.code)
        for pointer in 0...codes.last! {
            let end = world.run(CDB.logSense(page, pointer: pointer), dataIn: 4096)
            #expect(LogPage(end.data)?.parameters.map(\.code) == codes.filter { $0 >= pointer })
        }
        #expect(world.run(CDB.logSense(page, pointer: codes.last! + 1), dataIn: 4096).summary == "5/2400 CDB 5")
        #expect(world.run(CDB.logSense(0, pointer: 1), dataIn: 4096).summary == "5/2400 CDB 5")
    }

    @Test("SP and PPC are refused: nothing is saved, PPC is obsolete", arguments: [(1, "CDB 1.0"), (2, "CDB 1.1")])
    func flags(flags: UInt8, field: String) {
        #expect(world.run(CDB.logSense(0x02, flags: flags), dataIn: 256).summary == "5/2400 \(field)")
    }

    @Test("Allocation lengths cut the data and leave the length field as it is", arguments: [0, 3, 4, 17])
    func allocationLength(length: UInt16) {
        let whole = world.run(CDB.logSense(0x02), dataIn: 4096).data
        #expect(world.run(CDB.logSense(0x02, allocation: length), dataIn: 4096).data == Array(whole[..<Int(length)]))
    }

    @Test("Error counters are the unit's: bytes processed, uncorrected errors, by kind of access")
    func errorCounters() {
        _ = world.run(CDB.write(.ten, 0, 3), dataOut: [UInt8](repeating: 1, count: 1536))
        _ = world.run(CDB.read(.ten, 0, 2), dataIn: 1024)
        _ = world.run(CDB.verify(.ten, 0, 4))
        #expect(world.fail(CDB.read(.ten, 0, 1), dataIn: 512).summary == "3/1100")
        #expect(world.fail(CDB.write(.ten, 0, 1), dataOut: [UInt8](repeating: 1, count: 512)).summary == "3/0c00")
        #expect(world.fail(CDB.verify(.ten, 0, 1)).summary == "3/1100")
        #expect(world.fail(CDB.verify(.ten, 0, 1)).summary == "3/1100")
        // Not an error of the medium.
        #expect(world.fail(CDB.read(.ten, 0, 1), dataIn: 512, error: 110).sense?.key == 0xb)
        let statistics = world.unit.statistics
        for (page, bytes, errors) in [
            (0x02, statistics.bytesWritten, statistics.writeErrors),
            (0x03, statistics.bytesRead, statistics.readErrors),
            (0x05, statistics.bytesVerified, statistics.verifyErrors),
        ] as [(UInt8, UInt64, MediumErrorCounters)] {
            let log = world.log(page)
            #expect(log.number(5) == bytes)
            #expect(log.number(6) == errors.uncorrected)
            for code in [1, 2, 3] as [UInt16] { #expect(log.number(code) == errors.corrected) }
        }
        #expect(statistics.bytesWritten == 2048 && statistics.bytesVerified == 2048)
        #expect(statistics.readErrors.uncorrected == 1 && statistics.writeErrors.uncorrected == 1)
        #expect(statistics.verifyErrors.uncorrected == 2 && statistics.bytesRead == 1024)
    }

    @Test("WRITE AND VERIFY counts as a write; what fails while it verifies is a verify error")
    func writeAndVerify() {
        let block = [UInt8](repeating: 7, count: 512)
        let cdb: [UInt8] = [0x2e, 0x02, 0, 0, 0, 0, 0, 0, 1, 0]
        #expect(world.run(cdb, dataOut: block).summary == "good")
        #expect(world.log(0x02).number(5) == 512)
        #expect(world.log(0x05).number(5) == 512)
        _ = world.a.send(cdb, dataOut: block)
        while world.backstore.pending.first?.operation != .read { world.backstore.complete() }
        world.backstore.complete(error: 5)
        world.drain()
        #expect(world.log(0x05).number(6) == 1)
        #expect(world.log(0x02).number(6) == 0)
    }

    @Test("General statistics are the unit's: commands, blocks, processing time, idle time in nanoseconds")
    func generalStatistics() {
        let world = TestTarget()
        let idleBefore = world.log(0x19).number(2)!
        world.shard.now += 1_000
        _ = world.a.send(CDB.read(.ten, 0, 2), dataIn: 1024)
        world.shard.now += 70
        world.drain()
        world.shard.now += 200
        _ = world.a.send(CDB.write(.ten, 0, 1), dataOut: [UInt8](repeating: 1, count: 512))
        world.shard.now += 500
        world.drain()
        _ = world.run(CDB.unmap(listLength: 24), dataOut: CDB.unmapList([(address: 0, blocks: 1)]))
        let log = world.log(0x19)
        #expect(log.number(1, 0..<8) == 1)
        #expect(log.number(1, 8..<16) == 2)
        #expect(log.number(1, 16..<24) == 1)
        #expect(log.number(1, 24..<32) == 2)
        #expect(log.number(1, 32..<40) == 70)
        #expect(log.number(1, 40..<48) == 500)
        #expect(log.number(1, 48..<64) == 0)
        #expect(log.number(2) == idleBefore + 1_200)
        #expect(log.parameters.last?.value == [0, 0, 0, 9, 0, 0, 0, 1])
    }

    @Test("No temperature is FFh (SPC-4 7.3.21), no background scan is status 0, no exception is ASC 0")
    func whatThereIsNot() {
        #expect(world.log(0x0d).parameters.map(\.value) == [[0, 0xff], [0, 0xff]])
        world.shard.now += 3 * 60_000_000_000 + 5
        #expect(world.log(0x15).parameters.map(\.value) == [[0, 0, 0, 3] + [UInt8](repeating: 0, count: 8)])
        #expect(world.log(0x2f).parameters.map(\.value) == [[0, 0, 0xff, 0]])
    }

    @Test("Each target port has a parameter, of no specific protocol (SPC-4 7.3.13)")
    func ports() {
        #expect(world.log(0x18).parameters.map(\.code) == Array(world.target.ports.identifiers))
        #expect(world.log(0x18).parameters.allSatisfy { $0.value == [0x0f, 0, 0, 0] })
    }

    @Test("A medium error is a predicted failure in the informational exceptions page, until it is reset")
    func informationalException() {
        _ = world.fail(CDB.read(.ten, 0, 1), dataIn: 512)
        #expect(world.log(0x2f).parameters.first?.value == [0x5d, 0, 0xff, 0])
        #expect(world.run(CDB.logSelect(0x2f, flags: 2)).summary == "good")
        #expect(world.log(0x2f).parameters.first?.value == [0, 0, 0xff, 0])
    }
}

@Suite("LOG SELECT")
struct LogSelectTests {
    let world = TestTarget()

    /// A page 03h with one parameter.
    private func list(_ code: UInt16, control: UInt8 = 0x30, value: UInt64 = 0, page: UInt8 = 0x03) -> [UInt8] {
        [page, 0, 0, 12] + CDB.bytes(UInt64(code), 2) + [control, 8] + CDB.bytes(value, 8)
    }

    private func select(_ list: [UInt8], control: UInt8 = 0, on port: MockPort? = nil) -> String {
        world.run(CDB.logSelect(control: control, listLength: list.count), dataOut: list, on: port).summary
    }

    private func readTwoBlocks() {
        _ = world.run(CDB.read(.ten, 0, 2), dataIn: 1024)
    }

    @Test("PCR resets the counters of the named page and of no other; the unit's own statistics go on")
    func reset() {
        readTwoBlocks()
        #expect(world.log(0x03).number(5) == 1024)
        #expect(world.run(CDB.logSelect(0x02, flags: 2)).summary == "good")
        #expect(world.log(0x03).number(5) == 1024)
        #expect(world.run(CDB.logSelect(0x03, flags: 2)).summary == "good")
        #expect(world.log(0x03).number(5) == 0)
        #expect(world.log(0x19).number(1, 0..<8) == 1)
        readTwoBlocks()
        #expect(world.log(0x03).number(5) == 1024)
        #expect(world.unit.statistics.bytesRead == 2048)
    }

    @Test(
        "Page 00h resets all pages, also as 00h/FFh; a page's subpage FFh that page (SPC-4 6.7.2)",
        arguments: [(0, 0, true), (0, 0xff, true), (0x03, 0xff, false), (0x19, 0xff, false)] as [(UInt8, UInt8, Bool)])
    func resetAll(page: UInt8, subpage: UInt8, all: Bool) {
        readTwoBlocks()
        #expect(world.run(CDB.logSelect(page, subpage, flags: 2)).summary == "good")
        #expect((world.log(0x03).number(5) == 0) == (all || page == 0x03))
        #expect((world.log(0x19).number(1, 0..<8) == 0) == (all || page == 0x19))
    }

    @Test("Without PCR and without a list only PC 11b resets counters (SPC-4 6.7.2)", arguments: 0..<4 as Range<UInt8>)
    func pageControl(control: UInt8) {
        readTwoBlocks()
        #expect(world.run(CDB.logSelect(0x03, control: control)).summary == "good")
        #expect(world.log(0x03).number(5) == (control == 3 ? 0 : 1024))
    }

    @Test("An unknown page, an unknown subpage and SP are INVALID FIELD IN CDB")
    func invalidCDB() {
        #expect(world.run(CDB.logSelect(0x07, flags: 2)).summary == "5/2400 CDB 2.5")
        #expect(world.run(CDB.logSelect(0x03, 0x01, flags: 2)).summary == "5/2400 CDB 3")
        #expect(world.run(CDB.logSelect(0, 0x01, flags: 2)).summary == "5/2400 CDB 3")
        #expect(world.run(CDB.logSelect(flags: 1)).summary == "5/2400 CDB 1.0")
    }

    @Test("With a list, PCR, a page in the CDB and default values are INVALID FIELD IN CDB (SPC-4 6.7.1)")
    func listAndCDB() {
        let list = list(6)
        func run(_ cdb: [UInt8]) -> String { world.run(cdb, dataOut: list).summary }
        #expect(run(CDB.logSelect(control: 0, listLength: 16, flags: 2)) == "5/2400 CDB 1.1")
        #expect(run(CDB.logSelect(0x03, control: 0, listLength: 16)) == "5/2400 CDB 2.5")
        #expect(run(CDB.logSelect(0, 1, control: 0, listLength: 16)) == "5/2400 CDB 3")
        #expect(run(CDB.logSelect(control: 2, listLength: 16)) == "5/2400 CDB 2.7")
        #expect(run(CDB.logSelect(control: 0, listLength: 20)) == "overrun")
        #expect(run(CDB.logSelect(control: 0, listLength: 16)) == "good")
    }

    @Test("A change is LOG PARAMETERS CHANGED for every other nexus, once (SPC-4 6.7)")
    func unitAttention() {
        #expect(world.run(CDB.logSelect(flags: 2)).summary == "good")
        #expect(world.run(CDB.testUnitReady).summary == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/2a02")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
        #expect(select(list(6, value: 3)) == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/2a02")
        #expect(select(list(6, value: 3)) == "good", "the same again changes nothing")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("Thresholds come back as they were set, default ones are the most there can be, PC 10b restores those")
    func thresholds() {
        let none = UInt64.max
        #expect(world.log(0x03, control: 0).number(6) == none)
        #expect(select(list(6, control: 0x3c, value: 9)) == "good")
        let set = world.log(0x03, control: 0).parameters.first { $0.code == 6 }
        #expect(set?.control == 0x3c)
        #expect(set?.value == CDB.bytes(9, 8))
        #expect(world.log(0x03, control: 2).number(6) == none)
        #expect(world.log(0x03).number(6) == 0)
        #expect(world.log(0x02, control: 0).number(6) == none)
        #expect(world.run(CDB.logSelect(0x03, control: 2)).summary == "good")
        #expect(world.log(0x03, control: 0).number(6) == none)
    }

    @Test(
        "THRESHOLD CONDITION MET: for each criterion exactly the values that meet it, if RLEC is one",
        arguments: 0..<4 as Range<UInt8>, [false, true])
    func thresholdMet(criteria: UInt8, report: Bool) {
        if report { world.setControlMode(byte: 0, to: 0x01) }
        _ = world.run(CDB.requestSense(), dataIn: 18, on: world.b)
        #expect(select(list(6, control: 0x30 | criteria << 2, value: 2)) == "good")
        _ = world.run(CDB.requestSense(), dataIn: 18, on: world.b)
        for count in 1...4 {
            _ = world.fail(CDB.read(.ten, 0, 1), dataIn: 512)
            let met = report && [true, count == 2, count != 2, count > 2][Int(criteria)]
            for port in [world.a, world.b] {
                let end = world.run(CDB.testUnitReady, on: port)
                #expect(end.summary == (met ? "6/5b01" : "good"), "count \(count)")
            }
        }
    }

    @Test("Counters, lists and the threshold of bytes processed cannot be set; what is wrong is pointed at")
    func refusals() {
        let wrong: [(list: [UInt8], control: UInt8, field: Int)] = [
            (list(6), 1, 4),  // a counter, which can be reset only
            (list(5), 0, 6),  // a threshold that each READ would have to look at
            (list(0), 0, 4), (list(7), 0, 4),  // no such parameter
            (list(6, control: 0x10), 0, 6), (list(6, control: 0xb0), 0, 6), (list(6, control: 0x31), 0, 6),
            (list(6, page: 0x04), 0, 0), (list(6, page: 0x43), 0, 0), (list(0, page: 0x00), 0, 0),
            ([0x03, 0, 0, 8, 0, 6, 0x30, 4, 0, 0, 0, 1], 0, 7),  // four bytes of eight
            ([0x03, 0, 0, 3, 0, 6, 0x30], 0, 4),  // a page that ends in a parameter's header
            ([0x03, 0, 0, 6, 0, 6, 0x30, 8, 0, 0], 0, 4),  // or in its value
            ([0x0d, 0, 0, 6, 0, 0, 0x23, 2, 0, 20], 0, 4),  // a temperature
            ([0x03, 0, 0, 24] + list(6)[4...] + list(3)[4...], 0, 16),  // not ascending
        ]
        for (list, control, field) in wrong {
            #expect(select(list, control: control) == "5/2600 list \(field)", "\(list)")
        }
        #expect(world.log(0x03, control: 0).number(6) == .max, "nothing took effect")
        #expect(select(list(5, control: 0x20, value: 77)) == "good", "without ETC nobody looks at it")
    }

    @Test("A list cut at any byte is an error or whole, and never takes half an effect")
    func truncatedLists() {
        let whole = list(6, value: 1) + list(6, value: 2, page: 0x02)
        for length in 1..<whole.count where length != 16 {
            #expect(select(Array(whole[..<length])) == "5/1a00", "length \(length)")
            #expect(world.log(0x03, control: 0).number(6) == .max)
        }
        #expect(select(whole) == "good")
        #expect(world.log(0x02, control: 0).number(6) == 2)
    }

    @Test("Random lists are refused or take effect as a whole", arguments: 0..<50)
    func hostile(seed: UInt64) {
        var random = SplitMix64(seed: seed)
        for _ in 0..<40 {
            var bytes = list(6, value: random.next()) + list(3, page: 0x02)
            for _ in 0..<random.next() % 4 {
                bytes[Int(random.next() % UInt64(bytes.count))] = UInt8(truncatingIfNeeded: random.next())
            }
            let before = (world.log(0x02, control: 0).number(3), world.log(0x03, control: 0).number(6))
            let end = select(bytes, control: UInt8(random.next() % 2))
            #expect(end == "good" || end.hasPrefix("5/"))
            if end != "good" {
                #expect(before == (world.log(0x02, control: 0).number(3), world.log(0x03, control: 0).number(6)))
            }
        }
    }
}
