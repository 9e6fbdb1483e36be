// ControlOperationTests: operations on single objects over the control API: what they change, what they refuse, and
// what can be seen of them. Must not know: how the server reads requests.

import ControlAPI
import Foundation
import Glibc
import Logging
import Testing
import VhostUserInitiator

@testable import targetd

@Suite struct ControlOperationTests {
    private let folder: TemporaryFolder
    private var client: ControlClient { ControlClient(socket: folder("c")) }
    private let target = "naa.6000000000000001"
    private var unit: String { "/v1/targets/\(target)/luns/0" }

    init() throws { folder = try TemporaryFolder() }

    private var yaml: String {
        """
        control: { socket: \(folder("c")) }
        stop-timeout: 5s
        backstores:
          a: { type: ram, size: 1MiB }
        targets:
          \(target): { luns: { 0: a } }
        vhost-user-scsi:
          - { socket: \(folder("1")), targets: { 3: \(target) } }
        """
    }

    /// Runs `body` with a targetd that serves the configuration.
    ///
    /// - Parameter stopsItself: Whether `body` asks for the stop.
    private func serve(stopsItself: Bool = false, _ body: (RunningDaemon) throws -> Void) throws {
        let daemon = try RunningDaemon(["--config", folder.write("f.yaml", yaml)])
        try #require(daemon.waitUntilReady())
        try body(daemon)
        if !stopsItself { daemon.signal(SIGTERM) }
        let result = daemon.finish()
        #expect(result.status == 0, "\(result.errors)")
    }

    private func ask(_ method: String, _ path: String, _ body: String? = nil) throws -> ControlClient.Answer {
        try client.exchange(method, path, body: body.map { Data($0.utf8) })
    }

    private func changes(_ method: String, _ path: String, _ body: String? = nil) throws -> [String] {
        let answer = try ask(method, path, body)
        try #require(answer.status == 200, "\(String(decoding: answer.body, as: UTF8.self))")
        return try JSON.decode(ChangeReport.self, from: answer.body).changes
    }

    private func get<Value: Decodable>(_ path: String, _ type: Value.Type) throws -> Value {
        let answer = try client.exchange("GET", path)
        try #require(answer.status == 200, "\(String(decoding: answer.body, as: UTF8.self))")
        return try JSON.decode(type, from: answer.body)
    }

    private func saved() throws -> String {
        String(decoding: try client.exchange("GET", "/v1/configuration").body, as: UTF8.self)
    }

    private func read(_ block: UInt8 = 0, lun: UInt16 = 0) -> SCSICommand {
        SCSICommand(.flat(target: 3, lun: lun), [0x28, 0, 0, 0, 0, block, 0, 0, 1, 0], dataOut: [], dataIn: 512)
    }

    private func write() -> SCSICommand {
        SCSICommand(
            .flat(target: 3, lun: 0), [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], dataOut: [UInt8](repeating: 1, count: 512),
            dataIn: 0)
    }

    private var secondSocket: String { "/v1/fronts/" + folder("2").replacing("/", with: "%2F") }

    @Test func objectsComeAndGoOneByOne() throws {
        try serve { _ throws in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood)
            // A medium that nobody uses is not opened, but it is there.
            #expect(try changes("PUT", "/v1/backstores/b", #"{"type": "ram", "size": "2MiB"}"#) == [])
            let second = "/v1/targets/\(target)/luns/1"
            #expect(
                try changes("PUT", second, #"{"backstore": "b"}"#) == ["+ backstore b", "+ target \(target) LUN 1"])
            #expect(try get(second, LogicalUnitStatus.self).size == 2 << 20)
            #expect(try guest.queues[2].runPastUnitAttentions(read(lun: 1)).isGood)
            #expect(try changes("PUT", "/v1/targets/naa.6000000000000002", "{}") == ["+ target naa.6000000000000002"])
            let front = #"{"targets": {"0": "naa.6000000000000002"}}"#
            #expect(try changes("PUT", secondSocket, front) == ["+ vhost-user-scsi \(folder("2"))"])
            #expect(try get(secondSocket, FrontStatus.self).targets == ["0": "naa.6000000000000002"])
            // Nothing that is used goes.
            #expect(try ask("DELETE", "/v1/backstores/b").status == 409)
            #expect(try ask("DELETE", "/v1/targets/naa.6000000000000002").status == 409)
            let path = "/v1/targets/naa.6000000000000002?force=true"
            #expect(
                try changes("DELETE", path) == [
                    "- vhost-user-scsi \(folder("2"))", "- target naa.6000000000000002",
                ])
            #expect(try changes("DELETE", second) == ["- target \(target) LUN 1", "- backstore b"])
            #expect(try changes("DELETE", "/v1/backstores/b") == [])
            #expect(
                try ConfigurationReader.read(saved(), name: "").configuration
                    == ConfigurationReader.read(yaml, name: "").configuration)
            #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood)
        }
    }

    @Test func guestLearnsOfWriteProtection() throws {
        try serve { _ throws in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(write()).isGood)
            let expected = ["~ target \(target) LUN 0 read-only: true"]
            #expect(try changes("PUT", unit + "/read-only", #"{"read-only": true}"#) == expected)
            let attention = try guest.queues[2].run(write())
            #expect(attention.senseKey == 6 && attention.additionalSense == 0x2a01)
            #expect(try guest.queues[2].run(write()).senseKey == 7)
            #expect(try guest.queues[2].run(read()).isGood)
            #expect(try saved().contains("read-only: true"))
            _ = try changes("PUT", unit + "/read-only", #"{"read-only": false}"#)
            #expect(try guest.queues[2].runPastUnitAttentions(write()).isGood)
        }
    }

    @Test func limitsAreChangedWhileCommandsWait() throws {
        try serve { _ throws in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood)
            #expect(
                try changes("PUT", unit + "/limits", #"{"iops": 1, "burst": "0s"}"#) == [
                    "~ target \(target) LUN 0 limits"
                ])
            #expect(try guest.queues[2].run(read()).isGood)
            let waiting = guest.queues[2].submit(read())
            var tasks: [TaskReport] = []
            while tasks.isEmpty { tasks = try get("/v1/tasks", [TaskReport].self) }
            #expect(tasks.map(\.waitsFor) == ["quota"])
            #expect(tasks.map(\.cdb) == ["28000000000000000100"])
            #expect(tasks.map(\.initiator) == ["vhost-user:\(folder("1"))"])
            #expect(try changes("PUT", unit + "/limits", "{}") == ["~ target \(target) LUN 0 limits"])
            #expect(try waiting.wait().isGood)
            // The same for the guest as a whole.
            let front = "/v1/fronts/" + folder("1").replacing("/", with: "%2F")
            #expect(
                try changes("PUT", front + "/limits", #"{"bandwidth": "1MiB"}"#) == [
                    "~ vhost-user-scsi \(folder("1")) limits"
                ])
            #expect(try saved().contains("limits: { bandwidth: 1MiB }"))
            #expect(try guest.queues[2].run(read()).isGood)
        }
    }

    @Test func commandsThatWaitForALimitDoNotHoldUpTheEnd() throws {
        try serve { _ throws in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood)
            _ = try changes("PUT", unit + "/limits", #"{"iops": 1, "burst": "0s"}"#)
            // Twenty seconds' worth: the stop, which waits for 5 s, ends in time only if the limit is lifted.
            for _ in 0..<20 { _ = guest.queues[2].submit(read()) }
            var tasks: [TaskReport] = []
            while tasks.count < 10 { tasks = try get("/v1/tasks", [TaskReport].self) }
        }
    }

    @Test func traceKeepsTheLastCommands() throws {
        try serve { _ throws in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood)
            #expect(try get(unit + "/trace", TraceReport.self).capacity == 0)
            #expect(try ask("PUT", unit + "/trace", #"{"entries": 2}"#).status == 200)
            for block in 0..<4 { #expect(try guest.queues[2].run(read(UInt8(block))).isGood) }
            let trace = try get(unit + "/trace", TraceReport.self)
            #expect(trace.capacity == 2)
            #expect(trace.entries.map(\.cdb) == ["28000000000200000100", "28000000000300000100"])
            #expect(trace.entries.allSatisfy { $0.status == "good" && $0.bytes == 512 })
            #expect(try ask("DELETE", unit + "/trace").status == 200)
            #expect(try get(unit + "/trace", TraceReport.self).entries == [])
        }
    }

    @Test func frozenUnitLetsItsCommandsWait() throws {
        try serve { _ throws in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood)
            #expect(try changes("POST", unit + "/freeze") == ["~ target \(target) LUN 0 frozen"])
            #expect(try changes("POST", unit + "/freeze") == [])
            #expect(try get(unit, LogicalUnitStatus.self).frozen)
            let waiting = guest.queues[2].submit(read())
            var tasks: [TaskReport] = []
            while tasks.isEmpty { tasks = try get("/v1/tasks", [TaskReport].self) }
            #expect(tasks.map(\.waitsFor) == ["thaw"])
            #expect(try changes("POST", unit + "/thaw") == ["~ target \(target) LUN 0 thawed"])
            #expect(try waiting.wait().isGood)
            #expect(try changes("POST", unit + "/thaw") == [])
        }
    }

    /// The socket whose queue stopped first still waits when the other one is done.
    @Test func drainTimeoutOfASocketIsItsOwn() throws {
        try serve { _ throws in
            let guests = try [("long", "10min"), ("short", "100ms")].map { name, timeout in
                let front = "/v1/fronts/" + folder(name).replacing("/", with: "%2F")
                let body = #"{"targets": {"3": "\#(target)"}, "drain-timeout": "\#(timeout)"}"#
                #expect(try ask("PUT", front, body).status == 200)
                return try VhostUserFrontEnd.started(path: folder(name))
            }
            for guest in guests { #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood) }
            _ = try changes("POST", unit + "/freeze")
            let commands = guests.map { $0.queues[2].submit(read()) }
            while try get("/v1/tasks", [TaskReport].self).count < 2 {}
            try guests[0].sendStop(guests[0].queues[2])
            _ = try guests[1].stopAnywhere(guests[1].queues[2])
            try guests[1].queues[2].collect()
            #expect(try commands[1].result().response == 5, "BUSY")
            #expect(try get("/v1/tasks", [TaskReport].self).count == 1)
            _ = try changes("POST", unit + "/thaw")
            _ = try guests[0].awaitStop(guests[0].queues[2])
            try guests[0].queues[2].collect()
            #expect(try commands[0].result().isGood)
        }
    }

    /// Freezes the unit with a command of the guest in it.
    private func freezeWithCommand(_ guest: VhostUserFrontEnd) throws {
        #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood)
        _ = try changes("POST", unit + "/freeze")
        _ = guest.queues[2].submit(read())
        while try get("/v1/tasks", [TaskReport].self).isEmpty {}
    }

    private var firstSocket: String { "/v1/fronts/" + folder("1").replacing("/", with: "%2F") }

    @Test func forceTakesASocketAwayWithCommandsThatCannotEnd() throws {
        try serve { _ throws in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            try freezeWithCommand(guest)
            #expect(try changes("DELETE", firstSocket + "?force=true") == ["- vhost-user-scsi \(folder("1"))"])
            #expect(try get("/v1/tasks", [TaskReport].self) == [])
            #expect(try get(unit, LogicalUnitStatus.self).aborted == 1)
            #expect(try get(unit, LogicalUnitStatus.self).frozen)
        }
    }

    @Test func removalThatWaitsCanBeForcedOrWhatItWaitsForBeThawed() throws {
        for force in [true, false] {
            try serve { _ throws in
                let guest = try VhostUserFrontEnd.started(path: folder("1"))
                try freezeWithCommand(guest)
                let answer = Later { [firstSocket, client] in try client.exchange("DELETE", firstSocket).status }
                func running() throws -> Bool {
                    try get("/v1/operations", [OperationStatus].self).contains {
                        $0.state == "running" && $0.what.hasPrefix("remove front")
                    }
                }
                while try !running() {}
                if force {
                    #expect(try changes("DELETE", firstSocket + "?force=true") == [])
                } else {
                    #expect(try changes("POST", unit + "/thaw").count == 1)
                }
                #expect(try answer.value == 200)
                #expect(try get(unit, LogicalUnitStatus.self).aborted == (force ? 1 : 0))
                #expect(try get("/v1/fronts", [FrontStatus].self).isEmpty)
                // What acted beside it took nothing of its progress.
                let removal = try get("/v1/operations", [OperationStatus].self).first { $0.what.hasPrefix("remove") }
                #expect(removal?.state == "done" && removal?.done == 1 && removal?.total == 1)
            }
        }
    }

    @Test func forceTakesAMediumAwayWithItsUnit() throws {
        try serve { _ throws in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood)
            #expect(
                try changes("DELETE", "/v1/backstores/a?force=true") == ["- target \(target) LUN 0", "- backstore a"])
            #expect(try guest.queues[2].runPastUnitAttentions(read()).additionalSense == 0x2500)
        }
    }

    @Test func mediumOfARemovableUnitComesAndGoes() throws {
        try serve { _ throws in
            _ = try changes("PUT", "/v1/backstores/b", #"{"type": "ram", "size": "2MiB"}"#)
            _ = try changes("PUT", "/v1/backstores/d", #"{"type": "ram", "size": "3MiB"}"#)
            let second = "/v1/targets/\(target)/luns/1"
            func settings(_ backstore: String) -> String {
                #"{"backstore": "\#(backstore)", "removable": true, "name": "naa.3000000000000001"}"#
            }
            _ = try changes("PUT", second, settings("b"))
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(read(lun: 1)).isGood)
            // A guest that has locked the door is asked, and may be overruled.
            let prevent = SCSICommand(.flat(target: 3, lun: 1), [0x1e, 0, 0, 0, 1, 0], dataOut: [], dataIn: 0)
            #expect(try guest.queues[2].run(prevent).isGood)
            #expect(try ask("POST", second + "/eject").status == 409)
            #expect(try changes("POST", second + "/eject?force=true") == ["~ target \(target) LUN 1 ejected"])
            #expect(try get(second, LogicalUnitStatus.self).medium == "absent")
            #expect(try guest.queues[2].runPastUnitAttentions(read(lun: 1)).additionalSense == 0x3a00)
            #expect(try changes("POST", second + "/load") == ["~ target \(target) LUN 1 loaded"])
            #expect(try guest.queues[2].runPastUnitAttentions(read(lun: 1)).isGood)
            // Another medium, while the unit stays what it is.
            #expect(
                try changes("PUT", second, settings("d")) == [
                    "+ backstore d", "~ target \(target) LUN 1 medium: d", "- backstore b",
                ])
            let attention = try guest.queues[2].run(read(lun: 1))
            #expect(attention.senseKey == 6 && attention.additionalSense == 0x2800)
            #expect(try guest.queues[2].runPastUnitAttentions(read(lun: 1)).isGood)
            #expect(try get(second, LogicalUnitStatus.self).size == 3 << 20)
            #expect(try ask("POST", unit + "/eject").status == 409)
        }
    }

    @Test func resetReachesTheGuest() throws {
        try serve { _ throws in
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(read()).isGood)
            #expect(try changes("POST", unit + "/reset") == ["~ target \(target) LUN 0 reset: 0 commands ended"])
            let attention = try guest.queues[2].run(read())
            #expect(attention.senseKey == 6 && attention.additionalSense == 0x2903)
        }
    }

    @Test func operationsAreTold() throws {
        try serve { _ throws in
            _ = try changes("PUT", unit + "/read-only", #"{"read-only": true}"#)
            _ = try ask("DELETE", "/v1/backstores/nothing")
            let operations = try get("/v1/operations", [OperationStatus].self)
            #expect(operations.map(\.state) == ["done", "failed"])
            #expect(operations.map(\.what) == ["protect \(target) LUN 0", "remove backstore nothing"])
            #expect(operations.map(\.total) == [1, 0] && operations.map(\.done) == [1, 0])
            #expect(operations[1].message == "There is no backstore nothing.")
        }
    }

    @Test func logLevelIsPartOfWhatIsSaved() throws {
        try serve { _ throws in
            #expect(try changes("PUT", "/v1/log-level", #"{"level": "debug"}"#) == ["~ log-level"])
            #expect(try saved().contains("log-level: debug"))
            #expect(try ask("PUT", "/v1/log-level", #"{"level": "loud"}"#).status == 400)
        }
    }

    // MARK: Refusals

    @Test(arguments: [
        ("PUT", "/v1/backstores/b", #"{"type": "ram""#, 400), ("PUT", "/v1/backstores/b", "type: ram", 400),
        ("PUT", "/v1/backstores/b", "[]", 422), ("PUT", "/v1/backstores/b", #"{"type": "tape"}"#, 422),
        ("PUT", "/v1/backstores/b", #"{"type": "ram", "size": "1MiB", "colour": 1}"#, 422),
        ("PUT", "/v1/backstores/..%2Fb", #"{"type": "ram", "size": "1MiB"}"#, 422),
        ("PUT", "/v1/backstores/../b", #"{"type": "ram", "size": "1MiB"}"#, 404),
        ("PUT", "/v1/backstores/b", #"{"type": "file", "path": "../../etc/passwd"}"#, 422),
        ("PUT", "/v1/backstores/a", #"{"type": "ram", "size": "2MiB"}"#, 409),
        ("DELETE", "/v1/backstores/b", "", 404), ("DELETE", "/v1/backstores/b?force=true", "", 404),
        ("DELETE", "/v1/backstores/a?colour=true", "", 400),
        ("PUT", "/v1/targets/naa.1", "{}", 404), ("PUT", "/v1/targets/naa.6000000000000009", #"{"lun": {}}"#, 422),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/01", #"{"backstore": "a"}"#, 404),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/16384", #"{"backstore": "a"}"#, 404),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/1", #"{"backstore": "a"}"#, 422),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/1", #"{"backstore": "x"}"#, 422),
        ("PUT", "/v1/targets/naa.6000000000000009/luns/1", #"{"backstore": "a"}"#, 404),
        ("DELETE", "/v1/targets/naa.6000000000000001/luns/7", "", 404),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/0/limits", #"{"iops": 0}"#, 422),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/0/limits", #"{"iops": "many"}"#, 422),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/0/limits", #"{"bandwidth": "1B"}"#, 422),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/0/limits", #"{"burst": "1s"}"#, 422),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/0/read-only", #"{"read-only": 1}"#, 400),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/0/read-only", #"{"read-only": true, "x": 1}"#, 400),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/0/trace", #"{"entries": 0}"#, 400),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/0/trace", #"{"entries": true}"#, 400),
        ("PUT", "/v1/targets/naa.6000000000000001/luns/0/trace", #"{"entries": 1e9}"#, 400),
        ("POST", "/v1/targets/naa.6000000000000001/luns/3/reset", "", 404),
        ("GET", "/v1/targets/naa.6000000000000001/luns/3/trace", "", 404),
        ("PUT", "/v1/fronts/vm1.sock", #"{"targets": {"0": "naa.6000000000000001"}}"#, 422),
        ("PUT", "/v1/fronts/%2Ftmp%2Fx", #"{"socket": "/tmp/y", "targets": {"0": "naa.6000000000000001"}}"#, 400),
        ("PUT", "/v1/fronts/%2Ftmp%2Fx", #"{"targets": {"0": "naa.6000000000000007"}}"#, 422),
        ("PUT", "/v1/fronts/%2Fdev%2Fnull", #"{"targets": {"0": "naa.6000000000000001"}}"#, 422),
        ("DELETE", "/v1/fronts/%2Ftmp%2Fx", "", 404),
        ("DELETE", "/v1/fronts/%2Ftmp%2Fx?force=true", "", 404), ("GET", "/v1/events?follow=true", "", 400),
    ])
    func wrongRequestChangesNothing(method: String, path: String, body: String, status: Int) throws {
        try serve { _ throws in
            let before = try saved()
            let answer = try ask(method, path, body.isEmpty ? nil : body)
            #expect(answer.status == status, "\(String(decoding: answer.body, as: UTF8.self))")
            #expect(try saved() == before)
        }
    }

    // MARK: Events

    @Test func eventsComeAsTheyHappen() throws {
        try serve(stopsItself: true) { daemon throws in
            let descriptor = try client.connect()
            defer { close(descriptor) }
            try ControlClient.send(Data("GET /v1/events?recent=true HTTP/1.1\r\nHost: x\r\n\r\n".utf8), to: descriptor)
            var text = ""
            func expect(_ part: String) {
                var bytes = [UInt8](repeating: 0, count: 4096)
                while !text.contains(part) {
                    let count = unsafe recv(descriptor, &bytes, bytes.count, 0)
                    guard count > 0 else { return #expect(Bool(false), "the stream ended before \(part): \(text)") }
                    text += String(decoding: bytes.prefix(count), as: UTF8.self)
                }
            }
            // What happened before comes first.
            expect(#""text":"+ vhost-user-scsi \#(folder("1"))""#)
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            expect(#""kind":"guest-connected""#)
            _ = try changes("PUT", unit + "/read-only", #"{"read-only": true}"#)
            expect("read-only: true")
            _ = try ask("DELETE", "/v1/backstores/nothing")
            expect(#""kind":"operation-failed""#)
            _ = guest
            // A stop ends the stream as a whole answer.
            daemon.signal(SIGTERM)
            expect("\r\n0\r\n\r\n")
        }
    }

    @Test func listenersHaveALimitAndThoseWhoLeaveMakeRoom() throws {
        try serve { _ throws in
            var open: [Int32] = []
            defer { for descriptor in open { close(descriptor) } }
            let request = Data("GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n".utf8)
            func firstByte(_ descriptor: Int32) -> String {
                var bytes = [UInt8](repeating: 0, count: 12)
                _ = unsafe recv(descriptor, &bytes, bytes.count, Int32(MSG_WAITALL))
                return String(decoding: bytes.suffix(3), as: UTF8.self)
            }
            for _ in 0..<EventHub.listeners {
                open.append(try client.connect())
                try ControlClient.send(request, to: open.last!)
                #expect(firstByte(open.last!) == "200")
            }
            #expect(try client.exchange("GET", "/v1/events").status == 409)
            close(open.removeLast())
            // The server hears of it on its own time.
            var status = "409"
            while status != "200" {
                let descriptor = try client.connect()
                try ControlClient.send(request, to: descriptor)
                status = firstByte(descriptor)
                close(descriptor)
            }
        }
    }

    @Test func slowListenerIsDroppedAndHoldsNobodyUp() async {
        let hub = EventHub()
        let slow = hub.listen(includesRecent: false)!
        let fast = hub.listen(includesRecent: false)!
        var iterator = fast.makeAsyncIterator()
        for number in 0..<EventHub.pending + 10 {
            hub.publish(.changed, subject: nil, "\(number)")
            #expect(await iterator.next()?.text == "\(number)")
        }
        // It gets what there was room for, then the end.
        #expect(await slow.reduce(0) { count, _ in count + 1 } == EventHub.pending)
    }

    // MARK: The log

    @Test func limitLetsABurstThroughAndThenOneInAWhile() {
        var limit = LogRate()
        let start: UInt64 = 1_000_000_000_000
        let first = (0..<1000).compactMap { _ in limit.admit(start) }
        #expect(first.count == LogRate.burst)
        #expect(limit.admit(start + LogRate.interval) == 1000 - LogRate.burst)
        #expect(limit.admit(start + LogRate.interval) == nil)
    }

    @Test func guestThatComesAndGoesWithoutEndFillsNoLog() throws {
        let daemon = try RunningDaemon(["--config", folder.write("f.yaml", yaml)])
        try #require(daemon.waitUntilReady())
        for _ in 0..<300 {
            let descriptor = try ControlClient(socket: folder("1")).connect()
            close(descriptor)
        }
        // Those that came while another was there were turned away, which is a message too.
        #expect(try get("/v1/fronts", [FrontStatus].self)[0].connections > 0)
        daemon.signal(SIGTERM)
        let result = daemon.finish()
        #expect(result.status == 0)
        let lines = result.errors.split(separator: "\n").count { $0.contains("guest") || $0.contains("front-end") }
        #expect(lines > 0 && lines < 60, "\(lines) lines: \(result.errors)")
    }
}

/// What a thread of its own returns.
private final class Later: @unchecked Sendable {
    private let done = DispatchSemaphore(value: 0)
    private var result: Result<Int, any Error>?

    init(_ body: @escaping @Sendable () throws -> Int) {
        Thread {
            self.result = Result { try body() }
            self.done.signal()
        }.start()
    }

    /// Waits for it.
    var value: Int {
        get throws {
            done.wait()
            return try result!.get()
        }
    }
}
