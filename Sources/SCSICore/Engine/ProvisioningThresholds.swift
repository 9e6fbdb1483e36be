// ProvisioningThresholds: how much space a thin medium has and takes, and who is told when it gets scarce (SBC-5
// 4.7.3.7).
//
// Owns: the numbers of the last measurement, the unit's own request to the backstore, which thresholds are reached.
// Called by: LogicalUnit (data was written, pages were changed), LOG SENSE. Must not know: tasks, other commands.
//
// The numbers are the backstore's (scsi_backstore.h, SPACE). They are asked for by LOG SENSE, and while a threshold is
// enabled after each threshold set that was written: what others take from a shared medium shows then.

import CBackstore

/// The space of a medium, in bytes.
public struct MediumSpace: Sendable, Equatable {
    /// What the medium takes.
    public var used: UInt64
    /// What it could take beside that.
    public var available: UInt64
    /// Whether others may take what is available.
    public var isShared: Bool
}

/// A threshold descriptor of the Logical Block Provisioning mode page (SBC-4 6.5.9).
struct ProvisioningThreshold {
    /// THRESHOLD RESOURCE, a parameter code of log page 0Ch.
    enum Resource: UInt8, CaseIterable {
        case available = 1, used = 2
    }

    let resource: Resource
    let isEnabled: Bool
    /// In threshold sets.
    let count: UInt32

    static let length = 8

    init(_ bytes: ArraySlice<UInt8>) {
        let bytes = Array(bytes)
        resource = Resource(rawValue: bytes[1])!
        isEnabled = bytes[0] & 0x80 != 0
        count = bytes.field(4)
    }

    /// The default and the changeable values: soft thresholds (THRESHOLD TYPE 000b), decreasing for what is available,
    /// increasing for what is used.
    static let defaults: [UInt8] = [0x00, 1, 0, 0, 0, 0, 0, 0, 0x01, 2, 0, 0, 0, 0, 0, 0]
    static let changeable: [UInt8] = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]

    /// Whether a measurement has reached it.
    func isReached(available: UInt32, used: UInt32) -> Bool {
        switch resource {
        case .available: available <= count
        case .used: used >= count
        }
    }
}

/// What a unit keeps of its space.
@safe
struct SpaceState {
    /// The last measurement.
    var measured: MediumSpace?
    /// The thresholds that are reached: told once, and again when they were left in between.
    var reached: Set<ProvisioningThreshold.Resource> = []
    /// `LogicalUnitStatistics.bytesWritten` at the last measurement.
    var writtenBefore: UInt64 = 0
    var isInFlight = false
    /// Memory of the unit's own request, its segment and the answer; allocated when first used.
    var request: UnsafeMutablePointer<SpaceRequest>?
}

@unsafe
struct SpaceRequest {
    /// Must be first.
    var request = unsafe scsi_backstore_request()
    var segment = unsafe iovec()
    var answer = scsi_backstore_space()
}

extension LogicalUnit {
    /// Log2 of the logical blocks of a threshold set (THRESHOLD EXPONENT): 1 MiB, or more if the medium would have 2^32
    /// sets of that.
    var thresholdExponent: UInt64 {
        var exponent = 20 - medium.blockShift
        while medium.blocks.value >> exponent > UInt64(UInt32.max) { exponent += 1 }
        return exponent
    }

    /// Whether there are thresholds, log page 0Ch and mode page 1Ch/02h.
    var hasProvisioningThresholds: Bool { Self.hasThresholds(geometry) }

    static func hasThresholds(_ geometry: scsi_backstore_geometry) -> Bool {
        geometry.has(SCSI_BACKSTORE_CAN_DISCARD) && geometry.has(SCSI_BACKSTORE_CAN_REPORT_SPACE)
    }

    /// How much space the medium had and took when it was last asked; `nil` if it never was.
    public var measuredSpace: MediumSpace? { space.measured }

    /// A number of bytes as a RESOURCE COUNT.
    func thresholdSets(_ bytes: UInt64) -> UInt32 { UInt32(clamping: bytes >> (medium.blockShift + thresholdExponent)) }

    /// The answer of a SPACE request.
    func spaceMeasured(_ answer: scsi_backstore_space) {
        let shared = answer.flags & UInt32(SCSI_BACKSTORE_SPACE_SHARED) != 0
        let measured = MediumSpace(used: answer.used, available: answer.available, isShared: shared)
        space.measured = measured
        space.writtenBefore = statistics.bytesWritten
        let (available, used) = (thresholdSets(measured.available), thresholdSets(measured.used))
        for threshold in modePages.thresholds where threshold.isEnabled {
            guard threshold.isReached(available: available, used: used) else {
                space.reached.remove(threshold.resource)
                continue
            }
            let isNew = space.reached.insert(threshold.resource).inserted
            if isNew, modePages.reportsThresholds { establish(.softThresholdReached, exceptFor: nil) }
        }
    }

    /// MODE SELECT, a reset or another medium may have changed what is watched.
    func refreshThresholds() {
        let enabled = modePages.thresholds.filter(\.isEnabled).map(\.resource)
        space.reached.formIntersection(enabled)
        watchesSpace = hasProvisioningThresholds && modePages.reportsThresholds && !enabled.isEmpty
    }

    /// Data was written while thresholds are watched.
    func spaceUsed() {
        let written = statistics.bytesWritten &- space.writtenBefore
        if written >> (medium.blockShift + thresholdExponent) > 0 { measureSpace() }
    }

    /// Asks the backstore for the numbers, unless it is being asked, or cannot be.
    func measureSpace() {
        guard watchesSpace, !space.isInFlight, !isBlocked, !removed else { return }
        if unsafe space.request == nil {
            unsafe space.request = .allocate(capacity: 1)
            unsafe space.request!.initialize(to: SpaceRequest())
        }
        let memory = unsafe space.request!
        unsafe memory.pointee = unsafe SpaceRequest()
        let base = UnsafeMutableRawPointer(memory)
        let answer = unsafe base + MemoryLayout<SpaceRequest>.offset(of: \SpaceRequest.answer)!
        unsafe memory.pointee.segment = unsafe iovec(
            iov_base: answer, iov_len: MemoryLayout<scsi_backstore_space>.size)
        let segment = unsafe base + MemoryLayout<SpaceRequest>.offset(of: \SpaceRequest.segment)!
        let request = unsafe base.assumingMemoryBound(to: scsi_backstore_request.self)
        unsafe request.pointee.struct_size = UInt32(MemoryLayout<scsi_backstore_request>.size)
        unsafe request.pointee.operation = UInt8(SCSI_BACKSTORE_SPACE)
        unsafe request.pointee.segments = unsafe UnsafePointer(segment.assumingMemoryBound(to: iovec.self))
        unsafe request.pointee.segment_count = 1
        unsafe request.pointee.error_offset = .max
        unsafe request.pointee.owner = unsafe Unmanaged.passUnretained(self).toOpaque()
        unsafe request.pointee.complete = { request, error in
            let unit = unsafe Unmanaged<LogicalUnit>.fromOpaque(request!.pointee.owner)
            unsafe unit._withUnsafeGuaranteedRef { $0.ownRequestCompleted(error) }
        }
        // Refused by a full backstore: the next write asks again.
        space.isInFlight = unsafe backstore.submit(request)
    }

    private func ownRequestCompleted(_ error: Int32) {
        space.isInFlight = false
        if error == 0, mediumState != .absent { spaceMeasured(unsafe space.request!.pointee.answer) }
        if watchesRequests { callWhenQuiet() }
        if removed { callWhenDrained() }
    }
}
