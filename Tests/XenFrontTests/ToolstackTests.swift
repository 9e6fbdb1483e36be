// ToolstackTests: what targetctl xen writes into xenstore, in which states it may, and how it explains what it sees.
//
// Must not know: the back end, whose part the tests play.

import Testing

@testable import Xenbus

@Suite("The toolstack's side of vscsi")
struct ToolstackTests {
    private let store = InMemoryXenStore()
    private let toolstack: Toolstack
    private let back = "/local/domain/0/backend/vscsi/7/0"
    private let front = "/local/domain/7/device/vscsi/0"

    private init() {
        toolstack = Toolstack(store: store, backendDomain: 0)
        write("/local/domain/7/name", "guest")
    }

    private func write(_ path: String, _ value: String) { try! store.write(path, value, .none) }
    private func node(_ path: String) -> String? { store.tree[path] }

    private func device(_ text: String) -> DeviceSpecification { try! DeviceSpecification(parsing: text) }
    private func attach(_ devices: String...) throws -> [AttachedDevice]? {
        try toolstack.attach(devices.map(device), to: 7)
    }

    /// Both ends have come up, with all devices.
    private func connect() {
        write(back + "/state", "4")
        write(front + "/state", "4")
        for name in store.tree.children(back + "/vscsi-devs") ?? [] { write("\(back)/vscsi-devs/\(name)/state", "4") }
    }

    @Test("A new vhost gets all of its nodes in one transaction, each side owning its own")
    func create() throws {
        var commits = 0
        store.interference = { commits += 1 }
        let attached = try attach("naa.60014054ac780582:0,0:0:1:2", "naa.60014054ac780582:1,0:0:1:3")
        #expect(commits == 1)
        #expect(attached?.map(\.name) == ["dev-0", "dev-1"])
        #expect(node(back + "/frontend") == front && node(front + "/backend") == back)
        #expect(node(back + "/frontend-id") == "7" && node(front + "/backend-id") == "0")
        #expect(node(back + "/online") == "1" && node(back + "/feature-host") == "0")
        #expect(node(back + "/state") == "1" && node(front + "/state") == "1")
        #expect(node(back + "/vscsi-devs/dev-1/p-dev") == "naa.60014054ac780582:1")
        #expect(node(back + "/vscsi-devs/dev-1/v-dev") == "0:0:1:3")
        #expect(node(back + "/vscsi-devs/dev-1/state") == "1")
        #expect(store.permissions[back].map { [$0.owner, $0.reader] } == [0, 7])
        #expect(store.permissions[front].map { [$0.owner, $0.reader] } == [7, 0])
    }

    @Test("A driver domain owns the nodes of its end")
    func driverDomain() throws {
        let toolstack = Toolstack(store: store, backendDomain: 3)
        _ = try toolstack.attach([device("1:0:0:0,2:0:0:0")], to: 7)
        let back = "/local/domain/3/backend/vscsi/7/2"
        #expect(store.permissions[back].map { [$0.owner, $0.reader] } == [3, 7])
        #expect(node("/local/domain/7/device/vscsi/2/backend") == back)
        #expect(node("/local/domain/7/device/vscsi/2/backend-id") == "3")
    }

    @Test("Devices of several vhosts are written together, or none of them")
    func severalVhosts() throws {
        _ = try attach("naa.60014054ac780582:0,0:0:0:0", "naa.60014054ac780583:0,1:0:0:0,feature-host")
        #expect(node("/local/domain/0/backend/vscsi/7/1/feature-host") == "1")
        #expect(throws: ToolstackError.self) {
            try attach("naa.60014054ac780582:0,2:0:0:0", "naa.60014054ac780582:0,0:0:0:0")
        }
        #expect(node("/local/domain/0/backend/vscsi/7/2/state") == nil)
    }

    @Test("A connected vhost gets a device by the way of state 7")
    func hotAdd() throws {
        _ = try attach("naa.60014054ac780582:0,0:0:0:0")
        connect()
        #expect(try attach("naa.60014054ac780582:1,0:0:1:0")?.map(\.name) == ["dev-1"])
        #expect(node(back + "/state") == "7" && node(back + "/vscsi-devs/dev-1/state") == "1")
        // In the middle of that, nothing else begins.
        #expect(try attach("naa.60014054ac780582:2,0:0:2:0") == nil)
        #expect(node(back + "/vscsi-devs/dev-2/state") == nil)
    }

    @Test("A vhost that waits for its guest just gets the nodes")
    func addEarly() throws {
        _ = try attach("naa.60014054ac780582:0,0:0:0:0")
        write(back + "/state", "2")
        _ = try attach("naa.60014054ac780582:1,0:0:1:0")
        #expect(node(back + "/state") == "2" && node(back + "/vscsi-devs/dev-1/state") == "1")
    }

    @Test("An address in use is not given again; a device that failed leaves its place")
    func address() throws {
        _ = try attach("naa.60014054ac780582:0,0:0:0:0")
        connect()
        let error = #expect(throws: ToolstackError.self) { try attach("naa.60014054ac780582:1,0:0:0:0") }
        #expect(error?.kind == .conflict)
        write(back + "/vscsi-devs/dev-0/state", "6")
        #expect(try attach("naa.60014054ac780582:1,0:0:0:0")?.map(\.name) == ["dev-0"])
        #expect(node(back + "/vscsi-devs/dev-0/p-dev") == "naa.60014054ac780582:1")
    }

    @Test("A closed vhost is made anew, without anything of its past")
    func again() throws {
        _ = try attach("naa.60014054ac780582:0,0:0:0:0", "naa.60014054ac780582:1,0:0:1:0")
        write(back + "/state", "6")
        write(back + "/error", "something")
        write(front + "/ring-ref", "8")
        _ = try attach("naa.60014054ac780582:0,0:0:0:0")
        #expect(node(back + "/state") == "1" && node(back + "/error") == nil && node(front + "/ring-ref") == nil)
        #expect(node(back + "/vscsi-devs/dev-1/state") == nil)
    }

    @Test("A device is taken away by the way of state 7, and its nodes at the end")
    func hotRemove() throws {
        _ = try attach("naa.60014054ac780582:0,0:0:0:0", "naa.60014054ac780582:1,0:0:1:0")
        connect()
        let detachment = try #require(try toolstack.detach("naa.60014054ac780582:1", from: 7))
        #expect(node(back + "/vscsi-devs/dev-1/state") == "5" && node(back + "/state") == "7")
        guard case .waiting = try toolstack.progress(of: detachment) else { throw ToolstackError(.refused, "done") }
        write(back + "/vscsi-devs/dev-1/state", "6")
        write(back + "/state", "4")
        #expect(try toolstack.progress(of: detachment) == .done)
        try toolstack.clean(detachment)
        #expect(node(back + "/vscsi-devs/dev-1/state") == nil && node(back + "/vscsi-devs/dev-0/state") == "4")
    }

    @Test("The last device takes its vhost along")
    func last() throws {
        _ = try attach("naa.60014054ac780582:0,0:0:0:0")
        connect()
        let detachment = try #require(try toolstack.detach("0:0:0:0", from: 7))
        #expect(node(back + "/online") == "0" && node(back + "/state") == "5")
        write(back + "/state", "6")
        #expect(try toolstack.progress(of: detachment) == .done)
        try toolstack.clean(detachment)
        #expect(node(back) == nil && node(front) == nil && node("/local/domain/0/backend/vscsi/7") == nil)
    }

    @Test("What no guest has used yet goes at once")
    func unused() throws {
        _ = try attach("naa.60014054ac780582:0,0:0:0:0")
        #expect(try toolstack.detach("0:0:0:0", from: 7) == .done)
        #expect(node(back) == nil && node(front) == nil)
    }

    @Test("A device that two vhosts have must be named by its place")
    func ambiguous() throws {
        _ = try attach("naa.60014054ac780582:0,0:0:0:0", "naa.60014054ac780582:0,1:0:0:0")
        let error = #expect(throws: ToolstackError.self) { try toolstack.detach("naa.60014054ac780582:0", from: 7) }
        #expect(error?.kind == .conflict)
        #expect(try toolstack.detach("1:0:0:0", from: 7) == .done)
        #expect(node(back + "/state") == "1")
        #expect(throws: ToolstackError.self) { try toolstack.detach("5:0:0:0", from: 7) }
    }

    @Test("A transaction that somebody disturbs is made again")
    func interference() throws {
        store.interference = { [store] in try! store.write("/local/domain/7/name", "other", .none) }
        #expect(try attach("naa.60014054ac780582:0,0:0:0:0")?.count == 1)
        #expect(node("/local/domain/7/name") == "other" && node(back + "/state") == "1")
    }

    @Test("Progress tells what is missing, a refusal its reason, and advice what to look at")
    func progress() throws {
        let devices = try #require(try attach("naa.60014054ac780582:9,0:0:0:0"))
        #expect(
            try toolstack.progress(of: devices)
                == .waiting("vhost 7/0: back end initialising, front end initialising, 0:0:0:0 initialising"))
        #expect(try toolstack.advice(devices[0].vhost).contains("does targetd run there"))
        write(back + "/state", "2")
        #expect(try toolstack.advice(devices[0].vhost).contains("xen-scsifront"))
        write("/local/domain/7/error/device/vscsi/0/error", "22 allocating ring")
        #expect(try toolstack.advice(devices[0].vhost) == "the front end says: 22 allocating ring")
        write(back + "/vscsi-devs/dev-0/error", "no such unit")
        write(back + "/vscsi-devs/dev-0/state", "6")
        #expect(
            try toolstack.progress(of: devices)
                == .failed("naa.60014054ac780582:9 at 0:0:0:0 was refused: no such unit"))
        write(back + "/error", "the ring is broken")
        write(back + "/state", "5")
        #expect(
            try toolstack.progress(of: devices)
                == .failed("vhost 7/0 was closed: the ring is broken; the front end says: 22 allocating ring"))
    }

    @Test("A guest is found by its number and by its name")
    func domain() throws {
        #expect(try toolstack.domain("7") == 7)
        #expect(try toolstack.domain("guest") == 7)
        for text in ["8", "other", "99999", ""] {
            #expect(throws: ToolstackError.self) { try toolstack.domain(text) }
        }
    }

    @Test("pdev,vdev is read strictly")
    func specification() throws {
        let read = device("naa.60014054ac780582:3,2:0:1:4,feature-host")
        #expect(read.physicalDevice == .named(target: 0x6001_4054_ac78_0582, lun: 3))
        #expect(read.virtualDevice == VirtualDevice(host: 2, channel: 0, target: 1, lun: 4) && read.featureHost)
        let path = try DeviceSpecification(parsing: "/dev/sdz,0:0:0:0") { path in
            path == "/dev/sdz" ? .host(host: 1, channel: 0, target: 2, lun: 0) : nil
        }
        #expect(path.physicalDevice.description == "1:0:2:0" && path.name == "/dev/sdz")
        for text in [
            "", ",", "naa.60014054ac780582:0", "naa.60014054ac780582:0,0:0:0", "naa.6001:0,0:0:0:0", "x,0:0:0:0",
            "1:0:0:0,0:0:0:0,", "1:0:0:0,0:0:0:0,feature", "1:0:0:0,0:0:0:0,feature-host,", "/dev/null,0:0:0:0",
            "1:0:0:0,0:0:0:65536", "1:0:0:-1,0:0:0:0",
        ] {
            #expect(throws: DeviceSpecification.Mistake.self) { try DeviceSpecification(parsing: text) }
        }
    }
}
