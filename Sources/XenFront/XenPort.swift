// XenPort: one vhost's target port: takes requests from its ring, hands commands to the core, answers each once.
//
// Owns: the ring's slots, their tasks and staging memory, the map of virtual devices, the nexuses. Called by:
// VhostServer, as a work source of the reactor, and the core, to complete tasks; all on the reactor's thread.
// Must not know: xenstore, what a command means (but for REPORT LUNS, whose list is this port's map).
//
// A request's way: `poll` takes it (one copy) → `examine` checks it → `launch` brings its data in, hands it over →
// `completeTask` notes the answer → `flush` brings the data out, answers, notifies once.
//
//   free ── taken ──► fresh ── data memory ──► executing ── completed ──► answered ── flushed ──► free
//                       │  └── none left ──► waiting ──▲                     ▲
//                       └── refused, or a function that is done at once ─────┘

import CTarget
import CXen
import SCSICore
import Xenbus

/// How a command ended that did not go to the core.
enum ForeignResult {
    /// By its device.
    case status(HostCompletion)
    /// Without one: a host code.
    case host(UInt8)
}

/// A target port on a vscsiif ring.
@safe
final class XenPort {
    private enum Serving { case no, yes, draining }

    private static let slotCount = VSCSIIFLimits.requests

    private let domain: UInt16
    private let wholeTarget: Bool
    private let grants: Grants
    private let staging: StagingPool
    private let batch: GrantBatch
    private let tasks: TaskPool
    private let slots: UnsafeMutablePointer<PortSlot>
    private let tables: UnsafeMutablePointer<vscsiif_segment_t>
    private var map: VirtualDeviceMap

    private var ring: VSCSIIFRing?
    private var channel: EventChannel?
    private var record: InflightRecord?
    private var serving = Serving.no
    /// Slots that hold no request, a bit each.
    private var freeSlots: UInt32
    /// Slots whose answers wait for `flush`, in the order in which they were completed.
    private var answered = SlotQueue()
    /// Slots that wait for staging memory, in the order of the ring.
    private var waiting = SlotQueue()
    /// Requests in the core's hands.
    private(set) var executing = 0
    private(set) var statistics = XenFront.Statistics()
    /// Why the front end is not served any more, if it broke the ring's rules.
    private(set) var fault: String?

    /// - Parameters:
    ///   - domain: The guest.
    ///   - wholeTarget: `feature-host`: a virtual device's channel and target lead to all units of its target.
    init(domain: UInt16, wholeTarget: Bool, grants: Grants, staging: StagingPool, batch: GrantBatch) {
        self.domain = domain
        self.wholeTarget = wholeTarget
        self.grants = grants
        self.staging = staging
        self.batch = batch
        tasks = TaskPool(capacity: Self.slotCount, segmentsPerTask: 1)
        unsafe slots = .allocate(capacity: Self.slotCount)
        for index in 0..<Self.slotCount { unsafe (slots + index).initialize(to: PortSlot()) }
        unsafe tables = .allocate(capacity: Self.slotCount * VSCSIIFLimits.segments)
        unsafe tables.initialize(repeating: vscsiif_segment_t(), count: Self.slotCount * VSCSIIFLimits.segments)
        map = VirtualDeviceMap(wholeTarget: wholeTarget)
        freeSlots = 1 << UInt32(Self.slotCount) - 1
    }

    deinit {
        precondition(executing == 0, "a port went away with a task in flight")
        unsafe slots.deallocate()
        unsafe tables.deallocate()
    }

    // MARK: Control, between turns

    /// Begins to serve a ring. `recovered` requests of the record are taken up first, in their order.
    func connect(
        _ ring: VSCSIIFRing, channel: EventChannel, record: InflightRecord, recovered: [InflightRecord.Recovered]
    ) {
        precondition(serving == .no && executing == 0)
        self.ring = ring
        self.channel = channel
        self.record = record
        fault = nil
        serving = .yes
        var fresh = SlotQueue()
        for request in recovered {
            take(request.index, order: request.requestIndex)
            unsafe record.copyRequest(request.index, into: &slots[request.index].request)
            unsafe slots[request.index].recovered = true
            fresh.append(request.index)
        }
        resumed = fresh
    }

    /// Requests of an earlier process, to be started once the devices are attached.
    private var resumed = SlotQueue()

    /// Starts what an earlier process had in flight. Called once, after the devices were attached again.
    func startRecovered() {
        var commands = SlotQueue()
        while let index = resumed.removeFirst() { admit(index, into: &commands) }
        start(&commands)
        // The earlier process may have died between its last answers and their notification.
        channel!.notify()
    }

    /// Makes a device reachable; `false` if the map is full or the address taken.
    func attach(_ device: VirtualDevice, unit: LUN, nexus: TargetNexus) -> Bool {
        map.add(device, unit: unit, nexus: nexus)
    }

    /// The opposite. If no other device uses its nexus, that is lost: its commands are ended and answered.
    func detach(_ device: VirtualDevice) {
        guard let nexus = map.remove(device) else { return }
        lose(nexus)
    }

    private func lose(_ nexus: TargetNexus) {
        let pointer = unsafe Unmanaged.passUnretained(nexus).toOpaque()
        for index in 0..<Self.slotCount where unsafe slots[index].nexus?.toOpaque() == pointer {
            unsafe slots[index].nexus = nil
        }
        nexus.lose()
    }

    /// Takes no more requests, ends those in flight by losing the nexuses, and answers none of them: the ring is not to
    /// be used any more. Then `isIdle` becomes true.
    func stop() {
        serving = .no
        while let index = waiting.removeFirst() { free(index) }
        while let index = resumed.removeFirst() { free(index) }
        while let index = answered.removeFirst() { free(index) }
        for index in 0..<Self.slotCount where unsafe slots[index].state == .managing { free(index) }
        for nexus in map.removeAll() { lose(nexus) }
    }

    /// Takes no more requests, and answers those that the core has: a daemon that stops in good order. The others stay
    /// in the record and the ring, for its successor. Then `isIdle` becomes true.
    func drain() { serving = .draining }

    /// Whether nothing of the ring is in use by the core.
    var isIdle: Bool { executing == 0 && answered.isEmpty }

    /// Lets go of the ring. The caller unmaps it.
    func disconnect() {
        precondition(isIdle)
        serving = .no
        ring = nil
        channel = nil
        record = nil
        _ = map.removeAll()
        map.forgetLost()
    }

    // MARK: Work source

    /// Takes and starts what is in the ring.
    ///
    /// - Returns: Whether there was anything.
    func poll() -> Bool {
        guard serving == .yes, let waitingRequests = ring!.available() else { return breakRing() }
        let started = retryWaiting()
        guard waitingRequests > 0 else { return started }
        var left = waitingRequests
        while left > 0 {
            var commands = SlotQueue()
            var function: Int?
            // Commands go in batches; a task management function sees all commands before it, and none after it.
            while left > 0, function == nil {
                left -= 1
                let index = takeNext()
                if unsafe (slots + index).isFunction {
                    function = index
                    statistics.taskManagementFunctions &+= 1
                } else {
                    statistics.commands &+= 1
                    commands.append(index)
                }
            }
            start(&commands)
            if let function { manage(function) }
        }
        return true
    }

    /// Brings data to the guest, answers, notifies.
    func flush() {
        guard !answered.isEmpty, serving != .no else { return }
        var queue = answered
        while let index = queue.removeFirst() { collectOutput(index) }
        let failed = batch.run(grants)
        while let index = answered.removeFirst() {
            if failed & (1 << UInt32(index)) != 0 { unsafe (slots + index).fail(VSCSIIFHost.error) }
            record!.answer(index, responseIndex: ring!.responseProducer)
            unsafe ring!.put(&slots[index].response)
            queue.append(index)
        }
        if ring!.publish() {
            channel!.notify()
            statistics.notifications &+= 1
        }
        while let index = queue.removeFirst() {
            record!.free(index)
            free(index)
        }
    }

    /// Asks for a notification.
    ///
    /// - Returns: Whether there is work already.
    func prepareToSleep() -> Bool {
        guard serving == .yes else { return false }
        if let first = waiting.first, unsafe staging.canAllocate(bytes: slots[first].dataLength) { return true }
        return ring!.requestNotification()
    }

    private func breakRing() -> Bool {
        if serving == .yes {
            fault = "the front end's ring index is out of range"
            stop()
        }
        return false
    }

    // MARK: Taking requests

    private func take(_ index: Int, order: UInt32) {
        precondition(freeSlots & (1 << UInt32(index)) != 0)
        freeSlots &= ~(1 << UInt32(index))
        unsafe (slots + index).begin(order: order)
    }

    private func takeNext() -> Int {
        // The ring holds as many requests as there are slots, so one is free.
        let index = freeSlots.trailingZeroBitCount
        let order = ring!.requestConsumer
        take(index, order: order)
        unsafe ring!.take(into: &slots[index].request)
        unsafe record!.take(index, &slots[index].request, requestIndex: order)
        return index
    }

    private func free(_ index: Int) {
        let run = unsafe slots[index].staging
        if run >= 0 { unsafe staging.free(run, bytes: slots[index].dataLength) }
        unsafe slots[index].staging = -1
        unsafe slots[index].state = .free
        unsafe slots[index].nexus = nil
        freeSlots |= 1 << UInt32(index)
    }

    private func admit(_ index: Int, into commands: inout SlotQueue) {
        if unsafe (slots + index).isFunction {
            start(&commands)
            manage(index)
        } else {
            commands.append(index)
        }
    }

    @inline(__always)
    private func table(_ index: Int) -> UnsafeMutablePointer<vscsiif_segment_t> {
        unsafe tables + index &* VSCSIIFLimits.segments
    }

    /// Starts commands that were just taken.
    private func start(_ commands: inout SlotQueue) {
        var queue = commands
        commands = SlotQueue()
        var examined = queue
        while let index = queue.removeFirst() { readSegments(index) }
        let failed = batch.run(grants)
        var ready = SlotQueue()
        while let index = examined.removeFirst() {
            if failed & (1 << UInt32(index)) != 0 { refuse(index, VSCSIIFHost.error) }
            guard unsafe slots[index].state == .fresh, examine(index) else { continue }
            if reserve(index) { ready.append(index) }
        }
        launch(&ready)
    }

    /// Checks the head of a request, and finds its segments: in the request, or by copies of its indirect tables.
    private func readSegments(_ index: Int) {
        let slot = unsafe slots + index
        guard unsafe slot.pointee.request.act == UInt8(VSCSIIF_ACT_SCSI_CDB),
            unsafe slot.pointee.request.cmd_len > 0, unsafe slot.pointee.request.cmd_len <= VSCSIIF_MAX_COMMAND_SIZE,
            unsafe slot.pointee.request.sc_data_direction <= 3
        else { return refuse(index, VSCSIIFHost.error) }
        let indirect = unsafe slot.pointee.request.nr_segments & UInt8(VSCSIIF_SG_GRANT) != 0
        let count = unsafe Int(slot.pointee.request.nr_segments & ~UInt8(VSCSIIF_SG_GRANT))
        guard count <= Int(VSCSIIF_SG_TABLESIZE) else { return refuse(index, VSCSIIFHost.error) }
        let direct = unsafe slot.segments
        if indirect {
            unsafe readIndirect(index, direct, count)
        } else {
            unsafe table(index).update(from: direct, count: count)
            unsafe slot.pointee.segmentCount = count
        }
    }

    /// Collects the copies of indirect tables. Together they are one array, however it is cut into pieces.
    private func readIndirect(_ index: Int, _ direct: UnsafePointer<vscsiif_segment_t>, _ count: Int) {
        let size = MemoryLayout<vscsiif_segment_t>.stride
        var bytes = 0
        for piece in 0..<count {
            let segment = unsafe direct[piece]
            guard Int(segment.offset) + Int(segment.length) <= VSCSIIFLimits.pageBytes else {
                return refuse(index, VSCSIIFHost.error)
            }
            bytes += Int(segment.length)
        }
        guard bytes % size == 0, bytes / size <= VSCSIIFLimits.segments else {
            return refuse(index, VSCSIIFHost.error)
        }
        var local = UnsafeMutableRawPointer(unsafe table(index))
        for piece in 0..<count where unsafe direct[piece].length > 0 {
            let segment = unsafe direct[piece]
            unsafe batch.add(
                segment, length: segment.length, toGuest: false, domain: domain, local: local, owner: index)
            unsafe local += Int(segment.length)
        }
        unsafe slots[index].segmentCount = bytes / size
    }

    /// Checks the segments and finds the device.
    ///
    /// - Returns: Whether the command goes on; if not, it is answered.
    private func examine(_ index: Int) -> Bool {
        let slot = unsafe slots + index
        let table = unsafe table(index)
        var length = 0
        for piece in 0..<(unsafe slot.pointee.segmentCount) {
            let segment = unsafe table[piece]
            guard Int(segment.offset) + Int(segment.length) <= VSCSIIFLimits.pageBytes else {
                refuse(index, VSCSIIFHost.error)
                return false
            }
            length += Int(segment.length)
        }
        // DMA_BIDIRECTIONAL has one list of segments for two buffers: nothing that could be meant by it.
        switch unsafe slot.pointee.request.sc_data_direction {
        case 1: unsafe slot.pointee.toDevice = length > 0
        case 2: unsafe slot.pointee.fromDevice = length > 0
        case 0 where length > 0:
            refuse(index, VSCSIIFHost.error)
            return false
        default: length = 0
        }
        unsafe slot.pointee.dataLength = length
        guard unsafe find(slot) else {
            refuse(index, unsafe absence(slot))
            return false
        }
        return true
    }

    private func find(_ slot: UnsafeMutablePointer<PortSlot>) -> Bool {
        guard let entry = unsafe map.find(channel: slot.channel, target: slot.target, lun: slot.lun) else {
            return false
        }
        return unsafe entry.unit(slot.lun) != nil
    }

    /// Nothing at all at this channel and target, or only not at this number.
    private func absence(_ slot: UnsafeMutablePointer<PortSlot>) -> UInt8 {
        unsafe map.hasTarget(channel: slot.channel, target: slot.target)
            ? VSCSIIFHost.noConnect : VSCSIIFHost.badTarget
    }

    /// Takes staging memory for a command's data; `false` if it has to wait.
    private func reserve(_ index: Int) -> Bool {
        let length = unsafe slots[index].dataLength
        if length == 0 { return true }
        // Nobody overtakes: a large command would never find memory behind many small ones.
        if waiting.isEmpty {
            let run = staging.allocate(bytes: length)
            if run >= 0 {
                unsafe slots[index].staging = run
                return true
            }
        }
        unsafe slots[index].state = .waiting
        statistics.waits &+= 1
        waiting.append(index)
        return false
    }

    private func retryWaiting() -> Bool {
        var ready = SlotQueue()
        while let index = waiting.first {
            let run = unsafe staging.allocate(bytes: slots[index].dataLength)
            guard run >= 0 else { break }
            _ = waiting.removeFirst()
            unsafe slots[index].staging = run
            unsafe slots[index].state = .fresh
            ready.append(index)
        }
        let any = !ready.isEmpty
        launch(&ready)
        return any
    }

    /// Whether requests wait for staging memory.
    var isShortOfMemory: Bool { !waiting.isEmpty }

    /// Answers the requests that have waited for staging memory as long as their time-out allows: the core, which
    /// watches over a command's time, has never seen them.
    ///
    /// - Parameter now: Nanoseconds.
    /// - Returns: When to look again.
    func expireWaiting(now: UInt64) -> UInt64? {
        var earliest: UInt64?
        var queue = waiting
        while let index = queue.removeFirst() {
            let slot = unsafe slots + index
            if unsafe slot.pointee.deadline == 0 {
                unsafe slot.pointee.deadline = now + UInt64(slot.timeoutSeconds) * 1_000_000_000
            }
            let deadline = unsafe slot.pointee.deadline
            if deadline <= now {
                waiting.remove(index)
                refuse(index, VSCSIIFHost.busBusy)
            } else {
                earliest = min(earliest ?? deadline, deadline)
            }
        }
        return earliest
    }

    /// Brings the commands' data in and hands them to the core.
    private func launch(_ ready: inout SlotQueue) {
        var queue = ready
        while let index = queue.removeFirst() {
            if unsafe slots[index].toDevice { unsafe collect(index, bytes: slots[index].dataLength, toGuest: false) }
        }
        let failed = batch.run(grants)
        while let index = ready.removeFirst() {
            if failed & (1 << UInt32(index)) != 0 {
                refuse(index, VSCSIIFHost.error)
            } else {
                handOver(index)
            }
        }
    }

    /// Adds the copies of a command's data to the batch.
    private func collect(_ index: Int, bytes: Int, toGuest: Bool) {
        let table = unsafe table(index)
        var local = unsafe staging.memory(slots[index].staging)
        var left = bytes
        var piece = 0
        while left > 0 {
            let segment = unsafe table[piece]
            let length = min(left, Int(segment.length))
            if length > 0 {
                unsafe batch.add(
                    segment, length: UInt16(length), toGuest: toGuest, domain: domain, local: local, owner: index)
            }
            unsafe local += length
            left -= length
            piece += 1
        }
    }

    private func collectOutput(_ index: Int) {
        let bytes = unsafe slots[index].copyBack
        if bytes > 0 { collect(index, bytes: bytes, toGuest: true) }
    }

    private func handOver(_ index: Int) {
        let slot = unsafe slots + index
        guard let entry = unsafe map.find(channel: slot.channel, target: slot.target, lun: slot.lun),
            let unit = unsafe entry.unit(slot.lun)
        else { return refuse(index, unsafe absence(slot)) }
        if unsafe slot.pointee.recovered && !entry.nexus._withUnsafeGuaranteedRef({ $0.repeatsSafely }) {
            return refuse(index, VSCSIIFHost.reset)
        }
        let task = tasks[index]
        fillCommand(task, index, unit: unit)
        unsafe slot.pointee.reportsMap = unsafe !wholeTarget && slot.cdb[0] == 0xa0 && slot.pointee.fromDevice
        unsafe slot.pointee.nexus = entry.nexus
        unsafe slot.pointee.state = .executing
        executing += 1
        unsafe entry.nexus._withUnsafeGuaranteedRef { $0.receive(task) }
    }

    private func fillCommand(_ task: TaskHandle, _ index: Int, unit: UInt64) {
        let slot = unsafe slots + index
        let segments = unsafe tasks.segments(of: task)
        let length = unsafe slot.pointee.dataLength
        var command = unsafe scsi_command()
        unsafe command.lun = lunBytes(unit)
        unsafe command.tag = slot.tag(index)
        unsafe command.cookie = UInt64(index)
        let cdbLength = unsafe Int(slot.pointee.request.cmd_len)
        unsafe withUnsafeMutableBytes(of: &command.cdb) { cdb in
            unsafe cdb.copyMemory(from: UnsafeRawBufferPointer(start: slot.cdb, count: cdbLength))
            // Linux probes a unit that it does not know with the unit's number in the INQUIRY command, as SCSI-2 had
            // it: in bits that are reserved today.
            if unsafe cdb[0] == 0x12, cdbLength > 1, unsafe cdb[1] >> 5 == UInt8(slot.lun & 7) {
                unsafe cdb[1] &= 0x1f
            }
        }
        unsafe command.cdb_length = UInt8(cdbLength)
        unsafe command.attribute = UInt8(SCSI_TASK_ATTRIBUTE_SIMPLE)
        unsafe command.flags = slot.pointee.recovered ? UInt8(SCSI_COMMAND_REPEATED) : 0
        unsafe command.timeout_milliseconds = slot.timeoutSeconds &* 1000
        if length > 0 {
            unsafe segments.pointee.iov_base = staging.memory(slot.pointee.staging)
            unsafe segments.pointee.iov_len = length
        }
        if unsafe slot.pointee.toDevice {
            unsafe command.data_out = unsafe segments
            unsafe command.data_out_count = 1
            unsafe command.data_out_length = UInt64(length)
        } else if unsafe slot.pointee.fromDevice {
            unsafe command.data_in = unsafe segments
            unsafe command.data_in_count = 1
            unsafe command.data_in_length = UInt64(length)
        }
        unsafe task.command = command
    }

    // MARK: Answers

    /// Answers without a status. Nothing was transferred.
    private func refuse(_ index: Int, _ host: UInt8) {
        unsafe (slots + index).fail(host)
        enqueueAnswer(index)
    }

    private func enqueueAnswer(_ index: Int) {
        unsafe slots[index].state = .answered
        answered.append(index)
    }

    /// The core has completed a task.
    func completeTask(_ task: TaskHandle) {
        let index = Int(unsafe task.command.cookie)
        let slot = unsafe slots + index
        precondition(unsafe slot.pointee.state == .executing, "a task was completed twice")
        executing -= 1
        if serving == .no { return free(index) }
        let response = task.response
        let completed = response.service_response == UInt8(SCSI_SERVICE_COMMAND_COMPLETE)
        if unsafe !completed && slot.pointee.nexus == nil { return refuse(index, VSCSIIFHost.transportDisrupted) }
        switch Int(response.service_response) {
        case Int(SCSI_SERVICE_COMMAND_COMPLETE): answerStatus(index, task, response)
        case Int(SCSI_SERVICE_ABORTED):
            // Who did not ask for it has waited until the deadline.
            let asked = unsafe slot.pointee.abortRequested
            unsafe slot.fail(asked ? VSCSIIFHost.abort : VSCSIIFHost.timeOut)
        case Int(SCSI_SERVICE_RESET): unsafe slot.fail(VSCSIIFHost.reset)
        case Int(SCSI_SERVICE_TARGET_FAILURE): unsafe slot.fail(VSCSIIFHost.softError)
        default: unsafe slot.fail(VSCSIIFHost.error)
        }
        enqueueAnswer(index)
    }

    private func answerStatus(_ index: Int, _ task: TaskHandle, _ response: scsi_response) {
        let slot = unsafe slots + index
        let residual = unsafe slot.pointee.fromDevice ? response.data_in_residual : response.data_out_residual
        answerStatus(index, response.status, residual: residual)
        if response.status == SCSIStatus.checkCondition.rawValue {
            unsafe slot.pointee.response.sense_len = UInt8(task.copySense(into: slot.sense))
        }
    }

    private func answerStatus(_ index: Int, _ status: UInt8, residual: UInt64) {
        let slot = unsafe slots + index
        let length = unsafe slot.pointee.dataLength
        let good = status == SCSIStatus.good.rawValue || status == SCSIStatus.conditionMet.rawValue
        var transferred = length - Int(min(residual, UInt64(length)))
        // The staging memory holds what earlier commands left there: only what this one has filled goes to the guest.
        if unsafe slot.pointee.fromDevice && !good { transferred = 0 }
        if unsafe slot.pointee.reportsMap && good { transferred = writeMap(index) }
        unsafe slot.pointee.copyBack = unsafe slot.pointee.fromDevice ? transferred : 0
        unsafe slot.respond(result: Int32(status), residual: length - transferred)
    }

    // MARK: Answers of devices of this host

    /// The CDB of a command in a nexus's hands.
    func cdb(of index: Int) -> UnsafePointer<UInt8> { unsafe (slots + index).cdb }

    /// Where sense data of a command goes.
    func senseBuffer(of index: Int) -> UnsafeMutableRawBufferPointer { unsafe (slots + index).sense }

    /// A device of this host has ended a command.
    func completeForeign(_ index: Int, _ result: ForeignResult) {
        let slot = unsafe slots + index
        precondition(unsafe slot.pointee.state == .executing, "a command was completed twice")
        executing -= 1
        if serving == .no { return free(index) }
        if unsafe slot.pointee.nexus == nil { return refuse(index, VSCSIIFHost.transportDisrupted) }
        switch result {
        case .host(let code): unsafe slot.fail(code)
        case .status(let completion) where completion.host != 0:
            unsafe slot.fail(VSCSIIFHost.known(completion.host))
        case .status(let completion):
            answerStatus(index, completion.status, residual: UInt64(max(0, completion.residual)))
            unsafe slot.pointee.response.sense_len = UInt8(min(completion.senseLength, slot.sense.count))
        }
        enqueueAnswer(index)
    }

    /// A command that no device has seen ends with CHECK CONDITION.
    func refuseForeign(_ index: Int, sense: [UInt8]) {
        unsafe (slots + index).sense.copyBytes(from: sense)
        completeForeign(
            index,
            .status(
                HostCompletion(
                    slot: index, status: SCSIStatus.checkCondition.rawValue, host: 0,
                    residual: unsafe slots[index].dataLength, senseLength: sense.count)))
    }

    /// Replaces the parameter data of REPORT LUNS, which the core has found in order, by the map's units of the
    /// addressed target.
    ///
    /// - Returns: Bytes of parameter data in the staging memory.
    private func writeMap(_ index: Int) -> Int {
        let slot = unsafe slots + index
        let cdb = unsafe slot.cdb
        let allocation = (6..<10).reduce(0) { unsafe $0 << 8 | Int(cdb[$1]) }
        let memory = unsafe staging.memory(slot.pointee.staging)
        let room = unsafe min(allocation, slot.pointee.dataLength)
        // SELECT REPORT: well-known, administrative and subsidiary units are none of ours.
        let none = unsafe [0x01, 0x10, 0x12].contains(cdb[2])
        return unsafe map.writeReport(
            channel: slot.channel, target: slot.target, empty: none,
            into: UnsafeMutableRawBufferPointer(start: memory, count: room))
    }

    // MARK: Task management

    private func manage(_ index: Int) {
        unsafe slots[index].state = .managing
        unsafe slots[index].functionsPending = 1
        switch unsafe Int32(slots[index].request.act) {
        case VSCSIIF_ACT_SCSI_ABORT: abort(index)
        default: reset(index)
        }
        functionPartDone(index, succeeded: true)
    }

    private func abort(_ index: Int) {
        let reference = unsafe slots[index].request.ref_rqid
        let address = unsafe (slots + index).address
        let order = unsafe slots[index].order
        for victim in 0..<Self.slotCount {
            let slot = unsafe slots + victim
            // The front end uses a number again at once: only requests before this one can be meant.
            guard unsafe slot.pointee.state == .executing || slot.pointee.state == .waiting,
                unsafe slot.pointee.request.rqid == reference, unsafe slot.address == address,
                unsafe Int32(bitPattern: order &- slot.pointee.order) > 0
            else { continue }
            if unsafe slot.pointee.state == .waiting {
                waiting.remove(victim)
                refuse(victim, VSCSIIFHost.abort)
            } else if let nexus = unsafe slot.pointee.nexus {
                unsafe slot.pointee.abortRequested = true
                let task = tasks[victim]
                unsafe send(
                    UInt8(SCSI_ABORT_TASK), unit: lunField(task.command.lun), tag: task.command.tag, to: nexus,
                    for: index)
            } else {
                // Its device was removed; it ends by itself, but this function cannot tell when.
                unsafe slots[index].functionFailed = true
            }
        }
        // A request that is not there any more has been answered: that is what was asked for.
    }

    /// Resets the virtual target that a request names: all of its units.
    private func reset(_ index: Int) {
        let slot = unsafe slots + index
        guard unsafe map.hasTarget(channel: slot.channel, target: slot.target) else {
            unsafe slots[index].functionFailed = true
            return
        }
        for victim in 0..<Self.slotCount where unsafe slots[victim].state == .waiting {
            guard unsafe (slots + victim).channel == slot.channel, unsafe (slots + victim).target == slot.target
            else { continue }
            waiting.remove(victim)
            refuse(victim, VSCSIIFHost.reset)
        }
        let function = UInt8(wholeTarget ? SCSI_TARGET_RESET : SCSI_LOGICAL_UNIT_RESET)
        for entry in unsafe map.entries(channel: slot.channel, target: slot.target) {
            guard let unit = unsafe entry.unit(slot.lun) else { continue }
            unsafe send(function, unit: unit, tag: 0, to: entry.nexus, for: index)
        }
    }

    private func send(_ function: UInt8, unit: UInt64, tag: UInt64, to nexus: Unmanaged<TargetNexus>, for index: Int) {
        var request = scsi_task_management_request()
        request.struct_size = UInt32(MemoryLayout<scsi_task_management_request>.size)
        request.function = function
        request.lun = lunBytes(unit)
        request.tag = tag
        request.cookie = unsafe (slots + index).tag(index)
        unsafe slots[index].functionsPending += 1
        unsafe nexus._withUnsafeGuaranteedRef { $0.receive(request) }
    }

    /// The core has answered a task management function.
    func completeManagement(cookie: UInt64, response: UInt8) {
        let index = Int(cookie & 0xff)
        // A function of a ring that is gone.
        guard index < Self.slotCount, unsafe slots[index].state == .managing,
            unsafe (slots + index).tag(index) == cookie
        else { return }
        let done = response == UInt8(SCSI_FUNCTION_COMPLETE) || response == UInt8(SCSI_FUNCTION_SUCCEEDED)
        functionPartDone(index, succeeded: done)
    }

    private func functionPartDone(_ index: Int, succeeded: Bool) {
        if !succeeded { unsafe slots[index].functionFailed = true }
        unsafe slots[index].functionsPending -= 1
        guard unsafe slots[index].functionsPending == 0 else { return }
        let failed = unsafe slots[index].functionFailed
        let result = failed ? XEN_VSCSIIF_RSLT_RESET_FAILED : XEN_VSCSIIF_RSLT_RESET_SUCCESS
        unsafe (slots + index).respond(result: result, residual: 0)
        enqueueAnswer(index)
    }
}

// MARK: The port seam

extension XenPort {
    /// This port as the core sees it. The caller keeps the port alive until its nexuses are lost and it is idle.
    var handle: TargetPortHandle {
        unsafe TargetPortHandle(
            operations: Self.operations, context: Unmanaged.passUnretained(self).toOpaque())
    }

    nonisolated(unsafe) private static let operations: UnsafePointer<scsi_target_port_operations> = {
        let operations = UnsafeMutablePointer<scsi_target_port_operations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: scsi_target_port_operations(
                struct_size: UInt32(MemoryLayout<scsi_target_port_operations>.size),
                abi_version: SCSI_TARGET_ABI_VERSION,
                complete_task: { port, task in
                    unsafe Unmanaged<XenPort>.fromOpaque(port!)._withUnsafeGuaranteedRef {
                        unsafe $0.completeTask(TaskHandle(head: task!))
                    }
                },
                complete_task_management: { port, cookie, response, _ in
                    unsafe Unmanaged<XenPort>.fromOpaque(port!)._withUnsafeGuaranteedRef {
                        $0.completeManagement(cookie: cookie, response: response)
                    }
                },
                // vscsiif has no events: a guest learns what has changed by unit attentions, and of devices by
                // xenstore.
                report_event: { _, _ in }))
        return unsafe UnsafePointer(operations)
    }()
}
