// WorkSourceList: the sources that a reactor polls, in the order in which they were added.
//
// Owns: the list. Called by: Reactor. Must not know: what the sources are.

/// The work sources. A source may add or remove any source, itself too, from within its own functions.
@safe
final class WorkSourceList {
    private struct Entry {
        let source: Reactor.WorkSource
        /// 0: removed, to be taken out when nobody walks the list.
        var number: UInt64
    }

    private let entries: UnsafeMutablePointer<Entry>
    private var count = 0
    private var removed = 0
    private var lastNumber: UInt64 = 0
    private var isWalking = false

    init() { unsafe entries = .allocate(capacity: ReactorLimits.workSources) }

    deinit { unsafe entries.deallocate() }

    var isEmpty: Bool { count == removed }

    func add(_ source: Reactor.WorkSource) -> WorkSourceToken {
        if !isWalking { compact() }
        precondition(count < ReactorLimits.workSources, "too many work sources")
        lastNumber += 1
        unsafe (entries + count).initialize(to: Entry(source: source, number: lastNumber))
        count += 1
        return WorkSourceToken(number: lastNumber)
    }

    func remove(_ token: WorkSourceToken) {
        for index in 0..<count where unsafe entries[index].number == token.number {
            unsafe entries[index].number = 0
            removed += 1
            return
        }
        preconditionFailure("a work source token that is not in use")
    }

    private func compact() {
        guard removed > 0 else { return }
        var kept = 0
        for index in 0..<count where unsafe entries[index].number != 0 {
            if kept != index { unsafe entries[kept] = unsafe entries[index] }
            kept += 1
        }
        count = kept
        removed = 0
    }

    /// Polls each source once; `true` if any did work.
    func poll() -> Bool {
        compact()
        isWalking = true
        defer { isWalking = false }
        var didWork = false
        var index = 0
        while index < count {
            let entry = unsafe entries + index
            if unsafe entry.pointee.number != 0, unsafe entry.pointee.source.poll(entry.pointee.source.context) {
                didWork = true
            }
            index += 1
        }
        return didWork
    }

    /// Flushes each source once.
    func flush() {
        isWalking = true
        defer { isWalking = false }
        var index = 0
        while index < count {
            let entry = unsafe entries + index
            if unsafe entry.pointee.number != 0 { unsafe entry.pointee.source.flush(entry.pointee.source.context) }
            index += 1
        }
    }

    /// Prepares each source for sleep; `true` as soon as one says that work has arrived.
    func prepareToSleep() -> Bool {
        isWalking = true
        defer { isWalking = false }
        var index = 0
        while index < count {
            let entry = unsafe entries + index
            if unsafe entry.pointee.number != 0,
                unsafe entry.pointee.source.prepareToSleep(entry.pointee.source.context)
            {
                return true
            }
            index += 1
        }
        return false
    }
}
