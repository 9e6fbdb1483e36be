// READ BUFFER and WRITE BUFFER: data, descriptors and the echo buffer. The mode is a service action to the command
// table (SPC-4 6.35.1 has REPORT SUPPORTED OPERATION CODES treat it so).
//
// Called by: DeviceServer. Must not know: who else writes the buffers (UnitBuffers).

import CTarget

extension SPC {
    /// The one data buffer.
    private static let dataBufferID: UInt8 = 0

    /// Where READ BUFFER(10) or (16) and WRITE BUFFER keep their fields.
    private struct BufferFields {
        let identifier: UInt8
        let offset: UInt64
        let length: Int
        let identifierByte: Int, offsetByte: Int, lengthByte: Int

        init(_ cdb: CDB) {
            let isLong = cdb[0] == 0x9b
            identifierByte = isLong ? 14 : 2
            offsetByte = isLong ? 2 : 3
            lengthByte = isLong ? 10 : 6
            identifier = cdb[identifierByte]
            offset = isLong ? cdb.uint64(2) : UInt64(cdb.uint24(3))
            length = isLong ? Int(cdb.uint32(10)) : Int(cdb.uint24(6))
        }
    }

    /// READ BUFFER, data mode (02h).
    static func readBufferData(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let fields = BufferFields(cdb)
        guard fields.identifier == dataBufferID else { return .failed(.invalidField(inCDB: fields.identifierByte)) }
        guard fields.offset <= UInt64(Limits.dataBufferBytes) else {
            return .failed(.invalidField(inCDB: fields.offsetByte))
        }
        let offset = Int(fields.offset)
        let count = min(Limits.dataBufferBytes - offset, fields.length)
        return DeviceServer.parameterData(task, unit.shard, allocationLength: fields.length) {
            $0.bytes(unit.buffers.read(count, at: offset))
        }
    }

    /// READ BUFFER, descriptor mode (03h): a buffer's capacity, at any offset; zeros for a buffer that is not there.
    static func readBufferDescriptor(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let fields = BufferFields(cdb)
        return DeviceServer.parameterData(task, unit.shard, allocationLength: fields.length) { writer in
            writer.uint32(fields.identifier == dataBufferID ? UInt32(Limits.dataBufferBytes) : 0)
        }
    }

    /// READ BUFFER, echo buffer mode (0Ah): what the same nexus has written last.
    static func readEchoBuffer(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        switch unit.buffers.readEcho(nexus: task.nexus) {
        case .nothing: return .failed(SenseData(.illegalRequest, .commandSequenceError))
        case .overwritten: return .failed(SenseData(.abortedCommand, .echoBufferOverwritten))
        case .bytes(let bytes):
            return DeviceServer.parameterData(task, unit.shard, allocationLength: BufferFields(cdb).length) {
                $0.bytes(bytes)
            }
        }
    }

    /// READ BUFFER, echo buffer descriptor mode (0Bh): EBOS, and the capacity.
    static func readEchoBufferDescriptor(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        DeviceServer.parameterData(task, unit.shard, allocationLength: BufferFields(cdb).length) { writer in
            writer.byte(0x01)
            writer.byte(0)
            writer.uint16(UInt16(Limits.echoBufferBytes))
        }
    }

    /// WRITE BUFFER, data mode (02h).
    static func writeBufferData(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let fields = BufferFields(cdb)
        guard fields.identifier == dataBufferID else { return .failed(.invalidField(inCDB: fields.identifierByte)) }
        guard fields.offset <= UInt64(Limits.dataBufferBytes) else {
            return .failed(.invalidField(inCDB: fields.offsetByte))
        }
        let offset = Int(fields.offset)
        guard fields.length <= Limits.dataBufferBytes - offset else {
            return .failed(.invalidField(inCDB: fields.lengthByte))
        }
        guard let list = unsafe DeviceServer.parameterList(task, length: fields.length, into: unit.shard.parameters)
        else { return .overrun }
        unit.buffers.write(list.bytes, at: offset)
        return .done(.good)
    }

    /// WRITE BUFFER, echo buffer mode (0Ah).
    static func writeEchoBuffer(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let fields = BufferFields(cdb)
        guard fields.length <= Limits.echoBufferBytes else { return .failed(.invalidField(inCDB: fields.lengthByte)) }
        if fields.length == 0 { return .done(.good) }
        guard let list = unsafe DeviceServer.parameterList(task, length: fields.length, into: unit.shard.parameters)
        else { return .overrun }
        unit.buffers.writeEcho(list.bytes, nexus: task.nexus)
        return .done(.good)
    }
}
