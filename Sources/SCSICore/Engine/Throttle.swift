// Throttle: how many commands and bytes may begin in a time, and the tasks that wait for their turn.
//
// Owns: the buckets, and the queue of waiting tasks. Called by: LogicalUnit (before a command is carried out), Shard
// (when time has passed), the daemon (limits). Must not know: what it limits: a logical unit, an initiator.
//
// A bucket is kept as the time at which it will be full again: a command may begin if that time is less than the burst
// away, and moves it by what it costs. So nothing needs to happen while nobody waits, and a command that costs more
// than the bucket holds begins all the same, and the next ones wait the longer.

/// How much may be done. Zero means without limit.
public struct RateLimits: Sendable, Equatable {
    /// Commands that access the medium, in a second.
    public var operationsPerSecond: UInt64 = 0
    /// Bytes that they name, in a second.
    public var bytesPerSecond: UInt64 = 0
    /// How long unused rate is saved, in nanoseconds: as much as the rates give in this time may come at once.
    public var burstNanoseconds: UInt64 = Limits.defaultBurstNanoseconds

    /// No limits.
    public init() {}

    /// Whether nothing is limited.
    public var isUnlimited: Bool { operationsPerSecond == 0 && bytesPerSecond == 0 }
}

/// One limiter. All of its tasks belong to one shard.
public final class Throttle {
    /// The limits; new ones count from now on, for those that wait as well.
    public private(set) var limits: RateLimits
    private let shard: Shard
    /// When the buckets are full again.
    private var operationsFullAt: UInt64 = 0
    private var bytesFullAt: UInt64 = 0
    private var first: TaskHandle?
    private var last: TaskHandle?
    /// Tasks that wait.
    public private(set) var waiting = 0
    /// Tasks that have waited, since it was made.
    public private(set) var delayed: UInt64 = 0

    /// A limiter of tasks of a shard.
    public init(_ limits: RateLimits, shard: Shard) {
        self.limits = limits
        self.shard = shard
    }

    deinit { precondition(waiting == 0, "a limiter went away while tasks wait for it") }

    /// Changes the limits. Tasks that need not wait any more go on when the driver calls `Shard.releaseThrottled`.
    public func setLimits(_ new: RateLimits) {
        limits = new
        // What was saved or owed at another rate means nothing at this one.
        (operationsFullAt, bytesFullAt) = (shard.clock, shard.clock)
    }

    // MARK: Tokens

    /// When the next command may begin.
    var opensAt: UInt64 {
        let full = max(
            limits.operationsPerSecond > 0 ? operationsFullAt : 0, limits.bytesPerSecond > 0 ? bytesFullAt : 0)
        return full > limits.burstNanoseconds ? full - limits.burstNanoseconds : 0
    }

    /// Takes what a command costs, if it may begin now and nobody waits before it.
    func take(bytes: UInt64) -> Bool {
        guard waiting == 0, opensAt <= shard.clock else { return false }
        pay(bytes)
        return true
    }

    private func pay(_ bytes: UInt64) {
        let now = shard.clock
        if limits.operationsPerSecond > 0 {
            operationsFullAt = max(operationsFullAt, now) + 1_000_000_000 / limits.operationsPerSecond
        }
        if limits.bytesPerSecond > 0 {
            bytesFullAt = max(bytesFullAt, now) + bytes * 1_000_000_000 / limits.bytesPerSecond
        }
    }

    // MARK: Tasks that wait

    func wait(_ task: TaskHandle) {
        task.nextWaiting = nil
        if let last { last.nextWaiting = task } else { first = task }
        last = task
        waiting += 1
        delayed += 1
        shard.throttled(self)
    }

    /// Takes a task out of the queue, because it ends.
    func stopWaiting(_ task: TaskHandle) -> Bool {
        var previous: TaskHandle?
        var cursor = first
        while let current = cursor, current != task {
            previous = current
            cursor = current.nextWaiting
        }
        guard cursor != nil else { return false }
        if let previous { previous.nextWaiting = task.nextWaiting } else { first = task.nextWaiting }
        if last == task { last = previous }
        task.nextWaiting = nil
        waiting -= 1
        return true
    }

    /// The task that has waited longest, if it may begin now; it has paid.
    func release(cost: (TaskHandle) -> UInt64) -> TaskHandle? {
        guard let task = first, opensAt <= shard.clock else { return nil }
        _ = stopWaiting(task)
        pay(cost(task))
        return task
    }
}

extension Shard {
    /// When `releaseThrottled` has something to do, in nanoseconds of the clock; `nil`: not before another task comes.
    public var nextRelease: UInt64? { throttles.lazy.map(\.opensAt).min() }

    /// Lets tasks go on whose turn has come. The driver calls it when `nextRelease` has come.
    public func releaseThrottled() {
        // A task that one limiter lets go may have to wait for another, which is at the end of the list then.
        var index = 0
        while index < throttles.count {
            let throttle = throttles[index]
            index += 1
            while let task = throttle.release(cost: LogicalUnit.bytes) {
                unsafe task.logicalUnit!._withUnsafeGuaranteedRef { $0.retry(task) }
            }
        }
        throttles.removeAll { $0.waiting == 0 }
    }

    func throttled(_ throttle: Throttle) {
        if !throttles.contains(where: { $0 === throttle }) { throttles.append(throttle) }
    }
}
