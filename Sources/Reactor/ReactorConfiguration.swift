// ReactorConfiguration: what a reactor can be told, what it answers when it cannot start, and its bounds.
//
// Called by: whoever creates a reactor. Must not know: engines.

import Glibc

extension Reactor {
    /// How a reactor is to work.
    public struct Configuration: Sendable {
        /// The kernel interface for asynchronous I/O.
        public enum Engine: String, Sendable, CaseIterable {
            /// io_uring where the kernel allows it, else libaio.
            case automatic
            case ioUring = "io_uring"
            case libaio
        }

        /// Which interface to use. A forced one that is not to be had makes `Reactor.init` throw.
        public var engine: Engine = .automatic
        /// Adaptive polling: microseconds to look for more work after the last, before the thread sleeps; 0: never.
        public var pollMicroseconds: Int = 20
        /// I/O requests in flight, 1 to 4096. One more is refused, and its backstore tells the core that it is full.
        public var ioDepth: Int = 1024

        /// The defaults.
        public init() {}
    }

    /// The kernel interface that a running reactor uses.
    public enum ActiveEngine: String, Sendable {
        case ioUring = "io_uring"
        case libaio
    }

    /// What a reactor has counted since it was created.
    public struct Statistics: Sendable {
        /// Turns.
        public var turns: UInt64 = 0
        /// Times the thread went to sleep.
        public var waits: UInt64 = 0
        /// I/O requests accepted.
        public var requests: UInt64 = 0
        /// I/O requests refused because `ioDepth` were in flight.
        public var refused: UInt64 = 0
        /// Calls that handed I/O to the kernel.
        public var submissions: UInt64 = 0
        /// Nanoseconds of turns that found work.
        public var busyNanoseconds: UInt64 = 0
    }
}

/// The bounds of a reactor. To hit one of the last three is a bug of the caller and traps, because nothing a guest does
/// leads there.
public enum ReactorLimits {
    /// File descriptors watched at once: a kick, a call and an error descriptor for each of a thousand queues.
    public static let descriptors = 4096
    /// I/O requests in flight: the largest value of `Reactor.Configuration.ioDepth`.
    public static let ioDepth = 4096
    /// Timers set at once.
    public static let timers = 4096
    /// Work sources at once: virtqueues, rings, backstores that complete from a list.
    public static let workSources = 4096
    /// Messages posted and not yet run.
    public static let messages = 65_536
}

/// Why a reactor could not be created, or could not watch a descriptor.
public enum ReactorError: Error, Equatable, CustomStringConvertible {
    /// The engine that was asked for, what failed, and its errno value.
    case engineUnavailable(Reactor.Configuration.Engine, call: String, errno: Int32)
    /// Neither engine is to be had: the errno values of both.
    case noEngine(ioUring: Int32, libaio: Int32)
    /// A value of the configuration is out of its range.
    case invalidConfiguration(String)
    /// A system call failed.
    case systemCall(String, errno: Int32)
    /// `ReactorLimits.descriptors` are being watched.
    case tooManyDescriptors

    /// What is wrong, and what to do next.
    public var description: String {
        switch self {
        case .engineUnavailable(let engine, let call, let code):
            "engine \(engine.rawValue) cannot be used: \(call): \(errorText(code)); \(Self.advice(engine, code))"
        case .noEngine(let ring, let aio):
            "no asynchronous I/O: io_uring: \(errorText(ring)) (\(Self.advice(.ioUring, ring))); "
                + "libaio: \(errorText(aio)) (\(Self.advice(.libaio, aio)))"
        case .invalidConfiguration(let text): text
        case .systemCall(let call, let code): "\(call): \(errorText(code))"
        case .tooManyDescriptors:
            "one reactor watches at most \(ReactorLimits.descriptors) file descriptors; configure more reactors"
        }
    }

    private static func advice(_ engine: Reactor.Configuration.Engine, _ code: Int32) -> String {
        switch (engine, code) {
        case (.libaio, EAGAIN): "raise /proc/sys/fs/aio-max-nr or lower the I/O depth"
        case (.libaio, _): "the kernel needs CONFIG_AIO, and a seccomp filter must allow io_setup"
        case (_, EPERM): "check /proc/sys/kernel/io_uring_disabled and the seccomp filter, or choose engine libaio"
        case (_, ENOMEM): "raise RLIMIT_MEMLOCK, lower the I/O depth, or choose engine libaio"
        case (_, ENOSYS), (_, EOPNOTSUPP): "the kernel is too old for it (5.13 is needed): choose engine libaio"
        default: "choose engine libaio or automatic"
        }
    }
}

/// The C library's text for an errno value.
func errorText(_ code: Int32) -> String {
    guard let text = unsafe strerror(code) else { return "error \(code)" }
    return unsafe String(cString: text)
}
