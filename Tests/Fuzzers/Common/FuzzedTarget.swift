// FuzzedTarget: a target with a unit on a scripted medium, for the fuzzers of the fronts; and the reactor that they
// turn by hand.
//
// Owns: the shard and the reactor of the process, and for each input a target, a unit, a medium. Called by: the fuzzers
// of the fronts. Must not know: fronts.

import CFuzzer
import CLinux
import CoreTestSupport
import Glibc
import Reactor
import SCSICore

final class FuzzedTarget {
    /// As they cost more to make than an input takes, all inputs share them; an input must leave them as they were.
    nonisolated(unsafe) static let shard = Shard()
    static let reactor: Reactor = {
        var configuration = Reactor.Configuration()
        configuration.pollMicroseconds = 0
        // The turns of io_uring depend on when the kernel gets to its work.
        configuration.engine = .libaio
        let reactor = try! Reactor(configuration)
        // A descriptor that is always ready has it look at the others in each turn.
        let ready = eventfd(1, Int32(EFD_CLOEXEC))
        _ = unsafe try! reactor.watch(
            ready, events: EPOLLIN.rawValue, { _, _ in }, UnsafeMutableRawPointer(bitPattern: 1)!)
        return reactor
    }()

    let target: TargetDevice
    let medium: ScriptedBackstore
    let unit: LogicalUnit
    private(set) var more: (unit: LogicalUnit, medium: ScriptedBackstore)?

    init() {
        unsafe Self.shard.now = 0
        target = unsafe TargetDevice(name: 0x3001_4054_0000_00ff, shard: Self.shard)
        medium = ScriptedBackstore(blocks: 64, violations: Violations())
        unit = unsafe LogicalUnit(
            configuration: Self.configuration(1), backstore: medium.handle, shard: Self.shard)
        let added = target.add(unit, at: LUN(0)!)
        precondition(added)
    }

    /// Nanoseconds, of commands for which the transport gives no deadline.
    private static let timeout: UInt64 = 1_000_000_000

    private static func configuration(_ number: UInt64) -> LogicalUnitConfiguration {
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0000 + number, serial: "SERIAL\(number)")
        configuration.commandTimeout = timeout
        return configuration
    }

    /// Maps a second unit, or takes it away.
    func toggleUnit() {
        if let more {
            guard more.medium.pending.isEmpty else { return }
            target.remove(at: LUN(1)!) { [self] in self.more = nil }
        } else {
            let medium = ScriptedBackstore(blocks: 8, violations: Violations())
            let unit = unsafe LogicalUnit(
                configuration: Self.configuration(2), backstore: medium.handle, shard: Self.shard)
            if target.add(unit, at: LUN(1)!) { more = (unit: unit, medium: medium) }
        }
    }

    /// Completes one request of the medium, as the input says.
    func complete(_ input: inout FuzzInput) {
        let choice = input.byte()
        let medium = choice & 0x40 != 0 ? more?.medium ?? medium : medium
        guard !medium.pending.isEmpty else { return }
        medium.complete(Int(choice & 0x0f) % medium.pending.count, error: choice & 0x30 == 0x30 ? 5 : 0)
    }

    /// Completes all that the media have, and what follows. Only an ACA condition keeps commands then, which the guest
    /// may never clear: a reset ends them.
    func completeAll() {
        complete()
        guard tasksInFlight > 0 else { return }
        let kept = [unit, more?.unit].compactMap(\.self).flatMap { $0.tasks(limit: 1024) }
        precondition(kept.allSatisfy { $0.state == "blocked" || $0.state == "dormant" }, "commands hang")
        target.hardReset()
        complete()
    }

    private func complete() {
        repeat {
            unsafe Self.shard.retryWaiting()
            medium.completeAll()
            more?.medium.completeAll()
        } while unsafe Self.shard.hasWaiting || !medium.pending.isEmpty || !(more?.medium.pending.isEmpty ?? true)
    }

    private var tasksInFlight: Int { unit.tasksInFlight + (more?.unit.tasksInFlight ?? 0) }

    /// Nothing may be left when all nexuses are lost.
    func checkIdle() {
        precondition(tasksInFlight == 0, "a task set is not empty at the end")
        precondition(unsafe !Self.shard.hasWaiting, "tasks wait that nobody has sent")
    }
}

/// Which file descriptors are open.
struct OpenDescriptors: Equatable {
    private let words: [UInt64]

    init() {
        // What lives as long as the process has its descriptors first.
        _ = (FuzzedTarget.reactor, Mutator.shared)
        var words = [UInt64](repeating: 0, count: 2)
        unsafe fuzzer_descriptors(&words)
        self.words = words
    }
}
