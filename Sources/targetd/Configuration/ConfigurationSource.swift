// ConfigurationSource: gets a configuration from a file or from options, and has every rule applied to it.
//
// Called by: the command line, reload. Must not know: the rules.

import Glibc

/// Where configurations come from.
enum ConfigurationSource {
    /// A configuration and all that is wrong with it.
    struct Loaded {
        var configuration: Configuration
        var source: SourceMap
        var problems: [Problem]

        /// Whether there is no error; warnings do not count.
        var isUsable: Bool { !problems.contains { $0.severity == .error } }
    }

    /// Reads and checks a file.
    ///
    /// - Parameter running: What runs and is to be changed; `nil` before a start.
    static func load(_ file: String, running: Configuration? = nil) -> Loaded {
        let text: String
        switch readText(file) {
        case .success(let read): text = read
        case .failure(let problem):
            return Loaded(configuration: Configuration(), source: SourceMap(source: file), problems: [problem])
        }
        return load(text: text, name: file, running: running)
    }

    /// Reads and checks the text of a file.
    static func load(text: String, name: String, running: Configuration?) -> Loaded {
        let read = ConfigurationReader.read(text, name: name)
        return checked(read.configuration, read.source, read.problems, running: running)
    }

    /// Checks a configuration that was made from the one that runs.
    static func load(edited configuration: Configuration, running: Configuration) -> Loaded {
        checked(configuration, SourceMap(source: "body"), [], running: running)
    }

    /// Checks the disk of the command line.
    static func load(_ disk: DiskOptions) -> Loaded {
        let socket = absolute(disk.socket ?? "")
        let (medium, identity) = medium(of: disk)
        // Named by what stays the same over restarts, so that the guest finds the disk that it knows.
        let target = NAAName.derived(from: "target", identity, socket)
        var configuration = Configuration()
        configuration.backstores["disk"] = BackstoreConfiguration(
            medium: medium, blockSize: disk.blockSize, readOnly: disk.readOnly)
        configuration.targets[target] = TargetConfiguration(logicalUnits: [0: LogicalUnitSettings(backstore: "disk")])
        configuration.vhostUserFronts = [
            VhostUserFrontConfiguration(socket: socket, queues: disk.queues ?? 1, targets: [0: target])
        ]
        configuration.vhostUserFronts[0].mode = disk.client ? .client : .server
        var source = SourceMap(source: "targetd")
        let pathOption = disk.file != nil ? "--file" : "--block-device"
        source.spellings = [
            "backstores.disk.size": disk.ram != nil ? "--ram" : "--size", "backstores.disk.path": pathOption,
            "vhost-user-scsi[0].socket": disk.fd == nil ? "--vhost-user" : "--fd",
        ]
        return checked(configuration, source, [])
    }

    private static func medium(of disk: DiskOptions) -> (BackstoreConfiguration.Medium, identity: String) {
        if let size = disk.ram { return (.ram(size: size), "ram") }
        if let file = disk.file {
            let path = absolute(file)
            return (.file(path: path, size: disk.size, buffered: disk.buffered), path)
        }
        let path = absolute(disk.blockDevice ?? "")
        return (.blockDevice(path: path, buffered: disk.buffered), path)
    }

    /// Applies all rules.
    private static func checked(
        _ configuration: Configuration, _ source: SourceMap, _ problems: [Problem], running: Configuration? = nil
    ) -> Loaded {
        var problems = problems
        problems += ConfigurationRules.check(configuration, source: source).filter { found in
            // Where a part could not be read, what seems unused or missing as a whole may well be there.
            problems.isEmpty || (found.severity == .error && !found.key.isEmpty)
        }
        problems += EnvironmentRules.check(configuration, source: source, running: running)
        problems.sort { ($0.line ?? 0) < ($1.line ?? 0) }
        return Loaded(configuration: configuration, source: source, problems: problems)
    }

    private static func readText(_ file: String) -> Result<String, Problem> {
        let failed = { (error: SystemError) in Problem(key: "", text: "cannot be read: \(error.text)") }
        let descriptor = unsafe open(file, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return .failure(failed(.last)) }
        defer { close(descriptor) }
        var bytes: [UInt8] = []
        let chunk = UnsafeMutableRawBufferPointer.allocate(byteCount: 64 << 10, alignment: 1)
        defer { unsafe chunk.deallocate() }
        while true {
            let count = unsafe read(descriptor, chunk.baseAddress, chunk.count)
            if count == 0 { break }
            if count < 0 && errno == EINTR { continue }
            guard count > 0 else { return .failure(failed(.last)) }
            unsafe bytes.append(contentsOf: chunk.prefix(count))
            guard bytes.count <= ConfigurationLimits.fileBytes else {
                let limit = Size.format(UInt64(ConfigurationLimits.fileBytes))
                return .failure(Problem(key: "", text: "is longer than \(limit), which no configuration is"))
            }
        }
        guard let text = String(validating: bytes, as: UTF8.self) else {
            return .failure(Problem(key: "", text: "is not UTF-8 text"))
        }
        return .success(text)
    }

    /// The path from the root, for one that may be relative to where the command was given.
    private static func absolute(_ path: String) -> String {
        guard !path.isEmpty, !path.hasPrefix("/") else { return path }
        guard let folder = unsafe getcwd(nil, 0) else { return path }
        defer { unsafe free(folder) }
        return unsafe String(cString: folder) + "/" + path
    }
}

extension Problem: Error {}
