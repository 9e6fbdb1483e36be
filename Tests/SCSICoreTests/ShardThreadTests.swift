// ShardThreadTests: real threads: shards on threads of their own, ports on others, everything that crosses between them
// at once. Run under ThreadSanitizer by `Scripts/test sanitize`.
//
// Each port has blocks of its own, and reads back what it wrote last; commands, functions and losses come at random.
// What a function ended has come back before the function is answered, and everything comes back in the end.

import CBackstore
import CTarget
import CoreTestSupport
import Glibc
import Synchronization
import Testing

@testable import SCSICore

/// A pipe that a thread sleeps on.
private final class Alarm: Sendable {
    private let ends: (read: Int32, write: Int32)

    init() {
        var descriptors: [Int32] = [0, 0]
        let made = unsafe pipe(&descriptors)
        precondition(made == 0)
        ends = (descriptors[0], descriptors[1])
    }

    deinit {
        close(ends.read)
        close(ends.write)
    }

    func ring() {
        var byte: UInt8 = 1
        let written = unsafe write(ends.write, &byte, 1)
        precondition(written == 1)
    }

    func sleep() {
        var byte: UInt8 = 0
        let count = unsafe read(ends.read, &byte, 1)
        precondition(count == 1)
    }

    var waker: ShardWaker {
        unsafe ShardWaker(
            { unsafe Unmanaged<Alarm>.fromOpaque($0).takeUnretainedValue().ring() },
            context: Unmanaged.passUnretained(self).toOpaque())
    }
}

/// A thread that runs a function.
private final class Thread: @unchecked Sendable {
    private let body: @Sendable () -> Void
    private var handle = pthread_t()

    init(_ body: @escaping @Sendable () -> Void) {
        self.body = body
        let error = unsafe pthread_create(
            &handle, nil,
            { context in
                unsafe Unmanaged<Thread>.fromOpaque(context!).takeRetainedValue().body()
                return nil
            }, Unmanaged.passRetained(self).toOpaque())
        precondition(error == 0)
    }

    func join() { pthread_join(handle, nil) }
}

/// A shard on a thread of its own, with a target of one unit on a medium that completes in random order.
private final class ShardThread: @unchecked Sendable {
    let alarm = Alarm()
    let shard = Shard()
    let gate: ShardGate
    let target: TargetDevice
    private let unit: LogicalUnit
    private let backstore: ScriptedBackstore
    private let isEnding = Atomic<Bool>(false)
    private var random: SplitMix64
    private var thread: Thread?

    init(seed: UInt64) {
        random = SplitMix64(seed: seed)
        gate = ShardGate(shard: shard)
        target = TargetDevice(name: 0x3000_0000_0000_0000 + seed, shard: shard)
        backstore = ScriptedBackstore(blocks: 4096, violations: Violations())
        unit = LogicalUnit(
            configuration: LogicalUnitConfiguration(name: 0x3000_0000_0001_0000 + seed, serial: "S"),
            backstore: backstore.handle, shard: shard)
        let added = target.add(unit, at: LUN(0)!)
        precondition(added)
    }

    func start() { thread = Thread { [unowned self] in run() } }

    func end() {
        isEnding.store(true, ordering: .releasing)
        alarm.ring()
        thread!.join()
    }

    private func run() {
        var resize: UInt64 = 0
        while true {
            var worked = gate.receive(budget: 1 + random.below(8))
            if shard.hasWaiting { shard.retryWaiting() }
            shard.now += 1000
            shard.expireDeadlines()
            while !backstore.pending.isEmpty, random.below(4) != 0 {
                backstore.honoursCancel = random.below(2) == 0
                backstore.complete(random.below(backstore.pending.count))
                worked = true
            }
            if random.below(1000) == 0 {
                resize += 1
                backstore.geometry.size = (4096 + resize % 2) * 512
                unit.backstoreGeometryChanged()
            }
            gate.flush()
            if worked || !backstore.pending.isEmpty || shard.hasWaiting { continue }
            if isEnding.load(ordering: .acquiring) { return }
            if !gate.prepareToSleep() { alarm.sleep() }
        }
    }
}

/// A thread with one link to each shard and one port behind each link.
private final class PortThread: @unchecked Sendable {
    let alarm = Alarm()
    private let index: Int
    private var random: SplitMix64
    private var lines: [(link: ShardLink, shard: ShardThread, driver: PortDriver)] = []
    private var thread: Thread?
    private(set) var commands = 0

    init(index: Int, seed: UInt64) {
        self.index = index
        random = SplitMix64(seed: seed &* 1000 &+ UInt64(index))
    }

    /// Before the threads run.
    func connect(to shard: ShardThread) {
        let link = shard.gate.addLink(capacity: 16, wakeOwner: shard.alarm.waker, wakePort: alarm.waker)
        let port = MockPort(
            name: "I\(index)", target: shard.target, journal: Journal(), violations: Violations(), tasks: 16)
        port.connect(through: [link], of: shard.gate)
        lines.append((link, shard, PortDriver(port, link, firstBlock: UInt64(index) * 64)))
    }

    func start(commands: Int) { thread = Thread { [unowned self] in run(commands) } }
    func join() { thread!.join() }

    private func run(_ limit: Int) {
        while true {
            var worked = false
            var isIdle = true
            for line in lines {
                if line.link.receive() { worked = true }
                if commands < limit, line.driver.act(&random) {
                    worked = true
                    commands += 1
                }
                line.link.flush()
                if !line.driver.isIdle { isIdle = false }
            }
            if commands >= limit, isIdle { return leave() }
            if worked { continue }
            // All, so that none misses the flag that makes it wake this thread.
            var hasWork = false
            for line in lines where line.link.prepareToSleep() { hasWork = true }
            if !hasWork { alarm.sleep() }
        }
    }

    /// Loses the nexuses and waits until nothing is left of them.
    private func leave() {
        for line in lines { line.driver.leave() }
        while lines.contains(where: { !$0.driver.port.isGone }) {
            for line in lines {
                line.link.flush()
                line.link.receive()
            }
            if lines.contains(where: { !$0.driver.port.isGone }), !lines.contains(where: { $0.link.prepareToSleep() }) {
                alarm.sleep()
            }
        }
    }
}

/// Sends random commands and functions through one port, and knows what must come back.
private final class PortDriver {
    let port: MockPort
    private let link: ShardLink
    private let firstBlock: UInt64
    /// The value that each own block holds, once a write of it ended; `nil` while that is not certain.
    private var values: [UInt64: UInt8] = [:]
    private var busy: Set<UInt64> = []
    private var open: [UInt64: (block: UInt64, value: UInt8?)] = [:]
    /// The commands that must have ended when a function is answered.
    private var functions: [UInt64: Set<UInt64>] = [:]
    private var nextCookie: UInt64 = 1

    init(_ port: MockPort, _ link: ShardLink, firstBlock: UInt64) {
        self.port = port
        self.link = link
        self.firstBlock = firstBlock
        port.whenCompleted = { [unowned self] in ended($0) }
        port.whenAnswered = { [unowned self] cookie, _ in
            let waited = functions.removeValue(forKey: cookie)!
            precondition(waited.isDisjoint(with: open.keys), "a function was answered before what it ended")
        }
    }

    var isIdle: Bool { open.isEmpty && functions.isEmpty }

    func leave() { port.disconnect() }

    /// - Returns: Whether a command or function was sent.
    func act(_ random: inout SplitMix64) -> Bool {
        if random.below(50) == 0, functions.count < 8 {
            manage(&random)
            return true
        }
        let block = firstBlock + UInt64(random.below(64))
        guard link.hasRoom, port.hasFreeTask, !busy.contains(block) else { return false }
        let attribute: TaskAttribute = random.pick([.simple, .simple, .simple, .ordered, .headOfQueue])
        busy.insert(block)
        let tag = nextCookie
        nextCookie += 1
        if random.below(2) == 0 {
            let value = UInt8(truncatingIfNeeded: tag)
            open[tag] = (block, value)
            port.send(
                CDB.write(.ten, block, 1), attribute: attribute, dataOut: Array(repeating: value, count: 512), tag: tag)
        } else {
            open[tag] = (block, nil)
            port.send(CDB.read(.ten, block, 1), attribute: attribute, dataIn: 512, tag: tag)
        }
        return true
    }

    private func manage(_ random: inout SplitMix64) {
        let cookie = nextCookie
        nextCookie += 1
        switch random.below(20) {
        case 0: send(.logicalUnitReset, cookie, ends: Set(open.keys))
        case 1: send(.targetReset, cookie, ends: Set(open.keys))
        case 2: send(.nexusReset, cookie, ends: Set(open.keys))
        case 3..<6: send(.abortTaskSet, cookie, ends: Set(open.keys))
        case 6: send(.clearTaskSet, cookie, ends: Set(open.keys))
        case 7..<15:
            let tag = open.keys.randomElement(using: &random) ?? 0
            send(.abortTask, cookie, tag: tag, ends: [tag])
        default: send(.queryTaskSet, cookie, ends: [])
        }
    }

    private func send(_ function: TaskManagementFunction, _ cookie: UInt64, tag: UInt64 = 0, ends: Set<UInt64>) {
        functions[cookie] = ends
        port.manage(function, tag: tag, cookie: cookie)
    }

    private func ended(_ completion: Completion) {
        let (block, value) = open.removeValue(forKey: completion.tag)!
        busy.remove(block)
        if let value {
            // One that did not end well may have been carried out or not.
            values[block] = completion.summary == "good" ? value : nil
        } else if completion.summary == "good", let expected = values[block] {
            precondition(
                completion.data == Array(repeating: expected, count: 512), "a port reads what it did not write")
        }
    }
}

@Suite("Shards on threads", .serialized)
struct ShardThreadTests {
    /// How much is done: TARGETD_THREAD_COMMANDS by each port thread.
    private var commands: Int {
        unsafe getenv("TARGETD_THREAD_COMMANDS").flatMap { unsafe Int(String(cString: $0)) } ?? 5000
    }

    @Test("commands, functions and losses of several threads on the targets of several others", arguments: 1...3)
    func threads(seed: Int) {
        let shards = (0..<2).map { ShardThread(seed: UInt64(seed * 10 + $0)) }
        let ports = (0..<3).map { PortThread(index: $0, seed: UInt64(seed)) }
        for port in ports { for shard in shards { port.connect(to: shard) } }
        for shard in shards { shard.start() }
        for port in ports { port.start(commands: commands) }
        for port in ports { port.join() }
        for shard in shards { shard.end() }
        #expect(ports.allSatisfy { $0.commands >= commands })
        #expect(shards.allSatisfy { $0.target.nexusCount == 0 })
    }
}
