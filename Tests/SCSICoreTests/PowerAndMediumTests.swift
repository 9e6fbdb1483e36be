// Power conditions; media that are ejected, loaded, taken away and put in; prevention of removal.

import CBackstore
import CoreTestSupport
@testable import SCSICore
import Testing

extension TestTarget {
    /// REQUEST SENSE, decoded.
    func pollSense(on port: MockPort? = nil) -> String? {
        Sense(run(CDB.requestSense(), dataIn: 18, on: port).data)?.description
    }

    /// START STOP UNIT by fields.
    func startStop(condition: UInt8 = 0, modifier: UInt8 = 0, flags: UInt8 = 0, on port: MockPort? = nil) -> String {
        run([0x1b, 0, 0, modifier, condition << 4 | flags, 0], on: port).summary
    }

    func prevent(_ prevents: Bool, on port: MockPort? = nil) -> String {
        run([0x1e, 0, 0, 0, prevents ? 1 : 0, 0], on: port).summary
    }
}

@Suite("Power conditions")
struct PowerConditionTests {
    let world: TestTarget

    init() { world = TestTarget() }

    private init(world: TestTarget) { self.world = world }

    /// POWER CONDITION, its modifier, and how REQUEST SENSE tells of it (SPC-6 table of 5Eh).
    private static let commands: [(UInt8, UInt8, String)] = [
        (2, 0, "0/5e03"), (2, 1, "0/5e06"), (2, 2, "0/5e08"), (3, 0, "0/5e04"), (3, 1, "0/5e0a"),
    ]
    /// The timers of the Power Condition page: byte and bit that enable it, where it is, and what follows from it.
    private static let timers: [(Int, UInt8, Int, String, UInt8, UInt8)] = [
        (1, 0x02, 2, "0/5e01", 0xa, 0), (1, 0x04, 10, "0/5e05", 0xa, 1), (1, 0x08, 14, "0/5e07", 0xa, 2),
        (0, 0x01, 18, "0/5e09", 0xb, 1), (1, 0x01, 6, "0/5e02", 0xb, 0),
    ]

    /// Enables timers, each with a value in units of 100 ms.
    private func enable(_ timers: [(byte: Int, bit: UInt8, timer: Int, value: UInt32)]) {
        let page = world.modePage(0x1a)
        var values = page.values
        for entry in timers {
            values[entry.byte] |= entry.bit
            values.replaceSubrange(entry.timer..<entry.timer + 4, with: CDB.bytes(UInt64(entry.value), 4))
        }
        #expect(world.select(page, values).summary == "good")
        _ = world.run(CDB.requestSense(), dataIn: 18, on: world.b)
    }

    @Test("A commanded condition lasts over commands that need no medium, and ends with one that does")
    func commanded() {
        for (condition, modifier, sense) in Self.commands {
            #expect(world.startStop(condition: condition, modifier: modifier) == "good")
            for port in [world.a, world.b] { #expect(world.pollSense(on: port) == sense) }
            #expect(world.run(CDB.testUnitReady).summary == "good")
            #expect(world.run(CDB.modeSense6(0x3f), dataIn: 255).summary == "good")
            #expect(world.pollSense() == sense)
            #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: world.b).summary == "good")
            #expect(world.pollSense() == "0/0000")
        }
    }

    @Test("STANDBY makes stable what is cached, unless NO_FLUSH says no; IDLE and ACTIVE need not")
    func flush() {
        for (condition, flags, flushes) in [(3, 0, 1), (3, 4, 0), (2, 0, 0), (1, 0, 0)] as [(UInt8, UInt8, Int)] {
            let before = world.backstore.accepted.count
            #expect(world.startStop(condition: condition, flags: flags) == "good")
            #expect(world.backstore.accepted.count == before + flushes)
            let expected = ["0/0000", "0/5e03", "0/5e04"][Int(condition) - 1]
            #expect(world.pollSense() == expected)
        }
    }

    @Test("Each timer brings its condition about when its time has passed since the medium was used, not before")
    func timers() {
        for (byte, bit, timer, sense, _, _) in Self.timers {
            let world = TestTarget()
            let tests = PowerConditionTests(world: world)
            tests.enable([(byte, bit, timer, 20)])
            _ = world.run(CDB.read(.ten, 0, 1), dataIn: 512)
            let used = world.shard.now
            world.shard.now = used + 1_999_999_990
            #expect(world.pollSense() == "0/0000")
            world.shard.now = used + 2_000_000_000
            for _ in 0..<2 { #expect(world.pollSense() == sense, "asking does not end it") }
            _ = world.run(CDB.read(.ten, 0, 1), dataIn: 512)
            #expect(world.pollSense() == "0/0000")
        }
    }

    @Test("Of several timers that have passed the deepest condition counts; a request in flight keeps the unit active")
    func deepest() {
        enable([(1, 0x02, 2, 10), (1, 0x01, 6, 30), (0, 0x01, 18, 20)])
        _ = world.run(CDB.read(.ten, 0, 1), dataIn: 512)
        let used = world.shard.now
        for (time, sense) in [(1, "0/5e01"), (2, "0/5e09"), (3, "0/5e02")] as [(UInt64, String)] {
            world.shard.now = used + time * 1_000_000_000
            #expect(world.pollSense() == sense)
        }
        world.b.send(CDB.read(.ten, 0, 1), dataIn: 512)
        world.shard.now += 60_000_000_000
        world.a.send(CDB.requestSense(), dataIn: 18)
        #expect(Sense(world.a.completions.last!.data)?.description == "0/0000")
    }

    @Test("FORCE ends a timer that is enabled, refuses one that is not; LU_CONTROL and a reset give control back")
    func control() {
        for (byte, bit, timer, sense, condition, modifier) in Self.timers {
            let world = TestTarget()
            #expect(world.startStop(condition: condition, modifier: modifier) == "5/2400 CDB 4.7")
            PowerConditionTests(world: world).enable([(byte, bit, timer, 50)])
            #expect(world.startStop(condition: condition, modifier: modifier) == "good")
            #expect(world.pollSense() == sense)
            #expect(world.startStop(condition: 1) == "good")
            world.shard.now += 60_000_000_000
            #expect(world.pollSense() == "0/0000", "ACTIVE disables the timers")
            #expect(world.startStop(condition: 7) == "good")
            #expect(world.pollSense() == "0/0000", "the timers begin")
            world.shard.now += 60_000_000_000
            #expect(world.pollSense() == sense)
            #expect(world.startStop(condition: 2) == "good")
            world.a.manage(.logicalUnitReset)
            #expect(world.pollSense() == "6/2903")
            #expect(world.pollSense() == "0/0000")
        }
    }

    @Test("A stopped unit is started by START, ACTIVE, IDLE and STANDBY, and each of it is a cycle in the log")
    func stopped() {
        for (count, condition) in [0, 1, 2, 3].enumerated() {
            #expect(world.startStop() == "good")
            #expect(world.run(CDB.testUnitReady).summary == "2/0402")
            #expect(world.startStop() == "good", "stopped already")
            #expect(world.startStop(condition: UInt8(condition), flags: condition == 0 ? 1 : 0) == "good")
            #expect(world.run(CDB.testUnitReady).summary == "good")
            #expect(world.log(0x0e).number(4) == UInt64(count + 1))
        }
        #expect(world.log(0x0e).number(6) == 0)
    }

    @Test("POWER CONDITIONs and modifiers without a meaning are refused at their field, and change nothing")
    func invalid() {
        let modifiers: [UInt8: Int] = [0: 1, 1: 1, 2: 3, 3: 2, 7: 1, 0xa: 3, 0xb: 2]
        for condition in 0..<16 as Range<UInt8> {
            for modifier in 0..<4 as Range<UInt8> {
                let end = world.startStop(condition: condition, modifier: modifier, flags: 1)
                guard let count = modifiers[condition] else {
                    #expect(end == "5/2400 CDB 4.7")
                    continue
                }
                if modifier >= count { #expect(end == "5/2400 CDB 3.3", "\(condition) \(modifier)") }
            }
        }
    }

    @Test("VPD page 8Ah names the conditions that there are (SPC-4 7.8.10)")
    func vitalProductData() {
        let data = world.run(CDB.inquiry(page: 0x8a), dataIn: 64).data
        #expect(data == [0, 0x8a, 0, 14, 0x03, 0x07] + [UInt8](repeating: 0, count: 12))
    }
}

@Suite("Removable media")
struct RemovableMediumTests {
    let world: TestTarget

    init() {
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "S")
        configuration.removable = true
        world = TestTarget(configuration: configuration)
    }

    private let eject: UInt8 = 2
    private let load: UInt8 = 3

    @Test("RMB is one; a unit that is not removable has neither LOEJ nor PREVENT ALLOW MEDIUM REMOVAL")
    func removableBit() {
        let fixed = TestTarget()
        #expect(world.run(CDB.inquiry(), dataIn: 96).data[1] == 0x80)
        #expect(fixed.run(CDB.inquiry(), dataIn: 96).data[1] == 0x00)
        #expect(fixed.startStop(flags: eject) == "5/2400 CDB 4.1")
        #expect(fixed.prevent(true) == "5/2000 CDB 0")
        #expect(throws: MediumRemovalRefusal.notRemovable) { try fixed.unit.removeMedium {} }
    }

    @Test(
        "Ejected: flushed, NOT READY MEDIUM NOT PRESENT TRAY OPEN; loaded again: NOT READY TO READY CHANGE, same data")
    func ejectAndLoad() {
        let block = [UInt8](repeating: 3, count: 512)
        _ = world.run(CDB.write(.ten, 0, 1), dataOut: block)
        var moves: [MediumState] = []
        world.unit.whenMediumMoved = { moves.append($0) }
        #expect(world.startStop(flags: eject) == "good")
        #expect(world.backstore.accepted.last?.operation == .flush)
        #expect(world.unit.mediumState == .ejected)
        for port in [world.a, world.b] {
            #expect(world.run(CDB.testUnitReady, on: port).summary == "2/3a02")
            #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512, on: port).summary == "2/3a02")
            #expect(world.pollSense(on: port) == "2/3a02")
            #expect(world.run(CDB.inquiry(), dataIn: 96, on: port).summary == "good")
        }
        #expect(world.run(CDB.modeSense6(0x3f, noDescriptors: false), dataIn: 255).data[4..<8] == [0, 0, 0, 0])
        #expect(world.startStop(flags: eject) == "good", "ejected already")
        #expect(world.startStop(flags: load) == "good")
        for port in [world.a, world.b] { #expect(world.run(CDB.testUnitReady, on: port).summary == "6/2800") }
        #expect(world.run(CDB.read(.ten, 0, 1), dataIn: 512).data == block)
        #expect(moves == [.ejected, .loaded])
        #expect(world.log(0x0e).number(6) == 1)
    }

    @Test("A flush that fails leaves the medium in the unit")
    func flushFails() {
        world.a.send([0x1b, 0, 0, 0, eject, 0])
        world.backstore.complete(error: 5)
        #expect(world.a.completions.last?.summary == "3/0c00")
        #expect(world.unit.mediumState == .loaded)
    }

    @Test("PREVENT is for each nexus: MEDIUM REMOVAL PREVENTED while one prevents, whoever ejects")
    func prevention() {
        #expect(world.prevent(true, on: world.b) == "good")
        #expect(world.prevent(true) == "good")
        #expect(world.startStop(flags: eject) == "5/5302")
        #expect(world.prevent(false) == "good")
        #expect(world.startStop(flags: eject) == "5/5302")
        #expect(world.run(CDB.testUnitReady).summary == "good")
        #expect(world.startStop(on: world.a) == "good", "stopping is not removing")
        #expect(world.startStop(flags: 1) == "good")
        #expect(world.prevent(false, on: world.b) == "good")
        #expect(world.startStop(flags: eject) == "good")
    }

    @Test("A prevention that comes while an eject flushes counts")
    func preventionDuringFlush() {
        world.a.send([0x1b, 0, 0, 0, eject, 0])
        world.b.send([0x1e, 0, 0, 0, 1, 0])
        #expect(world.b.completions.last?.summary == "good")
        world.drain()
        #expect(world.a.completions.last?.summary == "5/5302")
        #expect(world.unit.mediumState == .loaded)
    }

    @Test("Nexus loss, I_T NEXUS RESET, LOGICAL UNIT RESET and TARGET RESET end a prevention")
    func preventionEnds() {
        for index in 0..<4 {
            #expect(world.prevent(true, on: world.b) == "good")
            #expect(world.unit.isRemovalPrevented)
            switch index {
            case 0:
                world.b.disconnect()
                world.b.connect()
            case 1: world.b.manage(.nexusReset)
            case 2: world.a.manage(.logicalUnitReset)
            default: world.a.manage(.targetReset)
            }
            #expect(!world.unit.isRemovalPrevented)
            for port in [world.a, world.b, world.b] { _ = world.run(CDB.requestSense(), dataIn: 18, on: port) }
        }
        #expect(world.prevent(true, on: world.b) == "good")
        world.a.manage(.nexusReset)
        #expect(world.unit.isRemovalPrevented, "a reset of another nexus")
    }

    @Test("ALLOW makes what is cached stable before the prevention ends, and keeps it if that fails")
    func allowFlushes() {
        #expect(world.prevent(true) == "good")
        let before = world.backstore.accepted.count
        world.a.send([0x1e, 0, 0, 0, 0, 0])
        #expect(world.backstore.accepted.count == before + 1)
        #expect(world.unit.isRemovalPrevented)
        world.backstore.complete(error: 5)
        #expect(world.a.completions.last?.summary == "3/0c00")
        #expect(world.unit.isRemovalPrevented)
        #expect(world.prevent(false) == "good")
        #expect(!world.unit.isRemovalPrevented)
        #expect(world.backstore.accepted.count == before + 2)
        #expect(world.prevent(false) == "good")
        #expect(world.backstore.accepted.count == before + 2, "nothing was prevented")
    }

    /// The service, its SERVICE ACTION RESERVATION KEY, and whose prevention is left of A's, B's and C's.
    static let preemptions: [(CoreTestSupport.CDB.ReservationService, UInt64, String)] = [
        (.preempt, 0xb, "ABC"), (.preemptAndAbort, 0xb, "AC"), (.preemptAndAbort, 0xa, "BC"), (.clear, 0, "C"),
    ]

    @Test(
        "PREEMPT AND ABORT and CLEAR allow what the nexuses that they unregister have prevented (SBC-4 5.15)",
        arguments: preemptions)
    func preventionPreempted(service: CoreTestSupport.CDB.ReservationService, key: UInt64, left: String) {
        let c = world.addPort("C")
        world.reserveOut(.register, 0, 0xa)
        world.reserveOut(.register, 0, 0xb, on: world.b)
        for port in [world.a, world.b, c] { #expect(world.prevent(true, on: port) == "good") }
        #expect(world.reserveOut(service, 0xa, key) == "good")
        let ports: [(String, MockPort)] = [("A", world.a), ("B", world.b), ("C", c)]
        for (name, port) in ports { #expect(prevention(of: port) == left.contains(name), "\(name)") }
    }

    /// Whether the nexus of a port prevents the removal.
    private func prevention(of port: MockPort) -> Bool {
        let nexuses = (0..<UInt16(Limits.nexusesPerTarget)).filter {
            world.target.nexusName($0).flatMap(world.target.initiatorPortName) == port.name
        }
        #expect(nexuses.count == 1)
        return nexuses.contains(where: world.unit.prevents)
    }

    @Test("An operator who clears reservations allows what their nexuses have prevented")
    func preventionCleared() {
        world.reserveOut(.register, 0, 0xb, on: world.b)
        #expect(world.prevent(true, on: world.b) == "good")
        var ends: [ReservationTransferError?] = []
        world.unit.clearReservations { ends.append($0) }
        #expect(ends == [nil])
        #expect(!world.unit.isRemovalPrevented)
    }

    @Test("The control plane's removal is refused while prevented, tells those who do, and can be forced")
    func removalPrevented() throws {
        #expect(world.prevent(true, on: world.b) == "good")
        #expect(throws: MediumRemovalRefusal.prevented) { try world.unit.removeMedium {} }
        #expect(world.unit.mediumState == .loaded)
        #expect(world.run(CDB.testUnitReady, on: world.b).summary == "6/5a01")
        #expect(world.run(CDB.testUnitReady).summary == "good")
        var removed = false
        try world.unit.removeMedium(force: true) { removed = true }
        #expect(removed)
        #expect(world.run(CDB.testUnitReady).summary == "2/3a00")
        #expect(throws: MediumRemovalRefusal.absent) { try world.unit.removeMedium {} }
        #expect(world.startStop(flags: load) == "2/3a00")
        #expect(world.startStop(flags: eject) == "good")
        #expect(world.unit.mediumState == .absent)
    }

    @Test("Removal: what the medium has ends, what waits for it is MEDIUM NOT PRESENT, then the unit lets go of it")
    func removalDrains() throws {
        world.backstore.capacity = 1
        let transferring = world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        let full = world.a.send(CDB.read(.ten, 1, 1), dataIn: 512)
        let ordered = world.a.send(CDB.read(.ten, 2, 1), attribute: .ordered, dataIn: 512)
        var removed = false
        try world.unit.removeMedium { removed = true }
        #expect(!removed)
        #expect(world.a.completions.last?.tag == full)
        #expect(world.a.completions.last?.summary == "2/3a00")
        world.backstore.complete()
        #expect(removed)
        #expect(world.a.completions.suffix(2).map(\.tag) == [transferring, ordered])
        #expect(world.a.completions.suffix(2).map(\.summary) == ["good", "2/3a00"])
    }

    @Test("A command of several steps ends at its next step; one that is frozen or tried again ends at once")
    func removalBetweenSteps() throws {
        let block = [UInt8](repeating: 5, count: 512)
        world.a.send([0x2e, 0x02, 0, 0, 0, 0, 0, 0, 1, 0], dataOut: block)
        var removed = false
        try world.unit.removeMedium { removed = true }
        world.backstore.complete()
        #expect(removed)
        #expect(world.a.completions.last?.summary == "2/3a00")
        world.unit.insertMedium(world.backstore.handle)
        _ = world.run(CDB.requestSense(), dataIn: 18)
        world.unit.freeze()
        world.a.send(CDB.read(.ten, 0, 1), dataIn: 512)
        try world.unit.removeMedium {}
        #expect(world.a.completions.last?.summary == "2/3a00")
        world.unit.insertMedium(world.backstore.handle)
        world.unit.thaw()
        #expect(world.backstore.pending.isEmpty)
    }

    @Test("Another medium: NOT READY TO READY CHANGE, its own size, block length and features, the unit's mode pages")
    func anotherMedium() throws {
        world.change(0x0a, byte: 0, set: 0x04)
        try world.unit.removeMedium {}
        #expect(world.run(CDB.readCapacity10, dataIn: 8).summary == "2/3a00")
        let other = ScriptedBackstore(blocks: 100, blockLength: 4096, violations: world.violations)
        other.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_CAN_DISCARD | SCSI_BACKSTORE_VOLATILE_CACHE)
        world.unit.insertMedium(other.handle)
        for port in [world.a, world.b] { #expect(world.run(CDB.testUnitReady, on: port).summary == "6/2800") }
        #expect(world.run(CDB.readCapacity10, dataIn: 8).data == CDB.bytes(99, 4) + CDB.bytes(4096, 4))
        #expect(world.run(CDB.unmap(listLength: 0)).summary == "5/2000 CDB 0")
        #expect(world.modePage(0x08, control: 1).values[0] == 0)
        #expect(world.modePage(0x0a).values[0] == 0x04)
        let block = [UInt8](repeating: 8, count: 4096)
        let tag = world.a.send(CDB.write(.ten, 99, 1), dataOut: block)
        other.completeAll()
        #expect(world.a.completions.last?.tag == tag)
        #expect(other.block(99) == block)
        try world.unit.removeMedium {}
        world.unit.insertMedium(world.backstore.handle)
    }

    @Test("A stopped unit whose medium is changed is started")
    func stopped() throws {
        #expect(world.startStop() == "good")
        try world.unit.removeMedium {}
        #expect(world.run(CDB.testUnitReady).summary == "2/3a00")
        world.unit.insertMedium(world.backstore.handle)
        #expect(world.run(CDB.testUnitReady).summary == "6/2800")
        #expect(world.run(CDB.testUnitReady).summary == "good")
    }
}
