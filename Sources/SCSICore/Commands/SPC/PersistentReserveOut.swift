// PERSISTENT RESERVE OUT: its parameter list, and its service actions. RESERVE and RELEASE of SPC-2.
//
// Called by: DeviceServer. Must not know: what the services change (ReservationTable), how changes are kept.

import CTarget

/// The service actions of PERSISTENT RESERVE OUT (SPC-4 6.16.2).
enum ReservationService: UInt8 {
    case register = 0x00
    case reserve = 0x01
    case release = 0x02
    case clear = 0x03
    case preempt = 0x04
    case preemptAndAbort = 0x05
    case registerAndIgnoreExistingKey = 0x06
    case registerAndMove = 0x07
    case replaceLostReservation = 0x08
}

extension SPC {
    private static let basicListLength = 24

    /// PERSISTENT RESERVE OUT (SPC-4 6.16).
    static func persistentReserveOut(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        guard let service = ReservationService(rawValue: cdb[1] & 0x1f) else {
            preconditionFailure("a service action that is not in the command table")
        }
        if unit.reservations.reserved != nil { return .done(.reservationConflict) }
        // What the table is after a change that is being saved is not known yet.
        if unit.persistentState.isBusy { return .needsState }
        guard let nexus = unit.target?.nexusName(task.nexus) else { return .done(.reservationConflict) }
        let length = cdb.uint32(5)
        guard length >= basicListLength, length <= Limits.parameterBytes else {
            return .failed(.parameterListLengthError)
        }
        guard let list = unsafe DeviceServer.parameterList(task, length: Int(length), into: unit.shard.parameters)
        else { return .overrun }
        let type = cdb[2] >> 4 == 0 ? ReservationType(rawValue: cdb[2] & 0x0f) : nil
        switch perform(service, list, nexus, type, on: unit) {
        case .unchanged: return .done(.good)
        case .conflict: return .done(.reservationConflict)
        case .failed(let sense): return .failed(sense)
        case .changed(let table, let notices, let preempted):
            if service == .preemptAndAbort { prepareAbort(task, of: preempted, on: unit) }
            let outcome = unit.change(
                table, telling: notices, allowingRemovalFor: allowsRemoval(service) ? preempted : [])
            guard service == .preemptAndAbort, case .done = outcome else { return outcome }
            return abortPreempted(task, on: unit)
        }
    }

    /// Whether the nexuses whose registrations go do not prevent the removal of the medium any more, because they may
    /// not be there to allow it (SPC-4 5.13.11.2.6, SBC-4 5.15).
    private static func allowsRemoval(_ service: ReservationService) -> Bool {
        switch service {
        case .preemptAndAbort, .clear: true
        case .register, .reserve, .release, .preempt, .registerAndIgnoreExistingKey, .registerAndMove,
            .replaceLostReservation:
            false
        }
    }

    private static func perform(
        _ service: ReservationService, _ list: ParameterReader, _ nexus: NexusName, _ type: ReservationType?,
        on unit: LogicalUnit
    ) -> ReservationVerdict {
        let table = unit.reservations.table
        let (key, actionKey) = (list.uint64(0), list.uint64(8))
        if service == .registerAndMove { return registerAndMove(list, nexus, on: unit) }
        if let sense = checkParameters(service, list, on: unit) { return .failed(sense) }
        switch service {
        case .register, .registerAndIgnoreExistingKey:
            return register(service, list, nexus, on: unit)
        case .reserve:
            guard let type else { return .failed(.invalidField(inCDB: 2, bit: 3)) }
            return table.reserve(nexus, key: key, type)
        case .release:
            return table.release(nexus, key: key, type)
        case .clear: return table.clear(nexus, key: key)
        case .preempt, .preemptAndAbort: return table.preempt(nexus, key: key, preempted: actionKey, type)
        case .registerAndMove: preconditionFailure("has its own parameter list")
        case .replaceLostReservation:
            guard unit.reservations.areLost else { return table.replaceLost(nexus) }
            guard let type else { return .failed(.invalidField(inCDB: 2, bit: 3)) }
            return ReservationTable.replacingLost(
                nexus, key: key, newKey: actionKey, type, persists: list.byte(20) & 0x01 != 0)
        }
    }

    /// The basic parameter list (SPC-4 6.16.3): SPEC_I_PT is for REGISTER alone, ALL_TG_PT for registrations, APTPL for
    /// them and for REPLACE LOST RESERVATION; elsewhere they are ignored.
    private static func checkParameters(
        _ service: ReservationService, _ list: ParameterReader, on unit: LogicalUnit
    ) -> SenseData? {
        let specifies = list.byte(20) & 0x08 != 0
        if specifies, service != .register { return .invalidField(inParameterList: 20, bit: 3) }
        if !specifies, list.count != basicListLength { return .parameterListLengthError }
        switch service {
        case .register, .registerAndIgnoreExistingKey, .replaceLostReservation: break
        case .reserve, .release, .clear, .preempt, .preemptAndAbort, .registerAndMove: return nil
        }
        if list.byte(20) & 0xf2 != 0 {
            return .invalidField(inParameterList: 20, bit: list.byte(20) & 0xf0 != 0 ? 7 : 1)
        }
        if list.byte(20) & 0x01 != 0, !unit.persistentState.canSave {
            return .invalidField(inParameterList: 20, bit: 0)
        }
        return nil
    }

    private static func register(
        _ service: ReservationService, _ list: ParameterReader, _ nexus: NexusName, on unit: LogicalUnit
    ) -> ReservationVerdict {
        let flags = list.byte(20)
        var others: [NexusName]?
        let ports = flags & 0x04 != 0 ? unit.target?.ports.identifiers ?? [] : [nexus.targetPort]
        if flags & 0x08 != 0 {
            switch readInitiatorPorts(list) {
            case .failure(let fault): return .failed(fault.sense)
            case .success(let addresses):
                others = addresses.filter { $0 != nexus.initiatorPort }.flatMap { address in
                    ports.map { NexusName(initiatorPort: address, targetPort: $0) }
                }
            }
        }
        return unit.reservations.table.register(
            nexus, key: service == .register ? list.uint64(0) : nil, newKey: list.uint64(8),
            persists: flags & 0x01 != 0,
            sameInitiator: ports.filter { $0 != nexus.targetPort }.map {
                NexusName(initiatorPort: nexus.initiatorPort, targetPort: $0)
            }, others: others)
    }

    private struct Fault: Error { let sense: SenseData }

    /// The additional parameter data of SPEC_I_PT (SPC-4 6.16.3): a length and TransportIDs.
    private static func readInitiatorPorts(_ list: ParameterReader) -> Result<[UInt64], Fault> {
        guard list.count >= 28 else { return .failure(Fault(sense: .parameterListLengthError)) }
        let length = list.uint32(24)
        guard UInt64(length) + 28 == list.count else { return .failure(Fault(sense: .parameterListLengthError)) }
        guard length % UInt32(TransportIdentifier.length) == 0 else {
            return .failure(Fault(sense: .invalidField(inParameterList: 24)))
        }
        var addresses: [UInt64] = []
        for offset in stride(from: 28, to: list.count, by: TransportIdentifier.length) {
            guard let address = TransportIdentifier.read(list, at: offset) else {
                return .failure(Fault(sense: .invalidField(inParameterList: offset)))
            }
            addresses.append(address)
        }
        return .success(addresses)
    }

    /// REGISTER AND MOVE has a parameter list of its own (SPC-4 6.16.4).
    private static func registerAndMove(
        _ list: ParameterReader, _ nexus: NexusName, on unit: LogicalUnit
    ) -> ReservationVerdict {
        let flags = list.byte(17)
        if flags & 0xfc != 0 { return .failed(.invalidField(inParameterList: 17, bit: 7)) }
        if flags & 0x01 != 0, !unit.persistentState.canSave {
            return .failed(.invalidField(inParameterList: 17, bit: 0))
        }
        let length = list.uint32(20)
        guard UInt64(length) + 24 == list.count else { return .failed(.parameterListLengthError) }
        guard length == TransportIdentifier.length, let address = TransportIdentifier.read(list, at: 24) else {
            return .failed(.invalidField(inParameterList: 24))
        }
        let port = list.uint16(18)
        guard unit.target?.ports.identifiers.contains(port) == true else {
            return .failed(.invalidField(inParameterList: 18))
        }
        return unit.reservations.table.registerAndMove(
            nexus, key: list.uint64(0), newKey: list.uint64(8),
            to: NexusName(initiatorPort: address, targetPort: port), unregisters: flags & 0x02 != 0,
            persists: flags & 0x01 != 0)
    }

    // MARK: PREEMPT AND ABORT

    /// Remembers whose commands are to be aborted, as a bit mask of nexuses in `progress`, for when the change is made.
    private static func prepareAbort(_ task: TaskHandle, of names: [NexusName], on unit: LogicalUnit) {
        task.step = 1
        task.progress = 0
        for index in names.flatMap({ unit.target?.nexusIndices($0) ?? [] }) { task.progress |= 1 << UInt64(index) }
    }

    /// Aborts the commands of the preempted nexuses (SPC-4 5.13.11.2.6). GOOD comes when the last of them has ended:
    /// afterwards none of them touches the medium.
    static func abortPreempted(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        guard task.step == 1 else { return .done(.good) }
        task.step = 2
        unit.abortCommands(ofNexuses: task.progress, by: task)
        return .awaitAborted
    }

    // MARK: RESERVE and RELEASE of SPC-2

    /// RESERVE(6), RESERVE(10) (SPC-2 7.21, 7.22), with the exceptions of SPC-4 5.13.3 (CRH): while there are
    /// registrations, a nexus that may do everything is told GOOD and gets nothing.
    static func reserve(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        if unit.persistentState.isBusy { return .needsState }
        let reservations = unit.reservations
        if !reservations.table.isEmpty { return .done(admits(task, on: unit) ? .good : .reservationConflict) }
        if let holder = reservations.reserved, holder != task.nexus { return .done(.reservationConflict) }
        reservations.setReserved(task.nexus, on: unit.target)
        return .done(.good)
    }

    /// RELEASE(6), RELEASE(10): of a reservation that somebody else holds, nothing, with GOOD status.
    static func release(_ task: TaskHandle, on unit: LogicalUnit) -> Outcome {
        let reservations = unit.reservations
        if !reservations.table.isEmpty { return .done(admits(task, on: unit) ? .good : .reservationConflict) }
        if reservations.reserved == task.nexus { reservations.setReserved(nil, on: unit.target) }
        return .done(.good)
    }

    /// SPC-4 5.13.3: a holder, or a registered nexus under a type that admits registrants.
    private static func admits(_ task: TaskHandle, on unit: LogicalUnit) -> Bool {
        let table = unit.reservations.table
        guard let type = table.type, let name = unit.target?.nexusName(task.nexus) else { return false }
        return table.isHolder(name) || type.admitsRegistrants && table.registration(name) != nil
    }
}
