// LogicalUnit: the one place with the control flow of a task: receive → admit → execute → finish.
//
// Owns: the task set, the unit attention conditions of each I_T_L nexus, the mode pages, the state of the unit.
// Called by: TargetDevice (tasks in), the backstore (completions), the device server (through its outcomes).
// Must not know: transports, threads, how any command works.

import CBackstore
import CTarget

/// How far a command's handler got. `LogicalUnit.proceed` acts on it.
enum Outcome {
    /// Ended with this status.
    case done(SCSIStatus)
    /// Ended with CHECK CONDITION and this sense data.
    case failed(SenseData)
    /// The task's request is filled: hand it to the backstore, then go on with the task's step.
    case submit
    /// Needs a staging buffer and there is none: run the handler again when there is.
    case needsStaging
    /// The CDB asks for more data than the initiator's buffers hold; nothing was done.
    case overrun
    /// A change of the persistent state is staged (`LogicalUnit.save`): save it, make it, then go on with the task's
    /// step; at step 0 it ends with GOOD.
    case save
    /// Must wait until an earlier change of the persistent state is saved: run the handler again then.
    case needsState
    /// Ends with GOOD when the commands that it has aborted have ended (`LogicalUnit.abortCommands`).
    case awaitAborted
}

/// A direct access block device (SBC-5) behind a target.
@safe
public final class LogicalUnit {
    /// What the unit was created with, or what `reconfigure` made of it.
    public private(set) var configuration: LogicalUnitConfiguration
    /// The shard that owns the unit.
    let shard: Shard
    private(set) var backstore: BackstoreHandle
    private(set) var geometry: scsi_backstore_geometry
    private(set) var medium: MediumExtent
    private(set) var table: CommandTable
    var modePages: ModePages
    /// What LOG SELECT has changed: thresholds, and from where the counters count.
    var log = LogState()
    /// When initiators were first able to see the unit, in nanoseconds of the shard's clock.
    private(set) var poweredOnAt: UInt64?
    /// What survives power loss.
    let persistentState: PersistentState
    /// Who may use the unit.
    let reservations: Reservations
    /// `Reservations.restrictions`, at hand for each command.
    let restrictions: UnsafeMutablePointer<CommandFlags>
    /// What SET IDENTIFYING INFORMATION has set; saved.
    var identifyingInformation: IdentifyingInformation
    /// What REPORT TIMESTAMP reports.
    var clock: UnitClock
    /// The memory of READ BUFFER and WRITE BUFFER.
    let buffers = UnitBuffers()
    /// Whether writes are refused: by configuration, by the backstore, or by the SWP bit of the control mode page.
    public var isWriteProtected: Bool { writeProtected }
    private(set) var writeProtected = false
    /// Whether completed writes may be volatile, so that FUA and flushes mean something.
    private(set) var cachesWrites = false
    /// Whether each write must be stable before its status: WCE is zero and the backstore has a cache.
    private(set) var mustWriteThrough = false
    /// MAXIMUM TRANSFER LENGTH: the core's own limit, or the backstore's.
    private(set) var maximumTransferBlocks: UInt64 = 0
    /// What it has done.
    public var statistics: LogicalUnitStatistics { measurements.fill(unsafe counters.pointee) }
    /// How long its commands of a class took.
    public func latency(_ kind: CommandClass) -> LatencyStatistics { measurements.latency(kind) }
    /// What an initiator has done, by its index in `TargetDevice.nexuses`; `nil`: nothing.
    public func commands(nexus: Int) -> CommandStatistics? { measurements.commands(nexus: nexus) }
    /// How long the commands of a class took that an initiator sent; `nil`: it has sent nothing.
    public func latency(_ kind: CommandClass, nexus: Int) -> LatencyStatistics? {
        measurements.latency(kind, nexus: nexus)
    }
    /// What initiators did that the target has forgotten, because others took their places.
    public var forgottenCommands: CommandStatistics { measurements.forgotten }

    /// Where it is mapped, once it is.
    private var owner: Unmanaged<TargetDevice>?
    var target: TargetDevice? { unsafe owner?.takeUnretainedValue() }
    private(set) var lun: LUN?

    /// Nothing is submitted to the backstore: the unit is frozen, or its medium is gone.
    private(set) var isBlocked = false
    var freezeState = FreezeState()
    /// Called when the error policy has frozen the unit. For logs; it may not call the unit.
    public var whenStopped: ((FreezeCause) -> Void)?
    /// Whether somebody waits until the backstore has none of the unit's requests.
    var watchesRequests = false
    var space = SpaceState()
    var flush = BackgroundFlush()
    /// Whether a logical block provisioning threshold is enabled.
    var watchesSpace = false

    /// START STOP UNIT has stopped it.
    var stopped = false { didSet { refreshReadiness() } }
    /// Whether the medium can be used; what `stopped` and `mediumState` come to.
    var readiness = Readiness.ready
    /// Where the medium is.
    public internal(set) var mediumState = MediumState.loaded { didSet { refreshReadiness() } }
    /// Called when an initiator has ejected or loaded the medium. It may not call the unit.
    public var whenMediumMoved: ((MediumState) -> Void)?
    /// The I_T nexuses that prevent the removal of the medium, as a bit mask by index.
    var preventing: UInt64 = 0
    var power = PowerState()
    /// When a request was last submitted, in nanoseconds of the shard's clock; the lowest bit is one, unless a power
    /// condition was commanded since.
    var lastRequest: UInt64 = 0
    /// Removed from the target; what was waiting is refused.
    private(set) var removed = false
    /// Behind pointers, because a class's stored struct would be checked for exclusive access at each command.
    let tasks: UnsafeMutablePointer<TaskSet>
    let counters: UnsafeMutablePointer<LogicalUnitStatistics>
    let deadlines: UnsafeMutablePointer<UnitDeadlines>
    let measurements = Measurements()
    var throttle: Throttle?
    /// Whether commands are to be checked against a limit.
    var isThrottled = false
    var trace: TraceRing?
    var isTraced = false
    let taskSetBounds: TaskSetBounds
    var enabling = false
    private var enableAgain = false
    /// Pending unit attention conditions by nexus.
    let pending: UnsafeMutablePointer<UnitAttentionSet>
    private var whenDrained: (() -> Void)?

    /// A unit over a backstore. Its geometry is asked for here.
    ///
    /// - Parameters:
    ///   - state: What was saved in the unit's earlier life; `nil` if nothing was.
    ///   - store: What keeps the unit's state over power loss; without one it keeps nothing and says so to initiators
    ///     (PTPL_C, PS).
    ///   - reservationsLost: Whether something was saved that cannot be read, so that nobody knows which persistent
    ///     reservation there was: then `state` is `nil`, and initiators are refused until one of them replaces it.
    public init(
        configuration: LogicalUnitConfiguration, backstore: BackstoreHandle, shard: Shard, state: UnitState? = nil,
        store: UnitStateStore? = nil, reservationsLost: Bool = false
    ) {
        precondition(!reservationsLost || state == nil && store != nil, "lost reservations that nobody has kept")
        let state = state ?? UnitState(name: configuration.name)
        precondition(state.name == configuration.name, "a logical unit was given the state of another")
        persistentState = PersistentState(state, store: store)
        reservations = Reservations(persistentState.reservations, areLost: reservationsLost)
        unsafe restrictions = reservations.restrictions
        // What the bytes are was checked when the state was read.
        identifyingInformation =
            state[.identifyingInformation].flatMap { IdentifyingInformation(parsing: $0.bytes) }
            ?? IdentifyingInformation()
        clock = UnitClock(now: shard.clock)
        self.configuration = configuration
        taskSetBounds = TaskSetBounds(configuration.maximumTasks)
        self.backstore = backstore
        self.shard = shard
        geometry = backstore.geometry()
        medium = Self.medium(geometry)
        table = shard.table(Self.features(geometry, store != nil, configuration))
        modePages = Self.modePages(geometry)
        if let saved = state[.savedModePages] { modePages.load(saved: saved.bytes) }
        unsafe tasks = .allocate(capacity: 1)
        unsafe tasks.initialize(to: TaskSet(limit: taskSetBounds.shared))
        unsafe counters = .allocate(capacity: 1)
        unsafe counters.initialize(to: LogicalUnitStatistics())
        unsafe pending = .allocate(capacity: Limits.nexusesPerTarget)
        unsafe pending.initialize(repeating: [], count: Limits.nexusesPerTarget)
        unsafe deadlines = .allocate(capacity: 1)
        unsafe deadlines.initialize(to: UnitDeadlines(commandTimeout: configuration.commandTimeout))
        refresh()
        refreshReadiness()
        shard.add(self)
    }

    deinit {
        unsafe precondition(tasks.pointee.count == 0, "a logical unit went away with tasks in its task set")
        precondition(
            !space.isInFlight && !flush.isInFlight, "a logical unit went away with a request of its own in flight")
        unsafe space.request?.deallocate()
        unsafe flush.request?.deallocate()
        shard.remove(self)
        unsafe tasks.deinitialize(count: 1)
        unsafe tasks.deallocate()
        unsafe counters.deallocate()
        measurements.deallocate()
        unsafe deadlines.deallocate()
        unsafe pending.deallocate()
    }

    private static func medium(_ geometry: scsi_backstore_geometry) -> MediumExtent {
        let block = UInt64(geometry.logical_block_size)
        precondition(block == 512 || block == 4096, "a backstore with an unsupported logical block size")
        return MediumExtent(
            blocks: BlockCount(geometry.size / block), blockShift: UInt64(block.trailingZeroBitCount))
    }

    private static func modePages(_ geometry: scsi_backstore_geometry) -> ModePages {
        ModePages(
            volatileCache: geometry.has(SCSI_BACKSTORE_VOLATILE_CACHE), thresholds: Self.hasThresholds(geometry))
    }

    private static func features(
        _ geometry: scsi_backstore_geometry, _ savesState: Bool, _ configuration: LogicalUnitConfiguration
    ) -> UnitFeatures {
        var features: UnitFeatures = []
        if savesState { features.insert(.savesState) }
        if geometry.has(SCSI_BACKSTORE_CAN_DISCARD) { features.insert(.unmap) }
        if geometry.has(SCSI_BACKSTORE_CAN_DISCARD), geometry.has(SCSI_BACKSTORE_CAN_ANCHOR) {
            features.insert(.anchor)
        }
        if geometry.atomic_write_maximum >= geometry.logical_block_size { features.insert(.atomicWrite) }
        if configuration.removable { features.insert(.removable) }
        return features
    }

    /// The commands that the unit has, by its medium, its configuration, and its target's port groups.
    func refreshTable() {
        var features = Self.features(geometry, persistentState.canSave, configuration)
        if target?.ports.hasExplicitGroup == true { features.insert(.explicitAccess) }
        table = shard.table(features)
    }

    // MARK: What the control plane asks

    /// Tasks received and not completed.
    public var tasksInFlight: Int { unsafe tasks.pointee.count }

    /// When the oldest of them arrived, in nanoseconds of the shard's clock.
    public var oldestReceivedAt: UInt64? { unsafe tasks.pointee.first?.receivedAt }
    /// The same of those that one initiator has sent.
    public func oldestReceivedAt(nexus: Int) -> UInt64? {
        var cursor = unsafe tasks.pointee.first
        while let task = cursor {
            if Int(task.nexus) == nexus { return task.receivedAt }
            cursor = task.next
        }
        return nil
    }

    /// Size of the medium in bytes.
    public var size: UInt64 { medium.bytes(medium.blocks).value }

    /// Derives what each command asks from what seldom changes.
    func refresh() {
        writeProtected =
            configuration.readOnly || !geometry.has(SCSI_BACKSTORE_WRITABLE) || modePages.softwareWriteProtect
        cachesWrites = geometry.has(SCSI_BACKSTORE_VOLATILE_CACHE)
        mustWriteThrough = cachesWrites && !modePages.writeCacheEnable
        let own = geometry.maximum_transfer
        unsafe tasks.pointee.isSeparate = modePages.separateTaskSets
        unsafe tasks.pointee.isRestricted = modePages.restrictedReordering
        maximumTransferBlocks = (own == 0 ? Limits.transferBytes : min(own, Limits.transferBytes)) >> medium.blockShift
        refreshThresholds()
    }

    /// What keeps requests from the backstore has changed.
    func refreshBlocking() { isBlocked = isFrozen || mediumState == .absent }

    /// Another medium. What the pages say stays, as far as it can.
    func replaceBackstore(_ new: BackstoreHandle) {
        backstore = new
        geometry = new.geometry()
        medium = Self.medium(geometry)
        refreshTable()
        var pages = Self.modePages(geometry)
        pages.adopt(modePages)
        modePages = pages
        space.measured = nil
        space.reached = []
        refresh()
    }

    func replaceConfiguration(_ new: LogicalUnitConfiguration) {
        configuration = new
        refreshAnnounced()
    }

    func readGeometry() {
        let old = medium
        geometry = backstore.geometry()
        medium = Self.medium(geometry)
        precondition(medium.blockShift == old.blockShift, "a backstore changed its logical block size")
        refreshAnnounced()
    }

    /// Tells the initiators of write protection that comes or goes and that none of them asked for.
    private func refreshAnnounced() {
        let wasProtected = writeProtected
        refresh()
        if writeProtected != wasProtected { establish(.modeParametersChanged, exceptFor: nil) }
    }

    /// Protects the medium against writes of all initiators, or lets them write again as far as the backstore can.
    /// Initiators learn of it by MODE PARAMETERS CHANGED: the WP bit is in what MODE SENSE returns.
    public func setReadOnly(_ isReadOnly: Bool) {
        configuration.readOnly = isReadOnly
        refreshAnnounced()
    }

    // MARK: The target's side

    func mapped(to target: TargetDevice, at lun: LUN) {
        unsafe owner = unsafe Unmanaged.passUnretained(target)
        self.lun = lun
        removed = false
        refreshTable()
        refreshThrottling()
        reservations.refresh(target)
        if poweredOnAt == nil {
            poweredOnAt = shard.clock
            releasePowerControl()
            unsafe counters.pointee.idleSince = shard.clock
        }
    }

    /// Ends what waits and refuses what comes; `drained` is called when the last task is gone.
    func unmapped(drained: @escaping () -> Void) {
        removed = true
        whenDrained = drained
        unsafe tasks.pointee.clearAllACA()
        endDormant(.failed(SenseData(.illegalRequest, .logicalUnitNotSupported))) { _ in true }
        thaw()
        callWhenDrained()
    }

    func callWhenDrained() {
        guard removed, unsafe tasks.pointee.count == 0, !space.isInFlight, !flush.isInFlight, !flush.isWanted,
            let drained = whenDrained
        else { return }
        whenDrained = nil
        unsafe owner = nil
        lun = nil
        drained()
    }

    // MARK: receive → admit → execute → finish

    /// Takes a task whose LUN addresses this unit.
    @inline(__always)
    func receive(_ task: TaskHandle) {
        unsafe task.logicalUnit = unsafe Unmanaged.passUnretained(self)
        guard unsafe tasks.pointee.count < tasks.pointee.ordinaryLimit, unsafe task.command.flags == 0 else {
            return receiveWithCare(task)
        }
        match(task)
        admit(task, unsafe tasks.pointee.insert(task))
    }

    /// The same while an ACA condition is in effect, with a task set for each nexus, with a full task set, or for a
    /// task with flags.
    private func receiveWithCare(_ task: TaskHandle) {
        match(task)
        let functionsOnly = modePages.taskManagementFunctionsOnly
        if let status = unsafe tasks.pointee.refusal(of: task, functionsOnly: functionsOnly) {
            return refuse(task, status)
        }
        // What must not be repeated ends at once, and not with a status that says that it was not carried out.
        guard unsafe tasks.pointee.count < taskSetBounds.shared || task.mustNotBeRepeated || hasRoom(for: task) else {
            return refuse(task, fullStatus(task))
        }
        admit(task, unsafe tasks.pointee.insertWithCare(task))
    }

    @inline(__always)
    private func match(_ task: TaskHandle) {
        let cdb = CDB(task)
        if case .row(let row) = table.match(cdb) {
            task.row = row
            DeviceServer.decodeExtent(task, cdb, row.extent)
        } else {
            task.row = nil
        }
    }

    @inline(__always)
    private func admit(_ task: TaskHandle, _ entry: TaskSetEntry) {
        task.sequence = shard.nextSequence()
        task.receivedAt = shard.clock
        unsafe deadlines.pointee.arrived(task)
        if unsafe tasks.pointee.count == 1 {
            unsafe counters.pointee.idleNanoseconds &+= shard.clock &- counters.pointee.idleSince
        }
        switch entry {
        case .enabled:
            task.transition(to: .enabled)
            run(task)
        case .dormant:
            task.waitsFor = .order
            task.transition(to: .dormant)
        case .unwanted: endUnbegun(task)
        }
    }

    @inline(never)
    private func endUnbegun(_ task: TaskHandle) {
        task.transition(to: .enabled)
        // Nobody knows what became of the first, as after a loss of power: the initiator has to look.
        let (key, code): (SenseKey, AdditionalSense) =
            task.mustNotBeRepeated
            ? (.abortedCommand, .logicalUnitCommunicationFailure) : (.illegalRequest, .invalidMessageError)
        endMarked(task, .failed(SenseData(key, code)))
    }

    /// Carries an enabled task out, as far as it goes.
    @inline(__always)
    private func run(_ task: TaskHandle) {
        if isThrottled, mustWait(task) { return }
        carryOut(task)
    }

    @inline(__always)
    private func carryOut(_ task: TaskHandle) {
        let flags = task.row?.flags ?? .ofUnknownCommand
        let state = AdmissionState(
            pending: unsafe pending[Int(task.nexus)], restriction: restriction(task.nexus), readiness: readiness,
            writeProtected: writeProtected)
        switch Admission.check(flags, state) {
        case .admitted: break
        case .unitAttention(let condition):
            if modePages.unitAttentionInterlock == .none { report(condition, for: task.nexus) }
            return end(task, .failed(condition.sense))
        case .deferredError: return end(task, .failed(takeDeferredError(for: task.nexus) ?? .none))
        case .refused(let sense): return end(task, .failed(sense))
        case .conflict: return end(task, .done(.reservationConflict))
        }
        guard let row = task.row else { return end(task, .failed(unknownCommand(task))) }
        let cdb = CDB(task)
        if let sense = unsafe CommandTable.validate(cdb, length: Int(task.command.cdb_length), against: row) {
            return end(task, .failed(sense))
        }
        proceed(task, DeviceServer.execute(task, cdb, row, on: self))
    }

    private func unknownCommand(_ task: TaskHandle) -> SenseData {
        if case .unknownServiceAction = table.match(CDB(task)) { return CommandTable.invalidServiceAction(CDB(task)) }
        return .invalidOperationCode
    }

    /// Acts on what a handler said.
    @inline(__always)
    private func proceed(_ task: TaskHandle, _ outcome: Outcome) {
        if task.disposition.isAbort { return endAborted(task, outcome) }
        switch outcome {
        case .submit: submit(task)
        case .needsStaging: wait(task, for: .staging)
        case .save: save(task)
        case .needsState: waitForState(task)
        case .awaitAborted: awaitAborted(task)
        case .done, .failed, .overrun: end(task, outcome)
        }
    }

    @inline(__always)
    private func submit(_ task: TaskHandle) {
        if isBlocked { return blocked(task, waitsFor: .thaw) }
        lastRequest = shard.clock | 1
        task.transition(to: .transferring)
        unsafe task.request.pointee.owner = unsafe UnsafeMutableRawPointer(task.pointer)
        unsafe task.request.pointee.complete = { request, error in
            // Where every completion of a backstore enters the core.
            let task = unsafe TaskHandle(request!.pointee.owner.assumingMemoryBound(to: SCSITask.self))
            unsafe task.logicalUnit!._withUnsafeGuaranteedRef {
                $0.backstoreCompleted(task, error: error, again: false)
            }
        }
        if unsafe !backstore.submit(task.request) {
            task.transition(to: .enabled)
            wait(task, for: .backstore)
        }
    }

    /// An aborted command changes nothing any more, unless the change is on its way already.
    private func endAborted(_ task: TaskHandle, _ outcome: Outcome) {
        if case .save = outcome { persistentState.discard() }
        end(task, .done(.good))
    }

    // MARK: Persistent state

    /// Stages a change of what survives power loss. A handler returns the outcome; a command that has more to do once
    /// the change is made sets its step before.
    ///
    /// - Parameters:
    ///   - bytes: The new bytes of the section; `nil` removes it.
    ///   - apply: Makes the change in memory. Runs once, when the bytes are durable, or never.
    func save(
        _ kind: UnitStateKind, version: UInt16 = 1, _ bytes: [UInt8]?, then apply: @escaping () -> Void
    ) -> Outcome {
        if persistentState.isBusy { return .needsState }
        persistentState.stage(kind, version: version, bytes, apply: apply)
        return .save
    }

    private func save(_ task: TaskHandle) {
        task.transition(to: .settling)
        persistentState.begin { [self] error in
            task.transition(to: .enabled)
            let aborted = task.disposition.isAbort
            if error != 0, !aborted { return end(task, .failed(PersistentState.sense(error))) }
            proceed(task, aborted ? .done(.good) : DeviceServer.resume(task, CDB(task), task.row!, on: self))
        }
    }

    private func waitForState(_ task: TaskHandle) {
        task.waitsFor = .state
        task.transition(to: .dormant)
        persistentState.wait(task)
    }

    private func wait(_ task: TaskHandle, for reason: WaitReason) {
        task.waitsFor = reason
        task.transition(to: .dormant)
        shard.wait(task)
    }

    /// What a task waited for is free again: memory of the shard, the backstore, the persistent state.
    func retry(_ task: TaskHandle) {
        // Marked by a function that has not come to it yet: an aborted command starts nothing any more.
        if task.isLeaving { return giveBackMarked(task) }
        task.transition(to: .enabled)
        // One whose handler has yet to run has not begun; one whose request only waits for room goes on to its end.
        let hasNotBegun = task.waitsFor == .staging || task.waitsFor == .state || task.waitsFor == .quota
        if hasNotBegun, unsafe tasks.pointee.isBlocked(task) {
            return block(task)
        }
        goOn(task)
    }

    /// Goes on with an enabled task that had waited.
    private func goOn(_ task: TaskHandle) {
        switch task.waitsFor {
        case .order: run(task)
        case .backstore, .thaw, .recovery:
            // The medium may have become smaller since the request was filled.
            if let sense = outOfRange(task) { return end(task, .failed(sense)) }
            task.waitsFor == .recovery ? submitAgain(task) : submit(task)
        case .staging, .state: proceed(task, DeviceServer.execute(task, CDB(task), task.row!, on: self))
        case .quota: if !mustWait(task) { carryOut(task) }
        case .response: finish(task)
        }
    }

    /// LBA OUT OF RANGE for a task whose request is not on the medium any more, `nil` if it is.
    func outOfRange(_ task: TaskHandle) -> SenseData? {
        let (offset, length) = unsafe (task.request.pointee.offset, task.request.pointee.length)
        if offset <= size, length <= size - offset { return nil }
        let first = medium.address(of: ByteOffset(max(offset, size)))
        return SenseData(.illegalRequest, .logicalBlockAddressOutOfRange, information: first.value)
    }

    private func block(_ task: TaskHandle) {
        unsafe tasks.pointee.block()
        task.transition(to: .blocked)
    }

    /// The backstore has completed a task's request.
    @inline(__always)
    func backstoreCompleted(_ task: TaskHandle, error: Int32, again: Bool) {
        task.transition(to: .enabled)
        var outcome: Outcome?
        if error == 0, task.disposition == .none {
            outcome = DeviceServer.resume(task, CDB(task), task.row!, on: self)
        } else {
            outcome = completedOtherwise(task, error, again: again)
        }
        if let outcome { proceed(task, outcome) }
    }

    /// The same with an error, or for a task that was marked meanwhile.
    ///
    /// - Returns: What to do next; `nil` if nothing, for it is tried again or was given back.
    @inline(never)
    private func completedOtherwise(_ task: TaskHandle, _ error: Int32, again: Bool) -> Outcome? {
        if task.disposition.isAbort { return .done(.good) }
        if task.disposition == .suspended { return completedMarked(task, error, again: again) }
        return recovers(task, error, again: again) ? nil : failure(task, error)
    }

    /// How a command ends whose request the backstore has ended with an error.
    func failure(_ task: TaskHandle, _ error: Int32) -> Outcome {
        if task.hasExpired, BackstoreError.isCancellation(error) { return .failed(.commandTimeout) }
        if task.row?.handler == .preFetch, BackstoreError.meansNoCache(error) { return .done(.good) }
        unsafe counters.pointee.backstoreErrors += 1
        let sense = BackstoreError.sense(error, task, medium)
        if sense.key == .mediumError { mediumErrorOccurred(ErrorCounterPage(of: task)) }
        if sense.code == .spaceAllocationFailedWriteProtect, watchesSpace { measureSpace() }
        if task.row?.handler == .sendDiagnostic {
            return .failed(SenseData(.hardwareError, .logicalUnitFailedSelfTest))
        }
        return .failed(sense)
    }

    /// Starts the unit, if it is stopped.
    func start() {
        if stopped { unsafe counters.pointee.startStopCycles &+= 1 }
        stopped = false
    }

    /// The medium is gone before the task could use it.
    func endWithoutMedium(_ task: TaskHandle) { end(task, .failed(readiness.sense)) }

    /// Fills the response and gives the task back, unless an ACA condition keeps it from ending.
    @inline(__always)
    func end(_ task: TaskHandle, _ outcome: Outcome) {
        fillResponse(task, outcome)
        if unsafe tasks.pointee.ordinaryLimit == 0, keepsFromEnding(task) { return }
        finish(task)
    }

    /// SAM-6 5.9.2: a command that was enabled when an ACA condition was established does not end before it is cleared.
    private func keepsFromEnding(_ task: TaskHandle) -> Bool {
        guard task.state == .enabled, task.disposition == .none, unsafe tasks.pointee.isBlocked(task) else {
            return false
        }
        shard.returnStaging(task)
        task.waitsFor = .response
        block(task)
        enableDormant()
        if shard.hasWaiting { shard.retryWaiting() }
        if watchesRequests { callWhenQuiet() }
        return true
    }

    /// Takes a task whose response is filled out of the set, gives it back, and lets others run.
    @inline(__always)
    func finish(_ task: TaskHandle) {
        unsafe tasks.pointee.remove(task)
        task.transition(to: .completing)
        shard.returnStaging(task)
        count(task)
        if unsafe tasks.pointee.count == 0 { unsafe counters.pointee.idleSince = shard.clock }
        if isTraced { trace?.record(task, now: shard.clock) }
        if task.response.status != SCSIStatus.good.rawValue { return finishNotGood(task) }
        complete(task)
        goOnWithOthers()
    }

    /// Takes a marked task out of the set as if it had not been received.
    @inline(never)
    func takeBack(_ task: TaskHandle) {
        unsafe tasks.pointee.remove(task)
        task.transition(to: .completing)
        shard.returnStaging(task)
        if unsafe tasks.pointee.count == 0 { unsafe counters.pointee.idleSince = shard.clock }
        // Neither counted nor traced: it comes again.
        unsafe task.response.data_in_residual = task.command.data_in_length
        unsafe task.response.data_out_residual = task.command.data_out_length
        task.respond(.suspended, .good)
        complete(task)
        goOnWithOthers()
    }

    /// Ends a marked task.
    @inline(never)
    func endMarked(_ task: TaskHandle, _ outcome: Outcome) { end(task, outcome) }

    /// CHECK CONDITION may end other commands as well (QErr) and establish an ACA condition, before anybody hears of
    /// it.
    private func finishNotGood(_ task: TaskHandle) {
        if task.response.status == SCSIStatus.reservationConflict.rawValue {
            interlock(.reservationConflict, for: task.nexus)
        }
        let isFault = task.response.status == SCSIStatus.checkCondition.rawValue && !removed
        let ended = isFault && checkConditionReported(task)
        complete(task)
        if ended { endMarked() }
        goOnWithOthers()
    }

    @inline(__always)
    private func complete(_ task: TaskHandle) {
        unsafe owner.unsafelyUnwrapped._withUnsafeGuaranteedRef { $0.complete(task) }
    }

    @inline(__always)
    private func goOnWithOthers() {
        enableDormant()
        if shard.hasWaiting { shard.retryWaiting() }
        if removed { callWhenDrained() }
        if watchesRequests { callWhenQuiet() }
    }

    @inline(__always)
    private func fillResponse(_ task: TaskHandle, _ outcome: Outcome) {
        switch task.disposition {
        case .none, .suspended: break
        case .aborted: return task.respond(.aborted, .good)
        case .reset: return task.respond(.reset, .good)
        case .taskAborted: return task.respond(.commandComplete, .taskAborted)
        }
        switch outcome {
        case .done(let status): task.respond(.commandComplete, status)
        case .failed(let sense):
            task.sense = sense
            task.descriptorSense = usesDescriptorSense
            // The request may have named all of the buffers, but nobody can say which of them the medium has filled.
            unsafe task.response.data_in_residual = task.command.data_in_length
            task.respond(.commandComplete, .checkCondition)
        case .overrun: task.respond(.overrun, .good)
        case .submit, .needsStaging, .save, .needsState, .awaitAborted:
            preconditionFailure("a task ended that was not at its end")
        }
    }

    @inline(__always)
    private func count(_ task: TaskHandle) {
        measurements.count(task, now: shard.clock)
        switch task.row?.handler {
        case .read: break
        case .write: if watchesSpace { spaceUsed() }
        default: countOther(task)
        }
    }

    @inline(never)
    private func countOther(_ task: TaskHandle) {
        switch task.row?.handler {
        case .verify:
            unsafe counters.pointee.verifies += 1
            countVerified(task)
        case .writeAndVerify:
            countVerified(task)
            if watchesSpace { spaceUsed() }
        case .writeAtomic: if watchesSpace { spaceUsed() }
        case .unmap:
            unsafe counters.pointee.unmaps += 1
            if watchesSpace { measureSpace() }
        default: break
        }
    }

    private func countVerified(_ task: TaskHandle) {
        guard !task.disposition.isAbort, task.response.status == SCSIStatus.good.rawValue else { return }
        unsafe counters.pointee.bytesVerified += medium.bytes(BlockCount(task.blocks)).value
    }

    /// Refuses a task that never was in the task set.
    private func refuse(_ task: TaskHandle, _ status: SCSIStatus) {
        task.transition(to: .completing)
        task.respond(.commandComplete, status)
        measurements.countRefused(task)
        interlock(status, for: task.nexus)
        complete(task)
    }

    /// Enables what nothing stands before any more. A loop and not a recursion: a task may end while it is enabled.
    @inline(__always)
    func enableDormant() {
        if unsafe tasks.pointee.waiting > 0 { enableAllDormant() }
    }

    private func enableAllDormant() {
        enableAgain = true
        guard !enabling else { return }
        enabling = true
        while enableAgain {
            enableAgain = false
            while let task = unsafe tasks.pointee.nextEnabled() {
                // A marked task does not run any more: it would take a unit attention condition with it.
                if task.isLeaving {
                    giveBackMarked(task)
                } else {
                    task.transition(to: .enabled)
                    goOn(task)
                }
            }
        }
        enabling = false
    }

    /// MODE SELECT has set the pages. If their current values are others now, everybody else learns of it (SPC-4 6.12).
    func setModePages(_ pages: ModePages, by nexus: UInt16) {
        let old = modePages
        modePages = pages
        refresh()
        guard zip(pages.pages, old.pages).contains(where: { $0.current != $1.current }) else { return }
        establish(.modeParametersChanged, exceptFor: nexus)
        measureSpace()
        let isTest = pages.informationalExceptions.isTest
        if isTest, !old.informationalExceptions.isTest { informationalExceptionOccurred() }
    }

    var usesDescriptorSense: Bool { modePages.descriptorSense }
}

extension TaskHandle {
    /// Fills the response. Residuals count from the whole buffers down as data moves.
    @inline(__always)
    func respond(_ service: ServiceResponse, _ status: SCSIStatus) {
        response.service_response = service.rawValue
        response.status = status.rawValue
        response.status_qualifier = 0
    }
}

extension scsi_backstore_geometry {
    /// Whether a capability bit is set.
    @inline(__always)
    func has(_ capability: some BinaryInteger) -> Bool { capabilities & UInt32(capability) != 0 }
}
