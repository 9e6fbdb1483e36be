// Serialization: which commands on overlapping extents may run at the same time: one matrix.
//
// Owns: the matrix and the filter that answers "surely no conflict" without a scan. Called by: TaskSet.
// Must not know: task attributes, commands.

/// What a younger command does about an older one that is still in the task set.
enum Hazard: UInt8 {
    /// Runs beside it.
    case pass
    /// Waits if their extents overlap.
    case overlap
    /// Waits.
    case wait
    /// Waits for commands of its own nexus if the order of SIMPLE commands is restricted.
    case waitIfRestricted
}

enum Serialization {
    /// The hazard matrix. Two overlapping commands of which one writes are not reordered and do not run at once: the
    /// result of overlapping writes would be neither's, and a read could see half of a write.
    ///
    /// That is more than QUEUE ALGORITHM MODIFIER 1 (unrestricted reordering, SPC-4 7.5.8) asks for, and for commands
    /// that touch blocks all that 0 (restricted reordering) asks for: what the medium holds in the end is what it would
    /// hold if the SIMPLE commands of a nexus had been carried out in their order. The last two rows are for commands
    /// that decide whether a later write of the same nexus happens at all.
    // swift-format-ignore
    static func hazard(younger: SerializationClass, older: SerializationClass) -> Hazard {
        switch (younger, older) {
        //    younger         older
        case (.none,          _):              .pass
        case (_,              .none):          .pass
        case (.read,          .read):          .pass
        case (.read,          .write):         .overlap
        case (.write,         .read):          .overlap
        case (.write,         .write):         .overlap
        case (.unitState,     _):              .waitIfRestricted
        case (_,              .unitState):     .waitIfRestricted
        case (_,              .writeAnywhere): .wait
        case (.writeAnywhere, _):              .wait
        }
    }

    /// Whether `younger` has to wait for `older`.
    ///
    /// - Parameter restricted: Whether QUEUE ALGORITHM MODIFIER is zero.
    static func conflicts(younger: TaskHandle, older: TaskHandle, restricted: Bool) -> Bool {
        guard let youngerRow = younger.row, let olderRow = older.row else { return false }
        switch hazard(younger: youngerRow.serialization, older: olderRow.serialization) {
        case .pass: return false
        case .wait: return true
        case .waitIfRestricted: return restricted && younger.nexus == older.nexus
        case .overlap:
            guard younger.blocks > 0, older.blocks > 0 else { return false }
            // Ranges are [address, address + blocks); no sum, because CDB fields are not checked against the medium
            // yet.
            return younger.address >= older.address
                ? younger.address &- older.address < older.blocks : older.address &- younger.address < younger.blocks
        }
    }
}

/// Counts the readers and writers of each stretch of the medium, so that in the common case a command learns in a few
/// loads that nothing overlaps it. Stretches share counters (the address is hashed by masking), so "perhaps" is
/// possible and "no" is certain.
@safe
struct ExtentFilter: ~Copyable {
    private static let buckets: UInt64 = 1024
    /// Log2 of the blocks of one stretch.
    private static let shift: UInt64 = 11
    /// Extents over more stretches than this are counted in `wide` instead.
    private static let wideStretches: UInt64 = 64

    private let readers: UnsafeMutablePointer<UInt16>
    private let writers: UnsafeMutablePointer<UInt16>
    private var wide = 0
    private var wideWriters = 0
    private var allReaders = 0
    private var allWriters = 0

    init() {
        unsafe readers = .allocate(capacity: Int(Self.buckets))
        unsafe writers = .allocate(capacity: Int(Self.buckets))
        unsafe readers.initialize(repeating: 0, count: Int(Self.buckets))
        unsafe writers.initialize(repeating: 0, count: Int(Self.buckets))
    }

    deinit {
        unsafe readers.deallocate()
        unsafe writers.deallocate()
    }

    /// Whether a command of this class on this extent may conflict with one that is counted.
    @inline(__always)
    func mayConflict(_ kind: SerializationClass, _ address: UInt64, _ blocks: UInt64) -> Bool {
        switch kind {
        case .none: return false
        case .writeAnywhere, .unitState: return allReaders + allWriters > 0
        case .read: return allWriters > 0 && check(address, blocks, againstReaders: false)
        case .write: return allReaders + allWriters > 0 && check(address, blocks, againstReaders: true)
        }
    }

    private func check(_ address: UInt64, _ blocks: UInt64, againstReaders: Bool) -> Bool {
        if againstReaders ? wide > 0 : wideWriters > 0 { return true }
        guard let stretches = Self.stretches(address, blocks) else { return true }
        var index = address >> Self.shift
        for _ in 0..<stretches {
            let bucket = Int(index & (Self.buckets - 1))
            if unsafe writers[bucket] != 0 || (againstReaders && readers[bucket] != 0) { return true }
            index &+= 1
        }
        return false
    }

    /// How many stretches an extent touches; `nil` for a wide one.
    @inline(__always)
    private static func stretches(_ address: UInt64, _ blocks: UInt64) -> UInt64? {
        if blocks > wideStretches << shift { return nil }
        return blocks == 0 ? 0 : ((address & (1 << shift - 1)) &+ blocks &- 1) >> shift &+ 1
    }

    /// Counts a command in (`by` = 1) or out (-1).
    @inline(__always)
    mutating func count(_ kind: SerializationClass, _ address: UInt64, _ blocks: UInt64, by change: Int) {
        switch kind {
        case .none: return
        case .writeAnywhere, .unitState:
            allWriters += change
            wide += change
            wideWriters += change
            return
        case .read: allReaders += change
        case .write: allWriters += change
        }
        guard let stretches = Self.stretches(address, blocks) else {
            wide += change
            if kind == .write { wideWriters += change }
            return
        }
        let counters = unsafe kind == .read ? readers : writers
        var index = address >> Self.shift
        for _ in 0..<stretches {
            let bucket = Int(index & (Self.buckets - 1))
            unsafe counters[bucket] = UInt16(Int(counters[bucket]) + change)
            index &+= 1
        }
    }
}
