// UnitLimits: what bounds and watches the commands of a logical unit from outside: rate limits, the trace, the view of
// its tasks.
//
// Called by: the daemon or an embedder, LogicalUnit (before a command is carried out). Must not know: what a command
// does.

extension LogicalUnit {
    /// Whether a command has to wait because of a limit of its initiator or of the unit; then it does.
    @inline(never)
    func mustWait(_ task: TaskHandle) -> Bool {
        guard let row = task.row, row.serialization != .none else { return false }
        let bytes = Self.bytes(task)
        // The step says whom the task has paid, or will have paid when it is let go: 1 the initiator's, 2 the unit's.
        if task.step == 0, let throttle = target?.throttle(nexus: task.nexus), !throttle.take(bytes: bytes) {
            return wait(task, for: throttle, step: 1)
        }
        if task.step < 2, let throttle, !throttle.take(bytes: bytes) { return wait(task, for: throttle, step: 2) }
        task.step = 0
        return false
    }

    private func wait(_ task: TaskHandle, for throttle: Throttle, step: UInt8) -> Bool {
        task.step = step
        task.waitsFor = .quota
        task.transition(to: .dormant)
        throttle.wait(task)
        return true
    }

    /// The bytes that a command names, as limits count them: no more than a command may move at all.
    static func bytes(_ task: TaskHandle) -> UInt64 {
        let shift = unsafe task.logicalUnit!._withUnsafeGuaranteedRef { $0.medium.blockShift }
        return min(task.blocks, Limits.transferBytes >> shift) << shift
    }

    /// Limits the commands of all initiators together.
    public func setLimits(_ limits: RateLimits) {
        if throttle == nil, limits.isUnlimited { return }
        if let throttle { throttle.setLimits(limits) } else { throttle = Throttle(limits, shard: shard) }
        refreshThrottling()
    }

    /// The limiter of the unit, if it ever had limits.
    public var limiter: Throttle? { throttle }

    func refreshThrottling() { isThrottled = throttle != nil || target?.hasThrottles ?? false }

    /// Keeps the last commands from now on; what was kept before is forgotten.
    ///
    /// - Parameter entries: How many, `Limits.traceEntries`; `nil` ends it.
    public func setTrace(entries: Int?) {
        trace = entries.map { TraceRing(capacity: $0) }
        isTraced = trace != nil
    }

    /// What was kept, the oldest first; `nil` if nothing is.
    public var traceEntries: [TraceEntry]? { trace?.entries }

    /// How many entries are kept; `nil` if none.
    public var traceCapacity: Int? { trace?.capacity }

    /// The tasks in flight, the oldest first, of which at most so many.
    public func tasks(limit: Int) -> [TaskView] {
        var views: [TaskView] = []
        var cursor = unsafe tasks.pointee.first
        while let task = cursor, views.count < limit {
            views.append(TaskView(task))
            cursor = task.next
        }
        return views
    }
}
