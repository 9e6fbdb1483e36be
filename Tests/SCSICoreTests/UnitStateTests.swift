// The state of a logical unit as bytes, and how a change of it becomes durable before it happens.

import CoreTestSupport
import Testing

@testable import SCSICore

@Suite("The bytes of a logical unit's state")
struct UnitStateTests {
    private let name: UInt64 = 0x3001_4054_0000_0001

    private func sample() -> UnitState {
        var state = UnitState(name: name)
        state.set(UnitStateKind(rawValue: 0x7777), version: 9, [1, 2, 3])
        state.set(.identifyingInformation, version: 1, [2, 0, 6] + Array("rack 4".utf8))
        state.set(UnitStateKind(rawValue: 0x7000), version: 2, [])
        return state
    }

    @Test("what was encoded is read back, sections of unknown kinds included")
    func roundTrip() throws {
        let state = sample()
        #expect(try UnitState(parsing: state.encoded, name: name) == state)
        #expect(state.sections.map(\.kind.rawValue) == [3, 0x7000, 0x7777])
    }

    @Test("a unit of which nothing was saved has bytes too")
    func empty() throws {
        let state = UnitState(name: name)
        #expect(state.encoded.count == 32)
        #expect(try UnitState(parsing: state.encoded, name: name) == state)
    }

    @Test("the checksum is CRC-32C: its check value")
    func checksum() {
        #expect(UnitState.checksum(Array("123456789".utf8)[...]) == 0xe306_9283)
    }

    @Test("a section is replaced, and removed")
    func replaceAndRemove() {
        var state = sample()
        state.set(.identifyingInformation, version: 1, [7])
        #expect(state[.identifyingInformation]?.bytes == [7])
        state.set(.identifyingInformation, version: 1, nil)
        #expect(state[.identifyingInformation] == nil)
        #expect(state.sections.count == 2)
    }

    @Test("every truncation is refused")
    func truncated() {
        let bytes = sample().encoded
        for length in 0..<bytes.count {
            #expect(throws: UnitStateError.self) { try UnitState(parsing: Array(bytes[..<length]), name: name) }
        }
        #expect(throws: UnitStateError.self) { try UnitState(parsing: bytes + [0], name: name) }
    }

    @Test("every flipped bit is noticed")
    func flipped() {
        let bytes = sample().encoded
        for bit in 0..<bytes.count * 8 {
            var damaged = bytes
            damaged[bit / 8] ^= 1 << UInt8(bit % 8)
            #expect(throws: UnitStateError.self) { try UnitState(parsing: damaged, name: name) }
        }
    }

    @Test("the state of another unit is refused by name")
    func otherUnit() {
        #expect(throws: UnitStateError.otherUnit(name)) { try UnitState(parsing: sample().encoded, name: name + 1) }
    }

    @Test("a format, and a section, of a newer version are refused")
    func newer() {
        var bytes = Array(sample().encoded.dropLast(4))
        bytes[11] = 2
        bytes.append(bigEndian: UnitState.checksum(bytes[...]))
        #expect(throws: UnitStateError.newer(what: "the format", version: 2)) {
            try UnitState(parsing: bytes, name: name)
        }
        var state = sample()
        state.set(.identifyingInformation, version: 2, [])
        #expect(throws: UnitStateError.newer(what: "section 3", version: 2)) {
            try UnitState(parsing: state.encoded, name: name)
        }
    }

    @Test("bytes with a right checksum and wrong lengths inside are refused, whatever they are")
    func hostileLengths() {
        let bytes = sample().encoded
        var random = SplitMix64(seed: 4)
        for _ in 0..<2000 {
            var hostile = Array(bytes.dropLast(4))
            for _ in 0..<1 + random.next() % 3 {
                hostile[24 + Int(random.next() % UInt64(hostile.count - 24))] = UInt8(truncatingIfNeeded: random.next())
            }
            hostile.append(bigEndian: UnitState.checksum(hostile[...]))
            // Either it is refused or it is read back as it is; it never traps.
            if let state = try? UnitState(parsing: hostile, name: name) { #expect(state.encoded == hostile) }
        }
    }
}

@Suite("A change of the persistent state")
struct PersistentStateTests {
    private final class Log { var lines: [String] = [] }

    private let violations = Violations()
    private let log = Log()

    private func make() -> (PersistentState, ScriptedStateStore) {
        let store = ScriptedStateStore(violations: violations)
        return (PersistentState(UnitState(name: 1), store: store.handle), store)
    }

    @Test("is made when its bytes are durable, and not before")
    func order() {
        let (state, store) = make()
        state.stage(.identifyingInformation, version: 1, [1]) { [log] in log.lines.append("applied") }
        state.begin { [log] in log.lines.append("ended \($0)") }
        #expect(log.lines.isEmpty)
        #expect(store.kept == nil)
        store.complete()
        #expect(log.lines == ["applied", "ended 0"])
        #expect(store.kept == state.saved.encoded)
        #expect(!state.isBusy)
    }

    @Test("is not made when its bytes could not be saved")
    func failure() {
        let (state, store) = make()
        store.errors = [5]
        state.stage(.identifyingInformation, version: 1, [1]) { [log] in log.lines.append("applied") }
        state.begin { [log] in log.lines.append("ended \($0)") }
        store.complete()
        #expect(log.lines == ["ended 5"])
        #expect(state.saved == UnitState(name: 1))
        // The next change is saved without the one that failed.
        state.stage(.savedModePages, version: 1, [2]) {}
        state.begin { _ in }
        store.complete()
        #expect(state.saved.sections.map(\.kind) == [.savedModePages])
    }

    @Test("waits for the one before it")
    func waits() {
        let (state, store) = make()
        state.stage(.identifyingInformation, version: 1, [1]) {}
        state.begin { [log] _ in log.lines.append("first ended") }
        state.whenIdle { [log] in log.lines.append("idle") }
        #expect(state.isBusy)
        #expect(log.lines.isEmpty)
        store.complete()
        #expect(log.lines == ["first ended", "idle"])
    }

    @Test("errors are told apart: no space is the initiator's to solve, the rest is ours")
    func senses() {
        #expect(PersistentState.sense(28) == SenseData(.illegalRequest, .insufficientResources))
        #expect(PersistentState.sense(5) == SenseData(.hardwareError, .internalTargetFailure))
    }
}
