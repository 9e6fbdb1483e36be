// EventLog: logs what happens at one socket, and no more of it than a log can bear.
//
// Owns: the limit, so that a guest which does wrong without end fills no disk. Called by: ReactorObjects, on a reactor
// thread. Must not know: other sockets.

import Logging
import VirtioFront

/// The log of one socket.
final class EventLog {
    /// Faults that are logged at once, after a quiet time.
    static let burst = 10
    /// After that, one fault is logged in this many nanoseconds.
    static let interval: UInt64 = 10_000_000_000

    private var logger: Logger
    private var allowed = EventLog.burst
    private var lastRefill: UInt64 = 0
    private var suppressed = 0

    init(_ logger: Logger, metadata: Logger.Metadata) {
        self.logger = logger
        for (key, value) in metadata { self.logger[metadataKey: key] = value }
    }

    /// Logs an event.
    ///
    /// - Parameter now: Nanoseconds of a monotonic clock.
    func report(_ event: VhostUserSCSIServer.Event, now: UInt64) {
        guard isAllowed(now) else {
            suppressed += 1
            return
        }
        var metadata: Logger.Metadata = [:]
        if suppressed > 0 { metadata["suppressed"] = "\(suppressed)" }
        suppressed = 0
        switch event {
        case .connected: logger.info("guest connected", metadata: metadata)
        case .disconnected(nil): logger.info("guest disconnected", metadata: metadata)
        case .disconnected(let reason?): logger.warning("guest disconnected: \(reason)", metadata: metadata)
        case .fault(let text): logger.warning("\(text)", metadata: metadata)
        }
    }

    private func isAllowed(_ now: UInt64) -> Bool {
        let refills = (now &- lastRefill) / Self.interval
        if refills > 0 {
            allowed = min(Self.burst, allowed + Int(min(refills, UInt64(Self.burst))))
            lastRefill = now
        }
        guard allowed > 0 else { return false }
        allowed -= 1
        return true
    }
}
