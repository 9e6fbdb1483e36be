// CommandFuzzer: a logical unit under any sequence of CDBs and parameter lists, task management functions, errors of
// the medium and of what keeps the state, lost nexuses, and changes from outside.
//
// Oracles, beside that nothing traps: each command ends exactly once with what the seam demands of an end (MockPort);
// each function of a nexus that is not lost is answered once, when no command that it has ended is left; a nexus that
// is lost leaves no command but those that the medium or the state store still has; the medium is asked for nothing
// that is not in its geometry (ScriptedBackstore); the unit comes to rest with an empty task set and all staging memory
// given back (Shard), and the state that it has saved can be read again.
//
// Called by: libFuzzer. Must not know: what any command does.

import CBackstore
import CoreTestSupport
import CTarget

@testable import SCSICore

enum CommandFuzzer {
    static func run(_ input: FuzzInput) {
        let world = CommandWorld(input)
        world.act()
        world.finish()
    }
}

private final class CommandWorld {
    private var input: FuzzInput
    private let world: TestTarget
    private let configuration: LogicalUnitConfiguration
    private let rows: [CommandDescriptor]
    private var cookie: UInt64 = 1
    /// Functions that must be answered, by port, with the commands of each port that are over then.
    private var functions: [[UInt64: [Set<UInt64>]]] = [[:], [:]]
    /// Commands of a nexus that was lost, which the medium may still have: the port's next nexus does not know them.
    private var lost: [Set<UInt64>] = [[], []]
    /// The data-in buffer of the command that ended last, for the parameter list that answers it.
    private var echo: [[UInt8]] = [[], []]
    private var isPresent = true

    /// Data lengths that commands care about.
    private static let lengths = [0, 4, 8, 12, 18, 24, 36, 64, 96, 252, 255, 512, 1024, 4096, 8192, 20_000]
    private static let keys: [UInt64] = [0, 1, 2, .max]

    init(_ input: FuzzInput) {
        var input = input
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "SERIAL0001")
        configuration.removable = input.flag()
        configuration.readOnly = input.rarely(8)
        configuration.maximumTasks = input.pick([4096, 24])
        configuration.errorPolicy = input.pick([.report, .report, .stop, .retry(nanoseconds: 50_000_000)])
        configuration.commandTimeout = input.pick([0, 0, 1_000_000])
        self.configuration = configuration
        let (shape, blocks) = (input.byte(), input.pick([600, 64, 4096, 1] as [UInt64]))
        world = TestTarget(
            blocks: blocks, blockLength: shape & 1 == 0 ? 512 : 4096, attentive: true, configuration: configuration,
            savesState: shape & 2 == 0, configure: { Self.shape($0, shape) })
        rows = world.unit.table.all
        self.input = input
        for (index, port) in [world.a, world.b].enumerated() {
            port.whenCompleted = { [unowned self] in
                Trace.note("\(index == 0 ? "A" : "B") \($0.tag) ends: \($0.summary)")
                self.echo[index] = $0.data
            }
            // The target comes to rest after this world has gone.
            port.whenAnswered = { [weak self] cookie, response in self?.answered(index, cookie, response) }
        }
    }

    private static func shape(_ medium: ScriptedBackstore, _ shape: UInt8) {
        if shape & 4 != 0 { medium.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_CAN_WRITE_ZEROES) }
        if shape & 8 != 0 { medium.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_VOLATILE_CACHE) }
        if shape & 16 != 0 { medium.geometry.capabilities &= ~UInt32(SCSI_BACKSTORE_CAN_DISCARD) }
        if shape & 32 != 0 {
            medium.geometry.maximum_transfer = 8192
            medium.geometry.maximum_discard = 8192
            medium.geometry.maximum_write_zeroes = 12_288
        }
        if shape & 64 != 0 { medium.geometry.atomic_write_maximum = 0 }
    }

    private func port(_ index: Int) -> MockPort { index == 0 ? world.a : world.b }

    // MARK: Actions

    func act() {
        while !input.isEmpty {
            world.shard.now += 1000
            let index = input.below(2)
            switch input.below(24) {
            case 0..<8:
                let (cdb, length) = row()
                send(index, cdb, nil, length: length)
            case 8: send(index, input.exactly(32), nil)
            case 9: echoParameters(index)
            case 10: selectModes(index)
            case 11: reserve(index)
            case 12, 13: manage(index)
            case 14..<18: completeSome()
            case 18: loseOrEstablish(index)
            case 19: _ = world.store?.complete()
            case 20: passTime()
            case 21: world.backstore.capacity = input.pick([0, 1, 2, 5, .max])
            case 22: changeUnit()
            default: restOfTheMedium()
            }
        }
    }

    /// A CDB of the table, mostly without bits that it does not have, and as many bytes as its extent has, if any.
    private func row() -> (cdb: [UInt8], length: Int?) {
        let row = rows[input.below(rows.count)]
        let isRaw = input.rarely(16)
        let raw = input.exactly(Int(row.length) - 1)
        let cdb = [row.operationCode] + zip(1..., raw).map { isRaw ? $1 : $1 & row.usageByte($0) }
        var whole = cdb
        if row.hasServiceAction, row.operationCode == 0x7f {
            if !isRaw { whole[7] = 0x18 }
            whole[8...9] = CDB.bytes(UInt64(row.serviceAction), 2)[...]
        } else if row.hasServiceAction {
            whole[1] = cdb[1] & 0xe0 | UInt8(row.serviceAction & 0x1f)
        }
        guard let fields = Self.fields(row.extent), !input.rarely(4) else { return (whole, nil) }
        let blocks = placeExtent(in: &whole, fields.address, fields.count)
        return (whole, blocks * Int(world.backstore.geometry.logical_block_size))
    }

    /// Where a CDB has the address and the number of blocks.
    private static func fields(_ extent: ExtentField) -> (address: Range<Int>, count: Range<Int>)? {
        switch extent {
        case .none: nil
        case .six: (1..<4, 4..<5)
        case .ten: (2..<6, 7..<9)
        case .twelve: (2..<6, 6..<10)
        case .sixteen: (2..<10, 10..<14)
        case .compareAndWrite: (2..<10, 13..<14)
        case .writeAtomic: (2..<10, 12..<14)
        case .thirtyTwo: (12..<20, 28..<32)
        }
    }

    /// Blocks at the beginning of the medium, at its end, or one too far: at random hardly any would be on it.
    ///
    /// - Returns: How many.
    private func placeExtent(in cdb: inout [UInt8], _ address: Range<Int>, _ count: Range<Int>) -> Int {
        let size = Int(world.backstore.geometry.size / UInt64(world.backstore.geometry.logical_block_size))
        let blocks = input.pick([0, 1, 1, 2, 4, 8, 16]), choice = Int(input.byte())
        let first = [choice, choice & 7, size - blocks, size - blocks + 1, size, size + 1][input.below(6)]
        for (range, value) in [(address, max(0, first)), (count, blocks)] {
            for (place, byte) in zip(range, CDB.bytes(UInt64(value), range.count)) { cdb[place] = byte }
        }
        return blocks
    }

    /// - Parameter length: Bytes of its data, if that is known.
    private func send(_ index: Int, _ cdb: [UInt8], _ list: [UInt8]?, length known: Int? = nil) {
        let port = port(index)
        guard port.isConnected, port.hasFreeTask else { return }
        let layout = input.byte()
        let isOut = list != nil || layout & 1 != 0
        let isIn = !isOut || layout & 0x40 != 0
        let length = known ?? Self.lengths[input.below(Self.lengths.count)]
        let out =
            list ?? (isOut ? input.exactly(min(length, 512)) + Array(repeating: 0, count: max(0, length - 512)) : [])
        let lun: UInt64 = input.rarely(16) ? input.number() : 0
        Trace.note("\(port.name) sends \(cdb) with \(out.count) bytes \(out.prefix(64)), for \(isIn ? length : 0)")
        let attribute = input.pick([.simple, .simple, .simple, .ordered, .headOfQueue, .aca] as [TaskAttribute])
        port.send(
            cdb, lun: lun, attribute: attribute, dataOut: out, outLayout: cut(out.count, layout),
            dataIn: isIn ? length : 0, inLayout: cut(isIn ? length : 0, layout),
            cdbLength: layout & 0x80 != 0 ? input.below(33) : nil,
            timeoutMilliseconds: input.pick([0, 0, 0, 1, 1000]), flags: layout & 0x24 == 0x24 ? 1 : 0)
    }

    /// Segments of a buffer: one, or some with an empty one among them.
    private func cut(_ length: Int, _ layout: UInt8) -> [Int]? {
        guard layout & 2 != 0, length > 0 else { return nil }
        let first = min(length, 1 + Int(layout >> 2 & 0x1f))
        return [first, 0, length - first]
    }

    /// Sends back what the last command of the port has returned, with some bytes changed.
    private func echoParameters(_ index: Int) {
        var list = echo[index]
        spoil(&list)
        send(index, row().cdb, list)
    }

    private func spoil(_ list: inout [UInt8]) {
        for _ in 0..<input.below(5) where !list.isEmpty {
            list[Int(input.number(UInt16.self)) % list.count] = input.byte()
        }
        if input.rarely(4) { list = Array(list.prefix(input.below(64))) }
    }

    /// MODE SENSE, and MODE SELECT of what it returned, with some bytes changed.
    private func selectModes(_ index: Int) {
        let isLong = input.flag(), page = input.rarely(4) ? 0x3f : input.byte() & 0x3f
        let subpage: UInt8 = input.rarely(4) ? 0xff : 0
        guard port(index).isConnected, port(index).hasFreeTask else { return }
        let sense = isLong ? CDB.modeSense10(page, subpage, flags: 0) : CDB.modeSense6(page, subpage)
        port(index).send(sense, dataIn: isLong ? 4096 : 255)
        var list = echo[index]
        let header = isLong ? 8 : 4
        guard list.count >= header else { return }
        // What MODE SENSE returns and MODE SELECT does not take: the length, write protection, PS of each page.
        for offset in isLong ? [0, 1, 3] : [0, 2] { list[offset] = 0 }
        var offset = header + Int(isLong ? list[7] : list[3])
        while offset + 4 <= list.count {
            list[offset] &= 0x7f
            let isSubpage = list[offset] & 0x40 != 0
            offset += isSubpage ? 4 + Int(list[offset + 2]) << 8 + Int(list[offset + 3]) : 2 + Int(list[offset + 1])
        }
        spoil(&list)
        let flags: UInt8 = input.flag() ? 0x11 : 0x10
        let short = CDB.modeSelect6(listLength: min(list.count, 255), flags: flags)
        send(index, isLong ? CDB.modeSelect10(listLength: list.count, flags: flags) : short, list)
    }

    private func reserve(_ index: Int) {
        let service = CDB.ReservationService.allCases[input.below(CDB.ReservationService.allCases.count)]
        let choices = input.byte()
        let keys = (Self.keys[Int(choices & 3)], Self.keys[Int(choices >> 2 & 3)])
        var list = ReservationParameters(keys.0, keys.1, flags: input.byte() & 0x0d).bytes
        if input.flag() { list = Array(list.prefix(20)) + input.bytes(input.below(80)) }
        if service == .registerAndMove, input.flag() {
            list = ReservationParameters.move(keys.0, keys.1, flags: choices >> 6, to: transportIdentifier())
        } else if list.count > 24, input.flag() {
            list = Array(list.prefix(24)) + CDB.bytes(24, 4) + transportIdentifier()
        }
        send(index, CDB.persistentReserveOut(service, type: input.byte() & 0x0f, listLength: list.count), list)
    }

    /// The TransportID of the other initiator, or nearly so.
    private func transportIdentifier() -> [UInt8] {
        let address = TransportIdentifier.address(of: input.flag() ? "A" : "B")
        var identifier = [0x06, 0, 0, 0] + CDB.bytes(address, 8) + [UInt8](repeating: 0, count: 12)
        if input.rarely(3) { identifier[input.below(identifier.count)] = input.byte() }
        return identifier
    }

    /// A front's own function, or any number.
    private static func rareFunction(_ byte: UInt8) -> UInt8 { byte < 64 ? UInt8(SCSI_SUSPEND_TASKS) : byte }

    private func manage(_ index: Int) {
        let port = port(index)
        guard port.isConnected else { return }
        let known = port.tagsInFlight.sorted(), choice = input.byte()
        let tag = known.isEmpty || choice & 0xe0 == 0 ? UInt64(choice) : known[Int(choice) % known.count]
        let number =
            input.rarely(8)
            ? Self.rareFunction(input.byte())
            : TaskManagementFunction.allCases[input.below(TaskManagementFunction.allCases.count)].rawValue
        let lun: UInt64 = input.rarely(16) ? input.number() : 0
        Trace.note("\(port.name) sends the function \(number) for \(tag)")
        cookie += 1
        functions[index][cookie] = lun == 0 ? ended(by: number, tag, index) : []
        port.manage(rawFunction: number, lun: lun, tag: tag, cookie: cookie)
    }

    /// The commands of each port that a function ends (SAM-6 7); with a task set for each nexus CLEAR TASK SET ends
    /// those of its own.
    private func ended(by number: UInt8, _ tag: UInt64, _ index: Int) -> [Set<UInt64>] {
        var ended = [world.a.tagsInFlight, world.b.tagsInFlight]
        switch TaskManagementFunction(rawValue: number) {
        case .logicalUnitReset, .targetReset: return ended
        case .abortTask: ended[index].formIntersection([tag])
        case .abortTaskSet, .clearTaskSet, .nexusReset: break
        default: return []
        }
        ended[1 - index] = []
        ended[index].subtract(lost[index])
        return ended
    }

    private func answered(_ index: Int, _ cookie: UInt64, _ response: TaskManagementResponse) {
        // Those with which the target comes to rest have the cookie 0.
        guard cookie != 0 else { return }
        guard let ended = functions[index].removeValue(forKey: cookie) else {
            preconditionFailure("an answer to no function")
        }
        guard response == .functionComplete else { return }
        for (port, tags) in zip([world.a, world.b], ended) {
            precondition(port.tagsInFlight.isDisjoint(with: tags), "an answer before the end of a command")
        }
    }

    private func completeSome() {
        let medium = world.backstore
        guard !medium.pending.isEmpty else { return }
        let index = input.below(medium.pending.count)
        let choice = input.byte()
        let error: Int32 = choice & 7 == 7 ? input.pick([5, 28, 110, 121, 11, 255]) : 0
        medium.honoursCancel = choice & 8 == 0
        Trace.note("the medium ends \(medium.pending[index]) with \(error)")
        let offset = choice & 16 != 0 ? medium.pending[index].offset + UInt64(input.number(UInt16.self)) : nil
        medium.complete(index, error: error, errorOffset: error == 0 ? nil : offset, partial: Int(choice >> 5) * 512)
    }

    private func loseOrEstablish(_ index: Int) {
        let port = port(index)
        // Most of the time there shall be somebody to send.
        if !port.isConnected {
            port.connect()
        } else if input.flag() {
            port.disconnect()
            functions[index] = [:]
            lost[index].formUnion(port.tagsInFlight)
            for tag in port.tagsInFlight {
                let state = port.task(tag)!.state
                precondition(state == .transferring || state == .settling, "a lost nexus's command is \(state)")
            }
        }
    }

    private func passTime() {
        world.shard.now += UInt64(input.byte()) * 10_000_000
        world.shard.expireDeadlines()
        world.shard.releaseThrottled()
        world.shard.retryWaiting()
    }

    private func restOfTheMedium() {
        world.backstore.capacity = .max
        world.shard.retryWaiting()
        world.backstore.completeAll()
    }

    // MARK: What others do to the unit

    private func changeUnit() {
        let unit = world.unit
        let change = input.below(14)
        Trace.note("change \(change)")
        switch change {
        case 0: unit.freeze()
        case 1, 2: unit.thaw()
        case 3: unit.resetByOperator()
        case 4: unit.abortAll()
        case 5: world.target.hardReset()
        case 6: resize()
        case 7: removeMedium()
        case 8: insertMedium()
        case 9: unit.setReadOnly(input.flag())
        case 10: setLimits()
        case 11: unit.setTrace(entries: input.pick([nil, 1, 16]))
        case 12: if input.flag() { unit.clearReservations { _ in } } else { transferReservations() }
        default:
            var changed = configuration
            changed.serial = "SERIAL\(input.below(3))"
            unit.reconfigure(changed)
        }
        _ = unit.tasks(limit: 4)
        _ = unit.oldestTask
        _ = unit.statistics
    }

    private func resize() {
        guard world.backstore.pending.isEmpty else { return }
        world.backstore.geometry.size =
            UInt64(world.backstore.geometry.logical_block_size) * UInt64(input.number(UInt16.self) & 0xfff)
        if isPresent { world.unit.backstoreGeometryChanged() }
    }

    private func removeMedium() {
        isPresent = isPresent && (try? world.unit.removeMedium(force: input.flag(), done: {})) == nil
    }

    private func insertMedium() {
        guard !isPresent, world.backstore.pending.isEmpty else { return }
        isPresent = true
        world.unit.insertMedium(world.backstore.handle)
    }

    private func setLimits() {
        var limits = RateLimits()
        limits.operationsPerSecond = input.pick([0, 1, 1000])
        limits.bytesPerSecond = input.pick([0, 512, 1 << 20])
        world.unit.setLimits(limits)
    }

    private func transferReservations() {
        var bytes = world.unit.exportedReservations
        world.unit.importReservations(bytes) { precondition($0 != .invalid(.foreign), "an export cannot be read") }
        for _ in 0...input.below(3) { bytes[Int(input.number(UInt16.self)) % bytes.count] = input.byte() }
        world.unit.importReservations(bytes) { _ in }
    }

    // MARK: The end

    private func clearACA(_ index: Int) {
        let port = [world.a, world.b][index]
        guard port.isConnected else { return }
        cookie += 1
        functions[index][cookie] = []
        port.manage(.clearACA, cookie: cookie)
    }

    func finish() {
        world.unit.setLimits(RateLimits())
        // Each command may establish an ACA condition for those that are left.
        for round in 0..<100 where round < 3 || ![world.a, world.b].allSatisfy({ $0.tagsInFlight.isEmpty }) {
            world.unit.thaw()
            for index in 0..<2 { clearACA(index) }
            world.shard.now += 100_000_000_000
            world.shard.expireDeadlines()
            world.shard.releaseThrottled()
            world.comeToRest()
        }
        for port in [world.a, world.b] {
            precondition(port.tagsInFlight.isEmpty, "commands never came back")
            port.checkRetiredMemory()
        }
        precondition(world.unit.tasksInFlight == 0, "the task set is not empty at the end")
        precondition(functions.allSatisfy(\.isEmpty), "a task management function was never answered")
        precondition(!world.shard.hasWaiting, "tasks wait that nobody has sent")
        guard let kept = world.store?.kept else { return }
        guard let state = try? UnitState(parsing: kept, name: configuration.name) else {
            preconditionFailure("what the unit has saved is not its state")
        }
        precondition(state.encoded == kept, "what the unit has saved reads as something else")
    }
}
