// LOG SENSE and LOG SELECT.
//
// Called by: DeviceServer. Must not know: what the parameters mean (LogPages).

import CBackstore
import CTarget

/// PC of LOG SENSE and LOG SELECT (SPC-4 6.8): which values of data counters. List parameters have only one.
private enum LogValues: UInt8 {
    case threshold, cumulative, defaultThreshold, defaultCumulative

    init(_ cdb: CDB) { self.init(rawValue: cdb[2] >> 6)! }

    var areThresholds: Bool { self == .threshold || self == .defaultThreshold }
}

extension SPC {
    private static let pageHeader = 4

    // MARK: LOG SENSE

    /// LOG SENSE (SPC-4 6.8). PPC is obsolete, SP is refused: nothing is saved.
    static func logSense(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let code = LogPageCode(cdb[2] & 0x3f, cdb[3])
        let all = LogPages.all(of: unit)
        guard all.contains(code) else {
            let known = all.contains { $0.page == code.page }
            return .failed(known ? .invalidField(inCDB: 3) : .invalidField(inCDB: 2, bit: 5))
        }
        let pointer = cdb.uint16(5)
        guard LogPages.codes(of: unit).contains(code) else {
            if pointer != 0 { return .failed(.invalidField(inCDB: 5)) }
            return listOfPages(task, cdb, code, all, on: unit)
        }
        let values = LogValues(cdb)
        let parameters = LogPages.parameters(code, of: unit)
        if values.areThresholds, parameters.contains(where: { $0.kind == .unboundedCounter }) {
            return .failed(.invalidField(inCDB: 2, bit: 7))
        }
        guard pointer <= parameters.last!.code else { return .failed(.invalidField(inCDB: 5)) }
        if code.page == 0x0c { return measureSpace(task, on: unit) }
        return logParameters(task, cdb, code, on: unit)
    }

    /// Page 0Ch tells what the backstore says now.
    private static func measureSpace(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        let length = MemoryLayout<scsi_backstore_space>.size
        unsafe UnsafeMutableRawBufferPointer(rebasing: unit.shard.staging(task)[..<length])
            .initializeMemory(as: UInt8.self, repeating: 0)
        DeviceServer.fillStaging(
            task, unit.shard, SCSI_BACKSTORE_SPACE, offset: ByteOffset(0), length: ByteCount(UInt64(length)))
        unsafe task.request.pointee.length = 0
        task.step = 1
        return .submit
    }

    static func logSenseMeasured(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        unit.spaceMeasured(unsafe unit.shard.staging(task).load(as: scsi_backstore_space.self))
        return logParameters(task, cdb, LogPageCode(cdb[2] & 0x3f, cdb[3]), on: unit)
    }

    private static func logParameters(
        _ task: TaskHandle, _ cdb: CDB, _ code: LogPageCode, on unit: LogicalUnit
    ) -> Outcome {
        let (values, pointer) = (LogValues(cdb), cdb.uint16(5))
        let parameters = LogPages.parameters(code, of: unit)
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint16(7)) { writer in
            logHeader(code, &writer)
            for parameter in parameters where parameter.code >= pointer {
                write(parameter, of: code, values, unit, &writer)
            }
            writer.patch16(UInt16(clamping: writer.length - pageHeader), at: 2)
        }
    }

    /// DS is one: the page is not saved.
    private static func logHeader(_ code: LogPageCode, _ writer: inout ParameterWriter) {
        writer.byte(0x80 | (code.subpage == 0 ? 0 : 0x40) | code.page)
        writer.byte(code.subpage)
        writer.uint16(0)
    }

    /// Supported Log Pages (00h), Supported Log Pages and Subpages (00h/FFh), Supported Subpages (any page/FFh).
    private static func listOfPages(
        _ task: TaskHandle, _ cdb: CDB, _ code: LogPageCode, _ all: [LogPageCode], on unit: LogicalUnit
    ) -> Outcome {
        DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint16(7)) { writer in
            logHeader(code, &writer)
            if code.subpage == 0 {
                writer.bytes(all.filter { $0.subpage == 0 }.map(\.page))
            } else {
                for entry in all where code.page == 0 || entry.page == code.page {
                    writer.byte(entry.page)
                    writer.byte(entry.subpage)
                }
            }
            writer.patch16(UInt16(clamping: writer.length - pageHeader), at: 2)
        }
    }

    private static func write(
        _ parameter: LogParameter, of code: LogPageCode, _ values: LogValues, _ unit: LogicalUnit,
        _ writer: inout ParameterWriter
    ) {
        let threshold =
            values == .defaultThreshold || values == .defaultCumulative
            ? .none : unit.log.threshold(code.page, parameter.code)
        writer.uint16(parameter.code)
        writer.byte(0x20 | threshold.controlBits | parameter.kind.rawValue)  // TSD
        writer.byte(UInt8(parameter.value.count))
        switch (parameter.kind, values) {
        case (.boundedCounter, .threshold), (.boundedCounter, .defaultThreshold): writer.uint64(threshold.value)
        case (.boundedCounter, .defaultCumulative), (.unboundedCounter, .defaultCumulative):
            writer.zeros(parameter.value.count)
        default: writer.bytes(parameter.value)
        }
    }

    // MARK: LOG SELECT

    /// LOG SELECT (SPC-4 6.7): without a list it resets, with one it sets. SP is refused: nothing is saved.
    static func logSelect(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let length = Int(cdb.uint16(7))
        if length == 0 { return resetLogs(task, cdb, on: unit) }
        // The pages are named in the list, and a list sets values (SPC-4 6.7.1).
        if cdb.bit(1, 1) { return .failed(.invalidField(inCDB: 1, bit: 1)) }
        if cdb[2] & 0x3f != 0 { return .failed(.invalidField(inCDB: 2, bit: 5)) }
        if cdb[3] != 0 { return .failed(.invalidField(inCDB: 3)) }
        let values = LogValues(cdb)
        // Default values are vendor specific: nobody sets them.
        guard values == .threshold || values == .cumulative else { return .failed(.invalidField(inCDB: 2, bit: 7)) }
        guard let list = unsafe DeviceServer.parameterList(task, length: length, into: unit.shard.parameters) else {
            return .overrun
        }
        var log = unit.log
        var offset = 0
        while offset < list.count {
            if let sense = parseLogPage(list, &offset, values, unit, into: &log) { return .failed(sense) }
        }
        if log.thresholds != unit.log.thresholds { unit.setLog(log, by: task.nexus) }
        return .done(.good)
    }

    /// SPC-4 6.7.2: with PCR, counters and thresholds get their default values; without it, those that PC names, if it
    /// names default values.
    private static func resetLogs(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let code = LogPageCode(cdb[2] & 0x3f, cdb[3])
        let pages = LogPages.codes(of: unit).filter {
            code == LogPageCode(0) || $0 == code
                || code.subpage == LogPageCode.allSubpages && (code.page == 0 || code.page == $0.page)
        }
        if pages.isEmpty {
            let known = code.page == 0 || LogPages.codes(of: unit).contains { $0.page == code.page }
            return .failed(known ? .invalidField(inCDB: 3) : .invalidField(inCDB: 2, bit: 5))
        }
        let values = LogValues(cdb)
        let (all, statistics) = (cdb.bit(1, 1), unit.statistics)
        guard all || values == .defaultThreshold || values == .defaultCumulative else { return .done(.good) }
        var log = unit.log
        for page in pages.map(\.page) {
            if all || values == .defaultThreshold { log.resetThresholds(page) }
            if all || values == .defaultCumulative { log.resetCounters(page, at: statistics) }
        }
        unit.setLog(log, by: task.nexus)
        return .done(.good)
    }

    private static func parseLogPage(
        _ list: ParameterReader, _ offset: inout Int, _ values: LogValues, _ unit: LogicalUnit, into log: inout LogState
    ) -> SenseData? {
        guard list.count >= offset + pageHeader else { return .parameterListLengthError }
        let code = LogPageCode(list.byte(offset) & 0x3f, list.byte(offset + 1))
        let isSubpage = list.byte(offset) & 0x40 != 0
        guard LogPages.codes(of: unit).contains(code), isSubpage == (code.subpage != 0) else {
            return .invalidField(inParameterList: offset)
        }
        let end = offset + pageHeader + Int(list.uint16(offset + 2))
        guard list.count >= end else { return .parameterListLengthError }
        offset += pageHeader
        let known = LogPages.parameters(code, of: unit)
        var next = 0
        while offset < end {
            // A page that ends within a parameter, and parameters out of order (SPC-4 7.3.2).
            guard end >= offset + 4, end >= offset + 4 + Int(list.byte(offset + 3)) else {
                return .invalidField(inParameterList: offset)
            }
            guard let index = known[next...].firstIndex(where: { $0.code == list.uint16(offset) }) else {
                return .invalidField(inParameterList: offset)
            }
            if let sense = setParameter(known[index], of: code, list, offset, values, &log) { return sense }
            next = index + 1
            offset += 4 + known[index].value.count
        }
        return nil
    }

    /// Only thresholds can be set: the counters can be reset, and lists say what is.
    private static func setParameter(
        _ parameter: LogParameter, of code: LogPageCode, _ list: ParameterReader, _ offset: Int, _ values: LogValues,
        _ log: inout LogState
    ) -> SenseData? {
        guard parameter.kind == .boundedCounter, values == .threshold else {
            return .invalidField(inParameterList: offset)
        }
        let control = list.byte(offset + 2)
        let threshold = LogThreshold(
            value: 0, isEnabled: control & 0x10 != 0, criteria: control >> 2 & 0b11)
        let mayBeEnabled = parameter.code != ErrorCounterPage.bytesProcessed
        // DU and TSD: the target goes on counting, and does not save.
        guard control & 0xe3 == 0x20, mayBeEnabled || !threshold.isEnabled else {
            return .invalidField(inParameterList: offset + 2)
        }
        guard Int(list.byte(offset + 3)) == parameter.value.count else {
            return .invalidField(inParameterList: offset + 3)
        }
        var set = threshold
        set.value = list.uint64(offset + 4)
        log.thresholds[LogState.Counter(page: code.page, code: parameter.code)] = set == .none ? nil : set
        return nil
    }
}
