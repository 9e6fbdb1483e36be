// Small worlds: every order in which up to three commands of each task attribute, on two nexuses, arrive, end, and meet
// one task management function, compared with the reference model.
//
// Called by: its own tests. Must not know: the engine.

import CoreTestSupport
import Glibc
import SCSICore
import Testing

/// What is the same in all schedules of one world.
struct SmallWorldShape: CustomStringConvertible {
    /// The attribute of each command.
    var attributes: [TaskAttribute]
    /// Which commands B sends; A sends the others, and the function.
    var isFromB: [Bool]
    /// Whether the commands write overlapping extents, or read blocks apart.
    var overlaps: Bool
    /// Whether a command may end before the last has arrived.
    var interleaves: Bool
    var function: TaskManagementFunction
    /// Which command ABORT TASK and QUERY TASK name.
    var victim: Int
    /// Whether TAS is one.
    var hasTAS: Bool

    var description: String {
        "\(attributes) B \(isFromB) overlap \(overlaps) \(function) of \(victim) TAS \(hasTAS)"
    }
}

/// Replays schedules of one shape on one target.
final class SmallWorld {
    private let world = TestTarget()
    private var shape: SmallWorldShape
    private var model = ModelUnit()
    private var expected: [String] = []
    private var waitsFor: Set<Int>?
    private var tags: [Int: UInt64] = [:]
    private var arrived = 0
    private var isManaged = false
    private(set) var schedules = 0

    private enum Action {
        case arrive, manage
        case complete(Int)
    }

    init(_ shape: SmallWorldShape) { self.shape = shape }

    /// Runs every schedule of a shape.
    ///
    /// - Returns: What is wrong with the first schedule that differs from the model.
    func exhaust(_ shape: SmallWorldShape) -> String? {
        self.shape = shape
        var choices: [(taken: Int, of: Int)] = []
        repeat {
            schedules += 1
            if let wrong = replay(&choices) { return "\(shape), choices \(choices.map(\.taken)): \(wrong)" }
            while let last = choices.last, last.taken + 1 == last.of { choices.removeLast() }
            if !choices.isEmpty { choices[choices.count - 1].taken += 1 }
        } while !choices.isEmpty
        return nil
    }

    private func replay(_ choices: inout [(taken: Int, of: Int)]) -> String? {
        begin()
        var depth = 0
        while true {
            let actions = options
            if actions.isEmpty { break }
            if depth == choices.count { choices.append((taken: 0, of: actions.count)) }
            expected = []
            world.journal.entries = []
            perform(actions[choices[depth].taken])
            depth += 1
            if world.journal.lines != expected { return "got \(world.journal.lines), the model says \(expected)" }
            let pending = Set(world.backstore.pending.map(\.offset))
            let enabled = Set(model.tasks.filter(\.isEnabled).map { offset($0.id) })
            if pending != enabled { return "the medium has \(pending.sorted()), the model \(enabled.sorted())" }
        }
        return model.tasks.isEmpty && waitsFor == nil ? nil : "something is left at the end"
    }

    private func begin() {
        for port in [world.a, world.b] {
            repeat {
                _ = world.run(CDB.requestSense(), dataIn: 18, on: port)
            } while Sense(port.completions.last!.data)?.key != 0
        }
        world.setTAS(shape.hasTAS)
        model = ModelUnit()
        model.attention = [0: [], 1: []]
        waitsFor = nil
        tags = [:]
        arrived = 0
        isManaged = false
    }

    private var options: [Action] {
        let all = arrived == shape.attributes.count
        var actions: [Action] = all ? [] : [.arrive]
        if all || shape.interleaves { actions += world.backstore.pending.indices.map { .complete($0) } }
        if !isManaged { actions.append(.manage) }
        return actions
    }

    private func offset(_ id: Int) -> UInt64 { UInt64(id) * (shape.overlaps ? 512 : 512 * 8) }

    private func name(_ nexus: Int) -> String { nexus == 0 ? "A" : "B" }

    private func perform(_ action: Action) {
        switch action {
        case .arrive: arrive()
        case .complete(let index):
            let address = world.backstore.pending[index].offset
            let position = model.tasks.firstIndex { $0.isEnabled && offset($0.id) == address }!
            leave(position, model.tasks[position].mark ?? "good")
            settle()
            world.backstore.complete(index)
        case .manage:
            isManaged = true
            manage()
        }
    }

    private func arrive() {
        let id = arrived
        arrived += 1
        let address = offset(id) / 512
        let cdb = shape.overlaps ? CDB.write(.ten, address, 4) : CDB.read(.ten, address, 4)
        let nexus = shape.isFromB[id] ? 1 : 0
        let tag = UInt64(1_000_000 + schedules * 8 + id)
        tags[id] = tag
        model.tasks.append(
            ModelTask(
                id: id, nexus: nexus, tag: tag, attribute: shape.attributes[id], access: ModelAccess(cdb: cdb),
                passesUnitAttention: false))
        settle()
        (nexus == 0 ? world.a : world.b).send(
            cdb, attribute: shape.attributes[id], dataOut: shape.overlaps ? Array(repeating: 1, count: 2048) : [],
            dataIn: shape.overlaps ? 0 : 2048, tag: tag)
    }

    /// Enables what may be enabled, one command after the other; one that has a unit attention to report ends at once.
    private func settle() {
        while let index = model.tasks.indices.first(where: {
            !model.tasks[$0].isEnabled && model.tasks[$0].mark == nil && model.mayBeEnabled($0)
        }) {
            model.enable(index)
            guard let code = model.tasks[index].attention else { continue }
            model.clear(code, for: model.tasks[index].nexus)
            leave(index, "6/" + String(UInt32(code), radix: 16))
        }
    }

    /// A command ends: the function that waits for it may be answered.
    private func leave(_ index: Int, _ summary: String) {
        let task = model.tasks.remove(at: index)
        expected.append("\(name(task.nexus)) \(task.tag) \(summary)")
        guard waitsFor?.remove(task.id) != nil, waitsFor!.isEmpty else { return }
        waitsFor = nil
        expected.append("A function 5 functionComplete")
    }

    // MARK: Task management functions, as SAM-6 clause 7 has them

    private func manage() {
        let tag = tags[shape.victim] ?? 1
        var response = TaskManagementResponse.functionComplete
        var attention: [(UInt16, Int)] = []
        switch shape.function {
        case .abortTask: mark { $0.nexus == 0 && $0.tag == tag ? "aborted" : nil }
        case .abortTaskSet: mark { $0.nexus == 0 ? "aborted" : nil }
        case .clearTaskSet:
            if !shape.hasTAS, model.tasks.contains(where: { $0.nexus == 1 }) { attention = [(0x2f00, 1)] }
            mark { $0.nexus == 1 && shape.hasTAS ? "taskAborted" : "aborted" }
        case .logicalUnitReset, .targetReset:
            mark { $0.nexus == 1 && shape.hasTAS ? "taskAborted" : "reset" }
            attention = [(0x2903, 0), (0x2903, 1)]
        case .nexusReset:
            mark { $0.nexus == 0 ? "reset" : nil }
            attention = [(0x2907, 0)]
        case .queryTask:
            if model.tasks.contains(where: { $0.nexus == 0 && $0.tag == tag }) { response = .functionSucceeded }
        case .queryTaskSet: if model.tasks.contains(where: { $0.nexus == 0 }) { response = .functionSucceeded }
        case .clearACA, .queryAsynchronousEvent: response = .functionRejected
        }
        while let index = model.tasks.firstIndex(where: { $0.mark != nil && !$0.isEnabled }) {
            leave(index, model.tasks[index].mark!)
        }
        settle()
        for (code, nexus) in attention { model.establish(code, for: nexus) }
        let marked = Set(model.tasks.filter { $0.mark != nil }.map(\.id))
        if marked.isEmpty { expected.append("A function 5 \(response)") } else { waitsFor = marked }
        world.a.manage(shape.function, tag: tag, cookie: 5)
    }

    private func mark(_ select: (ModelTask) -> String?) {
        for index in model.tasks.indices { model.tasks[index].mark = select(model.tasks[index]) }
    }
}

extension TestTarget {
    /// Makes TAS what it shall be, by MODE SELECT of A; B is not told.
    func setTAS(_ value: Bool) {
        let page = run(CDB.modeSense6(0x0a), dataIn: 255).data[4...]
        guard (page[page.startIndex + 5] & 0x40 != 0) != value else { return }
        var list: [UInt8] = [0, 0, 0, 0] + page
        list[9] ^= 0x40
        _ = run(CDB.modeSelect6(listLength: list.count), dataOut: list)
        _ = run(CDB.requestSense(), dataIn: 18, on: b)
    }
}

@Suite("Small worlds")
struct SmallWorldTests {
    /// How many commands at once: TARGETD_SMALL_WORLD, 3 if it is not set.
    private static var limit: Int {
        unsafe getenv("TARGETD_SMALL_WORLD").flatMap { unsafe Int(String(cString: $0)) } ?? 3
    }

    private static func attributes(_ count: Int) -> [[TaskAttribute]] {
        count == 0 ? [[]] : attributes(count - 1).flatMap { rest in TaskAttribute.allCases.map { rest + [$0] } }
    }

    /// All of A, and each single command from B.
    private static func senders(_ count: Int) -> [[Bool]] {
        (-1..<count).map { other in (0..<count).map { $0 == other } }
    }

    @Test(
        "Every schedule of one and two commands with a function at each point",
        arguments: TaskManagementFunction.allCases)
    func upToTwo(function: TaskManagementFunction) {
        for hasTAS in [false, true] {
            var shape = SmallWorldShape(
                attributes: [], isFromB: [], overlaps: false, interleaves: true, function: function, victim: 0,
                hasTAS: hasTAS)
            let world = SmallWorld(shape)
            for count in 1...2 {
                for (attributes, senders) in product(Self.attributes(count), Self.senders(count)) {
                    for (overlaps, victim) in product([false, true], Array(0..<count)) {
                        shape.attributes = attributes
                        shape.isFromB = senders
                        shape.overlaps = overlaps
                        shape.victim = victim
                        if let wrong = world.exhaust(shape) {
                            Issue.record("\(wrong)")
                            return
                        }
                    }
                }
            }
        }
    }

    @Test(
        "Three commands in the task set, every order of ends, with a function at each point",
        arguments: TaskManagementFunction.allCases)
    func three(function: TaskManagementFunction) {
        for count in 3...max(3, Self.limit) {
            var shape = SmallWorldShape(
                attributes: [], isFromB: [], overlaps: false, interleaves: false, function: function, victim: 1,
                hasTAS: false)
            let world = SmallWorld(shape)
            for (attributes, senders) in product(Self.attributes(count), Self.senders(count)) {
                // The ACA attribute is treated as SIMPLE; three commands of it add nothing over two.
                if count < 4, attributes.filter({ $0 == .aca }).count > 1 { continue }
                shape.attributes = attributes
                shape.isFromB = senders
                shape.overlaps = senders.last!
                if let wrong = world.exhaust(shape) {
                    Issue.record("\(wrong)")
                    return
                }
            }
        }
    }

    private func product<First, Second>(_ first: [First], _ second: [Second]) -> [(First, Second)] {
        first.flatMap { left in second.map { (left, $0) } }
    }
}
