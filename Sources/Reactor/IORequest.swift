// IORequest: one asynchronous operation of the kernel, in memory that its caller provides.
//
// Owns: what the reactor has to remember of an operation until it completes. Called by: backstores (they embed it), the
// reactor (it fills it). Must not know: whose operation it is.

/// One asynchronous operation. The memory is the caller's and must stay where it is from a successful submit to the
/// completion; it fits beside other state in the scratch of a backstore request.
@safe
public struct IORequest {
    /// Called on the reactor's thread, from a turn and never from the submitting call, with the request and its result:
    /// a count of bytes, 0, or a negative errno value. The request may be used again from there. (C function pointers
    /// cannot name a Swift structure: the first argument is the address of the request.)
    public typealias Completion = @convention(c) (UnsafeMutableRawPointer, Int) -> Void

    /// A blocking call for `Reactor.offload`. Runs on a helper thread; must touch nothing but what the request leads
    /// to.
    public typealias Function = @convention(c) (UnsafeMutableRawPointer) -> Int

    /// Called at the end of the operation.
    public var completion: Completion

    /// Neighbour in the one list that the request is in: deferred completions, or jobs of the helper threads.
    var next: UnsafeMutablePointer<IORequest>?
    var result: Int
    var function: Function?
    var offset: UInt64
    var length: UInt64
    var descriptor: Int32
    var mode: Int32
    /// An fdatasync given to libaio, which a helper thread repeats if the file system does not have it.
    var isAsynchronousSync: Bool

    /// A request that is not in flight.
    public init(completion: Completion) {
        unsafe self.completion = unsafe completion
        unsafe next = nil
        result = 0
        unsafe function = nil
        offset = 0
        length = 0
        descriptor = -1
        mode = 0
        isAsynchronousSync = false
    }
}

/// A first-in first-out list of requests through their `next` links. Allocates nothing.
@safe
struct IORequestList {
    private var head: UnsafeMutablePointer<IORequest>?
    private var tail: UnsafeMutablePointer<IORequest>?

    init() {
        unsafe head = nil
        unsafe tail = nil
    }

    var isEmpty: Bool { unsafe head == nil }

    mutating func append(_ request: UnsafeMutablePointer<IORequest>) {
        unsafe request.pointee.next = nil
        if let last = unsafe tail { unsafe last.pointee.next = request } else { unsafe head = request }
        unsafe tail = request
    }

    mutating func popFirst() -> UnsafeMutablePointer<IORequest>? {
        guard let first = unsafe head else { return nil }
        unsafe head = first.pointee.next
        if unsafe head == nil { unsafe tail = nil }
        unsafe first.pointee.next = nil
        return unsafe first
    }
}
