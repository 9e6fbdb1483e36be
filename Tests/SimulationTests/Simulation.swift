// Simulation: initiators on mock ports, logical units on scripted media, one seed, virtual time; every step is compared
// with the reference model.
//
// Called by: SimulationTests. Must not know: the engine, save the state in which it holds a task, and whether a flush
// goes on that no task waits for.

import CBackstore
import CoreTestSupport

@testable import SCSICore

/// What a run may do. Each run switches random features off, because rare combinations are found by runs that do little
/// else.
struct SimulationFeatures {
    var attributes = true, management = true, nexusLoss = true, resize = true, removal = true
    var errors = true, full = true, ignoresCancel = true, reorder = true, staging = true, anyCDB = true
    var modeSelect = true, startStop = true, reentrant = true, smallTransfers = true, shortBuffers = true
    var naca = true, taskSets = true, deadlines = true, suspension = true, access = true

    init(_ random: inout SplitMix64) {
        let paths: [WritableKeyPath<Self, Bool>] = [
            \.attributes, \.management, \.nexusLoss, \.resize, \.removal, \.errors, \.full, \.ignoresCancel, \.reorder,
            \.staging, \.anyCDB, \.modeSelect, \.startStop, \.reentrant, \.smallTransfers, \.shortBuffers, \.naca,
            \.taskSets, \.deadlines, \.suspension, \.access,
        ]
        for path in paths { self[keyPath: path] = random.chance(1, in: 2) }
    }
}

/// A mistake planted outside of the engine, to show that the simulator finds its like.
enum PlantedBug: CaseIterable {
    case lostCompletion, doubledCompletion, lostUnitAttention, doubledUnitAttention, earlyAnswer, lostWrite, wrongData
    case lateTouch, orderedOvertaken, commandPassesACA, deadlineForgotten, suspensionForgotten
}

/// The two kinds of mock transport: what differs between the fronts that there are.
enum MockTransport: CaseIterable {
    /// Many commands at once, every attribute, NACA, a tag for each command.
    case rich
    /// Few commands at once, SIMPLE only, buffers in one piece, tags used again as soon as they are free.
    case plain
}

/// One run.
final class Simulation {
    let seed: UInt64
    private(set) var failures: [String] = []
    private(set) var commands = 0
    private var random: SplitMix64
    private let features: SimulationFeatures
    private let planted: PlantedBug?
    private let isVerbose: Bool
    private let mistake: ModelMistake?

    private let shard = Shard()
    private let target: TargetDevice
    private let violations = Violations()
    private let journal = Journal()
    private var ports: [MockPort] = []
    private var transports: [MockTransport] = []
    private var units: [Unit] = []
    private var media: [ScriptedBackstore] = []
    private var tracked: [Key: Tracked] = [:]
    private var functions: [UInt64: Function] = [:]
    /// Commands that came back because their group was suspended, and are to be sent again.
    private var suspended: [Int: [Tracked]] = [:]
    private var step = 0
    private var nextID = 0
    private var nextValue: UInt64 = 1
    private var nextCookie: UInt64 = 1
    /// The engine is carrying out something of which the model learns when it returns; no command is sent meanwhile.
    private var isBusy = false
    private var depth = 0
    private var hasEnded = false
    private var hasPlanted = false
    /// The states of the two port groups; ports are in the first and the second in turn.
    private var states: [AsymmetricAccessState] = [.activeOptimized, .activeOptimized]
    private var attentionToRepeat: (key: Int, sense: [UInt8])?

    private struct Key: Hashable {
        let port: Int
        let tag: UInt64
    }

    /// A unit, mapped or draining.
    private final class Unit {
        let unit: LogicalUnit
        let medium: ScriptedBackstore
        var lun: LUN?
        var model = ModelUnit()
        var history = BlockHistory()
        var blocks: UInt64
        var wasResized = false
        var isDrained = false
        init(_ unit: LogicalUnit, _ medium: ScriptedBackstore, _ blocks: UInt64) {
            self.unit = unit
            self.medium = medium
            self.blocks = blocks
        }
        /// What IMMED has promised is not done yet; the unit stays for it.
        var isFlushing: Bool { unit.flush.isWanted || unit.flush.isInFlight }
    }

    /// A command in flight and what is known of it.
    private final class Tracked {
        let id: Int
        let cdb: [UInt8]
        let sentAt: Int
        let unit: Unit?
        let address: UInt64
        let blocks: UInt64
        let fits: Bool
        var writes: [BlockWrite] = []
        var isRandom = false
        /// What was sent, and in which group of its port.
        var command: Command?
        var group: UInt8 = 0
        var isSuspended = false
        /// With what the command must end because it does not come into the task set.
        var refusal: (summary: String, task: ModelTask)?
        init(id: Int, cdb: [UInt8], sentAt: Int, unit: Unit?, address: UInt64, blocks: UInt64, fits: Bool) {
            self.id = id
            self.cdb = cdb
            self.sentAt = sentAt
            self.unit = unit
            self.address = address
            self.blocks = blocks
            self.fits = fits
        }
    }

    /// A task management function that has not been answered.
    private struct Function {
        let port: Int
        var waitsFor: Set<Int>
        let expected: TaskManagementResponse
        /// The group that it suspends.
        var group: UInt8?
    }

    private static let passing: Set<UInt8> = [0x03, 0x12, 0xa0]
    private static let knownCodes: [UInt8] = [
        0x00, 0x03, 0x08, 0x12, 0x15, 0x1a, 0x1b, 0x25, 0x28, 0x2f, 0x35, 0x55, 0x5a, 0x88, 0x8f, 0x91, 0x9e, 0xa0,
        0xa3, 0xa8, 0xaf,
    ]

    init(seed: UInt64, planted: PlantedBug? = nil, mistake: ModelMistake? = nil, isVerbose: Bool = false) {
        self.seed = seed
        self.isVerbose = isVerbose
        self.planted = planted
        self.mistake = mistake
        random = SplitMix64(seed: seed)
        features = SimulationFeatures(&random)
        violations.collects = true
        let groups = [1, 2].map { TargetPortGroup(identifier: $0, ports: [$0], isExplicit: true) }
        target = TargetDevice(name: 0x3000_0000_0000_0001, shard: shard, portGroups: features.access ? groups : [])
        for number in 0..<1 + random.below(3) { addUnit(at: LUN(number)!) }
        for _ in 0..<1 + random.below(4) { addPort() }
    }

    // MARK: The world

    private func addUnit(at lun: LUN) {
        let blocks = UInt64(random.pick([16, 64, 600]))
        let medium = ScriptedBackstore(blocks: blocks, violations: violations)
        if features.smallTransfers {
            medium.geometry.maximum_transfer = 2048
            medium.geometry.maximum_discard = 1024
            medium.geometry.maximum_write_zeroes = 1536
        }
        if random.chance(1, in: 3) { medium.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_CAN_WRITE_ZEROES) }
        if random.chance(1, in: 3) { medium.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_VOLATILE_CACHE) }
        if planted == .lostWrite {
            medium.losesWrite = { [unowned self] _ in
                guard !self.hasPlanted, self.step > 20 else { return false }
                self.hasPlanted = true
                return true
            }
        }
        medium.touchesMemoryLate = planted == .lateTouch
        var configuration = LogicalUnitConfiguration(name: 0x3000_0000_0000_0002, serial: "S")
        if features.deadlines { configuration.commandTimeout = random.pick([0, 5, 40]) * 1_000_000_000 }
        let unit = LogicalUnit(configuration: configuration, backstore: medium.handle, shard: shard)
        media.append(medium)
        let entry = Unit(unit, medium, blocks)
        entry.model.mistake = mistake
        let hasCache = medium.geometry.capabilities & UInt32(SCSI_BACKSTORE_VOLATILE_CACHE) != 0
        entry.model.defaultModePages = [0x0a: Self.controlPage(), 0x08: Self.cachingPage(hasCache)]
        entry.model.modePages = entry.model.defaultModePages
        units.append(entry)
        map(entry, at: lun)
    }

    private func map(_ entry: Unit, at lun: LUN) {
        for other in units where other.lun != nil {
            for nexus in ports.indices { other.model.establish(0x3f0e, for: nexus) }
        }
        entry.lun = lun
        note("LUN \(lun.number) is added")
        entry.isDrained = false
        for nexus in ports.indices { entry.model.attention[nexus] = [0x2901] }
        entry.model.access = refusals
        if !target.add(entry.unit, at: lun) { fail("a free LUN was refused") }
    }

    private func addPort() {
        let index = ports.count
        let transport = index == 0 ? .rich : random.pick(MockTransport.allCases)
        transports.append(transport)
        let port = MockPort(
            name: "I\(index)", target: target, journal: journal, violations: violations,
            tasks: transport == .rich ? 24 : 6, segmentsPerTask: 24)
        unsafe port.isHeldByMedium = { [unowned self] head in self.media.contains { unsafe $0.holds(head) } }
        port.whenCompleted = { [unowned self] in self.completed($0, on: index) }
        port.whenAnswered = { [unowned self] in self.answered($0, $1, on: index) }
        if planted != nil { port.mutateCompletion = { [unowned self] in self.plant($0, on: index) } }
        port.targetPort = UInt16(index % 2 + 1)
        ports.append(port)
        for entry in units where entry.lun != nil {
            entry.model.attention[index] = [0x2901]
            entry.model.access = refusals
        }
        port.connect()
    }

    /// What the ports were called with, in order.
    var trace: [String] { journal.lines }

    private func fail(_ reason: String) {
        failures.append("step \(step): \(reason)")
    }

    // MARK: The run

    /// Runs `steps` steps, then lets everything end, and compares at every step.
    func run(steps: Int = 150) {
        while step < steps, failures.isEmpty {
            step += 1
            shard.now += 1_000_000_000
            act()
            settle()
        }
        drain()
        if failures.isEmpty { checkEnd() }
        for port in ports { port.mutateCompletion = nil }
        for port in ports {
            port.whenCompleted = nil
            port.whenAnswered = nil
        }
        for medium in media { medium.capacity = .max }
        finishAnyway()
    }

    /// After a failure the world must still come down without a task in flight.
    private func finishAnyway() {
        // A command that its port refuses, with NACA, ends in an ACA condition again: each clears away one.
        var rounds = 1000
        repeat {
            rounds -= 1
            shard.retryWaiting()
            for port in ports where port.nexus != nil {
                for entry in units where entry.lun != nil { port.manage(.clearACA, lun: entry.lun!.field) }
            }
            for medium in media { medium.completeAll() }
        } while rounds > 0
            && (shard.hasWaiting || media.contains { !$0.pending.isEmpty }
                || units.contains { $0.unit.tasksInFlight > 0 })
    }

    private func drain() {
        for medium in media { medium.capacity = .max }
        var budget = 10_000
        while failures.isEmpty, budget > 0 {
            budget -= 1
            step += 1
            if shard.hasWaiting || media.contains(where: { !$0.pending.isEmpty }) {
                shard.retryWaiting()
                settle()
                if failures.isEmpty, let medium = media.first(where: { !$0.pending.isEmpty }) { complete(medium) }
            } else if let entry = units.first(where: { !$0.model.faulted.isEmpty }) {
                manage(entry.model.faulted.min()!, .clearACA, entry)
            } else if units.contains(where: \.isFlushing) {
                shard.now += 1_000_000_000
                expire()
            } else {
                break
            }
            settle()
        }
        if budget == 0 { fail("the target does not come to rest") }
    }

    private func checkEnd() {
        if !tracked.isEmpty { fail("\(tracked.count) commands never came back") }
        if !functions.isEmpty { fail("\(functions.count) task management functions were never answered") }
        if shard.hasWaiting { fail("tasks wait that nobody has sent") }
        for entry in units {
            if entry.unit.tasksInFlight != 0 { fail("the task set is not empty at the end") }
            if entry.lun == nil, !entry.isDrained { fail("a removed unit was not reported as drained") }
        }
        checkStaging()
    }

    /// All staging buffers are back: that many VERIFY are with the medium at once.
    private func checkStaging() {
        guard let entry = units.first(where: { $0.lun != nil && $0.blocks > 0 && $0.medium.geometry.size > 0 }) else {
            return
        }
        let port = ports.last!
        if port.nexus == nil { return }
        for group in states.indices { set(.activeOptimized, group) }
        for port in ports { port.whenCompleted = nil }
        let run: ([UInt8]) -> Void = { cdb in
            port.send(cdb, lun: entry.lun!.field, dataIn: cdb[0] == 0x03 ? 252 : 0)
            entry.medium.completeAll()
        }
        repeat {
            run(CDB.requestSense())
            if Sense(port.completions.last!.data)?.key == 2 { run(CDB.startStopUnit(start: true)) }
        } while Sense(port.completions.last!.data)?.key != 0
        for _ in 0..<Limits.stagingBuffers { port.send(CDB.verify(.ten, 0, 1), lun: entry.lun!.field) }
        if entry.medium.pending.count != Limits.stagingBuffers { fail("a staging buffer was not given back") }
        entry.medium.completeAll()
    }

    /// What the run did, for people who replay it.
    private func note(_ text: @autoclosure () -> String) { if isVerbose { print("  \(step): \(text())") } }

    private func act() {
        let port = random.below(ports.count)
        switch random.below(20) {
        case 0 where features.suspension && random.chance(1, in: 2): suspend(port)
        case 0 where features.management: manage(port)
        case 1 where features.nexusLoss && random.chance(1, in: 4): loseOrEstablish(port)
        case 2 where features.resize && random.chance(1, in: 3): resize()
        case 3 where features.removal && random.chance(1, in: 4): removeOrAdd()
        case 4 where features.full: random.pick(media).capacity = random.pick([0, 1, 2, 5, .max])
        case 5 where features.deadlines && random.chance(1, in: 2): expire()
        case 5: shard.retryWaiting()
        case 13 where features.access && random.chance(1, in: 4): changeAccess()
        case 6..<13:
            if let medium = media.filter({ !$0.pending.isEmpty }).randomElement(using: &random) { complete(medium) }
        default: send(port)
        }
    }

    private func complete(_ medium: ScriptedBackstore) {
        if features.ignoresCancel { medium.honoursCancel = random.chance(1, in: 2) }
        let index = features.reorder ? random.below(medium.pending.count) : 0
        let error: Int32 = features.errors && random.chance(1, in: 8) ? random.pick([5, 28, 110, 121]) : 0
        let place = random.chance(1, in: 2) ? medium.pending[index].offset : nil
        hasEnded = false
        medium.complete(index, error: error, errorOffset: error == 0 ? nil : place, partial: random.below(5) * 300)
        if hasEnded, failures.isEmpty { checkNobodyWaits(on: medium) }
    }

    // MARK: Commands

    private func send(_ index: Int) {
        let port = ports[index]
        guard port.nexus != nil, port.hasFreeTask else { return }
        let group = UInt8(random.below(2))
        if functions.values.contains(where: { $0.port == index && $0.group == group }) { return }
        let mapped = units.filter { $0.lun != nil }
        let again = suspended[index]?.isEmpty == false ? suspended[index]?.removeFirst() : nil
        let entry = again?.unit ?? (random.chance(1, in: 20) ? nil : mapped.randomElement(using: &random))
        if again != nil, entry?.lun == nil { return }
        let lun = entry?.lun?.field ?? random.pick([77 << 48, 0xc101 << 48, 0x8000 << 48, 1])
        let isRich = transports[index] == .rich
        let attribute = isRich ? chooseAttribute(entry, index) : .simple
        commands += 1
        var command = again?.command ?? choose(entry)
        if again == nil, features.naca, isRich, random.chance(1, in: 3) {
            command.cdb[Self.controlByte(of: command.cdb)] |= 0x04
        }
        let tag = isRich ? nextCookie : UInt64((0...).first { !port.tagsInFlight.contains(UInt64($0)) }!)
        nextCookie += 1
        nextID += 1
        let key = Key(port: index, tag: tag)
        let record = Tracked(
            id: nextID, cdb: command.cdb, sentAt: step, unit: entry, address: command.address, blocks: command.blocks,
            fits: command.fits)
        record.isRandom = command.isRandom
        (record.command, record.group) = (command, group)
        if let entry, !command.values.isEmpty {
            record.writes = entry.history.begin(command.address, command.values, at: step)
        }
        tracked[key] = record
        note("I\(index) sends \(tag) \(attribute) \(command.cdb.map { String($0, radix: 16) }) to \(lun >> 48)")
        if let entry { insert(record, key, attribute, entry, command.modePage) }
        var (sent, cdb) = (attribute, command.cdb)
        if planted == .orderedOvertaken, attribute == .ordered { sent = .simple }
        if planted == .commandPassesACA { cdb[Self.controlByte(of: cdb)] &= ~0x04 }
        let layout = isRich && random.chance(1, in: 3) ? split(command.dataIn) : nil
        let outLayout = isRich && random.chance(1, in: 3) ? split(command.dataOut.count) : nil
        port.send(
            cdb, lun: lun, attribute: sent, dataOut: command.dataOut, outLayout: outLayout,
            dataIn: command.dataIn, inLayout: layout, tag: tag, group: group)
    }

    private func insert(
        _ record: Tracked, _ key: Key, _ attribute: TaskAttribute, _ entry: Unit,
        _ modePage: (code: UInt8, bytes: [UInt8])?
    ) {
        let code = record.cdb[0]
        var task = ModelTask(
            id: record.id, nexus: key.port, tag: key.tag, attribute: attribute, access: ModelAccess(cdb: record.cdb),
            passesUnitAttention: Self.passing.contains(code), modePage: modePage)
        task.hasNACA = record.cdb[Self.controlByte(of: record.cdb)] & 0x04 != 0
        task.changesUnit = [0x15, 0x55, 0x1b, 0xa4].contains(code)
        task.isWhole = [0x89, 0x8b, 0x9c, 0x51, 0x53, 0x7f].contains(code)
        task.refusals = Self.refusals(of: record.cdb)
        task.arrival = shard.now
        if let refusal = entry.model.refusal(key.port, attribute, hasNACA: task.hasNACA) {
            record.refusal = (refusal, task)
            return
        }
        syncEnabled(entry)
        entry.model.tasks.append(task)
        syncParked(entry)
        entry.model.enable(entry.model.tasks.count - 1)
    }

    /// CONTROL is the last byte of a CDB, or the second of one of variable length (SPC-6 4.2.3).
    private static func controlByte(of cdb: [UInt8]) -> Int { cdb[0] == 0x7f ? 1 : cdb.count - 1 }

    /// Mostly ACA on a faulted nexus, where nothing else is admitted.
    private func chooseAttribute(_ entry: Unit?, _ index: Int) -> TaskAttribute {
        if entry?.model.faulted.contains(index) == true, random.chance(2, in: 3) { return .aca }
        guard features.attributes else { return .simple }
        return random.pick([.simple, .simple, .simple, .simple, .ordered, .headOfQueue, .ordered, .headOfQueue, .aca])
    }

    private func split(_ length: Int) -> [Int] {
        var layout: [Int] = []
        var left = length
        while left > 0, layout.count < 10 {
            let piece = random.pick([0, 1, 3, 511, 512, 513, left])
            layout.append(min(piece, left))
            left -= min(piece, left)
        }
        return left > 0 ? layout + [left] : layout
    }

    private struct Command {
        var cdb: [UInt8]
        var dataOut: [UInt8] = []
        var dataIn = 0
        var address: UInt64 = 0
        var blocks: UInt64 = 0
        var values: [UInt64] = []
        var fits = true
        var isRandom = false
        var modePage: (code: UInt8, bytes: [UInt8])?
        var states: [(group: Int, state: AsymmetricAccessState)] = []
    }

    private func choose(_ entry: Unit?) -> Command {
        let size = entry?.blocks ?? 16
        let edge = random.pick([0, 0, 1, 2, size / 2, size &- 2, size &- 1])
        let address = random.chance(1, in: 40) ? random.pick([size, size + 1, 0x1f_ffff]) : edge
        let blocks = random.pick([1, 1, 1, 2, 3, 4]) as UInt64
        switch random.below(25) {
        case 0..<7: return read(address, blocks)
        case 7..<14: return write(address, blocks)
        case 14 where features.staging: return verify(entry, address, blocks)
        case 15 where features.staging: return writeSame(address, random.pick([1, 3, 7, 13]))
        case 16 where features.staging: return unmap(size)
        case 17: return Command(cdb: CDB.synchronizeCache(.ten, 0, 0))
        case 18:
            return Command(cdb: CDB.requestSense(), dataIn: features.shortBuffers ? random.pick([4, 18, 252]) : 18)
        case 19: return Command(cdb: CDB.reportLUNs(), dataIn: features.shortBuffers ? random.pick([4, 64]) : 64)
        case 20 where features.modeSelect: return modeSelect(entry)
        case 21 where features.startStop: return Command(cdb: CDB.startStopUnit(start: random.chance(3, in: 4)))
        case 22 where features.anyCDB: return anything()
        case 23 where features.staging: return lessUsual(entry, address, blocks)
        case 24 where features.access: return setTargetPortGroups()
        default: return Command(cdb: CDB.testUnitReady)
        }
    }

    private func form(_ address: UInt64) -> CoreTestSupport.CDB.Form {
        random.pick(address < 1 << 21 ? [.six, .ten, .twelve, .sixteen] : [.ten, .twelve, .sixteen])
    }

    private func read(_ address: UInt64, _ blocks: UInt64) -> Command {
        let form = form(address)
        let flags: UInt8 = form != .six && random.chance(1, in: 6) ? 8 : 0
        let short = features.shortBuffers && random.chance(1, in: 10)
        let length = Int(blocks) * 512 + (short ? -1 : random.pick([0, 0, 0, 1, 512]))
        return Command(
            cdb: CDB.read(form, address, blocks, flags: flags), dataIn: length, address: address, blocks: blocks,
            fits: !short)
    }

    /// A block of a value: its bytes say which.
    private func block(_ value: UInt64) -> [UInt8] {
        var bytes = CDB.bytes(value, 8)
        while bytes.count < 512 { bytes += bytes }
        return bytes
    }

    private func newValue() -> UInt64 {
        nextValue += 1
        return nextValue
    }

    private func write(_ address: UInt64, _ blocks: UInt64) -> Command {
        let form = form(address)
        let flags: UInt8 = form != .six && random.chance(1, in: 6) ? 8 : 0
        let values = (0..<blocks).map { _ in newValue() }
        var data = values.flatMap(block)
        let short = features.shortBuffers && random.chance(1, in: 10)
        if short { data.removeLast() }
        return Command(
            cdb: CDB.write(form, address, blocks, flags: flags), dataOut: data, address: address, blocks: blocks,
            values: values, fits: !short)
    }

    /// Mostly compares with what the medium holds at this moment.
    private func verify(_ entry: Unit?, _ address: UInt64, _ blocks: UInt64) -> Command {
        let content = (0..<blocks).flatMap { entry?.medium.block(address &+ $0) ?? block(0) }
        let check = random.pick([0, 1, 1]) as UInt8
        return Command(
            cdb: CDB.verify(random.pick([.ten, .twelve, .sixteen]), address, blocks, byteCheck: check),
            dataOut: check == 0 ? [] : content, address: address, blocks: blocks)
    }

    private func writeSame(_ address: UInt64, _ blocks: UInt64) -> Command {
        let zero = random.chance(1, in: 2)
        let value = zero ? 0 : newValue()
        let flags: UInt8 = random.chance(1, in: 2) ? 8 : 0
        return Command(
            cdb: CDB.writeSame(random.pick([.ten, .sixteen]), address, blocks, flags: flags), dataOut: block(value),
            address: address, blocks: blocks, values: Array(repeating: value, count: Int(blocks)))
    }

    /// Commands of which each has an extent in a place of its own, or uses it in several steps.
    private func lessUsual(_ entry: Unit?, _ address: UInt64, _ blocks: UInt64) -> Command {
        let content = (0..<blocks).flatMap { entry?.medium.block(address &+ $0) ?? block(0) }
        let values = (0..<blocks).map { _ in newValue() }
        let data = values.flatMap(block)
        let extent = CDB.bytes(address, 8)
        let count = CDB.bytes(blocks, 4)
        switch random.below(9) {
        case 0:
            // Changes nothing, but a write of another in between would be lost.
            return Command(
                cdb: [0x8b, 0] + extent + count + [0, 0], dataOut: Array(repeating: 0, count: Int(blocks) * 512),
                address: address, blocks: blocks)
        case 1:
            return Command(
                cdb: [0x89, 0] + extent + [0, 0, 0, UInt8(blocks), 0, 0], dataOut: content + data, address: address,
                blocks: blocks, values: values)
        case 2:
            return Command(
                cdb: CDB.writeAtomic(address, blocks), dataOut: data, address: address, blocks: blocks, values: values)
        case 3:
            return Command(
                cdb: [0x8e, random.pick([0, 2])] + extent + count + [0, 0], dataOut: data, address: address,
                blocks: blocks, values: values)
        case 4:
            return Command(
                cdb: CDB.preFetch(random.pick([.ten, .sixteen]), address, blocks, immediate: random.chance(1, in: 2)),
                address: address, blocks: blocks)
        case 5:
            // The same as ORWRITE of zeros.
            return Command(
                cdb: CDB.xpWrite(address, blocks, isLong: random.chance(1, in: 2)),
                dataOut: Array(repeating: 0, count: Int(blocks) * 512), address: address, blocks: blocks)
        case 6:
            return Command(
                cdb: CDB.xdWriteRead(address, blocks, isLong: random.chance(1, in: 2)), dataOut: data,
                dataIn: data.count, address: address, blocks: blocks, values: values)
        case 7:
            // The exclusive or with zeros is what the blocks hold: a read.
            return Command(
                cdb: CDB.xdWriteRead(address, blocks, flags: 4, isLong: random.chance(1, in: 2)),
                dataOut: Array(repeating: 0, count: Int(blocks) * 512), dataIn: data.count, address: address,
                blocks: blocks)
        default:
            return Command(cdb: CDB.getLBAStatus(address), dataIn: 8 + 16 * 256, address: address, blocks: 1)
        }
    }

    private func unmap(_ size: UInt64) -> Command {
        let blocks = UInt64(random.below(6))
        let address = random.pick([0, 3, size / 2, size &- 1]) as UInt64
        let list = CDB.unmapList([(address, blocks)])
        return Command(
            cdb: CDB.unmap(listLength: list.count), dataOut: list, address: address, blocks: blocks,
            values: Array(repeating: 0, count: Int(blocks)))
    }

    private static func controlPage(
        _ senseFormat: UInt8 = 0, taskSets: UInt8 = 0, queue: UInt8 = 0, interlock: UInt8 = 0,
        abortedStatus: UInt8 = 0
    ) -> [UInt8] {
        [0x0a, 10, senseFormat | taskSets, queue, interlock, abortedStatus, 0, 0, 0xff, 0xff, 0, 0]
    }

    private func controlPage() -> [UInt8] {
        let many = features.taskSets
        return Self.controlPage(
            random.pick([0, 4]), taskSets: many ? random.pick([0, 0x10, 0x20, 0x20]) : 0,
            queue: many ? random.pick([0, 0, 0x10]) | random.pick([0, 0, 2, 6]) : 0,
            interlock: many ? random.pick([0, 0, 0x20, 0x30]) : 0, abortedStatus: random.pick([0, 0x40]))
    }

    private static func cachingPage(_ isEnabled: Bool) -> [UInt8] {
        [0x08, 18, isEnabled ? 4 : 0] + Array(repeating: 0, count: 17)
    }

    /// Changes the control mode page or WCE, or nothing.
    private func modeSelect(_ entry: Unit?) -> Command {
        let hasCache = (entry?.medium.geometry.capabilities ?? 0) & UInt32(SCSI_BACKSTORE_VOLATILE_CACHE) != 0
        let page: [UInt8] =
            random.chance(1, in: 2)
            ? controlPage()
            : Self.cachingPage(hasCache && random.chance(1, in: 2))
        let list = [0, 0, 0, 0] + page
        return Command(
            cdb: CDB.modeSelect6(listLength: list.count), dataOut: list, modePage: (code: page[0], bytes: page))
    }

    /// Changes the state of one group or of both, perhaps into what it is.
    private func setTargetPortGroups() -> Command {
        let settable: [AsymmetricAccessState] = [
            .activeOptimized, .activeOptimized, .activeNonOptimized, .standby, .unavailable,
        ]
        let chosen = random.pick([[0], [1], [0, 1], [1, 0]]).map { (group: $0, state: random.pick(settable)) }
        let list = CDB.targetPortGroups(chosen.map { ($0.state.rawValue, UInt16($0.group + 1)) })
        return Command(cdb: CDB.setTargetPortGroups(listLength: list.count), dataOut: list, states: chosen)
    }

    /// A row of the table that does not change the medium, with random fields.
    private func anything() -> Command {
        var cdb = [random.pick(Self.knownCodes)]
        let lengths: [UInt8: Int] = [0: 6, 1: 10, 2: 10, 4: 16, 5: 12]
        while cdb.count < lengths[cdb[0] >> 5]! {
            cdb.append(random.chance(2, in: 3) ? 0 : random.pick([1, 2, 0x10, 0x3f, 0x7f, 0x80, 0xff]))
        }
        if cdb[0] == 0x1b { cdb[4] |= 1 }
        return Command(
            cdb: cdb, dataOut: cdb[0] == 0x15 || cdb[0] == 0x55 ? Array(repeating: 0, count: 300) : [],
            dataIn: random.pick([0, 8, 255, 4096]), isRandom: true)
    }

    // MARK: What the ports were called with

    private func completed(_ completion: Completion, on index: Int) {
        let key = Key(port: index, tag: completion.tag)
        note("I\(index) \(completion.tag) \(completion.summary)")
        guard let record = tracked.removeValue(forKey: key) else { return fail("command \(key) came back twice") }
        if completion.service == .suspended {
            comesBack(record, index)
        } else if let refusal = record.refusal {
            refused(record.unit!, refusal.task, completion, expected: refusal.summary)
        } else if let entry = record.unit {
            leave(entry, record, completion, index)
        }
        hasEnded = true
        if completion.service != .suspended { judge(record, completion, index) }
        for cookie in functions.keys { functions[cookie]!.waitsFor.remove(record.id) }
        if features.reentrant, !isBusy, depth == 0, failures.isEmpty, random.chance(1, in: 6) {
            depth += 1
            send(index)
            depth -= 1
        }
    }

    /// The command never was in the model's task set.
    private func refused(_ entry: Unit, _ task: ModelTask, _ completion: Completion, expected: String) {
        if completion.summary != expected {
            return fail("command \(completion.tag) ended \(completion.summary), and \(expected) was due")
        }
        syncEnabled(entry)
        if expected.contains("/") { entry.model.fault(task) }
        if expected == "busy", entry.model.control.interlock == 3 { entry.model.establish(0x2c07, for: task.nexus) }
    }

    /// Which commands the engine holds in the blocked state.
    private func syncParked(_ entry: Unit) {
        for index in entry.model.tasks.indices {
            let task = entry.model.tasks[index]
            entry.model.tasks[index].isParked = ports[task.nexus].task(task.tag)?.state == .blocked
        }
    }

    /// Which of the commands that may be enabled the engine has enabled since the last look. What ends or comes now may
    /// keep the others from it, and nothing says whether they went on before that; that all went on that may, `settle`
    /// sees.
    private func syncEnabled(_ entry: Unit) {
        for index in entry.model.tasks.indices {
            let task = entry.model.tasks[index]
            guard let handle = ports[task.nexus].task(task.tag) else { continue }
            switch handle.state {
            case .dormant where handle.waitsFor == .order, .free, .received, .completing: break
            case .dormant, .enabled, .transferring, .settling, .blocked: entry.model.enable(index)
            }
        }
    }

    /// The command leaves the model's task set: it must have been enabled, or have been ended.
    private func leave(_ entry: Unit, _ record: Tracked, _ completion: Completion, _ nexus: Int) {
        guard let position = entry.model.tasks.firstIndex(where: { $0.id == record.id }) else {
            return fail("a command came back that is not in the model")
        }
        let refused = entry.lun == nil && completion.summary == "5/2500"
        syncParked(entry)
        syncEnabled(entry)
        let expired = entry.model.tasks[position].isLate && completion.summary == "b/0801"
        if !entry.model.tasks[position].isEnabled, entry.model.tasks[position].mark == nil, !refused, !expired {
            entry.model.enable(through: record.id)
            if !entry.model.tasks[position].isEnabled {
                fail("command \(completion.tag) ended \(completion.summary) before it could be enabled")
            }
        }
        var task = entry.model.tasks.remove(at: position)
        if refused { return }
        let asked = record.command?.states ?? []
        // SPC-4 6.45: a transition is ended by who has begun it.
        if asked.contains(where: { states[$0.group] == .transitioning }) {
            task.refusal = Self.refusals[.transitioning]
        }
        // Suspended, it ends all the same if it has been done.
        if task.mark == nil, entry.model.isBlocked(task), !record.isSuspended {
            fail("command \(completion.tag) ended \(completion.summary) in spite of an ACA condition")
        }
        if let attention = task.attention {
            let expected = "6/" + String(UInt32(attention) | 0x10000, radix: 16).dropFirst()
            if completion.summary != expected {
                fail("unit attention \(expected) was due, and the command ended \(completion.summary)")
            }
            if entry.model.control.interlock == 0 { reportedAttention(attention, entry, nexus) }
        } else if completion.summary.hasPrefix("6/") {
            fail("unit attention \(completion.summary) is not pending")
        }
        if task.mark == nil, task.attention == nil { judgeAccess(task, completion, expired) }
        if completion.summary == "b/0801", !expired, !features.errors {
            fail("command \(completion.tag) ended by a deadline that had not come")
        }
        if let mark = task.mark {
            if completion.summary != mark { fail("an aborted command ended \(completion.summary) and not \(mark)") }
        } else if ["aborted", "reset", "taskAborted"].contains(completion.summary) {
            fail("command \(completion.tag) ended \(completion.summary), and nobody had aborted it")
        }
        if completion.summary.contains("/"), entry.lun != nil { entry.model.fault(task) }
        if completion.summary == "good" { portGroupsSet(asked, by: nexus, through: entry) }
    }

    /// A command is refused because of its port if, and only if, the state says so when it is enabled. A deferred error
    /// comes before.
    private func judgeAccess(_ task: ModelTask, _ completion: Completion, _ expired: Bool) {
        let isRefused = Self.refusals.values.contains(completion.summary)
        let isDeferred = completion.sense?.isDeferred == true
        if isRefused ? completion.summary != task.refusal : task.refusal != nil && !expired && !isDeferred {
            fail("command \(completion.tag) ended \(completion.summary), its port says \(task.refusal ?? "nothing")")
        }
    }

    private func reportedAttention(_ code: UInt16, _ entry: Unit, _ nexus: Int) {
        entry.model.clear(code, for: nexus)
        if code == 0x3f0e { for other in units where other.lun != nil { other.model.clear(code, for: nexus) } }
    }

    /// Whether the end of a command is one that it can have.
    private func judge(_ record: Tracked, _ completion: Completion, _ nexus: Int) {
        let summary = completion.summary
        if summary == "good", record.cdb[0] == 0x03 { judgeRequestSense(record, completion, nexus) }
        if summary == "good", record.cdb[0] == 0xa0 {
            for entry in units where entry.lun != nil { entry.model.clear(0x3f0e, for: nexus) }
        }
        judgeData(record, completion)
        guard !record.isRandom, record.refusal == nil, let entry = record.unit else { return }
        let ended = ["aborted", "reset", "taskAborted", "good"].contains(summary) || summary.hasPrefix("6/")
        if summary == "good", !record.fits { fail("a command whose buffers are too short ended with GOOD") }
        if ended || summary == "conditionMet" && [0x34, 0x90].contains(record.cdb[0]) { return }
        let outside = record.address > entry.blocks || record.blocks > entry.blocks - record.address
        let allowed: Bool =
            switch summary {
            case "overrun": !record.fits || features.shortBuffers && [0x03, 0xa0].contains(record.cdb[0])
            case "2/040a", "2/040b", "2/040c": features.access
            case "2/0402": features.startStop || features.anyCDB
            case "5/2500": features.removal
            case "b/0801": features.deadlines || features.errors
            case "5/2400 CDB 4", "5/2400 CDB 7", "5/2400 CDB 6", "5/2400 CDB 10", "5/2400 CDB 12":
                features.smallTransfers && record.blocks > 4
            case "e/1d00":
                // What a HEAD OF QUEUE or ACA command writes may come between WRITE AND VERIFY's write and its check.
                [0x2f, 0xaf, 0x8f, 0x89].contains(record.cdb[0])
                    || record.cdb[0] == 0x8e && (features.attributes || features.naca || features.anyCDB)
            default:
                summary.hasPrefix("5/2100")
                    ? outside || entry.wasResized : features.errors || entry.wasResized && summary.hasPrefix("3/")
            }
        if !allowed { fail("command \(record.cdb) ended \(summary)") }
    }

    private func judgeRequestSense(_ record: Tracked, _ completion: Completion, _ nexus: Int) {
        guard let entry = record.unit else { return }
        let pending = entry.model.attention[nexus]?.first
        if record.cdb[4] == 0 { return }
        guard !record.isRandom, let sense = Sense(completion.data) else {
            // Cut by its allocation length, as the initiator wished: it counts as reported.
            if let pending { reportedAttention(pending, entry, nexus) }
            return
        }
        if sense.key == 6 {
            if sense.code != pending {
                fail("REQUEST SENSE reported \(sense), pending is \(String(describing: pending))")
            }
            reportedAttention(sense.code, entry, nexus)
        } else if pending != nil {
            fail("REQUEST SENSE reported \(sense) and not the unit attention condition that is pending")
        }
    }

    private func judgeData(_ record: Tracked, _ completion: Completion) {
        let disablesWrite =
            record.cdb[0] == 0x53 && record.cdb[1] & 4 != 0
            || record.cdb[0] == 0x7f && record.cdb[9] == 7 && record.cdb[10] & 4 != 0
        let isRead = ([0x08, 0x28, 0xa8, 0x88].contains(record.cdb[0]) || disablesWrite) && !record.isRandom
        let isCompare = [0x2f, 0xaf, 0x8f].contains(record.cdb[0]) && !record.isRandom
        let reached =
            completion.service != .commandComplete || completion.status == .taskAborted
            || ["3", "4", "b", "7"].contains(completion.summary.prefix(1))
            // The medium became smaller, or the unit was removed, between the steps of the command.
            || completion.summary.hasPrefix("5/2100") && record.unit?.wasResized == true
            || completion.summary == "5/2500" && record.unit != nil
            // WRITE AND VERIFY has written what it did not find any more.
            || completion.summary == "e/1d00" && record.cdb[0] == 0x8e
        for write in record.writes {
            write.finish(completion.summary == "good" ? .certain : reached ? .possible : .none, at: step)
        }
        guard completion.summary == "good", isRead, !isCompare, let entry = record.unit else { return }
        guard completion.data.count == Int(record.blocks) * 512 else { return fail("a READ returned too few bytes") }
        for offset in 0..<record.blocks {
            let bytes = completion.data[Int(offset) * 512..<Int(offset + 1) * 512]
            let value = bytes.prefix(8).reduce(0) { $0 << 8 | UInt64($1) }
            if Array(bytes) != block(value) { return fail("a block is made of several writes") }
            if let wrong = entry.history.check(record.address + offset, value, begin: record.sentAt, end: step) {
                fail(wrong)
            }
        }
    }

    private func answered(_ cookie: UInt64, _ response: TaskManagementResponse, on port: Int) {
        guard let function = functions.removeValue(forKey: cookie), function.port == port else {
            return fail("task management function \(cookie) was answered twice, or to the wrong port")
        }
        if response != function.expected { fail("a function was answered \(response) and not \(function.expected)") }
        if !function.waitsFor.isEmpty { fail("a function was answered before the commands that it ended") }
    }

    // MARK: Task management, nexus loss, changes of the target

    private func marked(_ entry: Unit, _ select: (ModelTask) -> Bool = { _ in true }) -> Set<Int> {
        Set(entry.model.tasks.filter { $0.mark != nil && select($0) }.map(\.id))
    }

    private func manage(_ index: Int) {
        guard ports[index].nexus != nil else { return }
        let entry = random.chance(1, in: 15) ? nil : units.filter { $0.lun != nil }.randomElement(using: &random)
        let isFaulted = entry?.model.faulted.contains(index) == true
        let function =
            isFaulted && random.chance(1, in: 2) ? .clearACA : random.pick(TaskManagementFunction.allCases)
        manage(index, function, entry)
    }

    private func manage(_ index: Int, _ function: TaskManagementFunction, _ entry: Unit?) {
        let victims = tracked.keys.filter { $0.port == index }.sorted { $0.tag < $1.tag }
        let tag = victims.randomElement(using: &random)?.tag ?? 999_999
        let cookie = nextCookie
        nextCookie += 1
        var waitsFor: Set<Int> = []
        var expected = TaskManagementResponse.functionComplete
        var afterwards: [() -> Void] = []
        let anybody = units.filter { !$0.model.tasks.isEmpty || $0.lun != nil }
        switch function {
        case .targetReset:
            for entry in anybody { waitsFor.formUnion(reset(entry, by: index, &afterwards)) }
        case .nexusReset:
            for entry in anybody {
                entry.model.mark { $0.nexus == index ? "reset" : nil }
                entry.model.faulted.remove(index)
                waitsFor.formUnion(marked(entry) { $0.nexus == index })
                afterwards.append { entry.model.establish(0x2907, for: index) }
            }
        default:
            if let entry {
                (waitsFor, expected) = perform(function, entry, index, tag, &afterwards)
            } else {
                expected = .incorrectLogicalUnitNumber
            }
        }
        functions[cookie] = Function(port: index, waitsFor: waitsFor, expected: expected)
        note("I\(index) \(function) lun \(entry?.lun?.number ?? 77) tag \(tag)")
        let ended = endedWhileWaiting()
        isBusy = true
        ports[index].manage(function, lun: entry?.lun?.field ?? 77 << 48, tag: tag, cookie: cookie)
        isBusy = false
        checkGone(ended)
        if function == .queryAsynchronousEvent, let entry { checkAdditionalResponse(entry, index) }
        if planted == .earlyAnswer, functions[cookie] != nil { answered(cookie, expected, on: index) }
        for effect in afterwards { effect() }
    }

    private func reset(_ entry: Unit, by index: Int, _ afterwards: inout [() -> Void]) -> Set<Int> {
        entry.model.markForReset(by: index)
        entry.model.faulted = []
        afterwards.append { [unowned self] in
            entry.model.modePages = entry.model.defaultModePages
            for nexus in self.ports.indices { entry.model.establish(0x2903, for: nexus) }
        }
        return marked(entry)
    }

    private func perform(
        _ function: TaskManagementFunction, _ entry: Unit, _ index: Int, _ tag: UInt64, _ afterwards: inout [() -> Void]
    ) -> (Set<Int>, TaskManagementResponse) {
        let found: Bool
        switch function {
        case .abortTask:
            entry.model.mark { $0.nexus == index && $0.tag == tag ? "aborted" : nil }
            return (marked(entry) { $0.nexus == index && $0.tag == tag }, .functionComplete)
        case .abortTaskSet:
            entry.model.mark { $0.nexus == index ? "aborted" : nil }
            return (marked(entry) { $0.nexus == index }, .functionComplete)
        case .clearTaskSet:
            let separate = entry.model.control.separate
            entry.model.clear(by: index)
            return (marked(entry) { !separate || $0.nexus == index }, .functionComplete)
        case .clearACA:
            entry.model.mark { $0.nexus == index && $0.attribute == .aca ? "aborted" : nil }
            entry.model.faulted.remove(index)
            return (marked(entry) { $0.nexus == index && $0.attribute == .aca }, .functionComplete)
        case .logicalUnitReset: return (reset(entry, by: index, &afterwards), .functionComplete)
        case .queryTask: found = entry.model.tasks.contains { $0.nexus == index && $0.tag == tag && $0.mark == nil }
        case .queryTaskSet: found = entry.model.tasks.contains { $0.nexus == index && $0.mark == nil }
        case .queryAsynchronousEvent: found = entry.model.attention[index]?.isEmpty == false
        case .targetReset, .nexusReset: preconditionFailure("a function of the whole target")
        }
        return ([], found ? .functionSucceeded : .functionComplete)
    }

    /// SAM-6 7.10: what is pending first, and whether there is more.
    private func checkAdditionalResponse(_ entry: Unit, _ index: Int) {
        let pending = entry.model.attention[index] ?? []
        let expected = pending.first.map { UInt32($0) | 6 << 16 | (pending.count == 1 ? 1 : 2) << 20 } ?? 0
        if ports[index].additionalResponse != expected {
            fail("QUERY ASYNCHRONOUS EVENT said \(String(ports[index].additionalResponse, radix: 16))")
        }
    }

    /// Suspends a group of a port: each of its commands comes back to be sent again, or ends.
    private func suspend(_ index: Int) {
        let group = UInt8(random.below(2))
        let isUnderWay = functions.values.contains { $0.port == index && $0.group == group }
        guard ports[index].nexus != nil, !isUnderWay else { return }
        let members = tracked.filter { $0.key.port == index && $0.value.unit != nil && $0.value.group == group }
        let cookie = nextCookie
        nextCookie += 1
        functions[cookie] = Function(
            port: index, waitsFor: Set(members.values.map(\.id)), expected: .functionComplete, group: group)
        note("I\(index) suspends group \(group)")
        for record in members.values { record.isSuspended = true }
        isBusy = true
        if planted != .suspensionForgotten { ports[index].suspend(group: group, cookie: cookie) }
        isBusy = false
        for (key, record) in members where tracked[key] === record {
            guard let task = ports[index].task(key.tag) else { return fail("a command came back without a trace") }
            let hasBegun = task.state == .dormant && [.thaw, .backstore, .recovery].contains(task.waitsFor)
            // MODE SELECT, COMPARE AND WRITE, ORWRITE: may be past what can be done twice.
            let mayWait = hasBegun && [0x15, 0x55, 0x89, 0x8b].contains(record.cdb[0])
            if task.state != .transferring, !mayWait { fail("command \(key.tag) is suspended, and waits") }
        }
    }

    /// A command has come back that is to be sent again: nobody else learns of it.
    private func comesBack(_ record: Tracked, _ index: Int) {
        guard let entry = record.unit, record.isSuspended, record.refusal == nil,
            let position = entry.model.tasks.firstIndex(where: { $0.id == record.id })
        else { return fail("a command came back suspended that nobody had suspended") }
        let task = entry.model.tasks.remove(at: position)
        if task.mark != nil { fail("an aborted command came back suspended") }
        for write in record.writes { write.finish(task.isEnabled ? .possible : .none, at: step) }
        suspended[index, default: []].append(record)
    }

    private func loseOrEstablish(_ index: Int) {
        let port = ports[index]
        note("I\(index) \(port.nexus == nil ? "comes back" : "is lost")")
        if port.nexus != nil {
            for entry in units {
                entry.model.mark { $0.nexus == index ? "aborted" : nil }
                entry.model.faulted.remove(index)
            }
            functions = functions.filter { $0.value.port != index }
            let ended = endedWhileWaiting()
            isBusy = true
            port.disconnect()
            isBusy = false
            checkGone(ended)
        } else if port.tagsInFlight.isEmpty {
            for entry in units where entry.lun != nil { entry.model.establish(0x2907, for: index) }
            port.connect()
        } else if ports.count < 12 {
            addPort()
        }
    }

    /// Lets the deadlines that have come pass: what waits ends at once, save what an ACA condition blocks.
    private func expire() {
        note("deadlines pass")
        var late: Set<Int> = []
        for entry in units where entry.unit.commandTimeout != 0 {
            for (index, task) in entry.model.tasks.enumerated() where task.mark == nil && !task.isLate {
                guard shard.now - task.arrival >= entry.unit.commandTimeout else { continue }
                entry.model.tasks[index].isLate = true
                late.insert(task.id)
            }
        }
        isBusy = true
        if planted != .deadlineForgotten { shard.expireDeadlines() }
        isBusy = false
        for entry in units {
            syncParked(entry)
            for (index, task) in entry.model.tasks.enumerated() where late.contains(task.id) && task.mark == nil {
                if ports[task.nexus].task(task.tag)?.state == .transferring { continue }
                if !entry.model.isBlocked(task) { fail("command \(task.tag) waits, and its deadline has passed") }
                entry.model.tasks[index].isLate = false
            }
        }
    }

    /// With what ports refuse commands now, by nexus.
    private var refusals: [Int: String] {
        Dictionary(
            uniqueKeysWithValues: ports.indices.compactMap { index in
                Self.refusals[states[index % 2]].map { (index, $0) }
            })
    }

    private static let refusals: [AsymmetricAccessState: String] = [
        .standby: "2/040b", .unavailable: "2/040c", .transitioning: "2/040a",
    ]

    /// The sense data with which a command can be refused because of its port (SPC-4 5.15.2.4). Service actions of
    /// random bits may be none that there is.
    private static func refusals(of cdb: [UInt8]) -> Set<String> {
        switch cdb[0] {
        case 0x03, 0x12, 0xa0: []
        case 0x15, 0x1a, 0x25, 0x55, 0x5a: ["2/040a", "2/040c"]
        case 0x9e where cdb[1] & 0x1f == 0x10: ["2/040a", "2/040c"]
        case 0x9e where cdb[1] & 0x1f != 0x12: []
        case 0xa3 where ![0x0c, 0x0d, 0x0f].contains(cdb[1] & 0x1f): []
        case 0xa4: ["2/040a"]
        default: ["2/040a", "2/040b", "2/040c"]
        }
    }

    private func changeAccess() {
        let group = random.below(2)
        set(random.pick(AsymmetricAccessState.allCases), group)
    }

    private func set(_ state: AsymmetricAccessState, _ group: Int) {
        guard states[group] != state else { return }
        note("port group \(group + 1) is \(state)")
        states[group] = state
        accessChanged { _, _ in true }
        target.setAccessState(state, ofPortGroup: UInt16(group + 1))
    }

    /// SET TARGET PORT GROUPS has done what it asked for. Its nexus knows it of the unit that it was sent to.
    private func portGroupsSet(
        _ new: [(group: Int, state: AsymmetricAccessState)], by nexus: Int, through asked: Unit
    ) {
        let old = states
        for (group, state) in new { states[group] = state }
        guard states != old else { return }
        for entry in units { syncEnabled(entry) }
        accessChanged { $0 !== asked || $1 != nexus }
    }

    private func accessChanged(tells: (Unit, Int) -> Bool) {
        for entry in units where entry.lun != nil {
            for nexus in ports.indices where tells(entry, nexus) { entry.model.establish(0x2a06, for: nexus) }
            entry.model.access = refusals
        }
    }

    private func resize() {
        guard let entry = units.filter({ $0.lun != nil }).randomElement(using: &random) else { return }
        let blocks = random.pick([8, 16, 64, 600, 601]) as UInt64
        if blocks != entry.blocks {
            for nexus in ports.indices { entry.model.establish(0x2a09, for: nexus) }
        }
        note("LUN \(entry.lun!.number) has \(blocks) blocks and had \(entry.blocks)")
        entry.blocks = blocks
        entry.wasResized = true
        entry.medium.geometry.size = blocks * 512
        entry.unit.backstoreGeometryChanged()
    }

    private func removeOrAdd() {
        let free = LUN(random.below(4))!
        if random.chance(1, in: 2), let entry = units.filter({ $0.lun != nil }).randomElement(using: &random) {
            let lun = entry.lun!
            entry.lun = nil
            for other in units where other.lun != nil {
                for nexus in ports.indices { other.model.establish(0x3f0e, for: nexus) }
            }
            note("LUN \(lun.number) is removed")
            entry.model.faulted = []
            isBusy = true
            target.remove(at: lun) { entry.isDrained = true }
            isBusy = false
        } else if !units.contains(where: { $0.lun == free }) {
            if let drained = units.first(where: { $0.lun == nil && $0.isDrained }) {
                map(drained, at: free)
            } else if units.count < 6 {
                addUnit(at: free)
            }
        }
    }

    /// The marked commands that the medium does not have.
    private func endedWhileWaiting() -> [ModelTask] {
        units.flatMap(\.model.tasks).filter {
            $0.mark != nil && ports[$0.nexus].task($0.tag)?.state != .transferring
        }
    }

    /// A command that was ended while it waited is gone, and was not handed to the medium on the way.
    private func checkGone(_ ended: [ModelTask]) {
        let left = Set(units.flatMap(\.model.tasks).map(\.id))
        for task in ended where left.contains(task.id) {
            fail("command \(task.tag) was aborted while it waited, and was handed to the medium")
        }
    }

    /// After a command has ended, nobody waits for what there is.
    private func checkNobodyWaits(on medium: ScriptedBackstore) {
        let handles = units.flatMap { entry in
            entry.model.tasks.map { (medium: entry.medium, task: ports[$0.nexus].task($0.tag)!) }
        }
        let staging = handles.filter { $0.task.staging >= 0 }.count
        for (owner, task) in handles where task.state == .dormant {
            if task.waitsFor == .backstore, owner === medium, medium.pending.count < medium.capacity {
                fail("a command waits for room in a medium that has room")
            }
            if task.waitsFor == .staging, staging < Limits.stagingBuffers {
                fail("a command waits for a staging buffer, and one is free")
            }
        }
    }

    // MARK: What holds after each step

    private func settle() {
        for entry in units {
            syncParked(entry)
            entry.model.enable()
            for task in entry.model.tasks { check(task, entry) }
            if entry.lun == nil, entry.isDrained != (entry.model.tasks.isEmpty && !entry.isFlushing) {
                fail("a removed unit is \(entry.isDrained ? "" : "not ")drained with \(entry.model.tasks.count) tasks")
            }
        }
        for (cookie, function) in functions where function.waitsFor.isEmpty {
            fail("task management function \(cookie) has nothing to wait for and is not answered")
        }
        if step % 8 == 0 { for port in ports { port.checkRetiredMemory() } }
        for rule in violations.found { fail(rule) }
    }

    /// The engine must hold a command in the state that the model gives it.
    private func check(_ task: ModelTask, _ entry: Unit) {
        guard let handle = ports[task.nexus].task(task.tag) else { return fail("a command came back without a trace") }
        let waits = handle.state == .dormant && handle.waitsFor == .order
        if waits == task.isEnabled, task.mark == nil {
            fail("command \(task.tag) \(task.attribute) is \(waits ? "dormant" : "enabled") and should not be")
        }
        if task.isParked, !task.isEnabled || !entry.model.isBlocked(task) {
            // Before it could begin; and a task set of another nexus works on its blocks.
            let mayWait = entry.model.control.separate && handle.waitsFor == .staging
            if !mayWait { fail("command \(task.tag) is blocked, and there is no ACA condition") }
        }
        if task.isEnabled, task.attention != nil, !task.isParked {
            fail("unit attention \(String(task.attention!, radix: 16)) was not reported to command \(task.tag)")
        }
        if task.mark != nil, handle.state != .transferring {
            fail("an aborted command is \(handle.state) and not with the medium, and has not ended")
        }
    }

    // MARK: Planted bugs

    private func plant(_ completion: Completion, on port: Int) -> [Completion] {
        if let repeated = attentionToRepeat, repeated.key == port, completion.summary == "good", !hasPlanted {
            hasPlanted = true
            return [completion.replacing(status: .checkCondition, sense: repeated.sense)]
        }
        guard step > 20, !hasPlanted else { return [completion] }
        switch planted {
        case .lostCompletion: hasPlanted = true; return []
        case .doubledCompletion: hasPlanted = true; return [completion, completion]
        case .lostUnitAttention where completion.summary.hasPrefix("6/"):
            hasPlanted = true
            return [completion.replacing(status: .good, sense: [])]
        case .doubledUnitAttention where completion.summary.hasPrefix("6/"):
            attentionToRepeat = (key: port, sense: completion.senseBytes)
            return [completion]
        case .wrongData where completion.data.count >= 512 && completion.summary == "good":
            hasPlanted = true
            return [completion.replacing(byte: 5, with: 0x77)]
        default: return [completion]
        }
    }
}
