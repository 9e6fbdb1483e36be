// ConfigurationWriter: Configuration → the YAML that reads back as the same.
//
// Called by: the control API (what runs, to be saved). Must not know: files. The keys are the reader's
// (ConfigurationReader); a test reads everything back.

/// Writes the file for a configuration. What has its default is left out.
struct ConfigurationWriter {
    private var lines: [String] = []

    /// The text of the file.
    static func yaml(_ configuration: Configuration) -> String {
        var writer = ConfigurationWriter()
        writer.writeSettings(configuration)
        if let control = configuration.control { writer.writeControl(control) }
        writer.writeBackstores(configuration.backstores)
        writer.writeTargets(configuration.targets)
        writer.writeFronts(configuration.vhostUserFronts)
        if let xen = configuration.xen { writer.writeXen(xen) }
        return writer.lines.map { $0 + "\n" }.joined()
    }

    private mutating func writeSettings(_ configuration: Configuration) {
        let standard = Configuration()
        if configuration.reactors != standard.reactors { lines.append("reactors: \(configuration.reactors)") }
        if configuration.ioEngine != standard.ioEngine { lines.append("io-engine: \(configuration.ioEngine.rawValue)") }
        if configuration.pollNanoseconds != standard.pollNanoseconds {
            lines.append("poll: \(TimeSpan.format(configuration.pollNanoseconds))")
        }
        if configuration.stopTimeoutNanoseconds != standard.stopTimeoutNanoseconds {
            lines.append("stop-timeout: \(TimeSpan.format(configuration.stopTimeoutNanoseconds))")
        }
        if let level = configuration.logLevel { lines.append("log-level: \(level)") }
        if let path = configuration.stateDirectory { lines.append("state-directory: \(Self.quoted(path))") }
    }

    private mutating func writeControl(_ control: ControlConfiguration) {
        var fields = [("socket", Self.quoted(control.socket))]
        if let mode = control.mode { fields.append(("mode", "0" + String(mode, radix: 8))) }
        if let group = control.group { fields.append(("group", Self.quoted(group))) }
        if let metrics = control.metrics { fields.append(("metrics", "\"\(metrics.text)\"")) }
        lines.append("control: \(Self.flow(fields))")
    }

    private mutating func writeBackstores(_ backstores: [String: BackstoreConfiguration]) {
        guard !backstores.isEmpty else { return }
        lines.append("backstores:")
        for (name, backstore) in backstores.sorted(by: { $0.key < $1.key }) {
            lines.append("  \(Self.quoted(name)): \(Self.flow(Self.fields(of: backstore)))")
        }
    }

    private static func fields(of backstore: BackstoreConfiguration) -> [(String, String)] {
        var fields: [(String, String)]
        switch backstore.medium {
        case .ram(let size):
            fields = [("type", "ram"), ("size", Size.format(size))]
        case .file(let path, let size, let buffered):
            fields = [("type", "file"), ("path", quoted(path))]
            if let size { fields.append(("size", Size.format(size))) }
            if buffered { fields.append(("buffered", "true")) }
        case .blockDevice(let path, let buffered):
            fields = [("type", "block-device"), ("path", quoted(path))]
            if buffered { fields.append(("buffered", "true")) }
        }
        if let blockSize = backstore.blockSize { fields.append(("block-size", "\(blockSize)")) }
        if backstore.readOnly { fields.append(("read-only", "true")) }
        if backstore.isShared { fields.append(("shared", "true")) }
        return fields
    }

    private mutating func writeTargets(_ targets: [NAAName: TargetConfiguration]) {
        guard !targets.isEmpty else { return }
        lines.append("targets:")
        for (name, target) in targets.sorted(by: { $0.key < $1.key }) {
            guard target != TargetConfiguration() else {
                lines.append("  \(name): {}")
                continue
            }
            lines.append("  \(name):")
            if !target.portGroups.isEmpty { lines.append("    port-groups:") }
            lines += target.portGroups.map { "      - \(Self.flow(Self.fields(of: $0)))" }
            if !target.logicalUnits.isEmpty { lines.append("    luns:") }
            for (number, unit) in target.logicalUnits.sorted(by: { $0.key < $1.key }) {
                lines.append("      \(number): \(Self.value(of: unit))")
            }
        }
    }

    private static func fields(of group: PortGroupConfiguration) -> [(String, String)] {
        var fields = [("id", "\(group.identifier)")]
        if group.state != .activeOptimized { fields.append(("state", group.state.rawValue)) }
        if group.isPreferred { fields.append(("preferred", "true")) }
        if group.isExplicit { fields.append(("explicit", "true")) }
        fields.append(("ports", "[" + group.ports.map(String.init).joined(separator: ", ") + "]"))
        return fields
    }

    private static func value(of unit: LogicalUnitSettings) -> String {
        var fields = [("backstore", quoted(unit.backstore))]
        if unit.readOnly { fields.append(("read-only", "true")) }
        if let name = unit.name { fields.append(("name", "\(name)")) }
        if let serial = unit.serial { fields.append(("serial", quoted(serial))) }
        if let limits = limits(unit.limits) { fields.append(("limits", limits)) }
        if unit.commandTimeoutNanoseconds != 0 {
            fields.append(("command-timeout", TimeSpan.format(unit.commandTimeoutNanoseconds)))
        }
        if unit.removable { fields.append(("removable", "true")) }
        if unit.onError != .report { fields.append(("on-error", unit.onError.rawValue)) }
        if let timeout = unit.retryTimeoutNanoseconds { fields.append(("retry-timeout", TimeSpan.format(timeout))) }
        return fields.count == 1 ? quoted(unit.backstore) : flow(fields)
    }

    private mutating func writeFronts(_ fronts: [VhostUserFrontConfiguration]) {
        guard !fronts.isEmpty else { return }
        lines.append("vhost-user-scsi:")
        for front in fronts {
            let targets = front.targets.sorted { $0.key < $1.key }.map { ("\($0.key)", "\($0.value)") }
            var fields = [("socket", Self.quoted(front.socket))]
            if front.mode != .server { fields.append(("mode", front.mode.rawValue)) }
            if front.queues != 1 { fields.append(("queues", "\(front.queues)")) }
            fields.append(("targets", Self.flow(targets)))
            if front.port != VhostUserFrontConfiguration.defaultPort { fields.append(("port", "\(front.port)")) }
            if let limits = Self.limits(front.limits) { fields.append(("limits", limits)) }
            if front.isSpread { fields.append(("spread", "true")) }
            if front.offersConfigurationSpace { fields.append(("config-space", "true")) }
            if front.offersRingReset { fields.append(("ring-reset", "true")) }
            if let timeout = front.drainTimeoutNanoseconds {
                fields.append(("drain-timeout", TimeSpan.format(timeout)))
            }
            lines.append("  - \(Self.flow(fields))")
        }
    }

    private static func limits(_ limits: LimitsConfiguration) -> String? {
        guard !limits.isEmpty else { return nil }
        var fields: [(String, String)] = []
        if let operations = limits.operationsPerSecond { fields.append(("iops", "\(operations)")) }
        if let bytes = limits.bytesPerSecond { fields.append(("bandwidth", Size.format(bytes))) }
        if let burst = limits.burstNanoseconds { fields.append(("burst", TimeSpan.format(burst))) }
        return flow(fields)
    }

    private mutating func writeXen(_ xen: XenConfiguration) {
        let standard = XenConfiguration()
        var fields = [("enabled", xen.enabled.rawValue)]
        if xen.records != standard.records { fields.append(("records", Self.quoted(xen.records))) }
        if !xen.hostDevices { fields.append(("host-devices", "false")) }
        if xen.port != standard.port { fields.append(("port", "\(xen.port)")) }
        if xen.staging != standard.staging { fields.append(("staging", Size.format(xen.staging))) }
        lines.append("xen: \(Self.flow(fields))")
    }

    private static func flow(_ fields: [(String, String)]) -> String {
        fields.isEmpty ? "{}" : "{ " + fields.map { "\($0.0): \($0.1)" }.joined(separator: ", ") + " }"
    }

    /// The text as it is if nothing in it means something to YAML, else in double quotes.
    private static func quoted(_ text: String) -> String {
        let isPlain = text.utf8.allSatisfy {
            (0x30...0x39).contains($0) || (0x41...0x5a).contains($0) || (0x61...0x7a).contains($0)
                || "/._+".utf8.contains($0) || $0 == UInt8(ascii: "-")
        }
        if isPlain, let first = text.first, first != "-" { return text }
        return "\"" + text.replacing("\\", with: "\\\\").replacing("\"", with: "\\\"") + "\""
    }
}
