// XenControlTests: following xenstore: several guests and vhosts, daemons that start late, other writers, hostile
// nodes.

import Testing

@testable import XenFront
@testable import Xenbus

/// Does every effect at once, or when the test says so.
final class ScriptedExecutor: XenbusExecutor {
    var control: XenControl!
    private(set) var performed: [(vhost: VhostIdentifier, effect: XenbusEffect)] = []
    private(set) var forgotten: [VhostIdentifier] = []
    private(set) var errors: [String] = []
    private var pending: [(VhostIdentifier, XenbusEffect)] = []

    func perform(_ effect: XenbusEffect, _ vhost: VhostIdentifier, _ nodes: VhostNodes) {
        performed.append((vhost, effect))
        pending.append((vhost, effect))
    }

    /// Vhosts that the kernel's own back end serves.
    var takenByKernel: Set<VhostIdentifier> = []

    func forgotten(_ vhost: VhostIdentifier) { forgotten.append(vhost) }
    func isTakenByKernel(_ vhost: VhostIdentifier) -> Bool { takenByKernel.contains(vhost) }
    func log(_ vhost: VhostIdentifier, _ text: String, isError: Bool) { if isError { errors.append(text) } }

    /// Processes events and effects until nothing is left.
    func settle() {
        control.process()
        while !pending.isEmpty {
            let (vhost, _) = pending.removeFirst()
            control.completed(vhost, .done)
            control.process()
        }
    }
}

@Suite("Following xenstore")
struct XenControlTests {
    private let store = InMemoryXenStore()
    private let executor = ScriptedExecutor()

    private init() {
        executor.control = XenControl(store: store, domain: 0, executor: executor)
    }

    private func backend(_ domain: Int, _ vhost: Int) -> String { "/local/domain/0/backend/vscsi/\(domain)/\(vhost)" }
    private func frontend(_ domain: Int, _ vhost: Int) -> String { "/local/domain/\(domain)/device/vscsi/\(vhost)" }

    private func write(_ path: String, _ value: String) { try! store.write(path, value, .none) }

    /// What a toolstack writes, and then the front end.
    private func create(_ domain: Int, _ vhost: Int, frontendState: String = "3") {
        write("/local/domain/\(domain)/name", "guest")
        write(frontend(domain, vhost) + "/ring-ref", "8")
        write(frontend(domain, vhost) + "/event-channel", "9")
        write(frontend(domain, vhost) + "/state", frontendState)
        write(backend(domain, vhost) + "/frontend", frontend(domain, vhost))
        write(backend(domain, vhost) + "/vscsi-devs/dev-0/p-dev", "naa.60014054ac780582:0")
        write(backend(domain, vhost) + "/vscsi-devs/dev-0/v-dev", "0:0:0:0")
        write(backend(domain, vhost) + "/vscsi-devs/dev-0/state", "1")
        write(backend(domain, vhost) + "/state", "1")
    }

    private func state(_ domain: Int, _ vhost: Int) -> String? { store.tree[backend(domain, vhost) + "/state"] }

    @Test("Several vhosts of several guests come up, those that were there before and those that come later")
    func several() throws {
        create(1, 0)
        create(1, 1)
        try executor.control.start()
        executor.settle()
        create(2, 0)
        executor.settle()
        #expect(state(1, 0) == "4" && state(1, 1) == "4" && state(2, 0) == "4")
        #expect(executor.control.status.map { $0.vhost.description } == ["1/0", "1/1", "2/0"])
        #expect(executor.errors.isEmpty)
    }

    @Test("The front end's changes are seen: it closes, and the back end follows")
    func frontendCloses() throws {
        create(3, 0)
        try executor.control.start()
        executor.settle()
        write(frontend(3, 0) + "/state", "6")
        executor.settle()
        #expect(state(3, 0) == "6")
        #expect(executor.performed.last?.effect == .disconnect)
    }

    @Test("A guest that vanishes takes its directory along, and no other's")
    func guestVanishes() throws {
        create(3, 0)
        create(3, 1)
        create(4, 0)
        try executor.control.start()
        executor.settle()
        try store.remove("/local/domain/3", .none)
        executor.settle()
        #expect(store.tree["/local/domain/0/backend/vscsi/3"] == nil)
        #expect(state(4, 0) == "4")
        #expect(Set(executor.forgotten.map(\.domain)) == [3])
        #expect(store.watches.filter { $0.path.hasPrefix("/local/domain/3/") }.isEmpty)
    }

    @Test("Directories of guests that are gone are removed at the start")
    func stale() throws {
        create(5, 0)
        try store.remove("/local/domain/5", .none)
        write("/local/domain/0/backend/vscsi/6/0/state", "4")
        try executor.control.start()
        executor.settle()
        #expect(store.tree["/local/domain/0/backend/vscsi/5"] == nil)
        #expect(store.tree["/local/domain/0/backend/vscsi/6"] == nil)
        #expect(executor.performed.isEmpty)
    }

    @Test("The death of a domain that nobody tells but @releaseDomain is noticed")
    func released() throws {
        create(7, 0)
        // A driver domain may not watch other domains' directories closely.
        try executor.control.start()
        executor.settle()
        store.removeSilently("/local/domain/7")
        executor.settle()
        #expect(state(7, 0) == "4")
        store.fire("@releaseDomain")
        executor.settle()
        #expect(state(7, 0) == nil)
    }

    @Test("A toolstack that writes in the middle of a transaction is not overwritten")
    func interference() throws {
        create(1, 0, frontendState: "4")
        write(backend(1, 0) + "/state", "8")
        write(backend(1, 0) + "/vscsi-devs/dev-0/state", "3")
        try executor.control.start()
        // The write of state 4 is about to be committed when the toolstack asks for a reconfiguration.
        executor.control.process()
        executor.control.completed(VhostIdentifier(domain: 1, number: 0), .done)
        executor.control.completed(VhostIdentifier(domain: 1, number: 0), .done)
        store.interference = { [store, path = backend(1, 0)] in try! store.write(path + "/state", "7", .none) }
        executor.control.completed(VhostIdentifier(domain: 1, number: 0), .done)
        executor.settle()
        #expect(state(1, 0) == "7")
        #expect(store.tree[backend(1, 0) + "/vscsi-devs/dev-0/state"] == "4")
    }

    @Test("A broken ring closes its vhost and says why")
    func brokenRing() throws {
        create(1, 0)
        try executor.control.start()
        executor.settle()
        executor.control.give(up: VhostIdentifier(domain: 1, number: 0), because: "the ring is broken")
        executor.settle()
        #expect(state(1, 0) == "5")
        #expect(store.tree[backend(1, 0) + "/error"] == "the ring is broken")
        #expect(executor.performed.last?.effect == .disconnect)
    }

    @Test("A front end's directory that is another domain's is refused")
    func foreignFrontend() throws {
        create(1, 0)
        write(backend(1, 0) + "/frontend", frontend(2, 0))
        write(frontend(2, 0) + "/state", "3")
        try executor.control.start()
        executor.settle()
        #expect(executor.performed.isEmpty)
        #expect(store.tree[backend(1, 0) + "/error"]?.contains("not domain 1's") == true)
    }

    @Test("Nodes of noise break nothing and never connect what is not there", arguments: 1...20)
    func noise(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        let values = [
            "", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "-1", "4294967296", "99999999999999999999", "x", "\0",
            "\u{ff}",
            "0:0:0:0", "0:0:0:1", "1:2:3:4:5", "naa.60014054ac780582:0", "naa.:", "naa.60014054ac780582",
            frontend(1, 0),
            "/local/domain/0/device/vscsi/0", String(repeating: "9", count: 4000), "x86_32-abi", "vax",
        ]
        let names = [
            "/state", "/online", "/frontend", "/feature-host", "/vscsi-devs/dev-0/state", "/vscsi-devs/dev-0/p-dev",
            "/vscsi-devs/dev-0/v-dev", "/vscsi-devs/dev-1/state", "/vscsi-devs/dev-1/p-dev", "/vscsi-devs/dev-1/v-dev",
            "/vscsi-devs/x/state", "/vscsi-devs",
        ]
        let frontendNames = ["/state", "/ring-ref", "/event-channel", "/protocol", "/vscsi-devs/dev-0/state", ""]
        create(1, 0)
        create(2, 0)
        try executor.control.start()
        executor.settle()
        for _ in 0..<600 {
            let isFrontend = Bool.random(using: &random)
            let path =
                isFrontend
                ? frontend(1, 0) + frontendNames.randomElement(using: &random)!
                : backend(1, 0) + names.randomElement(using: &random)!
            if Int.random(in: 0..<10, using: &random) == 0 {
                try store.remove(path, .none)
            } else {
                write(path, values.randomElement(using: &random)!)
            }
            if Bool.random(using: &random) { executor.settle() }
        }
        executor.settle()
        // The other guest has noticed nothing, and this one can begin anew.
        #expect(state(2, 0) == "4")
        try store.remove(backend(1, 0), .none)
        try store.remove(frontend(1, 0), .none)
        executor.settle()
        #expect(executor.control.status.map { $0.vhost.domain } == [2])
        create(1, 0)
        executor.settle()
        #expect(state(1, 0) == "4")
    }

    @Test("A vhost that the kernel's own driver serves is left to it, and the operator is told once")
    func takenByKernel() throws {
        executor.takenByKernel = [VhostIdentifier(domain: 1, number: 0)]
        create(1, 0)
        create(1, 1)
        try executor.control.start()
        executor.settle()
        write(backend(1, 0) + "/vscsi-devs/dev-0/v-dev", "0:0:1:0")
        executor.settle()
        #expect(state(1, 0) == "1" && state(1, 1) == "4")
        #expect(executor.errors.count == 1 && executor.errors[0].contains("xen-scsiback"))
        executor.takenByKernel = []
        write(backend(1, 0) + "/state", "1")
        executor.settle()
        #expect(state(1, 0) == "4")
    }

    @Test("A xenstored that comes back with its contents is followed again: what changed meanwhile, and what comes")
    func reconnect() throws {
        create(1, 0)
        create(2, 0)
        try executor.control.start()
        executor.settle()
        let successor = InMemoryXenStore(store.tree)
        try successor.write(frontend(1, 0) + "/state", "6", .none)
        try executor.control.reconnect(successor)
        executor.settle()
        #expect(successor.tree[backend(1, 0) + "/state"] == "6" && successor.tree[backend(2, 0) + "/state"] == "4")
        try successor.write(frontend(2, 0) + "/state", "6", .none)
        executor.settle()
        #expect(successor.tree[backend(2, 0) + "/state"] == "6")
        #expect(executor.errors.isEmpty)
    }

    @Test("A xenstored that comes back empty costs no guest its disk; attached anew, it is served anew")
    func reconnectToEmptyStore() throws {
        create(1, 0)
        try executor.control.start()
        executor.settle()
        let successor = InMemoryXenStore()
        try executor.control.reconnect(successor)
        executor.settle()
        #expect(!executor.performed.contains { $0.effect == .disconnect } && executor.forgotten.isEmpty)
        #expect(executor.errors.count == 1)
        for (path, value) in store.tree.nodes {
            try successor.write(path, path == backend(1, 0) + "/state" ? "1" : value, .none)
        }
        try successor.write(frontend(1, 0) + "/ring-ref", "99", .none)
        executor.settle()
        #expect(successor.tree[backend(1, 0) + "/state"] == "4")
        #expect(executor.performed.contains { $0.effect == .disconnect })
        #expect(executor.control.status.first?.machine.link == .up(RingParameters(ringReference: 99, eventChannel: 9)))
    }
}
