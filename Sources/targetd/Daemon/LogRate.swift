// LogRate: how much one source may log.
//
// Called by: the logs of the reactor threads. Must not know: what is logged.

/// Admits a burst of lines after a quiet time, then one at a time.
struct LogRate {
    /// Lines that are admitted at once, after a quiet time.
    static let burst = 10
    /// After that, one line is admitted in this many nanoseconds.
    static let interval: UInt64 = 10_000_000_000

    private var allowed = LogRate.burst
    private var lastRefill: UInt64 = 0
    private var suppressed = 0

    /// Asks for a line.
    ///
    /// - Parameter now: Nanoseconds of a monotonic clock.
    /// - Returns: How many lines were refused since the last one that was admitted; `nil` if this one is refused.
    mutating func admit(_ now: UInt64) -> Int? {
        let refills = (now &- lastRefill) / Self.interval
        if refills > 0 {
            allowed = min(Self.burst, allowed + Int(min(refills, UInt64(Self.burst))))
            lastRefill = now
        }
        guard allowed > 0 else {
            suppressed += 1
            return nil
        }
        defer { suppressed = 0 }
        allowed -= 1
        return suppressed
    }
}
