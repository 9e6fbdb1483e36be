// DaemonProcessTests: the targetd process from its start to its end, seen from outside: sockets, signals, service
// manager, exit codes. Must not know: what a guest does at a socket.

import Foundation
import Glibc
import Testing

@testable import targetd

@Suite struct DaemonProcessTests {
    private let folder: TemporaryFolder
    private var socket: String { folder("s") }

    init() throws { folder = try TemporaryFolder() }

    /// A targetd with a RAM disk at the socket.
    private func start(_ more: String..., environment: [String: String] = [:]) throws -> RunningDaemon {
        try RunningDaemon(["--ram", "1MiB", "--vhost-user", socket] + more, environment: environment)
    }

    /// Whether somebody accepts connections at the socket.
    private func isServed() -> Bool {
        let descriptor = Glibc.socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
        defer { close(descriptor) }
        var address = UnixAddress(socket)!
        return unsafe address.withPointer { unsafe connect(descriptor, $0, $1) } == 0
    }

    @Test(arguments: [SIGTERM, SIGINT, SIGHUP]) func signalStopsCleanlyAndRemovesTheSocket(number: Int32) throws {
        let daemon = try start()
        #expect(daemon.waitUntilReady())
        #expect(isServed())
        daemon.signal(number)
        let result = daemon.finish()
        #expect(result.status == 0, "\(result.errors)")
        #expect(result.output.contains("-chardev socket,id=targetd0,path=\(socket)"))
        #expect(!FileManager.default.fileExists(atPath: socket))
    }

    @Test func socketOfALivingDaemonIsLeftAlone() throws {
        let first = try start()
        #expect(first.waitUntilReady())
        let second = try start().finish()
        #expect(second.status == ExitStatus.startFailed.rawValue)
        #expect(second.errors.contains("Another process listens at the socket \(socket)"), "\(second.errors)")
        #expect(isServed())
        first.signal(SIGTERM)
        #expect(first.finish().status == 0)
    }

    @Test func socketOfAKilledDaemonIsReplaced() throws {
        let first = try start()
        #expect(first.waitUntilReady())
        first.signal(SIGKILL)
        #expect(first.finish().status == -SIGKILL)
        #expect(FileManager.default.fileExists(atPath: socket))
        let second = try start()
        #expect(second.waitUntilReady())
        #expect(isServed())
        second.signal(SIGTERM)
        #expect(second.finish().status == 0)
    }

    @Test func fileIsMadeOnceAndItsContentStays() throws {
        let arguments = ["--file", folder("d.img"), "--size", "1MiB", "--buffered", "--vhost-user", socket]
        for round in 0..<2 {
            let daemon = try RunningDaemon(arguments)
            #expect(daemon.waitUntilReady())
            daemon.signal(SIGTERM)
            #expect(daemon.finish().status == 0)
            let content = try Data(contentsOf: URL(fileURLWithPath: folder("d.img")))
            #expect(content.count == 1 << 20)
            #expect(content[7] == (round == 0 ? 0 : 42))
            var changed = content
            changed[7] = 42
            try changed.write(to: URL(fileURLWithPath: folder("d.img")))
        }
    }

    @Test func mediumThatCannotBeOpenedEndsTheStart() throws {
        try Data(count: 1 << 20).write(to: URL(fileURLWithPath: folder("d.img")))
        let arguments = ["--file", folder("d.img"), "--buffered", "--vhost-user"]
        let first = try RunningDaemon(arguments + [folder("1")])
        #expect(first.waitUntilReady())
        let second = try RunningDaemon(arguments + [folder("2")]).finish()
        #expect(second.status == ExitStatus.startFailed.rawValue)
        #expect(second.errors.contains("error: backstore disk: \(folder("d.img")): locked"), "\(second.errors)")
        #expect(!FileManager.default.fileExists(atPath: folder("2")))
        first.signal(SIGTERM)
        #expect(first.finish().status == 0)
    }

    @Test func everythingOfAConfigurationFileIsServed() throws {
        let file = try folder.write(
            "c.yaml",
            """
            reactors: 2
            io-engine: libaio
            backstores:
              a: { type: ram, size: 1MiB }
              b: { type: file, path: \(folder("b.img")), size: 2MiB, buffered: true }
            targets:
              naa.6000000000000001: { luns: { 0: a } }
              naa.6000000000000002: { luns: { 5: b } }
            vhost-user-scsi:
              - { socket: \(folder("1")), targets: { 0: naa.6000000000000001 } }
              - { socket: \(folder("2")), queues: 3, targets: { 0: naa.6000000000000002, 9: naa.6000000000000001 } }
            """)
        let daemon = try RunningDaemon(["--config", file, "--reactors", "1"])
        #expect(daemon.waitUntilReady())
        for name in ["1", "2", "b.img"] { #expect(FileManager.default.fileExists(atPath: folder(name))) }
        daemon.signal(SIGTERM)
        let result = daemon.finish()
        #expect(result.status == 0)
        #expect(result.output.contains("path=\(folder("1"))"))
        #expect(result.output.contains("chardev=targetd1,num_queues=3"))
        for name in ["1", "2"] { #expect(!FileManager.default.fileExists(atPath: folder(name))) }
    }

    @Test func serviceManagerHearsOfTheStartTheWatchAndTheStop() throws {
        let manager = try NotificationListener(folder("notify"))
        let daemon = try start(environment: ["NOTIFY_SOCKET": folder("notify"), "WATCHDOG_USEC": "20000"])
        var messages = Set<String>()
        while !messages.contains("READY=1") || !messages.contains("WATCHDOG=1") { messages.insert(manager.receive()) }
        daemon.signal(SIGTERM)
        while !messages.contains("STOPPING=1") { messages.insert(manager.receive()) }
        #expect(daemon.finish().status == 0)
    }

    @Test(.enabled(if: getuid() == 0, "only root can become somebody else"))
    func limitThatCannotBeRaisedIsNamed() throws {
        // Where another user may read it, and make its socket.
        try FileManager.default.copyItem(
            at: RunningDaemon.built("targetd"), to: URL(fileURLWithPath: folder("targetd")))
        #expect(unsafe chmod(folder.path, 0o777) == 0)
        let daemon = try RunningDaemon(
            [
                "--nofile=300:300", "/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                folder("targetd"), "--ram", "1MiB", "--vhost-user", folder("9"),
            ], executable: URL(fileURLWithPath: "/usr/bin/prlimit"))
        #expect(daemon.waitUntilReady())
        daemon.signal(SIGTERM)
        #expect(daemon.finish().status == 0)
        let expected = /\d+ open files may be needed, but only 300 are allowed: raise LimitNOFILE= of the service/
        #expect(try expected.firstMatch(in: daemon.errorsUntilReady) != nil, "\(daemon.errorsUntilReady)")
    }

    @Test func journalGetsPrioritiesAndNoTimes() throws {
        let daemon = try start(environment: ["JOURNAL_STREAM": "8:1"])
        #expect(daemon.waitUntilReady())
        daemon.signal(SIGTERM)
        let result = daemon.finish()
        #expect(result.errors == "<6>stopping signal=SIGTERM\n<6>stopped\n")
    }
}

/// A datagram socket as a service manager has it.
final class NotificationListener {
    private let descriptor: Int32

    init(_ path: String) throws {
        descriptor = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue), 0)
        var address = try #require(UnixAddress(path))
        let bound = unsafe address.withPointer { unsafe bind(descriptor, $0, $1) }
        try #require(bound == 0)
    }

    deinit { close(descriptor) }

    /// The first line of the next message; waits for it.
    func receive() -> String {
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = unsafe recv(descriptor, &bytes, bytes.count, 0)
        let text = String(decoding: bytes.prefix(max(0, count)), as: UTF8.self)
        return String(text.prefix { $0 != "\n" })
    }
}
