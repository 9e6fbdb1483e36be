// LogPages: the log pages of a logical unit (SPC-4 7.3, SBC-4 6.4): which there are, and their parameters, each from a
// counter or a state of the unit.
//
// Owns: what LOG SELECT can change: thresholds, and from where counters count. Called by: LOG SENSE, LOG SELECT,
// LogicalUnit (thresholds). Must not know: CDBs, tasks in flight.
//
// Nothing is saved: the counters begin with the unit (DS and TSD are one everywhere, SP is refused).

import CBackstore
import CTarget

/// A log page by page code and subpage code.
struct LogPageCode: Hashable, Comparable {
    let page: UInt8
    let subpage: UInt8

    static let allSubpages: UInt8 = 0xff

    init(_ page: UInt8, _ subpage: UInt8 = 0) {
        self.page = page
        self.subpage = subpage
    }

    static func < (left: Self, right: Self) -> Bool { (left.page, left.subpage) < (right.page, right.subpage) }
}

/// What a parameter is (SPC-4 7.3.2), and what LOG SELECT may do with it.
enum LogParameterKind: UInt8 {
    /// A data counter that has a threshold.
    case boundedCounter = 0b00
    /// A data counter without one.
    case unboundedCounter = 0b10
    /// Fields in binary.
    case binaryList = 0b11
}

/// One log parameter.
struct LogParameter {
    let code: UInt16
    let kind: LogParameterKind
    let value: [UInt8]

    static func list(_ code: UInt16, _ value: [UInt8]) -> Self { Self(code: code, kind: .binaryList, value: value) }
}

/// The three error counter pages (SPC-4 7.3.14, 7.3.22, 7.3.23), which differ in what they count.
enum ErrorCounterPage: UInt8, CaseIterable {
    case write = 0x02, read = 0x03, verify = 0x05

    /// The page that counts the errors of a task's request.
    init(of task: TaskHandle) {
        let reading = unsafe task.request.pointee.operation == UInt8(SCSI_BACKSTORE_READ)
        switch task.row?.handler {
        case .verify: self = .verify
        case .writeAndVerify: self = reading ? .verify : .write
        default: self = reading ? .read : .write
        }
    }

    var counters: WritableKeyPath<LogicalUnitStatistics, MediumErrorCounters> {
        switch self {
        case .write: \.writeErrors
        case .read: \.readErrors
        case .verify: \.verifyErrors
        }
    }

    private var bytes: KeyPath<LogicalUnitStatistics, UInt64> {
        switch self {
        case .write: \.bytesWritten
        case .read: \.bytesRead
        case .verify: \.bytesVerified
        }
    }

    /// The parameters that something here counts: errors corrected with possible delays (which is what trying again
    /// is), total of rewrites or rereads that helped, total errors corrected, total bytes processed, total uncorrected
    /// errors.
    static let codes: [UInt16] = [1, 2, 3, 5, 6]
    /// The one that each READ or WRITE changes; thresholds are for the others, so that none is looked at per command.
    static let bytesProcessed: UInt16 = 5

    /// A parameter's value.
    func value(_ code: UInt16, _ statistics: LogicalUnitStatistics) -> UInt64 {
        let errors = statistics[keyPath: counters]
        return code == Self.bytesProcessed
            ? statistics[keyPath: bytes] : code == 6 ? errors.uncorrected : errors.corrected
    }
}

/// The threshold of a data counter (SPC-4 7.3.2).
struct LogThreshold: Equatable {
    /// Never met by a counter that has not overflowed.
    static let none = Self(value: .max, isEnabled: false, criteria: 0)

    var value: UInt64
    /// ETC.
    var isEnabled: Bool
    /// TMC: 0 each update, 1 equal, 2 not equal, 3 greater.
    var criteria: UInt8

    func isMet(by counter: UInt64) -> Bool {
        guard isEnabled else { return false }
        switch criteria {
        case 0: return true
        case 1: return counter == value
        case 2: return counter != value
        default: return counter > value
        }
    }

    /// The bits of a parameter control byte.
    var controlBits: UInt8 { (isEnabled ? 0x10 : 0) | criteria << 2 }
}

/// What LOG SELECT can change. A value: LOG SELECT changes a copy and installs it when the whole list was right.
struct LogState {
    /// A data counter by page and parameter code.
    struct Counter: Hashable {
        let page: UInt8
        let code: UInt16
    }

    /// Thresholds other than the default.
    var thresholds: [Counter: LogThreshold] = [:]
    /// The statistics at the last reset of each page's counters.
    private var origins: [UInt8: LogicalUnitStatistics] = [:]
    /// A medium error was met since the informational exceptions page was reset: the host's medium is failing.
    var failurePredicted = false

    /// What a page's counters count from.
    func origin(_ page: UInt8) -> LogicalUnitStatistics { origins[page] ?? LogicalUnitStatistics() }

    func threshold(_ page: UInt8, _ code: UInt16) -> LogThreshold {
        thresholds[Counter(page: page, code: code)] ?? .none
    }

    func value(_ page: ErrorCounterPage, _ code: UInt16, _ statistics: LogicalUnitStatistics) -> UInt64 {
        page.value(code, statistics) &- page.value(code, origin(page.rawValue))
    }

    func meetsThreshold(_ page: ErrorCounterPage, _ statistics: LogicalUnitStatistics) -> Bool {
        ErrorCounterPage.codes.contains {
            threshold(page.rawValue, $0).isMet(by: value(page, $0, statistics))
        }
    }

    /// The default cumulative values: zero (SPC-4: resetting log parameters, those marked "reset only").
    mutating func resetCounters(_ page: UInt8, at statistics: LogicalUnitStatistics) {
        switch page {
        case 0x02, 0x03, 0x05, 0x19: origins[page] = statistics
        case 0x2f: failurePredicted = false
        default: break
        }
    }

    /// The default threshold values.
    mutating func resetThresholds(_ page: UInt8) { thresholds = thresholds.filter { $0.key.page != page } }
}

/// The log pages.
enum LogPages {
    /// The pages with parameters of a unit, sorted.
    static func codes(of unit: LogicalUnit) -> [LogPageCode] {
        let pages: [UInt8] = [0x02, 0x03, 0x05] + (unit.hasProvisioningThresholds ? [0x0c] : [])
        return (pages + [0x0d, 0x0e, 0x15, 0x18, 0x19, 0x2f]).map { LogPageCode($0) }
    }

    /// All that LOG SENSE answers: the pages with parameters and the lists of pages and of subpages.
    static func all(of unit: LogicalUnit) -> [LogPageCode] {
        let pages = codes(of: unit)
        let lists = Set(pages.map(\.page) + [0]).map { LogPageCode($0, LogPageCode.allSubpages) }
        return ([LogPageCode(0)] + pages + lists).sorted()
    }

    /// The parameters of a page, by ascending code.
    static func parameters(_ code: LogPageCode, of unit: LogicalUnit) -> [LogParameter] {
        if let page = ErrorCounterPage(rawValue: code.page) { return errorCounters(page, unit) }
        switch code.page {
        case 0x0c: return logicalBlockProvisioning(unit)
        case 0x0d: return temperature
        case 0x0e: return startStopCycles(unit)
        case 0x15: return backgroundScan(unit)
        case 0x18: return protocolSpecificPorts(unit)
        case 0x19: return generalStatistics(unit)
        case 0x2f: return informationalExceptions(unit)
        default: preconditionFailure("a log page without parameters")
        }
    }

    private static func errorCounters(_ page: ErrorCounterPage, _ unit: LogicalUnit) -> [LogParameter] {
        let statistics = unit.statistics
        return ErrorCounterPage.codes.map {
            LogParameter(code: $0, kind: .boundedCounter, value: bytes(unit.log.value(page, $0, statistics)))
        }
    }

    /// Logical Block Provisioning (SBC-4 6.4.5): available and used LBA mapping resources in threshold sets, as
    /// measured last; SCOPE: the unit's own, or shared with others.
    private static func logicalBlockProvisioning(_ unit: LogicalUnit) -> [LogParameter] {
        let measured = unit.measuredSpace
        func parameter(_ code: UInt16, _ bytes: UInt64, scope: UInt8) -> LogParameter {
            .list(code, Self.bytes(unit.thresholdSets(bytes)) + [scope, 0, 0, 0])
        }
        return [
            parameter(1, measured?.available ?? 0, scope: measured?.isShared ?? false ? 0b10 : 0b01),
            parameter(2, measured?.used ?? 0, scope: 0b01),
        ]
    }

    /// Temperature: FFh, what a device server reports that cannot tell (SPC-4 7.3.21): a virtual disk has none. There
    /// is no reference temperature either.
    private static var temperature: [LogParameter] { [.list(0, [0, 0xff]), .list(1, [0, 0xff])] }

    /// Start-Stop Cycle Counter (SPC-4 7.3.17): what was counted. There is no lifetime to compare it with, and no date
    /// of manufacture.
    private static func startStopCycles(_ unit: LogicalUnit) -> [LogParameter] {
        let statistics = unit.statistics
        return [.list(4, bytes(statistics.startStopCycles)), .list(6, bytes(statistics.loadUnloadCycles))]
    }

    /// Background Scan (SBC-4 6.4.2): the status alone: none is active, none was performed, for nothing here scans. The
    /// minutes are those since the unit came to be in this daemon.
    private static func backgroundScan(_ unit: LogicalUnit) -> [LogParameter] {
        let age = unit.shard.clock &- (unit.poweredOnAt ?? unit.shard.clock)
        return [.list(0, bytes(UInt32(clamping: age / 60_000_000_000)) + [0, 0, 0, 0, 0, 0, 0, 0])]
    }

    /// Protocol Specific Port (SPC-4 7.3.13): for each port PROTOCOL IDENTIFIER Fh, no specific protocol: neither
    /// virtio nor Xen has one of T10's, and so there is nothing specific to tell.
    private static func protocolSpecificPorts(_ unit: LogicalUnit) -> [LogParameter] {
        (unit.target?.ports.identifiers ?? [1]).map { .list($0, [0x0f, 0, 0, 0]) }
    }

    /// General Statistics and Performance (SPC-4 7.3.6), in nanoseconds. The weighted fields are zero, as they are
    /// where command priority is not supported.
    private static func generalStatistics(_ unit: LogicalUnit) -> [LogParameter] {
        let now = unit.statistics
        let origin = unit.log.origin(0x19)
        let shift = unit.medium.blockShift
        let access = [
            now.reads - origin.reads,
            now.writes + now.unmaps - origin.writes - origin.unmaps,
            (now.bytesWritten - origin.bytesWritten) >> shift,
            (now.bytesRead - origin.bytesRead) >> shift,
            now.readNanoseconds &- origin.readNanoseconds,
            now.writeNanoseconds &- origin.writeNanoseconds,
            0, 0,
        ]
        let idle = now.idleNanoseconds &- origin.idleNanoseconds
        return [
            LogParameter(code: 1, kind: .unboundedCounter, value: access.flatMap { bytes($0) }),
            LogParameter(code: 2, kind: .unboundedCounter, value: bytes(idle)),
            .list(3, bytes(9 as UInt32) + bytes(1 as UInt32)),
        ]
    }

    /// Informational Exceptions (SPC-4 7.3.8): the exception that there is, and no temperature.
    private static func informationalExceptions(_ unit: LogicalUnit) -> [LogParameter] {
        let exception = unit.informationalException?.code ?? .noAdditionalSense
        return [.list(0, [exception.code, exception.qualifier, 0xff, 0])]
    }

    private static func bytes(_ value: some FixedWidthInteger) -> [UInt8] {
        unsafe withUnsafeBytes(of: value.bigEndian) { unsafe Array($0) }
    }
}
