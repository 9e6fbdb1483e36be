// XenStoreFuzzer: the control plane of the Xen front over a xenstore in which a mad toolstack and hostile guests write
// anything, with effects that end late, or fail.
//
// Oracles, beside that nothing traps: each effect can be done at the moment when it is asked for, two of one vhost are
// never under way at once, it comes to an end, and then what is connected and attached is what the state machine
// believes and the nodes allow.
//
// Called by: libFuzzer. Must not know: which contents are special.

@testable import XenFront
@testable import Xenbus

enum XenStoreFuzzer {
    static func run(_ input: FuzzInput) { XenStoreWorld(input).run() }
}

/// Holds each effect until the input ends it, and checks that it can be done.
private final class SuspiciousExecutor: XenbusExecutor {
    var control: XenControl!
    private var pending: [(vhost: VhostIdentifier, effect: XenbusEffect)] = []
    private var connected: Set<VhostIdentifier> = []
    private var attached: [VhostIdentifier: [String: (physical: PhysicalDevice, virtual: VirtualDevice)]] = [:]
    private var withdrawn: Set<UInt64> = []

    var isSettled: Bool { pending.isEmpty }

    func perform(_ effect: XenbusEffect, _ vhost: VhostIdentifier, _ nodes: VhostNodes) {
        precondition(!pending.contains { $0.vhost == vhost }, "two effects at once")
        let isConnected = connected.contains(vhost)
        switch effect {
        case .connect(let ring, _): precondition(!isConnected && nodes.ring == ring && nodes.domainExists, "connect")
        case .serve, .disconnect: precondition(isConnected, "serve or disconnect without a connection")
        case .attach(let name, _, let device):
            precondition(isConnected && attached[vhost]?[name] == nil, "attach")
            let others = attached[vhost]?.values.map(\.virtual.key) ?? []
            precondition(!others.contains(device.key), "one place for two devices")
        case .detach: precondition(isConnected, "detach without a connection")
        }
        pending.append((vhost, effect))
    }

    func forgotten(_ vhost: VhostIdentifier) { precondition(!connected.contains(vhost), "forgotten when connected") }
    func isTakenByKernel(_ vhost: VhostIdentifier) -> Bool { false }
    func log(_ vhost: VhostIdentifier, _ text: String, isError: Bool) {}

    /// As the front does it: nothing is attached any more, and then the control plane is told.
    func withdraw(_ target: UInt64) {
        withdrawn.insert(target)
        for vhost in attached.keys {
            attached[vhost] = attached[vhost]!.filter { _, device in
                if case .named(target, _) = device.physical { false } else { true }
            }
        }
        control.withdrawn(target)
    }

    func publish(_ target: UInt64) {
        withdrawn.remove(target)
        control.published(target)
    }

    /// What is connected and attached is what the state machine believes, and no more than the nodes ask for.
    func check(_ vhost: VhostIdentifier, _ machine: XenbusBackend, _ nodes: VhostNodes) {
        let isConnected = connected.contains(vhost)
        precondition(isConnected == (machine.link != .down), "not connected and said to be, or the reverse")
        let there = (attached[vhost] ?? [:]).mapValues(\.virtual)
        precondition(there == machine.attached, "\(there) is attached, and not \(machine.attached)")
        guard case .up(let ring) = machine.link else { return }
        precondition(nodes.domainExists && nodes.backendState != nil, "a ring of a guest that is gone")
        precondition(machine.fault == nil, "a ring of a front end that has broken the rules")
        precondition(nodes.ring == nil || nodes.ring == ring, "a ring that the front end does not offer any more")
        let isOver = [nil, .closed, .initialising, .initWait].contains(nodes.frontendState)
        precondition(!isOver, "a ring whose front end is \(String(describing: nodes.frontendState))")
    }

    /// No vhost is connected that nobody knows.
    func checkNoOthers(than known: [VhostIdentifier]) {
        precondition(connected.isSubset(of: known), "a vhost is connected and forgotten")
    }

    /// Ends the effect that has waited longest.
    func finish(fails: Bool) {
        guard !pending.isEmpty else { return }
        let (vhost, effect) = pending.removeFirst()
        control.completed(vhost, end(effect, vhost, fails))
    }

    private func end(_ effect: XenbusEffect, _ vhost: VhostIdentifier, _ fails: Bool) -> XenbusOutcome {
        switch effect {
        case .connect where fails, .attach where fails: return .failed("the input says so")
        case .connect: connected.insert(vhost)
        case .disconnect:
            connected.remove(vhost)
            attached[vhost] = nil
        case .attach(_, .named(let target, _), _) where withdrawn.contains(target): return .failed("withdrawn")
        case .attach(let name, let physical, let device): attached[vhost, default: [:]][name] = (physical, device)
        case .detach(let name, _): attached[vhost]?[name] = nil
        case .serve: break
        }
        return .done
    }
}

private final class XenStoreWorld {
    private var input: FuzzInput
    private let store = InMemoryXenStore()
    private let executor = SuspiciousExecutor()
    private let control: XenControl

    private static let target: UInt64 = 0x6001_4054_ac78_0582
    private static let values = [
        "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "", "-1", "4 ", "4294967296", "0:0:0:0", "0:0:0:1",
        "naa.60014054ac780582:0", "naa.60014054ac780582:1", "naa.:", ":::", "/local/domain/1/device/vscsi/0",
        "/local/domain/2/device/vscsi/0", "/local/domain/0", "x86_64-abi", "vax-abi", "65536:0:0:0",
    ]
    private static let backendNodes = ["state", "frontend", "frontend-id", "online", "feature-host", "error", ""]
    private static let frontendNodes = ["state", "ring-ref", "event-channel", "protocol", ""]
    private static let deviceNodes = ["state", "p-dev", "v-dev", "error", ""]
    private static let deviceNames = ["dev-0", "dev-1", "dev-x", "other", "dev-"]

    init(_ input: FuzzInput) {
        self.input = input
        control = XenControl(store: store, domain: 0, executor: executor)
        executor.control = control
        try! control.start()
    }

    private func back(_ domain: Int) -> String { "/local/domain/0/backend/vscsi/\(domain)/0" }
    private func front(_ domain: Int) -> String { "/local/domain/\(domain)/device/vscsi/0" }

    private func path() -> String {
        let domain = input.rarely(16) ? 70_000 : input.below(3)
        switch input.below(6) {
        case 0, 1: return join(back(domain), Self.backendNodes)
        case 2, 3: return join(front(domain), Self.frontendNodes)
        case 4:
            let device = Self.deviceNames[input.below(Self.deviceNames.count)]
            return join("\(back(domain))/vscsi-devs/\(device)", Self.deviceNodes)
        default:
            return "\(front(domain))/vscsi-devs/\(Self.deviceNames[input.below(Self.deviceNames.count)])/state"
        }
    }

    private func join(_ directory: String, _ names: [String]) -> String {
        let name = names[input.below(names.count)]
        return name.isEmpty ? directory : "\(directory)/\(name)"
    }

    private func value() -> String {
        guard input.rarely(6) else { return Self.values[input.below(Self.values.count)] }
        return String(decoding: input.bytes(input.below(24)), as: UTF8.self)
    }

    func run() {
        while !input.isEmpty {
            act()
            control.process()
        }
        for _ in 0..<1000 where !executor.isSettled {
            executor.finish(fails: false)
            control.process()
        }
        precondition(executor.isSettled, "it goes on for ever")
        let vhosts = control.status
        for (vhost, machine, nodes) in vhosts { executor.check(vhost, machine, nodes) }
        executor.checkNoOthers(than: vhosts.map(\.vhost))
    }

    private func act() {
        switch input.below(16) {
        case 0: try! store.remove("/local/domain/\(input.below(3))", .none)
        case 1: try! store.remove(path(), .none)
        case 2: executor.withdraw(Self.target)
        case 3: executor.publish(Self.target)
        case 4: control.give(up: VhostIdentifier(domain: UInt16(input.below(3)), number: 0), because: "the input")
        case 5...7: executor.finish(fails: input.rarely(4))
        case 8, 9: attach(1 + input.below(2))
        case 10: interfere()
        case 11: store.fire("@releaseDomain")
        default: try! store.write(path(), value(), .none)
        }
    }

    /// Another client writes when the control plane commits.
    private func interfere() {
        let (path, value) = (path(), value())
        store.interference = { [unowned store] in try! store.write(path, value, .none) }
    }

    /// What a toolstack and a guest write for a disk that works.
    private func attach(_ domain: Int) {
        let state = ["1", "3", "4", "4", "7"][input.below(5)]
        let device = "vscsi-devs/dev-\(input.rarely(4) ? 1 : 0)", place = input.rarely(8) ? 1 : 0
        let (back, front) = (back(domain), front(domain))
        for (path, value) in [
            ("\(front)/ring-ref", "\(8 + input.below(2))"), ("\(front)/event-channel", "9"),
            ("\(front)/protocol", "x86_64-abi"), ("\(front)/state", state), ("\(back)/frontend", front),
            ("\(back)/online", "1"), ("\(back)/\(device)/p-dev", "naa.60014054ac780582:0"),
            ("\(back)/\(device)/v-dev", "0:0:0:\(place)"),
        ] {
            try! store.write(path, value, .none)
        }
        guard state == "1" || input.rarely(4) else { return }
        try! store.write("\(back)/\(device)/state", "1", .none)
        try! store.remove("\(back)/error", .none)
        try! store.write("\(back)/state", "1", .none)
    }
}
