// ConfigurationRules: what must hold between the parts of a configuration, whatever machine it is for.
//
// Owns: the rules. Called by: the command line, reload. Must not know: YAML, or what exists on this machine.

/// Checks a configuration in itself.
struct ConfigurationRules {
    private let configuration: Configuration
    private let source: SourceMap
    private var problems: [Problem] = []

    /// All problems, in the order of the file's sections.
    static func check(_ configuration: Configuration, source: SourceMap) -> [Problem] {
        var rules = ConfigurationRules(configuration: configuration, source: source)
        rules.checkControl()
        rules.checkBackstores()
        rules.checkTargets()
        rules.checkPortGroups()
        rules.checkUnitNames()
        rules.checkFronts()
        rules.checkUse()
        return rules.problems
    }

    private init(configuration: Configuration, source: SourceMap) {
        self.configuration = configuration
        self.source = source
    }

    private mutating func report(_ key: String, _ text: String, severity: Problem.Severity = .error) {
        problems.append(source.problem(key, text, severity: severity))
    }

    private mutating func checkControl() {
        guard let control = configuration.control else { return }
        checkSocketPath(control.socket, at: "control.socket")
    }

    private mutating func checkSocketPath(_ path: String, at key: String) {
        guard path.utf8.count > ConfigurationLimits.socketPathBytes else { return }
        report(
            key,
            "is \(path.utf8.count) bytes long: the path of a socket has at most "
                + "\(ConfigurationLimits.socketPathBytes)")
    }

    private mutating func checkBackstores() {
        var users: [String: String] = [:]
        for (name, backstore) in configuration.backstores.sorted(by: { $0.key < $1.key }) {
            let key = "backstores.\(name)"
            switch backstore.medium {
            case .ram(let size): checkSize(size, backstore, limit: ConfigurationLimits.ramBytes, at: key)
            case .file(_, let size?, _): checkSize(size, backstore, limit: ConfigurationLimits.mediumBytes, at: key)
            case .file, .blockDevice: break
            }
            if let path = backstore.path, let other = users.updateValue(name, forKey: path) {
                report("\(key).path", "is already the medium of backstore \(other): two would overwrite each other")
            }
        }
    }

    private mutating func checkSize(_ size: UInt64, _ backstore: BackstoreConfiguration, limit: UInt64, at key: String)
    {
        let blockSize = UInt64(backstore.blockSize ?? 512)
        if size == 0 {
            report("\(key).size", "cannot be 0: write at least one logical block of \(blockSize) bytes")
        } else if size > limit {
            report("\(key).size", "cannot be \(Size.format(size)): the most is \(Size.format(limit))")
        } else if size % blockSize != 0 {
            report("\(key).size", "\(Size.format(size)) is not a multiple of the logical block of \(blockSize) bytes")
        }
    }

    private mutating func checkTargets() {
        var users: [String: String] = [:]
        for (name, target) in configuration.targets.sorted(by: { $0.key < $1.key }) {
            if target.logicalUnits.isEmpty {
                report("targets.\(name)", "has no logical units: its initiators find nothing", severity: .warning)
            }
            for (number, unit) in target.logicalUnits.sorted(by: { $0.key < $1.key }) {
                let key = "targets.\(name).luns.\(number)"
                guard configuration.backstores[unit.backstore] != nil else {
                    // One that is there but could not be read has been reported as that.
                    if source.lines["backstores.\(unit.backstore)"] != nil { continue }
                    report(key, undefined(unit.backstore, "backstore", in: configuration.backstores.keys.sorted()))
                    continue
                }
                if let other = users.updateValue("LUN \(number) of \(name)", forKey: unit.backstore) {
                    report(
                        key,
                        "backstore \(unit.backstore) is already \(other): a backstore has one logical unit; "
                            + "to reach it through more sockets, name its target at each of them")
                }
            }
        }
    }

    private mutating func checkPortGroups() {
        for (name, target) in configuration.targets.sorted(by: { $0.key < $1.key }) where !target.portGroups.isEmpty {
            let key = "targets.\(name).port-groups"
            var groups: [Int: Int] = [:]
            var ports: [Int: Int] = [:]
            for (index, group) in target.portGroups.enumerated() {
                if let other = groups.updateValue(index, forKey: group.identifier) {
                    report("\(key)[\(index)].id", "\(group.identifier) is already the number of \(key)[\(other)]")
                }
                for port in group.ports {
                    guard let other = ports.updateValue(group.identifier, forKey: port) else { continue }
                    report(
                        "\(key)[\(index)].ports", "port \(port) is already in group \(other): a port is in one group")
                }
            }
            if target.portGroups.count > ConfigurationLimits.portGroups {
                report(key, "are too many: at most \(ConfigurationLimits.portGroups)")
            }
            if target.ports.count > ConfigurationLimits.portsOfATarget {
                report(key, "have too many ports: at most \(ConfigurationLimits.portsOfATarget) in all")
            }
        }
        // Which targets Xen guests use, the toolstack decides.
        guard let xen = configuration.servedXen else { return }
        for name in configuration.targets.keys.sorted() { checkPort(xen.port, of: name, at: "xen.port") }
    }

    private mutating func checkPort(_ port: Int, of name: NAAName, at key: String) {
        guard let target = configuration.targets[name], !target.ports.contains(port) else { return }
        let ports = target.ports.sorted().map(String.init).joined(separator: ", ")
        report(
            key,
            "\(name) has no port \(port): it has \(ports); add it to one of the port-groups: of the target")
    }

    private mutating func checkUnitNames() {
        var users: [NAAName: (place: String, backstore: String)] = [:]
        for (name, target) in configuration.targets.sorted(by: { $0.key < $1.key }) {
            for (number, unit) in target.logicalUnits.sorted(by: { $0.key < $1.key }) {
                let unitName = unit.effectiveName(target: name)
                let user = (place: "LUN \(number) of \(name)", backstore: unit.backstore)
                // One backstore at two numbers was reported as just that.
                guard let other = users.updateValue(user, forKey: unitName), other.backstore != unit.backstore else {
                    continue
                }
                report(
                    "targets.\(name).luns.\(number).name",
                    "\(unitName) is already the name of \(other.place): a guest would take the two for one disk")
            }
        }
    }

    private mutating func checkFronts() {
        var sockets: [String: Int] = [:]
        for (index, front) in configuration.vhostUserFronts.enumerated() {
            let key = "vhost-user-scsi[\(index)]"
            // One that could not be read has been reported as that.
            if front.socket.isEmpty { continue }
            checkSocketPath(front.socket, at: "\(key).socket")
            if front.socket == configuration.control?.socket {
                report("\(key).socket", "\(front.socket) is already the control socket")
            }
            if let other = sockets.updateValue(index, forKey: front.socket) {
                report("\(key).socket", "\(front.socket) is already the socket of vhost-user-scsi[\(other)]")
            }
            if front.isSpread, !front.limits.isEmpty {
                report(
                    "\(key).limits",
                    "cannot hold over several reactors: remove spread:, or give limits to the logical units")
            }
            checkTargets(of: front, at: key)
        }
    }

    private mutating func checkTargets(of front: VhostUserFrontConfiguration, at key: String) {
        if front.targets.isEmpty {
            report("\(key).targets", "names no target: add one, such as { 0: naa.60014054ac780582 }")
        }
        var numbers: [NAAName: Int] = [:]
        for (number, name) in front.targets.sorted(by: { $0.key < $1.key }) {
            let key = "\(key).targets.\(number)"
            checkPort(front.port, of: name, at: key)
            if configuration.targets[name] == nil {
                report(key, undefined("\(name)", "target", in: configuration.targets.keys.sorted().map(\.description)))
            }
            if let other = numbers.updateValue(number, forKey: name) {
                report(key, "\(name) is already target number \(other) of this socket")
            }
        }
    }

    private mutating func checkUse() {
        let usedBackstores = Set(configuration.targets.values.flatMap { $0.logicalUnits.values.map(\.backstore) })
        for name in configuration.backstores.keys.sorted() where !usedBackstores.contains(name) {
            report("backstores.\(name)", "is not a logical unit of any target", severity: .warning)
        }
        // Which targets Xen guests use, the toolstack decides.
        if configuration.servedXen != nil { return }
        let usedTargets = Set(configuration.vhostUserFronts.flatMap(\.targets.values))
        for name in configuration.targets.keys.sorted() where !usedTargets.contains(name) {
            report("targets.\(name)", "cannot be reached: no socket names it", severity: .warning)
        }
        if configuration.vhostUserFronts.isEmpty {
            // Where the daemon can be told so later, it need not be told now.
            report(
                "", "no guest can attach: add a socket under vhost-user-scsi:, or xen:",
                severity: configuration.control == nil ? .error : .warning)
        }
    }

    private func undefined(_ name: String, _ kind: String, in defined: [String]) -> String {
        let suggestion = nearest(name, in: defined).map { "did you mean \($0)? " } ?? ""
        let rest = defined.count > 10 ? ", …" : ""
        let list = defined.isEmpty ? "none is" : defined.prefix(10).joined(separator: ", ") + rest
        return "there is no \(kind) \(name): \(suggestion)defined under \(kind)s: \(list)"
    }
}
