// ShardReactor: a reactor with its shard, as one of several that serve the same devices: the links between it and the
// other shards, and calls from one reactor's thread to another's.
//
// Owns: the gate of its shard, the links from its thread into all shards that it uses. Called by: the daemon (set up),
// VirtioSCSIDevice (links, calls), the reactor. Must not know: virtio, what is called.
//
// A call runs a function on the other thread and waits for it. It is for set up and tear down, never for a command.
// Two threads may call each other: whoever waits serves the calls of others meanwhile.

import CLinux
import Glibc
public import Reactor
public import SCSICore
import Synchronization

/// A reactor and its shard, between which and others commands cross. Made before the reactor runs; lives as long as the
/// daemon.
@safe
public final class ShardReactor: @unchecked Sendable {
    /// Commands under way in one link; what a guest has beyond it stays in its rings.
    static let linkCapacity = 1024

    let reactor: Reactor
    let shard: Shard
    // The thread's own.
    private let gate: ShardGate
    private var links: [(shard: Shard, link: ShardLink)] = []

    /// Calls from other threads, in the order in which they came.
    private let calls = Mutex<[Call]>([])
    /// Rung when there is a call for this thread, or the one that it waits for has ended.
    private let bell: Int32

    /// A function that runs on another thread.
    private final class Call: @unchecked Sendable {
        private let body: () -> Void
        let isDone = Atomic<Bool>(false)
        private let caller: ShardReactor

        init(_ body: @escaping () -> Void, from caller: ShardReactor) {
            self.body = body
            self.caller = caller
        }

        func run() {
            body()
            isDone.store(true, ordering: .releasing)
            caller.ring()
        }
    }

    /// A reactor with the shard that its thread drives.
    public init(reactor: Reactor, shard: Shard) {
        self.reactor = reactor
        self.shard = shard
        gate = ShardGate(shard: shard)
        bell = eventfd(0, Int32(EFD_CLOEXEC))
        precondition(bell >= 0, "no file descriptor for a reactor's bell")
        _ = unsafe reactor.add(
            Reactor.WorkSource(
                poll: { unsafe Unmanaged<ShardReactor>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.poll() } },
                flush: { unsafe Unmanaged<ShardReactor>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.flush() } },
                prepareToSleep: {
                    unsafe Unmanaged<ShardReactor>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.prepareToSleep() }
                },
                context: Unmanaged.passUnretained(self).toOpaque()))
    }

    deinit { close(bell) }

    // MARK: Calls between threads

    /// Runs a function on another reactor's thread and waits for its result. On this reactor's thread. The other one
    /// must be running.
    func call<Result>(_ other: ShardReactor, _ body: @escaping () -> Result) -> Result {
        if other === self { return body() }
        var result: Result?
        let call = Call({ result = body() }, from: self)
        other.calls.withLock { $0.append(call) }
        // It may be waiting for a call of its own, or sleep.
        other.ring()
        other.reactor.post { other.serveCalls() }
        while !call.isDone.load(ordering: .acquiring) {
            serveCalls()
            if call.isDone.load(ordering: .acquiring) { break }
            var count: eventfd_t = 0
            _ = unsafe eventfd_read(bell, &count)
        }
        return result!
    }

    private func ring() { _ = eventfd_write(bell, 1) }

    private func serveCalls() {
        while let call = calls.withLock({ $0.isEmpty ? nil : $0.removeFirst() }) { call.run() }
    }

    // MARK: Links

    /// The link from this thread into another shard, or its own. On this reactor's thread.
    func link(to owner: ShardReactor) -> ShardLink {
        if let found = links.first(where: { $0.shard === owner.shard })?.link { return found }
        let (ownerWaker, portWaker) = (owner.waker, waker)
        let link = call(owner) {
            owner.gate.addLink(capacity: Self.linkCapacity, wakeOwner: ownerWaker, wakePort: portWaker)
        }
        links.append((owner.shard, link))
        return link
    }

    private var waker: ShardWaker {
        unsafe ShardWaker(
            { context in unsafe Unmanaged<ShardReactor>.fromOpaque(context)._withUnsafeGuaranteedRef { $0.wake() } },
            context: Unmanaged.passUnretained(self).toOpaque())
    }

    /// From any thread.
    private func wake() { reactor.post {} }

    // MARK: Nexuses of this shard's targets; on this reactor's thread

    func establishNexus(
        initiatorPort: String, targetPort: UInt16, target: TargetDevice, port: TargetPortHandle, events: ShardLink,
        whenGone: @escaping @Sendable (ShardLink) -> Void
    ) -> LinkedNexus? {
        gate.establishNexus(
            initiatorPort: initiatorPort, targetPort: targetPort, target: target, port: port, events: events,
            whenGone: whenGone)
    }

    func loseNexus(_ nexus: LinkedNexus) { gate.loseNexus(nexus) }

    // MARK: The reactor's side

    private func poll() -> Bool {
        var worked = gate.receive()
        for entry in links where entry.link.receive() { worked = true }
        return worked
    }

    private func flush() {
        gate.flush()
        for entry in links { entry.link.flush() }
    }

    private func prepareToSleep() -> Bool {
        // What others did in this turn after our flush.
        flush()
        var hasWork = gate.prepareToSleep()
        for entry in links where entry.link.prepareToSleep() { hasWork = true }
        return hasWork
    }
}
