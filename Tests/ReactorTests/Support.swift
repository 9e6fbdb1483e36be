// Support: what the reactor's tests share: a reactor for an engine, a temporary file, a request that records its
// result.
//
// Called by: the tests here. Must not know: backstores.

import CLinux
import Glibc
import Reactor
import Synchronization

/// A reactor on the named engine, with no polling so that its turns can be counted.
func makeReactor(
    _ engine: Reactor.Configuration.Engine, depth: Int = 64, pollMicroseconds: Int = 0
) throws -> Reactor {
    var configuration = Reactor.Configuration()
    configuration.engine = engine
    configuration.ioDepth = depth
    configuration.pollMicroseconds = pollMicroseconds
    return try Reactor(configuration)
}

/// The engines by name: every test of I/O runs on both.
let engines: [Reactor.Configuration.Engine] = [.ioUring, .libaio]

/// A file without a name, closed at the end.
final class TemporaryFile {
    let descriptor: Int32

    init(size: Int = 0) {
        descriptor = unsafe open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0o600)
        precondition(descriptor >= 0, "no temporary file in /tmp")
        precondition(ftruncate(descriptor, size) == 0)
    }

    deinit { close(descriptor) }
}

/// A request in memory of its own that remembers what became of it.
@safe
final class RecordedRequest {
    @unsafe
    private struct Memory {
        var request: IORequest
        var result: Int
        var completions: Int
        var tag: Int32 = -1
    }
    private let memory: UnsafeMutablePointer<Memory>
    let buffer: UnsafeMutableRawBufferPointer
    let segments: UnsafeMutablePointer<iovec>

    init(bytes: Int = 4096, fill: UInt8 = 0) {
        unsafe memory = .allocate(capacity: 1)
        unsafe memory.initialize(
            to: Memory(
                request: IORequest { context, result in
                    let memory = unsafe context.assumingMemoryBound(to: Memory.self)
                    unsafe memory.pointee.result = result
                    unsafe memory.pointee.completions += 1
                }, result: 0, completions: 0))
        unsafe buffer = .allocate(byteCount: bytes, alignment: 4096)
        unsafe buffer.initializeMemory(as: UInt8.self, repeating: fill)
        unsafe segments = .allocate(capacity: 1)
        unsafe segments.initialize(to: iovec(iov_base: buffer.baseAddress, iov_len: bytes))
    }

    deinit {
        unsafe memory.deallocate()
        unsafe buffer.deallocate()
        unsafe segments.deallocate()
    }

    var pointer: UnsafeMutablePointer<IORequest> {
        unsafe UnsafeMutableRawPointer(memory).assumingMemoryBound(to: IORequest.self)
    }
    var result: Int { unsafe memory.pointee.result }
    var completions: Int { unsafe memory.pointee.completions }
    var bytes: [UInt8] { unsafe Array(buffer) }

    /// A number that a function on a helper thread finds through the request.
    func tag(_ value: Int32) { unsafe memory.pointee.tag = value }
    static func tag(of context: UnsafeMutableRawPointer) -> Int32 {
        unsafe context.assumingMemoryBound(to: Memory.self).pointee.tag
    }
}

/// Makes turns until a condition holds. The condition is what ends it, not a time.
func turns(_ reactor: Reactor, until condition: () -> Bool) {
    while !condition() { reactor.turn(mayWait: true) }
}

/// Counts calls of a handler, and can do something in each.
final class Counter {
    var count = 0
    var bits: UInt32 = 0
    var action: () -> Bool = { true }

    var context: UnsafeMutableRawPointer { unsafe Unmanaged.passUnretained(self).toOpaque() }

    static func from(_ context: UnsafeMutableRawPointer) -> Counter {
        unsafe Unmanaged<Counter>.fromOpaque(context).takeUnretainedValue()
    }

    /// For `Reactor.watch`.
    static let descriptorHandler: Reactor.DescriptorHandler = { context, bits in
        let counter = unsafe Counter.from(context)
        counter.count += 1
        counter.bits = bits
        _ = counter.action()
    }

    /// For `Reactor.setTimer`.
    static let timerHandler: Reactor.TimerHandler = { context in
        let counter = unsafe Counter.from(context)
        counter.count += 1
        _ = counter.action()
    }
}

func makeEventDescriptor() -> Int32 { eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) }

func signal(_ descriptor: Int32) {
    var one: UInt64 = 1
    precondition(unsafe write(descriptor, &one, 8) == 8)
}

@discardableResult
func drain(_ descriptor: Int32) -> Bool {
    var value: UInt64 = 0
    return unsafe read(descriptor, &value, 8) == 8
}

/// Runs a reactor on a thread of its own until the end of `body`.
func withRunningReactor(_ reactor: Reactor, _ body: () throws -> Void) rethrows {
    var thread = pthread_t()
    let context = unsafe Unmanaged.passUnretained(reactor).toOpaque()
    let code = unsafe pthread_create(
        &thread, nil,
        { context in
            unsafe Unmanaged<Reactor>.fromOpaque(context!).takeUnretainedValue().run()
            return nil
        }, context)
    precondition(code == 0)
    defer {
        reactor.stop()
        pthread_join(thread, nil)
    }
    try body()
}

/// Runs a closure on a running reactor's thread and waits for its end.
func onReactor<Value: Sendable>(_ reactor: Reactor, _ body: @escaping @Sendable () -> Value) -> Value {
    let descriptor = eventfd(0, Int32(EFD_CLOEXEC))
    defer { close(descriptor) }
    let box = Box<Value>()
    reactor.post {
        box.value.withLock { $0 = body() }
        signal(descriptor)
    }
    drain(descriptor)
    return box.value.withLock { $0! }
}

private final class Box<Value: Sendable>: Sendable {
    let value = Mutex<Value?>(nil)
}

/// How many file descriptors this process has open.
func openDescriptors() -> Int {
    guard let directory = unsafe opendir("/proc/self/fd") else { return -1 }
    defer { unsafe closedir(directory) }
    var count = 0
    while unsafe readdir(directory) != nil { count += 1 }
    return count
}
