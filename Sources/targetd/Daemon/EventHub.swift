// EventHub: what has happened, for those who listen.
//
// Owns: the last events, and the listeners. Called by: reactors and the daemon (publish), the control API (listen).
// Must not know: why something happens, how listeners are reached.

import ControlAPI
import Glibc
import Reactor

/// The way of an event to its listeners. Nobody who publishes ever waits for a listener.
final class EventHub: Sendable {
    /// The kinds of events, as the API calls them.
    enum Kind: String, CaseIterable {
        case guestConnected = "guest-connected"
        case guestDisconnected = "guest-disconnected"
        case guestFault = "guest-fault"
        case changed
        case operationFailed = "operation-failed"
        case reset
    }

    /// Events that are kept for those who come later.
    static let kept = 256
    /// Events that may wait for one listener. One that is slower is dropped.
    static let pending = 256
    /// Listeners at once.
    static let listeners = 16

    private struct State {
        var sequence: UInt64 = 0
        var recent: [EventReport] = []
        var listeners: [UInt64: AsyncStream<EventReport>.Continuation] = [:]
        var nextListener: UInt64 = 0
    }

    private let state = Locked(State())

    /// Tells all listeners.
    func publish(_ kind: Kind, subject: String?, _ text: String) {
        state.withLock { state in
            state.sequence += 1
            let event = EventReport(
                sequence: state.sequence, time: Self.now, kind: kind.rawValue, subject: subject, text: text)
            state.recent.append(event)
            if state.recent.count > Self.kept { state.recent.removeFirst() }
            for (number, listener) in state.listeners {
                if case .enqueued = listener.yield(event) { continue }
                // It has not taken so many that this one found no room.
                state.listeners[number] = nil
                listener.finish()
            }
        }
    }

    /// Events from now on, until the hub is closed or the listener has fallen behind.
    ///
    /// - Parameter includesRecent: Whether those that are kept come first.
    /// - Returns: `nil` if there are as many listeners as there may be.
    func listen(includesRecent: Bool) -> AsyncStream<EventReport>? {
        let capacity = Self.pending + (includesRecent ? Self.kept : 0)
        let (stream, continuation) = AsyncStream.makeStream(
            of: EventReport.self, bufferingPolicy: .bufferingOldest(capacity))
        let number: UInt64? = state.withLock { state in
            guard state.listeners.count < Self.listeners else { return nil }
            state.nextListener += 1
            state.listeners[state.nextListener] = continuation
            if includesRecent { for event in state.recent { continuation.yield(event) } }
            return state.nextListener
        }
        guard let number else { return nil }
        continuation.onTermination = { [weak self] _ in
            // Not from within `publish`, which holds the lock: there the entry is gone already, and so is this one.
            guard let self else { return }
            Task { self.forget(number) }
        }
        return stream
    }

    private func forget(_ number: UInt64) { state.withLock { $0.listeners[number] = nil } }

    /// Ends all streams.
    func close() {
        let all = state.withLock { state in
            defer { state.listeners = [:] }
            return Array(state.listeners.values)
        }
        for listener in all { listener.finish() }
    }

    private static var now: Int64 {
        var time = timespec()
        unsafe clock_gettime(CLOCK_REALTIME, &time)
        return Int64(time.tv_sec) * 1000 + Int64(time.tv_nsec) / 1_000_000
    }
}
