// Small worlds: every order in which up to four commands of each task attribute, on two nexuses, arrive, end or fail,
// and meet one task management function, compared with the reference model.
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
    var overlaps = false
    /// Whether a command may end before the last has arrived.
    var interleaves = true
    var function: TaskManagementFunction
    /// Which command ABORT TASK and QUERY TASK name.
    var victim = 0
    /// What the control mode page says.
    var control = ModelControl()
    /// Whether NACA is one in each command.
    var hasNACA = false
    /// How many commands may fail at the medium.
    var failures = 0

    var description: String {
        """
        \(attributes) B \(isFromB) overlap \(overlaps) \(function) of \(victim) NACA \(hasNACA) TST \(control.separate) \
        QErr \(control.queueError) TAS \(control.taskAborted)
        """
    }
}

/// Replays schedules on one target.
final class SmallWorld {
    private let world = TestTarget()
    private var shape: SmallWorldShape
    private var model = ModelUnit()
    private var expected: [String] = []
    private var waitsFor: Set<Int>?
    private var tags: [Int: UInt64] = [:]
    private var arrived = 0
    private var failed = 0
    private var isManaged = false
    /// What the unit's control mode page says; a reset sets it back.
    private var control = ModelControl()
    private(set) var schedules = 0

    private enum Action {
        case arrive, manage
        case complete(Int, fails: Bool)
        /// When nothing else can happen any more: CLEAR ACA by each faulted nexus.
        case recover
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
            let enabled = Set(model.tasks.filter { $0.isEnabled && !$0.isParked }.map { offset($0.id) })
            if pending != enabled { return "the medium has \(pending.sorted()), the model \(enabled.sorted())" }
        }
        return model.tasks.isEmpty && waitsFor == nil ? nil : "something is left at the end"
    }

    private func begin() {
        for port in [world.a, world.b] {
            calm(port)
            port.forgetPast()
        }
        world.backstore.forgetPast()
        if control != shape.control {
            world.setControlMode(shape.control)
            control = shape.control
        }
        model = ModelUnit()
        model.control = control
        model.attention = [0: [], 1: []]
        waitsFor = nil
        tags = [:]
        arrived = 0
        failed = 0
        isManaged = false
    }

    /// Takes the unit attention conditions away that the last schedule has left.
    private func calm(_ port: MockPort) {
        repeat {
            port.send(CDB.requestSense(), dataIn: 18)
        } while port.completions.last!.buffer[2] & 0x0f != 0
    }

    private var options: [Action] {
        let all = arrived == shape.attributes.count
        var actions: [Action] = all ? [] : [.arrive]
        if all || shape.interleaves {
            let pending = world.backstore.pending.indices
            actions += pending.map { .complete($0, fails: false) }
            if failed < shape.failures { actions += pending.map { .complete($0, fails: true) } }
        }
        if !isManaged { actions.append(.manage) }
        if actions.isEmpty, !model.faulted.isEmpty { actions.append(.recover) }
        return actions
    }

    private func offset(_ id: Int) -> UInt64 { UInt64(id) * (shape.overlaps ? 512 : 512 * 8) }

    private func name(_ nexus: Int) -> String { nexus == 0 ? "A" : "B" }

    private func perform(_ action: Action) {
        switch action {
        case .arrive: arrive()
        case .complete(let index, let fails):
            if fails { failed += 1 }
            let address = world.backstore.pending[index].offset
            let position = model.tasks.firstIndex { $0.isEnabled && !$0.isParked && offset($0.id) == address }!
            let sense = shape.overlaps ? "3/0c00" : "3/1100"
            end(position, model.tasks[position].mark ?? (fails ? sense : "good"))
            settle()
            world.backstore.complete(index, error: fails ? EIO : 0)
        case .manage:
            isManaged = true
            manage()
        case .recover: recover()
        }
    }

    private func arrive() {
        let id = arrived
        arrived += 1
        let address = offset(id) / 512
        var cdb = shape.overlaps ? CDB.write(.ten, address, 4) : CDB.read(.ten, address, 4)
        if shape.hasNACA { cdb[9] |= 0x04 }
        let nexus = shape.isFromB[id] ? 1 : 0
        let tag = UInt64(1_000_000 + schedules * 8 + id)
        tags[id] = tag
        var task = ModelTask(
            id: id, nexus: nexus, tag: tag, attribute: shape.attributes[id], access: ModelAccess(cdb: cdb),
            passesUnitAttention: false)
        task.hasNACA = shape.hasNACA
        if let refusal = model.refusal(nexus, task.attribute, hasNACA: task.hasNACA) {
            expected.append("\(name(nexus)) \(tag) \(refusal)")
            if refusal.hasPrefix("5") {
                model.fault(task)
                endMarked()
            }
        } else {
            model.tasks.append(task)
        }
        settle()
        (nexus == 0 ? world.a : world.b).send(
            cdb, attribute: shape.attributes[id], dataOut: shape.overlaps ? Array(repeating: 1, count: 2048) : [],
            dataIn: shape.overlaps ? 0 : 2048, tag: tag)
    }

    /// Lets go on what may go on, one command after the other; one that has a unit attention to report ends at once.
    private func settle() {
        while let index = model.tasks.indices.first(where: mayGoOn) {
            if let held = model.tasks[index].held {
                leave(index, held)
                continue
            }
            model.enable(index)
            guard let code = model.tasks[index].attention else { continue }
            model.clear(code, for: model.tasks[index].nexus)
            leave(index, "6/" + String(UInt32(code), radix: 16))
        }
    }

    private func mayGoOn(_ index: Int) -> Bool {
        let task = model.tasks[index]
        if task.mark != nil { return false }
        return task.isParked ? !model.isBlocked(task) : !task.isEnabled && model.mayBeEnabled(index)
    }

    /// The medium is done with a command; an ACA condition may keep it from ending.
    private func end(_ index: Int, _ summary: String) {
        let task = model.tasks[index]
        if task.mark == nil, model.isBlocked(task) {
            model.tasks[index].isParked = true
            model.tasks[index].held = summary
        } else {
            leave(index, summary)
        }
    }

    /// A command ends: the function that waits for it may be answered, and CHECK CONDITION may end others.
    private func leave(_ index: Int, _ summary: String) {
        let task = model.tasks.remove(at: index)
        let isFault = summary.contains("/")
        if isFault { model.fault(task) }
        expected.append("\(name(task.nexus)) \(task.tag) \(summary)")
        if waitsFor?.remove(task.id) != nil, waitsFor!.isEmpty {
            waitsFor = nil
            expected.append("A function 5 functionComplete")
        }
        if isFault { endMarked() }
    }

    /// What is marked and not with the medium ends at once.
    private func endMarked() {
        while let index = model.tasks.firstIndex(where: { $0.mark != nil && (!$0.isEnabled || $0.isParked) }) {
            leave(index, model.tasks[index].mark!)
        }
    }

    // MARK: Task management functions, as SAM-6 clause 7 has them

    private func manage() {
        let tag = tags[shape.victim] ?? 1
        var response = TaskManagementResponse.functionComplete
        var scope: (ModelTask) -> Bool = { _ in false }
        switch shape.function {
        case .abortTask: scope = { $0.nexus == 0 && $0.tag == tag }
        case .abortTaskSet: scope = { $0.nexus == 0 }
        case .clearTaskSet: scope = { [separate = model.control.separate] in !separate || $0.nexus == 0 }
        case .clearACA: scope = { $0.nexus == 0 && $0.attribute == .aca }
        case .logicalUnitReset, .targetReset: scope = { _ in true }
        case .nexusReset: scope = { $0.nexus == 0 }
        case .queryTask:
            let found = model.tasks.contains { $0.nexus == 0 && $0.tag == tag && $0.mark == nil }
            if found { response = .functionSucceeded }
        case .queryTaskSet:
            if model.tasks.contains(where: { $0.nexus == 0 && $0.mark == nil }) { response = .functionSucceeded }
        case .queryAsynchronousEvent: if !model.attention[0]!.isEmpty { response = .functionSucceeded }
        }
        perform(shape.function, scope)
        let ending = Set(model.tasks.filter { $0.mark != nil && scope($0) }.map(\.id))
        if ending.isEmpty { expected.append("A function 5 \(response)") } else { waitsFor = ending }
        world.a.manage(shape.function, tag: tag, cookie: 5)
    }

    private func perform(_ function: TaskManagementFunction, _ scope: @escaping (ModelTask) -> Bool) {
        let mark: (ModelTask) -> String? = { scope($0) ? "aborted" : nil }
        switch function {
        case .abortTask, .abortTaskSet: model.mark(mark)
        case .clearTaskSet: model.clear(by: 0)
        case .clearACA: model.mark { [faulted = model.faulted] in faulted.contains(0) ? mark($0) : nil }
        case .nexusReset: model.mark { scope($0) ? "reset" : nil }
        case .logicalUnitReset, .targetReset: model.markForReset(by: 0)
        case .queryTask, .queryTaskSet, .queryAsynchronousEvent: return
        }
        endMarked()
        settle()
        switch function {
        case .clearACA: model.faulted.remove(0)
        case .nexusReset:
            model.faulted.remove(0)
            settle()
            model.establish(0x2907, for: 0)
        case .logicalUnitReset, .targetReset:
            model.faulted = []
            model.control = ModelControl()
            control = model.control
            for nexus in 0...1 { model.establish(0x2903, for: nexus) }
        default: break
        }
        settle()
    }

    private func recover() {
        for nexus in model.faulted.sorted() {
            model.faulted.remove(nexus)
            settle()
            expected.append("\(name(nexus)) function 6 functionComplete")
            (nexus == 0 ? world.a : world.b).manage(.clearACA, cookie: 6)
        }
    }
}

extension TestTarget {
    /// Sets the control mode page by MODE SELECT of A; B is not told.
    func setControlMode(_ control: ModelControl) {
        var list: [UInt8] = [0, 0, 0, 0] + run(CDB.modeSense6(0x0a), dataIn: 255).data[4...]
        list[6] = (control.separate ? 0x20 : 0) | (control.functionsOnly ? 0x10 : 0)
        list[7] = (control.restricted ? 0 : 0x10) | control.queueError << 1
        list[8] = control.interlock << 4
        list[9] = control.taskAborted ? 0x40 : 0
        let end = run(CDB.modeSelect6(listLength: list.count), dataOut: list)
        precondition(end.summary == "good")
        _ = run(CDB.requestSense(), dataIn: 18, on: b)
    }
}

/// All shapes of a size, one after the other.
struct SmallWorldShapes {
    private static func attributes(_ count: Int) -> [[TaskAttribute]] {
        count == 0 ? [[]] : attributes(count - 1).flatMap { rest in TaskAttribute.allCases.map { rest + [$0] } }
    }

    /// All of A, and each single command from B; with three and more also all but the first from B.
    private static func senders(_ count: Int) -> [[Bool]] {
        let single = (-1..<count).map { other in (0..<count).map { $0 == other } }
        return count < 3 ? single : single + [(0..<count).map { $0 > 0 }]
    }

    private static let controls: [ModelControl] = {
        var controls: [ModelControl] = []
        for separate in [false, true] {
            for queueError in [0, 1, 3] as [UInt8] {
                for taskAborted in [false, true] {
                    var control = ModelControl()
                    control.separate = separate
                    control.queueError = queueError
                    control.taskAborted = taskAborted
                    controls.append(control)
                }
            }
        }
        return controls
    }()

    /// Runs `body` for each shape of `count` commands with a function. Up to three commands meet every value of TST,
    /// QERR, TAS and NACA, and end in every order, interleaved with arrivals; four meet the default values and NACA,
    /// and all arrive before the first ends.
    static func forEach(_ count: Int, _ function: TaskManagementFunction, _ body: (SmallWorldShape) -> Void) {
        for control in count < 4 ? controls : [ModelControl()] {
            for attributes in attributes(count) {
                for isFromB in senders(count) {
                    for variant in 0..<4 {
                        var shape = SmallWorldShape(attributes: attributes, isFromB: isFromB, function: function)
                        shape.control = control
                        shape.hasNACA = variant & 1 != 0
                        shape.overlaps = variant & 2 != 0
                        shape.interleaves = count < 4
                        shape.failures = count < 3 ? count : 1
                        let named = function == .abortTask || function == .queryTask
                        for victim in 0..<(named ? count : 1) {
                            shape.victim = victim
                            body(shape)
                        }
                    }
                }
            }
        }
    }
}

@Suite("Small worlds", .serialized)
struct SmallWorldTests {
    /// One shape in so many is run, by the number of commands. TARGETD_SMALL_WORLD=1 runs all of them, =20 at least
    /// one in twenty.
    private static let shares = [1: 1, 2: 11, 3: 1709, 4: 4001]

    private static func share(_ count: Int) -> Int {
        let wanted = unsafe getenv("TARGETD_SMALL_WORLD").flatMap { unsafe Int(String(cString: $0)) }
        return min(shares[count]!, wanted.map { max($0, 1) } ?? .max)
    }

    @Test(
        "Every schedule of up to four commands, with a function at each point, equals the reference model",
        arguments: TaskManagementFunction.allCases)
    func schedules(function: TaskManagementFunction) {
        var shapes = 0
        var wrong: String?
        var world: SmallWorld?
        for count in 1...4 {
            var index = 0
            let share = Self.share(count)
            SmallWorldShapes.forEach(count, function) { shape in
                index += 1
                guard wrong == nil, index % share == 0 else { return }
                if world == nil { world = SmallWorld(shape) }
                shapes += 1
                wrong = world!.exhaust(shape)
            }
        }
        if let wrong { Issue.record("\(wrong)") }
        #expect(shapes > 0)
        print("small worlds with \(function): \(world!.schedules) schedules of \(shapes) shapes")
    }
}
