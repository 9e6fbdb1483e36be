// ReactorObjects: what a configuration puts on one reactor: media, targets with logical units, sockets.
//
// Owns: those objects, and how each is made and taken away. Called by: the daemon, through ReactorThread.perform, on
// the reactor's thread only. Must not know: what is on other reactors, why something changes.

import Backstores
import CBackstore
import Glibc
import Logging
import Reactor
import SCSICore
import VirtioFront

/// Why a change could not be made, for the operator.
struct ChangeError: Error, Equatable {
    enum Kind {
        /// The system refused something.
        case failed
        /// What runs cannot be changed in this way.
        case conflict
        /// There is nothing of that name.
        case notFound
        /// No change begins any more.
        case stopping
    }

    let text: String
    var kind = Kind.failed
}

/// A target on its way from the reactor that owns it to the fronts that serve it, which may be on others.
struct TargetReference: @unchecked Sendable {
    let target: TargetDevice
}

/// The objects on one reactor.
final class ReactorObjects {
    let reactor: Reactor
    let shard: Shard
    private var backstores: [String: (configuration: BackstoreConfiguration, medium: OpenBackstore)] = [:]
    /// The logical unit of each backstore that has one.
    private var units: [String: LogicalUnit] = [:]
    private var targets: [NAAName: TargetDevice] = [:]
    private var sockets: [String: (front: VhostUserFrontConfiguration, server: VhostUserSCSIServer)] = [:]
    /// Sockets that wait for the end of their guest's commands.
    private var leavingSockets: [String: VhostUserSCSIServer] = [:]
    /// The limiters of sockets that have, or had, limits.
    private var throttles: [String: Throttle] = [:]
    /// The timer that wakes the reactor when a task's turn comes under a limit, and its time.
    private var release: (token: TimerToken, time: UInt64)?
    private let logger: Logger
    private let events: EventHub
    /// What keeps the state of each unit, by the name of its backstore.
    private var stateFiles: [String: StateFile] = [:]
    private let stateDirectory: StateDirectory?
    let slowCommands: SlowCommandLog

    init(reactor: Reactor, shard: Shard, events: EventHub, stateDirectory: StateDirectory?, logger: Logger) {
        self.events = events
        self.stateDirectory = stateDirectory
        self.logger = logger
        slowCommands = SlowCommandLog(logger)
        self.reactor = reactor
        self.shard = shard
    }

    // MARK: The shard's time

    /// Lets tasks go on that waited for memory, for a backstore, or for their turn under a limit.
    func driveShard() -> Bool {
        var worked = false
        if let time = shard.nextRelease, time <= reactor.now {
            shard.releaseThrottled()
            worked = true
        }
        guard shard.hasWaiting else { return worked }
        shard.retryWaiting()
        return true
    }

    /// Has the reactor wake up when the next task's turn comes.
    func prepareToSleep() {
        let time = shard.nextRelease
        guard time != release?.time else { return }
        if let release { reactor.cancel(release.token) }
        release = time.map { time in
            // The turn that the timer begins does what is to be done.
            (unsafe reactor.setTimer(at: time, { _ in }, Unmanaged.passUnretained(self).toOpaque()), time)
        }
    }

    // MARK: Backstores

    func addBackstore(_ name: String, _ configuration: BackstoreConfiguration) -> ChangeError? {
        precondition(backstores[name] == nil, "backstore \(name) is already there")
        do {
            backstores[name] = (configuration, try OpenBackstore(configuration, reactor: reactor))
            return nil
        } catch {
            return ChangeError(text: "backstore \(name): \(error)")
        }
    }

    /// Makes stable what was written, then closes the medium. No logical unit may use it any more.
    ///
    /// - Parameter done: Called with an error of the flush; the medium is closed all the same.
    func removeBackstore(_ name: String, done: @escaping (ChangeError?) -> Void) {
        guard let backstore = backstores.removeValue(forKey: name)?.medium else {
            preconditionFailure("no backstore \(name)")
        }
        // The flush takes its time without holding up others on this thread; then closing has nothing left to write.
        FlushRequest.submit(to: backstore.handle) { error in
            let text = error.map { "could not be flushed: \($0.text)" }
            do {
                try backstore.close()
                done(text.map { ChangeError(text: "backstore \(name) \($0)") })
            } catch {
                done(ChangeError(text: "backstore \(name): \(error)"))
            }
        }
    }

    /// Makes the file of a backstore longer, and tells its logical unit.
    func resizeBackstore(_ name: String, size: UInt64) -> ChangeError? {
        guard let (configuration, backstore) = backstores[name] else { preconditionFailure("no backstore \(name)") }
        guard case .file(let path, _, _) = configuration.medium else { preconditionFailure("\(name) is no file") }
        guard unsafe truncate(path, off_t(size)) == 0 else {
            return ChangeError(
                text: "backstore \(name): \(path) cannot grow to \(Size.format(size)): \(SystemError.last.text)")
        }
        if backstore.refreshGeometry() { units[name]?.backstoreGeometryChanged() }
        return nil
    }

    // MARK: Targets

    func addTarget(_ name: NAAName, _ configuration: TargetConfiguration) {
        precondition(targets[name] == nil, "target \(name) is already there")
        let target = TargetDevice(
            name: name.value, shard: shard, portGroups: configuration.portGroups.map { TargetPortGroup($0) })
        let log = AccessStateLog(logger, target: name, hub: events)
        target.whenAccessStateSet = { [unowned self] group, state, initiator in
            log.report(group, state, by: initiator, now: reactor.now)
        }
        targets[name] = target
    }

    /// Makes other port groups those of a target. A state that the configuration had before and has now is left as it
    /// is, because a guest may have set another.
    func setPortGroups(_ name: NAAName, from old: [PortGroupConfiguration], to new: [PortGroupConfiguration]) {
        guard let target = targets[name] else { preconditionFailure("no target \(name)") }
        target.setPortGroups(
            new.map { configuration in
                var group = TargetPortGroup(configuration)
                let isAsBefore = old.contains {
                    $0.identifier == configuration.identifier && $0.state == configuration.state
                }
                let running = target.portGroups.first { $0.identifier == group.identifier }
                if isAsBefore, let running { group.state = running.state }
                return group
            })
    }

    /// Sets the state of a port group. Whether it was another.
    func setAccessState(
        _ state: PortGroupConfiguration.AccessState, ofPortGroup group: Int, target name: NAAName
    ) -> Bool {
        guard let target = targets[name],
            let isChanged = target.setAccessState(AsymmetricAccessState(state), ofPortGroup: UInt16(group))
        else { preconditionFailure("no port group \(group) of \(name)") }
        return isChanged
    }

    func removeTarget(_ name: NAAName) {
        guard let target = targets.removeValue(forKey: name) else { preconditionFailure("no target \(name)") }
        precondition(target.logicalUnits.isEmpty, "target \(name) is removed with logical units")
    }

    func addLogicalUnit(_ number: Int, target name: NAAName, _ settings: LogicalUnitSettings) -> ChangeError? {
        guard let target = targets[name], let backstore = backstores[settings.backstore]?.medium, let lun = LUN(number)
        else {
            preconditionFailure("LUN \(number) of \(name) is added before what it needs")
        }
        var configuration = LogicalUnitConfiguration(
            name: settings.effectiveName(target: name).value, serial: settings.effectiveSerial(target: name))
        configuration.readOnly = settings.readOnly
        configuration.commandTimeout = settings.commandTimeoutNanoseconds
        configuration.removable = settings.removable
        configuration.errorPolicy = settings.errorPolicy
        var stateFile: StateFile?
        do {
            stateFile = try stateDirectory.map { try StateFile(unit: configuration.name, in: $0, reactor: reactor) }
        } catch {
            return ChangeError(text: "LUN \(number) of \(name): \(error)")
        }
        let unit = LogicalUnit(
            configuration: configuration, backstore: backstore.handle, shard: shard, state: stateFile?.saved,
            store: stateFile?.handle, reservationsLost: stateFile?.loss != nil)
        let log = logger
        if let loss = stateFile?.loss {
            log.error(
                "the state of a disk is lost, and commands to it are refused",
                metadata: ["target": "\(name)", "lun": "\(number)", "file": "\(loss)"])
        }
        unit.whenStopped = { cause in
            guard case .mediumError(let code) = cause else { return }
            log.error(
                "the disk is frozen: its medium has failed; look after the medium, then thaw the disk",
                metadata: [
                    "target": "\(name)", "lun": "\(number)", "error": "\(SystemError(number: code).text)",
                ])
        }
        let isFree = target.add(unit, at: lun)
        precondition(isFree, "LUN \(number) of \(name) is already there")
        units[settings.backstore] = unit
        unit.setLimits(RateLimits(settings.limits))
        stateFiles[settings.backstore] = stateFile
        return nil
    }

    func setCommandTimeout(_ number: Int, target name: NAAName, _ settings: LogicalUnitSettings) {
        guard let unit = targets[name]?.logicalUnits.first(where: { $0.lun.number == number })?.unit else {
            preconditionFailure("no LUN \(number) of \(name)")
        }
        unit.commandTimeout = settings.commandTimeoutNanoseconds
    }

    /// The logical unit with a number; a target of this reactor has it.
    func unit(_ number: Int, target name: NAAName) -> LogicalUnit? {
        guard let lun = LUN(number) else { return nil }
        return targets[name]?.logicalUnits.first { $0.lun == lun }?.unit
    }

    /// Puts another medium into a removable unit.
    func swapMedium(
        _ number: Int, target name: NAAName, backstore: String, isForced: Bool, done: @escaping (ChangeError?) -> Void
    ) {
        guard let unit = unit(number, target: name), let medium = backstores[backstore]?.medium,
            let old = units.first(where: { $0.value === unit })?.key
        else { preconditionFailure("a medium is put into LUN \(number) of \(name) before what it needs") }
        eject(unit, isForced: isForced) { [self] error in
            if let error { return done(ChangeError(text: "LUN \(number) of \(name): \(error)", kind: .conflict)) }
            unit.insertMedium(medium.handle)
            units[old] = nil
            units[backstore] = unit
            stateFiles[backstore] = stateFiles.removeValue(forKey: old)
            done(nil)
        }
    }

    /// Takes the medium out of a unit, if it is in.
    ///
    /// - Parameter done: Called with why it cannot be, or when the unit does not use it any more.
    func eject(_ unit: LogicalUnit, isForced: Bool, done: @escaping (String?) -> Void) {
        if unit.mediumState == .absent { return done(nil) }
        do throws(MediumRemovalRefusal) {
            try unit.removeMedium(force: isForced) { [self] in
                // The unit may still be in the call that ended its last request.
                later { done(nil) }
            }
        } catch {
            switch error {
            case .notRemovable: done("its medium is not removable: write removable: true in the configuration")
            case .prevented: done("a guest prevents the removal of the medium, and was told: use force, or wait")
            case .absent: done(nil)
            }
        }
    }

    /// Puts the medium of a unit's backstore in again; `nil` if it is in.
    func load(_ unit: LogicalUnit) -> Bool {
        guard unit.mediumState == .absent, let name = units.first(where: { $0.value === unit })?.key,
            let medium = backstores[name]?.medium
        else { return false }
        unit.insertMedium(medium.handle)
        return true
    }

    func protectLogicalUnit(_ number: Int, target: NAAName, isProtected: Bool) {
        guard let unit = unit(number, target: target) else { preconditionFailure("no LUN \(number) of \(target)") }
        unit.setReadOnly(isProtected)
    }

    func limitLogicalUnit(_ number: Int, target: NAAName, _ limits: LimitsConfiguration) {
        guard let unit = unit(number, target: target) else { preconditionFailure("no LUN \(number) of \(target)") }
        unit.setLimits(RateLimits(limits))
    }

    /// - Parameters:
    ///   - isForced: Whether commands in flight are aborted.
    ///   - done: Called when the last command of the unit has ended.
    func removeLogicalUnit(
        _ number: Int, target name: NAAName, isForced: Bool = false, done: @escaping () -> Void
    ) {
        guard let target = targets[name], let lun = LUN(number) else { preconditionFailure("no target \(name)") }
        guard let unit = target.logicalUnits.first(where: { $0.lun == lun })?.unit else {
            preconditionFailure("no LUN \(number) of \(name)")
        }
        let stateFile = units.first { $0.value === unit }.flatMap { stateFiles.removeValue(forKey: $0.key) }
        units = units.filter { $0.value !== unit }
        if isForced { unit.abortAll() }
        target.remove(at: lun) { [self] in
            // The unit is still in the call that ended its last command: it goes, and its backstore may, after that.
            later {
                withExtendedLifetime((unit, stateFile)) {}
                done()
            }
        }
    }

    /// Runs a function later in this turn or in the next, on this thread.
    private func later(_ body: @escaping () -> Void) {
        // Safe to hand over, because it does not leave the thread.
        nonisolated(unsafe) let body = body
        reactor.post { unsafe body() }
    }

    // MARK: Sockets

    /// - Parameters:
    ///   - targets: Those of the front, by number.
    ///   - spread: The reactors over which its queues are dealt out; `nil`: this one serves all, and owns the targets.
    func addSocket(
        _ front: VhostUserFrontConfiguration, targets: [Int: TargetReference], spread: [ShardReactor]?
    ) -> ChangeError? {
        precondition(sockets[front.socket] == nil, "socket \(front.socket) is already there")
        let served = Dictionary(uniqueKeysWithValues: targets.map { (UInt8($0.key), $0.value.target) })
        if !front.limits.isEmpty { limit(front.socket, to: front.limits, for: Array(served.values)) }
        let log = EventLog(logger, socket: front.socket, hub: events)
        var configuration = VhostUserSCSIServer.Configuration(
            socketPath: front.socket, requestQueues: front.queues, targets: served,
            // One guest at a time has the socket, so the socket's name is that of the initiator.
            initiatorPort: Self.initiatorPort(front.socket))
        configuration.targetPort = UInt16(front.port)
        configuration.mode = front.mode == .client ? .client : .server
        configuration.spread = spread
        configuration.options.offersConfiguration = front.offersConfigurationSpace
        configuration.options.offersRingReset = front.offersRingReset
        if let timeout = front.drainTimeoutNanoseconds { configuration.drainPatience = timeout }
        let server = VhostUserSCSIServer(
            configuration: configuration, reactor: reactor,
            report: { [unowned self] in log.report($0, now: reactor.now) })
        do {
            try server.start()
        } catch {
            return ChangeError(text: "\(error)")
        }
        sockets[front.socket] = (front, server)
        return nil
    }

    private static func initiatorPort(_ socket: String) -> String { "vhost-user:\(socket)" }

    /// Limits what the guest at a socket may do.
    func limitSocket(_ path: String, _ limits: LimitsConfiguration) {
        guard let front = sockets[path]?.front else { preconditionFailure("no socket \(path)") }
        sockets[path]?.front.limits = limits
        limit(path, to: limits, for: front.targets.values.compactMap { targets[$0] })
    }

    private func limit(_ path: String, to limits: LimitsConfiguration, for served: [TargetDevice]) {
        let throttle = throttles[path] ?? Throttle(RateLimits(), shard: shard)
        throttles[path] = throttle
        throttle.setLimits(RateLimits(limits))
        for target in served { target.setThrottle(throttle, initiatorPort: Self.initiatorPort(path)) }
    }

    func attachTarget(_ reference: TargetReference, _ name: NAAName, number: Int, socket: String) {
        guard let server = sockets[socket]?.server else {
            preconditionFailure("target \(name) is attached to \(socket) before what it needs")
        }
        let target = reference.target
        sockets[socket]?.front.targets[number] = name
        if let throttle = throttles[socket] {
            target.setThrottle(throttle, initiatorPort: Self.initiatorPort(socket))
        }
        server.attach(target, number: UInt8(number))
    }

    func detachTarget(_ number: Int, socket: String) {
        guard let server = sockets[socket]?.server else { preconditionFailure("no socket \(socket)") }
        sockets[socket]?.front.targets[number] = nil
        server.detach(number: UInt8(number))
    }

    /// - Parameters:
    ///   - isForced: Whether commands in flight are aborted, not answered.
    ///   - done: Called when the guest is disconnected and none of its commands is in flight.
    func removeSocket(_ path: String, isForced: Bool = false, done: @escaping () -> Void) {
        guard let server = sockets.removeValue(forKey: path)?.server else { preconditionFailure("no socket \(path)") }
        // Commands that wait under its limit would hold the end up. The targets keep the limiter by the socket's name:
        // without limits, it is no limiter.
        throttles.removeValue(forKey: path)?.setLimits(RateLimits())
        leavingSockets[path] = server
        server.stop { [self] in
            later { [self] in
                withExtendedLifetime(server) {}
                leavingSockets[path] = nil
                done()
            }
        }
        if isForced { hurrySocket(path) }
    }

    /// Has a socket that is being removed wait for no answers any more. Whether there is one.
    @discardableResult
    func hurrySocket(_ path: String) -> Bool {
        guard let server = leavingSockets[path] else { return false }
        server.abandon()
        return true
    }

    /// Lets commands that wait under limits go on: nothing else may hold up a stop.
    func liftLimits() {
        for unit in units.values { unit.setLimits(RateLimits()) }
    }

    /// - Parameter done: Called when all guests are disconnected and no command is in flight.
    func removeSockets(done: @escaping () -> Void) {
        forEach(Array(sockets.keys)) { objects, path, next in
            objects.removeSocket(path, done: next)
        } then: { _ in
            done()
        }
    }

    // MARK: What is here

    /// Bytes of an open backstore, and of its logical blocks.
    func extent(of name: String) -> (size: UInt64, blockSize: UInt64) {
        guard let medium = backstores[name]?.medium else { preconditionFailure("no backstore \(name)") }
        return medium.extent
    }

    /// The media that are open.
    var openBackstores: [(name: String, configuration: BackstoreConfiguration, size: UInt64)] {
        backstores.map { ($0.key, $0.value.configuration, $0.value.medium.extent.size) }
    }

    /// The name of each logical unit's backstore.
    var unitBackstores: [ObjectIdentifier: String] {
        Dictionary(uniqueKeysWithValues: units.map { (ObjectIdentifier($0.value), $0.key) })
    }

    /// The targets by name.
    var servedTargets: [NAAName: TargetDevice] { targets }

    /// The sockets, as they were asked for and as they are.
    var servedFronts: [(front: VhostUserFrontConfiguration, server: VhostUserSCSIServer)] { Array(sockets.values) }

    // MARK: The end

    /// Takes everything away: units, targets and media, which are flushed.
    ///
    /// - Parameter done: Called with the errors of the flushes.
    func close(done: @escaping ([ChangeError]) -> Void) {
        let all = targets.flatMap { name, target in target.logicalUnits.map { (name, Int($0.lun.number)) } }
        forEach(all) { objects, unit, next in
            objects.removeLogicalUnit(unit.1, target: unit.0, done: next)
        } then: { objects in
            objects.targets = [:]
            var errors: [ChangeError] = []
            objects.forEach(objects.backstores.keys.sorted()) { objects, name, next in
                objects.removeBackstore(name) { error in
                    if let error { errors.append(error) }
                    next()
                }
            } then: { _ in
                done(errors)
            }
        }
    }

    /// Begins `body` for each item at once; calls `then` when each has called the function that it got.
    private func forEach<Item>(
        _ items: [Item], _ body: (ReactorObjects, Item, @escaping () -> Void) -> Void,
        then: @escaping (ReactorObjects) -> Void
    ) {
        // One more than there are items, so that items which end at once do not end the whole before its last begins.
        var open = items.count + 1
        let ended = { [self] in
            open -= 1
            if open == 0 { then(self) }
        }
        for item in items { body(self, item, ended) }
        ended()
    }
}

extension RateLimits {
    init(_ limits: LimitsConfiguration) {
        self.init()
        operationsPerSecond = limits.operationsPerSecond ?? 0
        bytesPerSecond = limits.bytesPerSecond ?? 0
        burstNanoseconds = limits.burstNanoseconds ?? Limits.defaultBurstNanoseconds
    }
}

extension TargetPortGroup {
    init(_ configuration: PortGroupConfiguration) {
        self.init(
            identifier: UInt16(configuration.identifier), ports: configuration.ports.map { UInt16($0) },
            state: AsymmetricAccessState(configuration.state), isPreferred: configuration.isPreferred,
            isExplicit: configuration.isExplicit)
    }
}

extension AsymmetricAccessState {
    init(_ state: PortGroupConfiguration.AccessState) {
        self =
            switch state {
            case .activeOptimized: .activeOptimized
            case .activeNonOptimized: .activeNonOptimized
            case .standby: .standby
            case .unavailable: .unavailable
            case .transitioning: .transitioning
            }
    }

    /// The state as the configuration calls it.
    var configured: PortGroupConfiguration.AccessState {
        PortGroupConfiguration.AccessState.allCases.first { AsymmetricAccessState($0) == self }!
    }
}

extension LogicalUnitSettings {
    /// The policy as the core takes it.
    fileprivate var errorPolicy: ErrorPolicy {
        switch onError {
        case .report: .report
        case .stop: .stop
        case .retry: .retry(nanoseconds: retryTimeoutNanoseconds ?? Self.defaultRetryTimeoutNanoseconds)
        }
    }
}

/// A medium that is open.
enum OpenBackstore {
    case ram(RAMBackstore)
    case file(FileBackstore)
    case blockDevice(BlockDeviceBackstore)

    init(_ configuration: BackstoreConfiguration, reactor: Reactor) throws(BackstoreError) {
        switch configuration.medium {
        case .ram(let size):
            self = .ram(
                try RAMBackstore(
                    size: size, logicalBlockSize: Int(configuration.blockSize ?? 512), readOnly: configuration.readOnly,
                    reactor: reactor))
        case .file(let path, let size, let buffered):
            var options = FileBackstore.Options(path: path)
            options.size = size
            options.create = size != nil && !configuration.readOnly
            options.logicalBlockSize = Int(configuration.blockSize ?? 512)
            options.direct = !buffered
            options.readOnly = configuration.readOnly
            options.isShared = configuration.isShared
            self = .file(try FileBackstore(options, reactor: reactor))
        case .blockDevice(let path, let buffered):
            var options = BlockDeviceBackstore.Options(path: path)
            options.logicalBlockSize = configuration.blockSize.map(Int.init)
            options.direct = !buffered
            options.readOnly = configuration.readOnly
            self = .blockDevice(try BlockDeviceBackstore(options, reactor: reactor))
        }
    }

    var handle: BackstoreHandle {
        switch self {
        case .ram(let backstore): backstore.handle
        case .file(let backstore): backstore.handle
        case .blockDevice(let backstore): backstore.handle
        }
    }

    /// Bytes of the medium, and of its logical blocks.
    var extent: (size: UInt64, blockSize: UInt64) {
        let geometry = handle.geometry()
        return (geometry.size, UInt64(geometry.logical_block_size))
    }

    /// Closes the medium, which is flushed once more.
    func close() throws(BackstoreError) {
        switch self {
        case .ram(let backstore): backstore.close()
        case .file(let backstore): try backstore.close()
        case .blockDevice(let backstore): try backstore.close()
        }
    }

    /// Looks at the size of the medium again; whether it has grown.
    func refreshGeometry() -> Bool {
        switch self {
        case .ram: false
        case .file(let backstore): backstore.refreshGeometry()
        case .blockDevice(let backstore): backstore.refreshGeometry()
        }
    }
}

/// One FLUSH that the daemon itself asks for.
@safe
private final class FlushRequest {
    private let request: UnsafeMutablePointer<scsi_backstore_request>
    private let done: (SystemError?) -> Void

    private init(done: @escaping (SystemError?) -> Void) {
        unsafe request = .allocate(capacity: 1)
        unsafe request.initialize(to: scsi_backstore_request())
        self.done = done
    }

    deinit { unsafe request.deallocate() }

    /// Flushes a backstore. `done` is called once, on the reactor's thread, maybe before this returns.
    static func submit(to backstore: BackstoreHandle, done: @escaping (SystemError?) -> Void) {
        let flush = FlushRequest(done: done)
        unsafe flush.request.pointee.struct_size = UInt32(MemoryLayout<scsi_backstore_request>.size)
        unsafe flush.request.pointee.operation = UInt8(SCSI_BACKSTORE_FLUSH)
        unsafe flush.request.pointee.error_offset = .max
        unsafe flush.request.pointee.complete = { request, error in
            let flush = unsafe Unmanaged<FlushRequest>.fromOpaque(request!.pointee.owner).takeRetainedValue()
            flush.done(error == 0 ? nil : SystemError(number: error))
        }
        // Held until the completion.
        let held = unsafe Unmanaged.passRetained(flush)
        unsafe flush.request.pointee.owner = held.toOpaque()
        guard unsafe !backstore.submit(flush.request) else { return }
        unsafe held.release()
        done(SystemError(number: EAGAIN))
    }
}
