public final class Shard {
    public init() {}
    /// Nanoseconds of a monotonic clock; the driver of the core sets it before it hands anything in.
    public var now: UInt64 = 0
}
