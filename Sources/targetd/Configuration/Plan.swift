// Plan: the smallest set of changes that makes a running daemon match a configuration.
//
// Owns: what is compared, in which order changes are made, and what cannot be changed while running. Called by: reload
// and the control API. Must not know: how a change is made.

/// One change of a running daemon.
enum Change: Equatable, Sendable {
    typealias AccessState = PortGroupConfiguration.AccessState

    case removeSocket(String)
    case detachTarget(NAAName, number: Int, socket: String)
    case removeLogicalUnit(Int, target: NAAName)
    case removeTarget(NAAName)
    case removeBackstore(String)
    case addBackstore(String)
    case resizeBackstore(String, size: UInt64)
    case addTarget(NAAName)
    case addLogicalUnit(Int, target: NAAName)
    case attachTarget(NAAName, number: Int, socket: String)
    case addSocket(String)
    case swapMedium(Int, target: NAAName, backstore: String)
    case setPortGroups(NAAName)
    case setAccessState(NAAName, group: Int, old: AccessState, new: AccessState)
    case protectLogicalUnit(Int, target: NAAName, isProtected: Bool)
    case limitLogicalUnit(Int, target: NAAName)
    case limitSocket(String)
    case setCommandTimeout(Int, target: NAAName)
    case stopXen
    case startXen
    case setStopTimeout
    case setLogLevel
}

extension Change {
    /// The change that takes this one back, between the same configurations the other way round; `nil`: there is none.
    var inverse: Change? {
        switch self {
        case .removeSocket(let path): .addSocket(path)
        case .addSocket(let path): .removeSocket(path)
        case .detachTarget(let name, let number, let socket): .attachTarget(name, number: number, socket: socket)
        case .attachTarget(let name, let number, let socket): .detachTarget(name, number: number, socket: socket)
        case .removeLogicalUnit(let number, let target): .addLogicalUnit(number, target: target)
        case .addLogicalUnit(let number, let target): .removeLogicalUnit(number, target: target)
        case .removeTarget(let name): .addTarget(name)
        case .addTarget(let name): .removeTarget(name)
        case .removeBackstore(let name): .addBackstore(name)
        case .addBackstore(let name): .removeBackstore(name)
        case .protectLogicalUnit(let number, let target, let isProtected):
            .protectLogicalUnit(number, target: target, isProtected: !isProtected)
        case .setAccessState(let name, let group, let old, let new):
            .setAccessState(name, group: group, old: new, new: old)
        // Made again, they take what they set from the other configuration.
        case .setStopTimeout, .setLogLevel, .setCommandTimeout, .limitLogicalUnit, .limitSocket, .swapMedium,
            .setPortGroups:
            self
        case .stopXen: .startXen
        case .startXen: .stopXen
        // A medium that grew stays as it is: to cut it is to lose what was written meanwhile.
        case .resizeBackstore: nil
        }
    }
}

extension Change: CustomStringConvertible {
    /// As `targetctl diff` shows it: `-` takes away, `+` adds, `~` changes in place.
    var description: String {
        switch self {
        case .removeSocket(let path): "- vhost-user-scsi \(path)"
        case .detachTarget(let name, let number, let socket): "- vhost-user-scsi \(socket) target \(number): \(name)"
        case .removeLogicalUnit(let number, let target): "- target \(target) LUN \(number)"
        case .removeTarget(let name): "- target \(name)"
        case .removeBackstore(let name): "- backstore \(name)"
        case .addBackstore(let name): "+ backstore \(name)"
        case .resizeBackstore(let name, let size): "~ backstore \(name) to \(Size.format(size))"
        case .addTarget(let name): "+ target \(name)"
        case .addLogicalUnit(let number, let target): "+ target \(target) LUN \(number)"
        case .attachTarget(let name, let number, let socket): "+ vhost-user-scsi \(socket) target \(number): \(name)"
        case .addSocket(let path): "+ vhost-user-scsi \(path)"
        case .setPortGroups(let name): "~ target \(name) port-groups"
        case .setAccessState(let name, let group, _, let state):
            "~ target \(name) port group \(group): \(state.rawValue)"
        case .protectLogicalUnit(let number, let target, let isProtected):
            "~ target \(target) LUN \(number) read-only: \(isProtected)"
        case .swapMedium(let number, let target, let backstore):
            "~ target \(target) LUN \(number) medium: \(backstore)"
        case .limitLogicalUnit(let number, let target): "~ target \(target) LUN \(number) limits"
        case .limitSocket(let path): "~ vhost-user-scsi \(path) limits"
        case .setCommandTimeout(let number, let target): "~ target \(target) LUN \(number) command-timeout"
        case .stopXen: "- xen"
        case .startXen: "+ xen"
        case .setStopTimeout: "~ stop-timeout"
        case .setLogLevel: "~ log-level"
        }
    }
}

/// What is to be done, or why it cannot be done while the daemon runs.
struct Plan: Equatable, Sendable {
    /// In the order in which they are to be made: first what may fail and disturbs nobody, new media; then what takes
    /// away, from the sockets down to the media; then what adds, from the media up to the sockets; last the sizes,
    /// because nothing takes back that a medium grew.
    private(set) var changes: [Change] = []
    /// Differences that only a restart, or two steps, can bring about. If there is one, nothing is done.
    private(set) var refusals: [Refusal] = []
    /// Where everything is afterwards.
    private(set) var placement: Placement

    /// A difference that cannot be made to go away while the daemon runs.
    struct Refusal: Equatable, Sendable {
        /// The key that differs, as in the file.
        let key: String
        /// Why, and what to do.
        let text: String
    }

    private var resizes: [Change] = []
    private let old: Configuration
    private let new: Configuration

    /// Compares what runs with what is wanted. Both are free of errors.
    init(from old: Configuration, placement: Placement, to new: Configuration) {
        (self.old, self.new, self.placement) = (old, new, placement)
        compareSettings()
        let replaced = replacedBackstores().union(place())
        let early = compareEarly(replaced)
        compareTakingAway(replaced, early)
        compareAdding(replaced, early)
        changes += resizes
    }

    private mutating func compareSettings() {
        let text = "cannot change while targetd runs: restart it"
        if old.reactors != new.reactors { refusals.append(Refusal(key: "reactors", text: text)) }
        if old.ioEngine != new.ioEngine { refusals.append(Refusal(key: "io-engine", text: text)) }
        if old.stateDirectory != new.stateDirectory { refusals.append(Refusal(key: "state-directory", text: text)) }
        if old.control != new.control { refusals.append(Refusal(key: "control", text: text)) }
        if old.pollNanoseconds != new.pollNanoseconds { refusals.append(Refusal(key: "poll", text: text)) }
        if old.stopTimeoutNanoseconds != new.stopTimeoutNanoseconds { changes.append(.setStopTimeout) }
        if old.logLevel != new.logLevel { changes.append(.setLogLevel) }
    }

    /// Backstores that are there before and after, but are another medium or are opened in another way.
    private mutating func replacedBackstores() -> Set<String> {
        var replaced: Set<String> = []
        for (name, wanted) in new.usedBackstores.sorted(by: { $0.key < $1.key }) {
            guard let running = old.usedBackstores[name], running != wanted else { continue }
            var resized = running
            resized.medium = running.medium.resized(to: wanted.medium.size)
            guard resized == wanted, let before = running.medium.size, let after = wanted.medium.size else {
                // A size that appears or disappears beside a file which exists says nothing new.
                if running.medium.resized(to: nil) != wanted.medium.resized(to: nil) || !running.isOpenedAs(wanted) {
                    replaced.insert(name)
                }
                continue
            }
            if case .ram = running.medium {
                refusals.append(
                    Refusal(
                        key: "backstores.\(name).size",
                        text: "is memory and cannot be resized: add a new backstore, or restart targetd"))
            } else if after > before {
                resizes.append(.resizeBackstore(name, size: after))
            } else {
                refusals.append(
                    Refusal(
                        key: "backstores.\(name).size",
                        text:
                            "would shrink from \(Size.format(before)) to \(Size.format(after)), which loses what is at "
                            + "the end: restore the size, or remove the backstore and add a new one"))
            }
        }
        return replaced
    }

    /// New media can be opened before anything is taken away, unless they are what another backstore has open.
    private mutating func compareEarly(_ replaced: Set<String>) -> Set<String> {
        let open = Set(old.usedBackstores.values.compactMap(\.path))
        let early = new.usedBackstores.filter { name, backstore in
            old.usedBackstores[name] == nil && backstore.path.map { !open.contains($0) } ?? true
        }
        changes += early.keys.sorted().map { .addBackstore($0) }
        return Set(early.keys)
    }

    private mutating func compareTakingAway(_ replaced: Set<String>, _ early: Set<String>) {
        var sockets: [Change] = []
        var units: [Change] = []
        var targets: [Change] = []
        for front in old.vhostUserFronts {
            guard let wanted = new.front(front.socket), wanted.isSameDevice(as: front) else {
                sockets.append(.removeSocket(front.socket))
                continue
            }
            for (number, target) in front.targets.sorted(by: { $0.key < $1.key }) where wanted.targets[number] != target
            {
                sockets.append(.detachTarget(target, number: number, socket: front.socket))
            }
        }
        for (name, target) in old.targets.sorted(by: { $0.key < $1.key }) {
            for (number, unit) in target.logicalUnits.sorted(by: { $0.key < $1.key }) {
                let wanted = new.targets[name]?.logicalUnits[number]
                guard wanted?.isSameDisk(as: unit) != true || replaced.contains(unit.backstore) else { continue }
                if let wanted, canSwap(unit, wanted, replaced, early) {
                    units.append(.swapMedium(number, target: name, backstore: wanted.backstore))
                } else {
                    units.append(.removeLogicalUnit(number, target: name))
                }
            }
            if new.targets[name] == nil { targets.append(.removeTarget(name)) }
        }
        let backstores = old.usedBackstores.keys.sorted().filter {
            new.usedBackstores[$0] == nil || replaced.contains($0)
        }
        if old.servedXen != nil && old.servedXen != new.servedXen { sockets.append(.stopXen) }
        changes += sockets + units + targets + backstores.map { .removeBackstore($0) }
    }

    /// Whether a medium can take another's place while the unit stays: one that is open, or can be, beside it.
    private func canSwap(
        _ running: LogicalUnitSettings, _ wanted: LogicalUnitSettings, _ replaced: Set<String>, _ early: Set<String>
    ) -> Bool {
        var same = wanted
        same.backstore = running.backstore
        // A name that is derived is that of the medium: another medium is another disk.
        return running.removable && wanted.removable && running.name != nil && running.backstore != wanted.backstore
            && running.isSameDisk(as: same) && early.contains(wanted.backstore)
            && !replaced.contains(running.backstore)
    }

    private mutating func compareAdding(_ replaced: Set<String>, _ early: Set<String>) {
        let backstores = new.usedBackstores.keys.sorted().filter {
            (old.usedBackstores[$0] == nil && !early.contains($0)) || replaced.contains($0)
        }
        changes += backstores.map { .addBackstore($0) }
        for (name, target) in new.targets.sorted(by: { $0.key < $1.key }) {
            if let running = old.targets[name] {
                comparePortGroups(of: name, running.portGroups, target.portGroups)
            } else {
                changes.append(.addTarget(name))
            }
            for (number, unit) in target.logicalUnits.sorted(by: { $0.key < $1.key }) {
                let running = old.targets[name]?.logicalUnits[number]
                let stays =
                    running.map { running in
                        canSwap(running, unit, replaced, early)
                            || running.isSameDisk(as: unit) && !replaced.contains(unit.backstore)
                    } ?? false
                guard let running, stays else {
                    changes.append(.addLogicalUnit(number, target: name))
                    continue
                }
                if unit.readOnly != running.readOnly {
                    changes.append(.protectLogicalUnit(number, target: name, isProtected: unit.readOnly))
                }
                if unit.limits != running.limits { changes.append(.limitLogicalUnit(number, target: name)) }
                if unit.commandTimeoutNanoseconds != running.commandTimeoutNanoseconds {
                    changes.append(.setCommandTimeout(number, target: name))
                }
            }
        }
        for front in new.vhostUserFronts {
            guard let running = old.front(front.socket), running.isSameDevice(as: front) else {
                changes.append(.addSocket(front.socket))
                continue
            }
            if front.limits != running.limits { changes.append(.limitSocket(front.socket)) }
            for (number, target) in front.targets.sorted(by: { $0.key < $1.key })
            where running.targets[number] != target {
                changes.append(.attachTarget(target, number: number, socket: front.socket))
            }
        }
        // Guests whose rings are in use go on with what is there, so all must be there.
        if new.servedXen != nil && old.servedXen != new.servedXen { changes.append(.startXen) }
    }

    /// States change in place, and so does everything else of port groups: fronts at ports that go are gone by now, and
    /// those at new ports come later.
    private mutating func comparePortGroups(
        of name: NAAName, _ running: [PortGroupConfiguration], _ wanted: [PortGroupConfiguration]
    ) {
        guard running.count == wanted.count, zip(running, wanted).allSatisfy({ $0.isSameGroup(as: $1) }) else {
            return changes.append(.setPortGroups(name))
        }
        for (old, new) in zip(running, wanted) where old.state != new.state {
            changes.append(.setAccessState(name, group: new.identifier, old: old.state, new: new.state))
        }
    }

    /// Finds a reactor for what is new. What runs stays where it is; if that makes a group impossible, it is refused.
    ///
    /// - Returns: The backstores whose new users are on another reactor.
    private mutating func place() -> Set<String> {
        switch Placement.extending(placement, to: new) {
        case .success(let extended):
            let before = placement
            placement = extended
            return Set(extended.backstores.filter { (before.backstores[$0.key] ?? $0.value) != $0.value }.keys)
        case .failure(let conflict):
            refusals.append(
                Refusal(
                    key: conflict.key,
                    text: "would bring together what runs on different reactors: restart targetd, or use reactors: 1"))
            return []
        }
    }
}

extension Configuration {
    /// The backstores that a logical unit has. Only they are opened, by the reactor of the unit.
    var usedBackstores: [String: BackstoreConfiguration] {
        let used = Set(targets.values.flatMap { $0.logicalUnits.values.map(\.backstore) })
        return backstores.filter { used.contains($0.key) }
    }

    /// The front with this socket.
    func front(_ socket: String) -> VhostUserFrontConfiguration? { vhostUserFronts.first { $0.socket == socket } }
}

extension LogicalUnitSettings {
    /// Whether a guest takes one for the other, in another state at the most: protected, limited.
    fileprivate func isSameDisk(as other: Self) -> Bool {
        var same = other
        same.commandTimeoutNanoseconds = commandTimeoutNanoseconds
        (same.readOnly, same.limits) = (readOnly, limits)
        return self == same
    }
}

extension BackstoreConfiguration {
    /// Whether everything but the medium is the same.
    fileprivate func isOpenedAs(_ other: Self) -> Bool {
        blockSize == other.blockSize && readOnly == other.readOnly && isShared == other.isShared
    }
}

extension BackstoreConfiguration.Medium {
    /// The size that was asked for; `nil` where the medium says it itself.
    var size: UInt64? {
        switch self {
        case .ram(let size): size
        case .file(_, let size, _): size
        case .blockDevice: nil
        }
    }

    /// The same medium with another size.
    fileprivate func resized(to size: UInt64?) -> Self {
        switch self {
        case .ram: .ram(size: size ?? 0)
        case .file(let path, _, let buffered): .file(path: path, size: size, buffered: buffered)
        case .blockDevice: self
        }
    }
}
