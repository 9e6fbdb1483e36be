// READ BUFFER, WRITE BUFFER, SEND DIAGNOSTIC, RECEIVE DIAGNOSTIC RESULTS, timestamps and identifying information.
//
// Must not know: where a unit keeps these.

import CoreTestSupport
import Testing

@testable import SCSICore

/// Forms of READ BUFFER, as tests build them.
private func readBuffer(
    _ mode: UInt8, identifier: UInt8 = 0, offset: UInt64 = 0, allocation: Int, isLong: Bool = false
) -> [UInt8] {
    isLong
        ? [0x9b, mode] + CDB.bytes(offset, 8) + CDB.bytes(UInt64(allocation), 4) + [identifier, 0]
        : [0x3c, mode, identifier] + CDB.bytes(offset, 3) + CDB.bytes(UInt64(allocation), 3) + [0]
}

private func writeBuffer(_ mode: UInt8, identifier: UInt8 = 0, offset: UInt64 = 0, length: Int) -> [UInt8] {
    [0x3b, mode, identifier] + CDB.bytes(offset, 3) + CDB.bytes(UInt64(length), 3) + [0]
}

@Suite("READ BUFFER and WRITE BUFFER")
struct BufferTests {
    let world = TestTarget()
    private let data = (0..<600).map { UInt8(truncatingIfNeeded: $0 &* 13 &+ 5) }

    @Test("What is written to the data buffer is read from it, by any nexus, at any offset", arguments: [false, true])
    func dataBuffer(isLong: Bool) {
        #expect(world.run(readBuffer(2, allocation: 16, isLong: isLong), dataIn: 16).data.allSatisfy { $0 == 0 })
        let write = writeBuffer(2, offset: 1001, length: 600)
        #expect(world.run(write, dataOut: data, outLayout: [1, 599]).summary == "good")
        let end = world.run(
            readBuffer(2, offset: 1001, allocation: 600, isLong: isLong), dataIn: 600, inLayout: [7, 593], on: world.b)
        #expect(end.data == data)
    }

    @Test("Reading ends at the end of the buffer; writing past it is INVALID FIELD IN CDB, and changes nothing")
    func bounds() {
        let capacity = UInt64(Limits.dataBufferBytes)
        let tail = world.run(readBuffer(2, offset: capacity - 10, allocation: 100), dataIn: 100)
        #expect(tail.data.count == 10)
        #expect(world.run(readBuffer(2, offset: capacity, allocation: 100), dataIn: 100).data.isEmpty)
        #expect(world.run(readBuffer(2, offset: capacity + 1, allocation: 9), dataIn: 9).summary == "5/2400 CDB 3")
        let far = readBuffer(2, offset: .max, allocation: 9, isLong: true)
        #expect(world.run(far, dataIn: 9).summary == "5/2400 CDB 2")
        let over = writeBuffer(2, offset: capacity - 10, length: 11)
        #expect(world.run(over, dataOut: Array(data[..<11])).summary == "5/2400 CDB 6")
        #expect(world.run(writeBuffer(2, offset: 0xff_ffff, length: 1), dataOut: [1]).summary == "5/2400 CDB 3")
        #expect(world.run(writeBuffer(2, length: 600), dataOut: Array(data[..<599])).summary == "overrun")
        #expect(world.run(readBuffer(2, offset: 0, allocation: 100), dataIn: 100).data.allSatisfy { $0 == 0 })
    }

    @Test("There is one data buffer; the descriptor of any other is zeros", arguments: [false, true])
    func identifiers(isLong: Bool) {
        let capacity = CDB.bytes(UInt64(Limits.dataBufferBytes), 4)
        #expect(world.run(readBuffer(3, allocation: 4, isLong: isLong), dataIn: 4).data == capacity)
        let other = readBuffer(3, identifier: 1, allocation: 4, isLong: isLong)
        #expect(world.run(other, dataIn: 4).data == [0, 0, 0, 0])
        let read = readBuffer(2, identifier: 1, allocation: 4, isLong: isLong)
        #expect(world.run(read, dataIn: 4).summary == "5/2400 CDB \(isLong ? 14 : 2)")
        #expect(world.run(writeBuffer(2, identifier: 1, length: 1), dataOut: [1]).summary == "5/2400 CDB 2")
    }

    @Test("The echo buffer gives back what the same nexus has written, as long as it was", arguments: [false, true])
    func echo(isLong: Bool) {
        let descriptor = world.run(readBuffer(0x0b, allocation: 4, isLong: isLong), dataIn: 4).data
        #expect(descriptor == [0x01, 0] + CDB.bytes(UInt64(Limits.echoBufferBytes), 2))
        #expect(world.run(writeBuffer(0x0a, length: 300), dataOut: Array(data[..<300])).summary == "good")
        let end = world.run(readBuffer(0x0a, allocation: 4096, isLong: isLong), dataIn: 4096)
        #expect(end.data == Array(data[..<300]))
        let long = [UInt8](repeating: 1, count: Limits.echoBufferBytes + 1)
        #expect(world.run(writeBuffer(0x0a, length: long.count), dataOut: long).summary == "5/2400 CDB 6")
    }

    @Test(
        "An echo that another nexus has overwritten is said to be, once; one that was never written is out of sequence")
    func overwritten() {
        let read = readBuffer(0x0a, allocation: 8)
        #expect(world.run(read, dataIn: 8).summary == "5/2c00")
        _ = world.run(writeBuffer(0x0a, length: 2), dataOut: [1, 2])
        _ = world.run(writeBuffer(0x0a, length: 2), dataOut: [3, 4], on: world.b)
        #expect(world.run(read, dataIn: 8).summary == "b/3f0f")
        #expect(world.run(read, dataIn: 8).summary == "5/2c00")
        #expect(world.run(read, dataIn: 8, on: world.b).data == [3, 4])
    }

    @Test("A logical unit reset forgets the echoes")
    func reset() {
        _ = world.run(writeBuffer(0x0a, length: 2), dataOut: [1, 2])
        world.b.manage(.logicalUnitReset)
        #expect(world.run(CDB.testUnitReady).summary == "6/2903")
        #expect(world.run(readBuffer(0x0a, allocation: 8), dataIn: 8).summary == "5/2c00")
    }

    @Test("Modes that there are not are INVALID FIELD IN CDB at MODE; those that there are, are reported")
    func modes() {
        for mode in [0, 1, 4, 5, 0x1c] as [UInt8] {
            #expect(world.run(readBuffer(mode, allocation: 4), dataIn: 4).summary == "5/2400 CDB 1.4")
            #expect(world.run(writeBuffer(mode, length: 0)).summary == "5/2400 CDB 1.4")
        }
        let query = CDB.reportSupportedOperationCodes(options: 2, code: 0x3b, serviceAction: 2)
        #expect(Array(world.run(query, dataIn: 64).data.prefix(2)) == [0, 3])
    }
}

@Suite("Diagnostics")
struct DiagnosticTests {
    let world = TestTarget()

    private func send(_ flags: UInt8, length: Int = 0) -> [UInt8] {
        [0x1d, flags, 0] + CDB.bytes(UInt64(length), 2) + [0]
    }

    @Test("The default self-test reads the start, the middle and the end of the medium")
    func selfTest() {
        #expect(world.run(send(0x04)).summary == "good")
        #expect(world.backstore.accepted.map(\.description) == ["read 0+512", "read 1048064+512", "read 2096640+512"])
        let one = TestTarget(blocks: 1)
        #expect(one.run(send(0x04)).summary == "good")
    }

    @Test("A block that cannot be read is LOGICAL UNIT FAILED SELF-TEST", arguments: 0..<3)
    func failedSelfTest(index: Int) {
        let tag = world.a.send(send(0x04))
        for _ in 0..<index { world.backstore.complete() }
        world.backstore.complete(error: 5)
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "4/3e03")
        #expect(world.backstore.pending.isEmpty)
    }

    @Test("Page 00h can be sent and received; nothing else can")
    func pages() {
        #expect(world.run(send(0)).summary == "good")
        #expect(world.run(send(0x10, length: 4), dataOut: [0, 0, 0, 0]).summary == "good")
        #expect(world.run(send(0x10, length: 4), dataOut: [1, 0, 0, 0]).summary == "5/2600 list 0")
        #expect(world.run(send(0x10, length: 5), dataOut: [0, 0, 0, 1, 0]).summary == "5/2600 list 2")
        #expect(world.run(send(0x10, length: 3), dataOut: [0, 0, 0]).summary == "5/1a00")
        #expect(world.run(send(0x10, length: 4), dataOut: [0, 0, 0]).summary == "overrun")
        #expect(world.run(send(0, length: 4), dataOut: [0, 0, 0, 0]).summary == "5/2400 CDB 1.4")
        #expect(world.run(send(0x04, length: 4), dataOut: [0, 0, 0, 0]).summary == "5/2400 CDB 3")
        #expect(world.run([0x1c, 1, 0, 0, 255, 0], dataIn: 255).data == [0, 0, 0, 1, 0])
        #expect(world.run([0x1c, 0, 0, 0, 255, 0], dataIn: 255).data == [0, 0, 0, 1, 0])
        #expect(world.run([0x1c, 1, 0x40, 0, 255, 0], dataIn: 255).summary == "5/2400 CDB 2")
    }
}

@Suite("Timestamps")
struct TimestampTests {
    let world = TestTarget()

    private func report(on port: MockPort? = nil) -> (origin: UInt8, value: UInt64) {
        let data = world.run([0xa3, 0x0f] + CDB.bytes(0, 4) + CDB.bytes(12, 4) + [0, 0], dataIn: 12, on: port).data
        guard data.count == 12, data[0] == 0, data[1] == 10 else { return (origin: 0xff, value: 0) }
        return (origin: data[2], value: data[4..<10].reduce(0) { $0 << 8 | UInt64($1) })
    }

    private func set(_ length: Int, _ list: [UInt8]) -> Completion {
        world.run([0xa4, 0x0f] + CDB.bytes(0, 4) + CDB.bytes(UInt64(length), 4) + [0, 0], dataOut: list)
    }

    private func list(_ value: UInt64) -> [UInt8] { [0, 0, 0, 0] + CDB.bytes(value, 6) + [0, 0] }

    @Test("The clock begins at zero and goes on with the shard's")
    func beginsAtZero() {
        #expect(report() == (origin: 0, value: 0))
        world.shard.now += 1_234_999_999
        #expect(report() == (origin: 0, value: 1234))
    }

    @Test("A clock that is set goes on from there, for every nexus; the others learn of it")
    func isSet() {
        world.shard.now += 5_000_000_000
        #expect(set(12, list(1_700_000_000_000)).summary == "good")
        world.shard.now += 42_000_000
        #expect(report() == (origin: 2, value: 1_700_000_000_042))
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/2a10")
        #expect(report(on: world.b) == (origin: 2, value: 1_700_000_000_042))
        #expect(world.run(CDB.testUnitReady).summary == "good")
    }

    @Test("A list that is too short or not there changes nothing; a longer one is read as far as it is known")
    func lists() {
        #expect(set(0, []).summary == "good")
        #expect(set(11, Array(list(7)[..<11])).summary == "5/1a00")
        #expect(set(12, Array(list(7)[..<11])).summary == "overrun")
        #expect(set(Int(UInt32.max), list(7)).summary == "overrun")
        #expect(report().origin == 0)
        #expect(set(16, list(7) + [1, 2, 3, 4]).summary == "good")
        #expect(report() == (origin: 2, value: 7))
    }

    @Test("A timestamp wraps at 48 bits")
    func wraps() {
        _ = set(12, list(1 << 48 - 1))
        world.shard.now += 2_000_000
        #expect(report() == (origin: 2, value: 1))
    }
}

@Suite("Identifying information")
struct IdentifyingInformationTests {
    let world = TestTarget(savesState: true)
    private static let text: UInt8 = 2

    private func report(_ type: UInt8, on port: MockPort? = nil, allocation: Int = 1024) -> Completion {
        world.run(
            [0xa3, 0x05, 0, 0, 0, 0] + CDB.bytes(UInt64(allocation), 4) + [type << 1, 0], dataIn: allocation, on: port)
    }

    private func set(_ type: UInt8, _ bytes: [UInt8], in target: TestTarget? = nil) -> Completion {
        (target ?? world).run(setCDB(type, bytes.count), dataOut: bytes)
    }

    private func setCDB(_ type: UInt8, _ length: Int) -> [UInt8] {
        [0xa4, 0x06, 0, 0, 0, 0] + CDB.bytes(UInt64(length), 4) + [type << 1, 0]
    }

    @Test("What is set is reported to every nexus, each kind for itself, and the others learn of it")
    func roundTrip() {
        #expect(report(0).data == [0, 0, 0, 0])
        #expect(set(0, Array("rack 7".utf8)).summary == "good")
        #expect(set(Self.text, Array("the one with the blue cable".utf8)).summary == "good")
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/3f05")
        #expect(report(0, on: world.b).data == [0, 0, 0, 6] + Array("rack 7".utf8))
        #expect(Array(report(Self.text).data[4...]) == Array("the one with the blue cable".utf8))
        #expect(set(0, []).summary == "good")
        #expect(report(0).data == [0, 0, 0, 0])
        #expect(report(Self.text).data.count > 4)
    }

    @Test("It is durable before the command ends, and there after a power loss")
    func survives() throws {
        let tag = world.a.send(setCDB(0, 4), dataOut: Array("here".utf8))
        #expect(world.a.completions.last { $0.tag == tag } == nil)
        let store = try #require(world.store)
        store.complete()
        #expect(world.a.completions.last { $0.tag == tag }?.summary == "good")
        let again = TestTarget(kept: store.kept)
        #expect(again.unit.identifyingInformation[.peripheralDevice] == Array("here".utf8))
        #expect(set(0, [], in: again).summary == "good")
        #expect(TestTarget(kept: again.store?.kept).unit.identifyingInformation == IdentifyingInformation())
    }

    @Test("What could not be saved has not happened")
    func failedSave() {
        world.store?.errors = [5]
        #expect(set(0, [1, 2, 3]).summary == "4/4400")
        #expect(report(0).data == [0, 0, 0, 0])
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("To set what is there changes nothing and tells nobody")
    func unchanged() {
        _ = set(0, [1, 2, 3])
        _ = world.run(CDB.testUnitReady, on: world.b)
        #expect(set(0, [1, 2, 3]).summary == "good")
        #expect(world.store?.saves == 1)
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "good")
    }

    @Test("The longest information fits; a longer one is INVALID FIELD IN CDB; other kinds are too")
    func limits() {
        let longest = [UInt8](repeating: 0x41, count: Limits.identifyingInformationBytes)
        #expect(set(0, longest).summary == "good")
        #expect(set(Self.text, longest).summary == "good")
        #expect(report(0, allocation: 10).data.count == 10)
        #expect(set(0, longest + [1]).summary == "5/2400 CDB 6")
        #expect(world.run(setCDB(0, Int(UInt32.max)), dataOut: [1]).summary == "5/2400 CDB 6")
        #expect(world.run(setCDB(0, 12), dataOut: [1]).summary == "overrun")
        #expect(set(1, [1]).summary == "5/2400 CDB 10.7")
        #expect(set(0x7f, [1]).summary == "5/2400 CDB 10.7")
        #expect(report(4).summary == "5/2400 CDB 10.7")
        #expect(report(0x7f).data == [0, 0, 0, 8, 0, 0, 2, 0, 4, 0, 2, 0])
    }

    @Test("A unit that can save nothing does not have the commands")
    func absent() {
        let plain = TestTarget()
        #expect(set(0, [1], in: plain).summary == "5/2400 CDB 1.4")
        let query = CDB.reportSupportedOperationCodes(options: 2, code: 0xa4, serviceAction: 6)
        #expect(plain.run(query, dataIn: 64).data == [0, 1, 0, 0])
    }

    @Test("A section that is not one is refused when the state is read, whatever its bytes")
    func hostileSection() throws {
        let name = world.unit.configuration.name
        for bytes in [[0], [0, 0], [0, 0, 0], [0, 0, 2, 1], [1, 0, 1, 9], [2, 0, 1, 9, 0, 0, 1, 9], [0, 2, 1]]
            as [[UInt8]]
        {
            var state = UnitState(name: name)
            state.set(.identifyingInformation, version: 1, bytes)
            #expect(throws: UnitStateError.self) { try UnitState(parsing: state.encoded, name: name) }
        }
        var state = UnitState(name: name)
        state.set(.identifyingInformation, version: 1, [0, 0, 1, 9, 2, 0, 1, 8])
        #expect(throws: Never.self) { try UnitState(parsing: state.encoded, name: name) }
    }
}
