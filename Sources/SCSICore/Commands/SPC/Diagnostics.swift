// SEND DIAGNOSTIC and RECEIVE DIAGNOSTIC RESULTS: the default self-test, and the page that lists the pages.
//
// Called by: DeviceServer. Must not know: the task set, transports.

import CBackstore
import CTarget

extension SPC {
    private static let diagnosticHeader = 4
    private static let supportedPages: UInt8 = 0x00

    /// SEND DIAGNOSTIC (SPC-4 6.42): SELFTEST, or with PF a parameter list, which can only be the empty Supported
    /// Diagnostic Pages page. The short and extended self-tests of SELF-TEST CODE are refused with INVALID FIELD IN CDB
    /// at that field, and there is no log page 10h of their results: what they would test, the host's devices, the host
    /// tests itself, and a test in the background that reads blocks would find no more than the default one.
    static func sendDiagnostic(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let length = Int(cdb.uint16(3))
        if cdb.bit(1, 2) {
            if length != 0 { return .failed(.invalidField(inCDB: 3)) }
            return selfTest(task, on: unit)
        }
        if length == 0 { return .done(.good) }
        // Without PF the list has a format of the vendor's, and this one has none.
        guard cdb.bit(1, 4) else { return .failed(.invalidField(inCDB: 1, bit: 4)) }
        guard let list = unsafe DeviceServer.parameterList(task, length: length, into: unit.shard.parameters) else {
            return .overrun
        }
        guard length >= diagnosticHeader else { return .failed(.parameterListLengthError) }
        guard list.byte(0) == supportedPages else { return .failed(.invalidField(inParameterList: 0)) }
        guard list.uint16(2) == 0 else { return .failed(.invalidField(inParameterList: 2)) }
        return .done(.good)
    }

    /// RECEIVE DIAGNOSTIC RESULTS (SPC-6). Without PCV it is the page that the last SEND DIAGNOSTIC asked for, and
    /// there is only one.
    static func receiveDiagnosticResults(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        if cdb.bit(1, 0), cdb[2] != supportedPages { return .failed(.invalidField(inCDB: 2)) }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint16(3)) { writer in
            writer.byte(supportedPages)
            writer.byte(0)
            writer.uint16(1)
            writer.byte(supportedPages)
        }
    }

    // MARK: The default self-test

    /// Reads a block at the start, in the middle and at the end of the medium; `progress` counts them. A block that
    /// cannot be read is LOGICAL UNIT FAILED SELF-TEST.
    private static func selfTest(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        guard unit.shard.takeStaging(task) else { return .needsStaging }
        task.step = 1
        task.progress = 0
        return selfTestRead(task, on: unit)
    }

    private static func selfTestRead(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        // Between two blocks the medium may have been taken out.
        guard unit.medium.blocks.value > 0 else { return .failed(SenseData(.notReady, .mediumNotPresent)) }
        let last = unit.medium.blocks.value - 1
        let address = LogicalBlockAddress([0, last / 2, last][Int(task.progress)])
        DeviceServer.fillStaging(
            task, unit.shard, SCSI_BACKSTORE_READ, offset: unit.medium.offset(of: address),
            length: unit.medium.bytes(BlockCount(1)))
        return .submit
    }

    static func selfTestStep(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        task.progress += 1
        return task.progress == 3 ? .done(.good) : selfTestRead(task, on: unit)
    }
}
