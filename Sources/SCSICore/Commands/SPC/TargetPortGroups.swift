// REPORT TARGET PORT GROUPS and SET TARGET PORT GROUPS: the target port groups and their asymmetric access states.
//
// Called by: DeviceServer. Must not know: transports, what a state lets through.

import CTarget

extension SPC {
    private static let extendedHeader: UInt8 = 1
    private static let setHeaderLength = 4
    private static let setDescriptorLength = 4

    /// REPORT TARGET PORT GROUPS (SPC-4 6.37), with the length only header or the extended one: the same through every
    /// port.
    static func reportTargetPortGroups(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let format = cdb[1] >> 5
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(6)) { writer in
            writer.uint32(0)
            if format == extendedHeader {
                writer.byte(0x10)  // FORMAT TYPE 001b
                writer.zeros(3)  // IMPLICIT TRANSITION TIME: not said, for a transition lasts as long as it is let
            }
            if let ports = unit.target?.ports {
                for group in ports.groups { write(group, of: ports, &writer) }
            }
            writer.patch32(UInt32(writer.length - 4), at: 0)
        }
    }

    private static func write(_ group: TargetPortGroup, of ports: TargetPorts, _ writer: inout ParameterWriter) {
        let states = ports.isAsymmetric ? AsymmetricAccessState.allCases : [.activeOptimized]
        writer.byte((group.isPreferred ? 0x80 : 0) | group.state.rawValue)
        writer.byte(states.reduce(0) { $0 | $1.supportedBit })
        writer.uint16(group.identifier)
        writer.byte(0)
        writer.byte(group.statusCode.rawValue)
        writer.byte(0)
        writer.byte(UInt8(group.ports.count))
        for port in group.ports {
            writer.uint16(0)
            writer.uint16(port)
        }
    }

    /// SET TARGET PORT GROUPS (SPC-4 6.45): all of the list, or nothing. Descriptors are taken in their order.
    static func setTargetPortGroups(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let length = Int(cdb.uint32(6))
        if length == 0 { return .done(.good) }
        let longest = setHeaderLength + Limits.portGroupsPerTarget * setDescriptorLength
        guard length >= setHeaderLength, length <= longest, length % setDescriptorLength == 0 else {
            return .failed(.invalidField(inCDB: 6))
        }
        guard let list = unsafe DeviceServer.parameterList(task, length: length, into: unit.shard.parameters) else {
            return .overrun
        }
        if let offset = (0..<setHeaderLength).first(where: { list.byte($0) != 0 }) {
            return .failed(.invalidField(inParameterList: offset))
        }
        guard let target = unit.target else {
            return .failed(SenseData(.illegalRequest, .logicalUnitNotSupported))
        }
        var states: [(group: UInt16, state: AsymmetricAccessState)] = []
        for offset in stride(from: setHeaderLength, to: length, by: setDescriptorLength) {
            switch readDescriptor(list, at: offset, target.ports) {
            case .success(let state): states.append(state)
            case .failure(let refusal): return .failed(refusal.sense)
            }
        }
        target.setAccessStates(states, by: task.nexus, on: unit)
        return .done(.good)
    }

    private struct Refusal: Error { let sense: SenseData }

    /// One descriptor: a state that can be asked for, and a group that can be changed.
    private static func readDescriptor(
        _ list: ParameterReader, at offset: Int, _ ports: TargetPorts
    ) -> Result<(group: UInt16, state: AsymmetricAccessState), Refusal> {
        let first = list.byte(offset)
        if first & 0xf0 != 0 { return .failure(Refusal(sense: .invalidField(inParameterList: offset, bit: 7))) }
        guard let state = AsymmetricAccessState(rawValue: first), state.canBeSet else {
            return .failure(Refusal(sense: .invalidField(inParameterList: offset, bit: 3)))
        }
        if list.byte(offset + 1) != 0 { return .failure(Refusal(sense: .invalidField(inParameterList: offset + 1))) }
        let identifier = list.uint16(offset + 2)
        guard let group = ports.group(identifier), group.isExplicit else {
            return .failure(Refusal(sense: .invalidField(inParameterList: offset + 2)))
        }
        // A transition is ended by who has begun it.
        if group.state == .transitioning { return .failure(Refusal(sense: PortAccess.transitioning.sense)) }
        return .success((group: identifier, state: state))
    }
}
