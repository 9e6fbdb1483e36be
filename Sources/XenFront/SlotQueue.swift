// SlotQueue: the numbers of ring slots in some order, in one word.
//
// Called by: XenPort. Must not know: what the order means.

/// A first-in first-out queue of slot numbers, each in it at most once: four bits a number, so 16 fit 64 bits.
struct SlotQueue: Equatable {
    private var numbers: UInt64 = 0
    private(set) var count = 0

    @inline(__always)
    var isEmpty: Bool { count == 0 }

    /// The number that would be removed next.
    @inline(__always)
    var first: Int? { count == 0 ? nil : Int(numbers & 0xf) }

    @inline(__always)
    mutating func append(_ slot: Int) {
        precondition(count < 16 && slot >= 0 && slot < 16)
        numbers |= UInt64(slot) << UInt64(4 * count)
        count += 1
    }

    @inline(__always)
    mutating func removeFirst() -> Int? {
        guard count > 0 else { return nil }
        let slot = Int(numbers & 0xf)
        numbers >>= 4
        count -= 1
        return slot
    }

    /// Takes a number out of the middle; the others keep their order.
    mutating func remove(_ slot: Int) {
        var rest = SlotQueue()
        while let next = removeFirst() { if next != slot { rest.append(next) } }
        self = rest
    }
}
