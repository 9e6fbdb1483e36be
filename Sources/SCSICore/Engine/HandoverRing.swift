// HandoverRing: what goes from one thread to one other: a bounded ring with one producer and one consumer, no locks.
//
// Owns: the entries and both positions. Called by: ShardLink, ShardGate. Must not know: what an entry means, threads.

import Synchronization

/// A bounded ring. One thread at a time pushes, and one other at a time consumes.
///
/// The producer publishes an entry by a release store of `tail`, which the consumer reads with acquire: what the
/// producer wrote before, the consumer sees. `head` gives the entry's place back in the same way. Each side's positions
/// have a cache line pair of their own, and each side reads the other's only when its own knowledge does not suffice.
@safe
final class HandoverRing<Entry: BitwiseCopyable> {
    /// How many entries fit: a power of two.
    let capacity: Int
    private let mask: Int
    private let entries: UnsafeMutablePointer<Entry>
    private let memory: UnsafeMutableRawPointer
    private let tail: UnsafeMutablePointer<Atomic<Int>>
    private let head: UnsafeMutablePointer<Atomic<Int>>
    /// What the producer knows of `head`, and the consumer of `tail`.
    private let knownHead: UnsafeMutablePointer<Int>
    private let knownTail: UnsafeMutablePointer<Int>

    private static var line: Int { 128 }

    /// A ring with room for at least `count` entries.
    init(atLeast count: Int) {
        precondition(count > 0 && count <= 1 << 20)
        var capacity = 1
        while capacity < count { capacity *= 2 }
        self.capacity = capacity
        mask = capacity - 1
        unsafe entries = .allocate(capacity: capacity)
        unsafe memory = .allocate(byteCount: 2 * Self.line, alignment: Self.line)
        unsafe tail = unsafe memory.bindMemory(to: Atomic<Int>.self, capacity: 1)
        unsafe tail.initialize(to: Atomic(0))
        unsafe knownHead = unsafe (memory + 64).bindMemory(to: Int.self, capacity: 1)
        unsafe knownHead.initialize(to: 0)
        unsafe head = unsafe (memory + Self.line).bindMemory(to: Atomic<Int>.self, capacity: 1)
        unsafe head.initialize(to: Atomic(0))
        unsafe knownTail = unsafe (memory + Self.line + 64).bindMemory(to: Int.self, capacity: 1)
        unsafe knownTail.initialize(to: 0)
    }

    deinit {
        unsafe entries.deallocate()
        unsafe tail.deinitialize(count: 1)
        unsafe head.deinitialize(count: 1)
        unsafe memory.deallocate()
    }

    // MARK: The producer

    /// Publishes an entry.
    ///
    /// - Returns: `false` if there is no room.
    func push(_ entry: Entry) -> Bool {
        let position = unsafe tail.pointee.load(ordering: .relaxed)
        if unsafe position &- knownHead.pointee == capacity {
            unsafe knownHead.pointee = unsafe head.pointee.load(ordering: .acquiring)
            if unsafe position &- knownHead.pointee == capacity { return false }
        }
        unsafe (entries + (position & mask)).initialize(to: entry)
        unsafe tail.pointee.store(position &+ 1, ordering: .releasing)
        return true
    }

    /// How many entries can be pushed.
    var room: Int {
        unsafe knownHead.pointee = unsafe head.pointee.load(ordering: .acquiring)
        return unsafe capacity - (tail.pointee.load(ordering: .relaxed) &- knownHead.pointee)
    }

    /// The position behind the last entry that was pushed.
    var pushedEnd: Int { unsafe tail.pointee.load(ordering: .relaxed) }

    /// The position up to which the consumer has given places back.
    var consumedEnd: Int { unsafe head.pointee.load(ordering: .acquiring) }

    // MARK: The consumer

    /// The position behind the last entry that is published at this moment.
    var publishedEnd: Int {
        unsafe knownTail.pointee = unsafe tail.pointee.load(ordering: .acquiring)
        return unsafe knownTail.pointee
    }

    /// The position of the next entry to consume.
    var position: Int { unsafe head.pointee.load(ordering: .relaxed) }

    /// The next entry, which stays in the ring until `consume`; `nil` if none is published.
    var first: Entry? {
        let position = self.position
        if unsafe position == knownTail.pointee, position == publishedEnd { return nil }
        return unsafe entries[position & mask]
    }

    /// Gives the place of the next entry back to the producer.
    func consume() { unsafe head.pointee.store(position &+ 1, ordering: .releasing) }

    /// Whether nothing is published.
    var isEmpty: Bool { position == publishedEnd }
}
