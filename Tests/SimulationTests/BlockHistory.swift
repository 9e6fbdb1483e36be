// BlockHistory: which values a READ may return, block by block, if each command takes effect at one moment between its
// arrival and its end.
//
// Called by: the simulator. Must not know: tasks, the engine.

/// One write of one block.
final class BlockWrite {
    enum Effect { case inFlight, certain, possible, none }

    let value: UInt64
    let begin: Int
    var end = Int.max
    var effect = Effect.inFlight
    /// The latest moment at which it can have taken effect.
    var latest = Int.max

    init(value: UInt64, begin: Int) {
        self.value = value
        self.begin = begin
    }

    func finish(_ effect: Effect, at time: Int) {
        self.effect = self.effect == .certain ? .certain : effect
        end = time
        latest = min(latest, time)
    }
}

/// The history of one medium. A value of 0 is a block of zeros.
struct BlockHistory {
    private var writes: [UInt64: [BlockWrite]] = [:]

    /// A write of `count` blocks arrives; block n gets the n-th value.
    mutating func begin(_ address: UInt64, _ values: [UInt64], at time: Int) -> [BlockWrite] {
        let blocks = values.map { BlockWrite(value: $0, begin: time) }
        for (offset, write) in blocks.enumerated() { writes[address &+ UInt64(offset), default: []].append(write) }
        return blocks
    }

    /// Checks a value that a READ returned which arrived at `begin` and ends at `end`.
    ///
    /// - Returns: What is wrong with it, `nil` if it is possible.
    mutating func check(_ address: UInt64, _ value: UInt64, begin: Int, end: Int) -> String? {
        let all = writes[address] ?? []
        let initial = BlockWrite(value: 0, begin: -1)
        initial.finish(.certain, at: -1)
        let candidates = (value == 0 ? [initial] : []) + all.filter { $0.value == value && $0.effect != .none }
        if candidates.isEmpty { return "block \(address) holds \(value), which nobody wrote there" }
        let possible = candidates.filter { candidate in
            !all.contains { $0.effect == .certain && $0.begin > candidate.latest && $0.latest < begin }
        }
        if possible.isEmpty { return "block \(address) holds \(value), which was overwritten before the READ began" }
        if possible.count == 1, possible[0].effect != .none {
            possible[0].effect = .certain
            possible[0].latest = min(possible[0].latest, end)
        }
        return nil
    }
}
