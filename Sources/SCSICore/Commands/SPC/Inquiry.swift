// INQUIRY: the standard data and the vital product data pages.
//
// Called by: DeviceServer, MissingLogicalUnit. Must not know: the task set, transports.

import CBackstore
import CTarget

/// The commands of SPC-6.
enum SPC {
    /// A vital product data page that a unit has.
    private enum VitalProductDataPage: UInt8, CaseIterable {
        case supportedPages = 0x00
        case unitSerialNumber = 0x80
        case deviceIdentification = 0x83
        case extendedInquiry = 0x86
        case modePagePolicy = 0x87
        case ports = 0x88
        case powerCondition = 0x8a
        case featureSets = 0x92
        case blockLimits = 0xb0
        case blockDeviceCharacteristics = 0xb1
        case logicalBlockProvisioning = 0xb2
        case blockLimitsExtension = 0xb7
    }

    /// INQUIRY (SPC-4 6.6).
    static func inquiry(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let allocationLength = cdb.uint16(3)
        guard cdb.bit(1, 0) else {
            if cdb[2] != 0 { return .failed(.invalidField(inCDB: 2)) }
            return DeviceServer.parameterData(task, unit.shard, allocationLength: allocationLength) { writer in
                standardInquiry(
                    peripheral: peripheral(unit, task.nexus), removable: unit.isRemovable,
                    explicitAccess: unit.target?.ports.hasExplicitGroup ?? false, unit.configuration.vendor,
                    unit.configuration.product, unit.configuration.revision, &writer)
            }
        }
        guard let page = VitalProductDataPage(rawValue: cdb[2]) else { return .failed(.invalidField(inCDB: 2)) }
        return DeviceServer.parameterData(task, unit.shard, allocationLength: allocationLength) { writer in
            writer.byte(peripheral(unit, task.nexus))
            writer.byte(page.rawValue)
            writer.uint16(0)
            write(page, task.nexus, unit, &writer)
            writer.patch16(UInt16(clamping: writer.length - 4), at: 2)
        }
    }

    /// A direct access block device; with PERIPHERAL QUALIFIER 001b through a port in the unavailable state (SPC-4
    /// 5.15.2.4.5).
    private static func peripheral(_ unit: LogicalUnit, _ nexus: UInt16) -> UInt8 {
        unit.access(of: nexus) == .unavailable ? 0x20 : 0x00
    }

    /// Standard INQUIRY data, 96 bytes (SPC-4 6.6.2).
    static func standardInquiry(
        peripheral: UInt8, removable: Bool = false, explicitAccess: Bool = false, _ vendor: String, _ product: String,
        _ revision: String, _ writer: inout ParameterWriter
    ) {
        let isUnit = peripheral & 0x1f == 0x00
        writer.byte(peripheral)
        writer.byte(removable ? 0x80 : 0x00)  // RMB
        writer.byte(0x06)  // SPC-4, the newest version that all initiators in use know
        writer.byte(isUnit ? 0x32 : 0x12)  // NORMACA, if there is a task set; HISUP; response data format 2
        writer.byte(91)
        writer.byte(isUnit ? explicitAccess ? 0x30 : 0x10 : 0x00)  // TPGS, of a unit: 11b if states change by command
        writer.byte(0x10)  // MULTIP: several target ports, one a front
        writer.byte(0x02)  // CMDQUE
        writer.text(Array(vendor.utf8), width: 8)
        writer.text(Array(product.utf8), width: 16)
        writer.text(Array(revision.utf8), width: 4)
        writer.zeros(22)
        for version in [0x00a0, 0x0460, 0x04c0] as [UInt16] { writer.uint16(version) }  // SAM-5, SPC-4, SBC-3
        writer.zeros(96 - writer.length)
    }

    private static func write(
        _ page: VitalProductDataPage, _ nexus: UInt16, _ unit: LogicalUnit, _ writer: inout ParameterWriter
    ) {
        switch page {
        case .supportedPages: writer.bytes(VitalProductDataPage.allCases.map(\.rawValue))
        case .unitSerialNumber: writer.bytes(Array(unit.configuration.serial.utf8))
        case .deviceIdentification: deviceIdentification(nexus, unit, &writer)
        case .extendedInquiry: extendedInquiry(unit, &writer)
        case .modePagePolicy:
            // All mode pages and subpages are shared by all nexuses, and not by several units (SPC-6).
            writer.bytes([0x3f, 0xff, 0x00, 0x00])
        case .ports: ports(unit, &writer)
        case .powerCondition:
            // Power Condition (SPC-4 7.8.10): all of them; leaving them takes no time of its own.
            writer.bytes([0x03, 0x07])
            writer.zeros(12)
        case .featureSets:
            // No feature set is claimed. One that is, is a promise to have everything on its list.
            writer.zeros(4)
        case .blockLimits: blockLimits(unit, &writer)
        case .blockDeviceCharacteristics:
            // Not rotating (1), or not reported (0) for a rotating medium whose rate the backstore does not know.
            writer.uint16(unit.geometry.has(SCSI_BACKSTORE_ROTATIONAL) ? 0 : 1)
            writer.zeros(58)
        case .logicalBlockProvisioning: logicalBlockProvisioning(unit, &writer)
        case .blockLimitsExtension:
            // SBC-4 6.6.5: no streams, no scattered writes.
            writer.zeros(60)
        }
    }

    /// Device Identification (SPC-4 7.8.6): the unit by its NAA name and by T10 vendor ID; the target port that the
    /// command came through by its NAA name, its identifier and its group; the target device by its NAA name.
    private static func deviceIdentification(_ nexus: UInt16, _ unit: LogicalUnit, _ writer: inout ParameterWriter) {
        writer.bytes([0x01, 0x03, 0x00, 8])
        writer.uint64(unit.configuration.name)
        // The designator length is one byte.
        let serial = Array(unit.configuration.serial.utf8.prefix(247))
        writer.bytes([0x02, 0x01, 0x00, UInt8(8 + serial.count)])
        writer.text(Array(unit.configuration.vendor.utf8), width: 8)
        writer.bytes(serial)
        if let target = unit.target {
            if let port = target.port(of: nexus) {
                portName(port, &writer)
                writer.bytes([0x01, 0x14, 0x00, 4, 0, 0])
                writer.uint16(port.relativeIdentifier)
                writer.bytes([0x01, 0x15, 0x00, 4, 0, 0])
                writer.uint16(target.ports.group(ofPort: port.relativeIdentifier)!.identifier)
            }
            writer.bytes([0x01, 0x23, 0x00, 8])
            writer.uint64(target.name)
        }
    }

    private static func portName(_ port: TargetPort, _ writer: inout ParameterWriter) {
        writer.bytes([0x01, 0x13, 0x00, 8])
        writer.uint64(port.name)
    }

    /// SCSI Ports (SPC-6): the target ports. Their initiator ports, which no transport here names, are none of
    /// the SCSI device's.
    private static func ports(_ unit: LogicalUnit, _ writer: inout ParameterWriter) {
        for port in unit.target?.ports.all ?? [] {
            writer.uint16(0)
            writer.uint16(port.relativeIdentifier)
            writer.zeros(6)
            writer.uint16(12)
            portName(port, &writer)
        }
    }

    /// Extended INQUIRY Data (SPC-4 7.8.7).
    private static func extendedInquiry(_ unit: LogicalUnit, _ writer: inout ParameterWriter) {
        writer.byte(0x00)
        writer.byte(0x07)  // HEADSUP, ORDSUP, SIMPSUP; not PRIOR_SUP: nothing follows from a priority
        writer.byte(unit.cachesWrites ? 0x01 : 0x00)  // V_SUP
        writer.byte(0x01)  // LUICLR: REPORTED LUNS DATA HAS CHANGED is cleared on all units of the nexus at once
        writer.zeros(5)
        writer.byte(UInt8(SCSI_SENSE_CAPACITY))
        writer.zeros(50)
    }

    /// Block Limits (SBC-4 6.6.4).
    private static func blockLimits(_ unit: LogicalUnit, _ writer: inout ParameterWriter) {
        let shift = unit.medium.blockShift
        let geometry = unit.geometry
        let thin = unit.isThinProvisioned
        writer.byte(0x01)  // WSNZ
        writer.byte(UInt8(clamping: unit.maximumCompareAndWriteBlocks))
        writer.uint16(UInt16(clamping: UInt64(geometry.optimal_transfer_granularity) >> shift))
        writer.uint32(UInt32(clamping: unit.maximumTransferBlocks))
        writer.uint32(UInt32(clamping: min(geometry.optimal_transfer >> shift, unit.maximumTransferBlocks)))
        writer.uint32(0)
        writer.uint32(thin ? UInt32(clamping: Limits.unmapBlocks) : 0)
        writer.uint32(thin ? UInt32(Limits.unmapDescriptors) : 0)
        writer.uint32(thin ? UInt32(UInt64(geometry.discard_granularity) >> shift) : 0)
        let granular = thin && geometry.discard_granularity != 0
        writer.uint32(granular ? 0x8000_0000 | UInt32(UInt64(geometry.discard_alignment) >> shift) : 0)
        writer.uint64(unit.maximumWriteSameBlocks)
        writer.uint32(UInt32(clamping: unit.maximumAtomicBlocks))
        writer.uint32(geometry.atomic_write_alignment >> UInt32(shift))
        writer.uint32(geometry.atomic_write_granularity >> UInt32(shift))
        writer.zeros(8)  // no ATOMIC BOUNDARY
    }

    /// Logical Block Provisioning (SBC-4 6.6.7).
    private static func logicalBlockProvisioning(_ unit: LogicalUnit, _ writer: inout ParameterWriter) {
        let thin = unit.isThinProvisioned
        let readsZeros = unit.geometry.has(SCSI_BACKSTORE_DISCARD_READS_ZEROS)
        writer.byte(unit.hasProvisioningThresholds ? UInt8(unit.thresholdExponent) : 0)
        let anchors = unit.geometry.has(SCSI_BACKSTORE_CAN_ANCHOR)
        // LBPU, LBPWS, LBPWS10, LBPRZ 001b, ANC_SUP
        writer.byte(thin ? 0xe0 | (readsZeros ? 0x04 : 0) | (anchors ? 0x02 : 0) : 0)
        writer.byte(thin ? 0x02 : 0x00)
        writer.byte(0)
    }
}
