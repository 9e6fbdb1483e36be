// REPORT IDENTIFYING INFORMATION and SET IDENTIFYING INFORMATION: what people call a unit, kept over power loss.
//
// Owns: the format of its section of the persistent state. Called by: DeviceServer, LogicalUnit (to restore),
// PersistentState (to check). Must not know: where the state is kept.
//
// The section: for each kind of information that is set, in ascending order:
//      1  INFORMATION TYPE      2  length, big-endian, not 0      n  the bytes

/// What is known of a unit beside its names.
struct IdentifyingInformation: Equatable {
    /// INFORMATION TYPE (SPC-6, REPORT IDENTIFYING INFORMATION).
    enum Kind: UInt8, CaseIterable {
        case peripheralDevice = 0b000_0000
        case text = 0b000_0010
    }

    /// Asks which kinds there are.
    static let supported: UInt8 = 0b111_1111

    private var values: [Kind: [UInt8]] = [:]

    subscript(kind: Kind) -> [UInt8] {
        get { values[kind] ?? [] }
        set { values[kind] = newValue.isEmpty ? nil : newValue }
    }

    /// The section's bytes; `nil` if nothing is set.
    var encoded: [UInt8]? {
        if values.isEmpty { return nil }
        return Kind.allCases.filter { values[$0] != nil }.flatMap { kind in
            [kind.rawValue, UInt8(self[kind].count >> 8), UInt8(self[kind].count & 0xff)] + self[kind]
        }
    }

    /// Nothing is set.
    init() {}

    /// Reads the section; `nil` if it is not one.
    init?(parsing bytes: [UInt8]) {
        var rest = bytes[...]
        var last: UInt8?
        while !rest.isEmpty {
            let header = Array(rest.prefix(3))
            guard header.count == 3, let kind = Kind(rawValue: header[0]), last.map({ $0 < header[0] }) ?? true else {
                return nil
            }
            let length = Int(header[1]) << 8 | Int(header[2])
            rest = rest.dropFirst(3)
            guard length > 0, length <= Limits.identifyingInformationBytes, length <= rest.count else { return nil }
            self[kind] = Array(rest.prefix(length))
            rest = rest.dropFirst(length)
            last = header[0]
        }
    }
}

extension SPC {
    /// REPORT IDENTIFYING INFORMATION (SPC-6).
    static func reportIdentifyingInformation(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let type = cdb[10] >> 1
        let kind = IdentifyingInformation.Kind(rawValue: type)
        guard kind != nil || type == IdentifyingInformation.supported else {
            return .failed(.invalidField(inCDB: 10, bit: 7))
        }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(6)) { writer in
            writer.uint32(0)
            if let kind {
                writer.bytes(unit.identifyingInformation[kind])
            } else {
                for kind in IdentifyingInformation.Kind.allCases {
                    writer.byte(kind.rawValue << 1)
                    writer.byte(0)
                    writer.uint16(UInt16(Limits.identifyingInformationBytes))
                }
            }
            writer.patch16(UInt16(writer.length - 4), at: 2)
        }
    }

    /// SET IDENTIFYING INFORMATION (SPC-6). It ends when the information is durable; the other nexuses learn of it.
    static func setIdentifyingInformation(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        guard let kind = IdentifyingInformation.Kind(rawValue: cdb[10] >> 1) else {
            return .failed(.invalidField(inCDB: 10, bit: 7))
        }
        let length = cdb.uint32(6)
        guard length <= UInt32(Limits.identifyingInformationBytes) else { return .failed(.invalidField(inCDB: 6)) }
        guard let list = unsafe DeviceServer.parameterList(task, length: Int(length), into: unit.shard.parameters)
        else { return .overrun }
        var information = unit.identifyingInformation
        information[kind] = list.bytes
        if information == unit.identifyingInformation { return .done(.good) }
        let nexus = task.nexus
        return unit.save(.identifyingInformation, information.encoded) { [unowned unit] in
            unit.identifyingInformation = information
            unit.establish(.deviceIdentifierChanged, exceptFor: nexus)
        }
    }
}
