// What logical units keep over the end of targetd: reservations through kill -9, damaged files, whose directory it is.

import Foundation
import Glibc
import Testing
import VhostUserInitiator

@testable import targetd

@Suite struct StateDirectoryTests {
    private let folder: TemporaryFolder

    init() throws { folder = try TemporaryFolder() }

    private func configuration(stateDirectory: String?) -> String {
        """
        \(stateDirectory.map { "state-directory: \($0)" } ?? "")
        backstores: { a: { type: ram, size: 1MiB } }
        targets: { naa.6000000000000001: { luns: { 0: { backstore: a, name: naa.3000000000000abc } } } }
        vhost-user-scsi: [{ socket: \(folder("1")), targets: { 0: naa.6000000000000001 } }]
        """
    }

    private func start(
        stateDirectory: Bool = true, environment: [String: String] = [:]
    ) throws -> RunningDaemon {
        let file = try folder.write(
            "targetd.yaml", configuration(stateDirectory: stateDirectory ? folder("state") : nil))
        return try RunningDaemon(["--config", file], environment: environment)
    }

    /// REGISTER AND IGNORE EXISTING KEY with APTPL.
    private func register(_ key: UInt8) -> SCSICommand {
        var list = [UInt8](repeating: 0, count: 24)
        list[15] = key
        list[20] = 0x01
        return SCSICommand(.flat(target: 0, lun: 0), [0x5f, 0x06, 0, 0, 0, 0, 0, 0, 24, 0], dataOut: list)
    }

    private func keys(_ guest: VhostUserFrontEnd) throws -> [UInt8] {
        let command = SCSICommand(.flat(target: 0, lun: 0), [0x5e, 0, 0, 0, 0, 0, 0, 0, 64, 0], dataIn: 64)
        let data = try guest.queues[2].runPastUnitAttentions(command).dataIn
        return stride(from: 8, to: 8 + Int(data[7]), by: 8).map { data[$0 + 7] }
    }

    @Test func registrationsSurviveKillsAtRandomMoments() throws {
        var last: UInt8 = 0
        for _ in 0..<12 {
            let daemon = try start()
            try #require(daemon.waitUntilReady())
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            let restored = try keys(guest)
            // All that was answered with GOOD is there; what was in flight may be.
            #expect(restored == (last == 0 ? [] : [last]) || restored == [last + 1])
            last = restored.first ?? last
            for _ in 0..<Int.random(in: 0...3) {
                #expect(try guest.queues[2].runPastUnitAttentions(register(last + 1)).isGood)
                last += 1
            }
            _ = guest.queues[2].submit(register(last + 1))
            // A save takes some hundred microseconds: this ends before it, in it, or after it.
            let end = DispatchTime.now().uptimeNanoseconds + UInt64.random(in: 0...2_000_000)
            while DispatchTime.now().uptimeNanoseconds < end {}
            daemon.signal(SIGKILL)
            #expect(daemon.finish().status == -SIGKILL)
        }
        #expect(last > 0)
    }

    @Test func aReservationSurvivesARestartAndKeepsOthersOut() throws {
        do {
            let daemon = try start()
            try #require(daemon.waitUntilReady())
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(register(7)).isGood)
            daemon.signal(SIGTERM)
            #expect(daemon.finish().status == 0)
        }
        let files = try FileManager.default.contentsOfDirectory(atPath: folder("state"))
        #expect(files == ["naa.3000000000000abc"])
        let daemon = try start()
        try #require(daemon.waitUntilReady())
        #expect(try keys(VhostUserFrontEnd.started(path: folder("1"))) == [7])
    }

    @Test func theDirectoryThatTheServiceManagerGivesIsUsed() throws {
        let daemon = try start(stateDirectory: false, environment: ["STATE_DIRECTORY": "\(folder("service")):/none"])
        try #require(daemon.waitUntilReady())
        let guest = try VhostUserFrontEnd.started(path: folder("1"))
        #expect(try guest.queues[2].runPastUnitAttentions(register(7)).isGood)
        #expect(try FileManager.default.contentsOfDirectory(atPath: folder("service")) == ["naa.3000000000000abc"])
    }

    @Test func withoutADirectoryPersistenceIsRefused() throws {
        let daemon = try start(stateDirectory: false)
        try #require(daemon.waitUntilReady())
        let guest = try VhostUserFrontEnd.started(path: folder("1"))
        let end = try guest.queues[2].runPastUnitAttentions(register(7))
        #expect(end.additionalSense == 0x2600)
    }

    @Test func damagedStateIsServedOnlyToWhoReplacesTheReservations() throws {
        try FileManager.default.createDirectory(atPath: folder("state"), withIntermediateDirectories: false)
        // The name and version of the format, and nonsense, as after a bad disk.
        let file = try folder.write("state/naa.3000000000000abc", "SCSIUNIT\0\0\0\u{1} and then nonsense")
        let read = SCSICommand(.flat(target: 0, lun: 0), [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], dataIn: 512)
        do {
            let daemon = try start()
            try #require(daemon.waitUntilReady())
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(read).additionalSense == 0x4401)
            #expect(try guest.queues[2].runPastUnitAttentions(register(7)).additionalSense == 0x4401)
            #expect(try String(contentsOfFile: file, encoding: .utf8).hasPrefix("SCSIUNIT"))
            daemon.signal(SIGTERM)
            #expect(daemon.finish().status == 0)
            #expect(daemon.errorsUntilReady.contains("\(file): the state is damaged"))
        }
        let daemon = try start()
        try #require(daemon.waitUntilReady())
        let guest = try VhostUserFrontEnd.started(path: folder("1"))
        #expect(try guest.queues[2].runPastUnitAttentions(read).additionalSense == 0x4401)
        var list = [UInt8](repeating: 0, count: 24)
        list[15] = 9
        list[20] = 0x01
        let replace = SCSICommand(
            .flat(target: 0, lun: 0), [0x5f, 0x08, 0x03, 0, 0, 0, 0, 0, 24, 0], dataOut: list)
        #expect(try guest.queues[2].runPastUnitAttentions(replace).isGood)
        #expect(try guest.queues[2].runPastUnitAttentions(read).isGood)
        daemon.signal(SIGKILL)
        #expect(daemon.finish().status == -SIGKILL)
        let next = try start()
        try #require(next.waitUntilReady())
        #expect(try keys(VhostUserFrontEnd.started(path: folder("1"))) == [9])
    }

    @Test func theStateOfAnotherUnitKeepsTargetdFromStarting() throws {
        do {
            let daemon = try start()
            try #require(daemon.waitUntilReady())
            let guest = try VhostUserFrontEnd.started(path: folder("1"))
            #expect(try guest.queues[2].runPastUnitAttentions(register(7)).isGood)
            daemon.signal(SIGTERM)
            #expect(daemon.finish().status == 0)
        }
        let file = folder("state/naa.3000000000000abd")
        try FileManager.default.moveItem(atPath: folder("state/naa.3000000000000abc"), toPath: file)
        let text = configuration(stateDirectory: folder("state")).replacing("abc }", with: "abd }")
        let end = try targetd("--config", try folder.write("other.yaml", text))
        #expect(end.status == ExitStatus.startFailed.rawValue)
        #expect(end.errors.contains("LUN 0 of naa.6000000000000001: \(file): "))
        #expect(end.errors.contains("move the file away"))
    }

    @Test func aDirectoryServesOneTargetd() throws {
        let first = try start()
        try #require(first.waitUntilReady())
        let text = configuration(stateDirectory: folder("state")).replacing(folder("1"), with: folder("2"))
        let other = try folder.write("other.yaml", text)
        let end = try targetd("--config", other)
        #expect(end.status == ExitStatus.startFailed.rawValue)
        #expect(end.errors.contains("\(folder("state")): another targetd keeps its state here"))
    }

    @Test func theKeyIsReadWrittenAndNeedsARestart() {
        let read = ConfigurationReader.read("state-directory: /var/lib/targetd\n", name: "f")
        #expect(read.problems.isEmpty)
        #expect(read.configuration.stateDirectory == "/var/lib/targetd")
        let text = ConfigurationWriter.yaml(read.configuration)
        #expect(ConfigurationReader.read(text, name: "f").configuration == read.configuration)
        let plan = Plan(from: Configuration(), placement: Placement(), to: read.configuration)
        #expect(plan.refusals.map(\.key) == ["state-directory"])
        #expect(ConfigurationReader.read("state-directory: lib\n", name: "f").problems.count == 1)
    }

    @Test func aFileInPlaceOfTheDirectoryIsAnError() throws {
        let file = try folder.write("file", "")
        var configuration = Configuration()
        configuration.stateDirectory = file
        let problems = EnvironmentRules.check(configuration, source: SourceMap(source: "f"))
        #expect(problems.count == 1)
        configuration.stateDirectory = folder("none/state")
        #expect(EnvironmentRules.check(configuration, source: SourceMap(source: "f")).count == 1)
        configuration.stateDirectory = folder("state")
        #expect(EnvironmentRules.check(configuration, source: SourceMap(source: "f")).isEmpty)
    }
}
