// XenService: the Xen front in the daemon: started and stopped with the configuration, fed with its targets.
//
// Owns: the front. Called by: the daemon. Must not know: how guests are served.

import ControlAPI
import Logging
import Reactor
import SCSICore
import XenFront

/// The Xen front, for the control plane.
final class XenService: Sendable {
    private let front: XenFront

    /// Makes a front that serves nothing yet.
    init(_ configuration: XenConfiguration, threads: [ReactorThread], logger: Logger) {
        var settings = XenFront.Configuration()
        settings.stagingBytes = Int(configuration.staging)
        settings.recordDirectory = configuration.records
        settings.targetPort = UInt16(configuration.port)
        settings.hostDevices = configuration.hostDevices
        settings.log = { vhost, text, isError in
            var logger = logger
            logger[metadataKey: "front"] = "xen"
            if let vhost { logger[metadataKey: "vhost"] = "\(vhost)" }
            logger.log(level: isError ? .warning : .info, "\(text)")
        }
        front = XenFront(settings, reactors: threads.map(\.reactor))
    }

    /// Serves from now on, or as soon as there is a xenstored.
    func start() throws(ChangeError) {
        do throws(XenFrontError) { try front.start() } catch { throw ChangeError(text: error.description) }
    }

    /// Answers what is in flight and lets go of all rings; guests wait for the next daemon.
    func stop() async {
        await withCheckedContinuation { continuation in front.stop { continuation.resume() } }
    }

    /// Lets guests have a target and its units as they are now.
    func publish(_ name: NAAName, on thread: ReactorThread, without removed: Int? = nil) async {
        await thread.perform { [front, index = thread.index] objects in
            guard let target = objects.servedTargets[name] else { preconditionFailure("no target \(name)") }
            let units = target.logicalUnits.map { UInt16($0.lun.number) }.filter { Int($0) != removed }
            front.publish(target, reactor: index, units: Set(units))
        }
    }

    /// Takes a target away from guests; returns when none of their commands is in it.
    func withdraw(_ name: NAAName) async {
        await withCheckedContinuation { continuation in front.withdraw(name.value) { continuation.resume() } }
    }

    /// What is served.
    var status: XenStatus {
        get async {
            await withCheckedContinuation { continuation in
                front.status { continuation.resume(returning: XenStatus($0)) }
            }
        }
    }
}

extension XenStatus {
    init(_ status: XenFront.Status) {
        self.init(waitsFor: status.waitsFor, vhosts: status.vhosts.map(XenVhostStatus.init))
    }
}

extension XenVhostStatus {
    init(_ vhost: XenFront.VhostStatus) {
        self.init(
            domain: Int(vhost.domain), vhost: Int(vhost.number), backendState: vhost.backendState,
            frontendState: vhost.frontendState,
            devices: vhost.devices.map {
                XenDeviceStatus(
                    name: $0.name, physicalDevice: $0.physicalDevice, virtualDevice: $0.virtualDevice, state: $0.state)
            })
        reactor = vhost.reactor
        fault = vhost.fault
        commands = vhost.statistics.commands
        taskManagementFunctions = vhost.statistics.taskManagementFunctions
        notifications = vhost.statistics.notifications
        waits = vhost.statistics.waits
    }
}
