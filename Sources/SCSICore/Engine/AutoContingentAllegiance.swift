// AutoContingentAllegiance: what a CHECK CONDITION does to the other commands of its task set: the ACA condition
// (SAM-6 5.9) and QErr (SPC-4 7.5.8); and the unit attention conditions of UA_INTLCK_CTRL.
//
// Called by: LogicalUnit (a command has ended), TaskManager (CLEAR ACA). Must not know: which command it was,
// transports.

extension LogicalUnit {
    /// A command of the unit ends with CHECK CONDITION: it is out of the task set and not given back yet.
    ///
    /// - Returns: Whether other commands were marked to end with it.
    func checkConditionReported(_ task: TaskHandle) -> Bool {
        // SAM-6 5.9.5: a command that was to recover from an ACA condition clears it by failing, and establishes
        // another one if it asks for that.
        if task.attribute == .aca { unsafe tasks.pointee.clearACA(task.nexus) }
        if task.hasNACA { unsafe tasks.pointee.establishACA(task.nexus) }
        let faulted = task.nexus
        switch modePages.queueErrorManagement {
        case .none: return false
        case .abortAll:
            endOthers(than: faulted) { [separate = modePages.separateTaskSets] in separate && $0.nexus != faulted }
        case .abortNexus: mark { $0.nexus == faulted ? .aborted : .none }
        }
        return true
    }

    /// Marks the tasks of the task set; those of other nexuses by TAS (SPC-4 7.5.8): with TASK ABORTED, or silently
    /// and with a unit attention condition.
    ///
    /// - Parameters:
    ///   - nexus: On which nexus the cause is.
    ///   - isSpared: Which tasks are left alone.
    func endOthers(than nexus: UInt16, except isSpared: (TaskHandle) -> Bool) {
        let taskAborted = modePages.taskAbortedStatus
        var cleared: UInt64 = 0
        mark { task in
            if isSpared(task) { return .none }
            if task.nexus == nexus { return .aborted }
            if taskAborted { return .taskAborted }
            cleared |= 1 << UInt64(task.nexus)
            return .aborted
        }
        while cleared != 0 {
            establish(.commandsCleared, for: UInt16(cleared.trailingZeroBitCount))
            cleared &= cleared - 1
        }
    }

    /// Ends the ACA condition of a nexus: what it had blocked goes on. For CLEAR ACA after its ACA task is marked, for
    /// the loss of the nexus, and for PERSISTENT RESERVE OUT with PREEMPT AND ABORT (SAM-6 5.9.5).
    func clearACA(_ nexus: UInt16) {
        guard unsafe tasks.pointee.isFaulted(nexus) else { return }
        unsafe tasks.pointee.clearACA(nexus)
        enableDormant()
    }

    /// A command was refused with a status that has no sense data (SPC-4 7.5.8, UA_INTLCK_CTRL 11b): the next command
    /// of the nexus says so.
    func interlock(_ status: SCSIStatus, for nexus: UInt16) {
        guard modePages.unitAttentionInterlock == .establish else { return }
        switch status {
        case .busy: establish(.previousBusy, for: nexus)
        case .taskSetFull: establish(.previousTaskSetFull, for: nexus)
        case .reservationConflict: establish(.previousReservationConflict, for: nexus)
        case .good, .checkCondition, .conditionMet, .acaActive, .taskAborted: break
        }
    }
}
