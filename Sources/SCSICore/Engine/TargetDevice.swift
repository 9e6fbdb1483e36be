// TargetDevice: a SCSI target device: its LUN map, its I_T nexuses, and the way of a task to its logical unit.
//
// Owns: the LUN map and the nexus table. Called by: fronts (tasks, nexuses), the daemon (mapping), LogicalUnit
// (completions and events). Must not know: transports, commands.

public import CTarget

/// One of a target's I_T nexuses, as the front that established it names it.
public struct NexusIdentifier: Equatable, Sendable {
    let index: UInt16
}

/// What a nexus is at this moment.
@safe
struct ITNexus {
    var port: TargetPortHandle?
    /// Tasks received and not completed.
    var tasks = 0
}

/// One of a target's I_T nexuses and what came over it beside commands. Monotonic counters.
public struct NexusStatus: Sendable {
    /// Its place in the target's table; `LogicalUnit.commands(nexus:)` takes it.
    public let index: Int
    /// The name of the initiator port.
    public let initiatorPort: String
    /// Whether there is a connection.
    public let isEstablished: Bool
    /// Tasks received and not completed.
    public let tasksInFlight: Int
    /// Times it was established.
    public let connections: UInt64
    /// Task management functions, by what SAM-6 and `scsi_target.h` call them.
    public let functions: [(function: TaskManagementFunction, count: UInt64)]
}

/// A SCSI target device: logical units by number, and the initiators that see them.
@safe
public final class TargetDevice {
    /// The target's NAA name: 64 bits.
    public let name: UInt64
    /// The shard that owns the target and its units.
    public let shard: Shard
    /// The ports, and the groups that they are in: which port a nexus goes through, its front says.
    var ports: TargetPorts
    /// What they are without groups.
    let symmetric: TargetPorts
    /// The target port groups, in ascending order of their identifiers.
    public var portGroups: [TargetPortGroup] { ports.groups }
    /// Called when an initiator has changed the state of a group: the group, its state, the initiator port. It may not
    /// call the target.
    public var whenAccessStateSet: ((UInt16, AsymmetricAccessState, String) -> Void)?

    private var units: [LUN: LogicalUnit] = [:]
    /// Units that were removed while tasks were in their task sets. Functions that end tasks reach them still.
    private var draining: [LogicalUnit] = []
    /// The map as the hot path reads it: pages of 256 entries, allocated when a number in them is used.
    private let pages: UnsafeMutablePointer<UnsafeMutablePointer<Unmanaged<LogicalUnit>?>?>
    private static let pageEntries = 256
    private static let pageCount = Limits.logicalUnitsPerTarget / pageEntries

    private let nexuses: UnsafeMutablePointer<ITNexus>
    /// The initiator port's name by nexus; kept when the nexus is lost, so that its unit attention conditions wait.
    private var initiatorPorts: [String?] = Array(repeating: nil, count: Limits.nexusesPerTarget)
    /// Whether a lost nexus had to make room for another: an initiator port that is unknown now may be the one that was
    /// forgotten, and may have missed a reset as well as the power on (POWER ON, RESET, OR BUS DEVICE RESET OCCURRED).
    private var hasForgotten = false
    /// What registrations call the nexus.
    private var nexusNames: [NexusName?] = Array(repeating: nil, count: Limits.nexusesPerTarget)
    /// Nexuses that were lost while tasks of theirs were with a backstore, as a bit mask by index.
    private var leaving: UInt64 = 0
    private let taskManager = TaskManager()
    /// Limits by initiator port, and as the commands of each nexus find them.
    private var throttles: [String: Throttle] = [:]
    private var nexusThrottles: [Throttle?] = Array(repeating: nil, count: Limits.nexusesPerTarget)
    /// Times that each nexus was established, and its task management functions by number.
    private var connections = Array(repeating: UInt64(0), count: Limits.nexusesPerTarget)
    private var functions: [[UInt8: UInt64]] = Array(repeating: [:], count: Limits.nexusesPerTarget)

    /// A target without units.
    ///
    /// - Parameters:
    ///   - ports: How many target ports it has: one for each kind of front, numbered from 1. The same at each start,
    ///     because registrations name them.
    ///   - portGroups: Its ports in groups; none: those are in one group that is always active and optimized.
    public init(name: UInt64, shard: Shard, ports: UInt16 = 2, portGroups: [TargetPortGroup] = []) {
        self.name = name
        self.shard = shard
        symmetric = TargetPorts(target: name, count: ports)
        self.ports = portGroups.isEmpty ? symmetric : TargetPorts(target: name, groups: portGroups)
        unsafe pages = .allocate(capacity: Self.pageCount)
        unsafe pages.initialize(repeating: nil, count: Self.pageCount)
        unsafe nexuses = .allocate(capacity: Limits.nexusesPerTarget)
        unsafe nexuses.initialize(repeating: ITNexus(), count: Limits.nexusesPerTarget)
    }

    deinit {
        for index in 0..<Limits.nexusesPerTarget {
            precondition(unsafe nexuses[index].tasks == 0, "a target went away with tasks in flight")
        }
        for index in 0..<Self.pageCount { unsafe pages[index]?.deallocate() }
        unsafe pages.deallocate()
        unsafe nexuses.deallocate()
    }

    // MARK: The LUN map

    /// The mapped units by number.
    public var logicalUnits: [(lun: LUN, unit: LogicalUnit)] {
        units.sorted { $0.key < $1.key }.map { (lun: $0.key, unit: $0.value) }
    }

    /// Maps a unit. Initiators learn of it by REPORTED LUNS DATA HAS CHANGED on the other units and by an event.
    ///
    /// - Returns: Whether the number was free.
    public func add(_ unit: LogicalUnit, at lun: LUN) -> Bool {
        guard units[lun] == nil else { return false }
        precondition(unit.target == nil, "a logical unit was mapped twice, or again before it was drained")
        announceChangedMap()
        units[lun] = unit
        setEntry(lun, unit)
        unit.mapped(to: self, at: lun)
        for index in 0..<UInt16(Limits.nexusesPerTarget) { unit.nexusCreated(index, .powerOn) }
        reportEvent(SCSI_EVENT_LOGICAL_UNIT_ADDED, lun: lun)
        return true
    }

    /// Unmaps a unit: new commands for its number find no unit, waiting ones are refused, those that the backstore has
    /// end as they end.
    ///
    /// - Parameter drained: Called when the last of its tasks has completed, maybe before this returns.
    /// - Returns: The unit, or `nil` if the number addresses none.
    @discardableResult
    public func remove(at lun: LUN, drained: @escaping () -> Void) -> LogicalUnit? {
        guard let unit = units.removeValue(forKey: lun) else { return nil }
        setEntry(lun, nil)
        announceChangedMap()
        reportEvent(SCSI_EVENT_LOGICAL_UNIT_REMOVED, lun: lun)
        draining.append(unit)
        unit.unmapped { [unowned self] in
            draining.removeAll { $0 === unit }
            drained()
        }
        return unit
    }

    private func announceChangedMap() {
        for (_, unit) in logicalUnits { unit.establish(.reportedLUNsChanged, exceptFor: nil) }
    }

    private func setEntry(_ lun: LUN, _ unit: LogicalUnit?) {
        let page = Int(lun.number) / Self.pageEntries
        if unsafe pages[page] == nil {
            let entries = UnsafeMutablePointer<Unmanaged<LogicalUnit>?>.allocate(capacity: Self.pageEntries)
            unsafe entries.initialize(repeating: nil, count: Self.pageEntries)
            unsafe pages[page] = entries
        }
        unsafe pages[page]![Int(lun.number) % Self.pageEntries] = unit.map { unsafe Unmanaged.passUnretained($0) }
    }

    @inline(__always)
    private func entry(_ lun: LUN) -> Unmanaged<LogicalUnit>? {
        guard let page = unsafe pages[Int(lun.number) / Self.pageEntries] else { return nil }
        return unsafe page[Int(lun.number) % Self.pageEntries]
    }

    // MARK: Nexuses

    /// Establishes an I_T nexus.
    ///
    /// - Parameters:
    ///   - initiatorPort: The name of the initiator port, the same after a reconnection: then the unit attention
    ///     conditions of the meantime are still there, and I_T NEXUS LOSS OCCURRED with them. The same after a restart
    ///     too, because persistent reservations belong to it.
    ///   - targetPort: The relative target port identifier of the front's port, one of the target's.
    ///   - port: Where its tasks are given back.
    /// - Returns: `nil` if the table is full (`Limits.nexusesPerTarget`).
    public func establishNexus(
        initiatorPort: String, targetPort: UInt16 = 1, port: TargetPortHandle
    ) -> NexusIdentifier? {
        precondition(ports.identifiers.contains(targetPort), "a target port that the target does not have")
        let name = NexusName(initiatorPort: TransportIdentifier.address(of: initiatorPort), targetPort: targetPort)
        let isIdle: (Int) -> Bool = { unsafe self.nexuses[$0].port == nil && self.nexuses[$0].tasks == 0 }
        let slots = 0..<Limits.nexusesPerTarget
        let known = slots.first { nexusNames[$0] == name && isIdle($0) }
        guard
            let index = known ?? slots.first(where: { initiatorPorts[$0] == nil && isIdle($0) })
                ?? slots.first(where: isIdle)
        else { return nil }
        unsafe nexuses[index].port = port
        if known == nil, initiatorPorts[index] != nil { hasForgotten = true }
        initiatorPorts[index] = initiatorPort
        nexusThrottles[index] = throttles[initiatorPort]
        if known == nil { (connections[index], functions[index]) = (0, [:]) }
        connections[index] += 1
        nexusNames[index] = name
        for unit in units.values {
            if known == nil {
                unit.nexusCreated(UInt16(index), hasForgotten ? .powerOnOrReset : .powerOn)
            } else {
                unit.establish(.nexusLoss, for: UInt16(index))
            }
            unit.reservations.refresh(self)
        }
        return NexusIdentifier(index: UInt16(index))
    }

    /// I_T nexus loss (SAM-6 6.3.4): ends the nexus's tasks. Each is still given back to its port; when the last one
    /// is, the port is not called any more.
    public func loseNexus(_ nexus: NexusIdentifier) {
        let index = nexus.index
        let all = allUnits
        for unit in all { unit.mark { $0.nexus == index ? .aborted : .none } }
        // Before the first of them ends: it may be the last for which a suspension waits.
        taskManager.forget(nexus: index)
        for unit in all { unit.endMarked() }
        for unit in all { unit.nexusLost(index) }
        if unsafe nexuses[Int(index)].tasks == 0 { unsafe nexuses[Int(index)].port = nil }
        if unsafe nexuses[Int(index)].tasks > 0 { leaving |= 1 << UInt64(index) }
    }

    /// Nexuses that are there, or have tasks left from when they were.
    var nexusCount: Int { (0..<Limits.nexusesPerTarget).count { unsafe nexuses[$0].port != nil } }
    /// What registrations call a nexus; `nil` if there never was one with this index.
    func nexusName(_ index: UInt16) -> NexusName? { nexusNames[Int(index)] }

    /// The target port that a nexus goes through.
    func port(of nexus: UInt16) -> TargetPort? { nexusNames[Int(nexus)].flatMap { ports[$0.targetPort] } }

    /// The name that a front has given the initiator port of a nexus; `nil` if none has.
    func initiatorPortName(_ name: NexusName) -> String? {
        nexusNames.firstIndex(of: name).flatMap { initiatorPorts[$0] }
    }

    /// The name that a front has given the initiator port of a nexus; `nil` if the target has forgotten it.
    func initiatorPortName(index: UInt16) -> String? { initiatorPorts[Int(index)] }

    /// The nexuses with a name: one, or none if the target does not know it. More than one if a front has connected
    /// twice with the same name.
    func nexusIndices(_ name: NexusName) -> [UInt16] {
        nexusNames.indices.filter { nexusNames[$0] == name }.map { UInt16($0) }
    }

    /// The tasks of a nexus that were received and not completed.
    public func tasksInFlight(_ nexus: NexusIdentifier) -> Int { unsafe nexuses[Int(nexus.index)].tasks }

    /// Limits what an initiator may do here. The limiter may be that of other targets of the shard as well: then the
    /// limit is for all of them together. To lift a limit, give its limiter none.
    public func setThrottle(_ throttle: Throttle, initiatorPort: String) {
        throttles[initiatorPort] = throttle
        for index in 0..<Limits.nexusesPerTarget where initiatorPorts[index] == initiatorPort {
            precondition(nexusThrottles[index]?.waiting ?? 0 == 0 || nexusThrottles[index] === throttle)
            nexusThrottles[index] = throttle
        }
        for unit in allUnits { unit.refreshThrottling() }
    }

    var hasThrottles: Bool { !throttles.isEmpty }

    func throttle(nexus: UInt16) -> Throttle? { nexusThrottles[Int(nexus)] }

    /// The nexuses that are there, and those that were and whose initiators may come back.
    public var nexusStatus: [NexusStatus] {
        (0..<Limits.nexusesPerTarget).compactMap { index in
            guard let name = initiatorPorts[index] else { return nil }
            return unsafe NexusStatus(
                index: index, initiatorPort: name, isEstablished: nexuses[index].port != nil,
                tasksInFlight: nexuses[index].tasks, connections: connections[index],
                functions: functions[index].sorted { $0.key < $1.key }.compactMap { number, count in
                    TaskManagementFunction(rawValue: number).map { (function: $0, count: count) }
                })
        }
    }

    func initiatorPort(_ nexus: UInt16) -> String? { initiatorPorts[Int(nexus)] }

    // MARK: Tasks

    /// Takes a free task whose command is filled. It is given back by `complete_task` of the nexus's port, exactly once
    /// and maybe before this returns.
    @inline(__always)
    public func receive(_ task: TaskHandle, nexus: NexusIdentifier) {
        task.accept(nexus: nexus.index)
        unsafe nexuses[Int(nexus.index)].tasks += 1
        if case .unit(let lun) = LUN.parse(task.lunField), let unit = unsafe entry(lun) {
            unsafe unit._withUnsafeGuaranteedRef { $0.receive(task) }
        } else {
            receiveWithoutUnit(task)
        }
    }

    /// A command for a LUN that addresses no unit, or the REPORT LUNS well-known unit.
    private func receiveWithoutUnit(_ task: TaskHandle) {
        let outcome = MissingLogicalUnit.execute(task, on: self)
        task.transition(to: .completing)
        switch outcome {
        case .done(let status): task.respond(.commandComplete, status)
        case .overrun: task.respond(.overrun, .good)
        case .failed(let sense):
            task.sense = sense
            task.descriptorSense = false
            task.respond(.commandComplete, .checkCondition)
        case .submit, .needsStaging, .save, .needsState, .awaitAborted:
            preconditionFailure("there is no unit to submit to")
        }
        complete(task)
    }

    /// Gives a task back to the port that it came from.
    @inline(__always)
    func complete(_ task: TaskHandle) {
        let nexus = Int(task.nexus)
        let port = unsafe nexuses[nexus].port.unsafelyUnwrapped
        unsafe nexuses[nexus].tasks -= 1
        task.free()
        unsafe port.complete(task.head)
        if leaving != 0 { left(nexus) }
        if taskManager.isWaiting { taskManager.taskEnded(on: self) }
    }

    private func left(_ nexus: Int) {
        guard leaving & (1 << UInt64(nexus)) != 0, unsafe nexuses[nexus].tasks == 0 else { return }
        leaving &= ~(1 << UInt64(nexus))
        unsafe nexuses[nexus].port = nil
    }

    // MARK: Task management

    /// Takes a task management function. It is answered by `complete_task_management` of the nexus's port, exactly
    /// once, after the tasks that it ended were given back, and maybe before this returns.
    public func receive(_ request: scsi_task_management_request, nexus: NexusIdentifier) {
        if TaskManagementFunction(rawValue: request.function) != nil {
            functions[Int(nexus.index)][request.function, default: 0] += 1
        }
        taskManager.receive(request, nexus: nexus.index, on: self)
    }

    /// Calls `body` when the commands of some nexuses that PREEMPT AND ABORT has aborted have ended.
    func whenAborted(on unit: LogicalUnit, nexuses: UInt64, by task: TaskHandle, _ body: @escaping () -> Void) {
        taskManager.whenAborted(on: unit, nexuses: nexuses, by: task, body)
    }

    func answer(_ cookie: UInt64, _ response: TaskManagementResponse, nexus: UInt16, additional: UInt32 = 0) {
        let port = unsafe nexuses[Int(nexus)].port
        port?.completeTaskManagement(cookie: cookie, response: response.rawValue, additional: additional)
    }

    func unit(_ lun: LUN) -> LogicalUnit? { units[lun] }
    /// The mapped units by number, so that what is done to all is done in the same order each time, and those that have
    /// tasks left from when they were.
    var allUnits: [LogicalUnit] { logicalUnits.map(\.unit) + draining }

    // MARK: Events

    func unitAttentionEstablished(_ condition: UnitAttention, for nexus: UInt16, on lun: LUN) {
        // What SPC-6 lets a transport announce without being asked: changed parameters (ASC 2Ah); and a hard reset.
        let isReset = condition == .hardReset
        guard condition.code.code == 0x2a || isReset else { return }
        let port = unsafe nexuses[Int(nexus)].port
        let kind = isReset ? SCSI_EVENT_HARD_RESET : SCSI_EVENT_PARAMETERS_CHANGED
        port?.report(event(kind, lun: lun, code: condition.code))
    }

    func clearEverywhere(_ condition: UnitAttention, for nexus: UInt16) {
        for unit in units.values { unit.clear(condition, for: nexus) }
    }

    private func reportEvent(_ kind: some BinaryInteger, lun: LUN) {
        for index in 0..<Limits.nexusesPerTarget {
            let port = unsafe nexuses[index].port
            port?.report(event(kind, lun: lun, code: .noAdditionalSense))
        }
    }

    private func event(_ kind: some BinaryInteger, lun: LUN, code: AdditionalSense) -> scsi_target_event {
        var event = scsi_target_event()
        event.struct_size = UInt32(MemoryLayout<scsi_target_event>.size)
        event.kind = UInt8(kind)
        event.additional_sense_code = code.code
        event.additional_sense_code_qualifier = code.qualifier
        unsafe withUnsafeMutableBytes(of: &event.lun) { unsafe $0.storeBytes(of: lun.field.bigEndian, as: UInt64.self) }
        return event
    }
}

extension TaskHandle {
    /// The LUN field of the command, most significant byte first.
    @inline(__always)
    var lunField: UInt64 {
        unsafe UInt64(bigEndian: UnsafeRawPointer(pointer).loadUnaligned(as: UInt64.self))
    }

    /// free → received: what every task begins with.
    @inline(__always)
    func accept(nexus: UInt16) {
        transition(to: .received)
        self.nexus = nexus
        disposition = .none
        hasExpired = false
        step = 0
        progress = 0
        address = 0
        blocks = 0
        row = nil
        unsafe logicalUnit = nil
        attribute = TaskAttribute(rawValue: unsafe command.attribute) ?? .simple
        unsafe response.data_out_residual = command.data_out_length
        unsafe response.data_in_residual = command.data_in_length
    }
}
