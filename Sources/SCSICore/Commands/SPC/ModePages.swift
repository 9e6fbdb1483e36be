// ModePages: the mode pages of a logical unit: default, saved, current and changeable values (SPC-4 7.5, SBC-4 6.5).
//
// Owns: the page table, and the form in which values are saved. Called by: MODE SENSE, MODE SELECT, LogicalUnit (the
// bits that have effects). Must not know: tasks, the backstore, where values are saved.
//
// A bit is changeable only if something here acts on it. What a page could ask for beyond that is for devices with
// heads, caches and power of their own.

import CTarget

/// One mode page. Bytes are those behind the page header.
struct ModePage {
    let code: UInt8
    let subpage: UInt8
    let defaults: [UInt8]
    let changeable: [UInt8]
    /// What a power on or a reset makes the current values.
    var saved: [UInt8]
    var current: [UInt8]

    init(_ code: UInt8, _ subpage: UInt8, defaults: [UInt8], changeable: [UInt8]) {
        precondition(defaults.count == changeable.count)
        self.code = code
        self.subpage = subpage
        self.defaults = defaults
        self.changeable = changeable
        saved = defaults
        current = defaults
    }

    /// PS: there is something to save. Whether anything can keep it is the unit's to know.
    var isSaveable: Bool { changeable.contains { $0 != 0 } }

    /// Bytes of the page header: two, or four with a subpage (SPC-4: mode page formats).
    var headerLength: Int { subpage == 0 ? 2 : 4 }

    /// Writes header and values.
    func write(_ values: [UInt8], saves: Bool, to writer: inout ParameterWriter) {
        let parametersSaveable: UInt8 = saves && isSaveable ? 0x80 : 0
        if subpage == 0 {
            writer.byte(parametersSaveable | code)
            writer.byte(UInt8(values.count))
        } else {
            writer.byte(parametersSaveable | 0x40 | code)
            writer.byte(subpage)
            writer.uint16(UInt16(values.count))
        }
        writer.bytes(values)
    }
}

/// QERR (SPC-4 7.5.8): what a CHECK CONDITION does to the other commands of its task set.
enum QueueErrorManagement: UInt8 {
    /// Nothing; an ACA condition blocks them.
    case none = 0b00
    case abortAll = 0b01
    /// Aborts those of the same nexus.
    case abortNexus = 0b11
}

/// UA_INTLCK_CTRL (SPC-4 7.5.8): what a CHECK CONDITION that reports a unit attention condition does to it.
enum UnitAttentionInterlock: UInt8 {
    case none = 0b00
    /// Only REQUEST SENSE clears it.
    case keep = 0b10
    /// The same, and BUSY, RESERVATION CONFLICT and TASK SET FULL establish one.
    case establish = 0b11
}

/// The mode pages of one unit. A value: MODE SELECT changes a copy and installs it when the whole list was right.
struct ModePages {
    /// Sorted by page code.
    private(set) var pages: [ModePage]

    /// The bits with effects, read from the pages when they change and not at each command.
    private(set) var writeCacheEnable = false
    private(set) var softwareWriteProtect = false
    private(set) var descriptorSense = false
    private(set) var taskAbortedStatus = false
    /// TST: whether each I_T nexus has a task set of its own.
    private(set) var separateTaskSets = false
    /// TMF_ONLY: while an ACA condition is in effect, even ACA commands of the faulted nexus are refused.
    private(set) var taskManagementFunctionsOnly = false
    /// QUEUE ALGORITHM MODIFIER is zero.
    private(set) var restrictedReordering = true
    private(set) var queueErrorManagement = QueueErrorManagement.none
    private(set) var unitAttentionInterlock = UnitAttentionInterlock.none
    private(set) var reportLogExceptions = false
    /// The Power Condition page as it is, for those who ask for the power condition.
    private(set) var powerCondition: [UInt8] = []
    /// LBPERE.
    private(set) var reportsThresholds = false
    private(set) var thresholds: [ProvisioningThreshold] = []
    private(set) var informationalExceptions = InformationalExceptionsControl()

    /// - Parameters:
    ///   - volatileCache: Whether the backstore has a cache, so that WCE can be one.
    ///   - thresholds: Whether there are logical block provisioning thresholds.
    init(volatileCache: Bool, thresholds: Bool) {
        let wce: UInt8 = volatileCache ? 0x04 : 0
        let lbpere: UInt8 = thresholds ? 0x80 : 0
        // swift-format-ignore
        pages = [
            // Read-Write Error Recovery (SBC-4 6.5.10): LBPERE. The medium below corrects what it can; nothing to
            // choose.
            ModePage(0x01, 0, defaults:   [0, 0, 0, 0, 0, lbpere, 0, 0, 0, 0],
                              changeable: [0, 0, 0, 0, 0, lbpere, 0, 0, 0, 0]),
            // Verify Error Recovery (SBC-4 6.5.11): the same.
            ModePage(0x07, 0, defaults:   [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                              changeable: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            // Caching (SBC-4 6.5.6): WCE. The other bits steer a cache that this target has not: reads go to the
            // medium, and nothing is read ahead.
            ModePage(0x08, 0, defaults:   [wce, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                              changeable: [wce, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            // Control (SPC-4 7.5.8): TST, TMF_ONLY, D_SENSE, RLEC; QUEUE ALGORITHM MODIFIER, QERR; UA_INTLCK_CTRL,
            // SWP; TAS; busy timeout period unlimited.
            ModePage(0x0a, 0, defaults:   [0x00, 0x00, 0x00, 0x00, 0, 0, 0xff, 0xff, 0, 0],
                              changeable: [0x35, 0x16, 0x38, 0x40, 0, 0, 0, 0, 0, 0]),
            // Control Extension (SPC-4 7.5.9): MAXIMUM SENSE DATA LENGTH.
            ModePage(0x0a, 1, defaults:   [0, 0, UInt8(SCSI_SENSE_CAPACITY)] + Self.zeros(25),
                              changeable: Self.zeros(28)),
            // Power Condition (SPC-4 7.5.13): the conditions' timers, all disabled.
            ModePage(0x1a, 0, defaults:   Self.zeros(38),
                              changeable: [0x01, 0x0f] + Array(repeating: 0xff, count: 20) + Self.zeros(16)),
            // Informational Exceptions Control (SBC-4 6.5.8): DEXCPT, TEST; MRIE 6: on request. An exception is
            // reported when it occurs, once (REPORT COUNT 1).
            ModePage(0x1c, 0, defaults:   [0x00, 0x06, 0, 0, 0, 0, 0, 0, 0, 1],
                              changeable: [0x0c, 0x06, 0, 0, 0, 0, 0, 0, 0, 0]),
        ]
        if thresholds {
            // Logical Block Provisioning (SBC-4 6.5.9): the threshold descriptors; a threshold is told to every nexus.
            pages.append(
                ModePage(
                    0x1c, 2, defaults: Self.zeros(12) + ProvisioningThreshold.defaults,
                    changeable: Self.zeros(12) + ProvisioningThreshold.changeable))
        }
        refresh()
    }

    private static func zeros(_ count: Int) -> [UInt8] { Array(repeating: 0, count: count) }

    /// The saved values become the current ones: a power on, a reset.
    mutating func restoreSaved() {
        for index in pages.indices { pages[index].current = pages[index].saved }
        refresh()
    }

    /// Takes the values over from the pages that the unit had with another medium, as far as they are changeable.
    mutating func adopt(_ old: ModePages) {
        for page in old.pages {
            guard let index = index(code: page.code, subpage: page.subpage), pages[index].changeable == page.changeable
            else { continue }
            pages[index].saved = page.saved
            pages[index].current = page.current
        }
        refresh()
    }

    /// The current values become the saved ones (SP).
    mutating func saveCurrent() {
        for index in pages.indices { pages[index].saved = pages[index].current }
    }

    func index(code: UInt8, subpage: UInt8) -> Int? {
        pages.firstIndex { $0.code == code && $0.subpage == subpage }
    }

    /// Sets the values of a page.
    ///
    /// - Returns: The index of the first byte that differs where nothing is changeable, or has a value that its field
    ///   cannot take; `nil` if there is none.
    mutating func set(_ index: Int, _ values: [UInt8]) -> Int? {
        let page = pages[index]
        if page.code == 0x0a, page.subpage == 0, let fault = Self.invalidControl(values) { return fault }
        if page.code == 0x1c, page.subpage == 0, let fault = InformationalExceptionsControl.fault(values) {
            return fault
        }
        for offset in values.indices where (values[offset] ^ page.current[offset]) & ~page.changeable[offset] != 0 {
            return offset
        }
        pages[index].current = values
        refresh()
        return nil
    }

    /// The fields of the control mode page that do not have all the values that their changeable bits have.
    private static func invalidControl(_ values: [UInt8]) -> Int? {
        if QueueErrorManagement(rawValue: values[1] >> 1 & 3) == nil { return 1 }
        return UnitAttentionInterlock(rawValue: values[2] >> 4 & 3) == nil ? 2 : nil
    }

    private mutating func refresh() {
        writeCacheEnable = bit(0x08, byte: 0, 0x04)
        descriptorSense = bit(0x0a, byte: 0, 0x04)
        reportLogExceptions = bit(0x0a, byte: 0, 0x01)
        softwareWriteProtect = bit(0x0a, byte: 2, 0x08)
        taskAbortedStatus = bit(0x0a, byte: 3, 0x40)
        separateTaskSets = bit(0x0a, byte: 0, 0x20)
        taskManagementFunctionsOnly = bit(0x0a, byte: 0, 0x10)
        restrictedReordering = !bit(0x0a, byte: 1, 0x10)
        queueErrorManagement = !bit(0x0a, byte: 1, 0x02) ? .none : bit(0x0a, byte: 1, 0x04) ? .abortNexus : .abortAll
        unitAttentionInterlock = !bit(0x0a, byte: 2, 0x20) ? .none : bit(0x0a, byte: 2, 0x10) ? .establish : .keep
        powerCondition = current(0x1a)!
        reportsThresholds = bit(0x01, byte: 5, 0x80)
        let descriptors = current(0x1c, 2)?.dropFirst(12) ?? []
        thresholds = stride(from: descriptors.startIndex, to: descriptors.endIndex, by: ProvisioningThreshold.length)
            .map { ProvisioningThreshold(descriptors[$0..<$0 + ProvisioningThreshold.length]) }
        informationalExceptions = InformationalExceptionsControl(current(0x1c)!)
    }

    private func current(_ code: UInt8, _ subpage: UInt8 = 0) -> [UInt8]? {
        index(code: code, subpage: subpage).map { pages[$0].current }
    }

    private func bit(_ code: UInt8, byte: Int, _ mask: UInt8) -> Bool {
        index(code: code, subpage: 0).map { pages[$0].current[byte] & mask != 0 } ?? false
    }
}

/// What the Informational Exceptions Control mode page says (SBC-4 6.5.8).
struct InformationalExceptionsControl {
    /// MRIE, the methods that there are.
    enum Method: UInt8 {
        case none = 0
        case unitAttention = 2
        /// REQUEST SENSE tells.
        case onRequest = 6
    }

    /// DEXCPT is zero.
    var isEnabled = false
    /// TEST: as if there were an exception.
    var isTest = false
    var method = Method.none

    init() {}

    init(_ values: [UInt8]) {
        isEnabled = values[0] & 0x08 == 0
        isTest = values[0] & 0x04 != 0
        method = Method(rawValue: values[1] & 0x0f) ?? .none
    }

    /// The index of a byte that does not have a value that it may have.
    static func fault(_ values: [UInt8]) -> Int? {
        // SBC-4 6.5.8: TEST with DEXCPT.
        if values[0] & 0x0c == 0x0c { return 0 }
        return Method(rawValue: values[1]) == nil ? 1 : nil
    }
}

// MARK: Saved values

/// The form of the saved values, as a section of the unit's state: for each page its code, its subpage code, the length
/// of its values in two bytes, and the values.
extension ModePages {
    /// The saved values of all pages that have any.
    var savedBytes: [UInt8] {
        pages.filter(\.isSaveable).flatMap { page in
            [page.code, page.subpage, UInt8(page.saved.count >> 8), UInt8(page.saved.count & 0xff)] + page.saved
        }
    }

    /// Splits saved values into pages; `nil` if the bytes are not that.
    static func parseSaved(_ bytes: [UInt8]) -> [(code: UInt8, subpage: UInt8, values: [UInt8])]? {
        var pages: [(code: UInt8, subpage: UInt8, values: [UInt8])] = []
        var rest = bytes[...]
        while !rest.isEmpty {
            let header = Array(rest.prefix(4))
            guard header.count == 4, rest.count - 4 >= Int(header.field(2) as UInt16) else { return nil }
            rest = rest.dropFirst(4)
            let values = Array(rest.prefix(Int(header.field(2) as UInt16)))
            pages.append((code: header[0], subpage: header[1], values: values))
            rest = rest.dropFirst(values.count)
        }
        return pages
    }

    /// Begins with what an earlier life of the unit has saved. A page that this life has not, or has in another form,
    /// keeps its defaults, and so do bits that are not changeable any more.
    mutating func load(saved bytes: [UInt8]) {
        for entry in Self.parseSaved(bytes) ?? [] {
            guard let index = index(code: entry.code, subpage: entry.subpage),
                entry.values.count == pages[index].defaults.count
            else { continue }
            let page = pages[index]
            let values = page.defaults.indices.map {
                page.defaults[$0] & ~page.changeable[$0] | entry.values[$0] & page.changeable[$0]
            }
            if set(index, values) == nil { pages[index].saved = values }
        }
        restoreSaved()
    }
}
