// TestTarget: a target with logical units on scripted backstores and initiators on mock ports, all in one thread.
//
// Called by: tests and the simulator. Must not know: the test that runs.

import CBackstore
public import SCSICore

/// A target device to test: one unit at LUN 0 and initiators "A" and "B", each on a mock transport of its own.
open class TestTarget {
    /// The shard of everything here.
    public let shard = Shard()
    /// The target.
    public let target: TargetDevice
    /// What came back, to all ports.
    public let journal = Journal()
    /// Broken rules of the seams.
    public let violations = Violations()
    /// The medium of the unit at LUN 0.
    public let backstore: ScriptedBackstore
    /// What keeps the state of the unit at LUN 0, if something does.
    public let store: ScriptedStateStore?
    /// The unit at LUN 0.
    public let unit: LogicalUnit
    /// The first initiator.
    public let a: MockPort
    /// The second initiator.
    public let b: MockPort

    private let media: Media
    private var backstores: [ScriptedBackstore] { media.all }

    /// All backstores, for the ports as well.
    private final class Media {
        var all: [ScriptedBackstore]
        init(_ first: ScriptedBackstore) { all = [first] }
    }

    /// Whether the journal tells the order between what two ports see at the same moment.
    open class var ordersPorts: Bool { true }

    /// Whether a port whose nexus is lost sees its commands come back.
    open class var givesBackAfterLoss: Bool { true }

    /// Whether the transport can say what a clause is about: a function, or a number that is none.
    open class func canSend(_ function: TaskManagementFunction?) -> Bool { true }

    /// A target with one unit; `configure` changes the medium before the unit is created, `attentive` keeps the POWER
    /// ON unit attention condition that every new nexus has, `savesState` gives the unit a state store, and `kept` is
    /// what that held when the power came; bytes that are damaged are lost. With `portGroups` B is at port 2, else both
    /// are at port 1. `transport` gives A and B a transport; without one they call the target.
    public init(
        blocks: UInt64 = 4096, blockLength: UInt32 = 512, attentive: Bool = false,
        configuration: LogicalUnitConfiguration = LogicalUnitConfiguration(
            name: 0x6001_4054_0000_0001 & 0x0fff_ffff_ffff_ffff | 0x3 << 60, serial: "SERIAL0001"),
        savesState: Bool = false, kept: [UInt8]? = nil, portGroups: [TargetPortGroup] = [],
        configure: (ScriptedBackstore) -> Void = { _ in },
        transport: (MockPort) -> (any MockTransport)? = { _ in nil }
    ) {
        target = TargetDevice(name: 0x3001_4054_0000_00ff, shard: shard, portGroups: portGroups)
        backstore = ScriptedBackstore(blocks: blocks, blockLength: blockLength, violations: violations)
        configure(backstore)
        store = savesState || kept != nil ? ScriptedStateStore(kept: kept, violations: violations) : nil
        let state = kept.flatMap { try? UnitState(parsing: $0, name: configuration.name) }
        unit = LogicalUnit(
            configuration: configuration, backstore: backstore.handle, shard: shard, state: state,
            store: store?.handle, reservationsLost: kept != nil && state == nil)
        media = Media(backstore)
        let added = target.add(unit, at: LUN(0)!)
        precondition(added)
        a = MockPort(name: "A", target: target, journal: journal, violations: violations)
        b = MockPort(name: "B", target: target, journal: journal, violations: violations)
        if !portGroups.isEmpty { b.targetPort = 2 }
        for port in [a, b] {
            unsafe port.isHeldByMedium = { [media] head in media.all.contains { unsafe $0.holds(head) } }
            port.transport = transport(port)
            port.connect()
        }
        if !attentive { for port in [a, b] { _ = run(CDB.requestSense(), dataIn: 18, on: port) } }
        journal.entries = []
    }

    /// Lets every command end.
    public func comeToRest() {
        drain()
        // What an ACA condition blocks ends when that is cleared, and may establish another one by how it ends.
        for port in [a, b, a, b] where port.isConnected {
            for entry in target.logicalUnits { port.manage(.clearACA, lun: entry.lun.field) }
            drain()
        }
    }

    deinit {
        comeToRest()
        a.checkRetiredMemory()
        b.checkRetiredMemory()
    }

    /// One more unit with its own medium.
    public func addUnit(at lun: Int, blocks: UInt64 = 4096) -> (unit: LogicalUnit, backstore: ScriptedBackstore) {
        let backstore = ScriptedBackstore(blocks: blocks, violations: violations)
        let unit = LogicalUnit(
            configuration: LogicalUnitConfiguration(name: 0x3001_4054_0000_0100 + UInt64(lun), serial: "SERIAL\(lun)"),
            backstore: backstore.handle, shard: shard)
        media.all.append(backstore)
        let added = target.add(unit, at: LUN(lun)!)
        precondition(added)
        return (unit: unit, backstore: backstore)
    }

    /// Completes what the media have until nothing is left.
    public func drain() {
        for backstore in backstores { backstore.capacity = .max }
        repeat {
            shard.retryWaiting()
            for backstore in backstores { backstore.completeAll() }
        } while store?.complete() == true || shard.hasWaiting || backstores.contains { !$0.pending.isEmpty }
    }

    /// Sends a command, lets the media complete what they have, and gives its end.
    public func run(
        _ cdb: [UInt8], lun: UInt64 = 0, attribute: TaskAttribute = .simple, dataOut: [UInt8] = [],
        outLayout: [Int]? = nil, dataIn: Int = 0, inLayout: [Int]? = nil, cdbLength: Int? = nil,
        flags: UInt8 = 0, on port: MockPort? = nil
    ) -> Completion {
        let port = port ?? a
        let tag = port.send(
            cdb, lun: lun, attribute: attribute, dataOut: dataOut, outLayout: outLayout, dataIn: dataIn,
            inLayout: inLayout, cdbLength: cdbLength, flags: flags)
        drain()
        return port.completions.last { $0.tag == tag }!
    }
}
