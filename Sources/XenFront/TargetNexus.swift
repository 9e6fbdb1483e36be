// TargetNexus: one vhost's I_T nexus with one target device.
//
// Owns: the nexus, from its establishment to its loss. Called by: XenPort. Must not know: rings.

import CTarget
import SCSICore

/// An I_T nexus. The class is the seam between the port and the core: tests override it.
class TargetNexus {
    /// Hands a command over. Its completion may come before this returns.
    func receive(_ task: TaskHandle) { preconditionFailure("abstract") }
    /// Hands a task management function over. Its completion may come before this returns.
    func receive(_ request: scsi_task_management_request) { preconditionFailure("abstract") }
    /// Whether a command that may have been carried out already may be carried out again, after a daemon has died.
    var repeatsSafely: Bool { true }
    /// Ends all tasks, which are still completed to the port, and forgets the nexus.
    func lose() { preconditionFailure("abstract") }
}

/// A nexus with a target of the core.
final class CoreNexus: TargetNexus {
    private let target: TargetDevice
    private let identifier: NexusIdentifier

    /// Establishes the nexus; `nil` if the target has no room for another.
    ///
    /// - Parameter targetPort: The relative target port identifier of the front.
    init?(
        target: TargetDevice, initiatorPort: String, targetPort: UInt16 = XenFront.Configuration.defaultTargetPort,
        port: TargetPortHandle
    ) {
        let identifier = target.establishNexus(initiatorPort: initiatorPort, targetPort: targetPort, port: port)
        guard let identifier else { return nil }
        self.target = target
        self.identifier = identifier
    }

    override func receive(_ task: TaskHandle) { target.receive(task, nexus: identifier) }
    override func receive(_ request: scsi_task_management_request) { target.receive(request, nexus: identifier) }
    override func lose() { target.loseNexus(identifier) }

    /// Whether the target has none of the nexus's commands.
    var isIdle: Bool { target.tasksInFlight(identifier) == 0 }
}
