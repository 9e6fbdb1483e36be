// LoadStream: one queue under load: what each slot does next, and how long it took.
//
// Owns: the state of each slot, the histogram of the queue. Called by: LoadRun. Must not know: options, reports.

import Glibc
import VhostUserInitiator

/// What a stream sends.
struct Load {
    enum Pattern { case random, sequential }

    var pattern: Pattern
    /// Of 100 requests, how many are reads.
    var readPercent: Int
    /// The first place and the number of places, in requests.
    var first: Int
    var count: Int
    var requestLength: Int
    var seed: UInt64
}

/// One queue under load.
@safe
final class LoadStream {
    private struct Slot {
        var start: UInt64 = 0
        var place = 0
        var sequence: UInt32 = 0
        var isWrite = false
    }

    let queue: LoadQueue
    let latency = Histogram()
    private(set) var reads: UInt64 = 0
    private(set) var writes: UInt64 = 0
    private(set) var inFlight = 0
    private let load: Load
    private let verification: Verification?
    private let firstWriter: UInt16
    private let slots: UnsafeMutablePointer<Slot>
    private var random: UInt64
    private var next = 0

    init(queue: LoadQueue, load: Load, verification: Verification?, firstWriter: UInt16) {
        self.queue = queue
        self.load = load
        self.verification = verification
        self.firstWriter = firstWriter
        random = load.seed | 1
        unsafe slots = .allocate(capacity: queue.depth)
        unsafe slots.initialize(repeating: Slot(), count: queue.depth)
    }

    deinit { unsafe slots.deallocate() }

    static func now() -> UInt64 {
        var time = timespec()
        _ = unsafe clock_gettime(CLOCK_MONOTONIC, &time)
        return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
    }

    /// Fills the queue.
    func begin() {
        let now = Self.now()
        for slot in 0..<queue.depth { submit(slot, now) }
        queue.publish()
    }

    /// Takes completions; sends as many anew unless the end has come. Returns how many there were.
    func turn(until end: UInt64) throws -> Int {
        let count = try queue.pollCompletions()
        guard count > 0 else { return 0 }
        let now = Self.now()
        for index in 0..<count {
            let slot = queue.completed(index)
            try finish(slot, now)
            if now < end { submit(slot, now) }
        }
        queue.publish()
        return count
    }

    private func submit(_ slot: Int, _ now: UInt64) {
        let isWrite = load.readPercent < 100 && (load.readPercent == 0 || Int(nextRandom() % 100) >= load.readPercent)
        let place = choosePlace(isWrite)
        unsafe slots[slot].start = now
        unsafe slots[slot].place = place
        unsafe slots[slot].isWrite = isWrite
        let offset = UInt64(place) * UInt64(load.requestLength)
        if isWrite {
            if let verification {
                unsafe slots[slot].sequence = verification.stamp(
                    queue.data(slot), range: place, writer: firstWriter + UInt16(slot))
            }
            queue.submitWrite(slot, offset: offset)
        } else {
            queue.submitRead(slot, offset: offset)
        }
        inFlight += 1
    }

    private func choosePlace(_ isWrite: Bool) -> Int {
        while true {
            var place = load.first
            switch load.pattern {
            case .random:
                // The high half of a product: as even as a remainder, and no division.
                place += Int(nextRandom().multipliedFullWidth(by: UInt64(load.count)).high)
            case .sequential:
                place += next
                next = next + 1 == load.count ? 0 : next + 1
            }
            guard let verification else { return place }
            if verification.begin(place, isWrite: isWrite) { return place }
        }
    }

    private func nextRandom() -> UInt64 {
        random ^= random << 13
        random ^= random >> 7
        random ^= random << 17
        return random &* 0x2545_f491_4f6c_dd1d
    }

    private func finish(_ slot: Int, _ now: UInt64) throws {
        inFlight -= 1
        let state = unsafe slots[slot]
        guard queue.succeeded(slot) else {
            let offset = UInt64(state.place) * UInt64(load.requestLength)
            throw LoadError(
                "the \(state.isWrite ? "write" : "read") at byte \(offset) failed: \(queue.verdict(slot))")
        }
        latency.record(now - state.start)
        if state.isWrite { writes += 1 } else { reads += 1 }
        guard let verification else { return }
        if state.isWrite {
            verification.endWrite(range: state.place, writer: firstWriter + UInt16(slot), sequence: state.sequence)
        } else if let problem = unsafe verification.endRead(queue.data(slot), range: state.place) {
            throw LoadError("verification failed: \(problem)")
        }
    }
}
