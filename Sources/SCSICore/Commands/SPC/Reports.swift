// REQUEST SENSE, REPORT LUNS, REPORT SUPPORTED OPERATION CODES, REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS.
//
// Called by: DeviceServer, MissingLogicalUnit. Must not know: transports.

import CTarget

extension SPC {
    /// REQUEST SENSE (SPC-4 6.39): a pending unit attention condition, or else a deferred error, which is cleared by
    /// it; else why the port or the unit is not ready; else an informational exception condition (MRIE 6); else the
    /// power condition; else NO SENSE.
    static func requestSense(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        var sense = SenseData.none
        let condition = unit.unitAttention(for: task.nexus)
        if let condition {
            sense = condition.sense
        } else if let error = unit.deferredError(for: task.nexus) {
            sense = error
        } else if unit.access(of: task.nexus) != .full {
            sense = unit.access(of: task.nexus).sense
        } else if unit.readiness != .ready {
            sense = unit.readiness.sense
        } else if let exception = unit.exceptionOnRequest {
            sense = SenseData(.noSense, exception)
        } else if let power = unit.powerCondition {
            sense = SenseData(.noSense, power.condition.sense(byTimer: power.byTimer))
        }
        let outcome = DeviceServer.parameterData(task, unit.shard, allocationLength: cdb[4]) {
            sense.write(descriptorFormat: cdb.bit(1, 0), to: &$0)
        }
        // Cleared once it is reported, and not by a command whose buffers are too short for the report, or that asks
        // for nothing of it.
        if case .done = outcome, cdb[4] > 0 {
            if let condition {
                unit.report(condition, for: task.nexus)
            } else {
                unit.setDeferredError(false, for: task.nexus)
            }
        }
        return outcome
    }

    /// REPORT LUNS through a unit.
    static func reportLUNs(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        guard let target = unit.target else {
            return .failed(SenseData(.illegalRequest, .logicalUnitNotSupported))
        }
        return reportLUNs(task, cdb, of: target)
    }

    /// REPORT LUNS (SPC-4 6.33) with SELECT REPORT 00h (units), 01h (well-known units), 02h (both).
    static func reportLUNs(_ task: TaskHandle, _ cdb: CDB, of target: TargetDevice) -> Outcome {
        let select = cdb[2]
        guard select <= 2 else { return .failed(.invalidField(inCDB: 2)) }
        let outcome = DeviceServer.parameterData(task, target.shard, allocationLength: cdb.uint32(6)) { writer in
            writer.uint32(0)
            writer.uint32(0)
            if select != 1 { for entry in target.logicalUnits { writer.uint64(entry.lun.field) } }
            if select != 0 { writer.uint64(0xc101 << 48) }
            writer.patch32(UInt32(writer.length - 8), at: 0)
        }
        if case .done = outcome { target.clearEverywhere(.reportedLUNsChanged, for: task.nexus) }
        return outcome
    }

    /// REPORT SUPPORTED OPERATION CODES (SPC-4 6.35): all, or one in the three ways to name it, with or without the
    /// command timeouts descriptor.
    static func reportSupportedOperationCodes(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let options = cdb[2] & 7
        let timeouts = cdb.bit(2, 7)
        let (code, serviceAction) = (cdb[3], cdb.uint16(4))
        let rows = unit.table.all
        let named = rows.filter { $0.operationCode == code }
        let row: CommandDescriptor?
        switch options {
        case 0:
            return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(6)) {
                allCommands(rows, timeouts: timeouts, &$0)
            }
        case 1:
            if named.first?.hasServiceAction == true { return .failed(.invalidField(inCDB: 2, bit: 2)) }
            row = named.first
        case 2:
            if named.first?.hasServiceAction == false { return .failed(.invalidField(inCDB: 2, bit: 2)) }
            row = named.first { $0.serviceAction == serviceAction }
        case 3:
            row = named.first { $0.hasServiceAction ? $0.serviceAction == serviceAction : serviceAction == 0 }
        default: return .failed(.invalidField(inCDB: 2, bit: 2))
        }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(6)) {
            oneCommand(row, timeouts: timeouts, &$0)
        }
    }

    private static func allCommands(_ rows: [CommandDescriptor], timeouts: Bool, _ writer: inout ParameterWriter) {
        writer.uint32(0)
        for row in rows {
            writer.byte(row.operationCode)
            writer.byte(0)
            writer.uint16(row.serviceAction)
            writer.byte(0)
            writer.byte((timeouts ? 2 : 0) | (row.hasServiceAction ? 1 : 0))  // CTDP, SERVACTV
            writer.uint16(UInt16(row.length))
            if timeouts { timeoutsDescriptor(&writer) }
        }
        writer.patch32(UInt32(writer.length - 4), at: 0)
    }

    private static func oneCommand(_ row: CommandDescriptor?, timeouts: Bool, _ writer: inout ParameterWriter) {
        writer.byte(0)
        guard let row else {
            writer.byte(0x01)  // SUPPORT 001b: not supported
            writer.uint16(0)
            return
        }
        writer.byte(0x03 | (timeouts ? 0x80 : 0))  // SUPPORT 011b: as the standard says; CTDP
        writer.uint16(UInt16(row.length))
        for offset in 0..<Int(row.length) { writer.byte(row.usageByte(offset)) }
        if timeouts { timeoutsDescriptor(&writer) }
    }

    /// The command timeouts descriptor (SPC-4 6.35.4) with no timeouts indicated: how long a command takes is the
    /// medium's business.
    private static func timeoutsDescriptor(_ writer: inout ParameterWriter) {
        writer.uint16(10)
        writer.zeros(10)
    }

    /// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-4 6.36): all that SAM-6 has. An allocation length below four is
    /// an error here, unlike elsewhere.
    static func reportSupportedTaskManagementFunctions(
        _ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit
    ) -> Outcome {
        let extended = cdb.bit(2, 7)
        if cdb.uint32(6) < 4 { return .failed(.invalidField(inCDB: 6)) }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(6)) { writer in
            let bits = TaskManagementFunction.allCases.map(reportBit)
            writer.byte(bits.filter { $0.byte == 0 }.reduce(0) { $0 | $1.bit })
            writer.byte(bits.filter { $0.byte == 1 }.reduce(0) { $0 | $1.bit })
            writer.byte(0)
            writer.byte(extended ? 0x0c : 0)
            if extended { writer.zeros(12) }  // no timeouts indicated
        }
    }

    // swift-format-ignore
    private static func reportBit(_ function: TaskManagementFunction) -> (byte: Int, bit: UInt8) {
        switch function {
        case .abortTask:              (0, 0x80)
        case .abortTaskSet:           (0, 0x40)
        case .clearACA:               (0, 0x20)
        case .clearTaskSet:           (0, 0x10)
        case .logicalUnitReset:       (0, 0x08)
        case .queryTask:              (0, 0x04)
        case .targetReset:            (0, 0x02)
        case .queryAsynchronousEvent: (1, 0x04)
        case .queryTaskSet:           (1, 0x02)
        case .nexusReset:             (1, 0x01)
        }
    }
}
