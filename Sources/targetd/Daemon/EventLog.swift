// EventLog: logs what happens at one socket, and no more of it than a log can bear.
//
// Owns: the words. Called by: ReactorObjects, on a reactor thread. Must not know: other sockets.

import Logging
import VirtioFront

/// The log of one socket.
final class EventLog {
    private var logger: Logger
    private let hub: EventHub
    private let subject: String
    /// So that a guest which does wrong without end fills no disk.
    private var rate = LogRate()

    init(_ logger: Logger, socket: String, hub: EventHub) {
        self.logger = logger
        self.hub = hub
        subject = socket
        self.logger[metadataKey: "socket"] = "\(socket)"
    }

    /// Logs an event, and tells those who listen to events.
    ///
    /// - Parameter now: Nanoseconds of a monotonic clock.
    func report(_ event: VhostUserSCSIServer.Event, now: UInt64) {
        guard let suppressed = rate.admit(now) else { return }
        var metadata: Logger.Metadata = [:]
        if suppressed > 0 { metadata["suppressed"] = "\(suppressed)" }
        let (kind, level, text): (EventHub.Kind, Logger.Level, String) =
            switch event {
            case .connected: (.guestConnected, .info, "guest connected")
            case .disconnected(nil): (.guestDisconnected, .info, "guest disconnected")
            case .disconnected(let reason?): (.guestDisconnected, .warning, "guest disconnected: \(reason)")
            case .fault(let text): (.guestFault, .warning, text)
            }
        logger.log(level: level, "\(text)", metadata: metadata)
        hub.publish(kind, subject: subject, text)
    }
}
