// XenControl: the control plane of the Xen front: follows xenstore, and takes each vhost one step after the other.
//
// Owns: the connection to xenstore, the state machine of each vhost. Called by: XenFront's control thread, and by
// tests, one thread at a time. Must not know: rings, reactors: what is done outside of xenstore is its `executor`'s.

import Xenbus

/// Does the effects that a vhost's state machine asks for.
protocol XenbusExecutor: AnyObject {
    /// Begins an effect. Its end is reported by `XenControl.completed`, on the control thread, later.
    func perform(_ effect: XenbusEffect, _ vhost: VhostIdentifier, _ nodes: VhostNodes)
    /// A vhost is gone.
    func forgotten(_ vhost: VhostIdentifier)
    /// Something that an operator wants to know.
    func log(_ vhost: VhostIdentifier, _ text: String, isError: Bool)
    /// Whether another back end of this domain, the kernel's own, has taken the vhost.
    func isTakenByKernel(_ vhost: VhostIdentifier) -> Bool
}

/// Follows `backend/vscsi` of a domain.
final class XenControl {
    private struct Vhost {
        let paths: VhostPaths
        var machine = XenbusBackend()
        var nodes = VhostNodes()
        /// The front end's directory that is watched.
        var watched: String?
        /// Its nodes were lost with a xenstored that died: what is mapped goes on, until there are nodes again.
        var orphaned = false
        /// It is the kernel's own back end's.
        var takenByKernel = false
    }

    private var store: any XenStore
    private unowned let executor: any XenbusExecutor
    private let root: String
    private var vhosts: [VhostIdentifier: Vhost] = [:]
    private var dirty: Set<VhostIdentifier> = []

    private static let backendToken = "targetd-backend"
    private static let frontendToken = "targetd-frontend"
    private static let domainToken = "targetd-domain"

    /// - Parameter domain: The domain that this daemon runs in.
    init(store: any XenStore, domain: UInt16, executor: any XenbusExecutor) {
        self.store = store
        self.executor = executor
        root = "/local/domain/\(domain)/backend/vscsi"
    }

    /// Begins to watch. What is there already is found by the events that each watch begins with.
    func start() throws(XenStoreError) {
        try store.watch(root, token: Self.backendToken)
        // Domains that come and go; only a privileged domain is told.
        try? store.watch("@releaseDomain", token: Self.domainToken)
    }

    /// Goes on with another connection, because the one before has ended. Vhosts whose nodes are not there any more are
    /// those of a xenstored that came back empty, not of guests that are gone: they keep their rings.
    func reconnect(_ store: any XenStore) throws(XenStoreError) {
        self.store = store
        for vhost in vhosts.keys.sorted() {
            vhosts[vhost]!.watched = nil
            let known = try store.exists(vhosts[vhost]!.paths.backend + "/state", .none)
            if !known && !vhosts[vhost]!.orphaned {
                vhosts[vhost]!.orphaned = true
                executor.log(
                    vhost, "its nodes were lost with xenstored; its disks go on; attach it anew to change them",
                    isError: true)
            }
        }
        dirty.formUnion(vhosts.keys)
        try start()
    }

    /// What is known of each vhost, in order.
    var status: [(vhost: VhostIdentifier, machine: XenbusBackend, nodes: VhostNodes)] {
        vhosts.sorted { $0.key < $1.key }.map { ($0.key, $0.value.machine, $0.value.nodes) }
    }

    // MARK: Inputs

    /// Takes all watch events that are there, and goes on with the vhosts that they concern.
    func process() {
        while let event = store.nextEvent() { note(event) }
        reconcileDirty()
    }

    /// An effect has ended.
    func completed(_ vhost: VhostIdentifier, _ outcome: XenbusOutcome) {
        guard vhosts[vhost]?.machine.underWay != nil else { return }
        vhosts[vhost]!.machine.completed(outcome)
        dirty.insert(vhost)
        reconcileDirty()
    }

    /// A front end has broken the rules of its ring.
    func give(up vhost: VhostIdentifier, because reason: String) {
        vhosts[vhost]?.machine.give(up: reason)
        dirty.insert(vhost)
        reconcileDirty()
    }

    /// A target is gone for now: its devices stay as they are, without anything behind them.
    func withdrawn(_ target: UInt64) {
        for vhost in vhosts.keys { vhosts[vhost]!.machine.lose(target) }
    }

    /// A target is there, or there again.
    func published(_ target: UInt64) {
        for vhost in vhosts.keys {
            vhosts[vhost]!.machine.regain(target)
            dirty.insert(vhost)
        }
        reconcileDirty()
    }

    private func note(_ event: XenWatchEvent) {
        switch event.token {
        case Self.backendToken: noteBackend(event.path)
        case Self.domainToken: dirty.formUnion(vhosts.keys)
        default:
            // The token of a front end's watch names the vhost.
            let parts = event.token.split(separator: " ")
            guard parts.count == 3, parts[0] == Self.frontendToken, let vhost = identifier(parts[1], parts[2]) else {
                return
            }
            if vhosts[vhost] != nil { dirty.insert(vhost) }
        }
    }

    private func noteBackend(_ path: String) {
        let below = path.dropFirst(root.utf8.count).split(separator: "/")
        if path.hasPrefix(root), below.count >= 2, let vhost = identifier(below[0], below[1]) {
            add(vhost)
        } else {
            scan()
        }
    }

    private func identifier(_ domain: Substring, _ number: Substring) -> VhostIdentifier? {
        guard let domain = decimal(domain).flatMap({ UInt16(exactly: $0) }),
            let number = decimal(number).flatMap({ UInt32(exactly: $0) })
        else { return nil }
        return VhostIdentifier(domain: domain, number: number)
    }

    private func add(_ vhost: VhostIdentifier) {
        if vhosts[vhost] == nil { vhosts[vhost] = Vhost(paths: VhostPaths(vhost, under: root)) }
        dirty.insert(vhost)
    }

    /// Looks for vhosts, those of guests that are gone too.
    private func scan() {
        dirty.formUnion(vhosts.keys)
        do throws(XenStoreError) {
            for domain in try store.children(root, .none) ?? [] {
                for number in try store.children("\(root)/\(domain)", .none) ?? [] {
                    if let vhost = identifier(domain[...], number[...]) { add(vhost) }
                }
            }
        } catch {
            executor.log(VhostIdentifier(domain: 0, number: 0), "\(error)", isError: true)
        }
    }

    // MARK: Steps

    private func reconcileDirty() {
        while let vhost = dirty.popFirst() {
            do throws(XenStoreError) { while try step(vhost) {} } catch {
                executor.log(vhost, "\(error)", isError: true)
            }
        }
    }

    /// Takes a vhost's next step.
    ///
    /// - Returns: Whether there may be another.
    private func step(_ vhost: VhostIdentifier) throws(XenStoreError) -> Bool {
        guard let entry = vhosts[vhost], !isForeign(vhost) else { return false }
        let transaction = try store.begin()
        var committed = false
        defer { if !committed { store.abandon(transaction) } }
        let nodes = try VhostReader.read(entry.paths, from: store, transaction)
        if entry.orphaned {
            if nodes.backendState == nil { return false }
            vhosts[vhost]!.orphaned = false
        }
        // A copy: what is decided counts only if it could be written.
        var machine = entry.machine
        let step = machine.reconcile(nodes)
        if case .write(let writes) = step {
            for node in writes { try store.write("\(entry.paths.backend)/\(node.name)", node.value, transaction) }
        } else if step == .removeNodes {
            try remove(entry.paths, transaction)
        }
        switch step {
        case .write, .removeNodes:
            committed = true
            guard try store.commit(transaction) else { return true }
        default: break
        }
        vhosts[vhost]!.machine = machine
        vhosts[vhost]!.nodes = nodes
        try watchFrontend(vhost)
        return did(step, vhost, nodes)
    }

    /// Whether a vhost that we do not serve is served by the kernel's own back end, which binds every device there is.
    private func isForeign(_ vhost: VhostIdentifier) -> Bool {
        let taken = vhosts[vhost]!.machine.link == .down && executor.isTakenByKernel(vhost)
        if taken && !vhosts[vhost]!.takenByKernel {
            executor.log(
                vhost, "is served by the kernel's driver xen-scsiback; unload that, and attach the vhost anew",
                isError: true)
        }
        vhosts[vhost]!.takenByKernel = taken
        return taken
    }

    private func did(_ step: XenbusStep, _ vhost: VhostIdentifier, _ nodes: VhostNodes) -> Bool {
        switch step {
        case .idle: return false
        case .effect(let effect):
            executor.perform(effect, vhost, nodes)
            return false
        case .write(let writes):
            for node in writes where node.name == "error" || node.name.hasSuffix("/error") {
                executor.log(vhost, "\(node.name): \(node.value)", isError: true)
            }
            for node in writes where node.name == "state" {
                executor.log(vhost, "\(XenbusState(node: node.value))", isError: false)
            }
            return true
        case .removeNodes:
            executor.log(vhost, "its domain is gone; removed its nodes", isError: false)
            return true
        case .forget:
            if let watched = vhosts[vhost]!.watched { store.unwatch(watched, token: token(vhost)) }
            vhosts[vhost] = nil
            executor.forgotten(vhost)
            return false
        }
    }

    /// Removes a vhost's directory, and its domain's if that was the last.
    private func remove(_ paths: VhostPaths, _ transaction: XenTransaction) throws(XenStoreError) {
        try store.remove(paths.backend, transaction)
        let domain = "\(root)/\(paths.identifier.domain)"
        if try store.children(domain, transaction)?.isEmpty ?? false { try store.remove(domain, transaction) }
    }

    private func token(_ vhost: VhostIdentifier) -> String {
        "\(Self.frontendToken) \(vhost.domain) \(vhost.number)"
    }

    /// Watches the front end's nodes, wherever the toolstack says that they are.
    private func watchFrontend(_ vhost: VhostIdentifier) throws(XenStoreError) {
        guard let entry = vhosts[vhost] else { return }
        let frontend = try store.read(entry.paths.backend + "/frontend", .none)
        guard let frontend, frontend != entry.watched, frontend.hasPrefix("/local/domain/\(vhost.domain)/") else {
            return
        }
        if let old = entry.watched { store.unwatch(old, token: token(vhost)) }
        try store.watch(frontend, token: token(vhost))
        vhosts[vhost]!.watched = frontend
    }
}
