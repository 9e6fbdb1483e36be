// XenWorker: the Xen front on one reactor: its vhosts, and the way of the control thread's requests to them.
//
// Owns: the grant device, the staging memory and the vhosts of one reactor. Called by: XenFront (making it), XenControl
// (through `post`). Must not know: xenstore.

import Reactor
import SCSICore
import Xenbus

/// The part of the front that lives on one reactor. All but `post` is used on that reactor's thread.
@safe
final class XenWorker: @unchecked Sendable {
    let reactor: Reactor
    let recordDirectory: String
    let staging: StagingPool
    let batch = GrantBatch()
    private let library: LibraryGrants
    var grants: Grants { library.grants }
    private var vhosts: [VhostIdentifier: VhostServer] = [:]
    private let onFault: @Sendable (VhostIdentifier, String) -> Void

    /// Opens the grant device.
    ///
    /// - Parameter onFault: Called on the reactor's thread when a front end has broken the rules of its ring.
    init(
        reactor: Reactor, stagingBytes: Int, recordDirectory: String,
        onFault: @escaping @Sendable (VhostIdentifier, String) -> Void
    ) throws(XenStoreError) {
        self.reactor = reactor
        self.recordDirectory = recordDirectory
        self.onFault = onFault
        library = try LibraryGrants()
        staging = StagingPool(bytes: stagingBytes)
    }

    func reportFault(_ vhost: VhostIdentifier, _ text: String) { onFault(vhost, text) }

    /// Runs on the reactor's thread.
    func post(_ body: @escaping @Sendable (XenWorker) -> Void) {
        reactor.post { [self] in body(self) }
    }

    func connect(_ connection: VhostConnection) -> XenbusOutcome {
        precondition(vhosts[connection.vhost] == nil)
        do throws(VhostError) {
            vhosts[connection.vhost] = try VhostServer(connection, on: self)
            return .done
        } catch {
            return .failed(error.text)
        }
    }

    func serve(_ vhost: VhostIdentifier) -> XenbusOutcome {
        do throws(VhostError) {
            try vhosts[vhost]?.serve()
            return .done
        } catch {
            return .failed(error.text)
        }
    }

    func attach(_ device: VirtualDevice, of vhost: VhostIdentifier, to target: TargetDevice, unit: LUN) -> XenbusOutcome
    {
        guard let server = vhosts[vhost] else { return .failed("the vhost is not connected") }
        do throws(VhostError) {
            try server.attach(device, to: target, unit: unit)
            return .done
        } catch {
            return .failed(error.text)
        }
    }

    func attach(_ device: VirtualDevice, of vhost: VhostIdentifier, to target: HostTarget, lun: UInt16)
        -> XenbusOutcome
    {
        guard let server = vhosts[vhost] else { return .failed("the vhost is not connected") }
        do throws(VhostError) {
            try server.attach(device, to: target, lun: lun)
            return .done
        } catch {
            return .failed(error.text)
        }
    }

    /// What was done on a vhost's ring; `nil` if it is not here.
    func statistics(of vhost: VhostIdentifier) -> XenFront.Statistics? { vhosts[vhost]?.statistics }

    func detach(_ device: VirtualDevice, of vhost: VhostIdentifier) { vhosts[vhost]?.detach(device) }

    func disconnect(_ vhost: VhostIdentifier, keepingRecord: Bool = false, done: @escaping () -> Void) {
        guard let server = vhosts.removeValue(forKey: vhost) else { return done() }
        server.disconnect(keepingRecord: keepingRecord) {
            // Keeps the server alive until here: the reactor and the core refer to it.
            withExtendedLifetime(server) {}
            done()
        }
    }

    /// Takes all devices of a target away from all vhosts.
    func withdraw(_ target: UInt64, done: @escaping () -> Void) {
        var left = vhosts.count + 1
        let part = {
            left -= 1
            if left == 0 { done() }
        }
        for server in vhosts.values { server.withdraw(target, done: part) }
        part()
    }

    /// Lets go of all rings, in good order.
    func stop(done: @escaping () -> Void) {
        var left = vhosts.count + 1
        let part = {
            left -= 1
            if left == 0 { done() }
        }
        for vhost in vhosts.keys { disconnect(vhost, keepingRecord: true, done: part) }
        part()
    }
}
