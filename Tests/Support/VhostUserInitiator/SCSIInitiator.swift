// SCSIInitiator: virtio-scsi requests over a front-end's queues: commands, task management, events (virtio 1.2 clause
// 5.6.6).
//
// Owns: nothing but the layouts of requests and responses. Called by: tests, the load generator's preparation. Must not
// know: what a command does.

import CLinux

/// The eight bytes that name a logical unit (virtio 1.2 clause 5.6.6.1).
public struct VirtioSCSIAddress: Equatable, Hashable, Sendable {
    /// As in the request.
    public let bytes: [UInt8]

    /// Any eight bytes.
    public init(bytes: [UInt8]) {
        precondition(bytes.count == 8)
        self.bytes = bytes
    }

    /// The flat format: {1, target, 0x40 | high, low}.
    public static func flat(target: UInt8, lun: UInt16) -> Self {
        Self(bytes: [1, target, 0x40 | UInt8(lun >> 8), UInt8(lun & 0xff), 0, 0, 0, 0])
    }

    /// The peripheral format: {1, target, 0, lun}.
    public static func peripheral(target: UInt8, lun: UInt8) -> Self {
        Self(bytes: [1, target, 0, lun, 0, 0, 0, 0])
    }

    /// The well-known logical unit of REPORT LUNS, of no target: {0xc1, 1, 0, 0}.
    public static let reportLUNs = Self(bytes: [0xc1, 1, 0, 0, 0, 0, 0, 0])
}

/// One SCSI command.
public struct SCSICommand: Sendable {
    /// The logical unit.
    public var address: VirtioSCSIAddress
    /// The command descriptor block; padded with zeros to `cdbSize`.
    public var cdb: [UInt8]
    /// The name of the command for task management.
    public var tag: UInt64 = 0
    /// Task attribute: a VIRTIO_SCSI_S_ value.
    public var attribute: UInt8 = 0
    /// Priority.
    public var priority: UInt8 = 0
    /// Command reference number.
    public var reference: UInt8 = 0
    /// What the device reads.
    public var dataOut: [UInt8] = []
    /// Bytes that the device may write.
    public var dataIn = 0
    /// How the request, with data out, and the response, with data in, are cut.
    public var layout = ChainLayout()
    /// Bytes of the CDB field.
    public var cdbSize = 32
    /// Bytes of the sense field.
    public var senseSize = 96

    /// A command without data until it is given some.
    public init(_ address: VirtioSCSIAddress, _ cdb: [UInt8], dataOut: [UInt8] = [], dataIn: Int = 0) {
        self.address = address
        self.cdb = cdb
        self.dataOut = dataOut
        self.dataIn = dataIn
    }

    /// The request header.
    public var header: [UInt8] {
        precondition(cdb.count <= cdbSize)
        return address.bytes + WireBytes.of(tag) + [attribute, priority, reference] + cdb
            + [UInt8](repeating: 0, count: cdbSize - cdb.count)
    }

    /// Bytes of the response without data.
    public var responseSize: Int { 12 + senseSize }
}

/// What became of a command.
public struct SCSIResult: Equatable, Sendable {
    /// A VIRTIO_SCSI_S_ value.
    public let response: UInt8
    /// The SCSI status.
    public let status: UInt8
    /// The status qualifier.
    public let statusQualifier: UInt16
    /// Bytes of the buffer that were not used.
    public let residual: UInt32
    /// The sense data, as long as the device says.
    public let sense: [UInt8]
    /// The whole buffer of data in: `DriverQueue.untouched` where the device wrote nothing.
    public let dataIn: [UInt8]
    /// What the used ring says of the length.
    public let usedLength: UInt32

    /// Sense key; `nil` without sense data in fixed format.
    public var senseKey: UInt8? { sense.count > 2 && sense[0] & 0x7e == 0x70 ? sense[2] & 0xf : nil }
    /// Additional sense code and qualifier; `nil` without sense data in fixed format.
    public var additionalSense: UInt16? {
        senseKey != nil && sense.count > 13 ? UInt16(sense[12]) << 8 | UInt16(sense[13]) : nil
    }
    /// Whether the command ended with GOOD.
    public var isGood: Bool { response == 0 && status == 0 }
}

/// A command that is in flight.
public struct SCSIInFlight {
    let queue: DriverQueue
    let senseSize: Int
    /// Its chain.
    public let chain: Chain

    /// Waits for its end.
    public func wait() throws(InitiatorError) -> SCSIResult {
        try queue.wait(for: chain)
        return try result()
    }

    /// The result of a command that has ended.
    public func result() throws(InitiatorError) -> SCSIResult {
        let bytes = chain.written
        let header = 12 + senseSize
        guard chain.isComplete, let length = WireBytes.read(UInt32.self, bytes, at: 0), length <= senseSize,
            let residual = WireBytes.read(UInt32.self, bytes, at: 4),
            let qualifier = WireBytes.read(UInt16.self, bytes, at: 8), bytes.count >= header
        else { throw .protocolViolation("a response without sense, or with more than \(senseSize) bytes of it") }
        return SCSIResult(
            response: bytes[11], status: bytes[10], statusQualifier: qualifier, residual: residual,
            sense: Array(bytes[12..<12 + Int(length)]), dataIn: Array(bytes[header...]),
            usedLength: chain.usedLength ?? 0)
    }
}

extension DriverQueue {
    /// Puts a command into the ring without telling the device.
    public func enqueue(_ command: SCSICommand) -> SCSIInFlight {
        let chain = enqueue(
            readable: command.header + command.dataOut, writable: command.responseSize + command.dataIn,
            layout: command.layout)
        return SCSIInFlight(queue: self, senseSize: command.senseSize, chain: chain)
    }

    /// Sends a command.
    public func submit(_ command: SCSICommand) -> SCSIInFlight {
        let inFlight = enqueue(command)
        publish()
        return inFlight
    }

    /// Sends a command and waits for its end.
    public func run(_ command: SCSICommand) throws(InitiatorError) -> SCSIResult { try submit(command).wait() }

    /// Sends a command, again after each unit attention, until it ends otherwise.
    public func runPastUnitAttentions(_ command: SCSICommand) throws(InitiatorError) -> SCSIResult {
        for _ in 0..<16 {
            let result = try run(command)
            guard result.response == 0, result.status == 2, result.senseKey == 6 else { return result }
        }
        throw .protocolViolation("unit attentions without end")
    }

    /// Sends a task management request; the response byte is in the chain.
    public func submitTaskManagement(
        _ function: Int32, _ address: VirtioSCSIAddress, tag: UInt64 = 0, layout: ChainLayout = ChainLayout()
    ) -> Chain {
        let request =
            WireBytes.of(UInt32(VIRTIO_SCSI_T_TMF), UInt32(function)) + address.bytes + WireBytes.of(tag)
        return submit(readable: request, writable: 1, layout: layout)
    }

    /// Sends a task management request and waits: a VIRTIO_SCSI_S_ value.
    public func taskManagement(
        _ function: Int32, _ address: VirtioSCSIAddress, tag: UInt64 = 0
    ) throws(InitiatorError) -> UInt8 {
        let chain = submitTaskManagement(function, address, tag: tag)
        try wait(for: chain)
        return chain.written[0]
    }

    /// Sends AN_QUERY or AN_SUBSCRIBE and waits.
    public func asynchronousNotification(
        _ type: Int32, _ address: VirtioSCSIAddress, events: UInt32
    ) throws(InitiatorError) -> (events: UInt32, response: UInt8) {
        let request = WireBytes.of(UInt32(type)) + address.bytes + WireBytes.of(events)
        let chain = submit(readable: request, writable: 5)
        try wait(for: chain)
        guard let events = WireBytes.read(UInt32.self, chain.written, at: 0) else {
            throw .protocolViolation("a response of \(chain.written.count) bytes")
        }
        return (events, chain.written[4])
    }

    /// Gives the device a buffer for one event.
    public func offerEventBuffer() -> Chain { submit(readable: [], writable: 16) }
}
