// Suspension: what becomes of a command whose front takes it back (SCSI_SUSPEND_TASKS of scsi_target.h): it leaves the
// task set as if it had not arrived, or it ends.
//
// Called by: TaskManager (which commands), LogicalUnit (a marked command would go on). Must not know: fronts, why they
// stop, how any command works.
//
// A command that waits and has not begun, and one that can begin anew, goes at once. What the medium has is cancelled
// and waited for: a front that has its command back may take the memory away. Whether it came to its end all the same
// is known only then. What cannot begin anew goes on to its end. Docs/decisions/0012 says why that is right.

import CBackstore
import CTarget

/// Whether a command that has begun may be carried out from its beginning, in place of going on.
enum Repetition {
    /// At any moment before its end: until then it has changed nothing, or what it changes becomes the same again.
    case always
    /// Until the first of its writes was handed to the medium: it would take what it has written for what was there.
    /// COMPARE AND WRITE would not find what it expects, XPWRITE would invert back, XDWRITEREAD would return nothing of
    /// what was there. One that may have written in an earlier life (SCSI_COMMAND_REPEATED) is refused.
    case untilItWrites
    /// Never: others have seen what it changed, and may have changed it since. Also commands that end when they begin.
    case never
    /// Never, and in a second life it would be refused for the key that it has itself replaced or removed, as if
    /// somebody had preempted its nexus (SPC-4 5.13): it is refused as a repetition instead.
    case once
}

extension CommandHandler {
    /// The judgement of each command. There is no default, so that a new one has to be judged.
    var repetition: Repetition {
        switch self {
        case .read, .verify, .preFetch, .getLBAStatus, .getLBAStatus32, .logSense, .sendDiagnostic: .always
        case .write, .writeAndVerify, .writeSame, .writeAtomic, .unmap, .synchronizeCache, .orWrite: .always
        // What they do beside the flush is done at their end.
        case .startStopUnit, .preventAllowMediumRemoval: .always
        case .compareAndWrite, .xpWrite, .xdWriteRead: .untilItWrites
        case .persistentReserveOut: .once
        case .modeSelect, .setIdentifyingInformation: .never
        case .testUnitReady, .requestSense, .inquiry, .modeSense, .logSelect, .readCapacity10, .readCapacity16,
            .reportTargetPortGroups, .setTargetPortGroups, .readBufferData, .readBufferDescriptor, .readEchoBuffer,
            .readEchoBufferDescriptor, .writeBufferData, .writeEchoBuffer, .receiveDiagnosticResults,
            .reportTimestamp, .setTimestamp, .reportIdentifyingInformation, .readDefectData10, .readDefectData12,
            .reportLUNs, .reportSupportedOperationCodes, .reportSupportedTaskManagementFunctions,
            .persistentReserveIn, .reserve, .release:
            .never
        }
    }
}

extension TaskHandle {
    /// Whether nothing is lost if the task's command is carried out from its beginning later. Asked of a task that
    /// waits, that the backstore has, or whose request has just come back.
    var mayRunAgain: Bool {
        if hasExpired || state == .settling { return false }
        let waits = state == .dormant || state == .blocked
        switch waitsFor {
        case .order, .staging, .state, .quota: if waits { return true }
        case .response: if waits { return false }
        case .backstore, .thaw, .recovery: break
        }
        switch row?.handler.repetition {
        case .always: return true
        case .untilItWrites: return progress == 0 && (isReading || waits && waitsFor != .recovery)
        case .once, .never, nil: return false
        }
    }

    /// Whether it may have been carried out before (SCSI_COMMAND_REPEATED) and would do something else this time. It
    /// ends before anything else is asked: unit attention conditions, conflicts and a full task set all say that it was
    /// not carried out, upon which an initiator sends it again.
    var mustNotBeRepeated: Bool {
        guard unsafe command.flags & UInt8(SCSI_COMMAND_REPEATED) != 0 else { return false }
        switch row?.handler.repetition {
        case .untilItWrites, .once: return true
        case .always, .never, nil: return false
        }
    }

    private var isReading: Bool { unsafe Int(request.pointee.operation) == SCSI_BACKSTORE_READ }

    /// Whether a mark says that it does not go on.
    @inline(__always)
    var isLeaving: Bool { disposition != .none && isMarkedToLeave }

    @inline(never)
    private var isMarkedToLeave: Bool { disposition.isAbort || mayRunAgain }

    /// The same for a task that waits; what has only its response to give does not go on either.
    var endsWhileItWaits: Bool { isLeaving || disposition == .suspended && waitsFor == .response }
}

extension LogicalUnit {
    /// Marks tasks to be given back; `endMarked` follows, when the tasks of all units are marked.
    func markSuspended(where matches: (TaskHandle) -> Bool) {
        var cursor = unsafe tasks.pointee.first
        while let task = cursor {
            cursor = task.next
            guard task.disposition == .none, matches(task) else { continue }
            task.disposition = .suspended
            if task.state == .transferring, task.mayRunAgain { cancelRequest(task) }
        }
    }

    /// Gives a marked task back that does not go on.
    func giveBackMarked(_ task: TaskHandle) {
        if task.disposition.isAbort { endMarked(task, .done(.good)) } else { takeBack(task) }
    }

    /// The backstore has completed the request of a task that was marked meanwhile.
    ///
    /// - Returns: What to do next; `nil` if nothing, for it is tried again or was given back.
    func completedMarked(_ task: TaskHandle, _ error: Int32, again: Bool) -> Outcome? {
        // Before its next step, which may fill a request that writes.
        let mayRunAgain = task.mayRunAgain
        if error != 0 { return failedMarked(task, error, again: again, mayRunAgain: mayRunAgain) }
        let outcome = DeviceServer.resume(task, CDB(task), task.row!, on: self)
        switch outcome {
        case .done, .failed, .overrun: return outcome
        case .submit, .needsStaging, .save, .needsState, .awaitAborted:
            guard mayRunAgain else { return outcome }
            giveBackMarked(task)
            return nil
        }
    }

    private func failedMarked(_ task: TaskHandle, _ error: Int32, again: Bool, mayRunAgain: Bool) -> Outcome? {
        if mayRunAgain, BackstoreError.isCancellation(error) {
            giveBackMarked(task)
            return nil
        }
        let sequence = task.sequence
        guard recovers(task, error, again: again) else { return failure(task, error) }
        // It is tried again when it comes again. Whoever was told that the backstore is quiet may have ended it.
        if task.state == .dormant, task.sequence == sequence, task.isLeaving { giveBackMarked(task) }
        return nil
    }
}
