// CrashTests: targetd is killed at random moments and started again, and no write is lost, doubled or corrupted.
//
// Called by: swift test, where targetd was built (TARGETD_EXECUTABLE, or beside the tests). TARGETD_KILLS says how
// often, 8 times without it. Must not know: how targetd is written.

import CoreTestSupport
import Glibc
import Testing
import VhostUserInitiator

/// A targetd process with one file as its disk.
private final class KilledDaemon {
    let executable: String
    let directory: String
    var socket: String { directory + "/socket" }
    private let isSpread: Bool
    private var process: pid_t = 0
    private var errors: Int32 = -1

    /// - Parameter isSpread: The queues are dealt out over two reactors.
    init(executable: String, isSpread: Bool) throws {
        self.executable = executable
        self.isSpread = isSpread
        // mkdtemp replaces the six letters.
        var template = Array(("/tmp/targetd-crash-" + String(repeating: "X", count: 6)).utf8CString)
        directory = unsafe String(cString: mkdtemp(&template)!)
        try start()
    }

    deinit {
        kill()
        for name in ["disk", "socket", "file.yaml"] { unsafe unlink(directory + "/" + name) }
        unsafe rmdir(directory)
    }

    /// Starts it and waits until guests can attach.
    func start() throws {
        var ends: [Int32] = [-1, -1]
        precondition(unsafe pipe(&ends) == 0)
        for end in ends { _ = fcntl(end, F_SETFD, FD_CLOEXEC) }
        errors = ends[0]
        var actions = unsafe posix_spawn_file_actions_t()
        unsafe posix_spawn_file_actions_init(&actions)
        unsafe posix_spawn_file_actions_adddup2(&actions, ends[1], 1)
        unsafe posix_spawn_file_actions_adddup2(&actions, ends[1], 2)
        let arguments =
            isSpread
            ? [executable, "--config", try writeConfiguration()]
            : [executable, "--file", directory + "/disk", "--size", "1MiB", "--vhost-user", socket, "--queues", "2"]
        var pointers = unsafe arguments.map { unsafe strdup($0) } + [nil]
        let code = unsafe posix_spawn(&process, executable, &actions, nil, &pointers, environ)
        for index in unsafe pointers.indices { unsafe free(pointers[index]) }
        unsafe posix_spawn_file_actions_destroy(&actions)
        close(ends[1])
        guard code == 0 else { throw InitiatorError.systemCall("posix_spawn of \(executable)", errno: code) }
        var text: [UInt8] = []
        let ready = Array("ready\n".utf8)
        while !(text.count >= ready.count && text.suffix(ready.count).elementsEqual(ready)) {
            var byte: UInt8 = 0
            guard unsafe read(errors, &byte, 1) == 1 else {
                throw InitiatorError.protocolViolation("it ended at start: \(String(decoding: text, as: UTF8.self))")
            }
            text.append(byte)
        }
    }

    /// Writes the file of a daemon with two reactors; its path.
    private func writeConfiguration() throws -> String {
        let path = directory + "/file.yaml"
        let text = """
            reactors: 2
            backstores: { disk: { type: file, path: \(directory)/disk, size: 1MiB } }
            targets: { naa.6001405000000001: { luns: { 0: disk } } }
            vhost-user-scsi:
              - { socket: \(socket), queues: 2, spread: true, targets: { 0: naa.6001405000000001 } }

            """
        let file = unsafe open(path, O_WRONLY | O_CREAT | O_TRUNC, 0o600)
        defer { close(file) }
        let bytes = Array(text.utf8)
        guard file >= 0, unsafe write(file, bytes, bytes.count) == bytes.count else {
            throw InitiatorError.systemCall("write \(path)", errno: errno)
        }
        return path
    }

    /// Ends it at once, and waits until it is gone.
    func kill() {
        guard process > 0 else { return }
        _ = Glibc.kill(process, SIGKILL)
        var status: Int32 = 0
        while unsafe waitpid(process, &status, 0) < 0, errno == EINTR {}
        process = 0
        close(errors)
    }
}

/// What keeps a daemon busy until it is killed: a request queue and blocks of its own.
private protocol Load: AnyObject {
    var queue: DriverQueue { get }
    /// Commands that have ended.
    var completions: Int { get }
    /// Keeps so many commands in flight, each to another block.
    func fill(_ random: inout SystemRandomNumberGenerator)
    /// Takes what has ended; throws if anything was answered that was not in flight.
    func collect() throws
}

/// Writes whose contents tell which they are.
private final class Writer: Load {
    static let blocks = 64
    static let depth = 16

    let number: Int
    let queue: DriverQueue
    private var sequence: UInt64 = 0
    /// The last write of each block that was acknowledged.
    private var acknowledged: [UInt32: UInt64] = [:]
    private var inFlight: [UInt32: (sequence: UInt64, request: SCSIInFlight)] = [:]
    private(set) var completions = 0

    init(number: Int, queue: DriverQueue) {
        self.number = number
        self.queue = queue
    }

    var isIdle: Bool { inFlight.isEmpty }

    /// What a block holds: LBA, writer and sequence, over and over.
    private func content(_ block: UInt32, _ sequence: UInt64) -> [UInt8] {
        let words = WireBytes.of(UInt64(block), UInt64(number), sequence, ~sequence)
        return (0..<16).flatMap { _ in words }
    }

    private func send(_ block: UInt32, _ sequence: UInt64) {
        var command = write10(unit(0), block: block, content(block, sequence))
        command.layout = ChainLayout(isIndirect: sequence % 3 == 0)
        inFlight[block] = (sequence, queue.submit(command))
    }

    func fill(_ random: inout SystemRandomNumberGenerator) {
        while inFlight.count < Self.depth {
            let block = UInt32(number * Self.blocks + Int.random(in: 0..<Self.blocks, using: &random))
            if inFlight[block] != nil { continue }
            sequence += 1
            send(block, sequence)
        }
    }

    func collect() throws {
        try queue.collect()
        for (block, write) in inFlight where write.request.chain.isComplete {
            let result = try write.request.result()
            inFlight[block] = nil
            if result.status == 2, result.senseKey == 6 {
                // A unit attention of the new nexus: the command was not carried out.
                send(block, write.sequence)
            } else {
                #expect(result.isGood)
                acknowledged[block] = write.sequence
                completions += 1
            }
        }
    }

    func drain() throws {
        while !isIdle {
            try collect()
            if !isIdle { try queue.waitForUsed() }
        }
    }

    /// Each block is as its last acknowledged write left it.
    func verify() throws {
        for (block, sequence) in acknowledged {
            let result = try queue.runPastUnitAttentions(read10(unit(0), block: block, count: 1))
            #expect(result.isGood && result.dataIn == content(block, sequence), "block \(block)")
        }
    }
}

/// What must not be carried out twice: XDWRITEREAD and XPWRITE.
private final class Inverter: Load {
    private enum Kind { case exchange, invert, look }

    private struct Flight {
        let kind: Kind
        /// What the block holds before and, if it is carried out once, after it.
        let before: [UInt8], after: [UInt8]
        let command: SCSICommand
        let request: SCSIInFlight
    }

    static let blocks = 64
    static let depth = 16

    let queue: DriverQueue
    private let first: UInt32
    private var contents: [UInt32: [UInt8]] = [:]
    private var inFlight: [UInt32: Flight] = [:]
    private(set) var completions = 0
    /// Commands of which a daemon that was started again could not know whether they had been carried out.
    private(set) var refusals = 0

    init(number: Int, queue: DriverQueue) {
        first = UInt32(number * Self.blocks)
        self.queue = queue
    }

    private static func exclusiveOr(_ left: [UInt8], _ right: [UInt8]) -> [UInt8] { zip(left, right).map { $0 ^ $1 } }

    private func send(_ kind: Kind, _ block: UInt32, before: [UInt8], after: [UInt8], _ command: SCSICommand) {
        inFlight[block] = Flight(
            kind: kind, before: before, after: after, command: command, request: queue.submit(command))
    }

    func fill(_ random: inout SystemRandomNumberGenerator) {
        while inFlight.count < Self.depth {
            let block = first + UInt32.random(in: 0..<UInt32(Self.blocks), using: &random)
            if inFlight[block] != nil { continue }
            let before = contents[block] ?? [UInt8](repeating: 0, count: 512)
            let data = (0..<512).map { _ in UInt8.random(in: 0...255, using: &random) }
            if Bool.random(using: &random) {
                let command = SCSICommand(unit(0), CDB.xdWriteRead(UInt64(block), 1), dataOut: data, dataIn: 512)
                send(.exchange, block, before: before, after: data, command)
            } else {
                let command = SCSICommand(unit(0), CDB.xpWrite(UInt64(block), 1), dataOut: data)
                send(.invert, block, before: before, after: Self.exclusiveOr(before, data), command)
            }
        }
    }

    private func look(_ block: UInt32, before: [UInt8], after: [UInt8]) {
        send(.look, block, before: before, after: after, read10(unit(0), block: block, count: 1))
    }

    func collect() throws {
        try queue.collect()
        for (block, flight) in inFlight where flight.request.chain.isComplete {
            let result = try flight.request.result()
            inFlight[block] = nil
            if result.status == 2, result.senseKey == 6 {
                // A unit attention of the new nexus: the command was not carried out.
                send(flight.kind, block, before: flight.before, after: flight.after, flight.command)
            } else if result.status == 2, result.senseKey == 0xb, flight.kind != .look {
                // Carried out or not, once.
                refusals += 1
                look(block, before: flight.before, after: flight.after)
            } else {
                ended(block, flight, result)
            }
        }
    }

    private func ended(_ block: UInt32, _ flight: Flight, _ result: SCSIResult) {
        #expect(result.isGood, "block \(block)")
        contents[block] = flight.after
        switch flight.kind {
        case .exchange:
            let isRight = result.dataIn == Self.exclusiveOr(flight.before, flight.after)
            #expect(isRight, "block \(block) was another one")
        case .invert: break
        case .look:
            let isRight = result.dataIn == flight.before || result.dataIn == flight.after
            #expect(isRight, "block \(block) was written twice")
            contents[block] = result.dataIn
        }
        completions += 1
    }

    /// Waits for all, and has each block read: it is as its last command left it.
    func drainAndVerify() throws {
        try drain()
        for (block, content) in contents {
            if inFlight.count == Self.depth { try drain() }
            look(block, before: content, after: content)
        }
        try drain()
    }

    private func drain() throws {
        while !inFlight.isEmpty {
            try collect()
            if !inFlight.isEmpty { try queue.waitForUsed() }
        }
    }
}

@Suite struct CrashTests {
    /// Where targetd is, if it was built.
    private static let executable: String? = {
        if let path = unsafe getenv("TARGETD_EXECUTABLE") { return unsafe String(cString: path) }
        var bytes = [UInt8](repeating: 0, count: 4096)
        let length = unsafe readlink("/proc/self/exe", &bytes, bytes.count)
        let own = String(decoding: bytes.prefix(max(length, 0)), as: UTF8.self)
        guard let slash = own.lastIndex(of: "/") else { return nil }
        let path = own[...slash] + "targetd"
        return unsafe access(String(path), X_OK) == 0 ? String(path) : nil
    }()
    private static let kills = unsafe getenv("TARGETD_KILLS").flatMap { unsafe Int(String(cString: $0)) } ?? 8

    /// Whether the daemon is to be killed once more: at least as often as was said, and until something was in flight.
    private static func goesOn(after rounds: Int, found: Bool) -> Bool {
        rounds < (kills + 1) / 2 || !found && rounds < 200
    }

    private static func kill(
        _ daemon: KilledDaemon, under loads: [some Load], _ random: inout SystemRandomNumberGenerator
    ) throws {
        let goal = loads[0].completions + Int.random(in: 0..<40, using: &random)
        while loads[0].completions < goal {
            for load in loads { load.fill(&random) }
            try loads[0].queue.waitForUsed()
            for load in loads { try load.collect() }
        }
        for load in loads { load.fill(&random) }
        // Now they have just been sent, now some have ended, now all have.
        usleep(UInt32.random(in: 0..<[1, 50, 200, 1500].randomElement(using: &random)!, using: &random))
        daemon.kill()
    }

    private static func options(_ isPacked: Bool) -> VhostUserFrontEnd.Options {
        var options = VhostUserFrontEnd.Options()
        options.queues = 4
        options.ringSize = 64
        options.features |= VirtioFeatureBit.inOut | (isPacked ? VirtioFeatureBit.ringPacked : 0)
        options.protocolFeatures |= VhostUserProtocolBit.inflightSharedMemory
        return options
    }

    @Test(.enabled(if: executable != nil), arguments: [false, true], [false, true])
    func noWriteIsLostDoubledOrCorruptedByKillsAtRandomMoments(_ isPacked: Bool, _ isSpread: Bool) throws {
        let daemon = try KilledDaemon(executable: try #require(Self.executable), isSpread: isSpread)
        let frontEnd = try VhostUserFrontEnd.started(path: daemon.socket, options: Self.options(isPacked))
        try #require(frontEnd.inflight != nil)
        let writers = (0..<2).map { Writer(number: $0, queue: frontEnd.queues[2 + $0]) }
        var random = SystemRandomNumberGenerator()
        var (rounds, resent) = (0, 0)
        while Self.goesOn(after: rounds, found: resent > 0) {
            rounds += 1
            try Self.kill(daemon, under: writers, &random)
            for writer in writers { try writer.collect() }
            resent += writers.count { !$0.isIdle }
            try daemon.start()
            try frontEnd.reconnect()
            if rounds % 10 == 0 {
                for writer in writers { try writer.drain() }
                for writer in writers { try writer.verify() }
            }
        }
        for writer in writers { try writer.drain() }
        for writer in writers { try writer.verify() }
        #expect(resent > 0, "no kill found anything in flight: nothing was tested")
    }

    @Test(.enabled(if: executable != nil), arguments: [false, true], [false, true])
    func whatMustNotBeRepeatedIsCarriedOutOnceOrRefused(_ isPacked: Bool, _ isSpread: Bool) throws {
        let daemon = try KilledDaemon(executable: try #require(Self.executable), isSpread: isSpread)
        let frontEnd = try VhostUserFrontEnd.started(path: daemon.socket, options: Self.options(isPacked))
        let writers = (0..<2).map { Inverter(number: $0, queue: frontEnd.queues[2 + $0]) }
        var random = SystemRandomNumberGenerator()
        var rounds = 0
        while Self.goesOn(after: rounds, found: writers.contains { $0.refusals > 0 }) {
            rounds += 1
            try Self.kill(daemon, under: writers, &random)
            try daemon.start()
            try frontEnd.reconnect()
        }
        for writer in writers { try writer.drainAndVerify() }
        #expect(writers.contains { $0.refusals > 0 }, "no kill found anything in flight: nothing was tested")
    }
}
