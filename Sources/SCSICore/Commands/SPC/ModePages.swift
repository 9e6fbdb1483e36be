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

/// The mode pages of one unit. A value: MODE SELECT changes a copy and installs it when the whole list was right.
struct ModePages {
    /// Sorted by page code.
    private(set) var pages: [ModePage]

    /// The bits with effects, read from the pages when they change and not at each command.
    private(set) var writeCacheEnable = false
    private(set) var softwareWriteProtect = false
    private(set) var descriptorSense = false
    private(set) var taskAbortedStatus = false
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
            // Control (SPC-6 7.5.10): D_SENSE, RLEC; QUEUE ALGORITHM MODIFIER 1; SWP; TAS; busy timeout period unlimited.
            ModePage(0x0a, 0, defaults:   [0x00, 0x10, 0x00, 0x00, 0, 0, 0xff, 0xff, 0, 0],
                              changeable: [0x05, 0x00, 0x08, 0x40, 0, 0, 0, 0, 0, 0]),
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
    /// - Returns: The index of the first byte that differs where nothing is changeable, `nil` if there is none.
    mutating func set(_ index: Int, _ values: [UInt8]) -> Int? {
        let page = pages[index]
        for offset in values.indices where (values[offset] ^ page.current[offset]) & ~page.changeable[offset] != 0 {
            return offset
        }
        pages[index].current = values
        refresh()
        return nil
    }

    private mutating func refresh() {
        writeCacheEnable = bit(0x08, byte: 0, 0x04)
        descriptorSense = bit(0x0a, byte: 0, 0x04)
        reportLogExceptions = bit(0x0a, byte: 0, 0x01)
        softwareWriteProtect = bit(0x0a, byte: 2, 0x08)
        taskAbortedStatus = bit(0x0a, byte: 3, 0x40)
    }

    private func bit(_ code: UInt8, byte: Int, _ mask: UInt8) -> Bool {
        index(code: code, subpage: 0).map { pages[$0].current[byte] & mask != 0 } ?? false
    }
}
