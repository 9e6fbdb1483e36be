// Shard: what the logical units of one owner thread share: the clock, the order of arrival, staging memory, and the
// queue of tasks that wait for a resource.
//
// Owns: the staging buffers and the parameter buffer. Called by: the driver of the core (the daemon's reactor, an
// embedder's loop, the simulator) and the engine. Must not know: threads, commands.

import CTarget

/// The part of the core that one thread owns (design decision D2). Everything that is created with a shard is used on
/// its thread only.
@safe
public final class Shard {
    /// Nanoseconds of a monotonic clock. The driver sets it before it hands anything in.
    public var now: UInt64 {
        get { clock }
        set { clock = newValue }
    }
    /// The same without the exclusivity check that a public stored property costs.
    private(set) var clock: UInt64 = 0

    /// The order of arrival over all logical units of the shard.
    private(set) var sequence: UInt64 = 0

    /// Where parameter data is built and parameter lists are copied; used within one call only.
    let parameters: UnsafeMutableRawBufferPointer

    private let stagingMemory: UnsafeMutableRawPointer
    private var stagingFree: UInt64
    private var firstWaiting: TaskHandle?
    private var lastWaiting: TaskHandle?
    private var waiting = 0
    private var retrying = false
    /// The limiters for which tasks wait (Throttle).
    var throttles: [Throttle] = []
    private var tables: [UnitFeatures: CommandTable] = [:]
    /// The logical units that exist, mapped or not; each takes itself out when it goes.
    private var units: [Unmanaged<LogicalUnit>] = unsafe []

    /// A shard with its staging memory.
    public init() {
        unsafe parameters = .allocate(byteCount: Limits.parameterBytes, alignment: 16)
        unsafe parameters.initializeMemory(as: UInt8.self, repeating: 0)
        unsafe stagingMemory = .allocate(byteCount: Limits.stagingBuffers * Limits.stagingBytes, alignment: 4096)
        stagingFree = 1 << UInt64(Limits.stagingBuffers) - 1
    }

    deinit {
        precondition(stagingFree == 1 << UInt64(Limits.stagingBuffers) - 1, "a shard went away with tasks in flight")
        unsafe parameters.deallocate()
        unsafe stagingMemory.deallocate()
    }

    /// The table for a set of features; one table serves all units that have the same.
    func table(_ features: UnitFeatures) -> CommandTable {
        if let table = tables[features] { return table }
        let table = CommandTable(features: features)
        tables[features] = table
        return table
    }

    // MARK: The logical units of the shard

    func add(_ unit: LogicalUnit) { unsafe units.append(Unmanaged.passUnretained(unit)) }

    func remove(_ unit: LogicalUnit) {
        let identity = unsafe Unmanaged.passUnretained(unit).toOpaque()
        unsafe units.removeAll { unsafe $0.toOpaque() == identity }
    }

    /// The units in the order in which they were made, held while the array is.
    var logicalUnits: [LogicalUnit] { unsafe units.map { unsafe $0.takeUnretainedValue() } }

    @inline(__always)
    func nextSequence() -> UInt64 {
        sequence &+= 1
        return sequence
    }

    // MARK: Staging buffers

    /// Takes a staging buffer for a task.
    ///
    /// - Returns: Whether it has one now.
    func takeStaging(_ task: TaskHandle) -> Bool {
        if task.staging >= 0 { return true }
        guard stagingFree != 0 else { return false }
        let index = stagingFree.trailingZeroBitCount
        stagingFree &= ~(1 << UInt64(index))
        task.staging = Int16(index)
        return true
    }

    /// The staging buffer that a task holds.
    func staging(_ task: TaskHandle) -> UnsafeMutableRawBufferPointer {
        precondition(task.staging >= 0)
        return unsafe UnsafeMutableRawBufferPointer(
            start: stagingMemory + Int(task.staging) * Limits.stagingBytes, count: Limits.stagingBytes)
    }

    func returnStaging(_ task: TaskHandle) {
        guard task.staging >= 0 else { return }
        stagingFree |= 1 << UInt64(task.staging)
        task.staging = -1
    }

    // MARK: Tasks that wait for a resource

    /// Whether tasks wait for a staging buffer or for room in a backstore; then `retryWaiting` is worth calling.
    public var hasWaiting: Bool { waiting > 0 }

    func wait(_ task: TaskHandle) {
        task.nextWaiting = nil
        if let lastWaiting { lastWaiting.nextWaiting = task } else { firstWaiting = task }
        lastWaiting = task
        waiting += 1
    }

    /// Takes a task out of the queue, because it is aborted.
    func stopWaiting(_ task: TaskHandle) {
        if task.waitsFor == .quota {
            for throttle in throttles where throttle.stopWaiting(task) { return }
            preconditionFailure("a task waits for a limiter that does not know it")
        }
        var previous: TaskHandle?
        var cursor = firstWaiting
        while let current = cursor, current != task {
            previous = current
            cursor = current.nextWaiting
        }
        guard cursor != nil else { return }
        if let previous { previous.nextWaiting = task.nextWaiting } else { firstWaiting = task.nextWaiting }
        if lastWaiting == task { lastWaiting = previous }
        task.nextWaiting = nil
        waiting -= 1
    }

    /// Tries the waiting tasks again, each at most once. The driver calls it once a turn while `hasWaiting`; the engine
    /// after each completion that may have freed something.
    public func retryWaiting() {
        guard waiting > 0, !retrying else { return }
        retrying = true
        defer { retrying = false }
        var budget = waiting
        while budget > 0, let task = firstWaiting {
            budget -= 1
            stopWaiting(task)
            unsafe task.logicalUnit!._withUnsafeGuaranteedRef { $0.retry(task) }
        }
    }
}
