// PortGroupTests: target port groups in the configuration and over the control API: what guests at two sockets see, and
// what becomes of states that a guest has set. Must not know: the core's groups.

import ControlAPI
import Foundation
import Glibc
import Testing
import VhostUserInitiator

@testable import targetd

@Suite struct PortGroupTests {
    private let folder: TemporaryFolder
    private var client: ControlClient { ControlClient(socket: folder("c")) }
    private let target = "naa.6000000000000001"

    init() throws { folder = try TemporaryFolder() }

    private func yaml(_ groups: String, second port: Int = 2) -> String {
        """
        control: { socket: \(folder("c")) }
        backstores: { a: { type: ram, size: 1MiB } }
        targets:
          \(target):
            port-groups: [ \(groups) ]
            luns: { 0: a }
        vhost-user-scsi:
          - { socket: \(folder("1")), targets: { 0: \(target) } }
          - { socket: \(folder("2")), targets: { 0: \(target) }, port: \(port) }
        """
    }

    private let twoGroups = """
        { id: 1, preferred: true, explicit: true, ports: [1] }, { id: 2, state: standby, explicit: true, ports: [2, 9] }
        """

    private func serve(
        _ yaml: String, _ body: (_ a: VhostUserFrontEnd, _ b: VhostUserFrontEnd) throws -> Void
    ) throws {
        let daemon = try RunningDaemon(["--config", folder.write("f.yaml", yaml)])
        try #require(daemon.waitUntilReady())
        do {
            let guests = try (1...2).map { try VhostUserFrontEnd.started(path: folder("\($0)")) }
            for guest in guests { _ = try guest.queues[2].runPastUnitAttentions(ready) }
            try body(guests[0], guests[1])
        }
        daemon.signal(SIGTERM)
        let result = daemon.finish()
        #expect(result.status == 0, "\(result.errors)")
    }

    private func command(_ cdb: [UInt8], _ list: [UInt8] = [], dataIn: Int = 0) -> SCSICommand {
        SCSICommand(.flat(target: 0, lun: 0), cdb, dataOut: list, dataIn: dataIn)
    }

    private var ready: SCSICommand { command([0, 0, 0, 0, 0, 0]) }

    /// What a command ends with: sense key and additional sense code, or nothing.
    private func end(_ guest: VhostUserFrontEnd, _ command: SCSICommand? = nil) throws -> String {
        let result = try guest.queues[2].run(command ?? ready)
        return result.isGood
            ? "good" : String(result.senseKey ?? 0, radix: 16) + "/" + String(result.additionalSense ?? 0, radix: 16)
    }

    /// SET TARGET PORT GROUPS of one group.
    private func set(_ state: UInt8, _ group: UInt8) -> SCSICommand {
        command([0xa4, 0x0a, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0], [0, 0, 0, 0, state, 0, 0, group])
    }

    private func ask(_ method: String, _ path: String, _ body: String? = nil) throws -> ControlClient.Answer {
        try client.exchange(method, path, body: body.map { Data($0.utf8) })
    }

    private func changes(_ method: String, _ path: String, _ body: String) throws -> [String] {
        let answer = try ask(method, path, body)
        try #require(answer.status == 200, "\(String(decoding: answer.body, as: UTF8.self))")
        return try JSON.decode(ChangeReport.self, from: answer.body).changes
    }

    private func setState(_ group: Int, _ state: String) throws -> [String] {
        try changes("PUT", "/v1/targets/\(target)/port-groups/\(group)/state", "{\"state\": \"\(state)\"}")
    }

    private func groups() throws -> [PortGroupStatus] {
        let answer = try ask("GET", "/v1/targets/\(target)")
        return try JSON.decode(TargetStatus.self, from: answer.body).portGroups
    }

    private func saved() throws -> String {
        String(decoding: try ask("GET", "/v1/configuration").body, as: UTF8.self)
    }

    private func apply(_ yaml: String) throws -> [String] {
        let answer = try client.exchange(
            "PUT", "/v1/configuration", type: "application/yaml", body: Data(yaml.utf8))
        try #require(answer.status == 200, "\(String(decoding: answer.body, as: UTF8.self))")
        return try JSON.decode(ChangeReport.self, from: answer.body).changes
    }

    @Test func socketsAreInTheGroupsOfTheirPorts() throws {
        try serve(yaml(twoGroups)) { a, b throws in
            #expect(try end(a) == "good")
            #expect(try end(b) == "2/40b")
            let page = try b.queues[2].run(command([0x12, 1, 0x83, 0, 255, 0], dataIn: 255)).dataIn
            #expect(page.contains([0x01, 0x14, 0, 4, 0, 0, 0, 2, 0x01, 0x15, 0, 4, 0, 0, 0, 2]))
            #expect(
                try groups() == [
                    PortGroupStatus(
                        id: 1, state: "active/optimized", preferred: true, explicit: true, statusCode: "none",
                        ports: [1]),
                    PortGroupStatus(
                        id: 2, state: "standby", preferred: false, explicit: true, statusCode: "none", ports: [2, 9]),
                ])
            let fronts = try JSON.decode([FrontStatus].self, from: ask("GET", "/v1/fronts").body)
            #expect(fronts.map(\.port) == [1, 2])
        }
    }

    @Test func operatorSwapsTheGroupsAndGuestsAreTold() throws {
        try serve(yaml(twoGroups)) { a, b throws in
            #expect(try setState(2, "active/optimized") == ["~ target \(target) port group 2: active/optimized"])
            #expect(try setState(1, "standby") == ["~ target \(target) port group 1: standby"])
            #expect(try setState(1, "standby") == [])
            for guest in [a, b] { #expect(try end(guest) == "6/2a06") }
            #expect(try end(a) == "2/40b")
            #expect(try end(b) == "good")
            #expect(try groups().map(\.statusCode) == ["implicit", "implicit"])
            #expect(try saved().contains("- { id: 1, state: standby, preferred: true, explicit: true, ports: [1] }"))
            // The file says what it said.
            #expect(
                try apply(yaml(twoGroups)) == [
                    "~ target \(target) port group 1: active/optimized", "~ target \(target) port group 2: standby",
                ])
            #expect(try end(b) == "6/2a06")
            #expect(try end(b) == "2/40b")
        }
    }

    @Test func whatAGuestSetsIsNoConfigurationAndStaysUntilTheOperatorSetsIt() throws {
        try serve(yaml(twoGroups)) { a, b throws in
            #expect(try end(b, set(0x1, 2)) == "good")
            #expect(try end(b) == "good")
            #expect(try end(a) == "6/2a06")
            #expect(try groups().map(\.state) == ["active/optimized", "active/non-optimized"])
            #expect(try groups().map(\.statusCode) == ["none", "explicit"])
            #expect(try saved().contains("state: standby"))
            #expect(try apply(yaml(twoGroups)) == [])
            #expect(try apply(yaml(twoGroups.replacing("true, ports: [1]", with: "true, ports: [1, 8]"))).count == 1)
            #expect(try groups().map(\.state) == ["active/optimized", "active/non-optimized"])
            #expect(try setState(2, "standby") == ["~ target \(target) port group 2: standby"])
            #expect(try groups().map(\.state) == ["active/optimized", "standby"])
            var told = ""
            _ = try client.follow("/v1/events?recent=true") { line in
                if line.contains("by a guest") { told = line }
                return told.isEmpty
            }
            #expect(told.contains("port group 2: active/non-optimized, set by a guest"))
        }
    }

    @Test func groupsComeAndGoWhileGuestsAreThere() throws {
        let symmetric = yaml("")
        try serve(symmetric) { a, b throws in
            #expect(try groups().map(\.ports) == [[1, 2]])
            #expect(try apply(yaml(twoGroups)) == ["~ target \(target) port-groups"])
            for code in ["6/3f03", "6/2a06", "2/40b"] { #expect(try end(b) == code) }
            for code in ["6/3f03", "6/2a06", "good"] { #expect(try end(a) == code) }
            #expect(try apply(symmetric) == ["~ target \(target) port-groups"])
            #expect(try groups().map(\.ports) == [[1, 2]])
            for code in ["6/3f03", "6/2a06", "good"] { #expect(try end(b) == code) }
        }
    }

    @Test func wrongRequestsChangeNothing() throws {
        try serve(yaml(twoGroups)) { _, b throws in
            let path = "/v1/targets/\(target)/port-groups"
            for (path, body, status) in [
                ("\(path)/3/state", #"{"state": "standby"}"#, 404), ("\(path)/x/state", #"{"state": "standby"}"#, 404),
                ("/v1/targets/naa.6000000000000009/port-groups/1/state", #"{"state": "standby"}"#, 404),
                ("\(path)/2/state", #"{"state": "offline"}"#, 400), ("\(path)/2/state", #"{"state": 1}"#, 400),
                ("\(path)/2/state", #"{}"#, 400),
            ] {
                #expect(try ask("PUT", path, body).status == status, "\(path) \(body)")
            }
            #expect(try end(b) == "2/40b")
        }
    }
}
