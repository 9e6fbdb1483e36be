// VhostNodes: everything that xenstore says about one vhost at one moment.
//
// Called by: the Xen front, which reads it in the transaction in which it then writes, and decides by it; the
// toolstack. Must not know: what is decided.

import CXenStore

/// The nodes of one device of a vhost.
package struct DeviceNodes: Hashable, Sendable {
    /// The directory below vscsi-devs, `dev-N`.
    package let name: String
    package var physicalDevice: String
    package var virtualDevice: String
    package var state: XenbusState
    /// What the front end says about the same device.
    package var frontendState: XenbusState?
    /// Why the back end refused it.
    package var error: String?

    package init(
        name: String, physicalDevice: String, virtualDevice: String, state: XenbusState, frontendState: XenbusState?
    ) {
        self.name = name
        self.physicalDevice = physicalDevice
        self.virtualDevice = virtualDevice
        self.state = state
        self.frontendState = frontendState
    }
}

/// The nodes of one vhost, both ends.
package struct VhostNodes: Hashable, Sendable {
    /// `nil`: the vhost's directory is gone.
    package var backendState: XenbusState?
    /// Whether the toolstack wants the vhost to come back after it was closed.
    package var online = true
    /// Whether the guest sees a whole target instead of a map of single devices.
    package var featureHost = false
    /// In the order of their names.
    package var devices: [DeviceNodes] = []
    /// Whether the guest exists at all.
    package var domainExists = true
    /// `nil`: the front end's directory is gone or was never written.
    package var frontendState: XenbusState?
    package var ring: RingParameters?
    /// An ABI of ring entries that is not ours, if the front end asks for one.
    package var foreignProtocol: String?
    /// What is wrong with the nodes that the toolstack wrote.
    package var fault: String?
    /// Why the back end closed it.
    package var error: String?

    /// A vhost without nodes.
    package init() {}
}

/// Which vhost: its guest's domain identifier and its number.
package struct VhostIdentifier: Hashable, Comparable, Sendable, CustomStringConvertible {
    package let domain: UInt16
    package let number: UInt32

    package init(domain: UInt16, number: UInt32) {
        self.domain = domain
        self.number = number
    }

    package static func < (left: Self, right: Self) -> Bool {
        (left.domain, left.number) < (right.domain, right.number)
    }

    package var description: String { "\(domain)/\(number)" }
}

/// Where a vhost's nodes are.
package struct VhostPaths: Sendable {
    package let identifier: VhostIdentifier
    /// `<own home>/backend/vscsi/<domain>/<number>`.
    package let backend: String

    package init(_ identifier: VhostIdentifier, under root: String) {
        self.identifier = identifier
        backend = "\(root)/\(identifier.domain)/\(identifier.number)"
    }
}

/// Reads vhosts from a store.
package enum VhostReader {
    /// More devices than that are not looked at: a toolstack's mistake must not take all of our memory.
    package static let maximumDevices = 512

    /// Reads all that concerns one vhost.
    package static func read(_ paths: VhostPaths, from store: any XenStore, _ transaction: XenTransaction)
        throws(XenStoreError) -> VhostNodes
    {
        var nodes = VhostNodes()
        let base = paths.backend
        guard let state = try store.read(base + "/state", transaction) else { return nodes }
        nodes.backendState = XenbusState(node: state)
        if [.closing, .closed].contains(nodes.backendState) {
            nodes.error = try store.read(base + "/error", transaction)
        }
        nodes.online = try store.read(base + "/online", transaction).map { $0 != "0" } ?? true
        nodes.featureHost = try store.read(base + "/feature-host", transaction).map { $0 != "0" } ?? false
        let frontend = try store.read(base + "/frontend", transaction)
        let domain = paths.identifier.domain
        nodes.domainExists = try store.exists("/local/domain/\(domain)", transaction)
        nodes.devices = try devices(base, frontend: frontend, from: store, transaction)
        guard let frontend else {
            nodes.fault = "\(base)/frontend is missing; write the path of the front end's nodes there"
            return nodes
        }
        guard frontend.hasPrefix("/local/domain/\(domain)/") else {
            nodes.fault = "\(base)/frontend names \(frontend), which is not domain \(domain)'s"
            return nodes
        }
        try readFrontend(frontend, into: &nodes, from: store, transaction)
        return nodes
    }

    private static func readFrontend(
        _ frontend: String, into nodes: inout VhostNodes, from store: any XenStore, _ transaction: XenTransaction
    ) throws(XenStoreError) {
        nodes.frontendState = try store.read(frontend + "/state", transaction).map { XenbusState(node: $0) }
        let reference = try store.read(frontend + "/ring-ref", transaction).flatMap { number($0) }
        let channel = try store.read(frontend + "/event-channel", transaction).flatMap { number($0) }
        if let reference, let channel {
            nodes.ring = RingParameters(ringReference: reference, eventChannel: channel)
        }
        // Ring entries have no field wider than 32 bits, so they lie alike in all little-endian ABIs.
        let abi = try store.read(frontend + "/protocol", transaction) ?? XEN_IO_PROTO_ABI_X86_64
        let known = [XEN_IO_PROTO_ABI_X86_32, XEN_IO_PROTO_ABI_X86_64, XEN_IO_PROTO_ABI_ARM]
        nodes.foreignProtocol = known.contains(abi) ? nil : abi
    }

    private static func number(_ text: String) -> UInt32? { decimal(text).flatMap { UInt32(exactly: $0) } }

    private static func devices(
        _ base: String, frontend: String?, from store: any XenStore, _ transaction: XenTransaction
    ) throws(XenStoreError) -> [DeviceNodes] {
        var devices: [DeviceNodes] = []
        for name in try store.children(base + "/vscsi-devs", transaction) ?? [] where name.hasPrefix("dev-") {
            guard devices.count < maximumDevices else { break }
            let directory = "\(base)/vscsi-devs/\(name)"
            guard let state = try store.read(directory + "/state", transaction) else { continue }
            var frontendState: XenbusState?
            if let frontend {
                frontendState = try store.read("\(frontend)/vscsi-devs/\(name)/state", transaction)
                    .map { XenbusState(node: $0) }
            }
            var device = DeviceNodes(
                name: name,
                physicalDevice: try store.read(directory + "/p-dev", transaction) ?? "",
                virtualDevice: try store.read(directory + "/v-dev", transaction) ?? "",
                state: XenbusState(node: state), frontendState: frontendState)
            if device.state == .closed { device.error = try store.read(directory + "/error", transaction) }
            devices.append(device)
        }
        return devices.sorted { $0.name < $1.name }
    }
}
