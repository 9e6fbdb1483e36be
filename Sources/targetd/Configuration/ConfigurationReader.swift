// ConfigurationReader: the YAML file → Configuration, with every problem of its form and the line it stands on.
//
// Owns: the keys of the file and what each takes. Called by: the command line, reload. Must not know: what exists on
// this machine (EnvironmentRules) and what keys mean together (ConfigurationRules).

import Yams

/// Reads one file. Goes on after a problem, so that all of them are reported at once.
struct ConfigurationReader {
    /// What was read, as far as it could be; to be used only if there is no error among the problems.
    struct Result {
        var configuration = Configuration()
        var source: SourceMap
        var problems: [Problem] = []
    }

    private var result: Result

    /// Reads the text of a file.
    ///
    /// - Parameters:
    ///   - yaml: The text.
    ///   - name: The name of the file, for messages.
    static func read(_ yaml: String, name: String) -> Result {
        var reader = ConfigurationReader(result: Result(source: SourceMap(source: name)))
        do {
            if let root = try Yams.compose(yaml: yaml) { reader.readRoot(root) }
        } catch {
            reader.result.problems.append(problem(of: error, yaml: yaml))
        }
        return reader.result
    }

    // MARK: What is in the file

    private mutating func readRoot(_ root: Node) {
        let sections = ["backstores", "targets", "vhost-user-scsi", "xen"]
        let settings = ["reactors", "io-engine", "poll", "stop-timeout", "log-level", "state-directory", "control"]
        guard let fields = mapping(root, at: "", allowed: settings + sections) else { return }
        readSettings(fields)
        if let control = fields["control"], !control.isEmpty {
            result.configuration.control = readControl(control, at: "control")
        }
        entries(fields, "backstores", named: "backstores by name") { reader, name, node, key in
            reader.checkName(name, at: key)
            guard let backstore = reader.readBackstore(node, at: key) else { return }
            reader.result.configuration.backstores[name] = backstore
        }
        entries(fields, "targets", named: "targets by name, such as naa.60014054ac780582") { reader, name, node, key in
            let target = reader.readTarget(node, at: key)
            guard let name = reader.targetName(name, at: key) else { return }
            // Names that differ in the case of their digits are the same name, which YAML does not know.
            guard reader.result.configuration.targets.updateValue(target, forKey: name) == nil else {
                return reader.report(key, "is defined twice: the case of its digits makes no difference")
            }
        }
        if let fronts = fields["vhost-user-scsi"] { readFronts(fronts, at: "vhost-user-scsi") }
        if let xen = fields["xen"] { result.configuration.xen = readXen(xen, at: "xen") }
    }

    private mutating func readSettings(_ fields: Fields) {
        if let reactors = integer(fields, "reactors", in: ConfigurationLimits.reactors) {
            result.configuration.reactors = reactors
        }
        if let engine = choice(fields, "io-engine", of: IOEngine.allCases.map(\.rawValue)) {
            result.configuration.ioEngine = IOEngine(rawValue: engine)!
        }
        if let poll = span(fields, "poll", in: ConfigurationLimits.pollNanoseconds) {
            result.configuration.pollNanoseconds = poll
        }
        if let timeout = span(fields, "stop-timeout", in: ConfigurationLimits.stopTimeoutNanoseconds) {
            result.configuration.stopTimeoutNanoseconds = timeout
        }
        result.configuration.logLevel = choice(fields, "log-level", of: LogLevels.names)
        result.configuration.stateDirectory = path(fields, "state-directory")
    }

    private mutating func readControl(_ node: Node, at key: String) -> ControlConfiguration? {
        guard let fields = mapping(node, at: key, allowed: ["socket", "mode", "group", "metrics"]) else { return nil }
        let mode = mode(fields, "mode")
        let group = string(fields, "group")
        let metrics = address(fields, "metrics")
        guard fields.has("socket", orReport: "add socket: and the absolute path of the socket to make", &self),
            let socket = path(fields, "socket")
        else { return nil }
        return ControlConfiguration(socket: socket, mode: mode, group: group, metrics: metrics)
    }

    private mutating func readBackstore(_ node: Node, at key: String) -> BackstoreConfiguration? {
        let common = ["type", "block-size", "read-only"]
        let own = [
            "ram": ["size"], "file": ["path", "size", "buffered", "shared"], "block-device": ["path", "buffered"],
        ]
        guard let all = mapping(node, at: key, allowed: nil) else { return nil }
        guard all["type"] != nil else {
            report(key, "has no type: add type: ram, file or block-device")
            return nil
        }
        guard let type = choice(all, "type", of: ["ram", "file", "block-device"]),
            let fields = mapping(node, at: key, allowed: common + own[type]!, of: "type \(type)")
        else { return nil }

        let blockSize = integer(fields, "block-size", of: ConfigurationLimits.blockSizes.map(Int.init))
        let readOnly = boolean(fields, "read-only") ?? false
        guard let medium = readMedium(type, fields) else { return nil }
        return BackstoreConfiguration(
            medium: medium, blockSize: blockSize.map(UInt32.init), readOnly: readOnly,
            isShared: boolean(fields, "shared") ?? false)
    }

    private mutating func readMedium(_ type: String, _ fields: Fields) -> BackstoreConfiguration.Medium? {
        let size = size(fields, "size")
        let buffered = boolean(fields, "buffered") ?? false
        switch type {
        case "ram":
            guard fields.has("size", orReport: "memory has no size of its own: add size:, such as size: 1GiB", &self),
                let size
            else { return nil }
            return .ram(size: size)
        default:
            guard fields.has("path", orReport: "add path: and the absolute path of the medium", &self),
                let path = path(fields, "path")
            else { return nil }
            return type == "file"
                ? .file(path: path, size: size, buffered: buffered) : .blockDevice(path: path, buffered: buffered)
        }
    }

    private mutating func readTarget(_ node: Node, at key: String) -> TargetConfiguration {
        var target = TargetConfiguration()
        guard let fields = mapping(node, at: key, allowed: ["luns", "port-groups"]) else { return target }
        if let groups = fields["port-groups"] {
            target.portGroups = readPortGroups(groups, at: fields.key("port-groups"))
        }
        entries(fields, "luns", named: "backstores by logical unit number, such as { 0: root }") {
            reader, name, node, key in
            let range = ConfigurationLimits.logicalUnitNumbers
            guard let number = reader.number(name, in: range) else {
                return reader.report(
                    key,
                    "\"\(name)\" is not a logical unit number: write a whole number from \(range.lowerBound) to "
                        + "\(range.upperBound)")
            }
            guard let unit = reader.readLogicalUnit(node, at: key) else { return }
            guard target.logicalUnits.updateValue(unit, forKey: number) == nil else {
                return reader.report(key, "logical unit number \(number) is given twice in this target")
            }
        }
        return target
    }

    private mutating func readPortGroups(_ node: Node, at key: String) -> [PortGroupConfiguration] {
        if node.isEmpty { return [] }
        guard case .sequence(let groups) = node else {
            report(key, "takes a list: write each group as - { id: 1, state: standby, ports: [1] }")
            return []
        }
        return groups.enumerated().compactMap { index, group in
            let key = "\(key)[\(index)]"
            result.source.lines[key] = group.mark?.line
            return readPortGroup(group, at: key)
        }
    }

    private mutating func readPortGroup(_ node: Node, at key: String) -> PortGroupConfiguration? {
        let keys = ["id", "state", "preferred", "explicit", "ports"]
        guard let fields = mapping(node, at: key, allowed: keys) else { return nil }
        let states = PortGroupConfiguration.AccessState.allCases.map(\.rawValue)
        let state = choice(fields, "state", of: states).flatMap { PortGroupConfiguration.AccessState(rawValue: $0) }
        let isPreferred = boolean(fields, "preferred") ?? false
        let isExplicit = boolean(fields, "explicit") ?? false
        let hasPorts = fields.has("ports", orReport: "add ports: such as [1]", &self)
        let ports = integers(fields, "ports", in: ConfigurationLimits.targetPorts)
        guard fields.has("id", orReport: "add id: and the number of the group, such as 1", &self),
            let identifier = integer(fields, "id", in: ConfigurationLimits.portGroupIdentifiers), hasPorts, let ports
        else { return nil }
        return PortGroupConfiguration(
            identifier: identifier, state: state ?? .activeOptimized, isPreferred: isPreferred, isExplicit: isExplicit,
            ports: ports)
    }

    private mutating func readLogicalUnit(_ node: Node, at key: String) -> LogicalUnitSettings? {
        if case .scalar = node {
            result.source.lines[key + ".backstore"] = node.mark?.line
            return string(node, at: key).map { LogicalUnitSettings(backstore: $0) }
        }
        let keys = [
            "backstore", "read-only", "name", "serial", "command-timeout", "removable", "on-error", "retry-timeout",
            "limits",
        ]
        guard let fields = mapping(node, at: key, allowed: keys),
            fields.has("backstore", orReport: "add backstore: and the name of a backstore", &self),
            let backstore = string(fields, "backstore")
        else { return nil }
        var unit = LogicalUnitSettings(backstore: backstore)
        unit.readOnly = boolean(fields, "read-only") ?? false
        if let name = string(fields, "name") {
            do {
                unit.name = try NAAName(parsing: name, kinds: 2...3, 5...5)
            } catch {
                report(fields.key("name"), "\"\(name)\" \(error.text)")
            }
        }
        unit.serial = serial(fields)
        unit.limits = limits(fields)
        if let timeout = span(fields, "command-timeout", in: ConfigurationLimits.commandTimeoutNanoseconds) {
            unit.commandTimeoutNanoseconds = timeout
        }
        unit.removable = boolean(fields, "removable") ?? false
        if let policy = choice(fields, "on-error", of: LogicalUnitSettings.OnError.allCases.map(\.rawValue)) {
            unit.onError = LogicalUnitSettings.OnError(rawValue: policy)!
        }
        unit.retryTimeoutNanoseconds = span(
            fields, "retry-timeout", in: ConfigurationLimits.retryTimeoutNanoseconds)
        if fields["retry-timeout"] != nil, unit.onError != .retry {
            report(fields.key("retry-timeout"), "means nothing here: remove it, or add on-error: retry")
        }
        return unit
    }

    private mutating func readXen(_ node: Node, at key: String) -> XenConfiguration? {
        var xen = XenConfiguration()
        if node.isEmpty { return xen }
        let keys = ["enabled", "records", "host-devices", "port", "staging"]
        guard let fields = mapping(node, at: key, allowed: keys) else { return nil }
        if let enabled = choice(fields, "enabled", of: XenConfiguration.Enabled.allCases.map(\.rawValue)) {
            xen.enabled = XenConfiguration.Enabled(rawValue: enabled)!
        }
        if let records = path(fields, "records") { xen.records = records }
        if let hostDevices = boolean(fields, "host-devices") { xen.hostDevices = hostDevices }
        if let port = integer(fields, "port", in: ConfigurationLimits.targetPorts) { xen.port = port }
        if let staging = size(fields, "staging") {
            let range = XenConfiguration.stagingBytes
            if range.contains(staging) {
                xen.staging = staging
            } else {
                let (least, most) = (Size.format(range.lowerBound), Size.format(range.upperBound))
                report(
                    fields.key("staging"), "cannot be \(Size.format(staging)): write a size from \(least) to \(most)")
            }
        }
        return xen
    }

    private mutating func readFronts(_ node: Node, at key: String) {
        if node.isEmpty { return }
        guard case .sequence(let fronts) = node else {
            return report(key, "takes a list: write each socket as - { socket: /run/targetd/vm1.sock, targets: … }")
        }
        for (index, front) in fronts.enumerated() {
            let key = "\(key)[\(index)]"
            result.source.lines[key] = front.mark?.line
            // One that could not be read keeps its place, so that the others are named by theirs.
            let read = readFront(front, at: key) ?? VhostUserFrontConfiguration(socket: "")
            result.configuration.vhostUserFronts.append(read)
        }
    }

    private mutating func readFront(_ node: Node, at key: String) -> VhostUserFrontConfiguration? {
        guard let fields = mapping(node, at: key, allowed: Self.frontKeys) else { return nil }
        let queues = integer(fields, "queues", in: ConfigurationLimits.queues)
        let limits = limits(fields)
        var targets: [Int: NAAName] = [:]
        let hasTargets = fields.has("targets", orReport: "add targets: such as { 0: naa.60014054ac780582 }", &self)
        entries(fields, "targets", named: "targets by virtio-scsi target number, such as { 0: naa.60014054ac780582 }") {
            reader, name, node, key in
            let range = ConfigurationLimits.virtioTargetNumbers
            guard let number = reader.number(name, in: range) else {
                return reader.report(
                    key,
                    "\"\(name)\" is not a virtio-scsi target number: write a whole number from \(range.lowerBound) "
                        + "to \(range.upperBound)")
            }
            guard let text = reader.string(node, at: key), let target = reader.targetName(text, at: key) else { return }
            guard targets.updateValue(target, forKey: number) == nil else {
                return reader.report(key, "target number \(number) is given twice at this socket")
            }
        }
        let port = integer(fields, "port", in: ConfigurationLimits.targetPorts)
        let mode = choice(fields, "mode", of: VhostUserFrontConfiguration.Mode.allCases.map(\.rawValue))
        let isSpread = boolean(fields, "spread") ?? false
        let offersConfigurationSpace = boolean(fields, "config-space") ?? false
        let offersRingReset = boolean(fields, "ring-reset") ?? false
        let drainTimeout = span(fields, "drain-timeout", in: ConfigurationLimits.drainTimeoutNanoseconds)
        guard fields.has("socket", orReport: "add socket: and the absolute path of the socket to make", &self),
            let socket = path(fields, "socket"), hasTargets
        else { return nil }
        return VhostUserFrontConfiguration(
            socket: socket, queues: queues ?? 1, targets: targets,
            port: port ?? VhostUserFrontConfiguration.defaultPort, limits: limits,
            mode: mode.flatMap { VhostUserFrontConfiguration.Mode(rawValue: $0) } ?? .server, isSpread: isSpread,
            offersConfigurationSpace: offersConfigurationSpace, offersRingReset: offersRingReset,
            drainTimeoutNanoseconds: drainTimeout)
    }

    private static let frontKeys = [
        "socket", "mode", "queues", "targets", "port", "limits", "spread", "config-space", "ring-reset",
        "drain-timeout",
    ]

    private mutating func limits(_ fields: Fields) -> LimitsConfiguration {
        guard let node = fields["limits"], !node.isEmpty else { return LimitsConfiguration() }
        return readLimits(node, at: fields.key("limits"))
    }

    private mutating func readLimits(_ node: Node, at key: String) -> LimitsConfiguration {
        var limits = LimitsConfiguration()
        guard let fields = mapping(node, at: key, allowed: ["iops", "bandwidth", "burst"]) else { return limits }
        limits.operationsPerSecond = integer(fields, "iops", in: ConfigurationLimits.operationsPerSecond).map(
            UInt64.init)
        if let bytes = size(fields, "bandwidth") {
            let range = ConfigurationLimits.bytesPerSecond
            if range.contains(bytes) {
                limits.bytesPerSecond = bytes
            } else {
                report(
                    fields.key("bandwidth"),
                    "cannot be \(Size.format(bytes)) in a second: write a size from \(Size.format(range.lowerBound)) "
                        + "to \(Size.format(range.upperBound))")
            }
        }
        limits.burstNanoseconds = span(fields, "burst", in: ConfigurationLimits.burstNanoseconds)
        if limits.burstNanoseconds != nil, fields["iops"] == nil, fields["bandwidth"] == nil {
            report(key, "has a burst of nothing: add iops: or bandwidth:")
        }
        return limits
    }

    // MARK: Parts of a file

    /// Reads a part of a configuration by itself, as the control API takes it.
    private static func readPart<Value>(
        _ text: String, _ key: String, _ read: (inout ConfigurationReader, Node) -> Value?
    ) -> (value: Value?, problems: [Problem]) {
        var reader = ConfigurationReader(result: Result(source: SourceMap(source: "body")))
        do {
            guard let node = try Yams.compose(yaml: text) else {
                return (nil, [Problem(key: key, text: "is empty")])
            }
            let value = read(&reader, node)
            return (value, reader.result.problems)
        } catch {
            return (nil, [problem(of: error, yaml: text)])
        }
    }

    /// What is behind the name of a backstore.
    static func backstore(_ text: String, name: String) -> (value: BackstoreConfiguration?, problems: [Problem]) {
        readPart(text, name) { reader, node in
            reader.checkName(name, at: "backstores.\(name)")
            return reader.readBackstore(node, at: "backstores.\(name)")
        }
    }

    /// What is behind the name of a target.
    static func target(_ text: String, name: String) -> (value: TargetConfiguration?, problems: [Problem]) {
        readPart(text, name) { $0.readTarget($1, at: "targets.\(name)") }
    }

    /// What is behind the number of a logical unit.
    static func logicalUnit(_ text: String, key: String) -> (value: LogicalUnitSettings?, problems: [Problem]) {
        readPart(text, key) { $0.readLogicalUnit($1, at: key) }
    }

    /// One of the vhost-user sockets.
    static func front(_ text: String) -> (value: VhostUserFrontConfiguration?, problems: [Problem]) {
        readPart(text, "front") { $0.readFront($1, at: "vhost-user-scsi") }
    }

    /// Limits.
    static func limits(_ text: String) -> (value: LimitsConfiguration?, problems: [Problem]) {
        readPart(text, "limits") { $0.readLimits($1, at: "limits") }
    }

    // MARK: Values

    /// A key's value in a mapping, and where it stands.
    private struct Fields {
        var path: String
        var values: [String: Node]

        subscript(_ name: String) -> Node? { values[name] }

        func key(_ name: String) -> String { path.isEmpty ? name : "\(path).\(name)" }

        func has(_ name: String, orReport text: String, _ reader: inout ConfigurationReader) -> Bool {
            if values[name] != nil { return true }
            reader.report(path, "has no \(name): \(text)")
            return false
        }
    }

    private mutating func report(_ key: String, _ text: String) {
        result.problems.append(result.source.problem(key, text))
    }

    /// The values of a mapping by key; `nil` and a problem if it is none. Unknown keys are problems if `allowed` says
    /// which are known.
    private mutating func mapping(_ node: Node, at path: String, allowed: [String]?, of kind: String? = nil) -> Fields?
    {
        guard case .mapping(let pairs) = node else {
            let keys = allowed.map { ": " + $0.joined(separator: ", ") } ?? ""
            report(path, "takes keys and values\(keys)")
            return nil
        }
        var fields = Fields(path: path, values: [:])
        for (keyNode, value) in pairs {
            guard let name = keyNode.scalar?.string else {
                report(path, "has a key that is not a word")
                continue
            }
            let key = fields.key(name)
            result.source.lines[key] = keyNode.mark?.line
            if let allowed, !allowed.contains(name) {
                report(key, unknown(name, allowed, kind: kind))
                continue
            }
            guard fields.values.updateValue(value, forKey: name) == nil else {
                report(key, "is given twice")
                continue
            }
        }
        return fields
    }

    private func unknown(_ name: String, _ allowed: [String], kind: String?) -> String {
        let suggestion = nearest(name, in: allowed).map { "did you mean \($0)? " } ?? ""
        let place = kind.map { " of \($0)" } ?? ""
        return "is not a key\(place) here: \(suggestion)allowed: \(allowed.joined(separator: ", "))"
    }

    /// Calls `body` for each entry of a mapping whose keys are names.
    private mutating func entries(
        _ fields: Fields, _ name: String, named what: String,
        _ body: (inout ConfigurationReader, String, Node, String) -> Void
    ) {
        guard let node = fields[name], !node.isEmpty else { return }
        guard case .mapping = node else { return report(fields.key(name), "takes \(what)") }
        guard let entries = mapping(node, at: fields.key(name), allowed: nil) else { return }
        for (entry, value) in entries.values.sorted(by: { $0.key < $1.key }) {
            body(&self, entry, value, entries.key(entry))
        }
    }

    private mutating func string(_ fields: Fields, _ name: String) -> String? {
        fields[name].flatMap { string($0, at: fields.key(name)) }
    }

    private mutating func string(_ node: Node, at key: String) -> String? {
        guard let text = node.scalar?.string else {
            report(key, "takes a single value")
            return nil
        }
        guard !text.isEmpty else {
            report(key, "has no value")
            return nil
        }
        guard !text.unicodeScalars.contains(where: { $0.value < 0x20 || $0.value == 0x7f }) else {
            report(key, "has a control character in its value")
            return nil
        }
        return text
    }

    private mutating func boolean(_ fields: Fields, _ name: String) -> Bool? {
        choice(fields, name, of: ["true", "false"]).map { $0 == "true" }
    }

    private mutating func choice(_ fields: Fields, _ name: String, of allowed: [String]) -> String? {
        guard let text = string(fields, name) else { return nil }
        guard allowed.contains(text) else {
            let suggestion = nearest(text, in: allowed).map { "did you mean \($0)? " } ?? ""
            report(fields.key(name), "cannot be \"\(text)\": \(suggestion)allowed: \(allowed.joined(separator: ", "))")
            return nil
        }
        return text
    }

    private mutating func integer(_ fields: Fields, _ name: String, in range: ClosedRange<Int>) -> Int? {
        guard let text = string(fields, name) else { return nil }
        guard let value = number(text, in: range) else {
            report(
                fields.key(name),
                "cannot be \"\(text)\": write a whole number from \(range.lowerBound) to \(range.upperBound)")
            return nil
        }
        return value
    }

    /// Whole numbers in a list.
    private mutating func integers(_ fields: Fields, _ name: String, in range: ClosedRange<Int>) -> [Int]? {
        guard let node = fields[name] else { return nil }
        guard case .sequence(let items) = node, !items.isEmpty else {
            report(fields.key(name), "takes a list of whole numbers, such as [\(range.lowerBound)]")
            return nil
        }
        let values = items.map { $0.scalar.flatMap { number($0.string, in: range) } }
        guard let wrong = values.firstIndex(where: { $0 == nil }) else { return values.compactMap(\.self) }
        report(
            fields.key(name),
            "cannot have \"\(items[wrong].scalar?.string ?? "")\": write whole numbers from \(range.lowerBound) to "
                + "\(range.upperBound)")
        return nil
    }

    private mutating func integer(_ fields: Fields, _ name: String, of allowed: [Int]) -> Int? {
        choice(fields, name, of: allowed.map(String.init)).flatMap { Int($0) }
    }

    /// A whole number as people write it: digits only, no superfluous zeros, so that a number has one spelling.
    private func number(_ text: String, in range: ClosedRange<Int>) -> Int? {
        guard text.allSatisfy({ $0.isASCII && $0.isNumber }), text == "0" || text.first != "0", let value = Int(text),
            range.contains(value)
        else { return nil }
        return value
    }

    private mutating func size(_ fields: Fields, _ name: String) -> UInt64? {
        guard let text = string(fields, name) else { return nil }
        do {
            return try Size.parse(text)
        } catch {
            report(fields.key(name), "\"\(text)\" \(error.text)")
            return nil
        }
    }

    private mutating func span(_ fields: Fields, _ name: String, in range: ClosedRange<UInt64>) -> UInt64? {
        guard let text = string(fields, name) else { return nil }
        do throws(QuantityError) {
            let value = try TimeSpan.parse(text)
            guard range.contains(value) else {
                let (least, most) = (TimeSpan.format(range.lowerBound), TimeSpan.format(range.upperBound))
                throw QuantityError(text: "is out of range: write a time from \(least) to \(most)")
            }
            return value
        } catch {
            report(fields.key(name), "\"\(text)\" \(error.text)")
            return nil
        }
    }

    private mutating func mode(_ fields: Fields, _ name: String) -> UInt16? {
        guard let text = string(fields, name) else { return nil }
        let digits = text.hasPrefix("0o") ? text.dropFirst(2) : text[...]
        guard digits.allSatisfy({ ("0"..."7").contains($0) }), let mode = Int(digits, radix: 8),
            ConfigurationLimits.socketMode.contains(mode)
        else {
            report(fields.key(name), "cannot be \"\(text)\": write octal permission bits, such as 0660")
            return nil
        }
        return UInt16(mode)
    }

    private mutating func address(_ fields: Fields, _ name: String) -> MetricsAddress? {
        guard let text = string(fields, name) else { return nil }
        let end = text.lastIndex(of: ":") ?? text.endIndex
        var host = text[..<end]
        // The brackets keep the colons of the host from the one before the port.
        let isBracketed = host.hasPrefix("[") && host.hasSuffix("]")
        if isBracketed { host = host.dropFirst().dropLast() }
        guard end != text.endIndex, isBracketed == host.contains(":"), NumericAddress.isValid(String(host)),
            let port = number(String(text[text.index(after: end)...]), in: ConfigurationLimits.ports)
        else {
            report(
                fields.key(name),
                "cannot be \"\(text)\": write a numeric address and a port, such as 127.0.0.1:9464 or [::1]:9464")
            return nil
        }
        return MetricsAddress(host: String(host), port: port)
    }

    private mutating func path(_ fields: Fields, _ name: String) -> String? {
        guard let text = string(fields, name) else { return nil }
        guard text.hasPrefix("/") else {
            report(fields.key(name), "\"\(text)\" is not an absolute path: begin it with /")
            return nil
        }
        return text
    }

    private mutating func serial(_ fields: Fields) -> String? {
        guard let text = string(fields, "serial") else { return nil }
        let range = ConfigurationLimits.serialCharacters
        guard range.contains(text.utf8.count), text.utf8.allSatisfy({ (0x21...0x7e).contains($0) }) else {
            report(
                fields.key("serial"),
                "\"\(text)\" cannot be a serial number: write \(range.lowerBound) to "
                    + "\(range.upperBound) printable ASCII characters without spaces")
            return nil
        }
        return text
    }

    private mutating func targetName(_ text: String, at key: String) -> NAAName? {
        do {
            return try NAAName(parsing: text, kinds: 2...3, 5...6)
        } catch {
            report(key, "\"\(text)\" \(error.text), such as naa.60014054ac780582")
            return nil
        }
    }

    private mutating func checkName(_ name: String, at key: String) {
        let range = ConfigurationLimits.nameCharacters
        let allowed = name.utf8.allSatisfy {
            (0x30...0x39).contains($0) || (0x41...0x5a).contains($0) || (0x61...0x7a).contains($0)
                || "._-".utf8.contains($0)
        }
        guard allowed, range.contains(name.utf8.count), name.first != ".", name.first != "-" else {
            return report(
                key,
                "\"\(name)\" cannot be a name: write \(range.lowerBound) to \(range.upperBound) letters, digits, "
                    + "dots, dashes and underscores, the first of them no dot or dash")
        }
    }

    // MARK: What is not YAML

    private static func problem(of error: any Error, yaml: String) -> Problem {
        guard let error = error as? YamlError else { return Problem(key: "", text: "cannot be read: \(error)") }
        switch error {
        case .scanner(let context, let problem, let mark, _), .parser(let context, let problem, let mark, _),
            .composer(let context, let problem, let mark, _):
            let during = context.map { ", \($0.text.trimmed) that began in line \($0.mark.line)" } ?? ""
            return Problem(line: mark.line, key: "", text: "is not YAML: \(problem)\(during)")
        case .reader(let problem, let offset, _, _):
            let line = offset.map { yaml.prefix($0).count(where: \.isNewline) + 1 }
            return Problem(line: line, key: "", text: "is not YAML: \(problem)")
        case .duplicatedKeysInMapping(let duplicates, let context):
            let keys = duplicates.joined(separator: ", ")
            return Problem(line: context.mark.line, key: keys, text: "is given twice in the same place: remove one")
        default:
            return Problem(key: "", text: "cannot be read as YAML: \(error)")
        }
    }
}

extension Node {
    /// Whether the key has nothing behind it.
    fileprivate var isEmpty: Bool {
        guard let scalar else { return false }
        return scalar.string.isEmpty && scalar.style == .plain
    }
}

extension String {
    fileprivate var trimmed: String {
        String(drop(while: \.isWhitespace).reversed().drop(while: \.isWhitespace).reversed())
    }
}
