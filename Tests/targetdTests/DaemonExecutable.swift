// DaemonExecutable: runs the built targetd as a process of its own, for tests that look at it from outside. Must not
// know: what the tests look for.

import Foundation
import Glibc
import Testing

/// A folder of a test's own, removed with all that is in it.
final class TemporaryFolder {
    let path: String

    init() throws {
        // Short, because paths of sockets are.
        path = "/tmp/targetd.\(getpid()).\(UInt32.random(in: 0...UInt32.max))"
        try FileManager.default.createDirectory(atPath: path, withIntermediateDirectories: false)
    }

    deinit { try? FileManager.default.removeItem(atPath: path) }

    /// The path of something in the folder.
    func callAsFunction(_ name: String) -> String { "\(path)/\(name)" }

    /// Writes a text file into the folder, and gives its path.
    func write(_ name: String, _ text: String) throws -> String {
        try text.write(toFile: self(name), atomically: true, encoding: .utf8)
        return self(name)
    }
}

/// What a process did.
struct ProcessResult {
    let status: Int32
    let output: String
    let errors: String
}

/// A targetd that runs.
final class RunningDaemon {
    let process = Process()
    private let output = Pipe()
    private let errors = Pipe()
    /// What it said on standard error before guests could attach.
    private(set) var errorsUntilReady = ""

    /// Starts targetd.
    init(_ arguments: [String], environment: [String: String] = [:], executable: URL = built("targetd")) throws {
        process.executableURL = executable
        process.arguments = arguments
        var variables = ProcessInfo.processInfo.environment
        for name in ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM"] { variables[name] = nil }
        process.environment = variables.merging(environment) { $1 }
        process.standardOutput = output
        process.standardError = errors
        process.standardInput = FileHandle.nullDevice
        try process.run()
    }

    deinit {
        if process.isRunning { kill(process.processIdentifier, SIGKILL) }
        process.waitUntilExit()
    }

    /// The built executables lie beside the one that holds the tests.
    static func built(_ name: String) -> URL {
        URL(fileURLWithPath: "/proc/self/exe").resolvingSymlinksInPath().deletingLastPathComponent()
            .appendingPathComponent(name)
    }

    /// Waits for the end.
    func finish() -> ProcessResult {
        let output = String(decoding: output.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        let errors = String(decoding: errors.fileHandleForReading.readDataToEndOfFile(), as: UTF8.self)
        process.waitUntilExit()
        // A signal that ended it is no exit status.
        let status = process.terminationReason == .exit ? process.terminationStatus : -process.terminationStatus
        return ProcessResult(status: status, output: output, errors: errors)
    }

    /// Reads standard error up to the line that says that guests can attach. `false`: it ended before.
    func waitUntilReady() -> Bool {
        while !errorsUntilReady.contains("ready\n") {
            let data = errors.fileHandleForReading.availableData
            if data.isEmpty { return false }
            errorsUntilReady += String(decoding: data, as: UTF8.self)
        }
        return true
    }

    /// Sends a signal.
    func signal(_ number: Int32) { kill(process.processIdentifier, number) }
}

/// Runs targetd to its end.
func targetd(_ arguments: String...) throws -> ProcessResult { try RunningDaemon(arguments).finish() }
