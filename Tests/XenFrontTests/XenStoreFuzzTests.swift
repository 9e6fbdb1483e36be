// XenStoreFuzzTests: xenstore full of nonsense: a guest writes what it likes into its nodes, and a toolstack is mad.
// What the control plane does about it ends, harms no other vhost, and never does the impossible.
//
// Must not know: which nonsense is special.

import Testing

@testable import XenFront
@testable import Xenbus

/// A generator that gives the same numbers for the same seed (xorshift64*).
private struct Noise: RandomNumberGenerator {
    private var state: UInt64
    init(_ seed: UInt64) { state = seed &* 0x9e37_79b9_7f4a_7c15 | 1 }
    mutating func next() -> UInt64 {
        state ^= state >> 12
        state ^= state << 25
        state ^= state >> 27
        return state &* 0x2545_f491_4f6c_dd1d
    }
}

/// Holds each effect until the next round, fails some, and checks that each can be.
private final class SuspiciousExecutor: XenbusExecutor {
    var control: XenControl!
    private var random: Noise
    private var pending: [(vhost: VhostIdentifier, effect: XenbusEffect)] = []
    private var connected: Set<VhostIdentifier> = []
    private var attached: [VhostIdentifier: [String: (physical: PhysicalDevice, virtual: VirtualDevice)]] = [:]
    private var withdrawn: Set<UInt64> = []
    private(set) var performed = 0
    private(set) var errors = 0

    init(seed: UInt64) { random = Noise(seed) }

    func isTakenByKernel(_ vhost: VhostIdentifier) -> Bool { false }

    func perform(_ effect: XenbusEffect, _ vhost: VhostIdentifier, _ nodes: VhostNodes) {
        performed += 1
        #expect(!pending.contains { $0.vhost == vhost }, "two effects at once")
        switch effect {
        case .connect(let ring, _): #expect(!connected.contains(vhost) && nodes.ring == ring && nodes.domainExists)
        case .serve, .disconnect: #expect(connected.contains(vhost))
        case .attach(let name, _, let device):
            #expect(connected.contains(vhost) && attached[vhost]?[name] == nil)
            let others = attached[vhost]?.values.map(\.virtual.key) ?? []
            #expect(!others.contains(device.key), "one place for two devices")
        case .detach: #expect(connected.contains(vhost))
        }
        pending.append((vhost, effect))
    }

    func forgotten(_ vhost: VhostIdentifier) { #expect(!connected.contains(vhost)) }
    func log(_ vhost: VhostIdentifier, _ text: String, isError: Bool) { if isError { errors += 1 } }

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

    /// Ends some of the effects.
    func finish(all: Bool = false) {
        let batch = pending
        pending = []
        for (vhost, effect) in batch {
            guard all || UInt8.random(in: 0..<4, using: &random) > 0 else {
                pending.append((vhost, effect))
                continue
            }
            let fails = !all && UInt8.random(in: 0..<5, using: &random) == 0
            control.completed(vhost, end(effect, vhost, fails))
        }
    }

    private func end(_ effect: XenbusEffect, _ vhost: VhostIdentifier, _ fails: Bool) -> XenbusOutcome {
        switch effect {
        case .connect where fails, .attach where fails: return .failed("noise")
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

    var isSettled: Bool { pending.isEmpty }
}

@Suite("xenstore full of nonsense")
struct XenStoreFuzzTests {
    private static let values = [
        "", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "-1", "4 ", "04", "4294967296", "99999999999999999999",
        "x",
        "\u{0}", "0:0:0:0", "0:0:0:1", "65536:0:0:0", "naa.60014054ac780582:0", "naa.60014054ac780582:1", "naa.:",
        ":::",
        "/local/domain/1/device/vscsi/0", "/local/domain/2/device/vscsi/0", "/local/domain/0", "x86_64-abi", "vax-abi",
        String(repeating: "9", count: 2000), "🙂",
    ]

    private static func paths(_ domain: Int, _ vhost: Int) -> [String] {
        let back = "/local/domain/0/backend/vscsi/\(domain)/\(vhost)"
        let front = "/local/domain/\(domain)/device/vscsi/\(vhost)"
        let device = ["state", "p-dev", "v-dev", "error"]
        return ["state", "frontend", "frontend-id", "online", "feature-host", "error"].map { "\(back)/\($0)" }
            + ["dev-0", "dev-1", "dev-x", "other", "dev-"].flatMap { name in
                device.map { "\(back)/vscsi-devs/\(name)/\($0)" }
            }
            + ["state", "ring-ref", "event-channel", "protocol"].map { "\(front)/\($0)" }
            + ["dev-0", "dev-1"].map { "\(front)/vscsi-devs/\($0)/state" }
    }

    @Test("Whatever is written, each step can be done, and it ends", arguments: 1...24)
    func noise(_ seed: UInt64) throws {
        var random = Noise(seed)
        let store = InMemoryXenStore()
        let executor = SuspiciousExecutor(seed: seed &+ 1000)
        let control = XenControl(store: store, domain: 0, executor: executor)
        executor.control = control
        try control.start()
        let all = (0..<3).flatMap { Self.paths($0, 0) } + Self.paths(1, 1) + Self.paths(70_000, 0)
        for _ in 0..<600 {
            let path = all.randomElement(using: &random)!
            switch UInt8.random(in: 0..<32, using: &random) {
            case 0: try store.remove("/local/domain/\(Int.random(in: 0..<3, using: &random))", .none)
            case 1: try store.remove(path, .none)
            case 2: executor.withdraw(0x6001_4054_ac78_0582)
            case 3: executor.publish(0x6001_4054_ac78_0582)
            case 4: control.give(up: VhostIdentifier(domain: 1, number: 0), because: "noise")
            // Towards what works, so that the noise gets deep.
            case 5...14: try wellMeant(Int.random(in: 1..<3, using: &random), store, &random)
            default: try store.write(path, Self.values.randomElement(using: &random)!, .none)
            }
            control.process()
            executor.finish()
        }
        #expect(executor.performed > 0)
        for _ in 0..<100 where !executor.isSettled {
            executor.finish(all: true)
            control.process()
        }
        #expect(executor.isSettled, "it goes on for ever")
    }

    private func wellMeant(_ domain: Int, _ store: InMemoryXenStore, _ random: inout Noise) throws {
        let back = "/local/domain/0/backend/vscsi/\(domain)/0"
        let front = "/local/domain/\(domain)/device/vscsi/0"
        let state = ["1", "3", "4", "4", "7"].randomElement(using: &random)!
        for (path, value) in [
            ("\(front)/ring-ref", "8"), ("\(front)/event-channel", "9"), ("\(front)/protocol", "x86_64-abi"),
            ("\(front)/state", state), ("\(back)/frontend", front), ("\(back)/online", "1"),
            ("\(back)/vscsi-devs/dev-0/p-dev", "naa.60014054ac780582:0"), ("\(back)/vscsi-devs/dev-0/v-dev", "0:0:0:0"),
        ] {
            try store.write(path, value, .none)
        }
        guard state == "1" else { return }
        try store.write("\(back)/vscsi-devs/dev-0/state", "1", .none)
        try store.remove("\(back)/error", .none)
        try store.write("\(back)/state", "1", .none)
    }
}
