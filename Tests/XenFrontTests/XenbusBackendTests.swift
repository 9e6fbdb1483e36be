// XenbusBackendTests: the back end's handshake against a model of Linux's front end, in every order of steps.

import Testing

@testable import XenFront
@testable import Xenbus

@Suite("The xenbus handshake")
struct XenbusBackendTests {
    static let backend = XenbusWorld.backendPath
    static let frontend = XenbusWorld.frontendPath
    static let disk = "naa.60014054ac780582:0"

    /// What a toolstack writes for a new vhost with these devices.
    static func create(_ devices: [(String, String)]) -> ToolstackStep {
        var nodes = [
            NodeWrite("/local/domain/7/name", "guest"),
            NodeWrite("\(backend)/frontend", frontend), NodeWrite("\(backend)/frontend-id", "7"),
            NodeWrite("\(backend)/online", "1"), NodeWrite("\(backend)/feature-host", "0"),
            NodeWrite("\(frontend)/backend", backend), NodeWrite("\(frontend)/backend-id", "0"),
            NodeWrite("\(frontend)/state", "1"),
        ]
        for (index, (physical, virtual)) in devices.enumerated() {
            nodes += device(index, physical, virtual, state: "1")
        }
        return .write(nodes + [NodeWrite("\(backend)/state", "1")])
    }

    static func device(_ index: Int, _ physical: String, _ virtual: String, state: String) -> [NodeWrite] {
        let directory = "\(backend)/vscsi-devs/dev-\(index)"
        return [
            NodeWrite(directory + "/p-dev", physical), NodeWrite(directory + "/v-dev", virtual),
            NodeWrite(directory + "/state", state),
        ]
    }

    static func waitConnected(_ device: Int, _ state: String = "4") -> [ToolstackStep] {
        [.wait("\(backend)/vscsi-devs/dev-\(device)/state", state), .wait("\(backend)/state", "4")]
    }

    static func add(_ index: Int, _ physical: String, _ virtual: String) -> ToolstackStep {
        .write(device(index, physical, virtual, state: "1") + [NodeWrite("\(backend)/state", "7")])
    }

    static func remove(_ index: Int) -> [ToolstackStep] {
        let directory = "\(backend)/vscsi-devs/dev-\(index)"
        return [
            .write([NodeWrite(directory + "/state", "5"), NodeWrite("\(backend)/state", "7")]),
            .wait(directory + "/state", "6"), .wait("\(backend)/state", "4"),
            .remove([directory, "\(frontend)/vscsi-devs/dev-\(index)"]),
        ]
    }

    static let detach: [ToolstackStep] = [
        .write([NodeWrite("\(backend)/online", "0"), NodeWrite("\(backend)/state", "5")]),
        .wait("\(backend)/state", "6"), .remove([backend, frontend]),
    ]

    /// The script runs to its end in every order of steps, and then the guest has exactly these disks.
    func expect(
        _ script: [ToolstackStep], disks: [String: String], crashes: Int = 0, resumes: Int = 0,
        missing: Set<String> = [], sourceLocation: SourceLocation = #_sourceLocation
    ) {
        var world = XenbusWorld()
        world.script = script
        world.crashesLeft = crashes
        world.resumesLeft = resumes
        world.missing = missing
        let expected = disks.mapValues { VirtualDevice(node: $0)! }
        let (fault, worlds) = XenbusWorld.explore(world) {
            $0.script.isEmpty && $0.disks == expected && Set(expected.values).isSubset(of: $0.attached)
                && (expected.isEmpty || $0.mapped == $0.ring && $0.serving)
        }
        #expect(fault == nil, sourceLocation: sourceLocation)
        #expect(worlds > script.count, sourceLocation: sourceLocation)
    }

    @Test("A vhost comes up with its devices: 1, 2, 4 and 1, 3, 4")
    func create() {
        expect([Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0), disks: ["dev-0": "0:0:0:0"])
    }

    @Test("The order of the back end's states is 1, 2, 4 and of a device's 1, 3, 4")
    func createOrder() throws {
        var world = XenbusWorld()
        world.script = [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0)
        var backend: [String] = []
        var device: [String] = []
        while let next = world.successors().last {
            world = next.1
            if let state = world.tree[Self.backend + "/state"], backend.last != state { backend.append(state) }
            if let state = world.tree[Self.backend + "/vscsi-devs/dev-0/state"], device.last != state {
                device.append(state)
            }
        }
        #expect(backend == ["1", "2", "4"])
        #expect(device == ["1", "3", "4"])
        #expect(world.tree[Self.backend + "/feature-sg-grant"] == "128")
    }

    @Test("A device that cannot be served fails alone and says why")
    func failedAdd() throws {
        let other = "naa.60014054ac780582:1"
        expect(
            [Self.create([(other, "0:0:0:0"), (Self.disk, "0:0:1:0")])] + Self.waitConnected(0, "6")
                + Self.waitConnected(1) + [.wait(Self.backend + "/vscsi-devs/dev-0/error", "no such target")],
            disks: ["dev-1": "0:0:1:0"], missing: [other])
    }

    @Test(
        "Nodes that make no sense are a failed add",
        arguments: [
            ("disk", "0:0:0:0"), ("naa.6001:0", "0:0:0:0"), ("naa.60014054ac780582:0", "0:0:0"),
            ("naa.60014054ac780582:0", "0:0:0:-1"), ("naa.60014054ac780582:65536", "0:0:0:0"), ("", ""),
            ("naa.60014054ac780582:0", "0:0:0:99999999999999999999"), ("naa.+0014054ac780582:0", "0:0:0:0"),
        ])
    func malformed(physical: String, virtual: String) {
        expect([Self.create([(physical, virtual)])] + Self.waitConnected(0, "6"), disks: [:])
    }

    @Test("Two devices with one address: the second fails")
    func duplicate() {
        expect(
            [Self.create([(Self.disk, "0:0:0:0"), (Self.disk, "3:0:0:0")])] + Self.waitConnected(0)
                + Self.waitConnected(1, "6"),
            disks: ["dev-0": "0:0:0:0"])
    }

    @Test("Hot add: 7, 8, 4", arguments: [0, 1])
    func hotAdd(crashes: Int) {
        expect(
            [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0) + [Self.add(1, Self.disk, "0:0:1:0")]
                + Self.waitConnected(1),
            disks: ["dev-0": "0:0:0:0", "dev-1": "0:0:1:0"], crashes: crashes)
    }

    @Test("A failed hot add leaves the vhost connected", arguments: [0, 1])
    func failedHotAdd(crashes: Int) {
        expect(
            [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0) + [Self.add(1, "nothing", "0:0:1:0")]
                + Self.waitConnected(1, "6"),
            disks: ["dev-0": "0:0:0:0"], crashes: crashes)
    }

    @Test("Hot remove: the guest lets go first, then 6", arguments: [0, 1])
    func hotRemove(crashes: Int) {
        expect(
            [Self.create([(Self.disk, "0:0:0:0"), (Self.disk, "0:0:1:0")])] + Self.waitConnected(1) + Self.remove(0),
            disks: ["dev-1": "0:0:1:0"], crashes: crashes)
    }

    @Test("A hot add on the heels of another loses neither")
    func twoAddsAtOnce() {
        expect(
            [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0)
                + [Self.add(1, Self.disk, "0:0:1:0"), Self.add(2, Self.disk, "0:0:2:0")] + Self.waitConnected(1)
                + Self.waitConnected(2),
            disks: ["dev-0": "0:0:0:0", "dev-1": "0:0:1:0", "dev-2": "0:0:2:0"])
    }

    @Test("Adding while another device is removed", arguments: [0, 1])
    func addDuringRemove(crashes: Int) {
        let directory = Self.backend + "/vscsi-devs/dev-0"
        expect(
            [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0)
                + [
                    .write([NodeWrite(directory + "/state", "5"), NodeWrite(Self.backend + "/state", "7")]),
                    Self.add(1, Self.disk, "0:0:1:0"), .wait(directory + "/state", "6"),
                ] + Self.waitConnected(1),
            disks: ["dev-1": "0:0:1:0"], crashes: crashes)
    }

    @Test("The toolstack closes a vhost, and can make it anew", arguments: [0, 1])
    func close(crashes: Int) {
        let create = [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0)
        expect(create + Self.detach, disks: [:], crashes: crashes)
        expect(create + Self.detach + create, disks: ["dev-0": "0:0:0:0"])
    }

    @Test("The toolstack closes a vhost before the guest has come up")
    func closeEarly() {
        expect([Self.create([(Self.disk, "0:0:0:0")])] + Self.detach, disks: [:])
    }

    @Test("A guest that powers off is followed to Closed", arguments: [0, 1])
    func guestShutdown(crashes: Int) {
        expect(
            [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0)
                + [.guestShutsDown, .wait(Self.backend + "/state", "6")],
            disks: [:], crashes: crashes)
    }

    @Test("A guest destroyed at any moment leaves no nodes behind and nothing mapped", arguments: [0, 1])
    func guestDestroyed(crashes: Int) {
        var world = XenbusWorld()
        world.script = [Self.create([(Self.disk, "0:0:0:0")]), .guestDestroyed, .waitGone(XenbusWorld.root + "/7")]
        world.crashesLeft = crashes
        let (fault, _) = XenbusWorld.explore(world) { $0.script.isEmpty && $0.mapped == nil && $0.attached.isEmpty }
        #expect(fault == nil)
    }

    @Test("A destroyed guest can be made again")
    func guestRecreated() {
        let create = [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0)
        expect(
            create + [.guestDestroyed, .waitGone(XenbusWorld.root + "/7")] + create, disks: ["dev-0": "0:0:0:0"])
    }

    @Test("A daemon that dies and comes back at any moment serves the same ring", arguments: [1, 2])
    func restart(crashes: Int) {
        expect(
            [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0), disks: ["dev-0": "0:0:0:0"],
            crashes: crashes)
    }

    @Test("A daemon that starts after the guest finds it")
    func startAfterGuest() {
        var world = XenbusWorld()
        world.machine = nil
        world.script = [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0)
        let (fault, _) = XenbusWorld.explore(world) { $0.script.isEmpty && !$0.disks.isEmpty && $0.mapped == $0.ring }
        #expect(fault == nil)
    }

    @Test("A resumed guest's new ring replaces the old one", arguments: [0, 1])
    func resume(crashes: Int) {
        expect(
            [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0), disks: ["dev-0": "0:0:0:0"],
            crashes: crashes, resumes: 2)
    }

    @Test("A resume in the middle of a hot add", arguments: [0, 1])
    func resumeDuringAdd(crashes: Int) {
        var world = XenbusWorld()
        world.script =
            [Self.create([(Self.disk, "0:0:0:0")])] + Self.waitConnected(0)
            + [Self.add(1, Self.disk, "0:0:1:0")]
        world.resumesLeft = 1
        world.crashesLeft = crashes
        let (fault, _) = XenbusWorld.explore(world) {
            $0.script.isEmpty && $0.disks["dev-0"] != nil && $0.mapped == $0.ring
        }
        #expect(fault == nil)
    }

    @Test("A ring that cannot be mapped closes the vhost and says why")
    func badRing() {
        var world = XenbusWorld()
        world.script = [Self.create([(Self.disk, "0:0:0:0")]), .wait(Self.backend + "/state", "6")]
        world.nextReference = 8
        // The front end's nodes lie about its ring.
        var tree = world.tree
        tree.write("\(Self.frontend)/ring-ref", "99")
        var machine = XenbusBackend()
        var nodes = VhostNodes()
        nodes.backendState = .initWait
        nodes.frontendState = .initialised
        nodes.ring = RingParameters(ringReference: 99, eventChannel: 1)
        #expect(machine.reconcile(nodes) == .effect(.connect(nodes.ring!, recovering: false)))
        machine.completed(.failed("grant 99 cannot be mapped"))
        #expect(
            machine.reconcile(nodes)
                == .write([NodeWrite("error", "grant 99 cannot be mapped"), NodeWrite("state", "5")]))
        nodes.backendState = .closing
        #expect(machine.reconcile(nodes) == .idle)
        nodes.frontendState = .closed
        #expect(machine.reconcile(nodes) == .write([NodeWrite("state", "6")]))
    }

    @Test("Ring entries of a foreign ABI are refused")
    func foreignProtocol() {
        var machine = XenbusBackend()
        var nodes = VhostNodes()
        nodes.backendState = .initWait
        nodes.frontendState = .initialised
        nodes.ring = RingParameters(ringReference: 8, eventChannel: 1)
        nodes.foreignProtocol = "vax-abi"
        guard case .write(let writes) = machine.reconcile(nodes) else {
            Issue.record("nothing was written")
            return
        }
        #expect(writes.first?.name == "error")
        #expect(writes.last == NodeWrite("state", "5"))
    }
}
