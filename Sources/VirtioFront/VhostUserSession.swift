// VhostUserSession: the vhost-user protocol with one connected front-end, as a state machine over its messages.
//
// Owns: the connection, the memory table, what the front-end has said about each ring, the device. Called by:
// VhostUserSCSIServer. Must not know: SCSI, virtio-scsi structures.
//
// A ring comes into service when its size, addresses and kick descriptor are known and it is enabled, and stays there
// until GET_VRING_BASE; meanwhile it may be disabled and enabled again, and its memory may move. Front-ends say these
// in different orders (SPDK's enables rings before it has described them), so after each message the session compares
// what should run with what does.

import CLinux
import Glibc
import Reactor

/// What the front-end has said about one ring.
private struct RingState {
    var size: Int?
    var base: UInt32?
    var addresses: (descriptors: UInt64, used: UInt64, available: UInt64)?
    /// Where the used ring is in the guest's memory, if the front-end wants writes to it noted.
    var usedLogAddress: UInt64?
    var isEnabled = false
    var isStarted = false
    var kick: Int32 = -1
    var call: Int32 = -1
    var error: Int32 = -1
    var kickToken: DescriptorToken?
    /// It could not come into service as it was described; tried again when the description changes.
    var isBroken = false
}

/// The context of a ring's kick handler.
@safe
private struct KickContext {
    unowned(unsafe) let session: VhostUserSession
    let index: Int
}

/// What goes wrong in a session: said to the front-end by the acknowledgement of its message, and to the operator.
private enum SessionFault: Error {
    /// The message was refused; the connection lives.
    case refused(String)
}

@safe
final class VhostUserSession {
    private let connection: VhostUserConnection
    private let reactor: Reactor
    private let queueCapacity: Int
    private let report: (String) -> Void
    let device: VirtioSCSIDevice
    private var rings: [RingState]
    private var features: UInt64 = 0
    private var protocolFeatures: UInt64 = 0
    private var socketToken: DescriptorToken?
    /// What waits for requests in flight to end; no message is read until it is answered.
    private enum Awaited {
        /// GET_VRING_BASE for the ring's last requests.
        case base(index: Int)
        /// RESET_DEVICE, or SET_STATUS 0, for those of all rings.
        case reset(VhostUserMessage)
    }
    private var awaited: Awaited?
    private var inflight: InflightRegion?
    private var log: DirtyLog?
    private var status: UInt64 = 0
    private var space: VirtioSCSIConfigurationSpace
    private let options: VhostUserSCSIServer.Options
    /// Where requests of the back-end go, -1 for nowhere.
    private var backendChannel: Int32 = -1
    private(set) var isConnected = true
    /// The server stops: the connection ends when nothing is in flight.
    private var isFinishing = false
    private let kickContexts: UnsafeMutablePointer<KickContext>
    /// Messages handled in one turn: a front-end that sends without end must not keep the reactor.
    private static let messagesPerTurn = 32
    /// Called once, when the connection has ended.
    var onEnd: ((String?) -> Void)?

    init(
        socket: Int32, reactor: Reactor, queueCapacity: Int, device: VirtioSCSIDevice,
        options: VhostUserSCSIServer.Options, report: @escaping (String) -> Void
    ) {
        connection = VhostUserConnection(socket: socket)
        self.reactor = reactor
        self.queueCapacity = queueCapacity
        self.device = device
        self.options = options
        self.report = report
        space = VirtioSCSIConfigurationSpace(
            requestQueues: queueCapacity - VirtioSCSIDevice.firstRequestQueue,
            segments: VhostUserSCSIServer.maximumSegments)
        rings = Array(repeating: RingState(), count: queueCapacity)
        unsafe kickContexts = .allocate(capacity: queueCapacity)
        for index in 0..<queueCapacity {
            unsafe (kickContexts + index).initialize(to: KickContext(session: self, index: index))
        }
    }

    deinit { unsafe kickContexts.deallocate() }

    /// Begins to serve the connection.
    func start() throws(ReactorError) {
        device.onDrained = { [unowned self] in drained() }
        socketToken = unsafe try reactor.watch(
            connection.socket, events: EPOLLIN.rawValue,
            { context, events in
                unsafe Unmanaged<VhostUserSession>.fromOpaque(context).takeUnretainedValue().readable(events)
            }, Unmanaged.passUnretained(self).toOpaque())
    }

    /// Ends the connection after all that is in flight has been answered.
    func finish() {
        isFinishing = true
        device.pause()
        // The end comes with the device's flush in this turn or a later one.
    }

    /// Ends the connection: rings stop, nexuses are lost; requests in flight end without a word to the guest.
    func end(_ reason: String?) {
        guard isConnected else { return }
        isConnected = false
        awaited = nil
        if let socketToken { reactor.unwatch(socketToken) }
        socketToken = nil
        // First of all: other threads may use the descriptors until they are told.
        device.disconnect()
        for index in rings.indices { forget(index) }
        if backendChannel >= 0 { close(backendChannel) }
        backendChannel = -1
        // Now, and not when the last request has ended: the front-end shall see it.
        connection.end()
        onEnd?(reason)
    }

    private func forget(_ index: Int) {
        unwatchKick(index)
        for descriptor in [rings[index].kick, rings[index].call, rings[index].error] where descriptor >= 0 {
            close(descriptor)
        }
        rings[index] = RingState()
    }

    // MARK: Messages

    private func readable(_ events: UInt32) {
        if awaited != nil {
            // Nothing is read meanwhile, but a front-end that is gone is not waited for.
            if events & (EPOLLHUP.rawValue | EPOLLERR.rawValue) != 0 { end(nil) }
            return
        }
        do {
            for _ in 0..<Self.messagesPerTurn {
                guard isConnected, awaited == nil, let message = try connection.nextMessage() else { return }
                try handle(message)
            }
        } catch {
            switch error {
            case .closed: end(nil)
            case .malformed(let what): end("The front-end sent \(what).")
            }
        }
    }

    private func handle(_ message: VhostUserMessage) throws(ConnectionEnd) {
        var message = message
        defer { message.closeDescriptors() }
        guard let request = message.request else {
            report("The front-end sent the message \(message.identifier), which is not offered.")
            return try acknowledge(message, failed: true)
        }
        guard request.payloadSizes.contains(message.payload.count) else {
            throw .malformed("\(request) with a payload of \(message.payload.count) bytes")
        }
        if let feature = request.protocolFeature, protocolFeatures & feature == 0 {
            report("\(request) was refused: its protocol feature was not negotiated.")
            return try acknowledge(message, failed: true)
        }
        do {
            if let reply = try perform(request, &message) {
                if request == .getInflightDescriptor { return try sendInflight(message, reply) }
                return try connection.send(VhostUserMessage.reply(to: message.identifier, payload: reply))
            }
            if awaited != nil { return }  // it comes later
            reconcile()
            try acknowledge(message, failed: false)
        } catch let fault as SessionFault {
            guard case .refused(let why) = fault else { return }
            report("\(request) was refused: \(why).")
            if request.hasReply { throw .malformed("\(request) that cannot be answered: \(why)") }
            try acknowledge(message, failed: true)
        } catch let end as ConnectionEnd {
            throw end
        } catch {
            preconditionFailure("no other error is thrown here")
        }
    }

    /// REPLY_ACK: zero for success.
    private func acknowledge(_ message: VhostUserMessage, failed: Bool) throws(ConnectionEnd) {
        guard message.needsReply, protocolFeatures & VhostUserProtocolFeature.replyAcknowledge != 0 else {
            // A front-end that does not ask would go on with a ring or a memory map that is not there.
            if failed { throw .malformed("a message that was refused, without asking for an acknowledgement") }
            return
        }
        try connection.send(
            VhostUserMessage.reply(to: message.identifier, payload: VhostUserMessage.bytes(UInt64(failed ? 1 : 0))))
    }

    /// Carries a message out.
    ///
    /// - Returns: The payload of its reply, if it has one and it is known now.
    private func perform(_ request: VhostUserRequest, _ message: inout VhostUserMessage) throws -> [UInt8]? {
        switch request {
        case .getFeatures: return VhostUserMessage.bytes(options.features)
        case .getProtocolFeatures: return VhostUserMessage.bytes(options.protocolFeatures)
        case .getQueueNumber: return VhostUserMessage.bytes(UInt64(queueCapacity))
        case .getMaximumMemorySlots: return VhostUserMessage.bytes(UInt64(GuestMemory.slots))
        case .setFeatures: try setFeatures(message.uint64(0))
        case .setProtocolFeatures: try setProtocolFeatures(message.uint64(0))
        case .setOwner: beginAnew()
        case .resetOwner: for index in rings.indices { rings[index].isEnabled = false }
        case .setMemoryTable: try setMemoryTable(&message)
        case .addMemoryRegion: try addMemoryRegion(&message)
        case .removeMemoryRegion: try removeMemoryRegion(message)
        case .setVringNumber: try setNumber(message)
        case .setVringAddress: try setAddress(message)
        case .setVringBase: rings[try ring(message)].base = message.uint32(4)
        case .getVringBase: return try getBase(message)
        case .setVringKick: try setKick(&message)
        case .setVringCall: try setCall(&message)
        case .setVringError: replace(\.error, try ring(message, byte: true), try eventDescriptor(&message))
        case .setVringEnable: rings[try ring(message)].isEnabled = message.uint32(4) & 1 != 0
        case .setLogBase: return try setLogBase(&message)
        case .setLogDescriptor: break  // nobody is told: the front-end reads the bitmap when it likes
        case .setBackendRequestDescriptor: try setBackendChannel(&message)
        case .getConfiguration: return getConfiguration(message)
        case .setConfiguration: try setConfiguration(message)
        case .getInflightDescriptor: return try getInflight(message)
        case .setInflightDescriptor: try setInflight(&message)
        case .vringKick: try kickInBand(message)
        case .resetDevice: beginReset(message)
        case .setStatus:
            status = message.uint64(0) & 0xff
            // QEMU writes 0 whenever it stops the device, for a pause as well, and has RESET_DEVICE for what the driver
            // means by it. Without that a 0 is all there is.
            let hasReset = protocolFeatures & VhostUserProtocolFeature.resetDevice != 0
            if status == 0, !hasReset { beginReset(message) }
        case .getStatus: return VhostUserMessage.bytes(status)
        }
        return nil
    }

    /// SET_OWNER begins a session, also one on a connection that was used before: QEMU keeps its socket when a device
    /// is unplugged and another one is plugged, and adds all regions of memory again.
    private func beginAnew() {
        guard isOutOfService else { return }
        device.install([])
        device.dropRetired()
        inflight = nil
        findWithheld()
        log = nil
        applyLog()
        for index in rings.indices { forget(index) }
    }

    // MARK: Configuration space, status, reset

    private func getConfiguration(_ message: VhostUserMessage) -> [UInt8] {
        let (offset, size) = (Int(message.uint32(0)), Int(message.uint32(4)))
        // A reply without contents says that there is an error.
        guard message.payload.count == 12 + size, offset <= VirtioSCSIConfigurationSpace.size,
            size <= VirtioSCSIConfigurationSpace.capacity
        else { return [] }
        let bytes = space.bytes + [UInt8](repeating: 0, count: VirtioSCSIConfigurationSpace.capacity)
        return Array(message.payload[..<12]) + bytes[offset..<offset + size]
    }

    private func setConfiguration(_ message: VhostUserMessage) throws {
        let (offset, size, flags) = (Int(message.uint32(0)), Int(message.uint32(4)), message.uint32(8))
        guard message.payload.count == 12 + size, flags <= 1 else {
            throw SessionFault.refused("\(size) bytes of configuration in \(message.payload.count) with flags \(flags)")
        }
        let requestQueues = rings.indices.dropFirst(VirtioSCSIDevice.firstRequestQueue)
        guard !requestQueues.contains(where: device.isInService) else {
            throw SessionFault.refused("sizes cannot change while request queues are in service")
        }
        guard space.write(Array(message.payload[12...]), at: offset) else {
            throw SessionFault.refused(
                "it writes \(size) bytes at \(offset); only sense_size (to 252) and cdb_size (6 to 260) are writable")
        }
        device.setSizes(space.sizes)
    }

    /// Stops all rings, and resets the device when nothing is in flight.
    private func beginReset(_ message: VhostUserMessage) {
        for index in rings.indices {
            rings[index].isStarted = false
            rings[index].isEnabled = false
            unwatchKick(index)
            _ = device.stop(index)
            rings[index].base = nil
        }
        var reply = message
        reply.descriptors = []
        awaited = .reset(reply)
        device.awaitDrain()
        if device.isIdle { return completeReset() }
        if let socketToken { reactor.change(socketToken, events: 0) }
    }

    private func completeReset() {
        awaited = nil
        status = 0
        inflight?.finish()
        inflight = nil
        findWithheld()
        space.sizes = VirtioSCSISizes()
        device.reset()
    }

    // MARK: The back-end's channel

    private func setBackendChannel(_ message: inout VhostUserMessage) throws {
        guard let channel = message.takeDescriptor() else { throw SessionFault.refused("it needs a file descriptor") }
        if backendChannel >= 0 { close(backendChannel) }
        backendChannel = channel
        device.onNotification = { [unowned self] in tellInBand(.vringCall, $0) }
    }

    /// A front-end that does not read its channel loses what is said there, as it would lose a notification that it
    /// does not look at.
    private func tellInBand(_ request: BackendRequest, _ index: Int) {
        guard backendChannel >= 0, protocolFeatures & VhostUserProtocolFeature.inbandNotifications != 0 else { return }
        let payload = VhostUserMessage.bytes(UInt32(index)) + VhostUserMessage.bytes(UInt32(0))
        let bytes = VhostUserMessage.backendRequest(request, payload: payload)
        _ = unsafe clinux_send_now(backendChannel, bytes, bytes.count)
    }

    private func kickInBand(_ message: VhostUserMessage) throws {
        let index = try ring(message)
        rings[index].isStarted = true
        rings[index].isBroken = false
        if index == VirtioSCSIDevice.eventQueue { device.deliverEvents() }
    }

    // MARK: What is in flight

    private func getInflight(_ message: VhostUserMessage) throws -> [UInt8] {
        let queues = Int(message.uint32(16) & 0xffff)
        let size = Int(message.uint32(16) >> 16)
        guard queues > 0, queues <= queueCapacity, size > 0, size <= VhostUserSCSIServer.maximumQueueSize else {
            throw SessionFault.refused("notes for \(queues) rings of \(size) descriptors")
        }
        let bytes = UInt64(InflightRegion.size(queues: queues, queueSize: size))
        return VhostUserMessage.bytes(bytes) + VhostUserMessage.bytes(UInt64(0)) + Array(message.payload[16...])
    }

    private func sendInflight(_ message: VhostUserMessage, _ reply: [UInt8]) throws(ConnectionEnd) {
        let made = InflightRegion.make(
            queues: Int(message.uint32(16) & 0xffff), queueSize: Int(message.uint32(16) >> 16))
        guard let descriptor = made else { throw .malformed("GET_INFLIGHT_FD when no memory could be had") }
        defer { close(descriptor) }
        try connection.send(
            VhostUserMessage.reply(to: message.identifier, payload: reply), descriptor: descriptor)
    }

    private func setInflight(_ message: inout VhostUserMessage) throws {
        guard isOutOfService else {
            throw SessionFault.refused("rings are in service")
        }
        guard let descriptor = message.takeDescriptor() else {
            throw SessionFault.refused("it needs a file descriptor")
        }
        defer { close(descriptor) }
        let queues = Int(message.uint32(16) & 0xffff)
        let size = Int(message.uint32(16) >> 16)
        guard queues > 0, size > 0, size <= VhostUserSCSIServer.maximumQueueSize,
            let region = InflightRegion(
                descriptor: descriptor, size: message.uint64(0), offset: message.uint64(8), queues: queues,
                queueSize: size)
        else { throw SessionFault.refused("no notes for \(queues) rings of \(size) descriptors fit there") }
        inflight = region
        findWithheld()
    }

    /// Whether commands of a request queue are noted in flight.
    private func hasNotes(_ index: Int) -> Bool {
        guard index >= VirtioSCSIDevice.firstRequestQueue, let inflight else { return false }
        let isPacked = features & VirtioFeature.ringPacked != 0
        return inflight.queue(index, size: inflight.queueSize, isPacked: isPacked)?.hasNotes ?? false
    }

    /// All queues are out of service: in which of them are commands in flight.
    private func findWithheld() { device.withheld = Set(rings.indices.filter(hasNotes)) }

    // MARK: Dirty logging

    private func setLogBase(_ message: inout VhostUserMessage) throws -> [UInt8] {
        guard let descriptor = message.takeDescriptor() else {
            throw SessionFault.refused("it needs a file descriptor")
        }
        defer { close(descriptor) }
        guard let new = DirtyLog(descriptor: descriptor, size: message.uint64(0), offset: message.uint64(8)) else {
            throw SessionFault.refused("the log cannot be mapped")
        }
        log = new
        applyLog()
        return VhostUserMessage.bytes(UInt64(0))
    }

    /// Writes are noted if the feature is on (VHOST_F_LOG_ALL); those to used rings if the ring's flag is.
    private func applyLog() {
        device.setLog(features & VirtioFeature.logAll != 0 ? log : nil)
        for index in rings.indices where device.isInService(index) { applyLog(index) }
    }

    private func applyLog(_ index: Int) {
        device.with(index) { [self] serving in
            guard let queue = serving.queue(index) else { return }
            applyLog(index, queue.ring)
        }
    }

    private func applyLog(_ index: Int, _ ring: Virtqueue) {
        let address = rings[index].usedLogAddress
        ring.log(to: address == nil ? nil : log, usedAddress: address ?? 0)
    }

    private func setFeatures(_ features: UInt64) throws {
        guard features & ~options.features == 0 else {
            throw SessionFault.refused(
                "features \(String(features & ~options.features, radix: 16)) were not offered")
        }
        // Only logging is switched on and off while the device runs.
        guard
            (features ^ self.features) & ~VirtioFeature.logAll == 0 || isOutOfService
        else {
            throw SessionFault.refused("features cannot change while rings are in service")
        }
        self.features = features
        device.setFeatures(features)
        if isOutOfService { findWithheld() }
        applyLog()
        // Without protocol features rings are enabled from the start (vhost-user, "Ring states").
        if features & VirtioFeature.protocolFeatures == 0 {
            for index in rings.indices { rings[index].isEnabled = true }
        }
    }

    private func setProtocolFeatures(_ features: UInt64) throws {
        guard features & ~options.protocolFeatures == 0 else {
            throw SessionFault.refused("protocol features \(String(features, radix: 16)) were not all offered")
        }
        let suspends = features & VhostUserProtocolFeature.getVringBaseInflight != 0
        guard !suspends || features & VhostUserProtocolFeature.inflightSharedMemory != 0 else {
            throw SessionFault.refused("GET_VRING_BASE_INFLIGHT needs INFLIGHT_SHMFD")
        }
        protocolFeatures = features
    }

    // MARK: Memory

    private func region(_ message: VhostUserMessage, at offset: Int, _ descriptor: Int32) throws -> MemoryRegion {
        do {
            return try MemoryRegion(
                guestAddress: message.uint64(offset), size: message.uint64(offset + 8),
                userAddress: message.uint64(offset + 16), offset: message.uint64(offset + 24), descriptor: descriptor)
        } catch {
            guard case .invalid(let why) = error else { throw error }
            throw SessionFault.refused(why)
        }
    }

    private func setMemoryTable(_ message: inout VhostUserMessage) throws {
        let count = Int(message.uint32(0))
        guard message.payload.count == 8 + 32 * count, message.descriptors.count == count else {
            throw SessionFault.refused(
                "\(count) regions in \(message.payload.count) bytes with \(message.descriptors.count) file descriptors")
        }
        var regions: [MemoryRegion] = []
        for index in 0..<count {
            regions.append(try region(message, at: 8 + 32 * index, message.descriptors[index]))
        }
        try install(regions)
    }

    private func addMemoryRegion(_ message: inout VhostUserMessage) throws {
        guard message.descriptors.count == 1 else { throw SessionFault.refused("it needs one file descriptor") }
        guard device.memory.regions.count < GuestMemory.slots else {
            throw SessionFault.refused("there are \(GuestMemory.slots) regions already")
        }
        try install(device.memory.regions + [try region(message, at: 8, message.descriptors[0])])
    }

    private func removeMemoryRegion(_ message: VhostUserMessage) throws {
        let (guest, size, user) = (message.uint64(8), message.uint64(16), message.uint64(24))
        let regions = device.memory.regions
        let left = regions.filter { $0.guestAddress != guest || $0.size != size || $0.userAddress != user }
        guard left.count < regions.count else { throw SessionFault.refused("there is no such region") }
        try install(left)
    }

    /// Makes a new table the current one. Rings in service move over to it.
    private func install(_ regions: [MemoryRegion]) throws {
        let sorted = regions.sorted { $0.guestAddress < $1.guestAddress }
        for (region, next) in zip(sorted, sorted.dropFirst()) where region.overlaps(next) {
            throw SessionFault.refused("regions that overlap at guest address \(next.guestAddress)")
        }
        device.install(sorted)
        for index in rings.indices { move(index) }
        device.dropRetired()
    }

    // MARK: Rings

    /// The ring that a message names; in messages with a descriptor the index is one byte.
    private func ring(_ message: VhostUserMessage, byte: Bool = false) throws -> Int {
        let index = byte ? Int(message.uint64(0) & 0xff) : Int(message.uint32(0))
        guard index < rings.count else { throw SessionFault.refused("there is no ring \(index)") }
        return index
    }

    private func setNumber(_ message: VhostUserMessage) throws {
        let index = try ring(message)
        let size = Int(message.uint32(4))
        let isPacked = features & VirtioFeature.ringPacked != 0
        guard size > 0, size <= VhostUserSCSIServer.maximumQueueSize, isPacked || size & (size - 1) == 0 else {
            throw SessionFault.refused(
                "a ring of \(size) descriptors; a power of two up to \(VhostUserSCSIServer.maximumQueueSize) is possible"
            )
        }
        guard !device.isInService(index) else { throw SessionFault.refused("ring \(index) is in service") }
        rings[index].size = size
    }

    private func setAddress(_ message: VhostUserMessage) throws {
        let index = try ring(message)
        guard message.uint32(4) & ~1 == 0 else { throw SessionFault.refused("flags \(message.uint32(4))") }
        rings[index].addresses = (message.uint64(8), message.uint64(16), message.uint64(24))
        rings[index].usedLogAddress = message.uint32(4) & 1 != 0 ? message.uint64(32) : nil
        if device.isInService(index) { applyLog(index) }
        move(index)
    }

    private func getBase(_ message: VhostUserMessage) throws -> [UInt8]? {
        let index = try ring(message)
        rings[index].isStarted = false
        unwatchKick(index)
        // A ring may also stop because its driver resets it (RING_RESET), and must not find commands of then.
        let suspending =
            protocolFeatures & VhostUserProtocolFeature.getVringBaseInflight != 0
            && features & VirtioFeature.ringReset == 0
        // From now on: a command that was given back is not found by a function.
        if suspending, index >= VirtioSCSIDevice.firstRequestQueue { device.withheld.insert(index) }
        switch device.stop(index, suspending: suspending) {
        case .notInService:
            if !hasNotes(index) { device.withheld.remove(index) }
            return VhostUserMessage.bytes(UInt32(index)) + VhostUserMessage.bytes(rings[index].base ?? beginning)
        case .drained(let base): return stopped(index, base)
        case .busy:
            awaited = .base(index: index)
            if let socketToken { reactor.change(socketToken, events: 0) }
            return nil
        }
    }

    /// Whether no ring is in service.
    private var isOutOfService: Bool { !rings.indices.contains(where: device.isInService) }

    /// Where a ring begins if nobody says otherwise.
    private var beginning: UInt32 { features & VirtioFeature.ringPacked != 0 ? Virtqueue.packedBeginning : 0 }

    /// A ring has stopped with nothing in flight but what is noted.
    private func stopped(_ index: Int, _ base: UInt32) -> [UInt8] {
        rings[index].base = base
        if !hasNotes(index) { device.withheld.remove(index) }
        return VhostUserMessage.bytes(UInt32(index)) + VhostUserMessage.bytes(base)
    }

    /// Requests in flight have ended: answers the message that waited for them, ends the session if that did.
    private func drained() {
        answerAwaited()
        if isFinishing && isConnected && device.isIdle { end(nil) }
    }

    private func answerAwaited() {
        guard let awaited else { return }
        do {
            switch awaited {
            case .base(let index):
                guard let base = device.takeBase(index) else { return }
                self.awaited = nil
                try connection.send(
                    VhostUserMessage.reply(
                        to: VhostUserRequest.getVringBase.rawValue, payload: stopped(index, base)))
            case .reset(let message):
                guard device.isIdle else { return device.awaitDrain() }
                completeReset()
                try acknowledge(message, failed: false)
            }
        } catch {
            return end(nil)
        }
        if let socketToken { reactor.change(socketToken, events: EPOLLIN.rawValue) }
    }

    private func setKick(_ message: inout VhostUserMessage) throws {
        let index = try ring(message, byte: true)
        let kick = try eventDescriptor(&message)
        unwatchKick(index)
        replace(\.kick, index, kick)
        if kick != nil { try watchKick(index) }
        if device.isInService(index) {
            let mustPoll = mustPoll(index)
            device.with(index) { $0.queue(index)?.mustPoll = mustPoll }
        }
        rings[index].isStarted = true
        rings[index].isBroken = false
    }

    /// Without a kick descriptor the front-end notifies in band, or not at all.
    private func mustPoll(_ index: Int) -> Bool {
        rings[index].kick < 0 && protocolFeatures & VhostUserProtocolFeature.inbandNotifications == 0
    }

    private func setCall(_ message: inout VhostUserMessage) throws {
        let index = try ring(message, byte: true)
        let call = try eventDescriptor(&message)
        // Before the old one is closed: another thread may be about to use it.
        if device.isInService(index) { device.with(index) { $0.queue(index)?.call = call ?? -1 } }
        replace(\.call, index, call)
        // What was used before there was a way to say so.
        if rings[index].call >= 0 { _ = clinux_signal(rings[index].call) }
    }

    /// The descriptor of a message that has one, or bit 8 set and none. The caller closes it.
    private func descriptor(_ message: inout VhostUserMessage) throws -> Int32? {
        let hasNone = message.uint64(0) & 0x100 != 0
        guard message.descriptors.count == (hasNone ? 0 : 1) else {
            throw SessionFault.refused(
                "\(message.descriptors.count) file descriptors came where \(hasNone ? "none" : "one") was announced")
        }
        return message.takeDescriptor()
    }

    /// The same, and it is an eventfd: anything else could keep us when we write to it.
    private func eventDescriptor(_ message: inout VhostUserMessage) throws -> Int32? {
        guard let descriptor = try descriptor(&message) else { return nil }
        guard clinux_is_eventfd(descriptor) == 1 else {
            close(descriptor)
            throw SessionFault.refused("its file descriptor is no eventfd")
        }
        return descriptor
    }

    private func replace(_ field: WritableKeyPath<RingState, Int32>, _ index: Int, _ descriptor: Int32?) {
        if rings[index][keyPath: field] >= 0 { close(rings[index][keyPath: field]) }
        rings[index][keyPath: field] = descriptor ?? -1
        if let descriptor { _ = fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK) }
    }

    private func watchKick(_ index: Int) throws {
        // The queues are polled after every wake-up. Each kick is an edge of its own, so the counter is never read: a
        // read could be made to wait by the front-end, which shares the descriptor's flags.
        let (kick, context) = unsafe (rings[index].kick, UnsafeMutableRawPointer(kickContexts + index))
        let watched = device.with(index) { serving -> Result<DescriptorToken, ReactorError> in
            Result { () throws(ReactorError) in
                unsafe try serving.reactor.watch(
                    kick, events: EPOLLIN.rawValue | EPOLLET.rawValue,
                    { context, _ in
                        let kick = unsafe context.assumingMemoryBound(to: KickContext.self)
                        unsafe kick.pointee.session.kicked(kick.pointee.index)
                    }, context)
            }
        }
        switch watched {
        case .success(let token): rings[index].kickToken = token
        case .failure(let error):
            replace(\.kick, index, nil)
            throw SessionFault.refused("its kick descriptor cannot be watched: \(error)")
        }
    }

    private func unwatchKick(_ index: Int) {
        if let token = rings[index].kickToken { device.with(index) { $0.reactor.unwatch(token) } }
        rings[index].kickToken = nil
    }

    private func kicked(_ index: Int) {
        if index == VirtioSCSIDevice.eventQueue { device.deliverEvents() }
    }

    /// Makes what runs equal to what the front-end has said.
    private func reconcile() {
        for index in rings.indices {
            let ring = rings[index]
            if device.isInService(index) {
                device.setEnabled(index, ring.isEnabled)
            } else if ring.isStarted, ring.isEnabled, !ring.isBroken, ring.size != nil, ring.addresses != nil {
                putIntoService(index)
            }
        }
    }

    private func putIntoService(_ index: Int) {
        guard rings[index].size != nil else { return }
        guard let areas = areas(index) else {
            rings[index].isBroken = true
            return fault(index, VirtqueueFault.areas.rawValue)
        }
        if let found = device.with(index, { [self] in putIntoService(index, areas, by: $0) }) {
            rings[index].isBroken = true
            return fault(index, found.rawValue)
        }
        device.started(index)
        device.withheld.remove(index)
    }

    /// On the thread that serves the ring, while this one waits.
    private func putIntoService(
        _ index: Int, _ areas: Virtqueue.Areas, by serving: VirtioSCSIDevice
    ) -> VirtqueueFault? {
        guard let size = rings[index].size else { return nil }
        let notes = inflight?.queue(index, size: size, isPacked: features & VirtioFeature.ringPacked != 0)
        do {
            let ring = try Virtqueue(
                size: size, memory: serving.memory, areas: areas, base: rings[index].base, features: features,
                inflight: notes)
            applyLog(index, ring)
            // A driver may have made buffers available before we were there to be notified.
            _ = ring.wantNotifications()
            serving.start(index, ring: ring, call: rings[index].call, mustPoll: mustPoll(index))
            return nil
        } catch {
            return error
        }
    }

    /// Where the areas of a ring lie in the current memory.
    private func areas(_ index: Int) -> Virtqueue.Areas? {
        guard let size = rings[index].size, let addresses = rings[index].addresses else { return nil }
        let isPacked = features & VirtioFeature.ringPacked != 0
        let sizes = Virtqueue.areas(size: size, isPacked: isPacked)
        guard
            let descriptors = unsafe device.memory.ring(
                userAddress: addresses.descriptors, length: sizes.descriptors, alignment: 16),
            let available = unsafe device.memory.ring(
                userAddress: addresses.available, length: sizes.available, alignment: isPacked ? 4 : 2),
            let used = unsafe device.memory.ring(userAddress: addresses.used, length: sizes.used, alignment: 4)
        else { return nil }
        return unsafe Virtqueue.Areas(descriptors: descriptors, available: available, used: used)
    }

    /// The memory or the ring's addresses have changed: it goes on there, with what is in flight.
    private func move(_ index: Int) {
        rings[index].isBroken = false
        guard device.isInService(index) else { return }
        let areas = areas(index)
        device.with(index) { serving in
            guard let queue = serving.queue(index), !queue.isBroken else { return }
            guard let areas else { return serving.breakQueue(queue, .areas) }
            queue.ring.move(to: serving.memory, areas: areas)
        }
    }

    /// Says that a ring is out of service because the driver broke the rules.
    func fault(_ index: Int, _ why: String) {
        report("Ring \(index) is out of service until the driver resets the device: \(why).")
        if rings[index].error >= 0 {
            _ = clinux_signal(rings[index].error)
        } else {
            tellInBand(.vringError, index)
        }
    }
}
