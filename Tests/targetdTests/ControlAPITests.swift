// ControlAPITests: the control API of a targetd that runs, over its socket and by targetctl. Must not know: how the
// server reads requests.

import ControlAPI
import Foundation
import Glibc
import Testing
import VhostUserInitiator

@testable import targetd

/// Answers that have come.
private actor Count {
    static let all = 120
    private(set) var statuses: [Int?: Int] = [:]

    func add(_ status: Int?) { statuses[status, default: 0] += 1 }

    var isComplete: Bool { statuses.values.reduce(0, +) == Self.all }
}

@Suite struct ControlAPITests {
    private let folder: TemporaryFolder
    private var client: ControlClient { ControlClient(socket: folder("c")) }

    init() throws { folder = try TemporaryFolder() }

    /// A configuration with a file, and what else is asked for.
    private func yaml(size: String = "1MiB", units: String = "0: a", more: String = "", control: String = "") -> String
    {
        """
        control: { socket: \(folder("c"))\(control) }
        stop-timeout: 5s
        backstores:
          a: { type: file, path: \(folder("a.img")), size: \(size), buffered: true }
          b: { type: ram, size: 2MiB }
        targets:
          naa.6000000000000001: { luns: { \(units) } }
        vhost-user-scsi:
          - { socket: \(folder("1")), queues: 2, targets: { 3: naa.6000000000000001 } }
        \(more)
        """
    }

    /// Runs `body` with a targetd that serves the configuration in the file `f.yaml`.
    private func serve(_ yaml: String? = nil, _ body: (RunningDaemon) throws -> Void) throws {
        let daemon = try RunningDaemon(["--config", folder.write("f.yaml", yaml ?? self.yaml())])
        try #require(daemon.waitUntilReady())
        try body(daemon)
        daemon.signal(SIGTERM)
        let result = daemon.finish()
        #expect(result.status == 0, "\(result.errors)")
        #expect(!FileManager.default.fileExists(atPath: folder("c")))
    }

    private func get<Value: Decodable>(_ path: String, _ type: Value.Type) throws -> Value {
        let answer = try client.exchange("GET", path)
        #expect(answer.status == 200)
        return try JSON.decode(type, from: answer.body)
    }

    private func put(_ text: String, _ query: String = "") throws -> ControlClient.Answer {
        try client.exchange("PUT", "/v1/configuration" + query, type: "application/yaml", body: Data(text.utf8))
    }

    private func failure(_ answer: ControlClient.Answer) throws -> Failure {
        try JSON.decode(FailureReport.self, from: answer.body).error
    }

    private func changes(_ answer: ControlClient.Answer) throws -> [String] {
        try #require(answer.status == 200, "\(String(decoding: answer.body, as: UTF8.self))")
        return try JSON.decode(ChangeReport.self, from: answer.body).changes
    }

    // MARK: Reading

    @Test func statusTellsAllThatRuns() throws {
        try serve { _ throws in
            let status = try get("/v1/status", Status.self)
            #expect(status.version == Version.text)
            #expect(status.reactors.map(\.index) == [0])
            #expect(
                status.backstores == [
                    BackstoreStatus(
                        name: "a", type: "file", path: folder("a.img"), size: 1 << 20, readOnly: false),
                    BackstoreStatus(name: "b", type: "ram", path: nil, size: nil, readOnly: false),
                ])
            #expect(status.targets.map(\.name) == ["naa.6000000000000001"])
            let unit = try #require(status.targets.first?.luns.first)
            #expect((unit.lun, unit.backstore, unit.size, unit.writeProtected) == (0, "a", 1 << 20, false))
            let front = FrontStatus(
                socket: folder("1"), reactor: 0, queues: 2, connected: false, targets: ["3": "naa.6000000000000001"])
            #expect(status.fronts == [front])
        }
    }

    /// READ(10) and WRITE(10) of one block.
    private func transfer(_ operationCode: UInt8, block: UInt32, dataOut: [UInt8] = [], dataIn: Int = 0) -> SCSICommand
    {
        let address = stride(from: 24, through: 0, by: -8).map { UInt8(truncatingIfNeeded: block >> $0) }
        let cdb = [operationCode, 0] + address + [0, 0, 1, 0]
        return SCSICommand(.flat(target: 3, lun: 0), cdb, dataOut: dataOut, dataIn: dataIn)
    }

    @Test func countersTellWhatAGuestDidAndGuestsSeeNewSizes() throws {
        try serve { _ in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            let requests = guest.queues[2]
            let data = [UInt8](repeating: 7, count: 512)
            // TEST UNIT READY takes the unit attentions, which count as ends of commands too.
            let ready = SCSICommand(.flat(target: 3, lun: 0), [0, 0, 0, 0, 0, 0])
            #expect(try requests.runPastUnitAttentions(ready).isGood)
            #expect(try requests.run(transfer(0x2a, block: 5, dataOut: data)).isGood)
            #expect(try requests.run(transfer(0x28, block: 5, dataIn: 512)).dataIn == data)
            #expect(try requests.run(transfer(0x28, block: 2048, dataIn: 512)).senseKey == 5)
            let unit = try get("/v1/targets", [TargetStatus].self)[0].luns[0]
            #expect((unit.reads, unit.writes, unit.bytesRead, unit.bytesWritten) == (2, 1, 512, 512))
            #expect(unit.inFlight == 0)
            #expect(unit.notGood >= 1)
            let front = try get("/v1/fronts", [FrontStatus].self)[0]
            #expect((front.connected, front.connections) == (true, 1))
            #expect(front.commands >= 3)
            #expect(try targetctl("resize", "a", "2MiB").status == 0)
            // What was beyond the end is there now, once the guest has heard of the new size.
            #expect(try requests.run(transfer(0x28, block: 2048, dataIn: 512)).additionalSense == 0x2a09)
            #expect(try requests.run(transfer(0x28, block: 2048, dataIn: 512)).isGood)
            // The guest stays attached while another of its disks comes and goes.
            #expect(try changes(put(yaml(size: "2MiB", units: "0: a, 1: b"))).count == 2)
            #expect(try changes(put(yaml(size: "2MiB"))).count == 2)
            #expect(try requests.runPastUnitAttentions(transfer(0x28, block: 5, dataIn: 512)).dataIn == data)
            #expect(try get("/v1/fronts", [FrontStatus].self)[0].connections == 1)
        }
    }

    @Test func silentClientDoesNotHoldUpTheStop() throws {
        try serve { _ in
            let silent = try client.connect()
            // Open until the process has ended, which `serve` waits for.
            _ = try client.exchange("GET", "/v1/status")
            try ControlClient.send(Data("GET /v1/st".utf8), to: silent)
        }
    }

    @Test func eachPartHasAPathOfItsOwn() throws {
        try serve { _ throws in
            let status = try get("/v1/status", Status.self)
            #expect(try get("/v1/backstores", [BackstoreStatus].self) == status.backstores)
            #expect(try get("/v1/backstores/b", BackstoreStatus.self) == status.backstores[1])
            #expect(try get("/v1/targets", [TargetStatus].self) == status.targets)
            #expect(try get("/v1/targets/naa.6000000000000001", TargetStatus.self) == status.targets[0])
            #expect(try get("/v1/fronts", [FrontStatus].self) == status.fronts)
            #expect(try get("/v1/reactors", [ReactorStatus].self).count == 1)
        }
    }

    @Test(arguments: [
        ("GET", "/", 404, "not-found"), ("GET", "/v1/status/", 404, "not-found"),
        ("GET", "/v2/status", 404, "not-found"),
        ("GET", "/v1/backstores/c", 404, "not-found"), ("GET", "/v1/backstores/", 404, "not-found"),
        ("GET", "/v1/backstores/..%2f..%2fetc%2fpasswd", 404, "not-found"),
        ("GET", "/v1/backstores/../status", 404, "not-found"), ("GET", "/v1/backstores/%00", 404, "not-found"),
        ("GET", "/v1/backstores/%zz", 404, "not-found"),
        ("POST", "/v1/backstores/%2e%2e/resize", 404, "not-found"),
        ("POST", "/v1/status", 405, "method-not-allowed"), ("DELETE", "/v1/configuration", 405, "method-not-allowed"),
        ("GET", "/v1/status?x=1", 400, "invalid-request"),
        ("PUT", "/v1/configuration?dry-run=yes", 400, "invalid-request"),
    ])
    func wrongRequestsAreRefused(method: String, path: String, status: Int, code: String) throws {
        try serve { _ throws in
            let body = method == "POST" ? Data(#"{"size": "2MiB"}"#.utf8) : nil
            let answer = try client.exchange(method, path, body: body)
            #expect(answer.status == status)
            #expect(try failure(answer).code == code)
            #expect((answer.fields["allow"] != nil) == (status == 405))
        }
    }

    // MARK: Changing

    @Test func savedConfigurationAppliesWithoutAChange() throws {
        try serve { _ throws in
            let saved = try client.exchange("GET", "/v1/configuration")
            #expect(saved.fields["content-type"] == "application/yaml")
            #expect(try changes(put(String(decoding: saved.body, as: UTF8.self))) == [])
        }
    }

    @Test func applyMakesTheSmallestChange() throws {
        try serve { _ throws in
            let wanted = yaml(units: "0: a, 1: b")
            let expected = ["+ backstore b", "+ target naa.6000000000000001 LUN 1"]
            #expect(try changes(put(wanted, "?dry-run=true")) == expected)
            #expect(try get("/v1/targets", [TargetStatus].self)[0].luns.count == 1)
            #expect(try changes(put(wanted)) == expected)
            #expect(try get("/v1/targets", [TargetStatus].self)[0].luns.map(\.backstore) == ["a", "b"])
        }
    }

    @Test func applyOfALargerSizeGrowsTheFile() throws {
        try serve { _ throws in
            #expect(try changes(put(yaml(size: "3MiB"))) == ["~ backstore a to 3MiB"])
            #expect(try get("/v1/targets", [TargetStatus].self)[0].luns[0].size == 3 << 20)
            let shrunk = try put(yaml(size: "1MiB"))
            #expect(shrunk.status == 409)
            #expect(try failure(shrunk).message.contains("would shrink from 3MiB to 1MiB"))
        }
    }

    @Test(arguments: [
        ("backstores: [", "is not YAML"), (#"{"backstores": {"a": }"#, "is not YAML"),
        ("reactor: 2", "is not a key here"),
        ("backstores: { ../x: { type: ram, size: 1MiB } }", "cannot be a name"),
        (String(repeating: "[", count: 100_000), "is not YAML"),
    ])
    func brokenConfigurationChangesNothing(text: String, problem: String) throws {
        try serve { _ throws in
            let before = try client.exchange("GET", "/v1/configuration").body
            let answer = try put(text)
            #expect(answer.status == 422)
            let failure = try failure(answer)
            #expect(failure.code == "invalid-configuration")
            #expect(failure.details.contains { $0.text.contains(problem) }, "\(failure)")
            #expect(try client.exchange("GET", "/v1/configuration").body == before)
        }
    }

    @Test func changeThatOnlyARestartCanMakeIsAConflict() throws {
        try serve { _ throws in
            let answer = try put("reactors: 2\n" + yaml())
            #expect(answer.status == 409)
            #expect(try failure(answer).message == "reactors: cannot change while targetd runs: restart it")
        }
    }

    @Test func changesAtOnceAreMadeOneAfterAnother() async throws {
        let daemon = try RunningDaemon(["--config", folder.write("f.yaml", yaml())])
        try #require(daemon.waitUntilReady())
        let texts = [yaml(units: "0: a, 1: b"), yaml(units: "0: a"), yaml(units: "0: b"), yaml(units: "7: b")]
        let statuses = try await withThrowingTaskGroup(of: Int.self) { [client] group in
            for round in 0..<40 {
                group.addTask {
                    try client.exchange(
                        "PUT", "/v1/configuration", type: "application/yaml", body: Data(texts[round % 4].utf8)
                    ).status
                }
            }
            return try await group.reduce(into: [Int: Int]()) { $0[$1, default: 0] += 1 }
        }
        #expect(statuses == [200: 40])
        // What runs is one of those that were asked for, in full.
        let saved = String(decoding: try client.exchange("GET", "/v1/configuration").body, as: UTF8.self)
        let running = ConfigurationReader.read(saved, name: "saved").configuration
        #expect(texts.map { ConfigurationReader.read($0, name: "sent").configuration }.contains(running))
        let units = try get("/v1/targets", [TargetStatus].self)[0].luns
        let expected = try #require(running.targets.values.first).logicalUnits
        let served = Dictionary(uniqueKeysWithValues: units.map { ($0.lun, $0.backstore) })
        #expect(served == expected.mapValues(\.backstore))
        daemon.signal(SIGTERM)
        #expect(daemon.finish().status == 0)
    }

    @Test func guestReadsOnWhileChangesAreMade() async throws {
        let daemon = try RunningDaemon(["--config", folder.write("f.yaml", yaml())])
        try #require(daemon.waitUntilReady())
        let guest = try VhostUserFrontEnd.started(path: folder("1"))
        let second = "- { socket: \(folder("2")), targets: { 0: naa.6000000000000001 } }"
        let texts = [yaml(), yaml(units: "0: a, 1: b"), yaml(more: "  " + second), yaml(units: "0: a, 9: b")]
        let count = Count()
        for round in 0..<Count.all {
            Task { [client] in
                let body = Data(texts[round * 7 % 4].utf8)
                await count.add(try? client.exchange("PUT", "/v1/configuration", body: body).status)
            }
        }
        while await !count.isComplete {
            let result = try guest.queues[2].runPastUnitAttentions(transfer(0x28, block: 5, dataIn: 512))
            #expect(result.isGood)
        }
        #expect(await count.statuses == [200: Count.all])
        #expect(try get("/v1/fronts", [FrontStatus].self).first { $0.socket == folder("1") }?.connections == 1)
        daemon.signal(SIGTERM)
        #expect(daemon.finish().status == 0)
    }

    @Test func resizeGrowsTheFileAndWhatIsSaved() throws {
        try serve { _ throws in
            let path = "/v1/backstores/a/resize"
            let grown = try client.exchange("POST", path, body: Data(#"{"size": "2MiB"}"#.utf8))
            #expect(try changes(grown) == ["~ backstore a to 2MiB"])
            #expect(try changes(client.exchange("POST", path, body: Data(#"{"size": 2097152}"#.utf8))) == [])
            #expect(try get("/v1/backstores/a", BackstoreStatus.self).size == 2 << 20)
            let saved = try client.exchange("GET", "/v1/configuration").body
            #expect(String(decoding: saved, as: UTF8.self).contains("size: 2MiB"))
        }
    }

    @Test(arguments: [
        ("a", #"{"size": "512KiB"}"#, 409), ("a", #"{"size": 1048577}"#, 409), ("b", #"{"size": "4MiB"}"#, 409),
        ("c", #"{"size": "4MiB"}"#, 404), ("a", #"{"size": "4M"}"#, 400), ("a", #"{"size": -1}"#, 400),
        ("a", #"{"size": 1.5}"#, 400), ("a", #"{"size": null}"#, 400), ("a", "{}", 400), ("a", "[]", 400),
        ("a", "", 400),
        ("a", #"{"size": "2MiB""#, 400), ("a", #"{"size": "2MiB", "force": true}"#, 400),
    ])
    func wrongResizeIsRefused(backstore: String, body: String, status: Int) throws {
        try serve { _ throws in
            let answer = try client.exchange("POST", "/v1/backstores/\(backstore)/resize", body: Data(body.utf8))
            #expect(answer.status == status, "\(String(decoding: answer.body, as: UTF8.self))")
            #expect(try get("/v1/backstores/a", BackstoreStatus.self).size == 1 << 20)
        }
    }

    @Test func hangupAppliesTheFile() throws {
        let manager = try NotificationListener(folder("notify"))
        let file = try folder.write("f.yaml", yaml())
        let daemon = try RunningDaemon(["--config", file], environment: ["NOTIFY_SOCKET": folder("notify")])
        while manager.receive() != "READY=1" {}
        _ = try folder.write("f.yaml", yaml(units: "5: b"))
        daemon.signal(SIGHUP)
        while manager.receive() != "RELOADING=1" {}
        while manager.receive() != "READY=1" {}
        #expect(try get("/v1/targets", [TargetStatus].self)[0].luns.map(\.lun) == [5])
        _ = try folder.write("f.yaml", yaml(units: "5: x"))
        daemon.signal(SIGHUP)
        while manager.receive() != "RELOADING=1" {}
        while manager.receive() != "READY=1" {}
        #expect(try get("/v1/targets", [TargetStatus].self)[0].luns.map(\.lun) == [5])
        daemon.signal(SIGTERM)
        let result = daemon.finish()
        #expect(result.status == 0)
        let problem = "targets.naa.6000000000000001.luns.5: there is no backstore x"
        #expect(result.errors.contains("error: \(file):7: \(problem)"), "\(result.errors)")
    }

    // MARK: Permission

    @Test(.enabled(if: getuid() == 0, "only root can become somebody else"))
    func userWithoutRightIsRefused() throws {
        try serve(yaml(control: ", mode: 0666")) { _ throws in
            // Where the other user may read it.
            try FileManager.default.copyItem(
                at: RunningDaemon.built("targetctl"), to: URL(fileURLWithPath: folder("targetctl")))
            let stranger = try RunningDaemon(
                [
                    "--reuid=65534", "--regid=65534", "--clear-groups", folder("targetctl"), "save", "--socket",
                    folder("c"),
                ],
                executable: URL(fileURLWithPath: "/usr/bin/setpriv")
            ).finish()
            #expect(stranger.status == 77, "\(stranger.errors)")
            #expect(stranger.errors.hasPrefix("targetctl: User 65534 may not use this socket"))
            #expect(stranger.output == "")
        }
    }

    // MARK: targetctl

    private func targetctl(_ arguments: String...) throws -> ProcessResult {
        try RunningDaemon(
            arguments + ["--socket", folder("c")], executable: RunningDaemon.built("targetctl")
        ).finish()
    }

    @Test func statusIsATable() throws {
        try serve { _ throws in
            let result = try targetctl("status")
            #expect(result.status == 0, "\(result.errors)")
            let lines = result.output.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
            #expect(lines[0].hasPrefix("\(Version.text), 1 reactor, "))
            #expect(lines[2].hasPrefix("FRONT"))
            #expect(lines[3].hasPrefix(folder("1")))
            let header = try #require(lines.firstIndex { $0.hasPrefix("TARGET") })
            let left = "TARGET                LUN  BACKSTORE  SIZE  MODE"
            #expect(lines[header] == left + "  READS  WRITES  OTHER  IN FLIGHT  OLDEST  ERRORS")
            let cells = "naa.6000000000000001    0  a          1MiB  rw  "
            #expect(lines[header + 1] == cells + "      0       0      0          0               0")
        }
    }

    @Test func commandsDoWhatTheySay() throws {
        try serve { _ throws in
            let larger = try folder.write("g.yaml", yaml(units: "0: a, 1: b"))
            let broken = try folder.write("h.yaml", yaml(units: "0: x"))
            #expect(try targetctl("diff", folder("f.yaml")).status == 0)
            let difference = try targetctl("diff", larger)
            #expect(difference.status == 1)
            #expect(difference.output == "+ backstore b\n+ target naa.6000000000000001 LUN 1\n")
            #expect(try targetctl("apply", larger).output == difference.output)
            let refused = try targetctl("apply", broken)
            #expect(refused.status == 78)
            let problem = "targets.naa.6000000000000001.luns.0: there is no backstore x"
            #expect(refused.errors.contains("line 7: error: \(problem)"), "\(refused.errors)")
            #expect(try targetctl("resize", "a", "4MiB").output == "~ backstore a to 4MiB\n")
            #expect(try targetctl("resize", "b", "4MiB").status == 65)
            #expect(try targetctl("resize", "c", "4MiB").status == 66)
            #expect(try targetctl("save").output.contains("size: 4MiB"))
            for kind in ["backstores", "targets", "fronts", "reactors"] {
                #expect(try targetctl("list", kind).status == 0)
            }
            let json = try targetctl("list", "backstores", "--json").output
            #expect(try JSON.decode([BackstoreStatus].self, from: Data(json.utf8)).map(\.name) == ["a", "b"])
            #expect(try targetctl("list", "nonsense").status == 64)
        }
        #expect(try targetctl("status").status == 69)
    }

    // MARK: Metrics

    /// A socket address of this machine for TCP.
    private func withAddress<Result>(port: Int, _ body: (UnsafeMutablePointer<sockaddr>, socklen_t) -> Result) -> Result
    {
        var address = sockaddr_in()
        address.sin_family = sa_family_t(AF_INET)
        address.sin_port = in_port_t(UInt16(port).bigEndian)
        address.sin_addr.s_addr = UInt32(0x7f00_0001).bigEndian
        return unsafe withUnsafeMutablePointer(to: &address) {
            unsafe body(
                UnsafeMutableRawPointer($0).assumingMemoryBound(to: sockaddr.self),
                socklen_t(MemoryLayout<sockaddr_in>.size))
        }
    }

    /// A port at which nobody listens.
    private func freePort() throws -> Int {
        let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(descriptor) }
        let bound = unsafe withAddress(port: 0) { unsafe bind(descriptor, $0, $1) }
        try #require(bound == 0)
        return unsafe withAddress(port: 0) { pointer, length in
            var length = length
            _ = unsafe getsockname(descriptor, pointer, &length)
            return unsafe Int(
                UInt16(bigEndian: UnsafeRawPointer(pointer).assumingMemoryBound(to: sockaddr_in.self).pointee.sin_port))
        }
    }

    private func exchange(_ port: Int, _ request: String) throws -> ControlClient.Answer {
        let descriptor = socket(AF_INET, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(descriptor) }
        let connected = unsafe withAddress(port: port) { unsafe connect(descriptor, $0, $1) }
        try #require(connected == 0)
        let text = "\(request) HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        try ControlClient.send(Data(text.utf8), to: descriptor)
        return try ControlClient.parse(FileHandle(fileDescriptor: descriptor).readDataToEndOfFile())
    }

    @Test func metricsTellTheCountersAtBothAddresses() throws {
        let port = try freePort()
        try serve(yaml(control: ", metrics: 127.0.0.1:\(port)")) { _ throws in
            let answer = try client.exchange("GET", "/metrics")
            #expect(answer.fields["content-type"] == "text/plain; version=0.0.4; charset=utf-8")
            let text = String(decoding: answer.body, as: UTF8.self)
            let labels = "target=\"naa.6000000000000001\",lun=\"0\",backstore=\"a\""
            #expect(text.contains("\ntargetd_lun_size_bytes{\(labels)} 1048576\n"))
            #expect(text.contains("\ntargetd_lun_commands_total{\(labels),operation=\"read\"} 0\n"))
            #expect(text.contains("targetd_front_connected{front=\"vhost-user-scsi\",socket=\"\(folder("1"))\"} 0\n"))
            // Nobody is asked who he is there, so there is nothing else.
            #expect(try exchange(port, "GET /metrics").status == 200)
            #expect(try exchange(port, "GET /v1/status").status == 404)
            #expect(try exchange(port, "PUT /v1/configuration").status == 404)
        }
    }
}
