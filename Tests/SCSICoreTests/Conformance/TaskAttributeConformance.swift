// SAM-6 clause 8: task sets and task attributes, seen from two I_T nexuses.
//
// How to read: A and B are initiators on two transports; `pending` is what the medium has been asked for and has not
// answered. A command that is not pending is not enabled. The clause and what it demands are the name of each test.

import CoreTestSupport
import SCSICore
import Testing

@Suite("SAM-6 8: task set management", .onEachTransport)
struct TaskAttributeConformance {
    let world = TestTarget()

    /// Sends READ(10) of one block; what is pending names it by its offset.
    private func read(_ port: MockPort, _ address: UInt64, _ attribute: TaskAttribute = .simple) {
        port.send(CDB.read(.ten, address, 1), attribute: attribute, dataIn: 512)
    }

    private func write(_ port: MockPort, _ address: UInt64, _ attribute: TaskAttribute = .simple) {
        port.send(CDB.write(.ten, address, 1), attribute: attribute, dataOut: Array(repeating: 1, count: 512))
    }

    private var enabled: [UInt64] { world.backstore.pending.map { $0.offset / 512 } }

    @Test("SAM-6 8.6.2: SIMPLE commands are enabled beside each other, whichever nexus sent them")
    func simpleBesideSimple() {
        read(world.a, 1)
        read(world.b, 2)
        read(world.a, 3)
        #expect(enabled == [1, 2, 3])
    }

    @Test("SAM-6 8.6.3: an ORDERED command is not enabled before all older commands of the task set have ended")
    func orderedWaitsForOlder() {
        read(world.a, 1)
        read(world.b, 2)
        read(world.b, 3, .ordered)
        #expect(enabled == [1, 2])
        world.backstore.complete()
        #expect(enabled == [2])
        world.backstore.complete()
        #expect(enabled == [3])
    }

    @Test("SAM-6 8.6.3: a SIMPLE command is not enabled before an older ORDERED command of another nexus has ended")
    func simpleWaitsForOlderOrdered() {
        read(world.a, 1, .ordered)
        read(world.b, 2)
        #expect(enabled == [1])
        world.backstore.complete()
        #expect(enabled == [2])
    }

    @Test("SAM-6 8.6.3: ORDERED commands are carried out one after the other in the order of arrival")
    func orderedInOrder() {
        for (port, address) in [(world.a, 1), (world.b, 2), (world.a, 3)] as [(MockPort, UInt64)] {
            read(port, address, .ordered)
        }
        for address in 1...3 as ClosedRange<UInt64> {
            #expect(enabled == [address])
            world.backstore.complete()
        }
    }

    @Test("SAM-6 8.6.4: a HEAD OF QUEUE command is enabled at once, past ORDERED and SIMPLE commands that wait")
    func headOfQueueNeverWaits() {
        read(world.a, 1)
        read(world.a, 2, .ordered)
        read(world.a, 3)
        read(world.b, 4, .headOfQueue)
        #expect(enabled == [1, 4])
    }

    @Test("SAM-6 8.6.4: several HEAD OF QUEUE commands are enabled together")
    func headsOfQueueTogether() {
        read(world.a, 1, .headOfQueue)
        read(world.b, 2, .headOfQueue)
        #expect(enabled == [1, 2])
    }

    @Test("SAM-6 8.6.2: a SIMPLE command waits for a HEAD OF QUEUE command")
    func simpleWaitsForHeadOfQueue() {
        read(world.a, 1, .headOfQueue)
        read(world.b, 2)
        #expect(enabled == [1])
        world.backstore.complete()
        #expect(enabled == [2])
    }

    @Test("SAM-6 8.6.3: an ORDERED command waits for a younger HEAD OF QUEUE command that arrived while it was dormant")
    func orderedWaitsForYoungerHeadOfQueue() {
        read(world.a, 1)
        read(world.a, 2, .ordered)
        read(world.b, 3, .headOfQueue)
        world.backstore.complete()
        #expect(enabled == [3])
        world.backstore.complete()
        #expect(enabled == [2])
    }

    @Test("SAM-6 8.6.3: an aborted ORDERED command does not hold up the commands behind it")
    func abortedOrderedReleases() {
        read(world.a, 1)
        let tag = world.a.send(CDB.read(.ten, 2, 1), attribute: .ordered, dataIn: 512)
        read(world.b, 3)
        #expect(enabled == [1])
        world.a.manage(.abortTask, tag: tag)
        #expect(enabled == [1, 3])
    }

    @Test("SAM-6 8.4: a read of blocks that an older write of another nexus changes waits for it")
    func readWaitsForWrite() {
        write(world.a, 5)
        read(world.b, 5)
        read(world.b, 6)
        #expect(enabled == [5, 6])
        world.backstore.complete()
        #expect(enabled == [6, 5])
    }

    @Test("SAM-6 8.4: overlapping writes of two nexuses are carried out one after the other")
    func writeWaitsForWrite() {
        write(world.a, 5)
        write(world.b, 5)
        #expect(enabled == [5])
        world.backstore.complete()
        #expect(enabled == [5])
        #expect(world.backstore.accepted.count == 2)
    }

    @Test("SAM-6 8.4: overlapping reads are carried out beside each other")
    func readBesideRead() {
        read(world.a, 5)
        read(world.b, 5)
        #expect(enabled == [5, 5])
    }

    @Test("SAM-6 8.4: a read of no blocks, wherever it lies, is in the way of nobody")
    func readOfNothing() {
        // It waits itself, behind a command that decides what later ones of its nexus may do.
        write(world.a, 1)
        world.a.send(CDB.startStopUnit(start: true))
        world.a.send(CDB.read(.ten, 6, 0))
        world.b.send(CDB.write(.ten, 5, 3), dataOut: Array(repeating: 7, count: 3 * 512))
        #expect(enabled == [1, 5])
        world.drain()
        #expect(world.a.completions.suffix(3).map(\.summary) == ["good", "good", "good"])
    }

    @Test("SAM-6 5.3.1: one command more than the task set takes ends with TASK SET FULL and changes nothing")
    func taskSetFull() {
        let places = Limits.tasksPerLogicalUnit - Limits.tasksForIdleNexuses
        let port = MockPort(
            name: "C", target: world.target, journal: world.journal, violations: world.violations,
            tasks: places + 1, segmentsPerTask: 1)
        port.connect()
        _ = port.send(CDB.requestSense(), dataIn: 18)
        for index in 0..<places { read(port, UInt64(index % 8)) }
        let tag = port.send(CDB.write(.ten, 9, 1), dataOut: Array(repeating: 7, count: 512))
        #expect(port.completions.last?.tag == tag)
        #expect(port.completions.last?.summary == "taskSetFull")
        world.drain()
        #expect(world.backstore.block(9).allSatisfy { $0 == 0 })
        #expect(port.tagsInFlight.isEmpty)
    }
    /// A target whose unit takes eight tasks, two of them only of nexuses that have none, and six initiators.
    private func smallWorld() -> (world: TestTarget, ports: [MockPort]) {
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "SMALL")
        configuration.maximumTasks = 8
        let world = TestTarget(configuration: configuration)
        let ports = (0..<4).map { index in
            let port = MockPort(
                name: "P\(index)", target: world.target, journal: world.journal, violations: world.violations)
            port.connect()
            _ = port.send(CDB.requestSense(), dataIn: 18)
            return port
        }
        world.journal.entries = []
        return (world, [world.a, world.b] + ports)
    }

    @Test("SAM-6 5.3.1: TASK SET FULL for an initiator that has a command in the task set, BUSY for one that has none")
    func busy() {
        let (world, ports) = smallWorld()
        for index in 0..<6 { read(world.a, UInt64(index)) }
        read(world.a, 6)
        #expect(world.a.completions.last?.summary == "taskSetFull")
        // The first command of another initiator gets in, its second does not.
        read(ports[1], 7)
        read(ports[2], 8)
        #expect(world.unit.tasksInFlight == 8)
        read(ports[1], 9)
        #expect(ports[1].completions.last?.summary == "taskSetFull")
        read(ports[3], 10)
        #expect(ports[3].completions.last?.summary == "busy")
        // What was refused left nothing behind, and there is room again as commands end.
        world.drain()
        #expect(world.backstore.accepted.count == 8)
        #expect(ports.flatMap(\.completions).filter { $0.summary == "good" }.count >= 8)
        read(ports[3], 10)
        #expect(world.unit.tasksInFlight == 1)
        world.drain()
    }

    @Test("SAM-6 5.3.1: BUSY and TASK SET FULL do not report, and do not clear, a unit attention condition")
    func fullKeepsUnitAttention() {
        let (world, ports) = smallWorld()
        for index in 0..<6 { read(world.a, UInt64(index)) }
        for port in ports[1...2] { read(port, 7) }
        world.a.manage(.clearTaskSet)
        #expect(world.unit.tasksInFlight == 8)
        read(ports[1], 9)
        #expect(ports[1].completions.last?.summary == "taskSetFull")
        world.drain()
        #expect(world.run(CDB.testUnitReady, on: ports[1]).summary == "6/2f00")
    }
}
