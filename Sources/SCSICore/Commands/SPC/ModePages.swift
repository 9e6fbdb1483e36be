// ModePages: the mode pages of a logical unit: default, current and changeable values (SPC-6 7.5, SBC-5 6.5).
//
// Owns: the page table. Called by: MODE SENSE, MODE SELECT, LogicalUnit (the bits that have effects).
// Must not know: tasks, the backstore.

/// One mode page. Bytes are those behind the page header.
struct ModePage {
    let code: UInt8
    let subpage: UInt8
    let defaults: [UInt8]
    let changeable: [UInt8]
    var current: [UInt8]

    init(_ code: UInt8, _ subpage: UInt8, defaults: [UInt8], changeable: [UInt8]) {
        precondition(defaults.count == changeable.count)
        self.code = code
        self.subpage = subpage
        self.defaults = defaults
        self.changeable = changeable
        current = defaults
    }

    /// Bytes of the page header: two, or four with a subpage (SPC-6 7.5.8).
    var headerLength: Int { subpage == 0 ? 2 : 4 }

    /// Writes header and values.
    func write(_ values: [UInt8], to writer: inout ParameterWriter) {
        if subpage == 0 {
            writer.byte(code)
            writer.byte(UInt8(values.count))
        } else {
            writer.byte(0x40 | code)
            writer.byte(subpage)
            writer.uint16(UInt16(values.count))
        }
        writer.bytes(values)
    }
}

/// QERR (SPC-6 7.5.10): what a CHECK CONDITION does to the other commands of its task set.
enum QueueErrorManagement: UInt8 {
    /// Nothing; an ACA condition blocks them.
    case none = 0b00
    case abortAll = 0b01
    /// Aborts those of the same nexus.
    case abortNexus = 0b11
}

/// UA_INTLCK_CTRL (SPC-6 7.5.10): what a CHECK CONDITION that reports a unit attention condition does to it.
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

    /// - Parameter volatileCache: Whether the backstore has a cache, so that WCE can be one.
    init(volatileCache: Bool) {
        let wce: UInt8 = volatileCache ? 0x04 : 0
        // swift-format-ignore
        pages = [
            // Read-Write Error Recovery (SBC-5 6.5.10): the medium below corrects what it can; nothing to choose.
            ModePage(0x01, 0, defaults:   [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                              changeable: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            // Caching (SBC-5 6.5.6): WCE.
            ModePage(0x08, 0, defaults:   [wce, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                              changeable: [wce, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            // Control (SPC-6 7.5.10): TST, TMF_ONLY, D_SENSE, RLEC; QUEUE ALGORITHM MODIFIER, QERR; UA_INTLCK_CTRL, SWP; TAS;
            // busy timeout period unlimited.
            ModePage(0x0a, 0, defaults:   [0x00, 0x00, 0x00, 0x00, 0, 0, 0xff, 0xff, 0, 0],
                              changeable: [0xf5, 0xf6, 0x38, 0x40, 0, 0, 0, 0, 0, 0]),
            // Informational Exceptions Control: DEXCPT: there are none to report.
            ModePage(0x1c, 0, defaults:   [0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                              changeable: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ]
        refresh()
    }

    /// Back to the default values; there are no saved ones.
    mutating func restoreSaved() {
        for index in pages.indices { pages[index].current = pages[index].defaults }
        refresh()
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
        for offset in values.indices where (values[offset] ^ page.current[offset]) & ~page.changeable[offset] != 0 {
            return offset
        }
        pages[index].current = values
        refresh()
        return nil
    }

    /// The fields of the control mode page that are changeable and do not have all the values that their bits have.
    private static func invalidControl(_ values: [UInt8]) -> Int? {
        if values[0] >> 5 > 1 { return 0 }
        if values[1] >> 4 > 1 || QueueErrorManagement(rawValue: values[1] >> 1 & 3) == nil { return 1 }
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
    }

    private func bit(_ code: UInt8, byte: Int, _ mask: UInt8) -> Bool {
        index(code: code, subpage: 0).map { pages[$0].current[byte] & mask != 0 } ?? false
    }
}
