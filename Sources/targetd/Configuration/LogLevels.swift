// LogLevels: the names of the log levels.
//
// Called by: the configuration reader, the command line, the log handler. Must not know: who logs.

import Logging

/// The log levels by name, as swift-log calls them.
enum LogLevels {
    /// From the least severe.
    static let names = Logger.Level.allCases.map(\.rawValue)
    /// What is used where nothing is said.
    static let standard = Logger.Level.info
}

extension Configuration {
    /// The level that is used.
    var effectiveLogLevel: Logger.Level { logLevel.flatMap { Logger.Level(rawValue: $0) } ?? LogLevels.standard }
}
