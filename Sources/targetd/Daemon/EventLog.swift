// EventLog: logs what happens at one socket, and no more of it than a log can bear.
//
// Owns: the limit, so that a guest which does wrong without end fills no disk. Called by: ReactorObjects, on a reactor
// thread. Must not know: other sockets.

import Logging
import VirtioFront

/// The log of one socket.
final class EventLog {
    private var logger: Logger
    private var rate = LogRate()

    init(_ logger: Logger, metadata: Logger.Metadata) {
        self.logger = logger
        for (key, value) in metadata { self.logger[metadataKey: key] = value }
    }

    /// Logs an event.
    ///
    /// - Parameter now: Nanoseconds of a monotonic clock.
    func report(_ event: VhostUserSCSIServer.Event, now: UInt64) {
        guard let suppressed = rate.admit(now) else { return }
        var metadata: Logger.Metadata = [:]
        if suppressed > 0 { metadata["suppressed"] = "\(suppressed)" }
        switch event {
        case .connected: logger.info("guest connected", metadata: metadata)
        case .disconnected(nil): logger.info("guest disconnected", metadata: metadata)
        case .disconnected(let reason?): logger.warning("guest disconnected: \(reason)", metadata: metadata)
        case .fault(let text): logger.warning("\(text)", metadata: metadata)
        }
    }
}
