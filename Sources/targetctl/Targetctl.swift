// Targetctl: the commands of targetctl, each one request to the control API and a way to show its answer.
//
// Owns: the commands, the exit codes. Called by: the system. Must not know: how the daemon works.

import ArgumentParser
import ControlAPI
import Foundation

/// How targetctl ends, as the shell sees it. The numbers are those of sysexits.h.
enum ExitStatus: Int32 {
    /// Done; for `diff`: nothing differs.
    case success = 0
    /// For `diff`: something differs.
    case differs = 1
    /// The command line is wrong (ArgumentParser ends the process itself), or the daemon does not take what it says.
    case usage = 64
    /// The file cannot be read, or has errors, all of which were printed.
    case configuration = 78
    /// There is nothing of that name.
    case notFound = 66
    /// targetd does not answer.
    case unreachable = 69
    /// The daemon could not do it; everything is as before.
    case failed = 70
    /// What is asked for cannot be done to what runs.
    case conflict = 65
    /// What is asked for has not happened in time; it may still happen.
    case timeout = 75
    /// This user may not manage the daemon.
    case notAuthorized = 77
}

@main
struct Targetctl: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "targetctl",
        abstract: "Manages a running targetd.",
        discussion: """
            Exit codes: 0 done; 1 diff found differences; 64 wrong command line; 65 what runs cannot be changed in \
            this way; 66 nothing of that name; 69 targetd, or for xen commands xenstored, does not answer; 70 the \
            daemon could not do it; 75 not in time; 77 not allowed; 78 errors in the configuration.
            """,
        version: "targetctl 0.1.0",
        subcommands: [
            StatusCommand.self, Top.self, List.self, Tasks.self, Nexuses.self, Operations.self, Events.self, Trace.self,
            Apply.self, Diff.self, Save.self, Add.self, Remove.self, Resize.self, Limit.self, Protect.self, Freeze.self,
            Thaw.self, Eject.self, Load.self, Reset.self, Reservations.self, PortGroups.self, LogLevel.self,
            Metrics.self, Xen.self,
        ])
}

/// What every command takes.
struct CommonOptions: ParsableArguments {
    @Option(help: "The control socket of the daemon.", completion: .file())
    var socket = "/run/targetd/control.sock"

    @Flag(help: "Print the answer as the daemon gave it, in JSON.")
    var json = false

    /// Asks the daemon. An answer that says no ends the process, with the reason on standard error.
    func ask(_ method: String, _ target: String, type: String = "application/json", body: Data? = nil) throws -> Data {
        let answer: ControlClient.Answer
        do {
            answer = try ControlClient(socket: socket).exchange(method, target, type: type, body: body)
        } catch {
            throw Self.end(.unreachable, "\(error)")
        }
        if answer.status == 200 { return answer.body }
        guard let failure = try? JSON.decode(FailureReport.self, from: answer.body).error else {
            throw Self.end(.failed, "the daemon answered with HTTP status \(answer.status)")
        }
        if json {
            print(String(decoding: answer.body, as: UTF8.self))
            throw ExitCode(Self.exitStatus(failure).rawValue)
        }
        for problem in failure.details { Self.complain(Text.line(for: problem)) }
        throw Self.end(Self.exitStatus(failure), failure.message)
    }

    /// Asks for a value and shows it.
    func show<Value: Decodable>(
        _ method: String, _ target: String, type: String = "application/json", body: Data? = nil, as: Value.Type,
        _ text: (Value) -> String
    ) throws -> Value {
        let data = try ask(method, target, type: type, body: body)
        let value: Value
        do {
            value = try JSON.decode(Value.self, from: data)
        } catch {
            throw Self.end(.failed, "the answer is not one of this version of targetd: \(error)")
        }
        print(json ? String(decoding: data, as: UTF8.self) : text(value))
        return value
    }

    /// Asks for something that goes on, and hands its lines out until `body` says no or the daemon ends it.
    func follow(_ target: String, _ body: (String) throws -> Bool) throws {
        let failure: ControlClient.Answer?
        do {
            failure = try ControlClient(socket: socket).follow(target, body)
        } catch {
            throw Self.end(.unreachable, "\(error)")
        }
        guard let failure else { return }
        guard let reason = try? JSON.decode(FailureReport.self, from: failure.body).error else {
            throw Self.end(.failed, "the daemon answered with HTTP status \(failure.status)")
        }
        throw Self.end(Self.exitStatus(reason), reason.message)
    }

    private static func exitStatus(_ failure: Failure) -> ExitStatus {
        switch FailureCode(rawValue: failure.code) {
        case .invalidRequest, .tooLarge, .methodNotAllowed: .usage
        case .invalidConfiguration: .configuration
        case .notAuthorized: .notAuthorized
        case .notFound: .notFound
        case .conflict: .conflict
        case .timeout, .failed, .stopping, nil: .failed
        }
    }

    /// Prints why, and gives what is to be thrown.
    static func end(_ status: ExitStatus, _ message: String) -> ExitCode {
        complain("targetctl: \(message)")
        return ExitCode(status.rawValue)
    }

    static func complain(_ line: String) { FileHandle.standardError.write(Data((line + "\n").utf8)) }

    /// The content of a file, or of standard input for `-`.
    static func read(_ file: String) throws -> Data {
        if file == "-" { return FileHandle.standardInput.readDataToEndOfFile() }
        guard let data = FileManager.default.contents(atPath: file) else {
            throw end(.configuration, "\(file) cannot be read")
        }
        return data
    }
}

struct StatusCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "status", abstract: "Show the daemon, its fronts and its logical units.")
    @OptionGroup var common: CommonOptions

    func run() throws {
        _ = try common.show("GET", "/v1/status", as: Status.self, Text.status)
    }
}

struct List: ParsableCommand {
    /// What can be listed.
    enum Kind: String, ExpressibleByArgument, CaseIterable {
        case backstores, targets, fronts, reactors, xen
    }

    static let configuration = CommandConfiguration(abstract: "List what the daemon has of a kind.")
    @Argument(help: "backstores, targets, fronts, reactors or xen.") var kind: Kind
    @OptionGroup var common: CommonOptions

    func run() throws {
        let path = "/v1/\(kind.rawValue)"
        switch kind {
        case .backstores: _ = try common.show("GET", path, as: [BackstoreStatus].self, Text.backstores)
        case .targets: _ = try common.show("GET", path, as: [TargetStatus].self, Text.units)
        case .fronts: _ = try common.show("GET", path, as: [FrontStatus].self, Text.fronts)
        case .xen: _ = try common.show("GET", path, as: XenStatus.self, Text.xen)
        case .reactors: _ = try common.show("GET", path, as: [ReactorStatus].self, Text.reactors)
        }
    }
}

struct Apply: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Make the daemon match a configuration file, all or nothing.")
    @Argument(help: "The file; - for standard input.", completion: .file(extensions: ["yaml"])) var file: String
    @OptionGroup var common: CommonOptions

    func run() throws {
        let body = try CommonOptions.read(file)
        _ = try common.show(
            "PUT", "/v1/configuration", type: "application/yaml", body: body, as: ChangeReport.self,
            { Text.changes($0, none: "Nothing to change.") })
    }
}

struct Diff: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Show what apply would change: + adds, - takes away, ~ changes in place.")
    @Argument(help: "The file; - for standard input.", completion: .file(extensions: ["yaml"])) var file: String
    @OptionGroup var common: CommonOptions

    func run() throws {
        let body = try CommonOptions.read(file)
        let report = try common.show(
            "PUT", "/v1/configuration?dry-run=true", type: "application/yaml", body: body, as: ChangeReport.self,
            { Text.changes($0, none: "No differences.") })
        if !report.changes.isEmpty { throw ExitCode(ExitStatus.differs.rawValue) }
    }
}

struct Save: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Print the configuration that runs, as a file that targetd --config takes.")
    @OptionGroup var common: CommonOptions

    func run() throws {
        let text = String(decoding: try common.ask("GET", "/v1/configuration"), as: UTF8.self)
        if common.json {
            print(String(decoding: JSON.encode(["configuration": text]), as: UTF8.self))
        } else {
            print(text, terminator: "")
        }
    }
}

struct Resize: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Make the file of a backstore longer; its guests are told.",
        discussion: "Write the new size into the configuration file too, if that names one.")
    @Argument(help: "The backstore.") var backstore: String
    @Argument(help: "The size that it is to have, such as 20GiB.") var size: String
    @OptionGroup var common: CommonOptions

    func run() throws {
        _ = try common.show(
            "POST", Path.backstore(backstore) + "/resize", body: JSON.encode(["size": size]), as: ChangeReport.self,
            { Text.changes($0, none: "It has that size already.") })
    }
}

struct Metrics: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Print all counters in Prometheus' text format, or with --json those of logical units and guests.")
    @OptionGroup var common: CommonOptions

    func run() throws {
        if common.json {
            return print(String(decoding: try common.ask("GET", "/v1/statistics"), as: UTF8.self))
        }
        print(String(decoding: try common.ask("GET", "/metrics"), as: UTF8.self), terminator: "")
    }
}
