// XenbusBackend: the back end's half of the vscsi handshake in xenstore, for one vhost.
//
// Owns: what the back end remembers of one vhost. Called by: XenControl, each time the nodes may have changed or an
// effect has ended. Pure: it reads no store, maps nothing and calls nobody. Must not know: how any of it is done.
//
// It works by level, never by edge: `reconcile` compares what xenstore says with what is attached and returns the one
// next step. The caller does it and asks again until there is nothing to do. So it does not matter which changes were
// seen, how often, in what order, or whether the daemon was alive when they happened. A decision to write counts only
// if the transaction was committed: the caller asks a copy, and keeps the copy then.

import Xenbus

/// The one next thing to do for a vhost.
enum XenbusStep: Equatable, Sendable {
    /// Nothing until the nodes change or the effect under way ends.
    case idle
    /// Do this, then report with `completed`. Only one effect is under way at a time.
    case effect(XenbusEffect)
    /// Write these nodes, relative to the vhost's directory, in the transaction in which the nodes were read.
    case write([NodeWrite])
    /// Remove the vhost's directory: its guest is gone.
    case removeNodes
    /// Forget the vhost: its nodes are gone and nothing is attached.
    case forget
}

/// A node to write.
struct NodeWrite: Hashable, Sendable {
    /// Below the vhost's back-end directory.
    let name: String
    let value: String

    init(_ name: String, _ value: String) {
        self.name = name
        self.value = value
    }
}

/// What is done outside of xenstore.
enum XenbusEffect: Hashable, Sendable {
    /// Map the ring and bind the event channel. `recovering`: the ring was in use before this daemon started, so what
    /// was in flight then must be taken up again.
    case connect(RingParameters, recovering: Bool)
    /// Take requests from the ring: its devices are attached.
    case serve
    /// End all commands, then unmap the ring and unbind the event channel.
    case disconnect
    /// Make a device reachable.
    case attach(name: String, PhysicalDevice, VirtualDevice)
    /// The opposite; ends the device's commands first.
    case detach(name: String, VirtualDevice)
}

/// How an effect ended.
enum XenbusOutcome: Hashable, Sendable {
    case done
    /// Not done, and why, in words for the toolstack's user.
    case failed(String)
}

/// The state machine of one vhost. A value, so that tests can walk through all of its states.
struct XenbusBackend: Hashable, Sendable {
    /// The ring.
    enum Link: Hashable, Sendable {
        case down
        case up(RingParameters)
    }

    private struct UnmappableRing: Hashable, Sendable {
        let ring: RingParameters
        let reason: String
    }

    private(set) var link = Link.down
    /// The effect that the caller is doing.
    private(set) var underWay: XenbusEffect?
    /// What is attached, by the name of its directory.
    private(set) var attached: [String: VirtualDevice] = [:]
    /// Devices that could not be attached, and why.
    private(set) var refused: [String: String] = [:]
    /// The target of the daemon behind each of those that have one.
    private var targets: [String: UInt64] = [:]
    /// Devices whose target the daemon has taken away meanwhile; the front end still has them.
    private(set) var lost: [String: UInt64] = [:]
    /// Whether requests are taken from the ring. Not before its devices are attached: a command that came too early
    /// would find no device.
    private(set) var serving = false
    /// Whether "Connected" was written since the ring was mapped: the front end waits for that write, not for the
    /// value, which may be there already.
    private(set) var announced = false
    /// A ring that could not be mapped, and why. If the front end offers another by now, that is no fault: it was
    /// suspended meanwhile.
    private var unmappable: UnmappableRing?
    /// Why the vhost was given up; forgotten when the toolstack or the front end begins anew.
    private(set) var fault: String?
    /// Whether the faulty front end has been told.
    private var faultReported = false

    init() {}

    // MARK: Entries

    /// Decides the next step.
    mutating func reconcile(_ nodes: VhostNodes) -> XenbusStep {
        if underWay != nil { return .idle }
        guard let backend = nodes.backendState else { return takeDown(then: .forget) }
        guard nodes.domainExists else { return takeDown(then: .removeNodes) }
        forgetStaleRefusals(nodes)
        if let fault = nodes.fault ?? nodes.foreignProtocol.map({ "ring entries of the ABI \($0) are not supported" }) {
            give(up: fault)
        }
        if let unmappable {
            self.unmappable = nil
            if nodes.ring == unmappable.ring { give(up: unmappable.reason) }
        }
        if let fault { return close(because: fault, backend, nodes) }
        if case .up(let mapped) = link, let offered = nodes.ring, offered != mapped {
            // The front end was suspended and offers a new ring, without Closing in between.
            return effect(.disconnect)
        }
        switch nodes.frontendState {
        case nil: return frontendAbsent(backend)
        case .unknown, .reconfigured: return .idle
        case .initialising, .initWait: return frontendStarting(backend, nodes)
        case .initialised: return frontendOffersRing(backend, nodes)
        case .connected: return frontendConnected(backend, nodes)
        case .reconfiguring: return frontendReconfiguring(backend, nodes)
        case .closing: return frontendClosing(backend, nodes)
        case .closed: return frontendClosed(backend)
        }
    }

    /// Reports how the effect under way has ended.
    mutating func completed(_ outcome: XenbusOutcome) {
        guard let effect = underWay else { preconditionFailure("no effect under way") }
        underWay = nil
        switch (effect, outcome) {
        case (.connect(let ring, _), .done):
            link = .up(ring)
            announced = false
            serving = false
        case (.connect(let ring, _), .failed(let reason)): unmappable = UnmappableRing(ring: ring, reason: reason)
        case (.serve, _): serving = true
        case (.disconnect, _):
            link = .down
            serving = false
            attached.removeAll()
            targets.removeAll()
            lost.removeAll()
            announced = false
        case (.attach(let name, _, _), _) where lost[name] != nil: break
        case (.attach(let name, let physical, let device), .done):
            attached[name] = device
            if case .named(let target, _) = physical { targets[name] = target }
        case (.attach(let name, _, _), .failed(let reason)): refused[name] = reason
        case (.detach(let name, _), _): forget(name)
        }
    }

    /// Gives the vhost up because its front end broke the rules of the ring.
    mutating func give(up reason: String) {
        if fault == nil {
            fault = reason
            faultReported = false
        }
    }

    private mutating func forget(_ name: String) {
        attached[name] = nil
        targets[name] = nil
    }

    /// A target of the daemon is gone, and with it all that was attached of it.
    mutating func lose(_ target: UInt64) {
        for name in targets.filter({ $0.value == target }).keys {
            forget(name)
            lost[name] = target
        }
        if case .attach(let name, .named(target, _), _) = underWay { lost[name] = target }
    }

    /// A target of the daemon is there again.
    mutating func regain(_ target: UInt64) { lost = lost.filter { $0.value != target } }

    // MARK: One function a state of the front end

    private mutating func frontendAbsent(_ backend: XenbusState) -> XenbusStep {
        if case .up = link { return effect(.disconnect) }
        switch backend {
        // Not written yet, or already told.
        case .initialising, .initWait, .closed, .unknown: return .idle
        default: return .write([state(.closed)])
        }
    }

    private mutating func frontendStarting(_ backend: XenbusState, _ nodes: VhostNodes) -> XenbusStep {
        if case .up = link { return effect(.disconnect) }
        switch backend {
        case .initWait, .unknown: return .idle
        case .closing: return .write([state(.closed)])
        case .closed where !nodes.online: return .idle
        default: return .write([NodeWrite("feature-sg-grant", String(VSCSIIFLimits.segments)), state(.initWait)])
        }
    }

    private mutating func frontendOffersRing(_ backend: XenbusState, _ nodes: VhostNodes) -> XenbusStep {
        // Closing: the front end will follow. Closed for good: it has to be told by the toolstack.
        if backend == .closing || (backend == .closed && !nodes.online) { return .idle }
        if backend == .initialising {
            return .write([NodeWrite("feature-sg-grant", String(VSCSIIFLimits.segments)), state(.initWait)])
        }
        guard let ring = nodes.ring else {
            give(up: "the front end is Initialised without ring-ref and event-channel")
            return reconcile(nodes)
        }
        guard case .up = link else { return effect(.connect(ring, recovering: false)) }
        if let next = attachNext(nodes, in: [.initialising, .initialised, .connected]) { return effect(next) }
        if let next = detachNext(nodes) { return effect(next) }
        if !serving { return effect(.serve) }
        if announced && backend != .reconfiguring { return .idle }
        announced = true
        return .write(deviceWrites(nodes, from: [.initialising, .connected], to: .initialised) + [state(.connected)])
    }

    private mutating func frontendConnected(_ backend: XenbusState, _ nodes: VhostNodes) -> XenbusStep {
        if let step = comeBack(backend, nodes) { return step }
        var writes = deviceWrites(nodes, from: [.initialised], to: .connected, removing: false)
        switch backend {
        case .initialising, .initWait, .initialised, .reconfigured: writes.append(state(.connected))
        default: break
        }
        return writes.isEmpty ? .idle : .write(writes)
    }

    private mutating func frontendReconfiguring(_ backend: XenbusState, _ nodes: VhostNodes) -> XenbusStep {
        if let step = comeBack(backend, nodes) { return step }
        guard backend == .reconfiguring || backend == .connected else { return .idle }
        if let next = attachNext(nodes, in: [.initialising]) { return effect(next) }
        if let next = detachNext(nodes) { return effect(next) }
        // A device that the front end still uses is not taken away from under it.
        if nodes.devices.contains(where: { $0.state == .closing && attached[$0.name] != nil }) { return .idle }
        return .write(deviceWrites(nodes, from: [.initialising], to: .initialised) + [state(.reconfigured)])
    }

    private mutating func frontendClosing(_ backend: XenbusState, _ nodes: VhostNodes) -> XenbusStep {
        // It still flushes its disks through the ring, so the ring stays until it is Closed.
        if backend != .closed, let step = comeBack(backend, nodes) { return step }
        return backend == .closing || backend == .closed ? .idle : .write([state(.closing)])
    }

    private mutating func frontendClosed(_ backend: XenbusState) -> XenbusStep {
        if case .up = link { return effect(.disconnect) }
        switch backend {
        // The toolstack begins anew, and the front end will follow.
        case .initWait, .closed, .unknown: return .idle
        case .initialising:
            return .write([NodeWrite("feature-sg-grant", String(VSCSIIFLimits.segments)), state(.initWait)])
        default: return .write([state(.closed)])
        }
    }

    // MARK: Parts

    /// Takes up a ring that was in use before this daemon started, and its devices.
    private mutating func comeBack(_ backend: XenbusState, _ nodes: VhostNodes) -> XenbusStep? {
        guard case .up = link else {
            guard backend != .closed, let ring = nodes.ring else { return .idle }
            return effect(.connect(ring, recovering: true))
        }
        if let next = attachNext(nodes, in: [.initialised, .connected, .closing]) { return effect(next) }
        return serving ? nil : effect(.serve)
    }

    private mutating func attachNext(_ nodes: VhostNodes, in states: [XenbusState]) -> XenbusEffect? {
        for device in nodes.devices
        where states.contains(device.state) && attached[device.name] == nil && refused[device.name] == nil
            && lost[device.name] == nil
        {
            // Going away, and the front end has let go of it already.
            if device.state == .closing && device.frontendState != .connected { continue }
            switch check(device) {
            case .success(let (physical, virtual)): return .attach(name: device.name, physical, virtual)
            case .failure(let refusal): refused[device.name] = refusal.reason
            }
        }
        return nil
    }

    private struct Refusal: Error { let reason: String }

    private func check(_ device: DeviceNodes) -> Result<(PhysicalDevice, VirtualDevice), Refusal> {
        guard let virtual = VirtualDevice(node: device.virtualDevice) else {
            return .failure(Refusal(reason: "v-dev is \(quoted(device.virtualDevice)); write it as h:c:t:l"))
        }
        guard let physical = PhysicalDevice(node: device.physicalDevice) else {
            return .failure(
                Refusal(
                    reason: "p-dev is \(quoted(device.physicalDevice)); write it as naa.<16 digits>:<lun> or h:c:t:l"))
        }
        if let other = attached.first(where: { $0.value.key == virtual.key }) {
            return .failure(Refusal(reason: "v-dev \(virtual) is already used by \(other.key)"))
        }
        return .success((physical, virtual))
    }

    private func quoted(_ text: String) -> String { "'" + String(text.prefix(64)) + "'" }

    private func detachNext(_ nodes: VhostNodes) -> XenbusEffect? {
        for (name, virtual) in attached.sorted(by: { $0.key < $1.key }) {
            let device = nodes.devices.first { $0.name == name }
            let leaving = device.map { $0.state == .closing && $0.frontendState != .connected } ?? true
            if leaving { return .detach(name: name, virtual) }
        }
        return nil
    }

    /// `removing`: the front end has let go of the devices that are Closing.
    private func deviceWrites(
        _ nodes: VhostNodes, from states: [XenbusState], to next: XenbusState, removing: Bool = true
    ) -> [NodeWrite] {
        var writes: [NodeWrite] = []
        for device in nodes.devices {
            let node = "vscsi-devs/\(device.name)/state"
            if attached[device.name] != nil {
                if states.contains(device.state) { writes.append(NodeWrite(node, next.node)) }
            } else if device.state == .closing {
                if removing { writes.append(NodeWrite(node, XenbusState.closed.node)) }
            } else if let reason = refused[device.name], device.state != .closed {
                writes.append(NodeWrite("vscsi-devs/\(device.name)/error", reason))
                writes.append(NodeWrite(node, XenbusState.closed.node))
            }
        }
        return writes
    }

    private mutating func forgetStaleRefusals(_ nodes: VhostNodes) {
        if !lost.isEmpty {
            let leaving: [XenbusState] = [.closing, .closed, .unknown]
            lost = lost.filter { name, _ in nodes.devices.contains { $0.name == name && !leaving.contains($0.state) } }
        }
        guard !refused.isEmpty else { return }
        refused = refused.filter { name, _ in
            nodes.devices.contains { $0.name == name && $0.state != .closed && $0.state != .unknown }
        }
    }

    /// Ends the vhost after a fault: the front end is told, and nothing is mapped any more.
    private mutating func close(because reason: String, _ backend: XenbusState, _ nodes: VhostNodes) -> XenbusStep {
        if case .up = link { return effect(.disconnect) }
        if !faultReported {
            faultReported = true
            return .write([NodeWrite("error", reason), state(.closing)])
        }
        let frontend = nodes.frontendState
        // A new beginning by the toolstack.
        if backend == .initialising && nodes.fault == nil && nodes.foreignProtocol == nil {
            fault = nil
            return reconcile(nodes)
        }
        if backend == .closing && (frontend == nil || frontend == .closed || frontend == .initialising) {
            return .write([state(.closed)])
        }
        return .idle
    }

    private mutating func takeDown(then last: XenbusStep) -> XenbusStep {
        if case .up = link { return effect(.disconnect) }
        return last
    }

    private mutating func effect(_ effect: XenbusEffect) -> XenbusStep {
        underWay = effect
        return .effect(effect)
    }

    private func state(_ state: XenbusState) -> NodeWrite { NodeWrite("state", state.node) }
}
