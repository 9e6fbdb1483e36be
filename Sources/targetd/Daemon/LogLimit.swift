// LogLimit: how many messages of one origin may go into the log.
//
// Called by: whoever logs what a peer can cause. Must not know: what is logged.

/// A limit for messages that somebody outside can cause without end: some at once after a quiet time, then one in a
/// while, so that nobody fills a disk.
struct LogLimit: Sendable {
    /// Messages that are let through at once.
    static let burst = 10
    /// After that, one in this many nanoseconds.
    static let interval: UInt64 = 10_000_000_000

    private var allowed = LogLimit.burst
    private var lastRefill: UInt64 = 0
    private var suppressed = 0

    /// Asks for one message.
    ///
    /// - Parameter now: Nanoseconds of a monotonic clock.
    /// - Returns: How many were suppressed since the last one that was let through; `nil`: so is this one.
    mutating func take(now: UInt64) -> Int? {
        let refills = (now &- lastRefill) / Self.interval
        if refills > 0 {
            allowed = min(Self.burst, allowed + Int(min(refills, UInt64(Self.burst))))
            lastRefill = now
        }
        guard allowed > 0 else {
            suppressed += 1
            return nil
        }
        allowed -= 1
        defer { suppressed = 0 }
        return suppressed
    }
}
