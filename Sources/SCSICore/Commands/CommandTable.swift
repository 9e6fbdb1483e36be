// CommandTable: every command of a unit, one row each; validator, dispatcher and REPORT SUPPORTED OPERATION CODES read
// the same row.
//
// Owns: the rows. Called by: LogicalUnit (match), the report commands. Must not know: how commands work.

import CTarget

/// How a CDB relates to the table.
enum CommandMatch {
    case row(CommandRow)
    case unknownOperationCode
    case unknownServiceAction
}

/// The table of the units that have the same features.
@safe
final class CommandTable {
    private let rows: UnsafeMutableBufferPointer<CommandDescriptor>
    /// For each operation code: its first row, or -1.
    private let first: UnsafeMutablePointer<Int16>

    /// Builds the table for a set of features and checks it. Tables live as long as the process: there are as many as
    /// there are combinations of features.
    init(features: UnitFeatures) {
        let selected = Self.source.filter {
            features.isSuperset(of: $0.requires) && features.isDisjoint(with: $0.without)
        }
        .map(\.descriptor)
        Self.check(selected)
        Self.checkHandlers()
        unsafe rows = .allocate(capacity: selected.count)
        _ = unsafe rows.initialize(from: selected)
        unsafe first = .allocate(capacity: 256)
        unsafe first.initialize(repeating: -1, count: 256)
        for (index, row) in selected.enumerated().reversed() { unsafe first[Int(row.operationCode)] = Int16(index) }
    }

    deinit {
        unsafe rows.deallocate()
        unsafe first.deallocate()
    }

    /// All rows in order, for reports and tests.
    var all: [CommandDescriptor] { unsafe Array(rows) }

    /// Finds the row of a CDB by operation code and service action.
    @inline(__always)
    func match(_ cdb: CDB) -> CommandMatch {
        var index = Int(unsafe first[Int(cdb[0])])
        guard index >= 0 else { return .unknownOperationCode }
        let row = unsafe rows.baseAddress! + index
        guard unsafe row.pointee.hasServiceAction else { return unsafe .row(CommandRow(row)) }
        let serviceAction = Self.serviceAction(cdb)
        while unsafe index < rows.count, unsafe rows[index].operationCode == cdb[0] {
            if unsafe rows[index].serviceAction == serviceAction {
                return unsafe .row(CommandRow(rows.baseAddress! + index))
            }
            index += 1
        }
        return .unknownServiceAction
    }

    /// The SERVICE ACTION field: bytes 8 and 9 of a variable length CDB, else five bits of byte 1 (SPC-4: CDB formats).
    private static func serviceAction(_ cdb: CDB) -> UInt16 {
        cdb[0] == variableLength ? cdb.uint16(8) : UInt16(cdb[1] & 0x1f)
    }

    /// INVALID FIELD IN CDB for a service action that no row has.
    static func invalidServiceAction(_ cdb: CDB) -> SenseData {
        cdb[0] == variableLength ? .invalidField(inCDB: 8, bit: 7) : .invalidField(inCDB: 1, bit: 4)
    }

    /// The operation code of variable length CDBs.
    private static let variableLength: UInt8 = 0x7f

    /// Checks the bits of a CDB against its row.
    ///
    /// - Returns: What to report if a bit is set that the row does not allow (SPC-4: reserved bits), `nil` if
    ///   none.
    @inline(__always)
    static func validate(_ cdb: CDB, length: Int, against row: CommandRow) -> SenseData? {
        let extra = (cdb.word(0) & ~row.usage.0) | (row.length > 8 ? cdb.word(1) & ~row.usage.1 : 0)
        if extra == 0, length >= row.length { return nil }
        return fault(cdb, length: length, row: row)
    }

    /// The same for what only variable length CDBs have: the bits behind byte 15, and ADDITIONAL CDB LENGTH, of which
    /// one value is right (SPC-4: CDB formats). Nothing to report for other CDBs.
    static func validateVariableLength(_ cdb: CDB, against row: CommandRow) -> SenseData? {
        guard cdb[0] == variableLength else { return nil }
        let usage = row.descriptor.usageTail
        let extra = (cdb.word(2) & ~usage.0) | (cdb.word(3) & ~usage.1)
        if extra != 0 { return fault(cdb, length: row.length, row: row) }
        return Int(cdb[7]) == row.length - 8 ? nil : .invalidField(inCDB: 7)
    }

    /// Names the first byte and the most significant bit that are not allowed.
    private static func fault(_ cdb: CDB, length: Int, row: CommandRow) -> SenseData? {
        if length < row.length { return .invalidField(inCDB: length) }
        for offset in 0..<row.length {
            let extra = cdb[offset] & ~row.descriptor.usageByte(offset)
            if extra != 0 { return .invalidField(inCDB: offset, bit: UInt8(7 - extra.leadingZeroBitCount)) }
        }
        return nil
    }

    /// The self-check: sorted by operation code and service action, unique, lengths fit the group code (SPC-4: CDB
    /// formats), usage data begins with the operation code.
    private static func check(_ rows: [CommandDescriptor]) {
        for (row, next) in zip(rows, rows.dropFirst()) {
            precondition(
                (row.operationCode, row.serviceAction) < (next.operationCode, next.serviceAction), "table order")
            precondition(row.operationCode != next.operationCode || row.hasServiceAction && next.hasServiceAction)
        }
        for row in rows {
            let byGroup: [UInt8: UInt8] = [0: 6, 1: 10, 2: 10, 3: 32, 4: 16, 5: 12]
            precondition(byGroup[row.operationCode >> 5] == row.length, "CDB length does not fit the group code")
            precondition(row.usageByte(0) == row.operationCode, "usage data")
            let used =
                row.operationCode == variableLength
                ? UInt16(row.usageByte(8)) << 8 | UInt16(row.usageByte(9)) : UInt16(row.usageByte(1) & 0x1f)
            precondition(!row.hasServiceAction || used == row.serviceAction, "usage data")
        }
    }

    /// Every handler is reached by a row of some unit.
    private static func checkHandlers() {
        for handler in CommandHandler.allCases {
            precondition(source.contains { $0.descriptor.handler == handler }, "a handler that no row reaches")
        }
    }

    /// A row and the features that decide whether a unit has it.
    private struct Source {
        let descriptor: CommandDescriptor
        let requires: UnitFeatures
        let without: UnitFeatures
    }

    private static func row(
        _ operationCode: UInt8, _ serviceAction: UInt16?, _ handler: CommandHandler, _ extent: ExtentField,
        _ serialization: SerializationClass, _ flags: CommandFlags, requires: UnitFeatures = [],
        without: UnitFeatures = [], usage: [UInt8]
    ) -> Source {
        var words: [UInt64] = [0, 0, 0, 0]
        for (offset, byte) in usage.enumerated() {
            // NACA, in the CONTROL byte (SAM-6 5.2), is honoured whatever the command is.
            let isControl = offset == (operationCode == variableLength ? 1 : usage.count - 1)
            var used = isControl ? byte | TaskHandle.nacaBit : byte
            // GROUP NUMBER (SBC-4 4.22) says into which group attributes of the command should be collected. It is
            // taken and nothing is collected, as GROUP_SUP of zero says; SBC-4 has no error for it.
            if offset == extent.groupNumberByte { used |= 0x1f }
            let bits = UInt64(used) << (UInt64(offset & 7) * 8)
            words[offset >> 3] |= bits
        }
        // The validator compares whole words: bytes behind a shorter CDB are not part of it.
        if usage.count < 8 { words[0] |= ~0 << (UInt64(usage.count) * 8) }
        if usage.count > 8, usage.count < 16 { words[1] |= ~0 << (UInt64(usage.count - 8) * 8) }
        return Source(
            descriptor: CommandDescriptor(
                operationCode: operationCode, hasServiceAction: serviceAction != nil, serviceAction: serviceAction ?? 0,
                length: UInt8(usage.count), handler: handler, extent: extent, serialization: serialization,
                flags: flags,
                usage: (words[0].littleEndian, words[1].littleEndian),
                usageTail: (words[2].littleEndian, words[3].littleEndian)),
            requires: requires, without: without)
    }

    // swift-format-ignore
    private static let source: [Source] = [
        // Code, service action, handler, extent, serialization, flags, what a unit must have for it or not
        //     Usage data by byte (SPC-4 6.35.3)
        // TEST UNIT READY
        row(0x00, nil,  .testUnitReady,             .none,       .none,         [.needsMedium, .allowedUnderAny],
            usage: [0x00, 0x00, 0x00, 0x00, 0x00, 0x00]),
        // REQUEST SENSE
        row(0x03, nil,  .requestSense,              .none,       .none,         [.passesUnitAttention, .worksWithoutUnit, .allowedUnderAny, .allowedUnderReserve, .passesLostReservations, .allowedInTransition],
            usage: [0x03, 0x01, 0x00, 0x00, 0xff, 0x00]),
        // READ(6)
        row(0x08, nil,  .read,                      .six,        .read,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x08, 0x1f, 0xff, 0xff, 0xff, 0x00]),
        // WRITE(6)
        row(0x0a, nil,  .write,                     .six,        .write,        [.needsMedium, .writesMedium],
            usage: [0x0a, 0x1f, 0xff, 0xff, 0xff, 0x00]),
        // INQUIRY
        row(0x12, nil,  .inquiry,                   .none,       .none,         [.passesUnitAttention, .worksWithoutUnit, .allowedUnderAny, .allowedUnderReserve, .passesLostReservations, .allowedInTransition],
            usage: [0x12, 0x01, 0xff, 0xff, 0xff, 0x00]),
        // MODE SELECT(6)
        row(0x15, nil,  .modeSelect,                .none,       .unitState,    [.allowedInStandby], without: .savesState,
            usage: [0x15, 0x10, 0x00, 0x00, 0xff, 0x00]),
        // MODE SELECT(6)
        row(0x15, nil,  .modeSelect,                .none,       .unitState,    [.allowedInStandby], requires: .savesState,
            usage: [0x15, 0x11, 0x00, 0x00, 0xff, 0x00]),
        // RESERVE(6)
        row(0x16, nil,  .reserve,                   .none,       .none,         [.allowedUnderAny, .allowedUnderReserve],
            usage: [0x16, 0x00, 0x00, 0x00, 0x00, 0x00]),
        // RELEASE(6)
        row(0x17, nil,  .release,                   .none,       .none,         [.allowedUnderAny, .allowedUnderReserve],
            usage: [0x17, 0x00, 0x00, 0x00, 0x00, 0x00]),
        // MODE SENSE(6)
        row(0x1a, nil,  .modeSense,                 .none,       .none,         [.allowedUnderWriteExclusive, .allowedInStandby],
            usage: [0x1a, 0x08, 0xff, 0xff, 0xff, 0x00]),
        // START STOP UNIT
        row(0x1b, nil,  .startStopUnit,             .none,       .unitState,    [.allowedUnderAny, .allowedUnderReserve, .passesLostReservations],
            without: .removable,
            usage: [0x1b, 0x01, 0x00, 0x03, 0xf5, 0x00]),
        // START STOP UNIT
        row(0x1b, nil,  .startStopUnit,             .none,       .unitState,    [.allowedUnderAny, .allowedUnderReserve, .passesLostReservations],
            requires: .removable,
            usage: [0x1b, 0x01, 0x00, 0x03, 0xf7, 0x00]),
        // RECEIVE DIAGNOSTIC RESULTS
        row(0x1c, nil,  .receiveDiagnosticResults,  .none,       .none,         [.allowedUnderWriteExclusive, .allowedInStandby],
            usage: [0x1c, 0x01, 0xff, 0xff, 0xff, 0x00]),
        // SEND DIAGNOSTIC
        row(0x1d, nil,  .sendDiagnostic,            .none,       .none,         [.needsMedium, .allowedInStandby],
            usage: [0x1d, 0x14, 0x00, 0xff, 0xff, 0x00]),
        // PREVENT ALLOW MEDIUM REMOVAL
        row(0x1e, nil,  .preventAllowMediumRemoval, .none,       .none,         [.allowedUnderAny, .allowedUnderReserve],
            requires: .removable,
            usage: [0x1e, 0x00, 0x00, 0x00, 0x01, 0x00]),
        // READ CAPACITY(10)
        row(0x25, nil,  .readCapacity10,            .none,       .none,         [.needsMedium, .allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x25, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00]),
        // READ(10)
        row(0x28, nil,  .read,                      .ten,        .read,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x28, 0x18, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // WRITE(10)
        row(0x2a, nil,  .write,                     .ten,        .write,        [.needsMedium, .writesMedium],
            usage: [0x2a, 0x18, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // WRITE AND VERIFY(10)
        row(0x2e, nil,  .writeAndVerify,            .ten,        .write,        [.needsMedium, .writesMedium],
            usage: [0x2e, 0x12, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // VERIFY(10)
        row(0x2f, nil,  .verify,                    .ten,        .read,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x2f, 0x16, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // PRE-FETCH(10)
        row(0x34, nil,  .preFetch,                  .ten,        .read,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x34, 0x02, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // SYNCHRONIZE CACHE(10)
        row(0x35, nil,  .synchronizeCache,          .ten,        .none,         [.needsMedium],
            usage: [0x35, 0x02, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // READ DEFECT DATA(10)
        row(0x37, nil,  .readDefectData10,          .none,       .none,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x37, 0x00, 0x1f, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // WRITE BUFFER: data
        row(0x3b, 0x02, .writeBufferData,           .none,       .none,         [.passesLostReservations],
            usage: [0x3b, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // WRITE BUFFER: echo buffer
        row(0x3b, 0x0a, .writeEchoBuffer,           .none,       .none,         [.passesLostReservations, .allowedInTransition],
            usage: [0x3b, 0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // READ BUFFER(10): data
        row(0x3c, 0x02, .readBufferData,            .none,       .none,         [.allowedUnderWriteExclusive, .passesLostReservations],
            usage: [0x3c, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // READ BUFFER(10): descriptor
        row(0x3c, 0x03, .readBufferDescriptor,      .none,       .none,         [.allowedUnderWriteExclusive, .passesLostReservations],
            usage: [0x3c, 0x03, 0xff, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0x00]),
        // READ BUFFER(10): echo buffer
        row(0x3c, 0x0a, .readEchoBuffer,            .none,       .none,         [.allowedUnderWriteExclusive, .passesLostReservations, .allowedInTransition],
            usage: [0x3c, 0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // READ BUFFER(10): echo buffer descriptor
        row(0x3c, 0x0b, .readEchoBufferDescriptor,  .none,       .none,         [.allowedUnderWriteExclusive, .passesLostReservations, .allowedInTransition],
            usage: [0x3c, 0x0b, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0x00]),
        // WRITE SAME(10)
        row(0x41, nil,  .writeSame,                 .ten,        .write,        [.needsMedium, .writesMedium], without: .unmap,
            usage: [0x41, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // WRITE SAME(10)
        row(0x41, nil,  .writeSame,                 .ten,        .write,        [.needsMedium, .writesMedium], requires: .unmap, without: .anchor,
            usage: [0x41, 0x08, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // WRITE SAME(10)
        row(0x41, nil,  .writeSame,                 .ten,        .write,        [.needsMedium, .writesMedium], requires: [.unmap, .anchor],
            usage: [0x41, 0x18, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // UNMAP
        row(0x42, nil,  .unmap,                     .none,       .writeAnywhere, [.needsMedium, .writesMedium], requires: .unmap, without: .anchor,
            usage: [0x42, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // UNMAP
        row(0x42, nil,  .unmap,                     .none,       .writeAnywhere, [.needsMedium, .writesMedium], requires: [.unmap, .anchor],
            usage: [0x42, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // LOG SELECT
        row(0x4c, nil,  .logSelect,                 .none,       .none,         [.allowedInStandby],
            usage: [0x4c, 0x02, 0xff, 0xff, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // LOG SENSE
        row(0x4d, nil,  .logSense,                  .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .passesLostReservations, .allowedInStandby],
            usage: [0x4d, 0x00, 0xff, 0xff, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // XPWRITE(10)
        row(0x51, nil,  .xpWrite,                   .ten,        .write,        [.needsMedium, .writesMedium, .uninterrupted],
            usage: [0x51, 0x18, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // XDWRITEREAD(10)
        row(0x53, nil,  .xdWriteRead,               .ten,        .write,        [.needsMedium, .uninterrupted],
            usage: [0x53, 0x1c, 0xff, 0xff, 0xff, 0xff, 0x00, 0xff, 0xff, 0x00]),
        // MODE SELECT(10)
        row(0x55, nil,  .modeSelect,                .none,       .unitState,    [.allowedInStandby], without: .savesState,
            usage: [0x55, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // MODE SELECT(10)
        row(0x55, nil,  .modeSelect,                .none,       .unitState,    [.allowedInStandby], requires: .savesState,
            usage: [0x55, 0x11, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // RESERVE(10)
        row(0x56, nil,  .reserve,                   .none,       .none,         [.allowedUnderAny, .allowedUnderReserve],
            usage: [0x56, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00]),
        // RELEASE(10)
        row(0x57, nil,  .release,                   .none,       .none,         [.allowedUnderAny, .allowedUnderReserve],
            usage: [0x57, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00]),
        // MODE SENSE(10)
        row(0x5a, nil,  .modeSense,                 .none,       .none,         [.allowedUnderWriteExclusive, .allowedInStandby],
            usage: [0x5a, 0x18, 0xff, 0xff, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE IN: READ KEYS
        row(0x5e, 0x00, .persistentReserveIn,       .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5e, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE IN: READ RESERVATION
        row(0x5e, 0x01, .persistentReserveIn,       .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5e, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE IN: REPORT CAPABILITIES
        row(0x5e, 0x02, .persistentReserveIn,       .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5e, 0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE IN: READ FULL STATUS
        row(0x5e, 0x03, .persistentReserveIn,       .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5e, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE OUT: REGISTER
        row(0x5f, 0x00, .persistentReserveOut,      .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5f, 0x00, 0xff, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE OUT: RESERVE
        row(0x5f, 0x01, .persistentReserveOut,      .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5f, 0x01, 0x0f, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE OUT: RELEASE
        row(0x5f, 0x02, .persistentReserveOut,      .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5f, 0x02, 0x0f, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE OUT: CLEAR
        row(0x5f, 0x03, .persistentReserveOut,      .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5f, 0x03, 0xff, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE OUT: PREEMPT
        row(0x5f, 0x04, .persistentReserveOut,      .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5f, 0x04, 0xff, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE OUT: PREEMPT AND ABORT
        row(0x5f, 0x05, .persistentReserveOut,      .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .passesACA, .allowedInStandby],
            usage: [0x5f, 0x05, 0xff, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE OUT: REGISTER AND IGNORE EXISTING KEY
        row(0x5f, 0x06, .persistentReserveOut,      .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5f, 0x06, 0xff, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE OUT: REGISTER AND MOVE
        row(0x5f, 0x07, .persistentReserveOut,      .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x5f, 0x07, 0xff, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // PERSISTENT RESERVE OUT: REPLACE LOST RESERVATION
        row(0x5f, 0x08, .persistentReserveOut,      .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .passesLostReservations, .allowedInStandby], requires: .savesState,
            usage: [0x5f, 0x08, 0x0f, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // XPWRITE(32)
        row(0x7f, 0x06, .xpWrite,                   .thirtyTwo,  .write,        [.needsMedium, .writesMedium, .uninterrupted],
            usage: [0x7f, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x18, 0x00, 0x06, 0x18, 0x00, 0xff, 0xff, 0xff, 0xff,
                    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff]),
        // XDWRITEREAD(32)
        row(0x7f, 0x07, .xdWriteRead,               .thirtyTwo,  .write,        [.needsMedium, .uninterrupted],
            usage: [0x7f, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x18, 0x00, 0x07, 0x1c, 0x00, 0xff, 0xff, 0xff, 0xff,
                    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff]),
        // GET LBA STATUS(32)
        row(0x7f, 0x12, .getLBAStatus32,            .none,       .none,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x7f, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x18, 0x00, 0x12, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff,
                    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff]),
        // READ(16)
        row(0x88, nil,  .read,                      .sixteen,    .read,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x88, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // COMPARE AND WRITE
        row(0x89, nil,  .compareAndWrite,           .compareAndWrite, .write,        [.needsMedium, .writesMedium, .uninterrupted],
            usage: [0x89, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0xff, 0x00, 0x00]),
        // WRITE(16)
        row(0x8a, nil,  .write,                     .sixteen,    .write,        [.needsMedium, .writesMedium],
            usage: [0x8a, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // ORWRITE(16)
        row(0x8b, nil,  .orWrite,                   .sixteen,    .write,        [.needsMedium, .writesMedium, .uninterrupted],
            usage: [0x8b, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // WRITE AND VERIFY(16)
        row(0x8e, nil,  .writeAndVerify,            .sixteen,    .write,        [.needsMedium, .writesMedium],
            usage: [0x8e, 0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // VERIFY(16)
        row(0x8f, nil,  .verify,                    .sixteen,    .read,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x8f, 0x16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // PRE-FETCH(16)
        row(0x90, nil,  .preFetch,                  .sixteen,    .read,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x90, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // SYNCHRONIZE CACHE(16)
        row(0x91, nil,  .synchronizeCache,          .sixteen,    .none,         [.needsMedium],
            usage: [0x91, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // WRITE SAME(16)
        row(0x93, nil,  .writeSame,                 .sixteen,    .write,        [.needsMedium, .writesMedium], without: .unmap,
            usage: [0x93, 0x01, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // WRITE SAME(16)
        row(0x93, nil,  .writeSame,                 .sixteen,    .write,        [.needsMedium, .writesMedium], requires: .unmap, without: .anchor,
            usage: [0x93, 0x09, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // WRITE SAME(16)
        row(0x93, nil,  .writeSame,                 .sixteen,    .write,        [.needsMedium, .writesMedium], requires: [.unmap, .anchor],
            usage: [0x93, 0x19, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // READ BUFFER(16): data
        row(0x9b, 0x02, .readBufferData,            .none,       .none,         [.allowedUnderWriteExclusive, .passesLostReservations],
            usage: [0x9b, 0x02, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // READ BUFFER(16): descriptor
        row(0x9b, 0x03, .readBufferDescriptor,      .none,       .none,         [.allowedUnderWriteExclusive, .passesLostReservations],
            usage: [0x9b, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // READ BUFFER(16): echo buffer
        row(0x9b, 0x0a, .readEchoBuffer,            .none,       .none,         [.allowedUnderWriteExclusive, .passesLostReservations, .allowedInTransition],
            usage: [0x9b, 0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]),
        // READ BUFFER(16): echo buffer descriptor
        row(0x9b, 0x0b, .readEchoBufferDescriptor,  .none,       .none,         [.allowedUnderWriteExclusive, .passesLostReservations, .allowedInTransition],
            usage: [0x9b, 0x0b, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // WRITE ATOMIC(16)
        row(0x9c, nil,  .writeAtomic,               .writeAtomic, .write,        [.needsMedium, .writesMedium, .uninterrupted], requires: .atomicWrite,
            usage: [0x9c, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0xff, 0xff, 0x00, 0x00]),
        // READ CAPACITY(16)
        row(0x9e, 0x10, .readCapacity16,            .none,       .none,         [.needsMedium, .allowedUnderAny, .allowedUnderReserve, .allowedInStandby],
            usage: [0x9e, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // GET LBA STATUS(16)
        row(0x9e, 0x12, .getLBAStatus,              .none,       .none,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0x9e, 0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // REPORT LUNS
        row(0xa0, nil,  .reportLUNs,                .none,       .none,         [.passesUnitAttention, .worksWithoutUnit, .allowedUnderAny, .allowedUnderReserve, .passesLostReservations, .allowedInTransition],
            usage: [0xa0, 0x00, 0xff, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // REPORT IDENTIFYING INFORMATION
        row(0xa3, 0x05, .reportIdentifyingInformation, .none,       .none,         [.allowedUnderAny, .allowedUnderReserve], requires: .savesState,
            usage: [0xa3, 0x05, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xfe, 0x00]),
        // REPORT TARGET PORT GROUPS
        row(0xa3, 0x0a, .reportTargetPortGroups,    .none,       .none,         [.allowedUnderAny, .allowedUnderReserve, .passesLostReservations, .allowedInTransition],
            usage: [0xa3, 0x2a, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // REPORT SUPPORTED OPERATION CODES
        row(0xa3, 0x0c, .reportSupportedOperationCodes, .none,       .none,         [.allowedUnderWriteExclusive],
            usage: [0xa3, 0x0c, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS
        row(0xa3, 0x0d, .reportSupportedTaskManagementFunctions, .none,       .none,         [.allowedUnderWriteExclusive],
            usage: [0xa3, 0x0d, 0x80, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // REPORT TIMESTAMP
        row(0xa3, 0x0f, .reportTimestamp,           .none,       .none,         [.allowedUnderAny],
            usage: [0xa3, 0x0f, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // SET IDENTIFYING INFORMATION
        row(0xa4, 0x06, .setIdentifyingInformation, .none,       .none,         [], requires: .savesState,
            usage: [0xa4, 0x06, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xfe, 0x00]),
        // SET TARGET PORT GROUPS
        row(0xa4, 0x0a, .setTargetPortGroups,       .none,       .unitState,    [.allowedInUnavailable], requires: .explicitAccess,
            usage: [0xa4, 0x0a, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // SET TIMESTAMP
        row(0xa4, 0x0f, .setTimestamp,              .none,       .none,         [],
            usage: [0xa4, 0x0f, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // READ(12)
        row(0xa8, nil,  .read,                      .twelve,     .read,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0xa8, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // WRITE(12)
        row(0xaa, nil,  .write,                     .twelve,     .write,        [.needsMedium, .writesMedium],
            usage: [0xaa, 0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // WRITE AND VERIFY(12)
        row(0xae, nil,  .writeAndVerify,            .twelve,     .write,        [.needsMedium, .writesMedium],
            usage: [0xae, 0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // VERIFY(12)
        row(0xaf, nil,  .verify,                    .twelve,     .read,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0xaf, 0x16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
        // READ DEFECT DATA(12)
        row(0xb7, nil,  .readDefectData12,          .none,       .none,         [.needsMedium, .allowedUnderWriteExclusive],
            usage: [0xb7, 0x1f, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0x00, 0x00]),
    ]
}
