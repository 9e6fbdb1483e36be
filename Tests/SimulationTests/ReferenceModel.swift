// ReferenceModel: what SAM-6 says of one logical unit's task set and unit attention conditions, written literally and
// without regard to speed.
//
// Called by: the simulator and the small worlds. Must not know: how the engine does it.

import CoreTestSupport
import SCSICore

/// What a command does to the medium, by its operation code (SBC-5).
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
        default: (address, blocks) = (number(2..<10), number(10..<14))
        }
        switch cdb[0] {
        case 0x08, 0x28, 0xa8, 0x88, 0x2f, 0xaf, 0x8f, 0x34, 0x90: self = .read(address, blocks)
        case 0x0a, 0x2a, 0xaa, 0x8a, 0x2e, 0xae, 0x8e, 0x41, 0x93, 0x89, 0x8b, 0x9c: self = .write(address, blocks)
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
}

/// A command in the model's task set.
struct ModelTask {
    let id: Int
    let nexus: Int
    let tag: UInt64
    let attribute: TaskAttribute
    let access: ModelAccess
    let passesUnitAttention: Bool
    var isEnabled = false
    /// How a task management function said that it ends.
    var mark: String?
    /// The unit attention condition that was pending when it was enabled.
    var attention: UInt16?
    /// What a MODE SELECT sets: a page code and the page's bytes.
    var modePage: (code: UInt8, bytes: [UInt8])?
}

/// One logical unit.
struct ModelUnit {
    var tasks: [ModelTask] = []
    var attention: [Int: [UInt16]] = [:]
    var mistake: ModelMistake?
    /// The current mode pages by code, and what a reset makes of them.
    var modePages: [UInt8: [UInt8]] = [:]
    var defaultModePages: [UInt8: [UInt8]] = [:]

    /// SAM-6 8.6.2 to 8.6.4, and the extent rule of this target.
    func mayBeEnabled(_ index: Int) -> Bool {
        let task = tasks[index]
        let older = tasks[..<index]
        let headOfQueue = tasks.contains { $0.attribute == .headOfQueue && $0.id != task.id }
        switch task.attribute {
        case .headOfQueue: return mistake != .headOfQueueWaits || older.isEmpty
        case .ordered: return (older.isEmpty || mistake == .orderedOvertaken) && !headOfQueue
        case .simple, .aca:
            if headOfQueue, mistake != .simpleBesideHeadOfQueue { return false }
            if older.contains(where: { $0.attribute == .ordered }), mistake != .simpleOvertakesOrdered { return false }
            return mistake == .hazardIgnored || !older.contains { task.access.conflicts(with: $0.access) }
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
        if tasks[index].attention == nil { select(tasks[index]) }
    }

    /// SPC-6 6.12: MODE SELECT takes effect when it is carried out, and the other nexuses are told of a change.
    private mutating func select(_ task: ModelTask) {
        guard let page = task.modePage, modePages[page.code] != page.bytes else { return }
        modePages[page.code] = page.bytes
        for nexus in attention.keys where nexus != task.nexus { establish(0x2a01, for: nexus) }
    }

    // MARK: Unit attention conditions

    /// The order in which conditions are reported.
    static let precedence: [UInt16] = [
        0x2901, 0x2902, 0x2903, 0x2907, 0x2800, 0x3f0e, 0x3f03, 0x2a01, 0x2a09, 0x2f00,
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
