// ShardSimulation: several shards and several threads with ports, all on one thread: which thread does the next small
// thing is decided by one seed. Threads sleep and are woken as real ones are, so a wake-up that is lost is found.
//
// Called by: ShardSimulationTests. Must not know: the engine, the rings.

import CBackstore
import CoreTestSupport
import SCSICore

/// A mistake planted outside of the engine, to show that the simulation finds its like.
enum PlantedCrossing: CaseIterable {
    /// A function reaches the shard before a task that was handed over before it.
    case functionOvertakesTask
    /// A function is answered before the commands that it ended have come back.
    case earlyAnswer
    /// A thread that sleeps is not woken.
    case lostWakeUp
    /// A completion gets lost on the way, or comes twice.
    case lostCompletion, doubledCompletion
    /// An event gets lost on the way.
    case lostEvent
}

/// One run.
final class ShardSimulation {
    private(set) var failures: [String] = []
    private(set) var commands = 0
    private var random: SplitMix64
    private let planted: PlantedCrossing?
    private var hasPlanted = false
    private let violations = Violations()
    private let journal = Journal()
    private var shards: [SimulatedShard] = []
    private var threads: [PortThread] = []
    private var nexuses: [Nexus] = []
    private var step = 0
    private var nextTag: UInt64 = 1
    private var nextValue: UInt64 = 1
    private let sendsFromInside: Bool
    private let reorders: Bool

    /// Whether a thread is awake; the address is the waker's context.
    private final class Alarm {
        var isAwake = true
        var losesNext = false

        func wake() {
            if losesNext { losesNext = false } else { isAwake = true }
        }

        var waker: ShardWaker {
            unsafe ShardWaker(
                { unsafe Unmanaged<Alarm>.fromOpaque($0).takeUnretainedValue().wake() },
                context: Unmanaged.passUnretained(self).toOpaque())
        }
    }

    /// A shard, its thread, and its target with one or two units.
    private final class SimulatedShard {
        let alarm = Alarm()
        let shard = Shard()
        let gate: ShardGate
        let target: TargetDevice
        var units: [(unit: LogicalUnit, medium: ScriptedBackstore)] = []
        var histories: [BlockHistory] = []
        var lastResize: [Int] = []
        init(_ number: Int) {
            gate = ShardGate(shard: shard)
            target = TargetDevice(name: 0x3000_0000_0000_0001 + UInt64(number), shard: shard)
        }
        var isBusy: Bool { shard.hasWaiting || units.contains { !$0.medium.pending.isEmpty } }
    }

    /// A thread with a link to each shard.
    private final class PortThread {
        let alarm = Alarm()
        var links: [ShardLink] = []
    }

    /// An initiator at a shard's target, whose queues all threads serve.
    private final class Nexus {
        let port: MockPort
        let shard: Int
        var connectedAt = 0
        var lostAt: Int?
        var lastEvent: [Int]
        var commands: [UInt64: Command] = [:]
        var functions: [UInt64: Function] = [:]
        /// Planted: a task that is handed over late.
        var late: (thread: Int, handOver: () -> Void)?
        init(_ port: MockPort, shard: Int, units: Int) {
            self.port = port
            self.shard = shard
            lastEvent = Array(repeating: -1, count: units)
        }
    }

    private struct Command {
        let sentAt: Int
        let link: Int
        let unit: Int
        let block: UInt64
        let isRead: Bool
        let writes: [BlockWrite]
    }

    private struct Function {
        let sentAt: Int
        let link: Int
        let nexus: Int
        let covers: (_ nexus: Int, _ tag: UInt64, _ unit: Int) -> Bool
        let mustEnd: [(nexus: Int, tag: UInt64)]
        /// It takes commands back, those of its own link.
        var suspends = false
        var answeredAt = Int.max
    }

    /// Functions of the past, by shard, for telling which command may have been ended by one.
    private var performed: [[Function]] = []

    private static let blocks: UInt64 = 32
    private static let steps = 1000

    init(seed: UInt64, planted: PlantedCrossing? = nil) {
        random = SplitMix64(seed: seed)
        self.planted = planted
        sendsFromInside = random.chance(1, in: 2)
        reorders = random.chance(1, in: 2)
        violations.collects = true
        let unitCount = 1 + random.below(2)
        for number in 0..<1 + random.below(3) { addShard(number, units: unitCount) }
        for _ in 0..<1 + random.below(3) { addThread() }
        for number in 0..<1 + random.below(3) {
            for shard in shards.indices { addNexus("I\(number)", shard, unitCount) }
        }
    }

    private func addShard(_ number: Int, units: Int) {
        let entry = SimulatedShard(number)
        for lun in 0..<units {
            let medium = ScriptedBackstore(blocks: Self.blocks, violations: violations)
            var configuration = LogicalUnitConfiguration(name: 0x3000_0000_0000_0001, serial: "S")
            configuration.maximumTasks = random.pick([4, 16, Limits.tasksPerLogicalUnit])
            configuration.commandTimeout = random.pick([0, 0, 200])
            let unit = LogicalUnit(configuration: configuration, backstore: medium.handle, shard: entry.shard)
            let added = entry.target.add(unit, at: LUN(lun)!)
            precondition(added)
            entry.units.append((unit, medium))
            entry.histories.append(BlockHistory())
            entry.lastResize.append(-1)
        }
        shards.append(entry)
        performed.append([])
    }

    private func addThread() {
        let thread = PortThread()
        let capacity = random.pick([1, 2, 5, 32])
        for shard in shards {
            thread.links.append(
                shard.gate.addLink(capacity: capacity, wakeOwner: shard.alarm.waker, wakePort: thread.alarm.waker))
        }
        threads.append(thread)
    }

    private func addNexus(_ name: String, _ shard: Int, _ units: Int) {
        let index = nexuses.count
        let entry = shards[shard]
        let port = MockPort(
            name: "\(name)S\(shard)", target: entry.target, journal: journal, violations: violations, tasks: 24)
        unsafe port.isHeldByMedium = { [unowned entry] head in entry.units.contains { unsafe $0.medium.holds(head) } }
        port.whenCompleted = { [unowned self] in completed($0, index) }
        port.whenAnswered = { [unowned self] cookie, response in answered(cookie, response, index) }
        port.whenReported = { [unowned self] code, lun in reported(code, lun, index) }
        if planted == .lostCompletion || planted == .doubledCompletion {
            port.mutateCompletion = { [unowned self] completion in
                guard step > 30, !hasPlanted else { return [completion] }
                hasPlanted = true
                return planted == .lostCompletion ? [] : [completion, completion]
            }
        }
        nexuses.append(Nexus(port, shard: shard, units: units))
        connect(index)
    }

    private func connect(_ index: Int) {
        let nexus = nexuses[index]
        nexus.port.connect(through: threads.map { $0.links[nexus.shard] }, of: shards[nexus.shard].gate)
        nexus.connectedAt = step
        nexus.lostAt = nil
    }

    private func fail(_ reason: String) { failures.append("step \(step): \(reason)") }

    // MARK: The run

    /// Runs `steps` steps, then lets everything end.
    func run() {
        while step < Self.steps, failures.isEmpty {
            step += 1
            act(mayBegin: true)
            check()
        }
        comeToRest()
        if failures.isEmpty { checkEnd() }
        bringDown()
    }

    /// Lets only threads act that are awake: those that sleep must have been woken by whoever gave them work.
    private func comeToRest() {
        var budget = 20_000
        while failures.isEmpty, budget > 0,
            shards.contains(where: \.alarm.isAwake) || threads.contains(where: \.alarm.isAwake)
        {
            budget -= 1
            step += 1
            handOverLate()
            act(mayBegin: false)
            check()
        }
        if budget == 0 { fail("the threads do not come to rest") }
    }

    @discardableResult
    private func handOverLate() -> Bool {
        var handedOver = false
        for nexus in nexuses {
            guard let late = nexus.late, threads[late.thread].links[nexus.shard].hasRoom else { continue }
            nexus.late = nil
            late.handOver()
            handedOver = true
        }
        return handedOver
    }

    private func checkEnd() {
        for (index, nexus) in nexuses.enumerated() {
            if !nexus.commands.isEmpty { fail("\(nexus.commands.count) commands of nexus \(index) never came back") }
            if !nexus.functions.isEmpty { fail("\(nexus.functions.count) functions were never answered") }
            if nexus.lostAt != nil, !nexus.port.isGone { fail("a lost nexus is not gone") }
            guard nexus.lostAt == nil else { continue }
            for unit in nexus.lastEvent.indices {
                let resize = shards[nexus.shard].lastResize[unit]
                if resize > nexus.connectedAt, nexus.lastEvent[unit] < resize { fail("an event never arrived") }
            }
        }
        for shard in shards {
            if shard.shard.hasWaiting { fail("tasks wait that nobody has sent") }
            if shard.units.contains(where: { $0.unit.tasksInFlight != 0 }) { fail("a task set is not empty") }
        }
        if threads.contains(where: { $0.links.contains { $0.tasksInFlight != 0 } }) { fail("a link is not empty") }
    }

    /// After a failure, too, the world must come down without a task in flight.
    private func bringDown() {
        for nexus in nexuses {
            nexus.port.whenCompleted = nil
            nexus.port.whenAnswered = nil
            nexus.port.mutateCompletion = nil
            if nexus.late == nil, nexus.lostAt == nil { nexus.port.disconnect() }
        }
        var isQuiet = false
        while !isQuiet {
            isQuiet = !handOverLate()
            for shard in shards {
                if shard.gate.receive() { isQuiet = false }
                shard.shard.retryWaiting()
                for unit in shard.units where !unit.medium.pending.isEmpty {
                    unit.medium.completeAll()
                    isQuiet = false
                }
                shard.gate.flush()
            }
            for thread in threads { for link in thread.links where link.receive() { isQuiet = false } }
        }
    }

    private func check() {
        if step % 16 == 0 { for nexus in nexuses { nexus.port.checkRetiredMemory() } }
        for rule in violations.found { fail(rule) }
    }

    // MARK: What threads do

    private func act(mayBegin: Bool) {
        if random.chance(1, in: 2) {
            let shard = random.pick(shards)
            if shard.alarm.isAwake { actAsShard(shard) }
            // The medium's interrupt comes whether the thread sleeps or not.
            if shard.isBusy, random.chance(1, in: 2) { shard.alarm.isAwake = true }
        } else {
            let index = random.below(threads.count)
            // So does the guest's.
            if mayBegin, random.chance(1, in: 3) { threads[index].alarm.isAwake = true }
            if threads[index].alarm.isAwake { actAsPort(index, mayBegin: mayBegin) }
        }
    }

    private func actAsShard(_ shard: SimulatedShard) {
        shard.shard.now += 1
        switch random.below(8) {
        case 0..<3: shard.gate.receive(budget: random.pick([1, 2, 64]))
        case 3, 4: complete(shard)
        case 5: shard.gate.flush()
        case 6:
            shard.shard.retryWaiting()
            shard.shard.expireDeadlines()
            if random.chance(1, in: 8) { resize(shard) }
        default:
            shard.gate.flush()
            loseWakeUp(shard.alarm)
            if !shard.gate.prepareToSleep(), !shard.isBusy { shard.alarm.isAwake = false }
        }
    }

    private func complete(_ shard: SimulatedShard) {
        let unit = random.pick(shard.units)
        guard !unit.medium.pending.isEmpty else { return }
        unit.medium.honoursCancel = random.chance(1, in: 2)
        unit.medium.complete(reorders ? random.below(unit.medium.pending.count) : 0)
    }

    private func resize(_ shard: SimulatedShard) {
        let index = random.below(shard.units.count)
        let unit = shard.units[index]
        unit.medium.geometry.size = (Self.blocks + UInt64(random.below(4))) * 512
        if unit.unit.size != unit.medium.geometry.size { shard.lastResize[index] = step }
        unit.unit.backstoreGeometryChanged()
    }

    private func actAsPort(_ index: Int, mayBegin: Bool) {
        let thread = threads[index]
        switch random.below(8) {
        case 0, 1: random.pick(thread.links).receive()
        case 2: for link in thread.links { link.flush() }
        case 3..<6 where mayBegin: send(thread: index)
        case 6 where mayBegin:
            if random.chance(1, in: 3) { manage(thread: index) }
            if random.chance(1, in: 40) { loseOrReturn() }
        default:
            for link in thread.links { link.flush() }
            loseWakeUp(thread.alarm)
            var hasWork = false
            for link in thread.links where link.prepareToSleep() { hasWork = true }
            if !hasWork { thread.alarm.isAwake = false }
        }
    }

    private func loseWakeUp(_ alarm: Alarm) {
        guard planted == .lostWakeUp, step > Self.steps - 20, !hasPlanted else { return }
        hasPlanted = true
        alarm.losesNext = true
    }

    // MARK: Commands

    private func send(thread: Int) {
        let index = random.below(nexuses.count)
        let nexus = nexuses[index]
        guard nexus.lostAt == nil, threads[thread].links[nexus.shard].hasRoom, nexus.port.hasFreeTask, nexus.late == nil
        else { return }
        let tag = nextTag
        nextTag += 1
        commands += 1
        let unit = random.below(shards[nexus.shard].units.count)
        let block = UInt64(random.below(Int(Self.blocks)))
        let attribute: TaskAttribute = random.pick([.simple, .simple, .simple, .simple, .ordered, .headOfQueue])
        let kind = random.below(3)
        var writes: [BlockWrite] = []
        var dataOut: [UInt8] = []
        if kind == 0 {
            let value = nextValue
            nextValue += 1
            writes = shards[nexus.shard].histories[unit].begin(block, [value], at: step)
            dataOut = Self.content(value)
        }
        nexus.commands[tag] = Command(
            sentAt: step, link: thread, unit: unit, block: block, isRead: kind == 1, writes: writes)
        let cdb = [CDB.write(.ten, block, 1), CDB.read(.ten, block, 1), CDB.testUnitReady][kind]
        let handOver = { [unowned self] in
            nexuses[index].port.send(
                cdb, lun: UInt64(unit) << 48, attribute: attribute, dataOut: dataOut, dataIn: kind == 1 ? 512 : 0,
                tag: tag, link: thread, group: UInt8(thread))
            return
        }
        if planted == .functionOvertakesTask, step > 30, !hasPlanted, random.chance(1, in: 4) {
            hasPlanted = true
            nexus.late = (thread, handOver)
        } else {
            handOver()
        }
    }

    private static func content(_ value: UInt64) -> [UInt8] {
        let bytes = (0..<8).map { UInt8(truncatingIfNeeded: value >> (56 - 8 * $0)) }
        return (0..<64).flatMap { _ in bytes }
    }

    private func completed(_ completion: Completion, _ index: Int) {
        let nexus = nexuses[index]
        guard let command = nexus.commands.removeValue(forKey: completion.tag) else {
            return fail("command \(completion.tag) came back twice, or was never sent")
        }
        switch completion.summary {
        case "good":
            for write in command.writes { write.finish(.certain, at: step) }
            if command.isRead { checkRead(completion, command, nexus.shard) }
        case "aborted", "reset", "taskAborted":
            for write in command.writes { write.finish(.possible, at: step) }
            checkAborted(completion.tag, command, index)
        case "suspended":
            // In part, too: it has been with the medium.
            for write in command.writes { write.finish(.possible, at: step) }
            checkSuspended(completion.tag, command, index)
        case "b/0801", "b/0000":
            for write in command.writes { write.finish(.possible, at: step) }
        case "busy", "taskSetFull":
            for write in command.writes { write.finish(.none, at: step) }
        case let text where text.hasPrefix("6/"):
            for write in command.writes { write.finish(.none, at: step) }
        default: fail("command \(completion.tag) ended with \(completion.summary)")
        }
        if sendsFromInside, step < Self.steps, failures.isEmpty, random.chance(1, in: 2) { send(thread: command.link) }
    }

    private func checkRead(_ completion: Completion, _ command: Command, _ shard: Int) {
        let value = completion.data.prefix(8).reduce(0) { $0 << 8 | UInt64($1) }
        if completion.data != Self.content(value) { return fail("a block is made of several writes") }
        if let wrong = shards[shard].histories[command.unit].check(
            command.block, value, begin: command.sentAt, end: step)
        {
            fail(wrong)
        }
    }

    /// A command is ended only by a loss, or by a function that may have come after it.
    private func checkAborted(_ tag: UInt64, _ command: Command, _ index: Int) {
        if nexuses[index].lostAt != nil { return }
        let shard = nexuses[index].shard
        let underWay = nexuses.filter { $0.shard == shard }.flatMap(\.functions.values)
        let isExplained = (performed[shard] + underWay).contains { function in
            function.covers(index, tag, command.unit)
                && (function.sentAt > command.sentAt
                    || function.link != command.link && function.answeredAt > command.sentAt)
        }
        if !isExplained { fail("command \(tag) was ended by a function that was sent before it, or by none") }
    }

    /// A command is given back only to a suspension that came after it and has not been answered.
    private func checkSuspended(_ tag: UInt64, _ command: Command, _ index: Int) {
        if nexuses[index].lostAt != nil { return }
        let isExplained = nexuses[index].functions.values.contains {
            $0.suspends && $0.link == command.link && $0.sentAt > command.sentAt
        }
        if !isExplained { fail("command \(tag) was given back, and nobody had taken it back") }
    }

    // MARK: Functions, losses, events

    /// Takes back what a nexus has sent through one link.
    private func suspend(thread: Int, _ nexus: Nexus, _ index: Int) {
        // A group has one suspension at a time (scsi_target.h).
        guard !nexus.functions.values.contains(where: { $0.suspends && $0.link == thread }) else { return }
        let tags = nexus.commands.filter { $0.value.link == thread }.keys
        let cookie = nextTag
        nextTag += 1
        nexus.functions[cookie] = Function(
            sentAt: step, link: thread, nexus: index, covers: { _, _, _ in false },
            mustEnd: tags.map { (nexus: index, tag: $0) }, suspends: true)
        nexus.port.suspend(group: UInt8(thread), cookie: cookie, link: thread)
    }

    private func manage(thread: Int) {
        let index = random.below(nexuses.count)
        let nexus = nexuses[index]
        guard nexus.lostAt == nil, nexus.functions.count < 4 else { return }
        if random.chance(1, in: 6) { return suspend(thread: thread, nexus, index) }
        let unit = random.below(shards[nexus.shard].units.count)
        let victim = nexus.commands.keys.sorted().randomElement(using: &random) ?? 0
        let function = random.pick([
            TaskManagementFunction.abortTask, .abortTask, .abortTaskSet, .clearTaskSet, .logicalUnitReset, .targetReset,
            .nexusReset, .queryTask, .queryTaskSet,
        ])
        let covers: (Int, UInt64, Int) -> Bool =
            switch function {
            case .abortTask: { $0 == index && $1 == victim && $2 == unit }
            case .abortTaskSet: { nexus, _, of in nexus == index && of == unit }
            case .clearTaskSet, .logicalUnitReset: { _, _, of in of == unit }
            case .nexusReset: { nexus, _, _ in nexus == index }
            case .targetReset: { _, _, _ in true }
            default: { _, _, _ in false }
            }
        let mustEnd = nexuses.indices.filter { nexuses[$0].shard == nexus.shard }.flatMap { other in
            nexuses[other].commands.filter { covers(other, $0.key, $0.value.unit) }.map { (nexus: other, tag: $0.key) }
        }
        let cookie = nextTag
        nextTag += 1
        nexus.functions[cookie] = Function(
            sentAt: step, link: thread, nexus: index, covers: covers, mustEnd: mustEnd)
        nexus.port.manage(function, lun: UInt64(unit) << 48, tag: victim, cookie: cookie, link: thread)
        if planted == .earlyAnswer, !hasPlanted, step > 30, !mustEnd.isEmpty {
            hasPlanted = true
            answered(cookie, .functionComplete, index)
        }
    }

    private func answered(_ cookie: UInt64, _ response: TaskManagementResponse, _ index: Int) {
        guard var function = nexuses[index].functions.removeValue(forKey: cookie) else {
            // One that was on its way when the nexus was lost.
            if nexuses[index].lostAt != nil { return }
            return fail("function \(cookie) was answered twice, or was never sent")
        }
        if response == .functionRejected { return fail("a function was rejected") }
        function.answeredAt = step
        performed[nexuses[index].shard].append(function)
        if function.mustEnd.contains(where: { nexuses[$0.nexus].commands[$0.tag] != nil }) {
            fail("a function was answered before a command came back that had been handed over before it")
        }
    }

    private func loseOrReturn() {
        let index = random.below(nexuses.count)
        let nexus = nexuses[index]
        if nexus.lostAt == nil {
            guard nexus.late == nil else { return }
            nexus.lostAt = step
            // They may have been carried out, or be carried out yet.
            performed[nexus.shard] += nexus.functions.values
            nexus.functions = [:]
            // The thread of the first link says it, so that one is awake.
            threads[0].alarm.isAwake = true
            nexus.port.disconnect()
        } else if nexus.port.isGone, nexus.commands.isEmpty {
            connect(index)
        }
    }

    private func reported(_ code: UInt16, _ lun: UInt64, _ index: Int) {
        if planted == .lostEvent { return }
        if code == 0x2a09 { nexuses[index].lastEvent[Int(lun >> 48)] = step }
    }
}
