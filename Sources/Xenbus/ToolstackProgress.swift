// ToolstackProgress: waiting for what the toolstack has asked for: how far it is, and why it does not go on.
//
// Owns: what counts as done and as failed. Called by: targetctl. Must not know: how to show it.

/// How far something is.
package enum ToolstackProgress: Equatable, Sendable {
    case done
    /// Not yet, and what the ends are doing.
    case waiting(String)
    /// It will not happen.
    case failed(String)
}

extension Toolstack {
    /// How far devices are on their way to the guest.
    package func progress(of devices: [AttachedDevice]) throws(ToolstackError) -> ToolstackProgress {
        for vhost in Set(devices.map(\.vhost)).sorted() {
            let nodes = try nodes(vhost)
            guard nodes.backendState != nil else {
                return .failed("vhost \(vhost) is gone: is the domain still there?")
            }
            if nodes.backendState == .closing || nodes.backendState == .closed {
                return .failed("vhost \(vhost) was closed\(try reasons(vhost, nodes))")
            }
            for name in devices.filter({ $0.vhost == vhost }).map(\.name) {
                guard let device = nodes.devices.first(where: { $0.name == name }) else {
                    return .failed("\(name) of vhost \(vhost) was taken away by somebody else")
                }
                if device.state == .closed {
                    return .failed(
                        "\(device.physicalDevice) at \(device.virtualDevice) was refused: "
                            + (device.error ?? "the back end says no reason"))
                }
                if device.state != .connected || nodes.backendState != .connected {
                    return .waiting(describe(vhost, nodes, device))
                }
            }
        }
        return .done
    }

    /// How far a detachment is.
    package func progress(of detachment: Detachment) throws(ToolstackError) -> ToolstackProgress {
        switch detachment {
        case .done: return .done
        case .vhost(let vhost):
            let nodes = try nodes(vhost)
            if nodes.backendState == nil || nodes.backendState == .closed { return .done }
            return .waiting(describe(vhost, nodes, nil))
        case .device(let attached):
            let nodes = try nodes(attached.vhost)
            guard let device = nodes.devices.first(where: { $0.name == attached.name }) else { return .done }
            if device.state == .closed && nodes.backendState != .reconfiguring && nodes.backendState != .reconfigured {
                return .done
            }
            return .waiting(describe(attached.vhost, nodes, device))
        }
    }

    private func describe(_ vhost: VhostIdentifier, _ nodes: VhostNodes, _ device: DeviceNodes?) -> String {
        let front = nodes.frontendState.map { "\($0)" } ?? "absent"
        var text = "vhost \(vhost): back end \(nodes.backendState ?? .unknown), front end \(front)"
        if let device { text += ", \(device.virtualDevice) \(device.state)" }
        return text
    }

    /// What both ends have to say of a vhost that does not work: ": why", or nothing.
    package func reasons(_ vhost: VhostIdentifier, _ nodes: VhostNodes) throws(ToolstackError) -> String {
        var reasons: [String] = []
        if let error = nodes.error { reasons.append(error) }
        // Where Linux's drivers write what went wrong (xenbus_dev_error).
        let places = [
            ("back end", "/local/domain/\(backendDomain)/error/backend/vscsi/\(vhost.domain)/\(vhost.number)/error"),
            ("front end", "/local/domain/\(vhost.domain)/error/device/vscsi/\(vhost.number)/error"),
        ]
        for (end, path) in places {
            do throws(XenStoreError) {
                if let text = try store.read(path, .none), !text.isEmpty { reasons.append("the \(end) says: \(text)") }
            } catch {
                throw ToolstackError(.store, error.description)
            }
        }
        return reasons.isEmpty ? "" : ": " + reasons.joined(separator: "; ")
    }

    /// Why a vhost does not get on, as far as can be told from its nodes.
    package func advice(_ vhost: VhostIdentifier) throws(ToolstackError) -> String {
        let nodes = try nodes(vhost)
        let said = try reasons(vhost, nodes)
        if !said.isEmpty { return String(said.dropFirst(2)) }
        switch (nodes.backendState, nodes.frontendState) {
        case (.initialising?, _):
            return "nobody has taken it up in domain \(backendDomain): does targetd run there, with xen: in its "
                + "configuration?"
        case (_, nil), (_, .initialising?), (_, .unknown?):
            return "the guest's driver has not come: does the guest run, and does it have xen-scsifront?"
        case (_, .closed?), (_, .closing?): return "the guest's driver has let go of it"
        default: return "one of the ends does not answer"
        }
    }
}
