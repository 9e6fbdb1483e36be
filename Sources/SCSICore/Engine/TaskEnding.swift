// TaskEnding: how tasks of a logical unit are ended by something else than their own command: task management
// functions, resets, PREEMPT AND ABORT, the loss of a nexus.
//
// Owns: the order of marking and ending. Called by: TaskManager, TargetDevice, Suspension, AutoContingentAllegiance,
// the reservation commands. Must not know: who asks for it, or why.

extension LogicalUnit {
    /// Ends the tasks that `disposition` selects: at once those that wait, and those that the backstore has as soon
    /// as it lets go of their memory. Nothing is given back before every task is marked, because giving back calls
    /// out.
    func abort(_ disposition: (TaskHandle) -> AbortDisposition) {
        mark(disposition)
        endMarked()
    }

    /// The first half: a function that ends tasks of several units marks all of them before it ends any, because an end
    /// lets tasks of other units go on.
    func mark(_ disposition: (TaskHandle) -> AbortDisposition) {
        var cursor = unsafe tasks.pointee.first
        while let task = cursor {
            cursor = task.next
            guard !task.disposition.isAbort else { continue }
            let decision = disposition(task)
            if decision == .none { continue }
            task.disposition = decision
            if task.state == .transferring { cancelRequest(task) }
        }
    }

    func cancelRequest(_ task: TaskHandle) { unsafe backstore.cancel(task.request) }

    /// The second half.
    func endMarked() {
        endDormant(.done(.good)) { $0.endsWhileItWaits }
    }

    /// Ends waiting tasks, and lets none of them run meanwhile. One that waits with its response filled ends with that,
    /// unless it is marked.
    func endDormant(_ outcome: Outcome, where matches: (TaskHandle) -> Bool) {
        let wasEnabling = enabling
        enabling = true
        while let task = firstWaiting(where: matches) {
            switch (task.state, task.waitsFor) {
            case (.dormant, .state): persistentState.stopWaiting(task)
            case (.dormant, .staging), (.dormant, .backstore), (.dormant, .quota): shard.stopWaiting(task)
            case (.dormant, .thaw), (.dormant, .recovery): break
            default: unsafe tasks.pointee.stopWaiting(task)
            }
            if task.waitsFor == .response, !task.disposition.isAbort {
                finish(task)
            } else if task.isLeaving {
                giveBackMarked(task)
            } else {
                end(task, outcome)
            }
        }
        enabling = wasEnabling
        enableDormant()
    }

    private func firstWaiting(where matches: (TaskHandle) -> Bool) -> TaskHandle? {
        var cursor = unsafe tasks.pointee.first
        while let task = cursor {
            if task.state == .dormant || task.state == .blocked, matches(task) { return task }
            cursor = task.next
        }
        return nil
    }

    /// Whether a task is in the set that `matches` selects.
    func contains(_ matches: (TaskHandle) -> Bool) -> Bool {
        var cursor = unsafe tasks.pointee.first
        while let task = cursor {
            if matches(task) { return true }
            cursor = task.next
        }
        return false
    }

    /// PREEMPT AND ABORT: aborts the commands of the nexuses in a bit mask, but not the one that does it (SPC-4
    /// 5.7.11.5). Those of other nexuses end with TASK ABORTED if TAS is one.
    func abortCommands(ofNexuses mask: UInt64, by task: TaskHandle) {
        let taskAborted = modePages.taskAbortedStatus
        abort {
            guard $0 != task, mask & (1 << UInt64($0.nexus)) != 0 else { return .none }
            return taskAborted && $0.nexus != task.nexus ? .taskAborted : .aborted
        }
        // SAM-6 5.9.5: with the commands of a faulted nexus its ACA condition goes.
        var rest = mask
        while rest != 0 {
            clearACA(UInt16(rest.trailingZeroBitCount))
            rest &= rest - 1
        }
    }

    func awaitAborted(_ task: TaskHandle) {
        task.transition(to: .settling)
        target?.whenAborted(on: self, nexuses: task.progress, by: task) { [self] in
            task.transition(to: .enabled)
            end(task, .done(.good))
        }
    }

    /// What LOGICAL UNIT RESET does beside ending the tasks (SAM-6 6.3.3).
    func reset(_ condition: UnitAttention) {
        stopped = false
        buffers.reset()
        unsafe tasks.pointee.clearAllACA()
        preventing = 0
        releasePowerControl()
        reservations.setReserved(nil, on: target)
        modePages.restoreSaved()
        refresh()
        establish(condition, exceptFor: nil)
    }

    /// LOGICAL UNIT RESET that no initiator asked for: commands of all end, and all learn of it.
    public func resetByOperator() {
        mark { _ in .reset }
        endMarked()
        reset(.logicalUnitReset)
    }

    /// Ends all commands, as a unit does that goes away at once: those that the medium has, as soon as it lets go.
    public func abortAll() {
        mark { _ in .reset }
        endMarked()
    }
}
