// LoadRun: from a socket to a result: connects, asks the size, drives all streams from one thread for a time.
//
// Owns: the front-end and the streams. Called by: LoadCommand. Must not know: how options are written or results shown.

import Glibc
import VhostUserInitiator

/// What to do.
struct LoadPlan {
    enum Device { case scsi(VirtioSCSIAddress), block }

    var socket: String
    var device: Device
    var queues: Int
    var depth: Int
    var requestLength: Int
    var pattern: Load.Pattern
    var readPercent: Int
    var seconds: Double
    var size: UInt64?
    var verify: Bool
    var waits: Bool
    var isIndirect: Bool
    var usesEventIndex: Bool
    var isPacked: Bool
    var seed: UInt64
    var process: TargetProcess?
}

/// What came out.
struct LoadResult {
    var seconds: Double
    var reads: UInt64
    var writes: UInt64
    var latency: Histogram
    var verifiedBlocks: UInt64?
    var processorMicroseconds: Double?
    var residentBytes: Int?

    var operations: UInt64 { reads + writes }
}

/// One run.
final class LoadRun {
    private static let idleTurns = 1 << 20
    private static let patience: UInt64 = 30_000_000_000

    private let plan: LoadPlan
    private let frontEnd: VhostUserFrontEnd
    private let verification: Verification?
    private let streams: [LoadStream]

    init(_ plan: LoadPlan) throws {
        self.plan = plan
        frontEnd = try VhostUserFrontEnd.started(path: plan.socket, options: Self.options(plan))
        let (size, blockLength) = try Self.size(plan, frontEnd)
        let places = min(size, plan.size ?? size) / UInt64(plan.requestLength)
        guard plan.requestLength % blockLength == 0 else {
            throw LoadError("--block-size must be a multiple of the device's block length, \(blockLength) bytes")
        }
        // Each queue needs a place for each slot, and in a section of its own if it is to be sequential.
        guard places >= UInt64(2 * plan.queues * plan.depth) else {
            throw LoadError(
                "the device, or its part that --size allows, has \(min(size, plan.size ?? size)) bytes: too few for "
                    + "this depth and block size")
        }
        verification =
            plan.verify
            ? try Verification(ranges: Int(places), requestLength: plan.requestLength, blockLength: blockLength) : nil
        var streams: [LoadStream] = []
        for number in 0..<plan.queues {
            streams.append(Self.stream(plan, frontEnd, number, Int(places), blockLength, verification))
        }
        self.streams = streams
    }

    private static func options(_ plan: LoadPlan) -> VhostUserFrontEnd.Options {
        var options = VhostUserFrontEnd.Options()
        if !plan.usesEventIndex { options.features &= ~VirtioFeatureBit.eventIndex }
        if plan.isPacked { options.features |= VirtioFeatureBit.ringPacked }
        options.queues = plan.queues
        if case .scsi = plan.device { options.queues += 2 }
        let descriptors = plan.depth * LoadQueue.descriptorsNeeded(isIndirect: plan.isIndirect)
        while options.ringSize < descriptors { options.ringSize *= 2 }
        let slots = plan.queues * plan.depth * LoadQueue.memoryNeeded(requestLength: plan.requestLength)
        options.memorySize = slots + options.queues * (options.ringSize * 32 + 16384) + 4 << 20
        options.memorySize &= -4096
        return options
    }

    /// Bytes of the device, and of its blocks.
    private static func size(_ plan: LoadPlan, _ frontEnd: VhostUserFrontEnd) throws -> (UInt64, Int) {
        switch plan.device {
        case .block:
            guard let sectors = WireBytes.read(UInt64.self, try frontEnd.configuration(8), at: 0) else {
                throw LoadError("the configuration space tells no capacity")
            }
            return (sectors * 512, 512)
        case .scsi(let address):
            let ready = try frontEnd.queues[2].runPastUnitAttentions(SCSICommand(address, [0, 0, 0, 0, 0, 0]))
            guard ready.isGood else { throw LoadError("the logical unit is not ready: \(ready)") }
            let cdb: [UInt8] = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0]
            let capacity = try frontEnd.queues[2].runPastUnitAttentions(SCSICommand(address, cdb, dataIn: 32))
            guard capacity.isGood else { throw LoadError("READ CAPACITY(16) failed: \(capacity)") }
            let number = capacity.dataIn.prefix(12).map(UInt64.init)
            let last = number[0..<8].reduce(0) { $0 << 8 | $1 }
            let length = number[8..<12].reduce(0) { $0 << 8 | $1 }
            return ((last + 1) * length, Int(length))
        }
    }

    private static func stream(
        _ plan: LoadPlan, _ frontEnd: VhostUserFrontEnd, _ number: Int, _ places: Int, _ blockLength: Int,
        _ verification: Verification?
    ) -> LoadStream {
        let device: LoadQueue.Device
        var index = number
        switch plan.device {
        case .block: device = .block
        case .scsi(let address):
            device = .scsi(address, blockLength: blockLength)
            index += 2
        }
        let queue = LoadQueue(
            queue: frontEnd.queues[index], memory: frontEnd.memories[0], depth: plan.depth,
            requestLength: plan.requestLength, device: device, isIndirect: plan.isIndirect)
        // Sequential streams have a section each; random ones share the whole.
        let section = plan.pattern == .sequential ? places / plan.queues : places
        let load = Load(
            pattern: plan.pattern, readPercent: plan.readPercent,
            first: plan.pattern == .sequential ? section * number : 0, count: section,
            requestLength: plan.requestLength, seed: (plan.seed &+ UInt64(number)) &* 0x9e37_79b9_7f4a_7c15)
        return LoadStream(
            queue: queue, load: load, verification: verification, firstWriter: UInt16(number * plan.depth))
    }

    /// Drives the load for its time, then waits for what is in flight.
    func run() throws -> LoadResult {
        let before = try plan.process?.usage()
        let start = LoadStream.now()
        let end = start + UInt64(plan.seconds * 1e9)
        for stream in streams {
            stream.queue.wantNotifications(false)
            stream.begin()
        }
        try drive(until: end)
        let seconds = Double(LoadStream.now() - start) / 1e9
        let after = try plan.process?.usage()
        let latency = Histogram()
        for stream in streams { latency.add(stream.latency) }
        return LoadResult(
            seconds: seconds, reads: streams.reduce(0) { $0 + $1.reads }, writes: streams.reduce(0) { $0 + $1.writes },
            latency: latency, verifiedBlocks: verification?.blocks,
            processorMicroseconds: before.flatMap { before in
                after.map { $0.processorMicroseconds - before.processorMicroseconds }
            }, residentBytes: after?.residentBytes)
    }

    private func drive(until end: UInt64) throws {
        var idle = 0
        var lastProgress = LoadStream.now()
        while streams.contains(where: { $0.inFlight > 0 }) {
            var count = 0
            for stream in streams {
                count += try stream.turn(until: end)
                if plan.waits {
                    stream.queue.wantNotifications(false)
                } else if count > 0 {
                    stream.queue.wantNotifications(false)
                }
            }
            if count > 0 {
                idle = 0
                continue
            }
            if plan.waits { try LoadQueue.waitForUsed(streams.map(\.queue)) }
            idle += 1
            // Polling, look rarely whether it still makes sense.
            guard idle % Self.idleTurns == 0 else { continue }
            let now = LoadStream.now()
            if idle == Self.idleTurns { lastProgress = now }
            guard now - lastProgress < Self.patience, frontEnd.channel.isOpen else {
                throw LoadError(
                    frontEnd.channel.isOpen
                        ? "nothing was completed for 30 seconds" : "the target closed the connection")
            }
        }
    }
}
