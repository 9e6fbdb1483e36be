// Timers: what is to be called at which time, a binary heap.
//
// Owns: the heap. Called by: Reactor. Must not know: clocks.

/// Names one timer.
public struct TimerToken: Sendable, Equatable {
    let index: UInt32
    let generation: UInt32
}

/// The timers that are set, the earliest on top; equal times in the order in which they were set.
@safe
struct TimerHeap: ~Copyable {
    typealias Handler = @convention(c) (UnsafeMutableRawPointer) -> Void

    @unsafe
    private struct Entry {
        var time: UInt64 = 0
        var order: UInt64 = 0
        var handler: Handler?
        var context: UnsafeMutableRawPointer?
        var generation: UInt32 = 0
        /// Its place in the heap, or -1 if it is not set.
        var place: Int32 = -1
    }

    private let entries: UnsafeMutablePointer<Entry>
    /// Entries by heap order; the rest, from `count` on, are the free ones.
    private let heap: UnsafeMutablePointer<UInt32>
    private(set) var count = 0
    private var order: UInt64 = 0

    init() {
        let capacity = ReactorLimits.timers
        unsafe entries = .allocate(capacity: capacity)
        unsafe entries.initialize(repeating: Entry(), count: capacity)
        unsafe heap = .allocate(capacity: capacity)
        for index in 0..<capacity { unsafe (heap + index).initialize(to: UInt32(index)) }
    }

    deinit {
        unsafe entries.deallocate()
        unsafe heap.deallocate()
    }

    /// The earliest time, or `nil` if no timer is set.
    var earliest: UInt64? { count == 0 ? nil : unsafe entries[Int(heap[0])].time }

    mutating func set(at time: UInt64, _ handler: Handler, _ context: UnsafeMutableRawPointer) -> TimerToken {
        precondition(count < ReactorLimits.timers, "too many timers")
        let index = Int(unsafe heap[count])
        order += 1
        unsafe entries[index].time = time
        unsafe entries[index].order = order
        unsafe entries[index].handler = handler
        unsafe entries[index].context = context
        unsafe entries[index].place = Int32(count)
        count += 1
        rise(count - 1)
        return unsafe TimerToken(index: UInt32(index), generation: entries[index].generation)
    }

    /// Forgets a timer; one that has gone off or was cancelled already is no error.
    mutating func cancel(_ token: TimerToken) {
        let index = Int(token.index)
        precondition(index < ReactorLimits.timers, "not a timer token")
        guard unsafe entries[index].generation == token.generation, unsafe entries[index].place >= 0 else { return }
        remove(at: unsafe Int(entries[index].place))
    }

    /// Takes the earliest timer if its time has come.
    mutating func popDue(_ now: UInt64) -> (handler: Handler, context: UnsafeMutableRawPointer)? {
        guard count > 0 else { return nil }
        let index = Int(unsafe heap[0])
        guard unsafe entries[index].time <= now, let handler = unsafe entries[index].handler,
            let context = unsafe entries[index].context
        else { return nil }
        remove(at: 0)
        return unsafe (handler, context)
    }

    private mutating func remove(at place: Int) {
        let index = Int(unsafe heap[place])
        unsafe entries[index].place = -1
        unsafe entries[index].generation &+= 1
        count -= 1
        if place != count {
            let moved = unsafe heap[count]
            put(moved, at: place)
            unsafe heap[count] = UInt32(index)
            rise(place)
            sink(unsafe Int(entries[Int(moved)].place))
        }
    }

    private func put(_ index: UInt32, at place: Int) {
        unsafe heap[place] = index
        unsafe entries[Int(index)].place = Int32(place)
    }

    private func isEarlier(_ left: UInt32, _ right: UInt32) -> Bool {
        let first = unsafe entries + Int(left)
        let second = unsafe entries + Int(right)
        if unsafe first.pointee.time != second.pointee.time {
            return unsafe first.pointee.time < second.pointee.time
        }
        return unsafe first.pointee.order < second.pointee.order
    }

    private func rise(_ start: Int) {
        var place = start
        let index = unsafe heap[place]
        while place > 0 {
            let parent = (place - 1) / 2
            let above = unsafe heap[parent]
            guard isEarlier(index, above) else { break }
            put(above, at: place)
            place = parent
        }
        put(index, at: place)
    }

    private func sink(_ start: Int) {
        var place = start
        let index = unsafe heap[place]
        while place * 2 + 1 < count {
            var child = place * 2 + 1
            if child + 1 < count, isEarlier(unsafe heap[child + 1], unsafe heap[child]) { child += 1 }
            let below = unsafe heap[child]
            guard isEarlier(below, index) else { break }
            put(below, at: place)
            place = child
        }
        put(index, at: place)
    }
}
