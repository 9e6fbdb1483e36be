// Toolstack: the third side of vscsi, which attaches devices to guests and takes them away: xl knows nothing of it.
//
// Owns: the nodes that a toolstack writes, and the order in which that is done. Called by: targetctl. Must not know:
// how the back end works: they meet in xenstore only.

/// Why the toolstack did not do something, in words for its user.
package struct ToolstackError: Error, Equatable, Sendable {
    package enum Kind: Sendable {
        /// There is no such guest, vhost or device.
        case notFound
        /// It cannot be done to what is there.
        case conflict
        /// One of the ends said no.
        case refused
        /// It has not happened in time; it may still happen.
        case timeout
        /// xenstore did not do what it was asked.
        case store
    }

    package let kind: Kind
    package let text: String

    package init(_ kind: Kind, _ text: String) {
        self.kind = kind
        self.text = text
    }
}

/// A device of a vhost, as it was written.
package struct AttachedDevice: Hashable, Sendable {
    package let vhost: VhostIdentifier
    /// Its directory, `dev-N`.
    package let name: String

    package init(vhost: VhostIdentifier, name: String) {
        self.vhost = vhost
        self.name = name
    }
}

/// What has to happen after nodes were written.
package enum Detachment: Equatable, Sendable {
    /// Nothing: nobody used it.
    case done
    /// The device's state becomes Closed.
    case device(AttachedDevice)
    /// The vhost's state becomes Closed.
    case vhost(VhostIdentifier)
}

/// The toolstack for the vhosts of one back end.
package struct Toolstack {
    package let store: any XenStore
    /// The domain that targetd runs in.
    package let backendDomain: UInt16

    package init(store: any XenStore, backendDomain: UInt16) {
        self.store = store
        self.backendDomain = backendDomain
    }

    private var root: String { "/local/domain/\(backendDomain)/backend/vscsi" }
    package func paths(_ vhost: VhostIdentifier) -> VhostPaths { VhostPaths(vhost, under: root) }
    package func frontend(_ vhost: VhostIdentifier) -> String {
        "/local/domain/\(vhost.domain)/device/vscsi/\(vhost.number)"
    }

    /// A vhost and its nodes.
    package typealias Vhost = (vhost: VhostIdentifier, nodes: VhostNodes)

    // MARK: Looking

    /// The number of a guest that is given by its number or its name.
    package func domain(_ text: String) throws(ToolstackError) -> UInt16 {
        let found = try checked { () throws(XenStoreError) -> UInt16? in
            if let number = decimal(text).flatMap({ UInt16(exactly: $0) }) {
                return try store.exists("/local/domain/\(number)", .none) ? number : nil
            }
            for name in try store.children("/local/domain", .none) ?? [] {
                guard try store.read("/local/domain/\(name)/name", .none) == text else { continue }
                return decimal(name).flatMap { UInt16(exactly: $0) }
            }
            return nil
        }
        guard let found else { throw ToolstackError(.notFound, "there is no domain \(text): xl list shows them all") }
        return found
    }

    /// The vhosts of one guest, or of all, with their nodes.
    package func vhosts(of domain: UInt16? = nil) throws(ToolstackError) -> [Vhost] {
        try checked { () throws(XenStoreError) in
            var found: [Vhost] = []
            for guest in try store.children(root, .none) ?? [] {
                guard let number = decimal(guest).flatMap({ UInt16(exactly: $0) }), domain ?? number == number else {
                    continue
                }
                for vhost in try store.children("\(root)/\(guest)", .none) ?? [] {
                    guard let index = decimal(vhost).flatMap({ UInt32(exactly: $0) }) else { continue }
                    let identifier = VhostIdentifier(domain: number, number: index)
                    let nodes = try VhostReader.read(paths(identifier), from: store, .none)
                    if nodes.backendState != nil { found.append((identifier, nodes)) }
                }
            }
            return found.sorted { $0.vhost < $1.vhost }
        }
    }

    /// The nodes of one vhost.
    package func nodes(_ vhost: VhostIdentifier) throws(ToolstackError) -> VhostNodes {
        try checked { () throws(XenStoreError) in try VhostReader.read(paths(vhost), from: store, .none) }
    }

    // MARK: Attaching

    /// Writes the nodes of new devices, of all or of none.
    ///
    /// - Returns: The devices, or `nil` if a vhost is in the middle of another change: wait, and try again.
    package func attach(_ specifications: [DeviceSpecification], to domain: UInt16) throws(ToolstackError)
        -> [AttachedDevice]?
    {
        var result: Result<[AttachedDevice]?, ToolstackError> = .success(nil)
        try checked { () throws(XenStoreError) in
            try store.transact { transaction throws(XenStoreError) in
                result = try write(specifications, to: domain, transaction)
            }
        }
        return try result.get()
    }

    private func write(
        _ specifications: [DeviceSpecification], to domain: UInt16, _ transaction: XenTransaction
    ) throws(XenStoreError) -> Result<[AttachedDevice]?, ToolstackError> {
        var devices: [AttachedDevice] = []
        // All vhosts are looked at before the first is touched: the transaction is committed whatever is decided.
        var plans: [VhostPlan] = []
        for number in Set(specifications.map(\.virtualDevice.host)).sorted() {
            let vhost = VhostIdentifier(domain: domain, number: UInt32(number))
            let nodes = try VhostReader.read(paths(vhost), from: store, transaction)
            let wanted = specifications.filter { $0.virtualDevice.host == number }
            switch VhostPlan.make(vhost, nodes, wanted) {
            case .success(let plan?): plans.append(plan)
            case .success(nil): return .success(nil)
            case .failure(let error): return .failure(error)
            }
        }
        for plan in plans {
            try carryOut(plan, transaction)
            devices += plan.devices.map { AttachedDevice(vhost: plan.vhost, name: $0.name) }
        }
        return .success(devices)
    }

    private func carryOut(_ plan: VhostPlan, _ transaction: XenTransaction) throws(XenStoreError) {
        let base = paths(plan.vhost).backend
        if plan.creates { try create(plan, transaction) }
        for stale in plan.stale {
            try store.remove("\(base)/vscsi-devs/\(stale)", transaction)
            try store.remove("\(frontend(plan.vhost))/vscsi-devs/\(stale)", transaction)
        }
        for (name, device) in plan.devices {
            let directory = "\(base)/vscsi-devs/\(name)"
            try store.write(directory + "/p-dev", device.physicalDevice.description, transaction)
            if let alias = device.name { try store.write(directory + "/p-devname", alias, transaction) }
            try store.write(directory + "/v-dev", device.virtualDevice.description, transaction)
            try store.write(directory + "/state", XenbusState.initialising.node, transaction)
        }
        if let state = plan.state { try store.write(base + "/state", state.node, transaction) }
    }

    /// A new vhost. Each directory gets its owner first: what is written below has the same.
    private func create(_ plan: VhostPlan, _ transaction: XenTransaction) throws(XenStoreError) {
        let vhost = plan.vhost
        let (back, front) = (paths(vhost).backend, frontend(vhost))
        for (path, owner, reader) in [(back, backendDomain, vhost.domain), (front, vhost.domain, backendDomain)] {
            try store.remove(path, transaction)
            try store.write(path, "", transaction)
            try store.setPermissions(path, owner: owner, reader: reader, transaction)
        }
        let ours = [
            ("frontend", front), ("frontend-id", "\(vhost.domain)"), ("online", "1"),
            ("feature-host", plan.featureHost ? "1" : "0"), ("libxl_ctrl_index", "\(vhost.number)"),
        ]
        for (name, value) in ours { try store.write("\(back)/\(name)", value, transaction) }
        let theirs = [("backend", back), ("backend-id", "\(backendDomain)"), ("state", XenbusState.initialising.node)]
        for (name, value) in theirs { try store.write("\(front)/\(name)", value, transaction) }
    }

    // MARK: Detaching

    /// Begins to take a device away; with the last device of a vhost the vhost goes too.
    ///
    /// - Parameter device: `v-dev`, `p-dev` or the directory's name.
    /// - Returns: What to wait for, and then to `clean`; `nil` if the vhost is in the middle of another change.
    package func detach(_ device: String, from domain: UInt16) throws(ToolstackError) -> Detachment? {
        var found: [(VhostIdentifier, DeviceNodes)] = []
        for (vhost, nodes) in try vhosts(of: domain) {
            found += nodes.devices.filter { names(device, $0, vhost) }.map { (vhost, $0) }
        }
        guard let (vhost, entry) = found.first else {
            throw ToolstackError(
                .notFound, "domain \(domain) has no device \(device): targetctl xen list shows them all")
        }
        guard found.count == 1 else {
            throw ToolstackError(
                .conflict,
                "domain \(domain) has \(device) \(found.count) times: name the v-dev, such as \(entry.virtualDevice)")
        }
        return try detach(vhost, entry.name)
    }

    private func names(_ text: String, _ device: DeviceNodes, _ vhost: VhostIdentifier) -> Bool {
        if text == device.physicalDevice || text == device.virtualDevice { return true }
        // The number of the vhost counts, not what stands in its place in the node.
        guard let wanted = VirtualDevice(node: text), let own = VirtualDevice(node: device.virtualDevice) else {
            return false
        }
        return (UInt32(wanted.host), wanted.channel, wanted.target, wanted.lun)
            == (vhost.number, own.channel, own.target, own.lun)
    }

    /// - Parameter name: The device's directory; `nil`: the whole vhost.
    package func detach(_ vhost: VhostIdentifier, _ name: String?) throws(ToolstackError) -> Detachment? {
        var result: Detachment? = .done
        try checked { () throws(XenStoreError) in
            try store.transact { transaction throws(XenStoreError) in
                result = try beginDetach(vhost, name, transaction)
            }
        }
        return result
    }

    private func beginDetach(_ vhost: VhostIdentifier, _ name: String?, _ transaction: XenTransaction)
        throws(XenStoreError) -> Detachment?
    {
        let base = paths(vhost).backend
        let nodes = try VhostReader.read(paths(vhost), from: store, transaction)
        let others = nodes.devices.filter { $0.name != name && ![.closing, .closed].contains($0.state) }
        guard let name, !others.isEmpty else {
            // Nobody was ever there, or is any more: nothing to wait for.
            let unused: [XenbusState?] = [nil, .unknown, .initialising, .initWait, .closed]
            if unused.contains(nodes.frontendState) || nodes.backendState == .closed {
                try removeVhost(vhost, transaction)
                return .done
            }
            try store.write(base + "/online", "0", transaction)
            if nodes.backendState != .closing {
                try store.write(base + "/state", XenbusState.closing.node, transaction)
            }
            return .vhost(vhost)
        }
        let device = nodes.devices.first { $0.name == name }
        let isUsed = device.map { [.initialised, .connected, .closing].contains($0.state) } ?? false
        guard isUsed else {
            try removeDevice(vhost, name, transaction)
            return .done
        }
        guard nodes.backendState == .connected else { return nil }
        try store.write("\(base)/vscsi-devs/\(name)/state", XenbusState.closing.node, transaction)
        try store.write(base + "/state", XenbusState.reconfiguring.node, transaction)
        return .device(AttachedDevice(vhost: vhost, name: name))
    }

    /// Removes the nodes of what has been taken away.
    package func clean(_ detachment: Detachment) throws(ToolstackError) {
        try checked { () throws(XenStoreError) in
            try store.transact { transaction throws(XenStoreError) in
                switch detachment {
                case .done: break
                case .device(let device): try removeDevice(device.vhost, device.name, transaction)
                case .vhost(let vhost): try removeVhost(vhost, transaction)
                }
            }
        }
    }

    private func removeDevice(_ vhost: VhostIdentifier, _ name: String, _ transaction: XenTransaction)
        throws(XenStoreError)
    {
        try store.remove("\(paths(vhost).backend)/vscsi-devs/\(name)", transaction)
        try store.remove("\(frontend(vhost))/vscsi-devs/\(name)", transaction)
    }

    private func removeVhost(_ vhost: VhostIdentifier, _ transaction: XenTransaction) throws(XenStoreError) {
        try store.remove(paths(vhost).backend, transaction)
        try store.remove(frontend(vhost), transaction)
        let parent = "\(root)/\(vhost.domain)"
        if try store.children(parent, transaction)?.isEmpty ?? false { try store.remove(parent, transaction) }
    }

    // MARK: Errors

    private func checked<Value>(_ body: () throws(XenStoreError) -> Value) throws(ToolstackError) -> Value {
        do throws(XenStoreError) { return try body() } catch { throw ToolstackError(.store, error.description) }
    }
}

/// What is to be written for one vhost.
private struct VhostPlan {
    let vhost: VhostIdentifier
    let featureHost: Bool
    let creates: Bool
    /// Directories of devices that have failed or gone, in the way of new ones.
    let stale: [String]
    let devices: [(name: String, specification: DeviceSpecification)]
    let state: XenbusState?

    /// - Returns: `nil`: the vhost is in the middle of another change.
    static func make(_ vhost: VhostIdentifier, _ nodes: VhostNodes, _ wanted: [DeviceSpecification])
        -> Result<VhostPlan?, ToolstackError>
    {
        let featureHost = wanted.contains(where: \.featureHost)
        let creates = nodes.backendState == nil || nodes.backendState == .closed
        let present = creates ? [] : nodes.devices
        let stale = present.filter { $0.state == .closed }.map(\.name)
        var used = present.filter { $0.state != .closed }.compactMap { VirtualDevice(node: $0.virtualDevice) }
        for device in wanted {
            let address = device.virtualDevice
            let isTaken = used.contains {
                ($0.channel, $0.target, $0.lun) == (address.channel, address.target, address.lun)
            }
            if isTaken {
                return .failure(
                    ToolstackError(.conflict, "v-dev \(address) is in use: targetctl xen list shows by what"))
            }
            used.append(address)
        }
        if !creates, featureHost != nodes.featureHost, featureHost {
            return .failure(
                ToolstackError(
                    .conflict,
                    "vhost \(vhost.number) of domain \(vhost.domain) has no feature-host: choose another vhost"))
        }
        var state: XenbusState?
        switch creates ? nil : nodes.backendState {
        case nil: state = .initialising
        case .connected: state = .reconfiguring
        // What is there is read when the front end comes.
        case .initialising, .initWait, .initialised: state = nil
        default: return .success(nil)
        }
        var names: [(String, DeviceSpecification)] = []
        var number = 0
        let taken = Set(present.map(\.name)).subtracting(stale)
        for device in wanted {
            while taken.contains("dev-\(number)") { number += 1 }
            names.append(("dev-\(number)", device))
            number += 1
        }
        return .success(
            VhostPlan(
                vhost: vhost, featureHost: featureHost, creates: creates, stale: stale, devices: names, state: state))
    }
}
