// EventChannel: the doorbell between the two ends of a ring.
//
// Owns: one handle of the event channel device for each channel. Called by: VhostServer and XenPort, on the reactor's
// thread. Must not know: rings.

import CXen
import Glibc

/// The functions behind `EventChannel`: libxenevtchn's, or a test's.
@safe
struct EventChannelOperations {
    let notify: @convention(c) (UnsafeMutableRawPointer) -> Void
    /// Takes the pending event and lets the next one come.
    let acknowledge: @convention(c) (UnsafeMutableRawPointer) -> Void
    let close: @convention(c) (UnsafeMutableRawPointer) -> Void
}

/// One end of an event channel: a vtable and its context.
@safe
struct EventChannel {
    private let operations: UnsafePointer<EventChannelOperations>
    private let context: UnsafeMutableRawPointer
    /// Readable when an event is pending; -1 if there is nothing to wait on.
    let descriptor: Int32

    init(operations: UnsafePointer<EventChannelOperations>, context: UnsafeMutableRawPointer, descriptor: Int32) {
        unsafe self.operations = operations
        unsafe self.context = context
        self.descriptor = descriptor
    }

    @inline(__always)
    func notify() { unsafe operations.pointee.notify(context) }
    func acknowledge() { unsafe operations.pointee.acknowledge(context) }
    /// Unbinds it. It may not be used any more.
    func close() { unsafe operations.pointee.close(context) }
}

/// An event channel through libxenevtchn: a handle of its own, so that reading never blocks behind another channel.
@safe
private final class LibraryEventChannel {
    let handle: OpaquePointer
    let port: evtchn_port_t

    init?(domain: UInt16, remotePort: UInt32) {
        guard let handle = unsafe xenevtchn_open(nil, 0) else { return nil }
        let port = unsafe xenevtchn_bind_interdomain(handle, UInt32(domain), remotePort)
        guard port >= 0 else {
            let code = errno
            unsafe xenevtchn_close(handle)
            errno = code
            return nil
        }
        unsafe self.handle = handle
        self.port = evtchn_port_t(port)
        // The library's read must not wait when nothing is pending.
        let descriptor = unsafe xenevtchn_fd(handle)
        _ = fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) | O_NONBLOCK)
    }

    deinit {
        _ = unsafe xenevtchn_unbind(handle, port)
        unsafe xenevtchn_close(handle)
    }

    func acknowledge() {
        let pending = unsafe xenevtchn_pending(handle)
        if pending >= 0 { _ = unsafe xenevtchn_unmask(handle, evtchn_port_t(pending)) }
    }
}

extension EventChannel {
    /// Binds to a front end's port.
    ///
    /// - Returns: `nil` and errno if that port does not wait for us.
    static func bind(domain: UInt16, remotePort: UInt32) -> EventChannel? {
        guard let channel = LibraryEventChannel(domain: domain, remotePort: remotePort) else { return nil }
        let descriptor = unsafe xenevtchn_fd(channel.handle)
        return unsafe EventChannel(
            operations: libraryOperations, context: Unmanaged.passRetained(channel).toOpaque(), descriptor: descriptor)
    }

    nonisolated(unsafe) private static let libraryOperations: UnsafePointer<EventChannelOperations> = {
        let operations = UnsafeMutablePointer<EventChannelOperations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: EventChannelOperations(
                notify: { context in
                    unsafe Unmanaged<LibraryEventChannel>.fromOpaque(context)._withUnsafeGuaranteedRef {
                        _ = unsafe xenevtchn_notify($0.handle, $0.port)
                    }
                },
                acknowledge: { context in
                    unsafe Unmanaged<LibraryEventChannel>.fromOpaque(context)._withUnsafeGuaranteedRef {
                        $0.acknowledge()
                    }
                },
                close: { context in unsafe Unmanaged<LibraryEventChannel>.fromOpaque(context).release() }))
        return unsafe UnsafePointer(operations)
    }()
}
