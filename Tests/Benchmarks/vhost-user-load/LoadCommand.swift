// LoadCommand: the command line of vhost-user-load, and its report.
//
// Called by: people, the benchmark, tests. Must not know: rings, messages.

import ArgumentParser
import VhostUserInitiator

/// Which device the socket serves.
enum DeviceProtocol: String, ExpressibleByArgument, CaseIterable {
    case scsi, blk
}

/// Where the next request goes.
enum Pattern: String, ExpressibleByArgument, CaseIterable {
    case random, sequential
}

/// What the requests do.
enum Operation: String, ExpressibleByArgument, CaseIterable {
    case read, write, mixed
}

@main
struct LoadCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "vhost-user-load",
        abstract: "Drives a vhost-user-scsi or vhost-user-blk socket as a guest would, and measures it.",
        discussion: "It overwrites the device when it writes. One thread drives all queues.")

    @Option(help: "The socket of the target.")
    var socket: String
    @Option(name: .customLong("protocol"), help: "The device that the socket serves: scsi or blk.")
    var device: DeviceProtocol = .scsi
    @Option(help: "The SCSI target.")
    var target: UInt8 = 0
    @Option(help: "The logical unit number.")
    var lun: UInt16 = 0
    @Option(help: "Request queues, 1 to 64.")
    var queues = 1
    @Option(help: "Requests in flight on each queue, 1 to 1024; without --indirect at most 341.")
    var depth = 1
    @Option(help: "Bytes of each request, up to 4 MiB.")
    var blockSize = 4096
    @Option(help: "random or sequential.")
    var pattern: Pattern = .random
    @Option(help: "read, write or mixed.")
    var operation: Operation = .read
    @Option(help: "With --operation mixed: how many of 100 requests are reads.")
    var readPercent = 70
    @Option(help: "Seconds.")
    var runtime = 5.0
    @Option(help: "Use only the first bytes of the device.")
    var size: UInt64?
    @Option(help: "The seed of places and of the mix.")
    var seed: UInt64 = 1
    @Flag(help: "Stamp what is written with block, writer and sequence, and check what is read.")
    var verify = false
    @Flag(help: "Sleep until the target notifies, instead of polling.")
    var wait = false
    @Flag(help: "Put each request's descriptors into an indirect table.")
    var indirect = false
    @Flag(help: "Do without EVENT_IDX.")
    var noEventIndex = false
    @Flag(help: "Use packed rings, not split ones.")
    var packed = false
    @Option(help: "Measure this process: the target.")
    var pid: Int32?
    @Flag(help: "Write the result as JSON.")
    var json = false

    func validate() throws {
        guard 1...64 ~= queues else { throw ValidationError("--queues must be 1 to 64") }
        let deepest = indirect ? 1024 : 341
        guard 1...deepest ~= depth else {
            throw ValidationError("--depth must be 1 to \(deepest)\(indirect ? "" : "; --indirect allows 1024")")
        }
        guard blockSize > 0, blockSize <= 4 << 20, blockSize % 512 == 0 else {
            throw ValidationError("--block-size must be a multiple of 512, at most 4194304")
        }
        guard 0...100 ~= readPercent else { throw ValidationError("--read-percent must be 0 to 100") }
        guard runtime > 0, runtime <= 1e6 else { throw ValidationError("--runtime must be over 0, at most 1000000") }
        guard lun < 16_384 else { throw ValidationError("--lun must be under 16384") }
    }

    func run() throws {
        let plan = LoadPlan(
            socket: socket, device: device == .blk ? .block : .scsi(.flat(target: target, lun: lun)), queues: queues,
            depth: depth, requestLength: blockSize, pattern: pattern == .random ? .random : .sequential,
            readPercent: operation == .read ? 100 : operation == .write ? 0 : readPercent, seconds: runtime,
            size: size, verify: verify, waits: wait, isIndirect: indirect, usesEventIndex: !noEventIndex,
            isPacked: packed, seed: seed, process: pid.map(TargetProcess.init))
        let result = try LoadRun(plan).run()
        print(json ? Report(result, blockSize).json : Report(result, blockSize).text)
    }
}
