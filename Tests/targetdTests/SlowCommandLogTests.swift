// SlowCommandLogTests: what the log says of commands that are stuck, and how often. Must not know: reactors, sockets.

import Logging
import SCSICore
import Synchronization
import Testing

@testable import targetd

@Suite struct SlowCommandLogTests {
    private static let second: UInt64 = 1_000_000_000

    /// Keeps what is logged.
    private final class Lines: LogHandler, @unchecked Sendable {
        private let kept = Mutex<[String]>([])
        var metadata: Logger.Metadata = [:]
        var logLevel = Logger.Level.trace

        var taken: [String] { kept.withLock { $0 } }

        subscript(metadataKey key: String) -> Logger.Metadata.Value? {
            get { metadata[key] }
            set { metadata[key] = newValue }
        }

        func log(event: LogEvent) {
            let fields = (event.metadata ?? [:]).map { "\($0.key)=\($0.value)" }.sorted().joined(separator: " ")
            kept.withLock { $0.append("\(event.level): \(event.message) [\(fields)]") }
        }
    }

    private final class Identity {}

    private let lines: Lines
    private let log: SlowCommandLog
    private let identities = (0..<20).map { _ in Identity() }

    init() {
        let lines = Lines()
        self.lines = lines
        log = SlowCommandLog(Logger(label: "test") { _ in lines })
    }

    /// LUN `lun`, whose oldest command is so many seconds old.
    private func unit(_ lun: Int, age: UInt64?, expired: Bool = false) -> SlowCommandLog.Unit {
        SlowCommandLog.Unit(
            identity: ObjectIdentifier(identities[lun]), target: "naa.1", lun: lun, backstore: "disk",
            oldest: age.map {
                TaskInFlight(
                    age: $0 * Self.second, initiatorPort: "I", tag: 9, operationCode: 0x2a, address: 77, blocks: 8,
                    place: .backstore, hasExpired: expired)
            })
    }

    private func look(_ units: [SlowCommandLog.Unit], at seconds: UInt64) {
        log.look(at: units, now: (1000 + seconds) * Self.second)
    }

    @Test func quickCommandsAreNotNamed() {
        look([unit(0, age: nil), unit(1, age: 9)], at: 0)
        #expect(lines.taken == [])
    }

    @Test func slowCommandIsNamedOnceThenOnceAMinuteThenWhenItIsOver() {
        for time in 0..<130 as Range<UInt64> { look([unit(0, age: time)], at: time) }
        look([unit(0, age: nil)], at: 130)
        look([unit(0, age: nil)], at: 131)
        let place = "backstore=disk initiator=I lun=0 tag=9 target=naa.1"
        #expect(
            lines.taken == [10, 70].map {
                "warning: a command has not ended for \($0) s: operation code 2ah, LBA 77, 8 blocks; "
                    + "it is with the backstore [\(place)]"
            } + [
                "notice: commands end again; the slowest took at least 129 s [backstore=disk lun=0 target=naa.1]"
            ])
    }

    @Test func commandPastItsDeadlineIsNamedHoweverYoung() {
        look([unit(0, age: 2, expired: true)], at: 0)
        #expect(lines.taken.count == 1)
        #expect(lines.taken[0].contains("is with the backstore, which was asked to cancel it"))
    }

    @Test func manyUnitsAtOnceDoNotFillTheLog() {
        look((0..<20).map { unit($0, age: 30) }, at: 0)
        #expect(lines.taken.count == LogRate.burst)
        look((0..<20).map { unit($0, age: $0 == 3 ? nil : 41) }, at: 11)
        #expect(lines.taken.count == LogRate.burst + 1)
        #expect(lines.taken.last?.contains("suppressed=10") == true)
    }
}
