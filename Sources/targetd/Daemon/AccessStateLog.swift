// AccessStateLog: tells of port groups whose state a guest has set, and no more of it than a log can bear.
//
// Owns: the words. Called by: ReactorObjects, on a reactor thread. Must not know: other targets.

import Logging
import SCSICore

/// The log of one target.
final class AccessStateLog {
    private var logger: Logger
    private let hub: EventHub
    private let subject: String
    /// So that a guest which sets states without end fills no disk.
    private var rate = LogRate()

    init(_ logger: Logger, target: NAAName, hub: EventHub) {
        self.logger = logger
        self.hub = hub
        subject = target.description
        self.logger[metadataKey: "target"] = "\(target)"
    }

    /// Logs that an initiator has set the state of a group, and tells those who listen to events.
    func report(_ group: UInt16, _ state: AsymmetricAccessState, by initiator: String, now: UInt64) {
        guard let suppressed = rate.admit(now) else { return }
        var metadata: Logger.Metadata = ["initiator": "\(initiator)"]
        if suppressed > 0 { metadata["suppressed"] = "\(suppressed)" }
        let text = "port group \(group): \(state.configured.rawValue), set by a guest"
        logger.info("\(text)", metadata: metadata)
        hub.publish(.changed, subject: subject, text)
    }
}
