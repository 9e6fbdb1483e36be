// ReservationOperationTests: reservations over the control API: shown, cleared, taken to another targetd, and what
// initiators see of that. Must not know: the bytes of a state.

import ControlAPI
import Foundation
import Glibc
import Testing
import VhostUserInitiator

@testable import targetd

@Suite struct ReservationOperationTests {
    private let folder: TemporaryFolder
    private var client: ControlClient { ControlClient(socket: folder("c")) }
    private let target = "naa.6000000000000001"
    private var path: String { "/v1/targets/\(target)/luns/0/reservations" }

    init() throws { folder = try TemporaryFolder() }

    /// A target with two sockets, hence two initiators.
    private func serve(
        stateDirectory: String? = "state", name: String = "naa.3000000000000abc", isReady: Bool = true,
        _ body: (_ a: VhostUserFrontEnd, _ b: VhostUserFrontEnd) throws -> Void
    ) throws {
        let yaml = """
            control: { socket: \(folder("c")) }
            \(stateDirectory.map { "state-directory: \(folder($0))" } ?? "")
            backstores: { a: { type: ram, size: 1MiB } }
            targets: { \(target): { luns: { 0: { backstore: a, name: \(name) } } } }
            vhost-user-scsi:
              - { socket: \(folder("1")), targets: { 0: \(target) } }
              - { socket: \(folder("2")), targets: { 0: \(target) } }
            """
        let daemon = try RunningDaemon(["--config", folder.write("f.yaml", yaml)])
        try #require(daemon.waitUntilReady())
        do {
            let guests = try (1...2).map { try VhostUserFrontEnd.started(path: folder("\($0)")) }
            for guest in guests {
                let isGood = try guest.queues[2].runPastUnitAttentions(ready).isGood
                #expect(isGood || !isReady)
            }
            try body(guests[0], guests[1])
        }
        daemon.signal(SIGTERM)
        let result = daemon.finish()
        #expect(result.status == 0, "\(result.errors)")
    }

    private func command(_ cdb: [UInt8], _ list: [UInt8] = []) -> SCSICommand {
        SCSICommand(.flat(target: 0, lun: 0), cdb, dataOut: list)
    }

    private var ready: SCSICommand { command([0, 0, 0, 0, 0, 0]) }
    private var write: SCSICommand {
        command([0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], [UInt8](repeating: 1, count: 512))
    }

    /// PERSISTENT RESERVE OUT of type WRITE EXCLUSIVE.
    private func reserveOut(_ action: UInt8, key: UInt8 = 0, newKey: UInt8 = 0, persists: Bool = false) -> SCSICommand {
        var list = [UInt8](repeating: 0, count: 24)
        (list[7], list[15], list[20]) = (key, newKey, persists ? 1 : 0)
        return command([0x5f, action, 0x01, 0, 0, 0, 0, 0, 24, 0], list)
    }

    private func reserve(_ guest: VhostUserFrontEnd, persists: Bool = false) throws {
        #expect(try guest.queues[2].run(reserveOut(0, newKey: 0xa, persists: persists)).isGood)
        #expect(try guest.queues[2].run(reserveOut(1, key: 0xa)).isGood)
    }

    private func ask(_ method: String, _ path: String, _ body: Data? = nil) throws -> ControlClient.Answer {
        try client.exchange(method, path, body: body)
    }

    private func get<Value: Decodable>(_ path: String, _ type: Value.Type) throws -> Value {
        let answer = try ask("GET", path)
        try #require(answer.status == 200, "\(String(decoding: answer.body, as: UTF8.self))")
        return try JSON.decode(type, from: answer.body)
    }

    private func changes(_ method: String, _ path: String, _ body: Data? = nil) throws -> [String] {
        let answer = try ask(method, path, body)
        try #require(answer.status == 200, "\(String(decoding: answer.body, as: UTF8.self))")
        return try JSON.decode(ChangeReport.self, from: answer.body).changes
    }

    private static let conflict: UInt8 = 0x18

    @Test func reservationIsShownAndClearedAndItsRegistrantIsTold() throws {
        try serve { a, b throws in
            #expect(try get("/v1/reservations", [ReservationReport].self) == [])
            try reserve(a, persists: true)
            let report = try get(path, ReservationReport.self)
            #expect(report.type == "write-exclusive" && report.persists && report.generation == 1)
            #expect(report.registrants.map(\.initiator) == ["vhost-user:\(folder("1"))"])
            #expect(report.registrants.map(\.key) == ["000000000000000a"])
            #expect(report.registrants.map(\.holds) == [true])
            #expect(try get("/v1/reservations", [ReservationReport].self) == [report])
            #expect(try b.queues[2].run(write).status == Self.conflict)

            #expect(try changes("DELETE", path) == ["~ target \(target) LUN 0 reservations cleared: 1 registrant"])
            let attention = try a.queues[2].run(ready)
            #expect(attention.senseKey == 6 && attention.additionalSense == 0x2a03)
            #expect(try b.queues[2].run(write).isGood)
            #expect(try get("/v1/reservations", [ReservationReport].self) == [])
            #expect(try changes("DELETE", path) == [])
        }
        // For good.
        try serve { _, _ throws in #expect(try get(path, ReservationReport.self).registrants == []) }
    }

    @Test(arguments: [true, false])
    func reservationGoesToAnotherTargetd(persists: Bool) throws {
        var exported = Data()
        var before: ReservationReport?
        try serve(stateDirectory: "here") { a, _ throws in
            try reserve(a, persists: persists)
            exported = try ask("GET", path + "/state").body
            before = try get(path, ReservationReport.self)
        }
        for _ in 0..<2 {
            try serve(stateDirectory: "there") { a, b throws in
                #expect(
                    try changes("PUT", path + "/state", exported) == [
                        "~ target \(target) LUN 0 reservations imported: 1 registrant"
                    ])
                #expect(try get(path, ReservationReport.self) == before)
                #expect(try b.queues[2].run(write).status == Self.conflict)
                // The holder goes on: nothing has changed for it.
                #expect(try a.queues[2].run(write).isGood)
            }
            // There, it survives a restart if it was to.
            try serve(stateDirectory: "there") { _, b throws in
                #expect(try b.queues[2].run(write).status == (persists ? Self.conflict : 0))
            }
        }
    }

    @Test func whatIsNoStateOfTheUnitIsRefused() throws {
        var exported = ReservationState(name: "", state: "")
        try serve { a, _ throws in
            try reserve(a, persists: true)
            exported = try get(path + "/state", ReservationState.self)
            var damaged = exported
            damaged.state = Data(Data(base64Encoded: exported.state)!.dropLast()).base64EncodedString()
            var text = exported
            text.state = "?"
            for (body, status) in [
                (JSON.encode(damaged), 400), (JSON.encode(text), 400), (Data("{}".utf8), 400), (Data("[]".utf8), 400),
                (Data(#"{"name": "naa.3000000000000abc", "state": "", "key": 1}"#.utf8), 400),
                (Data(#"{"name": 1, "state": ""}"#.utf8), 400),
                (JSON.encode(ReservationState(name: "naa.3000000000000abd", state: exported.state)), 409),
            ] {
                #expect(
                    try ask("PUT", path + "/state", body).status == status, "\(String(decoding: body, as: UTF8.self))")
            }
            #expect(try get(path, ReservationReport.self).registrants.count == 1)
            #expect(try ask("GET", "/v1/targets/\(target)/luns/7/reservations").status == 404)
            #expect(try ask("DELETE", "/v1/targets/\(target)/luns/7/reservations").status == 404)
            #expect(try ask("PUT", "/v1/targets/\(target)/luns/7/reservations/state", exported).status == 404)
        }
        // Nothing promises there what was promised here; and another unit's are not this one's.
        try serve(stateDirectory: nil) { _, _ throws in
            #expect(try ask("PUT", path + "/state", JSON.encode(exported)).status == 409)
        }
        try serve(name: "naa.3000000000000abe") { _, _ throws in
            #expect(try ask("PUT", path + "/state", JSON.encode(exported)).status == 409)
            exported.name = "naa.3000000000000abe"
            #expect(try ask("PUT", path + "/state", JSON.encode(exported)).status == 400)
            #expect(try get(path, ReservationReport.self).isEmpty)
        }
    }

    private func ask(_ method: String, _ path: String, _ body: ReservationState) throws -> ControlClient.Answer {
        try ask(method, path, JSON.encode(body))
    }

    @Test func lostReservationsAreShownAndClearedOrImported() throws {
        var exported = Data()
        for imports in [false, true] {
            try serve { a, _ throws in
                try reserve(a, persists: true)
                exported = try ask("GET", path + "/state").body
            }
            let file = URL(fileURLWithPath: folder("state/naa.3000000000000abc"))
            try Data(contentsOf: file).dropLast().write(to: file)
            try serve(isReady: false) { a, b throws in
                let report = try get(path, ReservationReport.self)
                #expect(report.lost && report.registrants.isEmpty)
                #expect(try get("/v1/reservations", [ReservationReport].self) == [report])
                let done = try imports ? changes("PUT", path + "/state", exported) : changes("DELETE", path)
                #expect(done.count == 1)
                #expect(try !get(path, ReservationReport.self).lost)
                #expect(try a.queues[2].runPastUnitAttentions(write).isGood)
                #expect(try b.queues[2].runPastUnitAttentions(write).status == (imports ? Self.conflict : 0))
            }
        }
    }

    @Test func reservationOfTheOlderKindEndsWithAReset() throws {
        try serve { a, b throws in
            #expect(try a.queues[2].run(command([0x16, 0, 0, 0, 0, 0])).isGood)
            #expect(try get(path, ReservationReport.self).reservedBy == "vhost-user:\(folder("1"))")
            #expect(try get("/v1/reservations", [ReservationReport].self).count == 1)
            #expect(try b.queues[2].run(write).status == Self.conflict)
            #expect(try ask("DELETE", path).status == 409)
            _ = try changes("POST", "/v1/targets/\(target)/luns/0/reset")
            #expect(try b.queues[2].runPastUnitAttentions(write).isGood)
            #expect(try get(path, ReservationReport.self).isEmpty)
        }
    }
}
