// ReferenceModel: what SAM-6 says of one logical unit's task set and unit attention conditions, written literally and
// without regard to speed.
//
// Called by: the simulator and the small worlds. Must not know: how the engine does it.

import CoreTestSupport
import SCSICore

/// What a command does to the medium, by its operation code (SBC-5). Of the commands of variable length there are
/// XPWRITE(32) and XDWRITEREAD(32) only.
enum ModelAccess: Equatable {
    case none
    case read(UInt64, UInt64)
    case write(UInt64, UInt64)
    case writeAnywhere

    init(cdb: [UInt8]) {
        func number(_ range: Range<Int>) -> UInt64 { cdb[range].reduce(0) { $0 << 8 | UInt64($1) } }
        let address: UInt64
        let blocks: UInt64
        switch cdb.count {
        case 6: (address, blocks) = (number(1..<4) & 0x1f_ffff, cdb[4] == 0 ? 256 : UInt64(cdb[4]))
        case 10: (address, blocks) = (number(2..<6), number(7..<9))
        case 12: (address, blocks) = (number(2..<6), number(6..<10))
        case 16 where cdb[0] == 0x89: (address, blocks) = (number(2..<10), UInt64(cdb[13]))
        case 16 where cdb[0] == 0x9c: (address, blocks) = (number(2..<10), number(12..<14))
        case 32: (address, blocks) = (number(12..<20), number(28..<32))
        default: (address, blocks) = (number(2..<10), number(10..<14))
        }
        switch cdb[0] {
        case 0x08, 0x28, 0xa8, 0x88, 0x2f, 0xaf, 0x8f, 0x34, 0x90: self = .read(address, blocks)
        case 0x0a, 0x2a, 0xaa, 0x8a, 0x2e, 0xae, 0x8e, 0x41, 0x93, 0x89, 0x8b, 0x9c, 0x51, 0x53, 0x7f:
            self = .write(address, blocks)
        case 0x42: self = .writeAnywhere
        default: self = .none
        }
    }

    /// Whether the two may not be carried out at the same time.
    func conflicts(with other: ModelAccess) -> Bool {
        func last(_ first: UInt64, _ count: UInt64) -> UInt64 {
            let sum = first.addingReportingOverflow(count - 1)
            return sum.overflow ? .max : sum.partialValue
        }
        func overlap(_ a: UInt64, _ m: UInt64, _ b: UInt64, _ n: UInt64) -> Bool {
            m > 0 && n > 0 && a <= last(b, n) && b <= last(a, m)
        }
        switch (self, other) {
        case (.none, _), (_, .none), (.read, .read): return false
        case (.writeAnywhere, _), (_, .writeAnywhere): return true
        case (.read(let a, let m), .write(let b, let n)), (.write(let a, let m), .read(let b, let n)),
            (.write(let a, let m), .write(let b, let n)):
            return overlap(a, m, b, n)
        }
    }
}

/// A mistake that the model makes on purpose, to show that the comparison with the engine finds it.
enum ModelMistake: CaseIterable {
    case orderedOvertaken, simpleOvertakesOrdered, headOfQueueWaits, simpleBesideHeadOfQueue, hazardIgnored
    case acaLetsCommandsBy, acaForgotten, queueErrorIgnored, oneTaskSetForAll
}

/// The control mode page (SPC-4 7.5.8), the fields that the task manager acts on.
struct ModelControl: Equatable {
    /// TST 001b.
    var separate = false
    var functionsOnly = false
    /// QUEUE ALGORITHM MODIFIER 0.
    var restricted = true
    var queueError: UInt8 = 0
    var interlock: UInt8 = 0
    var taskAborted = false

    init() {}

    /// From the page's bytes, header included.
    init(page: [UInt8]) {
        separate = page[2] >> 5 == 1
        functionsOnly = page[2] & 0x10 != 0
        restricted = page[3] >> 4 == 0
        queueError = page[3] >> 1 & 3
        interlock = page[4] >> 4 & 3
        taskAborted = page[5] & 0x40 != 0
    }
}

/// A command in the model's task set.
struct ModelTask {
    let id: Int
    let nexus: Int
    let tag: UInt64
    let attribute: TaskAttribute
    let access: ModelAccess
    let passesUnitAttention: Bool
    var hasNACA = false
    /// MODE SELECT, START STOP UNIT, SET TARGET PORT GROUPS: decides what later commands may do.
    var changesUnit = false
    /// COMPARE AND WRITE, ORWRITE, XPWRITE, XDWRITEREAD, WRITE ATOMIC: nothing else touches its blocks meanwhile.
    var isWhole = false
    var isEnabled = false
    /// Enabled, and kept from ending (or, before it could begin, from beginning) by an ACA condition.
    var isParked = false
    /// How a task management function or a CHECK CONDITION said that it ends.
    var mark: String?
    /// The unit attention condition that was pending when it was enabled.
    var attention: UInt16?
    /// The sense data with which ports refuse it that are not active (SPC-4 5.15.2.4).
    var refusals: Set<String> = []
    /// The one with which its port refuses it, by the state when it was enabled.
    var refusal: String?
    /// What a MODE SELECT sets: a page code and the page's bytes.
    var modePage: (code: UInt8, bytes: [UInt8])?
    /// How it ended, while an ACA condition keeps it from saying so.
    var held: String?
    /// When it arrived, in nanoseconds, and whether its deadline had passed when somebody looked.
    var arrival: UInt64 = 0
    var isLate = false
}

/// One logical unit.
struct ModelUnit {
    var tasks: [ModelTask] = []
    var attention: [Int: [UInt16]] = [:]
    var mistake: ModelMistake?
    /// The current mode pages by code, and what a reset makes of them.
    var modePages: [UInt8: [UInt8]] = [:] { didSet { control = ModelControl(page: modePages[0x0a]!) } }
    var defaultModePages: [UInt8: [UInt8]] = [:]
    var control = ModelControl()
    /// The faulted nexuses.
    var faulted: Set<Int> = []
    /// With what the ports of nexuses refuse commands.
    var access: [Int: String] = [:]

    // MARK: Task sets (SAM-6 clause 8)

    private func areOfOneSet(_ left: Int, _ right: Int) -> Bool {
        !control.separate || left == right || mistake == .oneTaskSetForAll
    }

    /// SAM-6 8.6.2 to 8.6.5, 5.9.2, and the extent rule of this target.
    func mayBeEnabled(_ index: Int) -> Bool {
        let task = tasks[index]
        if isBlocked(task) { return false }
        let older = tasks[..<index].filter { areOfOneSet($0.nexus, task.nexus) }
        let headOfQueue = tasks.contains {
            $0.attribute == .headOfQueue && $0.id != task.id && areOfOneSet($0.nexus, task.nexus)
        }
        switch task.attribute {
        case .headOfQueue: return (mistake != .headOfQueueWaits || older.isEmpty) && !interrupts(task)
        case .aca: return !interrupts(task)
        case .ordered: return (older.isEmpty || mistake == .orderedOvertaken) && !headOfQueue && !meetsOtherSet(task)
        case .simple:
            if headOfQueue, mistake != .simpleBesideHeadOfQueue { return false }
            if older.contains(where: { $0.attribute == .ordered }), mistake != .simpleOvertakesOrdered { return false }
            return mistake == .hazardIgnored
                || !older.contains { task.access.conflicts(with: $0.access) || isRestricted(task, $0) }
                    && !meetsOtherSet(task)
        }
    }

    /// SBC-5, atomic operations: nothing comes between the steps of a command that works on its blocks as one.
    private func interrupts(_ task: ModelTask) -> Bool {
        tasks.contains {
            $0.id != task.id && $0.isEnabled && !$0.isParked && ($0.isWhole || task.isWhole)
                && task.access.conflicts(with: $0.access)
        }
    }

    /// SPC-4 7.5.8, restricted reordering: a SIMPLE command of the nexus whose effect decides over the other's.
    private func isRestricted(_ task: ModelTask, _ older: ModelTask) -> Bool {
        guard control.restricted, task.nexus == older.nexus else { return false }
        let touches = { (task: ModelTask) in task.access != .none || task.changesUnit }
        return task.changesUnit && touches(older) || older.changesUnit && touches(task)
    }

    /// Blocks that a command of another task set is working on.
    private func meetsOtherSet(_ task: ModelTask) -> Bool {
        tasks.contains {
            !areOfOneSet($0.nexus, task.nexus) && $0.isEnabled && !$0.isParked
                && task.access.conflicts(with: $0.access)
        }
    }

    /// Enables what may be enabled, oldest first, down to the task `last`.
    mutating func enable(through last: Int? = nil) {
        for index in tasks.indices {
            enable(index)
            if tasks[index].id == last { return }
        }
    }

    mutating func enable(_ index: Int) {
        guard !tasks[index].isEnabled, tasks[index].mark == nil, mayBeEnabled(index) else { return }
        tasks[index].isEnabled = true
        if !tasks[index].passesUnitAttention { tasks[index].attention = attention[tasks[index].nexus]?.first }
        guard tasks[index].attention == nil else { return }
        if let refusal = access[tasks[index].nexus], tasks[index].refusals.contains(refusal) {
            tasks[index].refusal = refusal
        } else {
            select(tasks[index])
        }
    }

    /// SPC-4 6.11: MODE SELECT takes effect when it is carried out, and the other nexuses are told of a change.
    private mutating func select(_ task: ModelTask) {
        guard let page = task.modePage, modePages[page.code] != page.bytes else { return }
        modePages[page.code] = page.bytes
        for nexus in attention.keys where nexus != task.nexus { establish(0x2a01, for: nexus) }
    }

    // MARK: Auto contingent allegiance (SAM-6 5.9) and QErr (SPC-4 7.5.8)

    /// SAM-6 5.9.2: all commands of the task set but the one that recovers.
    func isBlocked(_ task: ModelTask) -> Bool {
        if mistake == .acaLetsCommandsBy { return false }
        if task.attribute == .aca, faulted.contains(task.nexus) { return false }
        return faulted.contains { areOfOneSet($0, task.nexus) }
    }

    /// SAM-6 5.9.3, 5.9.4: the status of a command that an ACA condition keeps out; SAM-6 8.6.5 for the ACA attribute
    /// without such a condition.
    func refusal(_ nexus: Int, _ attribute: TaskAttribute, hasNACA: Bool) -> String? {
        if faulted.contains(nexus) {
            let other = tasks.contains { $0.nexus == nexus && $0.attribute == .aca }
            return attribute == .aca && !other && !control.functionsOnly ? nil : "acaActive"
        }
        if !faulted.isEmpty, !control.separate { return attribute == .aca || hasNACA ? "acaActive" : "busy" }
        return attribute == .aca ? "5/4900" : nil
    }

    /// A command has ended with CHECK CONDITION; it is out of the task set.
    mutating func fault(_ task: ModelTask) {
        if task.attribute == .aca { faulted.remove(task.nexus) }
        if task.hasNACA, mistake != .acaForgotten { faulted.insert(task.nexus) }
        if mistake == .queueErrorIgnored { return }
        switch control.queueError {
        case 1: clear(by: task.nexus)
        case 3: mark { $0.nexus == task.nexus ? "aborted" : nil }
        default: break
        }
    }

    /// Marks the tasks that `select` names and nothing else has ended yet.
    mutating func mark(_ select: (ModelTask) -> String?) {
        for index in tasks.indices where tasks[index].mark == nil { tasks[index].mark = select(tasks[index]) }
    }

    /// Marks the task set of a nexus: the others' tasks by TAS, and with a unit attention condition if they get no
    /// status.
    mutating func clear(by nexus: Int) {
        let taskSet = tasks.filter { $0.mark == nil && areOfOneSet($0.nexus, nexus) }
        let (ids, status) = (Set(taskSet.map(\.id)), control.taskAborted)
        mark { ids.contains($0.id) ? $0.nexus != nexus && status ? "taskAborted" : "aborted" : nil }
        if status { return }
        for other in Set(taskSet.map(\.nexus)) where other != nexus { establish(0x2f00, for: other) }
    }

    /// Marks all tasks for a reset by `nexus`.
    mutating func markForReset(by nexus: Int) {
        let status = control.taskAborted
        mark { status && $0.nexus != nexus ? "taskAborted" : "reset" }
    }

    // MARK: Unit attention conditions

    /// The order in which conditions are reported.
    static let precedence: [UInt16] = [
        0x2900, 0x2901, 0x2902, 0x2903, 0x2907, 0x2800, 0x3f0e, 0x3f03, 0x2a01, 0x2a02, 0x2a09, 0x2a03, 0x2a04, 0x2a05,
        0x2a06,
        0x2f00,
        0x5b01, 0x3807, 0x2c07, 0x2c08, 0x2c09,
    ]

    mutating func establish(_ code: UInt16, for nexus: Int) {
        var pending = Set(attention[nexus] ?? [])
        pending.insert(code)
        // A reset, or the loss of the nexus, says more than that commands were cleared.
        if code >> 8 == 0x29 { pending.remove(0x2f00) }
        attention[nexus] = Self.precedence.filter(pending.contains)
    }

    mutating func clear(_ code: UInt16, for nexus: Int) { attention[nexus]?.removeAll { $0 == code } }
}
