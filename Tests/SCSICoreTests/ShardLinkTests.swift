// ShardLinkTests: commands, functions, losses and events that cross between threads, here all on one thread and pumped
// by hand: each order of arrival can be told.
//
// Two ports A and B of one target; each has links 0 and 1, as a device has whose queues two threads serve. Nothing
// reaches the target before `gate.receive`, and nothing a port before `receive` of the link.

import CBackstore
import CTarget
import CoreTestSupport
import Testing

@testable import SCSICore

@Suite("Tasks and functions between shards")
struct ShardLinkTests {
    /// A target behind a gate with two links.
    @safe
    private final class World {
        let shard = Shard()
        let target: TargetDevice
        let backstore: ScriptedBackstore
        let unit: LogicalUnit
        let gate: ShardGate
        let links: [ShardLink]
        let journal = Journal()
        let violations = Violations()
        var ports: [MockPort] = []
        var a: MockPort { ports[0] }
        var b: MockPort { ports[1] }
        /// How often the thread of the shard, and of each link, was woken.
        let wakes: UnsafeMutablePointer<Int>

        init(capacity: Int = 8) {
            target = TargetDevice(name: 0x3001, shard: shard)
            backstore = ScriptedBackstore(violations: violations)
            unit = LogicalUnit(
                configuration: LogicalUnitConfiguration(name: 0x3000_0000_0000_0001, serial: "S"),
                backstore: backstore.handle, shard: shard)
            gate = ShardGate(shard: shard)
            let wakes = UnsafeMutablePointer<Int>.allocate(capacity: 3)
            unsafe wakes.initialize(repeating: 0, count: 3)
            unsafe self.wakes = unsafe wakes
            let waker = { (index: Int) in
                unsafe ShardWaker(
                    { context in unsafe context.assumingMemoryBound(to: Int.self).pointee += 1 },
                    context: UnsafeMutableRawPointer(wakes + index))
            }
            links = (0..<2).map { [gate] in
                gate.addLink(capacity: capacity, wakeOwner: waker(0), wakePort: waker(1 + $0))
            }
            let added = target.add(unit, at: LUN(0)!)
            precondition(added)
            for name in ["A", "B"] {
                let port = MockPort(name: name, target: target, journal: journal, violations: violations)
                unsafe port.isHeldByMedium = { [backstore] head in unsafe backstore.holds(head) }
                port.connect(through: links, of: gate)
                ports.append(port)
                port.send(CDB.requestSense(), dataIn: 18)
                pump()
            }
            journal.entries = []
        }

        deinit {
            for port in ports { port.disconnect() }
            drain()
            unsafe wakes.deallocate()
        }

        func pump() {
            var worked = true
            while worked {
                worked = gate.receive()
                gate.flush()
                for link in links {
                    if link.receive() { worked = true }
                    link.flush()
                }
            }
        }

        func drain() {
            repeat {
                pump()
                shard.retryWaiting()
                backstore.completeAll()
                pump()
            } while shard.hasWaiting || !backstore.pending.isEmpty
        }
    }

    private let world = World()

    @discardableResult
    private func read(_ port: MockPort, _ address: UInt64, link: Int = 0, _ attribute: TaskAttribute = .simple)
        -> UInt64
    {
        port.send(CDB.read(.ten, address, 1), attribute: attribute, dataIn: 512, link: link)
    }

    // MARK: Tasks

    @Test("a task reaches the medium when the shard's thread takes it, and its port when the port's thread does")
    func crossesBothWays() {
        world.backstore.setBlock(5, Array(repeating: 9, count: 512))
        let tag = read(world.a, 5)
        #expect(world.backstore.accepted.isEmpty)
        #expect(world.gate.receive())
        #expect(world.backstore.accepted.count == 1)
        world.backstore.complete()
        #expect(world.journal.lines == [])
        #expect(world.links[0].receive())
        #expect(world.journal.lines == ["A \(tag) good"])
        #expect(world.a.completions.last?.data == Array(repeating: 9, count: 512))
        #expect(!world.gate.receive())
        #expect(!world.links[0].receive())
    }

    @Test("tasks of one link keep their order")
    func keepsOrder() {
        for address in 0..<8 as Range<UInt64> { read(world.a, address) }
        world.gate.receive()
        #expect(world.backstore.accepted.map(\.offset) == (0..<8).map { $0 * 512 })
    }

    @Test("a full link takes no more, and takes again when a task has come back: nothing is lost, nobody waits")
    func full() {
        let world = World(capacity: 2)
        let pool = TaskPool(capacity: 1, segmentsPerTask: 1)
        unsafe pool[0].command = scsi_command()
        let tags = [read(world.a, 1), read(world.b, 2)]
        #expect(!world.links[0].hasRoom)
        let refused = world.links[0].send(pool[0], nexus: world.a.linkedNexus!)
        #expect(!refused)
        #expect(pool[0].isFree)
        // What the shard has taken out of the ring is still under way.
        world.gate.receive()
        #expect(!world.links[0].hasRoom)
        world.backstore.complete()
        #expect(!world.links[0].hasRoom)
        world.links[0].receive()
        #expect(world.links[0].hasRoom)
        let third = read(world.a, 3)
        world.drain()
        #expect(world.journal.lines == ["A \(tags[0]) good", "B \(tags[1]) good", "A \(third) good"])
    }

    @Test("a port that sends from inside a completion goes on however full its link is")
    func sendsFromInside() {
        let world = World(capacity: 1)
        var left = 1000
        world.a.whenCompleted = { _ in
            left -= 1
            if left > 0 { world.a.send(CDB.testUnitReady) }
        }
        world.a.send(CDB.testUnitReady)
        world.pump()
        #expect(left == 0)
        world.a.whenCompleted = nil
    }

    @Test("a thread takes so many requests of a link at a time")
    func budget() {
        for address in 0..<5 as Range<UInt64> { read(world.a, address) }
        world.gate.receive(budget: 2)
        #expect(world.backstore.accepted.count == 2)
        world.gate.receive(budget: 2)
        #expect(world.backstore.accepted.count == 4)
    }

    @Test("sense data is in the format that the unit had when the command ended")
    func senseFormat() {
        world.b.send(CDB.modeSense6(0x0a), dataIn: 255)
        world.pump()
        var list: [UInt8] = [0, 0, 0, 0] + world.b.completions.last!.data[4...]
        list[4 + 2] |= 0x04
        let fixed = world.a.send([0xff, 0, 0, 0, 0, 0])
        world.b.send(CDB.modeSelect6(listLength: list.count), dataOut: list)
        _ = world.a.send(CDB.requestSense(), dataIn: 252)
        let descriptor = world.a.send([0xff, 0, 0, 0, 0, 0])
        world.gate.receive()
        #expect(world.unit.modePages.descriptorSense)
        world.links[0].receive()
        #expect(world.a.completions.first { $0.tag == fixed }?.senseBytes.first == 0x70)
        #expect(world.a.completions.first { $0.tag == descriptor }?.senseBytes.first == 0x72)
    }

    // MARK: Functions

    @Test("a function sees every task that was handed over before it, through whatever link")
    func functionSeesEarlierTasks() {
        let tags = [read(world.a, 1, link: 1), read(world.a, 2, link: 0)]
        world.a.manage(.abortTaskSet, cookie: 7, link: 0)
        let later = read(world.a, 3, link: 0)
        world.pump()
        #expect(world.journal.lines == [])
        world.drain()
        #expect(
            Set(world.journal.lines) == [
                "A \(tags[0]) aborted", "A \(tags[1]) aborted", "A function 7 functionComplete", "A \(later) good",
            ])
        let end = world.journal.lines.firstIndex(of: "A function 7 functionComplete")!
        #expect(world.journal.lines[..<end].filter { $0.hasSuffix("aborted") }.count == 2)
    }

    @Test("a function sees them beyond what the shard's thread takes of a link at a time")
    func functionSeesBeyondBudget() {
        let world = World(capacity: 64)
        for address in 0..<20 as Range<UInt64> { read(world.a, address, link: 1) }
        world.a.manage(.abortTaskSet, cookie: 7, link: 0)
        world.gate.receive(budget: 1)
        #expect(world.backstore.cancellations == 20)
        world.drain()
        #expect(world.a.completions.suffix(20).allSatisfy { $0.summary == "aborted" })
    }

    @Test("a function is not answered before the tasks that it ended have reached their port on another thread")
    func answerWaitsForDelivery() {
        let tag = read(world.a, 1, link: 1)
        world.a.manage(.abortTask, tag: tag, cookie: 7, link: 0)
        world.gate.receive()
        world.backstore.complete()
        world.gate.receive()
        world.gate.flush()
        world.links[0].receive()
        #expect(world.journal.lines == [])
        world.links[1].receive()
        #expect(world.journal.lines == ["A \(tag) aborted"])
        world.gate.receive()
        world.links[0].receive()
        #expect(world.journal.lines == ["A \(tag) aborted", "A function 7 functionComplete"])
    }

    @Test("the thread that delivers what a function waits for wakes the shard's thread")
    func deliveryWakes() {
        let tag = read(world.a, 1, link: 1)
        world.a.manage(.abortTask, tag: tag, cookie: 7, link: 0)
        world.gate.receive()
        world.backstore.complete()
        #expect(!world.gate.prepareToSleep())
        let before = unsafe world.wakes[0]
        world.links[1].receive()
        world.links[1].flush()
        #expect(unsafe world.wakes[0] == before + 1)
        world.pump()
        #expect(world.journal.lines.last == "A function 7 functionComplete")
    }

    @Test(
        "functions that two links hold at once are carried out in the order in which they were sent", arguments: 0..<2)
    func crossingFunctions(first: Int) {
        let second = 1 - first
        let tag = read(world.a, 1, link: first)
        world.a.manage(.queryTask, tag: tag, cookie: 1, link: second)
        world.a.manage(.abortTask, tag: tag, cookie: 2, link: first)
        read(world.b, 3, link: second)
        world.a.manage(.queryTask, tag: tag, cookie: 3, link: second)
        read(world.b, 4, link: first)
        world.drain()
        #expect(world.a.answers.first { $0.cookie == 1 }?.response == .functionSucceeded)
        #expect(world.a.answers.first { $0.cookie == 2 }?.response == .functionComplete)
        #expect(world.a.answers.first { $0.cookie == 3 }?.response == .functionComplete)
        #expect(world.b.completions.suffix(2).allSatisfy { $0.summary == "good" })
    }

    @Test("a link has so many functions under way, and each slot serves again")
    func functionSlots() {
        for round in 0..<3 as Range<UInt64> {
            for index in 0..<UInt64(Limits.functionsPerLink) {
                world.a.manage(.queryTaskSet, cookie: round << 32 | index)
            }
            var request = scsi_task_management_request()
            request.function = TaskManagementFunction.queryTaskSet.rawValue
            let taken = world.links[0].send(request, nexus: world.a.linkedNexus!)
            #expect(!taken)
            world.pump()
            let cookies = (0..<UInt64(Limits.functionsPerLink)).map { round << 32 | $0 }
            #expect(world.a.answers.suffix(Limits.functionsPerLink).map(\.cookie) == cookies)
        }
    }

    // MARK: Nexus loss

    @Test("a lost nexus's tasks come back on their links, its functions are not answered, and then it is gone")
    func loss() {
        let tags = [read(world.a, 1, link: 0), read(world.a, 2, link: 1)]
        world.a.manage(.abortTask, tag: tags[0], cookie: 7)
        world.pump()
        world.a.disconnect()
        world.pump()
        #expect(!world.a.isGone)
        world.drain()
        #expect(world.a.isGone)
        #expect(world.a.answers.isEmpty)
        #expect(Set(world.journal.lines) == Set(tags.map { "A \($0) aborted" }))
        #expect(world.target.nexusCount == 1)
    }

    @Test("tasks that were handed over before the loss, through whatever link, come back; later ones come back aborted")
    func lossSeesEarlierTasks() {
        let nexus = world.a.linkedNexus!
        let early = read(world.a, 1, link: 1)
        world.a.disconnect()
        let pool = TaskPool(capacity: 65, segmentsPerTask: 1)
        let late = pool[64]
        unsafe late.command = scsi_command()
        let taken = world.links[1].send(late, nexus: nexus)
        #expect(taken)
        world.gate.receive()
        #expect(world.backstore.cancellations == 1)
        #expect(world.backstore.accepted.count == 1)
        // The port does not know the late task; only the link may.
        world.backstore.complete()
        #expect(world.links[1].tasksInFlight == 2)
        world.a.ignoresUnknownTasks = true
        world.drain()
        #expect(world.links[1].tasksInFlight == 0)
        #expect(late.isFree)
        #expect(world.journal.lines == ["A \(early) aborted"])
    }

    @Test("the same initiator comes back and finds what happened meanwhile")
    func returns() {
        world.a.disconnect()
        world.drain()
        #expect(world.a.isGone)
        world.a.connect(through: world.links, of: world.gate)
        world.a.send(CDB.testUnitReady)
        world.pump()
        #expect(world.a.completions.last?.summary == "6/2907")
    }

    @Test("function slots of a lost nexus serve again")
    func lossFreesSlots() {
        for _ in 0..<3 {
            world.a.send(CDB.requestSense(), dataIn: 18)
            let tag = read(world.a, 1)
            for _ in 0..<Limits.functionsPerLink { world.a.manage(.abortTask, tag: tag) }
            world.pump()
            world.a.disconnect()
            world.drain()
            world.a.connect(through: world.links, of: world.gate)
        }
        #expect(world.a.answers.isEmpty)
    }

    // MARK: Events

    @Test("events arrive on the thread of the link that was named for them")
    func events() {
        world.backstore.geometry.size /= 2
        world.unit.backstoreGeometryChanged()
        #expect(world.journal.lines == [])
        world.links[1].receive()
        #expect(world.journal.lines == [])
        world.links[0].receive()
        #expect(world.journal.lines == ["A event 3 2a09 0", "B event 3 2a09 0"])
    }

    @Test("events that a sleeping port does not take are kept once each; past the bound it hears that some were missed")
    func manyEvents() {
        for round in 0..<200 as Range<UInt64> {
            world.backstore.geometry.size = (1000 + round) * 512
            world.unit.backstoreGeometryChanged()
        }
        world.pump()
        #expect(world.journal.lines.count <= Limits.noticesPerLink + 2)
        #expect(world.journal.lines.suffix(2) == ["A event 3 2a09 0", "B event 3 2a09 0"])
        world.journal.entries = []
        for lun in 1..<120 {
            let unit = LogicalUnit(
                configuration: LogicalUnitConfiguration(name: 0x3000_0000_0000_0001, serial: "S"),
                backstore: world.backstore.handle, shard: world.shard)
            let added = world.target.add(unit, at: LUN(lun)!)
            #expect(added)
        }
        world.pump()
        #expect(world.journal.lines.contains("A event 4 0 0"))
        #expect(world.journal.lines.contains("B event 4 0 0"))
        #expect(world.journal.lines.count <= 3 * Limits.noticesPerLink)
        for lun in 1..<120 { world.target.remove(at: LUN(lun)!) {} }
    }

    // MARK: Waking

    @Test("a shard that sleeps with events for which there was no room is woken when there is some")
    func wakesForRoom() {
        for lun in 1..<120 {
            let unit = LogicalUnit(
                configuration: LogicalUnitConfiguration(name: 0x3000_0000_0000_0001, serial: "S"),
                backstore: world.backstore.handle, shard: world.shard)
            let added = world.target.add(unit, at: LUN(lun)!)
            #expect(added)
        }
        world.gate.flush()
        #expect(!world.gate.prepareToSleep(), "there is nothing that it could do")
        let before = unsafe world.wakes[0]
        world.links[0].receive()
        #expect(!world.journal.lines.contains("B event 4 0 0"))
        world.links[0].flush()
        #expect(unsafe world.wakes[0] == before + 1)
        world.pump()
        #expect(world.journal.lines.contains("B event 4 0 0"))
        for lun in 1..<120 { world.target.remove(at: LUN(lun)!) {} }
    }

    @Test("a thread that sleeps is woken once, one that does not is not")
    func wakes() {
        #expect(!world.gate.prepareToSleep())
        #expect(!world.links[0].prepareToSleep())
        let before = unsafe (world.wakes[0], world.wakes[1])
        read(world.a, 1)
        read(world.a, 2)
        #expect(unsafe world.wakes[0] == before.0)
        world.links[0].flush()
        world.links[0].flush()
        read(world.a, 3)
        world.links[0].flush()
        #expect(unsafe world.wakes[0] == before.0 + 1)
        world.gate.receive()
        world.backstore.completeAll()
        world.gate.flush()
        world.gate.flush()
        #expect(unsafe world.wakes[1] == before.1 + 1)
        world.links[0].receive()
        read(world.a, 4)
        world.links[0].flush()
        #expect(unsafe world.wakes[0] == before.0 + 1)
    }

    @Test("a thread does not go to sleep over work")
    func doesNotSleepOverWork() {
        read(world.a, 1, link: 1)
        #expect(world.gate.prepareToSleep())
        world.gate.receive()
        #expect(!world.gate.prepareToSleep())
        world.backstore.complete()
        #expect(world.links[1].prepareToSleep())
        #expect(!world.links[0].prepareToSleep())
    }
}
