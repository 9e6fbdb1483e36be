// REPORT TARGET PORT GROUPS: one group with all target ports, active and optimized: every front reaches the same unit
// on the same thread.
//
// Called by: DeviceServer. Must not know: transports.

import CTarget

extension SPC {
    private static let activeOptimized: UInt8 = 0x0
    private static let activeOptimizedSupported: UInt8 = 0x01
    private static let extendedHeader: UInt8 = 1

    /// REPORT TARGET PORT GROUPS (SPC-6), with the length only header or the extended one.
    static func reportTargetPortGroups(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let format = cdb[1] >> 5
        return DeviceServer.parameterData(task, unit.shard, allocationLength: cdb.uint32(6)) { writer in
            let ports = unit.target?.ports.all ?? []
            writer.uint32(0)
            if format == extendedHeader {
                writer.byte(0x10)  // FORMAT TYPE 001b
                writer.zeros(3)  // IMPLICIT TRANSITION TIME: the state never changes
            }
            writer.byte(activeOptimized)
            writer.byte(activeOptimizedSupported)
            writer.uint16(TargetPorts.group)
            writer.zeros(3)
            writer.byte(UInt8(ports.count))
            for port in ports {
                writer.uint16(0)
                writer.uint16(port.relativeIdentifier)
            }
            writer.patch32(UInt32(writer.length - 4), at: 0)
        }
    }
}
