// Properties generated from the command table, and what is compared with the C headers.

import CBackstore
import CTarget
import CoreTestSupport
import Testing

@testable import SCSICore

@Suite("The command table")
struct CommandTableTests {
    private static let rows = CommandTable(features: .all).all

    /// A unit with every feature, so that it has every row.
    private static func world(
        attentive: Bool = false, configure: (ScriptedBackstore) -> Void = { _ in }
    ) -> TestTarget {
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "SERIAL0001")
        configuration.removable = true
        return TestTarget(
            attentive: attentive, configuration: configuration, savesState: true,
            portGroups: [TargetPortGroup(identifier: 1, ports: [1, 2], isExplicit: true)], configure: configure)
    }

    /// A CDB of a row with all parameters zero.
    private func plain(_ row: CommandDescriptor) -> [UInt8] {
        var cdb = [UInt8](repeating: 0, count: Int(row.length))
        cdb[0] = row.operationCode
        if row.operationCode == 0x7f {
            cdb.replaceSubrange(7..<10, with: [0x18, UInt8(row.serviceAction >> 8), UInt8(row.serviceAction & 0xff)])
        } else if row.hasServiceAction {
            cdb[1] = UInt8(row.serviceAction)
        }
        return cdb
    }

    /// Whether a bit is of the SERVICE ACTION field.
    private func isServiceAction(_ row: CommandDescriptor, _ byte: Int, _ bit: Int) -> Bool {
        row.operationCode == 0x7f ? byte == 8 || byte == 9 : row.hasServiceAction && byte == 1 && bit < 5
    }

    @Test(
        "A bit that a row does not use is INVALID FIELD IN CDB with exactly that byte and bit", arguments: rows.indices)
    func unusedBits(index: Int) {
        let row = Self.rows[index]
        let world = Self.world()
        for byte in 1..<Int(row.length) {
            for bit in 0..<8 where row.usageByte(byte) & 1 << bit == 0 {
                // Another service action is another row, or none.
                if isServiceAction(row, byte, bit) { continue }
                var cdb = plain(row)
                cdb[byte] |= 1 << bit
                let end = world.run(cdb)
                #expect(end.summary == "5/2400 CDB \(byte).\(bit)", "\(row.handler) byte \(byte) bit \(bit)")
            }
        }
        #expect(world.backstore.accepted.isEmpty)
    }

    @Test("A bit that a row uses is never refused as a reserved bit", arguments: rows.indices)
    func usedBits(index: Int) {
        let row = Self.rows[index]
        for byte in 1..<Int(row.length) {
            for bit in 0..<8 where row.usageByte(byte) & 1 << bit != 0 {
                if isServiceAction(row, byte, bit) || row.hasServiceAction && byte == 1 { continue }
                let world = Self.world()
                var cdb = plain(row)
                cdb[byte] |= 1 << bit
                // ANCHOR means something beside UNMAP only.
                if row.handler == .writeSame, byte == 1, bit == 4 { cdb[1] |= 1 << 3 }
                let tag = world.a.send(cdb, dataOut: Array(repeating: 0, count: 512), dataIn: 512)
                world.drain()
                let end = world.a.completions.last { $0.tag == tag }
                #expect(end != nil)
                // PAGE CODE, BYTCHK and the like are refused for their value, which names the field as a whole.
                let valueFields: Set<CommandHandler> = [
                    .verify, .modeSense, .inquiry, .reportLUNs, .reportSupportedOperationCodes,
                    .reportIdentifyingInformation, .setIdentifyingInformation, .logSelect, .logSense, .startStopUnit,
                ]
                if !valueFields.contains(row.handler), let field = end?.sense?.field, end?.sense?.code == 0x2400 {
                    #expect(field.bit != bit || field.byte != byte, "\(row.handler) byte \(byte) bit \(bit)")
                }
            }
        }
    }

    @Test("A CDB shorter than its row is refused at the first missing byte", arguments: rows.indices)
    func shortCDB(index: Int) {
        let row = Self.rows[index]
        let world = Self.world()
        for length in 1..<Int(row.length) {
            #expect(world.run(plain(row), cdbLength: length).summary == "5/2400 CDB \(length)")
        }
    }

    @Test("Operation codes that no row has are INVALID COMMAND OPERATION CODE")
    func unknownCodes() {
        let world = Self.world()
        for code in 0...255 as ClosedRange<UInt8> where !Self.rows.contains(where: { $0.operationCode == code }) {
            #expect(world.run([code] + Array(repeating: 0, count: 31)).summary == "5/2000 CDB 0")
        }
    }

    @Test("Service actions that no row has are INVALID FIELD IN CDB at the service action")
    func unknownServiceActions() {
        let world = Self.world()
        for action in 0...0x40 as ClosedRange<UInt8> where ![0x06, 0x07, 0x12].contains(action) {
            let cdb: [UInt8] = [0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, action] + Array(repeating: 0, count: 22)
            #expect(world.run(cdb).summary == "5/2400 CDB 8.7")
        }
        for code in Set(Self.rows.filter(\.hasServiceAction).map(\.operationCode)) where code != 0x7f {
            for action in 0..<32 as Range<UInt8>
            where !Self.rows.contains(where: { $0.operationCode == code && $0.serviceAction == UInt16(action) }) {
                #expect(world.run([code, action] + Array(repeating: 0, count: 14)).summary == "5/2400 CDB 1.4")
            }
        }
    }

    // MARK: REPORT SUPPORTED OPERATION CODES

    @Test("REPORT SUPPORTED OPERATION CODES of all commands is the table", arguments: [false, true])
    func allCommands(timeouts: Bool) {
        let world = Self.world()
        let data = world.run(CDB.reportSupportedOperationCodes(timeouts: timeouts), dataIn: 65535).data
        let size = timeouts ? 20 : 8
        #expect(data[..<4].reduce(0) { $0 << 8 | Int($1) } == data.count - 4)
        #expect(data.count == 4 + Self.rows.count * size)
        for (index, row) in Self.rows.enumerated() {
            let entry = Array(data[(4 + index * size)...].prefix(size))
            #expect(entry[0] == row.operationCode)
            #expect(UInt16(entry[2]) << 8 | UInt16(entry[3]) == row.serviceAction)
            #expect(entry[5] == (timeouts ? 2 : 0) | (row.hasServiceAction ? 1 : 0))
            #expect(Int(entry[6]) << 8 | Int(entry[7]) == Int(row.length))
            if timeouts { #expect(Array(entry[8...]) == [0, 10] + Array(repeating: 0, count: 10)) }
        }
    }

    @Test("REPORT SUPPORTED OPERATION CODES of one command returns the usage data of its row", arguments: rows.indices)
    func oneCommand(index: Int) {
        let row = Self.rows[index]
        let world = Self.world()
        let usage = (0..<Int(row.length)).map { row.usageByte($0) }
        for options in [row.hasServiceAction ? 2 : 1, 3] as [UInt8] {
            let data = world.run(
                CDB.reportSupportedOperationCodes(
                    options: options, code: row.operationCode, serviceAction: row.serviceAction), dataIn: 512
            ).data
            #expect(data == [0, 3, 0, row.length] + usage)
        }
        let wrong = world.run(
            CDB.reportSupportedOperationCodes(options: row.hasServiceAction ? 1 : 2, code: row.operationCode),
            dataIn: 512)
        #expect(wrong.summary == "5/2400 CDB 2.2")
    }

    @Test("REPORT SUPPORTED OPERATION CODES of a command that is not there says so")
    func unsupportedCommand() {
        let world = Self.world()
        for options in [1, 2, 3] as [UInt8] {
            let end = world.run(CDB.reportSupportedOperationCodes(options: options, code: 0xff), dataIn: 512)
            #expect(end.data == [0, 1, 0, 0])
        }
        #expect(world.run(CDB.reportSupportedOperationCodes(options: 4), dataIn: 512).summary == "5/2400 CDB 2.2")
    }

    @Test("REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS lists what is not rejected")
    func functions() {
        let world = Self.world()
        let data = world.run(CDB.reportSupportedTaskManagementFunctions(), dataIn: 64).data
        #expect(data.count == 4)
        // SPC-4 6.36: the bits by function.
        let bits: [(TaskManagementFunction, Int, UInt8)] = [
            (.abortTask, 0, 0x80), (.abortTaskSet, 0, 0x40), (.clearACA, 0, 0x20), (.clearTaskSet, 0, 0x10),
            (.logicalUnitReset, 0, 0x08), (.queryTask, 0, 0x04), (.targetReset, 0, 0x02),
            (.queryAsynchronousEvent, 1, 0x04), (.queryTaskSet, 1, 0x02), (.nexusReset, 1, 0x01),
        ]
        #expect(bits.count == TaskManagementFunction.allCases.count)
        for (function, byte, bit) in bits {
            world.a.manage(function)
            let works = world.a.answers.last?.response != .functionRejected
            #expect((data[byte] & bit != 0) == works, "\(function)")
        }
        for _ in 0..<3 { _ = world.run(CDB.requestSense(), dataIn: 18) }
        let extended = world.run(CDB.reportSupportedTaskManagementFunctions(extended: true), dataIn: 64).data
        #expect(extended.count == 16)
        #expect(extended.dropFirst(3).first == 12)
    }

    // MARK: Each flag has its positive and its negative case

    @Test(
        "`passesUnitAttention`: a row with it is carried out over a unit attention condition, one without is not",
        arguments: rows.indices)
    func passesUnitAttention(index: Int) {
        let row = Self.rows[index]
        let world = Self.world(attentive: true)
        let end = world.run(plain(row))
        #expect((end.summary == "6/2901") != row.flags.contains(.passesUnitAttention), "\(row.handler)")
    }

    @Test(
        "`needsMedium`: a row with it is not ready while the unit is stopped, one without does not care",
        arguments: rows.indices)
    func needsMedium(index: Int) {
        let row = Self.rows[index]
        let world = Self.world()
        _ = world.run(CDB.startStopUnit(start: false))
        let end = world.run(plain(row))
        #expect((end.summary == "2/0402") == row.flags.contains(.needsMedium), "\(row.handler)")
    }

    @Test(
        "`writesMedium`: a row with it is refused on a write protected unit, one without only if its CDB decides",
        arguments: rows.indices)
    func writesMedium(index: Int) {
        let row = Self.rows[index]
        let world = Self.world { $0.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_WRITABLE) }
        let end = world.run(plain(row))
        let writes = row.flags.contains(.writesMedium) || Self.decidesByCDB(row)
        #expect((end.summary == "7/2700") == writes, "\(row.handler)")
    }

    @Test(
        "`worksWithoutUnit`: a row with it is answered without a unit, one without is LOGICAL UNIT NOT SUPPORTED",
        arguments: rows.indices)
    func worksWithoutUnit(index: Int) {
        let row = Self.rows[index]
        let world = Self.world()
        let end = world.run(plain(row), lun: 9 << 48)
        #expect((end.summary == "5/2500") != row.flags.contains(.worksWithoutUnit), "\(row.handler)")
    }

    @Test("Rows that change the medium are those whose serialization writes", arguments: rows.indices)
    func writersSerialize(index: Int) {
        let row = Self.rows[index]
        let writes = row.serialization == .write || row.serialization == .writeAnywhere
        #expect((row.flags.contains(.writesMedium) || Self.decidesByCDB(row)) == writes, "\(row.handler)")
    }

    /// Rows of commands that write unless their CDB says otherwise: DISABLE WRITE.
    private static func decidesByCDB(_ row: CommandDescriptor) -> Bool { row.handler == .xdWriteRead }

    @Test(
        "What would do something else the second time is refused if it may have been carried out before, else nothing",
        arguments: rows.indices)
    func refusesRepetition(index: Int) {
        let row = Self.rows[index]
        let world = Self.world()
        let end = world.run(plain(row), flags: UInt8(SCSI_COMMAND_REPEATED))
        let isRefused = [.compareAndWrite, .xpWrite, .xdWriteRead, .persistentReserveOut].contains(row.handler)
        #expect((end.summary == "b/0800") == isRefused, "\(row.handler)")
        #expect(world.run(plain(row)).summary != "b/0800")
    }

    /// An initiator sends a command again that was told to have met a unit attention condition, a conflict, a full task
    /// set, and knows nothing of its first life.
    @Test(
        "A repetition is refused before an answer that would say that the command was not carried out",
        arguments: [
            [0x89] + [UInt8](repeating: 0, count: 12) + [1, 0, 0], CDB.xpWrite(0, 1), CDB.xdWriteRead(0, 1),
            CDB.persistentReserveOut(.register),
        ])
    func refusesRepetitionFirst(cdb: [UInt8]) {
        let repeated = UInt8(SCSI_COMMAND_REPEATED)
        let attentive = Self.world(attentive: true)
        #expect(attentive.run(cdb, flags: repeated).summary == "b/0800")
        #expect(attentive.run(CDB.testUnitReady).summary == "6/2901")

        let reserved = Self.world()
        #expect(reserved.run([0x16, 0, 0, 0, 0, 0], on: reserved.b).summary == "good")
        #expect(reserved.run(cdb).summary == "reservationConflict")
        #expect(reserved.run(cdb, flags: repeated).summary == "b/0800")

        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "SERIAL0001")
        configuration.maximumTasks = 8
        let full = TestTarget(configuration: configuration)
        for _ in 0..<8 { full.a.send(CDB.read(.ten, 0, 1), dataIn: 512) }
        #expect(full.a.completions.last?.summary == "taskSetFull")
        // It is also behind others: an ORDERED command waits for all of them.
        let tag = full.a.send(cdb, attribute: .ordered, flags: repeated)
        #expect(full.a.completions.last?.tag == tag && full.a.completions.last?.summary == "b/0800")
        full.drain()
        #expect(full.unit.tasksInFlight == 0)
    }
}

@Suite("The model")
struct ModelTests {
    @Test("A unit attention condition has a bit of its own, beside the deferred error and the port's access")
    func attentionBits() {
        for condition in UnitAttention.allCases {
            var set: UnitAttentionSet = [condition]
            #expect(set.count == 1 && set.first == condition && !set.hasDeferredError && set.access == .full)
            set.remove(condition)
            #expect(set.isEmpty)
        }
    }

    @Test("The constants of scsi_target.h are the raw values of the Swift enumerations")
    func constants() {
        #expect(SCSI_TASK_ATTRIBUTE_SIMPLE == Int(TaskAttribute.simple.rawValue))
        #expect(SCSI_TASK_ATTRIBUTE_ORDERED == Int(TaskAttribute.ordered.rawValue))
        #expect(SCSI_TASK_ATTRIBUTE_HEAD_OF_QUEUE == Int(TaskAttribute.headOfQueue.rawValue))
        #expect(SCSI_TASK_ATTRIBUTE_ACA == Int(TaskAttribute.aca.rawValue))
        #expect(SCSI_SERVICE_COMMAND_COMPLETE == Int(ServiceResponse.commandComplete.rawValue))
        #expect(SCSI_SERVICE_ABORTED == Int(ServiceResponse.aborted.rawValue))
        #expect(SCSI_SERVICE_RESET == Int(ServiceResponse.reset.rawValue))
        #expect(SCSI_SERVICE_OVERRUN == Int(ServiceResponse.overrun.rawValue))
        #expect(SCSI_SERVICE_TARGET_FAILURE == Int(ServiceResponse.targetFailure.rawValue))
        #expect(SCSI_SERVICE_SUSPENDED == Int(ServiceResponse.suspended.rawValue))
        #expect(SCSI_FUNCTION_COMPLETE == Int(TaskManagementResponse.functionComplete.rawValue))
        #expect(SCSI_FUNCTION_SUCCEEDED == Int(TaskManagementResponse.functionSucceeded.rawValue))
        #expect(SCSI_FUNCTION_REJECTED == Int(TaskManagementResponse.functionRejected.rawValue))
        #expect(
            SCSI_FUNCTION_INCORRECT_LOGICAL_UNIT_NUMBER
                == Int(TaskManagementResponse.incorrectLogicalUnitNumber.rawValue))
        #expect(SCSI_ABORT_TASK == Int(TaskManagementFunction.abortTask.rawValue))
        #expect(SCSI_ABORT_TASK_SET == Int(TaskManagementFunction.abortTaskSet.rawValue))
        #expect(SCSI_CLEAR_ACA == Int(TaskManagementFunction.clearACA.rawValue))
        #expect(SCSI_CLEAR_TASK_SET == Int(TaskManagementFunction.clearTaskSet.rawValue))
        #expect(SCSI_I_T_NEXUS_RESET == Int(TaskManagementFunction.nexusReset.rawValue))
        #expect(SCSI_LOGICAL_UNIT_RESET == Int(TaskManagementFunction.logicalUnitReset.rawValue))
        #expect(SCSI_QUERY_TASK == Int(TaskManagementFunction.queryTask.rawValue))
        #expect(SCSI_QUERY_TASK_SET == Int(TaskManagementFunction.queryTaskSet.rawValue))
        #expect(SCSI_QUERY_ASYNCHRONOUS_EVENT == Int(TaskManagementFunction.queryAsynchronousEvent.rawValue))
        #expect(SCSI_TARGET_RESET == Int(TaskManagementFunction.targetReset.rawValue))
        // Not one of SAM's: no initiator can ask for it.
        #expect(TaskManagementFunction(rawValue: UInt8(SCSI_SUSPEND_TASKS)) == nil)
    }

    @Test("A task's generation grows each time it becomes free, and its index stays")
    func generation() {
        let pool = TaskPool(capacity: 2, segmentsPerTask: 1)
        let task = pool[1]
        let before = unsafe task.pointer.pointee.generation
        task.transition(to: .received)
        task.transition(to: .completing)
        task.free()
        let after = unsafe task.pointer.pointee.generation
        #expect(after == before + 1)
        #expect(task.index == 1)
        #expect(task.isFree)
        #expect(pool[1] == task)
        #expect(pool[0] != task)
    }

    @Test("Every LUN that has a number comes back from the field that names it")
    func lunFields() {
        for number in 0..<Limits.logicalUnitsPerTarget {
            let lun = LUN(number)!
            #expect(LUN.parse(lun.field) == .unit(lun))
        }
        #expect(LUN(Limits.logicalUnitsPerTarget) == nil)
        #expect(LUN(-1) == nil)
    }

    @Test("Sense data is cut to the buffer, and there is none for NO SENSE")
    func senseEncoding() {
        var bytes = [UInt8](repeating: 0xee, count: 18)
        for count in 0...18 {
            let written = unsafe bytes.withUnsafeMutableBytes { bytes in
                unsafe SenseData.lbaOutOfRange(LogicalBlockAddress(7)).encode(
                    descriptorFormat: false, into: UnsafeMutableRawBufferPointer(rebasing: bytes[..<count]))
            }
            #expect(written == count)
        }
        #expect(Sense(bytes)?.description == "5/2100 CDB 2")
        #expect(Sense(bytes)?.information == 7)
        let none = unsafe bytes.withUnsafeMutableBytes {
            unsafe SenseData.none.encode(descriptorFormat: false, into: $0)
        }
        #expect(none == 0)
    }

    @Test("The extent filter never says no where two extents conflict", arguments: 0..<20)
    func extentFilter(seed: UInt64) {
        var random = SplitMix64(seed: seed)
        var filter = ExtentFilter()
        var extents: [(kind: SerializationClass, address: UInt64, blocks: UInt64)] = []
        for _ in 0..<400 {
            let kind = SerializationClass.allCases[Int(random.next() % UInt64(SerializationClass.allCases.count))]
            let spread = [1 << 12, 1 << 21, 1 << 24, UInt64.max][Int(random.next() % 4)]
            let address = random.next() % spread
            let blocks = random.next() % [1, 16, 5000, 200_000, 1 << 32][Int(random.next() % 5)]
            let conflicts = extents.contains { Self.conflicts($0, (kind, address, blocks)) }
            let perhaps = filter.mayConflict(kind, address, blocks)
            #expect(perhaps || !conflicts)
            if random.next() % 3 == 0, !extents.isEmpty {
                let gone = extents.remove(at: Int(random.next() % UInt64(extents.count)))
                filter.count(gone.kind, gone.address, gone.blocks, by: -1)
            } else {
                extents.append((kind: kind, address: address, blocks: blocks))
                filter.count(kind, address, blocks, by: 1)
            }
        }
        for extent in extents { filter.count(extent.kind, extent.address, extent.blocks, by: -1) }
        for kind in SerializationClass.allCases {
            let perhaps = filter.mayConflict(kind, 0, 1 << 40)
            #expect(!perhaps)
        }
    }

    private static func conflicts(
        _ older: (kind: SerializationClass, address: UInt64, blocks: UInt64),
        _ younger: (kind: SerializationClass, address: UInt64, blocks: UInt64)
    ) -> Bool {
        switch Serialization.hazard(younger: younger.kind, older: older.kind) {
        case .pass: false
        case .wait, .waitIfRestricted: true
        case .overlap:
            older.blocks > 0 && younger.blocks > 0 && older.address <= younger.address &+ (younger.blocks - 1)
                && younger.address <= older.address &+ (older.blocks - 1)
        }
    }
}
