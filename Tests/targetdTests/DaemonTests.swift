// DaemonTests: the running daemon in this process: media, targets and units on real reactors, without sockets. Must
// not know: sockets, command lines.

import Foundation
import Glibc
import Logging
import Testing

@testable import targetd

@Suite struct DaemonTests {
    private let folder: TemporaryFolder
    private let logger = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
    private let name = NAAName(0x6000_0000_0000_0001)

    init() throws { folder = try TemporaryFolder() }

    /// A target with one unit per backstore.
    private func configuration(_ media: [String: BackstoreConfiguration.Medium], reactors: Int = 1) -> Configuration {
        var configuration = Configuration(reactors: reactors)
        configuration.backstores = media.mapValues { BackstoreConfiguration(medium: $0) }
        var target = TargetConfiguration()
        for (number, backstore) in media.keys.sorted().enumerated() {
            target.logicalUnits[number] = LogicalUnitSettings(backstore: backstore)
        }
        configuration.targets[name] = target
        return configuration
    }

    private func file(_ name: String, size: UInt64? = 1 << 20) -> BackstoreConfiguration.Medium {
        // Through the page cache: tests run on file systems that know no other way.
        .file(path: folder(name), size: size, buffered: true)
    }

    /// Whether a daemon of this process, or another, has the file.
    private func isOpen(_ name: String) throws -> Bool {
        try FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd").contains {
            (try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/self/fd/\($0)")) == folder(name)
        }
    }

    private func size(_ name: String) throws -> UInt64 {
        try #require(try FileManager.default.attributesOfItem(atPath: folder(name))[.size] as? UInt64)
    }

    @Test(arguments: IOEngine.allCases) func mediaAreOpenFromStartToStop(engine: IOEngine) async throws {
        var wanted = configuration(["a": file("a"), "b": .ram(size: 1 << 20)])
        wanted.ioEngine = engine
        let daemon = try await Daemon.start(wanted, logger: logger)
        #expect(try isOpen("a"))
        #expect(try size("a") == 1 << 20)
        await daemon.ping()
        #expect(await daemon.stop() == .success)
        #expect(try !isOpen("a"))
    }

    @Test func startThatFailsSaysWhyAndLeavesNothingOpen() async throws {
        let wanted = configuration(["a": file("a"), "b": file("missing", size: nil)])
        let error = await #expect(throws: ChangeError.self) { try await Daemon.start(wanted, logger: logger) }
        #expect(
            error?.text.hasPrefix("backstore b: \(folder("missing")): no such file") == true, "\(error?.text ?? "")")
        #expect(try !isOpen("a"))
    }

    @Test func fileThatAnotherDaemonHasIsRefused() async throws {
        let wanted = configuration(["a": file("a")])
        let daemon = try await Daemon.start(wanted, logger: logger)
        let error = await #expect(throws: ChangeError.self) { try await Daemon.start(wanted, logger: logger) }
        #expect(error?.text.contains("locked by another process") == true, "\(error?.text ?? "")")
        #expect(await daemon.stop() == .success)
    }

    @Test func unitsAreAddedAndRemovedWhileRunning() async throws {
        let daemon = try await Daemon.start(configuration(["a": file("a")]), logger: logger)
        try await daemon.apply(configuration(["a": file("a"), "b": file("b")]))
        #expect(try isOpen("a") && isOpen("b"))
        try await daemon.apply(configuration(["b": file("b")]))
        #expect(try !isOpen("a") && isOpen("b"))
        #expect(await daemon.stop() == .success)
    }

    @Test func commandTimeoutChangesWhileTheMediumStaysOpen() async throws {
        var wanted = configuration(["a": file("a")])
        let daemon = try await Daemon.start(wanted, logger: logger)
        wanted.targets[name]!.logicalUnits[0]!.commandTimeoutNanoseconds = 1_000_000_000
        #expect(try await daemon.apply(wanted) == [.setCommandTimeout(0, target: name)])
        #expect(await daemon.configuration == wanted)
        #expect(await daemon.stop() == .success)
    }

    @Test func fileGrowsInPlace() async throws {
        let daemon = try await Daemon.start(configuration(["a": file("a")]), logger: logger)
        try await daemon.apply(configuration(["a": file("a", size: 2 << 20)]))
        #expect(try size("a") == 2 << 20)
        #expect(await daemon.stop() == .success)
    }

    @Test func changeThatFailsHalfwayIsTakenBack() async throws {
        let before = configuration(["a": file("a"), "c": .ram(size: 1 << 20)])
        let daemon = try await Daemon.start(before, logger: logger)
        // b takes over the file of a, so it is opened when a is closed; then the new medium of c cannot be made.
        let wanted = configuration(["b": file("a"), "c": file("no/folder"), "d": file("d")])
        let error = await #expect(throws: ChangeError.self) { try await daemon.apply(wanted) }
        #expect(error?.text.contains("its directory does not exist") == true, "\(error?.text ?? "")")
        #expect(try isOpen("a") && !isOpen("d"))
        // It still is what it was: the same again changes nothing, and another change works.
        try await daemon.apply(before)
        try await daemon.apply(configuration(["c": .ram(size: 1 << 20)]))
        #expect(try !isOpen("a"))
        #expect(await daemon.stop() == .success)
    }

    @Test func refusedChangeChangesNothing() async throws {
        let daemon = try await Daemon.start(configuration(["a": file("a")]), logger: logger)
        var wanted = configuration(["a": file("a"), "b": file("b")], reactors: 2)
        let error = await #expect(throws: ChangeError.self) { try await daemon.apply(wanted) }
        #expect(error == ChangeError(text: "reactors: cannot change while targetd runs: restart it", kind: .conflict))
        #expect(try !isOpen("b"))
        wanted.reactors = 1
        try await daemon.apply(wanted)
        #expect(try isOpen("b"))
        #expect(await daemon.stop() == .success)
    }

    @Test func groupsRunOnTheirOwnReactors() async throws {
        var wanted = configuration(["a": file("a")], reactors: 3)
        let second = NAAName(0x6000_0000_0000_0002)
        wanted.backstores["b"] = BackstoreConfiguration(medium: file("b"))
        wanted.targets[second] = TargetConfiguration(logicalUnits: [0: LogicalUnitSettings(backstore: "b")])
        let daemon = try await Daemon.start(wanted, logger: logger)
        #expect(try isOpen("a") && isOpen("b"))
        // A backstore moves with its unit to the other target's reactor.
        wanted.targets[name]!.logicalUnits = [:]
        wanted.targets[second]!.logicalUnits[1] = LogicalUnitSettings(backstore: "a")
        try await daemon.apply(wanted)
        #expect(try isOpen("a"))
        #expect(await daemon.stop() == .success)
    }
}
