// ConcurrentOperationTests: many clients change objects at random at once, while front-ends do I/O and come and go: all
// that was answered with success is there at the end, and nothing else. Must not know: how operations queue.

import ControlAPI
import Foundation
import Glibc
import Testing
import VhostUserInitiator

@testable import targetd

/// A small generator of numbers that one seed determines (SplitMix64).
private struct Generator: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var value = state
        value = (value ^ (value >> 30)) &* 0xbf58_476d_1ce4_e5b9
        value = (value ^ (value >> 27)) &* 0x94d0_49bb_1331_11eb
        return value ^ (value >> 31)
    }
}

/// One client with objects of its own: a target, media, a socket. What it believes to be there is its part of the
/// model.
private struct Client {
    let number: Int
    let control: ControlClient
    let socket: String
    /// The file of the medium that is one, and its size.
    let file: String
    var fileSize: UInt64 = 1 << 20
    var generator: Generator
    var backstores: [String: BackstoreConfiguration] = [:]
    var target: TargetConfiguration?
    var front: VhostUserFrontConfiguration?

    var name: NAAName { NAAName(0x6000_0000_0000_1000 + UInt64(number)) }
    private var path: String { "/v1/targets/\(name)" }

    /// Medium 4 is a file, the others are memory.
    private var fileMedium: String { "c\(number)-4" }

    private func isUsed(_ medium: String) -> Bool {
        target?.logicalUnits.values.contains { $0.backstore == medium } ?? false
    }

    private var frontPath: String { "/v1/fronts/" + socket.replacing("/", with: "%2F") }
    private var force: String { "?force=true" }

    private func send(_ method: String, _ path: String, _ body: String? = nil) throws -> Int {
        try control.exchange(method, path, body: body.map { Data($0.utf8) }).status
    }

    /// One operation. `false`: the answer is not the one that the model demands.
    mutating func step() throws -> Bool {
        let medium = "c\(number)-\(Int.random(in: 0..<5, using: &generator))"
        let lun = Int.random(in: 0..<3, using: &generator)
        let unit = "\(path)/luns/\(lun)"
        let settings = target?.logicalUnits[lun]
        let isForced = Bool.random(using: &generator)
        switch Int.random(in: 0..<20, using: &generator) {
        case 0, 1, 2: return try putMedium(medium)
        case 3:
            let status = try send("DELETE", "/v1/backstores/\(medium)" + (isForced ? force : ""))
            if isUsed(medium), !isForced { return status == 409 }
            for (lun, unit) in target?.logicalUnits ?? [:] where unit.backstore == medium {
                target!.logicalUnits[lun] = nil
            }
            return status == (backstores.removeValue(forKey: medium) == nil ? 404 : 200)
        case 13: return try resize()
        case 14:
            let status = try send("POST", unit + "/freeze")
            return try status == send("POST", unit + "/thaw") && status == (settings == nil ? 404 : 200)
        case 15: return try send("DELETE", unit + "/reservations") == (settings == nil ? 404 : 200)
        case 16:
            let rate = Int.random(in: 100..<10_000, using: &generator)
            front?.limits.operationsPerSecond = UInt64(rate)
            return try send("PUT", frontPath + "/limits", #"{"iops": \#(rate)}"#) == (front == nil ? 404 : 200)
        case 17 where Int.random(in: 0..<4, using: &generator) == 0:
            let status = try send("DELETE", path + (isForced ? force : ""))
            if front != nil, !isForced { return status == 409 }
            let wasThere = target != nil
            (target, front) = (nil, nil)
            return status == (wasThere ? 200 : 404)
        case 4, 17:
            if target != nil { return true }
            target = TargetConfiguration()
            return try send("PUT", path, "{}") == 200
        case 5, 6, 18, 19:
            guard let before = target else { return try send("PUT", unit, #"{"backstore": "x"}"#) == 404 }
            let status = try send("PUT", unit, #"{"backstore": "\#(medium)"}"#)
            var others = before
            others.logicalUnits[lun] = nil
            if others.logicalUnits.values.contains(where: { $0.backstore == medium }) || backstores[medium] == nil {
                return status == 422
            }
            target!.logicalUnits[lun] = LogicalUnitSettings(backstore: medium)
            return status == 200
        case 7:
            let status = try send("DELETE", unit + (isForced ? force : ""))
            target?.logicalUnits[lun] = nil
            return status == (settings == nil ? 404 : 200)
        case 8:
            let isReadOnly = Bool.random(using: &generator)
            let status = try send("PUT", unit + "/read-only", #"{"read-only": \#(isReadOnly)}"#)
            if settings != nil { target!.logicalUnits[lun]!.readOnly = isReadOnly }
            return status == (settings == nil ? 404 : 200)
        case 9:
            let rate = Int.random(in: 100..<10_000, using: &generator)
            let status = try send("PUT", unit + "/limits", #"{"iops": \#(rate)}"#)
            if settings != nil { target!.logicalUnits[lun]!.limits.operationsPerSecond = UInt64(rate) }
            return status == (settings == nil ? 404 : 200)
        case 10:
            guard front == nil else {
                front = nil
                return try send("DELETE", frontPath + (isForced ? force : "")) == 200
            }
            let body = #"{"targets": {"0": "\#(name)"}}"#
            let status = try send("PUT", frontPath, body)
            guard target != nil else { return status == 422 }
            front = VhostUserFrontConfiguration(socket: socket, targets: [0: name])
            return status == 200
        case 11:
            let status = try send("POST", unit + "/" + (Bool.random(using: &generator) ? "reset" : "thaw"))
            return status == (settings == nil ? 404 : 200)
        default:
            let status = try send("PUT", unit + "/trace", #"{"entries": 16}"#)
            return status == (settings == nil ? 404 : 200)
        }
    }

    private mutating func putMedium(_ medium: String) throws -> Bool {
        let isFile = medium == fileMedium
        let configuration = BackstoreConfiguration(
            medium: isFile ? .file(path: file, size: fileSize, buffered: true) : .ram(size: 1 << 20))
        let body =
            isFile
            ? #"{"type": "file", "path": "\#(file)", "size": \#(fileSize), "buffered": true}"#
            : #"{"type": "ram", "size": "1MiB"}"#
        backstores[medium] = configuration
        return try send("PUT", "/v1/backstores/\(medium)", body) == 200
    }

    private mutating func resize() throws -> Bool {
        let status = try send("POST", "/v1/backstores/\(fileMedium)/resize", #"{"size": \#(fileSize + 4096)}"#)
        guard backstores[fileMedium] != nil else { return status == 404 }
        guard isUsed(fileMedium) else { return status == 409 }
        fileSize += 4096
        backstores[fileMedium]!.medium = .file(path: file, size: fileSize, buffered: true)
        return status == 200
    }
}

@Suite struct ConcurrentOperationTests {
    private let folder: TemporaryFolder
    static let clients = 6
    /// Of each client: hundreds in all.
    static let operations = 60

    init() throws { folder = try TemporaryFolder() }

    private var yaml: String {
        """
        control: { socket: \(folder("c")) }
        reactors: 2
        backstores: { a: { type: ram, size: 1MiB } }
        targets:
          naa.6000000000000001: { luns: { 0: a } }
        vhost-user-scsi:
          - { socket: \(folder("0")), targets: { 0: naa.6000000000000001 } }
        """
    }

    /// Reads and writes at a socket, and now and then comes anew, until told to end; sockets that are not there are no
    /// fault.
    private static func useSocket(_ path: String, until ended: @escaping @Sendable () -> Bool) {
        while !ended() {
            guard let guest = try? VhostUserFrontEnd.started(path: path) else {
                usleep(1000)
                continue
            }
            for block in 0..<50 where !ended() {
                let operation: UInt8 = block % 2 == 0 ? 0x28 : 0x2a
                let cdb = [operation, 0, 0, 0, 0, UInt8(block), 0, 0, 1, 0]
                let data = operation == 0x28 ? [] : [UInt8](repeating: 1, count: 512)
                let command = SCSICommand(
                    .flat(target: 0, lun: UInt16(block % 3)), cdb, dataOut: data, dataIn: data.isEmpty ? 512 : 0)
                // The front may go away in the middle of it.
                if (try? guest.queues[2].run(command)) == nil { break }
            }
        }
    }

    /// Looks at everything that can be looked at, until told to end. What changes meanwhile is whole all the same.
    private static func look(_ control: ControlClient, until ended: @escaping @Sendable () -> Bool) {
        let paths = ["status", "statistics", "tasks", "nexuses", "reservations", "operations"].map { "/v1/" + $0 }
        while !ended() {
            for path in paths + ["/metrics"] {
                #expect((try? control.exchange("GET", path))?.status == 200, "\(path)")
            }
            // What is saved at any moment is a configuration without errors, if by now perhaps not the one that runs.
            let saved = try? control.exchange("GET", "/v1/configuration").body
            let answer = try? control.exchange("PUT", "/v1/configuration?dry-run=true", body: saved)
            #expect(
                answer?.status == 200 || answer?.status == 409,
                "\(answer.map { String(decoding: $0.body, as: UTF8.self) } ?? "")")
        }
    }

    /// Follows the events until the daemon ends; `false` if one is missing.
    private static func follow(_ control: ControlClient, _ count: Counter) {
        var last: UInt64?
        _ = try? control.follow("/v1/events") { line in
            let event = try JSON.decode(EventReport.self, from: Data(line.utf8))
            #expect(last == nil || event.sequence == last! + 1)
            last = event.sequence
            count.add()
            return true
        }
    }

    @Test(arguments: [UInt64(1), 2])
    func allThatWasAnsweredIsThereAtTheEnd(seed: UInt64) async throws {
        let daemon = try RunningDaemon(["--config", folder.write("f.yaml", yaml)])
        try #require(daemon.waitUntilReady())
        let control = ControlClient(socket: folder("c"))
        let ended = Flag()
        let sockets = (0...Self.clients).map { folder("\($0)") }
        let files = (0...Self.clients).map { folder("file\($0)") }
        let users = sockets.map { path in
            Thread { Self.useSocket(path) { ended.isSet } }
        }
        let events = Counter()
        let listener = Thread { Self.follow(control, events) }
        let observer = Thread { Self.look(control) { ended.isSet } }
        for thread in users + [listener, observer] { thread.start() }
        let clients = try await withThrowingTaskGroup(of: Client.self) { group in
            for number in 1...Self.clients {
                group.addTask {
                    var client = Client(
                        number: number, control: control, socket: sockets[number], file: files[number],
                        generator: Generator(state: seed &* 1000 &+ UInt64(number)))
                    for step in 0..<Self.operations {
                        let isRight = try client.step()
                        #expect(isRight, "client \(number), step \(step)")
                    }
                    return client
                }
            }
            return try await group.reduce(into: []) { $0.append($1) }
        }
        var model = ConfigurationReader.read(yaml, name: "model").configuration
        for client in clients {
            model.backstores.merge(client.backstores) { $1 }
            model.targets[client.name] = client.target
            if let front = client.front { model.vhostUserFronts.append(front) }
        }
        var saved = ConfigurationReader.read(
            String(decoding: try control.exchange("GET", "/v1/configuration").body, as: UTF8.self), name: "saved"
        ).configuration
        // Sockets are in the order in which they came, which nobody has determined.
        saved.vhostUserFronts.sort { $0.socket < $1.socket }
        model.vhostUserFronts.sort { $0.socket < $1.socket }
        #expect(saved == model)
        // What runs is what is saved.
        let status = try JSON.decode(Status.self, from: control.exchange("GET", "/v1/status").body)
        let units = status.targets.flatMap { target in target.luns.map { "\(target.name) \($0.lun) \($0.backstore)" } }
        let expected = model.targets.flatMap { name, target in
            target.logicalUnits.map { "\(name) \($0.key) \($0.value.backstore)" }
        }
        #expect(Set(units) == Set(expected))
        ended.set()
        for thread in users + [observer] { while !thread.isFinished { usleep(1000) } }
        daemon.signal(SIGTERM)
        while !listener.isFinished { usleep(1000) }
        #expect(events.value > 0)
        let result = daemon.finish()
        #expect(result.status == 0, "\(result.errors.suffix(2000))")
        #expect(!result.errors.contains("Sanitizer"), "\(result.errors.suffix(4000))")
    }
}

/// A truth that threads share.
private final class Flag: @unchecked Sendable {
    private let lock = NSLock()
    private var value = false

    var isSet: Bool { lock.withLock { value } }

    func set() { lock.withLock { value = true } }
}

/// A number that threads share.
private final class Counter: @unchecked Sendable {
    private let lock = NSLock()
    private var count = 0

    var value: Int { lock.withLock { count } }

    func add() { lock.withLock { count += 1 } }
}
