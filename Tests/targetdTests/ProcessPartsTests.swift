// ProcessPartsTests: what the daemon says to journals, service managers and people. Must not know: what is served.

import Foundation
import Glibc
import Logging
import Testing

@testable import targetd

@Suite struct StandardErrorLogTests {
    private func journal(_ message: String, _ metadata: Logger.Metadata = [:], _ level: Logger.Level = .info) -> String
    {
        StandardErrorLog(isJournal: true).line(level, message, metadata)
    }

    @Test(arguments: [
        (Logger.Level.trace, 7), (.debug, 7), (.info, 6), (.notice, 5), (.warning, 4), (.error, 3), (.critical, 2),
    ])
    func journalGetsThePriorityAndNoTime(level: Logger.Level, priority: Int) {
        #expect(journal("text", [:], level) == "<\(priority)>text\n")
    }

    @Test func elsewhereALineBeginsWithTheTimeAndTheLevel() throws {
        let line = StandardErrorLog(isJournal: false).line(.warning, "text", [:])
        let pattern = /\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z warning: text\n/
        #expect(try pattern.wholeMatch(in: line) != nil, "\(line)")
    }

    @Test func detailsFollowInTheOrderOfTheirNames() {
        #expect(journal("x", ["b": "1", "a": "two words", "c": ""]) == "<6>x a=\"two words\" b=1 c=\"\"\n")
    }

    @Test func levelOfALoggerOfItsOwnStays() {
        var own = StandardErrorLog(isJournal: true)
        own.logLevel = .critical
        StandardErrorLog.setLevel(.warning)
        #expect(own.logLevel == .critical)
        #expect(StandardErrorLog(isJournal: true).logLevel == .warning)
        StandardErrorLog.setLevel(LogLevels.standard)
    }

    @Test func messageIsOneLineWhateverAPeerPutIntoIt() {
        let line = journal("a\nb\u{1b}[2J\u{85}\u{2028}", ["k": "v\n<0>forged", "q": "say \"x\""])
        #expect(line == "<6>a\\u{a}b\\u{1b}[2J\\u{85}\\u{2028} k=v\\u{a}<0>forged q=\"say \\\"x\\\"\"\n")
    }
}

@Suite struct ServiceNotificationTests {
    /// A datagram socket as a service manager has it.
    private final class Manager {
        let descriptor: Int32

        init(_ path: String) throws {
            descriptor = socket(AF_UNIX, Int32(SOCK_DGRAM.rawValue), 0)
            var address = try #require(UnixAddress(path))
            let bound = unsafe address.withPointer { unsafe bind(descriptor, $0, $1) }
            try #require(bound == 0)
        }

        deinit { close(descriptor) }

        /// The next message; waits for it.
        func receive() -> String {
            var bytes = [UInt8](repeating: 0, count: 4096)
            let count = unsafe recv(descriptor, &bytes, bytes.count, 0)
            return String(decoding: bytes.prefix(max(0, count)), as: UTF8.self)
        }
    }

    private func notification(_ variables: [String: String]) -> ServiceNotification {
        ServiceNotification { variables[$0] }
    }

    @Test(arguments: [false, true])
    func statesAreSentToTheSocketOfTheManager(isAbstract: Bool) throws {
        let folder = try TemporaryFolder()
        let path = isAbstract ? "@" + folder("notify") : folder("notify")
        let manager = try Manager(path)
        let notification = notification(["NOTIFY_SOCKET": path])
        notification.ready("Serving 2 sockets")
        #expect(manager.receive() == "READY=1\nSTATUS=Serving 2 sockets")
        notification.reloading()
        let lines = manager.receive().split(separator: "\n")
        #expect(lines.first == "RELOADING=1")
        #expect(lines.dropFirst().first?.wholeMatch(of: /MONOTONIC_USEC=\d+/) != nil)
        notification.alive()
        #expect(manager.receive() == "WATCHDOG=1")
        notification.stopping()
        #expect(manager.receive() == "STOPPING=1\nSTATUS=Stopping")
    }

    @Test func withoutAManagerNothingHappens() throws {
        let folder = try TemporaryFolder()
        notification([:]).ready("x")
        notification(["NOTIFY_SOCKET": folder("none")]).ready("x")
        notification(["NOTIFY_SOCKET": "vsock:2:1234"]).ready("x")
        notification(["NOTIFY_SOCKET": "/" + String(repeating: "x", count: 200)]).ready("x")
    }

    @Test func watchdogIsForTheProcessThatIsNamed() {
        #expect(notification(["WATCHDOG_USEC": "3000000"]).watchdogNanoseconds == 3_000_000_000)
        #expect(notification(["WATCHDOG_USEC": "5", "WATCHDOG_PID": "\(getpid())"]).watchdogNanoseconds == 5000)
        #expect(notification(["WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"]).watchdogNanoseconds == nil)
        for text in ["", "0", "-1", "x", "1.5"] {
            #expect(notification(["WATCHDOG_USEC": text]).watchdogNanoseconds == nil)
        }
        #expect(notification([:]).watchdogNanoseconds == nil)
    }
}

@Suite struct QEMUArgumentsTests {
    @Test func argumentsAttachAGuest() {
        let front = VhostUserFrontConfiguration(socket: "/run/vm1.sock", queues: 4)
        #expect(
            QEMUArguments.lines(for: front, index: 2) == """
                -object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem \\
                    -chardev socket,id=targetd2,path=/run/vm1.sock \\
                    -device vhost-user-scsi-pci,chardev=targetd2,num_queues=4
                """)
    }

    @Test func inClientModeQEMUIsToListen() {
        let front = VhostUserFrontConfiguration(socket: "/run/vm1.sock", mode: .client)
        #expect(QEMUArguments.lines(for: front, index: 0).contains("id=targetd0,path=/run/vm1.sock,server=on"))
    }

    @Test func pathIsWrittenForTheShellAndForQEMU() {
        let front = VhostUserFrontConfiguration(socket: "/run/it's, a vm.sock")
        #expect(QEMUArguments.lines(for: front, index: 0).contains("path='/run/it'\\''s,, a vm.sock'"))
    }
}

@Suite struct ResourceLimitsTests {
    @Test func descriptorsNeededGrowWithTheConfiguration() {
        let none = ResourceLimits.descriptorsNeeded(Configuration())
        var configuration = Configuration()
        configuration.vhostUserFronts = [VhostUserFrontConfiguration(socket: "/s", queues: 4)]
        let one = ResourceLimits.descriptorsNeeded(configuration)
        #expect(one >= none + 3 * 6 + 509)
        configuration.vhostUserFronts[0].queues = 8
        #expect(ResourceLimits.descriptorsNeeded(configuration) == one + 12)
    }
}
