// CommandLine: the options of targetd, and what each way to call it does.
//
// Owns: the options, the exit codes, what is printed on standard output. Called by: the system. Must not know: how the
// daemon works.

import ArgumentParser
import Glibc

/// How targetd ends, as the shell and systemd see it. The numbers are those of sysexits.h.
enum ExitStatus: Int32 {
    /// Stopped as asked; or the checked file has no error.
    case success = 0
    /// The command line is wrong (ArgumentParser ends the process itself).
    case usage = 64
    /// Stopped, but commands were still in flight after the time allowed, or a second signal asked not to wait.
    case abandoned = 70
    /// The system refused something at start: a file, a socket, a thread.
    case startFailed = 71
    /// Stopped, but a medium could not make its data stable.
    case flushFailed = 74
    /// The configuration has errors, all of which were printed.
    case configuration = 78
}

@main
struct Targetd: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "targetd",
        abstract: "Serves disks to virtual machines: a SCSI target with vhost-user fronts.",
        usage: """
            targetd --config <file> [<overrides>]
            targetd --check <file>
            targetd --ram <size> --vhost-user <socket>
            targetd --file <path> [--size <size>] --vhost-user <socket>
            targetd --block-device <path> --vhost-user <socket>
            targetd --print-capabilities
            """,
        discussion: """
            At start it prints, for each socket, the QEMU arguments that attach a guest. SIGTERM or SIGINT stop it \
            cleanly; a second one stops it at once. SIGHUP reads the file of --config again and applies \
            it.

            Exit codes: 0 stopped as asked, or no error found; 64 wrong command line; 70 stopped with commands in \
            flight; 71 could not start; 74 stopped, but a medium could not be flushed; 78 errors in the configuration.
            """,
        version: Version.text)

    @Flag(help: "Print what kind of vhost-user back-end this is, as QEMU's conventions ask, and serve nothing.")
    var printCapabilities = false

    @OptionGroup var source: SourceOptions
    @OptionGroup var disk: DiskOptions
    @OptionGroup var overrides: OverrideOptions

    func validate() throws {
        // The conventions: other options are ignored then.
        if printCapabilities { return }
        let media = [disk.ram != nil, disk.file != nil, disk.blockDevice != nil].count { $0 }
        let sources = [source.config != nil, source.check != nil, media > 0].count { $0 }
        guard sources == 1, media <= 1 else {
            throw ValidationError("Give exactly one of --config, --check, --ram, --file and --block-device.")
        }
        if let stray = disk.strayOption(hasMedium: media == 1) {
            throw ValidationError(stray)
        }
        if media == 1, disk.vhostUser != nil, disk.fd != nil {
            throw ValidationError("Give one of --vhost-user and --fd.")
        }
        if media == 1, disk.socket == nil {
            throw ValidationError("Give --vhost-user <socket>: the path of the socket at which a guest attaches.")
        }
    }

    func run() async throws {
        if printCapabilities {
            print(#"{ "type": "scsi", "features": [] }"#)
            return
        }
        if let file = source.check {
            throw ExitCode(Self.check(file).rawValue)
        }
        let loaded = source.config.map { ConfigurationSource.load($0) } ?? ConfigurationSource.load(disk)
        Self.printProblems(loaded)
        guard loaded.isUsable else { throw ExitCode(ExitStatus.configuration.rawValue) }
        let configuration = overrides.applied(to: loaded.configuration)
        StandardErrorLog.bootstrap(level: configuration.effectiveLogLevel)
        throw ExitCode(await DaemonProcess.run(configuration, file: source.config, overrides: overrides).rawValue)
    }

    private static func check(_ file: String) -> ExitStatus {
        let loaded = ConfigurationSource.load(file)
        printProblems(loaded)
        guard loaded.isUsable else { return .configuration }
        let configuration = loaded.configuration
        let units = configuration.targets.values.map(\.logicalUnits.count).reduce(0, +)
        print(
            "\(file): no errors: \(count(configuration.backstores.count, "backstore")), "
                + "\(count(configuration.targets.count, "target")) with \(count(units, "logical unit")), "
                + "\(count(configuration.vhostUserFronts.count, "socket"))")
        return .success
    }

    private static func printProblems(_ loaded: ConfigurationSource.Loaded) {
        for problem in loaded.problems {
            StandardErrorLog.write(problem.rendered(source: loaded.source.source) + "\n")
        }
    }

    private static func count(_ number: Int, _ what: String) -> String { "\(number) \(what)\(number == 1 ? "" : "s")" }
}

/// Where the configuration comes from, if from a file.
struct SourceOptions: ParsableArguments {
    @Option(name: .customLong("config"), help: "Serve what this file says.", completion: .file(extensions: ["yaml"]))
    var config: String?

    @Option(
        name: .customLong("check"), help: "Print what is wrong with this file, and serve nothing.",
        completion: .file(extensions: ["yaml"]))
    var check: String?
}

/// A single disk, served without a configuration file.
struct DiskOptions: ParsableArguments {
    @Option(help: "Serve a disk in memory of this size, such as 1GiB.", transform: Size.parse)
    var ram: UInt64?

    @Option(help: "Serve this file as a disk.", completion: .file())
    var file: String?

    @Option(help: "Serve this block device as a disk.", completion: .file())
    var blockDevice: String?

    @Option(help: "Create the file with this size if it does not exist.", transform: Size.parse)
    var size: UInt64?

    @Option(
        name: .customLong("vhost-user"), help: "Make this socket, at which a guest attaches.", completion: .file())
    var vhostUser: String?

    @Flag(help: "Connect to the socket of --vhost-user, where a front-end listens, instead of making it.")
    var client = false

    @Option(help: "Use this file descriptor, a socket that listens or is connected, instead of making one.")
    var fd: Int32?

    /// Where a guest attaches: a path, or a descriptor by the name that the server knows.
    var socket: String? { fd.map { "/proc/self/fd/\($0)" } ?? vhostUser }

    @Option(help: "Request queues that a guest may use (default: 1).")
    var queues: Int?

    @Option(help: "Bytes of a logical block: 512 or 4096 (default: 512, or what the block device says).")
    var blockSize: UInt32?

    @Flag(help: "Do I/O through the page cache of the host.")
    var buffered = false

    @Flag(help: "Open the medium for reading only; guests see a write protected disk.")
    var readOnly = false

    /// What to say of an option that means nothing here.
    func strayOption(hasMedium: Bool) -> String? {
        if let size = size.map(Size.format), file == nil { return "--size \(size) goes with --file only." }
        if buffered, ram != nil { return "--buffered goes with --file and --block-device only." }
        if client, vhostUser == nil { return "--client goes with --vhost-user only." }
        if let queues, !ConfigurationLimits.queues.contains(queues) {
            let range = ConfigurationLimits.queues
            return "--queues must be from \(range.lowerBound) to \(range.upperBound)."
        }
        if let blockSize, !ConfigurationLimits.blockSizes.contains(blockSize) {
            return "--block-size must be 512 or 4096."
        }
        guard !hasMedium else { return nil }
        let given = [
            ("--vhost-user", vhostUser != nil), ("--fd", fd != nil), ("--queues", queues != nil),
            ("--block-size", blockSize != nil), ("--buffered", buffered), ("--read-only", readOnly),
        ]
        return given.first { $0.1 }.map {
            "\($0.0) goes with --ram, --file and --block-device only: write it in the file."
        }
    }
}

/// Options that take the place of what the file says.
struct OverrideOptions: ParsableArguments {
    @Option(help: "How to do I/O: automatic, io_uring or libaio (default: automatic).")
    var ioEngine: IOEngine?

    @Option(help: "How long a reactor looks for more work before it sleeps, in microseconds (default: 20).")
    var pollMicroseconds: UInt64?

    @Option(help: "Reactor threads (default: 1).")
    var reactors: Int?

    @Option(help: "The least severe messages to log: \(LogLevels.names.joined(separator: ", ")) (default: info).")
    var logLevel: LogLevelName?

    @Option(help: "Make this socket, at which targetctl manages the daemon.", completion: .file())
    var control: String?

    func validate() throws {
        if let reactors, !ConfigurationLimits.reactors.contains(reactors) {
            let range = ConfigurationLimits.reactors
            throw ValidationError("--reactors must be from \(range.lowerBound) to \(range.upperBound).")
        }
        if let control, !control.hasPrefix("/") || control.utf8.count > ConfigurationLimits.socketPathBytes {
            throw ValidationError(
                "--control must be an absolute path of at most \(ConfigurationLimits.socketPathBytes) bytes.")
        }
        if let pollMicroseconds, pollMicroseconds > ConfigurationLimits.pollNanoseconds.upperBound / 1000 {
            throw ValidationError(
                "--poll-microseconds must be at most \(ConfigurationLimits.pollNanoseconds.upperBound / 1000).")
        }
    }

    /// The configuration with what was given here in place of its own.
    func applied(to configuration: Configuration) -> Configuration {
        var configuration = configuration
        if let ioEngine { configuration.ioEngine = ioEngine }
        if let pollMicroseconds { configuration.pollNanoseconds = pollMicroseconds * 1000 }
        if let reactors { configuration.reactors = reactors }
        if let logLevel { configuration.logLevel = logLevel.rawValue }
        if let control {
            let others = configuration.control
            configuration.control = ControlConfiguration(
                socket: control, mode: others?.mode, group: others?.group, metrics: others?.metrics)
        }
        return configuration
    }
}

extension IOEngine: ExpressibleByArgument {}

/// The name of a log level, as an option.
struct LogLevelName: RawRepresentable, ExpressibleByArgument {
    var rawValue: String

    init?(rawValue: String) {
        guard LogLevels.names.contains(rawValue) else { return nil }
        self.rawValue = rawValue
    }

    static let allValueStrings = LogLevels.names
}

/// What this program calls itself.
enum Version {
    static let text = "targetd 0.1.0"
}
