// PendingAttention: the unit attention conditions of a logical unit that its I_T nexuses are still to be told of (SAM-6
// 5.14), and what else of a nexus is looked at with them: deferred errors, and what its port lets through.
//
// Called by: whatever changes the unit, TargetDevice, LogicalUnit (reports). Must not know: why a condition is there.

extension LogicalUnit {
    /// Makes a unit attention condition pending for every nexus but one.
    func establish(_ condition: UnitAttention, exceptFor nexus: UInt16?) {
        for index in 0..<UInt16(Limits.nexusesPerTarget) where index != nexus {
            establish(condition, for: index)
        }
    }

    func establish(_ condition: UnitAttention, for nexus: UInt16) {
        unsafe pending[Int(nexus)].establish(condition)
        if let lun { target?.unitAttentionEstablished(condition, for: nexus, on: lun) }
    }

    /// A nexus that the target does not know: only what a power on leaves, or what an unknown reset does.
    func nexusCreated(_ nexus: UInt16, _ condition: UnitAttention) {
        unsafe pending[Int(nexus)] = [condition]
        unsafe pending[Int(nexus)].access = target?.access(of: nexus) ?? .full
        measurements.retire(nexus: nexus)
        buffers.forgetEcho(nexus: nexus)
    }

    /// What the target port of a nexus lets through.
    func access(of nexus: UInt16) -> PortAccess { unsafe pending[Int(nexus)].access }

    /// States of target port groups have changed.
    func refreshAccess() {
        guard let target else { return }
        for nexus in 0..<UInt16(Limits.nexusesPerTarget) {
            unsafe pending[Int(nexus)].access = target.access(of: nexus)
        }
    }

    /// The target has other groups, or other ports in them: the Device Identification and SCSI Ports pages and TPGS are
    /// others.
    func portGroupsReplaced() {
        refreshTable()
        establish(.inquiryDataChanged, exceptFor: nil)
    }

    func clear(_ condition: UnitAttention, for nexus: UInt16) { unsafe pending[Int(nexus)].remove(condition) }

    /// Whether a nexus is to be told of a deferred error.
    func hasDeferredError(_ nexus: UInt16) -> Bool { unsafe pending[Int(nexus)].hasDeferredError }

    func setDeferredError(_ isPending: Bool, for nexus: UInt16) {
        unsafe pending[Int(nexus)].hasDeferredError = isPending
    }

    /// The condition that REQUEST SENSE or a refused command reports next.
    func unitAttention(for nexus: UInt16) -> UnitAttention? { unsafe pending[Int(nexus)].first }

    /// The Additional Response Information of QUERY ASYNCHRONOUS EVENT (SAM-6 7.10): UADE DEPTH and sense key,
    /// additional sense code, qualifier, in the low three bytes; `nil` if nothing is pending.
    func asynchronousEvent(for nexus: UInt16) -> UInt32? {
        let set = unsafe pending[Int(nexus)]
        guard let condition = set.first else { return nil }
        // 01b: there is one condition; 10b: there are more.
        let depth: UInt32 = set.count == 1 ? 1 : 2
        return depth << 20 | UInt32(SenseKey.unitAttention.rawValue) << 16 | UInt32(condition.code.rawValue)
    }

    /// The condition has been reported; it is not pending any more.
    func report(_ condition: UnitAttention, for nexus: UInt16) {
        clear(condition, for: nexus)
        measurements.countUnitAttention(nexus: nexus)
        // SPC-4 6.33: one report of REPORTED LUNS DATA HAS CHANGED serves for all units of the nexus.
        if condition == .reportedLUNsChanged { target?.clearEverywhere(condition, for: nexus) }
    }
}
