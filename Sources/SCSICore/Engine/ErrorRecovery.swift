// ErrorRecovery: a logical unit that stands still, because somebody asked for it or because its medium fails; and
// requests that are tried again.
//
// Called by: LogicalUnit (a request could be submitted, has failed), the driver of the shard (time has passed), the
// control plane (freeze, thaw). Must not know: commands, backstores, timers.
//
// A frozen unit takes commands and carries out those that need nothing of the medium; a request for the backstore waits
// in its task until the unit is thawed. Task management and deadlines reach waiting tasks as they do any other.

import CBackstore

/// What becomes of a command whose request the backstore could not carry out.
public enum ErrorPolicy: Sendable, Equatable {
    /// It ends with CHECK CONDITION.
    case report
    /// The unit is frozen with the command in it; the command goes on when the unit is thawed.
    case stop
    /// The request is submitted again, after 10 ms first and then ever more seldom, down to once a second, or when the
    /// driver of the shard looks next; after this many nanoseconds the command ends with CHECK CONDITION.
    case retry(nanoseconds: UInt64)
}

/// Why a logical unit is frozen.
public enum FreezeCause: Sendable, Equatable {
    /// `LogicalUnit.freeze` was called.
    case asked
    /// A request failed with this errno value, and the error policy is to stop.
    case mediumError(errno: Int32)
}

/// What a unit keeps of its standing still.
struct FreezeState {
    var cause: FreezeCause?
    /// Called when the backstore has none of the unit's requests any more.
    var whenQuiet: [() -> Void] = []
}

extension LogicalUnit {
    private static let shortestDelay: UInt64 = 10_000_000
    private static let longestDelay: UInt64 = 1_000_000_000

    // MARK: Freezing

    /// Why the unit is frozen; `nil` if it is not.
    public var frozen: FreezeCause? { freezeState.cause }
    var isFrozen: Bool { freezeState.cause != nil }

    /// A task has a request, and the unit is frozen or has no medium any more.
    func blocked(_ task: TaskHandle, waitsFor reason: WaitReason) {
        if mediumState == .absent { return endWithoutMedium(task) }
        task.waitsFor = reason
        task.transition(to: .dormant)
        if watchesRequests { callWhenQuiet() }
    }

    /// From now on nothing is submitted to the backstore, until `thaw`.
    ///
    /// - Parameter whenQuiet: Called once when the backstore has none of the unit's requests any more, maybe before
    ///   this returns; also if the unit was thawed or removed meanwhile.
    public func freeze(whenQuiet: @escaping () -> Void = {}) {
        // What is removed is on its way out and ends.
        if !removed { freeze(because: .asked) }
        freezeState.whenQuiet.append(whenQuiet)
        callWhenQuiet()
    }

    /// Submits what has waited, in the order of arrival, and everything from now on. A unit that is not frozen stays as
    /// it is.
    public func thaw() {
        guard isFrozen else { return }
        freezeState.cause = nil
        refreshBlocking()
        // Tasks may end, and others take their place, while this goes on.
        for (task, sequence) in waiting(where: { $0 == .thaw || $0 == .recovery }) {
            let isWaiting = task.state == .dormant && (task.waitsFor == .thaw || task.waitsFor == .recovery)
            guard isWaiting, task.sequence == sequence else { continue }
            task.retryAt = shard.clock
            retry(task)
        }
        startFlush()
    }

    private func freeze(because cause: FreezeCause) {
        if isFrozen { return }
        freezeState.cause = cause
        refreshBlocking()
        if case .mediumError = cause { whenStopped?(cause) }
    }

    /// The tasks that wait for something, in the order of arrival, with what tells them from later users of their
    /// memory.
    private func waiting(where matches: (WaitReason) -> Bool) -> [(TaskHandle, UInt64)] {
        var found: [(TaskHandle, UInt64)] = []
        var cursor = unsafe tasks.pointee.first
        while let task = cursor {
            if task.state == .dormant, matches(task.waitsFor) { found.append((task, task.sequence)) }
            cursor = task.next
        }
        return found
    }

    /// Tells those who wait for it that the backstore has nothing of this unit.
    func callWhenQuiet() {
        guard !freezeState.whenQuiet.isEmpty, !space.isInFlight, !flush.isInFlight,
            !contains({ $0.state == .transferring })
        else {
            watchesRequests = !freezeState.whenQuiet.isEmpty
            return
        }
        let called = freezeState.whenQuiet
        freezeState.whenQuiet = []
        watchesRequests = false
        for body in called { body() }
    }

    // MARK: Trying again

    /// The backstore has failed a request of a task that is enabled: whether the task waits to have it submitted again.
    ///
    /// - Parameter again: Whether it had failed before.
    func recovers(_ task: TaskHandle, _ error: Int32, again: Bool) -> Bool {
        let policy = configuration.errorPolicy
        guard policy != .report, !task.hasExpired, !removed, mediumState != .absent,
            BackstoreError.mayPass(error, operation: unsafe task.request.pointee.operation)
        else { return false }
        if !again { task.failedAt = shard.clock }
        switch policy {
        case .report: return false
        case .stop:
            task.retryAt = .max
            freeze(because: .mediumError(errno: error))
        case .retry(let limit):
            let elapsed = shard.clock &- task.failedAt
            guard elapsed < limit else { return false }
            let delay = min(max(elapsed, Self.shortestDelay), Self.longestDelay, limit - elapsed)
            task.retryAt = shard.clock &+ delay
            unsafe deadlines.pointee.earliest = min(deadlines.pointee.earliest, task.retryAt)
        }
        blocked(task, waitsFor: .recovery)
        return true
    }

    /// Submits the requests whose time has come.
    ///
    /// - Returns: When the next one's comes, `.max` if none waits for a time.
    func retryFailed() -> UInt64 {
        var next = UInt64.max
        if isFrozen { return next }
        for (task, sequence) in waiting(where: { $0 == .recovery }) {
            guard task.state == .dormant, task.waitsFor == .recovery, task.sequence == sequence else { continue }
            if task.retryAt <= shard.clock { retry(task) }
            let waitsOn = task.state == .dormant && task.waitsFor == .recovery && task.sequence == sequence
            if waitsOn { next = min(next, task.retryAt) }
        }
        return next
    }

    /// Submits a request that has failed.
    func submitAgain(_ task: TaskHandle) {
        if isBlocked { return blocked(task, waitsFor: .recovery) }
        task.transition(to: .transferring)
        unsafe task.request.pointee.error_offset = .max
        unsafe task.request.pointee.complete = { request, error in
            let task = unsafe TaskHandle(request!.pointee.owner.assumingMemoryBound(to: SCSITask.self))
            unsafe task.logicalUnit!._withUnsafeGuaranteedRef { $0.completedAgain(task, error: error) }
        }
        guard unsafe !backstore.submit(task.request) else { return }
        task.transition(to: .enabled)
        task.retryAt = shard.clock &+ Self.shortestDelay
        unsafe deadlines.pointee.earliest = min(deadlines.pointee.earliest, task.retryAt)
        blocked(task, waitsFor: .recovery)
    }

    private func completedAgain(_ task: TaskHandle, error: Int32) {
        if error == 0 {
            let page = ErrorCounterPage(of: task)
            unsafe counters.pointee[keyPath: page.counters].corrected += 1
            errorCountersChanged(page)
        }
        backstoreCompleted(task, error: error, again: true)
    }
}
