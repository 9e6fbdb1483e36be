// DeferredErrors: flushes that go on after the status of their commands (IMMED), and who learns of one that fails
// (SPC-4: deferred errors).
//
// Owns: the unit's own flush request, the deferred error, whom it is still to be told. Called by: the commands with an
// IMMED bit, LogicalUnit (commands of a nexus to be told, thaw), REQUEST SENSE. Must not know: tasks, CDBs.
//
// A flush is of the whole cache, so nobody can say whose data a failed one has lost: each I_T nexus is told, once, and
// of the last error only. A flush is not tried again: the kernel reports such an error once, and calls clean afterwards
// what it could not write.

import CBackstore

/// What a unit keeps of its own flushes.
@safe
struct BackgroundFlush {
    /// Asked for, and not submitted since.
    var isWanted = false
    var isInFlight = false
    /// The backstore was full: when to try again, in nanoseconds of the shard's clock.
    var retryAt: UInt64 = 0
    /// The last deferred error; meaningless if no nexus is to be told.
    var error = SenseData.none
    /// Allocated when first used.
    var request: UnsafeMutablePointer<scsi_backstore_request>?
}

extension LogicalUnit {
    /// How long a backstore that was full is left alone.
    private static let delay: UInt64 = 10_000_000

    // MARK: Flushing

    /// Makes stable what has completed until now, without anybody waiting for it.
    func flushLater() {
        guard cachesWrites else { return }
        flush.isWanted = true
        flush.retryAt = 0
        startFlush()
    }

    /// Submits the flush that is wanted, if it can be: what has stood in its way may have gone.
    func startFlush() {
        if mediumState == .absent { flush.isWanted = false }
        guard flush.isWanted, !flush.isInFlight, !isBlocked, flush.retryAt <= shard.clock else { return }
        if unsafe flush.request == nil { unsafe flush.request = .allocate(capacity: 1) }
        let request = unsafe flush.request!
        unsafe request.initialize(to: scsi_backstore_request())
        unsafe request.pointee.struct_size = UInt32(MemoryLayout<scsi_backstore_request>.size)
        unsafe request.pointee.operation = UInt8(SCSI_BACKSTORE_FLUSH)
        unsafe request.pointee.error_offset = .max
        unsafe request.pointee.owner = unsafe Unmanaged.passUnretained(self).toOpaque()
        unsafe request.pointee.complete = { request, error in
            let unit = unsafe Unmanaged<LogicalUnit>.fromOpaque(request!.pointee.owner)
            unsafe unit._withUnsafeGuaranteedRef { $0.flushCompleted(error) }
        }
        flush.isInFlight = unsafe backstore.submit(request)
        // One that is asked for from now on is another: this one need not cover what completes later.
        flush.isWanted = !flush.isInFlight
        guard flush.isWanted else { return }
        flush.retryAt = shard.clock &+ Self.delay
        unsafe deadlines.pointee.earliest = min(deadlines.pointee.earliest, flush.retryAt)
    }

    /// Submits the flush if its time has come.
    ///
    /// - Returns: When that is, `.max` if nothing waits for a time.
    func retryFlush() -> UInt64 {
        startFlush()
        return flush.isWanted && !flush.isInFlight && !isBlocked ? flush.retryAt : .max
    }

    private func flushCompleted(_ error: Int32) {
        flush.isInFlight = false
        if error != 0 { flushFailed(error) }
        startFlush()
        if watchesRequests { callWhenQuiet() }
        if removed { callWhenDrained() }
    }

    private func flushFailed(_ error: Int32) {
        unsafe counters.pointee.backstoreErrors += 1
        flush.error = BackstoreError.senseOfFlush(error)
        flush.error.isDeferred = true
        if flush.error.key == .mediumError { mediumErrorOccurred(.write) }
        for nexus in 0..<UInt16(Limits.nexusesPerTarget) { setDeferredError(true, for: nexus) }
    }

    // MARK: Telling

    /// The deferred error that a nexus is to be told, `nil` if there is none.
    func deferredError(for nexus: UInt16) -> SenseData? { hasDeferredError(nexus) ? flush.error : nil }

    /// The same for a command that ends with it: it is not told again.
    func takeDeferredError(for nexus: UInt16) -> SenseData? {
        let error = deferredError(for: nexus)
        setDeferredError(false, for: nexus)
        return error
    }
}
