// StandardErrorLog: writes log messages to standard error, a line each.
//
// Owns: the notation of a line. Called by: swift-log. Must not know: who logs.

import Glibc
import Logging
import Reactor

/// A log handler for a daemon: with the time on a terminal or in a file, with a priority for the system's journal,
/// which has the time itself.
struct StandardErrorLog: LogHandler {
    var metadata: Logger.Metadata = [:]
    private var ownLevel: Logger.Level?
    private let isJournal: Bool
    private static let level = Locked(LogLevels.standard)

    /// Makes this the handler of every logger. To be called once, before the first logger is made.
    static func bootstrap(level: Logger.Level) {
        // The journal connects standard error to itself and says so (systemd.exec(5)).
        let isJournal = unsafe getenv("JOURNAL_STREAM") != nil
        setLevel(level)
        LoggingSystem.bootstrap { _ in StandardErrorLog(isJournal: isJournal) }
    }

    /// Changes the level of all loggers that have none of their own.
    static func setLevel(_ level: Logger.Level) { Self.level.withLock { $0 = level } }

    init(isJournal: Bool) { self.isJournal = isJournal }

    /// The common level, unless this logger was given its own.
    var logLevel: Logger.Level {
        get { ownLevel ?? Self.level.withLock { $0 } }
        set { ownLevel = newValue }
    }

    subscript(metadataKey key: String) -> Logger.Metadata.Value? {
        get { metadata[key] }
        set { metadata[key] = newValue }
    }

    func log(event: LogEvent) {
        let metadata = metadata.merging(event.metadata ?? [:]) { $1 }
        Self.write(line(event.level, event.message.description, metadata))
    }

    /// The line for a message, with its end.
    func line(_ level: Logger.Level, _ message: String, _ metadata: Logger.Metadata) -> String {
        let details = metadata.sorted { $0.key < $1.key }.map { " \($0.key)=\(Self.quoted("\($0.value)"))" }.joined()
        let front = isJournal ? "<\(level.journalPriority)>" : "\(Self.timestamp()) \(level.rawValue): "
        return front + Self.printable(message) + details + "\n"
    }

    /// Writes a text to standard error in one piece, so that lines of several threads do not mix.
    static func write(_ text: String) {
        var text = text
        text.withUTF8 { bytes in
            // An error cannot be reported anywhere.
            _ = unsafe Glibc.write(STDERR_FILENO, bytes.baseAddress, bytes.count)
        }
    }

    /// The text with control characters written out: a name that a peer chose must not make lines of its own.
    private static func printable(_ text: String) -> String {
        guard text.unicodeScalars.contains(where: isControl) else { return text }
        var result = ""
        for scalar in text.unicodeScalars {
            if isControl(scalar) {
                result += "\\u{\(String(scalar.value, radix: 16))}"
            } else {
                result.unicodeScalars.append(scalar)
            }
        }
        return result
    }

    private static func isControl(_ scalar: Unicode.Scalar) -> Bool {
        scalar.value < 0x20 || (0x7f...0x9f).contains(scalar.value) || scalar.value == 0x2028 || scalar.value == 0x2029
    }

    private static func quoted(_ text: String) -> String {
        let text = printable(text)
        guard text.isEmpty || text.contains(where: { $0 == " " || $0 == "\"" || $0 == "=" }) else { return text }
        return "\"" + text.replacing("\"", with: "\\\"") + "\""
    }

    private static func timestamp() -> String {
        var now = timespec()
        unsafe clock_gettime(CLOCK_REALTIME, &now)
        var parts = unsafe tm()
        unsafe gmtime_r(&now.tv_sec, &parts)
        let date = unsafe [Int(parts.tm_year) + 1900, Int(parts.tm_mon) + 1, Int(parts.tm_mday)]
        let time = unsafe [Int(parts.tm_hour), Int(parts.tm_min), Int(parts.tm_sec)]
        func joined(_ numbers: [Int], _ separator: String) -> String {
            numbers.map { padded($0, 2) }.joined(separator: separator)
        }
        return "\(joined(date, "-"))T\(joined(time, ":")).\(padded(now.tv_nsec / 1_000_000, 3))Z"
    }

    private static func padded(_ number: Int, _ width: Int) -> String {
        let digits = String(number)
        return String(repeating: "0", count: max(0, width - digits.count)) + digits
    }
}

extension Logger.Level {
    /// The priority that the system's journal reads at the front of a line (sd-daemon(3)).
    fileprivate var journalPriority: Int {
        switch self {
        case .trace, .debug: 7
        case .info: 6
        case .notice: 5
        case .warning: 4
        case .error: 3
        case .critical: 2
        }
    }
}
