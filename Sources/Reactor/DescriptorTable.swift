// DescriptorTable: which file descriptors are watched and who is called, over one epoll instance.
//
// Owns: the epoll instance, the table, and nothing of the descriptors. Called by: Reactor. Must not know: engines.

import CLinux
import Glibc

/// Names one watched descriptor.
public struct DescriptorToken: Sendable, Equatable {
    let index: UInt32
    let generation: UInt32
}

/// The watched descriptors. A token carries a generation, so an event that was already fetched for a descriptor that
/// has been removed since is told apart from one for its successor in the table.
@safe
struct DescriptorTable: ~Copyable {
    @unsafe
    private struct Entry {
        var handler: Reactor.DescriptorHandler?
        var context: UnsafeMutableRawPointer?
        var descriptor: Int32 = -1
        var generation: UInt32 = 0
        var nextFree: Int32 = -1
    }

    /// Events fetched by one call; more are fetched by the next.
    static let batch = 64

    let epoll: Int32
    private let entries: UnsafeMutablePointer<Entry>
    private let events: UnsafeMutablePointer<epoll_event>
    private var used = 0
    private var firstFree: Int32 = -1

    init() throws(ReactorError) {
        let descriptor = epoll_create1(Int32(EPOLL_CLOEXEC))
        guard descriptor >= 0 else { throw .systemCall("epoll_create1", errno: errno) }
        epoll = descriptor
        unsafe entries = .allocate(capacity: ReactorLimits.descriptors)
        unsafe events = .allocate(capacity: Self.batch)
        unsafe events.initialize(repeating: epoll_event(), count: Self.batch)
    }

    deinit {
        close(epoll)
        unsafe entries.deallocate()
        unsafe events.deallocate()
    }

    mutating func add(
        _ descriptor: Int32, events mask: UInt32, _ handler: Reactor.DescriptorHandler,
        _ context: UnsafeMutableRawPointer
    ) throws(ReactorError) -> DescriptorToken {
        let index: Int
        if firstFree >= 0 {
            index = Int(firstFree)
        } else {
            guard used < ReactorLimits.descriptors else { throw .tooManyDescriptors }
            index = used
            unsafe (entries + index).initialize(to: Entry())
        }
        let token = unsafe DescriptorToken(index: UInt32(index), generation: entries[index].generation)
        var event = unsafe Self.event(mask, token)
        guard unsafe epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &event) == 0 else {
            throw .systemCall("epoll_ctl of file descriptor \(descriptor)", errno: errno)
        }
        if index == used { used += 1 } else { firstFree = unsafe entries[index].nextFree }
        unsafe entries[index].handler = handler
        unsafe entries[index].context = context
        unsafe entries[index].descriptor = descriptor
        return token
    }

    private static func event(_ mask: UInt32, _ token: DescriptorToken) -> epoll_event {
        var event = unsafe epoll_event()
        unsafe event.events = mask
        unsafe event.data.u64 = UInt64(token.generation) << 32 | UInt64(token.index)
        return unsafe event
    }

    private func check(_ token: DescriptorToken) -> Int {
        let index = Int(token.index)
        precondition(
            unsafe index < used && entries[index].generation == token.generation && entries[index].descriptor >= 0,
            "a descriptor token that is not in use")
        return index
    }

    func change(_ token: DescriptorToken, events mask: UInt32) {
        let index = check(token)
        var event = unsafe Self.event(mask, token)
        let code = unsafe epoll_ctl(epoll, EPOLL_CTL_MOD, entries[index].descriptor, &event)
        precondition(code == 0, "a watched descriptor was closed")
    }

    mutating func remove(_ token: DescriptorToken) {
        let index = check(token)
        var event = unsafe epoll_event()
        // Fails only if the descriptor was closed, and then the kernel has forgotten it already.
        _ = unsafe epoll_ctl(epoll, EPOLL_CTL_DEL, entries[index].descriptor, &event)
        unsafe entries[index].descriptor = -1
        unsafe entries[index].handler = nil
        // Not `&+= 1`, on which Swift 6.3.1 crashes when it compiles for ThreadSanitizer.
        unsafe entries[index].generation = entries[index].generation &+ 1
        unsafe entries[index].nextFree = firstFree
        firstFree = Int32(index)
    }

    /// Fetches events, sleeping at most `milliseconds` (-1: without end). Returns how many.
    func fetch(milliseconds: Int32) -> Int {
        Int(max(0, unsafe epoll_wait(epoll, events, Int32(Self.batch), milliseconds)))
    }

    /// Who is to be called for a fetched event; `nil` if the descriptor has been removed since.
    func target(_ number: Int) -> (
        handler: Reactor.DescriptorHandler, context: UnsafeMutableRawPointer, events: UInt32
    )? {
        let event = unsafe events[number]
        let data = unsafe event.data.u64
        let index = Int(data & 0xffff_ffff)
        guard unsafe entries[index].generation == UInt32(data >> 32), let handler = unsafe entries[index].handler,
            let context = unsafe entries[index].context
        else { return nil }
        return unsafe (handler, context, event.events)
    }
}
