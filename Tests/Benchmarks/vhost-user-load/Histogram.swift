// Histogram: latencies in buckets of equal relative width.
//
// Owns: the counts. Called by: LoadStream, Report. Must not know: what was measured.

/// Counts of durations in nanoseconds. A bucket is at most 1/32 of its value wide.
@safe
final class Histogram {
    private static let subBits = 5
    private static let capacity = 64 << subBits

    private let counts: UnsafeMutablePointer<UInt64>
    private(set) var total: UInt64 = 0
    private(set) var sum: UInt64 = 0
    private(set) var maximum: UInt64 = 0

    init() {
        unsafe counts = .allocate(capacity: Self.capacity)
        unsafe counts.initialize(repeating: 0, count: Self.capacity)
    }

    deinit { unsafe counts.deallocate() }

    private static func bucket(_ value: UInt64) -> Int {
        let bits = UInt64.bitWidth - value.leadingZeroBitCount
        let shift = max(0, bits - 1 - subBits)
        return shift << subBits + Int(value >> UInt64(shift))
    }

    /// The largest value of a bucket.
    private static func limit(_ bucket: Int) -> UInt64 {
        let shift = max(0, bucket >> subBits - 1)
        let first = UInt64(bucket - shift << subBits) << UInt64(shift)
        return first + (1 << UInt64(shift)) - 1
    }

    func record(_ nanoseconds: UInt64) {
        unsafe counts[Self.bucket(nanoseconds)] += 1
        total += 1
        sum += nanoseconds
        maximum = max(maximum, nanoseconds)
    }

    func add(_ other: Histogram) {
        for index in 0..<Self.capacity { unsafe counts[index] += other.counts[index] }
        total += other.total
        sum += other.sum
        maximum = max(maximum, other.maximum)
    }

    /// The nanoseconds that the fraction of all stays within.
    func percentile(_ fraction: Double) -> UInt64 {
        let wanted = UInt64((Double(total) * fraction).rounded(.up))
        var seen: UInt64 = 0
        for index in 0..<Self.capacity {
            unsafe seen += counts[index]
            if seen >= wanted, seen > 0 { return min(Self.limit(index), maximum) }
        }
        return maximum
    }

    var mean: Double { total == 0 ? 0 : Double(sum) / Double(total) }
}
