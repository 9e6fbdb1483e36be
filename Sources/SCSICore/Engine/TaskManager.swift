// TaskManager: the task management functions (SAM-6 clause 7) of one target.
//
// Owns: the functions that wait for tasks to end. Called by: TargetDevice. Must not know: transports, commands.
//
// A function decides at once what becomes of each task, and is answered when the last task that it ended has been given
// back: until then a backstore may still touch the task's memory.

import CTarget

/// What tasks a function waits for.
private enum FunctionScope {
    case task(LogicalUnit, tag: UInt64)
    case nexus(LogicalUnit)
    /// The task with the ACA attribute.
    case aca(LogicalUnit)
    case unit(LogicalUnit)
    case everything(nexus: UInt16?)
    /// All of a front's group, whatever becomes of them.
    case group(UInt8)
    /// Commands of the nexuses in a bit mask, but for the one that aborted them.
    case others(LogicalUnit, nexuses: UInt64, by: TaskHandle)
}

private struct WaitingFunction {
    let nexus: UInt16
    let cookie: UInt64
    let scope: FunctionScope
    /// Tasks that arrived later are not waited for.
    let sequence: UInt64
    /// What is done in place of an answer to the port.
    var whenDone: (() -> Void)?
}

/// The task manager.
/// A class, because tasks that a function ends come back to `taskEnded` while the function is still being performed.
final class TaskManager {
    private var waiting: [WaitingFunction] = [] { didSet { isWaiting = !waiting.isEmpty } }
    /// Whether `taskEnded` has anything to do; asked after each task.
    private(set) var isWaiting = false

    func receive(_ request: scsi_task_management_request, nexus: UInt16, on target: TargetDevice) {
        if request.function == UInt8(SCSI_SUSPEND_TASKS) { return suspend(request, nexus: nexus, on: target) }
        // Refused before it has done anything: a function that was begun is answered when its tasks have ended.
        guard waiting.count < Limits.waitingFunctions else {
            return target.answer(request.cookie, .functionRejected, nexus: nexus)
        }
        switch perform(request, nexus: nexus, on: target) {
        case .answered(let answer, let additional):
            target.answer(request.cookie, answer, nexus: nexus, additional: additional)
        case .ends(let scope):
            answer(request, when: scope, nexus: nexus, on: target)
        }
    }

    private func answer(
        _ request: scsi_task_management_request, when scope: FunctionScope, nexus: UInt16, on target: TargetDevice
    ) {
        let function = WaitingFunction(
            nexus: nexus, cookie: request.cookie, scope: scope, sequence: target.shard.sequence)
        if isDone(function, on: target) {
            target.answer(function.cookie, .functionComplete, nexus: nexus)
        } else {
            waiting.append(function)
        }
    }

    /// SCSI_SUSPEND_TASKS. Not bounded by `Limits.waitingFunctions`, which an initiator can use up: each group of each
    /// nexus has one under way at the most.
    private func suspend(_ request: scsi_task_management_request, nexus: UInt16, on target: TargetDevice) {
        let group = request.group
        let isUnderWay = waiting.contains {
            if case .group(group) = $0.scope { return $0.nexus == nexus }
            return false
        }
        if isUnderWay { return target.answer(request.cookie, .functionRejected, nexus: nexus) }
        let units = target.allUnits
        for unit in units { unit.markSuspended { $0.nexus == nexus && $0.group == group } }
        for unit in units { unit.endMarked() }
        answer(request, when: .group(group), nexus: nexus, on: target)
    }

    private enum Verdict {
        case answered(TaskManagementResponse, additional: UInt32 = 0)
        case ends(FunctionScope)
    }

    private func perform(
        _ request: scsi_task_management_request, nexus: UInt16, on target: TargetDevice
    ) -> Verdict {
        guard let function = TaskManagementFunction(rawValue: request.function) else {
            return .answered(.functionRejected)
        }
        switch function {
        case .targetReset:
            let units = target.allUnits
            for unit in units { Self.mark(unit, resetBy: nexus) }
            for unit in units { Self.reset(unit) }
            return .ends(.everything(nexus: nil))
        case .nexusReset:
            let units = target.allUnits
            for unit in units { unit.mark { $0.nexus == nexus ? .reset : .none } }
            for unit in units {
                unit.endMarked()
                unit.nexusLost(nexus)
                unit.establish(.nexusLoss, for: nexus)
            }
            return .ends(.everything(nexus: nexus))
        default: break
        }
        guard case .unit(let lun) = LUN.parse(LUN.field(request.lun)), let unit = target.unit(lun) else {
            return .answered(.incorrectLogicalUnitNumber)
        }
        let tag = request.tag
        switch function {
        case .abortTask:
            unit.abort { $0.nexus == nexus && $0.tag == tag ? .aborted : .none }
            return .ends(.task(unit, tag: tag))
        case .abortTaskSet:
            unit.abort { $0.nexus == nexus ? .aborted : .none }
            return .ends(.nexus(unit))
        case .clearACA:
            // Without an ACA condition on this nexus there is nothing to clear, and nothing wrong (SAM-6 7.4).
            unit.abort { $0.nexus == nexus && $0.attribute == .aca ? .aborted : .none }
            unit.clearACA(nexus)
            return .ends(.aca(unit))
        case .clearTaskSet:
            // With a task set for each nexus it clears that of its own (SAM-6 7.5).
            let separate = unit.modePages.separateTaskSets
            unit.endOthers(than: nexus) { separate && $0.nexus != nexus }
            unit.endMarked()
            return .ends(separate ? .nexus(unit) : .unit(unit))
        case .logicalUnitReset:
            Self.mark(unit, resetBy: nexus)
            Self.reset(unit)
            return .ends(.unit(unit))
        case .queryTask:
            let found = unit.contains { $0.nexus == nexus && $0.tag == tag && !$0.disposition.isAbort }
            return .answered(found ? .functionSucceeded : .functionComplete)
        case .queryTaskSet:
            let found = unit.contains { $0.nexus == nexus && !$0.disposition.isAbort }
            return .answered(found ? .functionSucceeded : .functionComplete)
        case .queryAsynchronousEvent:
            guard let information = unit.asynchronousEvent(for: nexus) else { return .answered(.functionComplete) }
            return .answered(.functionSucceeded, additional: information)
        case .nexusReset, .targetReset: preconditionFailure("a function that addresses no unit")
        }
    }

    /// LOGICAL UNIT RESET: tasks of other nexuses end with TASK ABORTED if TAS is one (SPC-4 7.5.8).
    private static func mark(_ unit: LogicalUnit, resetBy nexus: UInt16) {
        let taskAborted = unit.modePages.taskAbortedStatus
        unit.mark { taskAborted && $0.nexus != nexus ? .taskAborted : .reset }
    }

    private static func reset(_ unit: LogicalUnit) {
        unit.endMarked()
        unit.reset(.logicalUnitReset)
    }

    /// A task was given back: answers the functions that waited for it.
    func taskEnded(on target: TargetDevice) {
        while let index = waiting.firstIndex(where: { isDone($0, on: target) }) {
            let function = waiting.remove(at: index)
            if let whenDone = function.whenDone {
                whenDone()
                continue
            }
            target.answer(function.cookie, .functionComplete, nexus: function.nexus)
        }
    }

    /// Functions of a nexus that is lost are not answered.
    func forget(nexus: UInt16) { waiting.removeAll { $0.nexus == nexus && $0.whenDone == nil } }

    /// A command that has aborted others waits for their end, as functions do.
    func whenAborted(on unit: LogicalUnit, nexuses: UInt64, by task: TaskHandle, _ body: @escaping () -> Void) {
        let function = WaitingFunction(
            nexus: task.nexus, cookie: 0, scope: .others(unit, nexuses: nexuses, by: task),
            sequence: unit.shard.sequence, whenDone: body)
        guard let target = unit.target, !isDone(function, on: target) else { return body() }
        waiting.append(function)
    }

    private func isDone(_ function: WaitingFunction, on target: TargetDevice) -> Bool {
        let ending: (TaskHandle) -> Bool = { $0.disposition.isAbort && $0.sequence <= function.sequence }
        switch function.scope {
        case .group(let group):
            return !target.allUnits.contains {
                $0.contains { $0.nexus == function.nexus && $0.group == group && $0.sequence <= function.sequence }
            }
        case .task(let unit, let tag):
            return !unit.contains { ending($0) && $0.nexus == function.nexus && $0.tag == tag }
        case .aca(let unit):
            return !unit.contains { ending($0) && $0.nexus == function.nexus && $0.attribute == .aca }
        case .nexus(let unit): return !unit.contains { ending($0) && $0.nexus == function.nexus }
        case .unit(let unit): return !unit.contains(ending)
        case .others(let unit, let nexuses, let task):
            return !unit.contains { $0 != task && ending($0) && nexuses & (1 << UInt64($0.nexus)) != 0 }
        case .everything(let nexus):
            return !target.allUnits.contains { $0.contains { ending($0) && (nexus == nil || $0.nexus == nexus) } }
        }
    }
}

extension TaskHandle {
    /// The command identifier.
    var tag: UInt64 { unsafe command.tag }
    /// Which of its front's groups it is in.
    var group: UInt8 { unsafe command.group }
}
