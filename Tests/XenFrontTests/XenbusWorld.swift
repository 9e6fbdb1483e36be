// XenbusWorld: a whole small world as one value: xenstore, a toolstack with a script, a guest whose front end behaves
// as Linux's xen-scsifront does, and the back end. `explore` walks through every order in which they can take their
// steps.
//
// Called by: XenbusBackendTests. Must not know: rings.

@testable import XenFront
@testable import Xenbus

/// What the toolstack does, one after the other.
enum ToolstackStep: Hashable {
    /// One transaction.
    case write([NodeWrite])
    case wait(String, String)
    case remove([String])
    /// The guest powers off by itself.
    case guestShutsDown
    /// The guest's nodes vanish without a word, and the guest with them.
    case guestDestroyed
    /// Waits until a node is gone.
    case waitGone(String)
}

struct XenbusWorld: Hashable {
    static let root = "/local/domain/0/backend/vscsi"
    static let backendPath = root + "/7/0"
    static let frontendPath = "/local/domain/7/device/vscsi/0"

    var tree = StoreTree()
    var script: [ToolstackStep] = []

    // The back end.
    var machine: XenbusBackend? = XenbusBackend()
    var running: Bool { machine != nil }
    /// What is mapped and attached outside of xenstore: lost when the daemon dies.
    var mapped: RingParameters?
    var serving = false
    var attached: Set<VirtualDevice> = []
    /// p-dev nodes that cannot be served.
    var missing: Set<String> = []

    // The front end, Linux's.
    var ring: RingParameters?
    var paused = false
    /// The disks that it has, by directory name.
    var disks: [String: VirtualDevice] = [:]
    /// Whether the watch on the back end's state has fired and was not handled yet.
    var notified = false
    var nextReference: UInt32 = 8

    // How often unlikely things may still happen.
    var crashesLeft = 0
    var resumesLeft = 0

    /// What went wrong, if anything did.
    var violation: String?

    // MARK: Actions

    /// Each world that can follow, with the name of what happened.
    func successors() -> [(String, XenbusWorld)] {
        var next: [(String, XenbusWorld)] = []
        func add(_ name: String, _ change: (inout XenbusWorld) -> Bool) {
            var copy = self
            if change(&copy), copy != self || copy.violation != nil { next.append((name, copy)) }
        }
        add("toolstack") { $0.toolstack() }
        add("front end") { $0.frontend() }
        if machine?.underWay != nil {
            add("effect") { $0.finishEffect() }
        } else if machine != nil {
            add("back end") { $0.backend() }
        } else {
            add("start") { $0.start() }
        }
        if crashesLeft > 0 && running { add("crash") { $0.crash() } }
        if resumesLeft > 0 && disksAreUp { add("resume") { $0.resume() } }
        return next
    }

    private var disksAreUp: Bool { frontendState == .connected && !paused }
    private var frontendState: XenbusState? { tree[Self.frontendPath + "/state"].map { XenbusState(node: $0) } }
    private var backendState: XenbusState? { tree[Self.backendPath + "/state"].map { XenbusState(node: $0) } }

    private mutating func write(_ path: String, _ value: String) {
        tree.write(path, value)
        if path == Self.backendPath + "/state" { notified = true }
    }

    // MARK: Toolstack

    private mutating func toolstack() -> Bool {
        guard let step = script.first else { return false }
        switch step {
        case .write(let nodes): for node in nodes { write(node.name, node.value) }
        case .wait(let path, let value): if tree[path] != value { return false }
        case .waitGone(let path): if tree[path] != nil { return false }
        case .remove(let paths): for path in paths { tree.remove(path) }
        case .guestShutsDown:
            guard frontendState == .connected else { return false }
            write(Self.frontendPath + "/state", "5")
        case .guestDestroyed:
            tree.remove("/local/domain/7")
            ring = nil
            disks = [:]
            paused = false
        }
        script.removeFirst()
        return true
    }

    // MARK: Back end

    private mutating func start() -> Bool {
        machine = XenbusBackend()
        return true
    }

    private mutating func crash() -> Bool {
        crashesLeft -= 1
        machine = nil
        mapped = nil
        serving = false
        attached = []
        return true
    }

    private mutating func backend() -> Bool {
        let store = InMemoryXenStore(tree)
        let paths = VhostPaths(VhostIdentifier(domain: 7, number: 0), under: Self.root)
        guard let nodes = try? VhostReader.read(paths, from: store, .none) else { return false }
        switch machine!.reconcile(nodes) {
        case .idle: return false
        case .effect: return true
        case .write(let writes):
            for node in writes { write(Self.backendPath + "/" + node.name, node.value) }
            return true
        case .removeNodes:
            tree.remove(Self.root + "/7")
            return true
        case .forget:
            machine = XenbusBackend()
            return tree[Self.backendPath] != nil
        }
    }

    private mutating func finishEffect() -> Bool {
        switch machine!.underWay! {
        case .connect(let parameters, _):
            if mapped != nil { violation = "a ring is mapped over another" }
            if parameters != ring {
                machine!.completed(.failed("no such grant"))
                return true
            }
            mapped = parameters
        case .serve: serving = true
        case .disconnect:
            serving = false
            mapped = nil
            attached = []
        case .attach(_, let physical, let device):
            if missing.contains(physical.description) {
                machine!.completed(.failed("no such target"))
                return true
            }
            attached.insert(device)
        case .detach(_, let device):
            if disks.values.contains(device) { violation = "\(device) was taken away while the guest used it" }
            attached.remove(device)
        }
        machine!.completed(.done)
        return true
    }

    // MARK: Front end (peers.md 3.3; Linux drivers/scsi/xen-scsifront.c)

    private mutating func frontend() -> Bool {
        guard let own = frontendState else { return false }
        if own == .initialising {
            offerRing()
            return true
        }
        guard notified, let backend = backendState else { return false }
        notified = false
        switch backend {
        case .connected: connect(own)
        case .closing, .closed: if own != .closed { removeHost() }
        case .reconfiguring:
            removeDisks()
            setState(.reconfiguring, from: own)
        case .reconfigured:
            addDisks()
            setState(.connected, from: own)
        default: break
        }
        return true
    }

    private mutating func offerRing() {
        ring = RingParameters(ringReference: nextReference, eventChannel: nextReference + 100)
        nextReference += 1
        write(Self.frontendPath + "/ring-ref", String(ring!.ringReference))
        write(Self.frontendPath + "/event-channel", String(ring!.eventChannel))
        write(Self.frontendPath + "/state", "3")
        // Its watch on the back end's state is new, and a new watch fires at once.
        notified = true
    }

    private mutating func connect(_ own: XenbusState) {
        if paused {
            for (name, state) in deviceStates() where state == .connected {
                write(Self.frontendPath + "/vscsi-devs/\(name)/state", "4")
            }
            paused = false
        } else if own == .initialised {
            addDisks()
        }
        setState(.connected, from: own)
    }

    private func deviceStates() -> [(String, XenbusState)] {
        (tree.children(Self.backendPath + "/vscsi-devs") ?? []).map {
            ($0, XenbusState(node: tree["\(Self.backendPath)/vscsi-devs/\($0)/state"] ?? ""))
        }
    }

    private mutating func addDisks() {
        for (name, state) in deviceStates() where state == .initialised {
            let device = VirtualDevice(node: tree["\(Self.backendPath)/vscsi-devs/\(name)/v-dev"]!)!
            guard disks[name] == nil else { continue }
            requireService(of: device, for: "INQUIRY")
            disks[name] = device
            write(Self.frontendPath + "/vscsi-devs/\(name)/state", "4")
        }
    }

    private mutating func removeDisks() {
        for (name, state) in deviceStates() where state == .closing {
            guard let device = disks[name] else { continue }
            requireService(of: device, for: "SYNCHRONIZE CACHE")
            disks[name] = nil
            write(Self.frontendPath + "/vscsi-devs/\(name)/state", "6")
        }
    }

    private mutating func removeHost() {
        let fault = machine?.fault != nil
        for device in disks.values where !fault { requireService(of: device, for: "SYNCHRONIZE CACHE at removal") }
        disks = [:]
        ring = nil
        paused = false
        write(Self.frontendPath + "/state", "6")
    }

    /// The command waits in the ring while the daemon is down or about to come back; served by another ring, or not
    /// attached while all is connected, it is lost.
    private mutating func requireService(of device: VirtualDevice, for what: String) {
        if running && serving && mapped == ring && !attached.contains(device) {
            violation = "\(what) to \(device), which is not attached"
        }
    }

    private mutating func setState(_ state: XenbusState, from own: XenbusState) {
        if own != state { write(Self.frontendPath + "/state", state.node) }
    }

    private mutating func resume() -> Bool {
        resumesLeft -= 1
        paused = true
        offerRing()
        return true
    }

    // MARK: Exploration

    /// Walks through every order of steps from `start`, and reports what is wrong: a violation, or a world in which
    /// nothing can happen any more that `isFine` does not accept.
    ///
    /// - Returns: The first fault with the steps that lead to it, and how many worlds there are.
    static func explore(
        _ start: XenbusWorld, limit: Int = 200_000, isFine: (XenbusWorld) -> Bool
    ) -> (fault: String?, worlds: Int) {
        var parents: [XenbusWorld: (XenbusWorld, String)] = [:]
        var seen: Set<XenbusWorld> = [start]
        var queue = [start]
        var head = 0
        func path(to world: XenbusWorld) -> String {
            var steps: [String] = []
            var at = world
            while let (parent, name) = parents[at] {
                steps.append(
                    "\(name) [B=\(at.tree[backendPath + "/state"] ?? "-") F=\(at.tree[frontendPath + "/state"] ?? "-")]"
                )
                at = parent
            }
            return steps.reversed().joined(separator: " → ")
        }
        while head < queue.count {
            let world = queue[head]
            head += 1
            if let violation = world.violation { return (violation + " after " + path(to: world), seen.count) }
            let next = world.successors()
            // What may happen but need not must not be what saves the world.
            if !next.contains(where: { $0.0 != "crash" && $0.0 != "resume" }), !isFine(world) {
                return ("stuck after " + path(to: world), seen.count)
            }
            for (name, successor) in next where seen.insert(successor).inserted {
                parents[successor] = (world, name)
                queue.append(successor)
            }
            precondition(seen.count < limit, "the world is too large")
        }
        return (nil, seen.count)
    }
}
