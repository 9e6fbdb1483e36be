// VhostUserFrontEnd: a vhost-user front-end: negotiates, shares its memory, starts and stops queues.
//
// Owns: the connection, the shared memory, the queues. Called by: tests, the load generator. Must not know: SCSI.

import CLinux
import Glibc

/// A vhost-user front-end with its guest's memory and queues.
public final class VhostUserFrontEnd {
    /// What a front-end does, and in which order.
    public struct Options: Sendable {
        /// Features to accept of those that are offered.
        public var features =
            VirtioFeatureBit.version1 | VirtioFeatureBit.indirectDescriptors | VirtioFeatureBit.eventIndex
            | VirtioFeatureBit.protocolFeatures | VirtioFeatureBit.hotplug | VirtioFeatureBit.change
        /// Protocol features to accept of those that are offered.
        public var protocolFeatures =
            VhostUserProtocolBit.multiqueue | VhostUserProtocolBit.replyAcknowledge
            | VhostUserProtocolBit.configureMemorySlots | VhostUserProtocolBit.configuration
        /// Queues to set up, of all kinds.
        public var queues = 3
        /// Descriptors of each ring.
        public var ringSize = 128
        /// Bytes of each memory region.
        public var memorySize = 16 << 20
        /// Memory regions. Rings are in the first, buffers in turn in all.
        public var memoryRegions = 1
        /// ADD_MEM_REG for each region instead of one SET_MEM_TABLE.
        public var addsRegionsSingly = false
        /// SET_VRING_ENABLE for all queues before any of them is set up.
        public var enablesBeforeSetup = false

        /// The defaults: everything that makes it fast.
        public init() {}
    }

    /// How it was asked to work.
    public let options: Options
    /// The path of the back-end's socket.
    public private(set) var path: String
    /// The connection.
    public private(set) var channel: VhostUserChannel
    /// The guest's memory.
    public let memories: [SharedMemory]
    /// Features that the back-end offered.
    public private(set) var offeredFeatures: UInt64 = 0
    /// Features that were accepted.
    public private(set) var features: UInt64 = 0
    /// Protocol features that the back-end offered.
    public private(set) var offeredProtocolFeatures: UInt64 = 0
    /// Protocol features that were accepted.
    public private(set) var protocolFeatures: UInt64 = 0
    /// What the back-end answered to GET_QUEUE_NUM; `nil` without the feature.
    public private(set) var maximumQueues: UInt64?
    /// The queues that were set up.
    public private(set) var queues: [DriverQueue] = []

    /// The memory of what is in flight: its descriptor, and what GET_INFLIGHT_FD said of it.
    public private(set) var inflight: (descriptor: Int32, payload: [UInt8])?

    deinit {
        if let inflight { close(inflight.descriptor) }
    }

    /// Connects, and no more.
    public init(path: String, options: Options = Options()) throws(InitiatorError) {
        self.options = options
        self.path = path
        channel = try VhostUserChannel(path: path)
        var memories: [SharedMemory] = []
        for index in 0..<options.memoryRegions {
            // Guest-physical addresses with holes between them, and none at 0.
            memories.append(
                try SharedMemory(size: options.memorySize, guestAddress: 0x4000_0000 * UInt64(index + 1)))
        }
        self.memories = memories
    }

    /// Connects, negotiates, shares the memory and starts all queues.
    public static func started(path: String, options: Options = Options()) throws(InitiatorError) -> VhostUserFrontEnd {
        let frontEnd = try VhostUserFrontEnd(path: path, options: options)
        try frontEnd.start()
        return frontEnd
    }

    /// Does all that lies between a connection and the first command.
    public func start() throws(InitiatorError) {
        try negotiate()
        try shareMemory()
        if protocolFeatures & VhostUserProtocolBit.inflightSharedMemory != 0 { try makeInflight() }
        try shareInflight()
        makeQueues()
        try startQueues()
    }

    /// Connects again with the same memory, and starts the same rings where the device had left them. What was in
    /// flight must have been completed or given up before, or be noted as in flight.
    ///
    /// - Parameters:
    ///   - path: The socket of another back-end, as after a migration.
    ///   - startsQueues: Whether it goes as far as that.
    public func reconnect(to path: String? = nil, startsQueues: Bool = true) throws(InitiatorError) {
        self.path = path ?? self.path
        channel = try VhostUserChannel(path: self.path)
        try negotiate()
        try shareMemory()
        try shareInflight()
        if startsQueues { try self.startQueues() }
    }

    /// Ends the connection, as a front-end that dies.
    public func disconnect() { channel.shutDown() }

    // MARK: - Requests

    /// Sends a request that has a reply of its own, and returns it.
    public func ask(_ request: VhostUserRequest, _ payload: [UInt8] = []) throws(InitiatorError) -> VhostUserReply {
        try channel.send(request, payload)
        return try reply(to: request)
    }

    /// Sends a request whose reply is one number.
    public func askNumber(_ request: VhostUserRequest) throws(InitiatorError) -> UInt64 {
        guard let number = try ask(request).number else {
            throw .protocolViolation("the reply to \(request) is not of 8 bytes")
        }
        return number
    }

    /// Sends a request that has no reply of its own; with REPLY_ACK waits for the acknowledgement.
    public func tell(
        _ request: VhostUserRequest, _ payload: [UInt8] = [], descriptors: [Int32] = []
    ) throws(InitiatorError) {
        let acknowledged = protocolFeatures & VhostUserProtocolBit.replyAcknowledge != 0
        try channel.send(request, payload, descriptors: descriptors, needReply: acknowledged)
        guard acknowledged else { return }
        let reply = try reply(to: request)
        guard let code = reply.number else {
            throw .protocolViolation("the acknowledgement of \(request) is not of 8 bytes")
        }
        if code != 0 { throw .refused(request, code: code) }
    }

    private func reply(to request: VhostUserRequest) throws(InitiatorError) -> VhostUserReply {
        let reply = try channel.receive()
        guard reply.request == request.rawValue else {
            throw .protocolViolation("a reply to request \(reply.request), where one to \(request) was due")
        }
        guard reply.flags & 3 == VhostUserChannel.version, reply.flags & VhostUserChannel.replyFlag != 0 else {
            throw .protocolViolation("the flags \(reply.flags) of the reply to \(request)")
        }
        return reply
    }

    // MARK: - The steps of start()

    /// Features and protocol features, both ways.
    public func negotiate() throws(InitiatorError) {
        protocolFeatures = 0
        try tell(.setOwner)
        offeredFeatures = try askNumber(.getFeatures)
        features = offeredFeatures & options.features
        if features & VirtioFeatureBit.protocolFeatures != 0 {
            offeredProtocolFeatures = try askNumber(.getProtocolFeatures)
            let accepted = offeredProtocolFeatures & options.protocolFeatures
            try tell(.setProtocolFeatures, WireBytes.of(accepted))
            protocolFeatures = accepted
        }
        if protocolFeatures & VhostUserProtocolBit.multiqueue != 0 {
            let maximum = try askNumber(.getQueueNumber)
            maximumQueues = maximum
            guard maximum >= options.queues else {
                throw .protocolViolation("it has \(maximum) queues; \(options.queues) are needed")
            }
        }
        try tell(.setFeatures, WireBytes.of(features))
    }

    /// Hands all memory to the back-end.
    public func shareMemory() throws(InitiatorError) {
        if options.addsRegionsSingly {
            for memory in memories { try addRegion(memory) }
            return
        }
        var payload = WireBytes.of(UInt32(memories.count), 0)
        for memory in memories { payload += Self.region(memory) }
        try tell(.setMemoryTable, payload, descriptors: memories.map(\.descriptor))
    }

    /// Hands one more memory region to the back-end.
    public func addRegion(_ memory: SharedMemory) throws(InitiatorError) {
        try tell(.addMemoryRegion, WireBytes.of(UInt64(0)) + Self.region(memory), descriptors: [memory.descriptor])
    }

    /// Takes one memory region away from the back-end.
    public func removeRegion(_ memory: SharedMemory) throws(InitiatorError) {
        try tell(.removeMemoryRegion, WireBytes.of(UInt64(0)) + Self.region(memory))
    }

    /// One memory region as the messages have it.
    public static func region(_ memory: SharedMemory, mappingOffset: UInt64 = 0) -> [UInt8] {
        WireBytes.of(memory.guestAddress, UInt64(memory.size), memory.userAddress, mappingOffset)
    }

    /// Lays out the rings.
    public func makeQueues() {
        queues = (0..<options.queues).map { index in
            DriverQueue(
                index: index, size: options.ringSize, memories: memories,
                usesEventIndex: features & VirtioFeatureBit.eventIndex != 0,
                isPacked: features & VirtioFeatureBit.ringPacked != 0)
        }
    }

    /// Starts all queues.
    public func startQueues() throws(InitiatorError) {
        if options.enablesBeforeSetup {
            for queue in queues { try enable(queue, true) }
        }
        for queue in queues { try start(queue) }
        if !options.enablesBeforeSetup {
            for queue in queues { try enable(queue, true) }
        }
    }

    /// Tells the back-end all about one queue. It begins where the driver has taken the last used element.
    public func start(_ queue: DriverQueue) throws(InitiatorError) {
        try setUp(queue, base: queue.packed?.base ?? UInt32(queue.ring.usedIndex))
        try tell(.setVringCall, WireBytes.of(UInt64(queue.index)), descriptors: [queue.callDescriptor])
        try tell(.setVringError, WireBytes.of(UInt64(queue.index)), descriptors: [queue.errorDescriptor])
        try tell(.setVringKick, WireBytes.of(UInt64(queue.index)), descriptors: [queue.kickDescriptor])
    }

    /// Size, base and addresses of one queue.
    public func setUp(_ queue: DriverQueue, base: UInt32) throws(InitiatorError) {
        try tell(.setVringNumber, WireBytes.of(UInt32(queue.index), UInt32(queue.ring.size)))
        try tell(.setVringBase, WireBytes.of(UInt32(queue.index), base))
        try tell(.setVringAddress, addresses(queue))
    }

    /// The payload of SET_VRING_ADDR.
    public func addresses(_ queue: DriverQueue, isLogged: Bool = false) -> [UInt8] {
        let memory = memories[0]
        let ring = queue.ring
        let areas =
            queue.packed.map { ($0.descriptorAddress, $0.deviceAddress, $0.driverAddress) }
            ?? (ring.descriptorAddress, ring.usedAddress, ring.availableAddress)
        return WireBytes.of(UInt32(queue.index), isLogged ? 1 : 0)
            + WireBytes.of(
                memory.userAddress(of: areas.0), memory.userAddress(of: areas.1), memory.userAddress(of: areas.2),
                isLogged ? areas.1 : 0)
    }

    // MARK: - Dirty logging

    /// Hands the back-end a bitmap for all of the memory, and has it note its writes.
    public func startLogging() throws(InitiatorError) -> SharedMemory {
        let end = memories.map { $0.guestAddress + UInt64($0.size) }.max() ?? 0
        let log = try SharedMemory(size: Int(end / 4096 / 8 + 1), guestAddress: 0)
        try channel.send(
            .setLogBase, WireBytes.of(UInt64(log.size), 0), descriptors: [log.descriptor])
        _ = try reply(to: .setLogBase)
        features |= VirtioFeatureBit.logAll
        try tell(.setFeatures, WireBytes.of(features))
        for queue in queues { try tell(.setVringAddress, addresses(queue, isLogged: true)) }
        return log
    }

    // MARK: - What is in flight

    /// Asks the back-end for a memory for its notes.
    public func makeInflight() throws(InitiatorError) {
        let request =
            WireBytes.of(UInt64(0), 0) + WireBytes.of(UInt16(options.queues), UInt16(options.ringSize))
        let reply = try ask(.getInflight, request)
        guard reply.payload.count == request.count, let descriptor = channel.receivedDescriptors.popLast() else {
            throw .protocolViolation("the reply to GET_INFLIGHT_FD has \(reply.payload.count) bytes, or no descriptor")
        }
        inflight = (descriptor, reply.payload)
    }

    /// Hands that memory to the back-end, whether it is the one that made it or its successor.
    public func shareInflight() throws(InitiatorError) {
        guard let inflight else { return }
        try tell(.setInflight, inflight.payload, descriptors: [inflight.descriptor])
    }

    /// Enables or disables a queue. Without protocol features the message does not exist, and queues are always
    /// enabled.
    public func enable(_ queue: DriverQueue, _ enabled: Bool) throws(InitiatorError) {
        guard features & VirtioFeatureBit.protocolFeatures != 0 else { return }
        try tell(.setVringEnable, WireBytes.of(UInt32(queue.index), enabled ? 1 : 0))
    }

    /// Stops a queue; returns the available index where the back-end stands.
    public func stop(_ queue: DriverQueue) throws(InitiatorError) -> UInt16 {
        let base = try stopAnywhere(queue)
        guard base <= 0xffff else {
            throw .protocolViolation("GET_VRING_BASE of queue \(queue.index) answered \(base)")
        }
        return UInt16(base)
    }

    /// Stops a queue of either format; returns what SET_VRING_BASE takes.
    public func stopAnywhere(_ queue: DriverQueue) throws(InitiatorError) -> UInt32 {
        try sendStop(queue)
        return try awaitStop(queue)
    }

    /// Asks for the stop of a queue, and does not wait for the answer.
    public func sendStop(_ queue: DriverQueue) throws(InitiatorError) {
        try channel.send(.getVringBase, WireBytes.of(UInt32(queue.index), 0))
    }

    /// Waits for the answer; returns what `stopAnywhere` does.
    public func awaitStop(_ queue: DriverQueue) throws(InitiatorError) -> UInt32 {
        let reply = try reply(to: .getVringBase)
        guard reply.payload.count == 8, let index = WireBytes.read(UInt32.self, reply.payload, at: 0),
            let base = WireBytes.read(UInt32.self, reply.payload, at: 4)
        else { throw .protocolViolation("the reply to GET_VRING_BASE is not of 8 bytes") }
        guard index == queue.index else {
            throw .protocolViolation("GET_VRING_BASE of queue \(queue.index) answered \(base) of queue \(index)")
        }
        return base
    }

    /// Bytes of the configuration space, through GET_CONFIG.
    public func configuration(_ count: Int) throws(InitiatorError) -> [UInt8] {
        let request = WireBytes.of(UInt32(0), UInt32(count), 0) + [UInt8](repeating: 0, count: count)
        let reply = try ask(.getConfiguration, request)
        guard reply.payload.count == 12 + count else {
            throw .protocolViolation("GET_CONFIG of \(count) bytes answered \(reply.payload.count - 12)")
        }
        return Array(reply.payload[12...])
    }
}
