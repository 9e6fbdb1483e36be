// Locked: a value that one thread at a time may use, for what is not on the path of I/O.
//
// Owns: the value and its mutex. Called by: the reactor, its helper threads, the daemon. Must not know: what is in it.

import Glibc

/// A value behind a mutex.
///
/// Not `Synchronization.Mutex`: its code is in a library that is not built for ThreadSanitizer, which would take every
/// use of the value for a race. It knows the mutexes of pthreads.
@safe
public final class Locked<Value: Sendable>: @unchecked Sendable {
    // An address of its own, as pthreads wants it.
    private let mutex: UnsafeMutablePointer<pthread_mutex_t>
    private var value: Value

    /// A value that nobody uses.
    public init(_ value: Value) {
        self.value = value
        unsafe mutex = .allocate(capacity: 1)
        unsafe mutex.initialize(to: pthread_mutex_t())
        let code = unsafe pthread_mutex_init(mutex, nil)
        precondition(code == 0, "a mutex cannot be made")
    }

    deinit {
        unsafe pthread_mutex_destroy(mutex)
        unsafe mutex.deallocate()
    }

    /// Uses the value when nobody else does. `body` must not use it again by another way.
    public func withLock<Result>(_ body: (inout Value) -> Result) -> Result {
        let code = unsafe pthread_mutex_lock(mutex)
        precondition(code == 0, "a mutex cannot be locked")
        defer { unsafe pthread_mutex_unlock(mutex) }
        return body(&value)
    }
}
