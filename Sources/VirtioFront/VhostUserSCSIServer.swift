// VhostUserSCSIServer: a socket through which one front-end at a time finds a virtio-scsi device.
//
// Owns: the socket and its file, or the attempts to reach the front-end's; the current session, and devices whose
// front-end is gone but whose requests are not.
// Called by: the daemon, embedders, the reactor. Must not know: messages, rings.

import CLinux
import Glibc
public import Reactor
public import SCSICore

/// A vhost-user-scsi device at a Unix socket.
///
/// All but `init` is called on the reactor's thread.
@safe
public final class VhostUserSCSIServer {
    /// Descriptors of the longest ring: what QEMU allows for `virtqueue_size`.
    public static let maximumQueueSize = 1024
    /// Segments of data in one request, as the configuration space has it: what fits into the shortest usual ring.
    static let maximumSegments = 126

    /// What a device is made of.
    public struct Configuration {
        /// Where the socket is made, or found in client mode; at most 107 bytes. `/proc/self/fd/N` is no path but
        /// descriptor N, which whoever started the process has passed in: a socket that listens, or one that is
        /// connected to a front-end.
        public var socketPath: String
        /// Request queues that a guest may use, 1 to 126.
        public var requestQueues: Int
        /// The targets by number; the others do not exist for the guest.
        public var targets: [UInt8: TargetDevice]
        /// The name of the initiator port, the same whenever this guest connects.
        public var initiatorPort: String
        /// The relative target port identifier of the socket: one that each of the targets has.
        public var targetPort: UInt16 = 1

        /// The reactors over which the request queues are dealt out, and all that own targets of the device; the
        /// server's own must be one of them, and all must run. `nil`: the server's reactor serves all queues and owns
        /// all targets.
        public var spread: [ShardReactor]?
        /// Who makes the socket.
        public var mode = Mode.server
        /// What is offered beyond what every front-end gets.
        public var options = Options()
        /// How long a queue that stops and must be drained waits for its commands, in nanoseconds, more than 0. After
        /// that what waits for something else than the medium is answered BUSY, and so is what the medium gives up: a
        /// guest must not hold up its monitor with a command that cannot end while the guest stands still.
        public var drainPatience = Self.drainPatience
        static let drainPatience: UInt64 = 1_000_000_000

        /// A device with these targets.
        public init(
            socketPath: String, requestQueues: Int = 1, targets: [UInt8: TargetDevice], initiatorPort: String
        ) {
            self.socketPath = socketPath
            self.requestQueues = requestQueues
            self.targets = targets
            self.initiatorPort = initiatorPort
        }
    }

    /// Which side makes the socket.
    public enum Mode: String, Sendable, Equatable, CaseIterable {
        /// We listen, and front-ends connect.
        case server
        /// The front-end listens, and we connect, again and again until it is there and whenever it comes back.
        case client
    }

    /// What is offered only to front-ends of which the operator knows that they do it right.
    public struct Options: Sendable, Equatable {
        /// The configuration space (CONFIG), with a writable sense_size and cdb_size. QEMU's vhost-user-scsi has its
        /// own, and warns at each start of a back-end that offers it.
        public var offersConfiguration = false
        /// RING_RESET. The front-end must stop a ring that the driver resets by GET_VRING_BASE; QEMU 7.2 offers the
        /// feature to the guest and does not, so that the guest's memory would be written after the reset.
        public var offersRingReset = false

        /// Nothing of it.
        public init() {}

        var features: UInt64 { VirtioFeature.offered | (offersRingReset ? VirtioFeature.ringReset : 0) }
        var protocolFeatures: UInt64 {
            VhostUserProtocolFeature.offered | (offersConfiguration ? VhostUserProtocolFeature.configuration : 0)
        }
    }

    /// What an operator may want to know.
    public enum Event: Sendable {
        /// A front-end connected.
        case connected
        /// It is gone; why, if the reason was a fault.
        case disconnected(reason: String?)
        /// It did something wrong, and goes on.
        case fault(String)
    }

    /// Why a server cannot start.
    public enum StartError: Error, CustomStringConvertible {
        /// The path is longer than a Unix socket address can hold.
        case pathTooLong(String)
        /// Another process listens there.
        case inUse(String)
        /// Something that is no socket is there.
        case notASocket(String)
        /// A descriptor that was passed in is no Unix stream socket.
        case notPassedIn(String)
        /// A system call failed.
        case system(String, operation: String, errno: Int32)
        /// The reactor could not watch the socket.
        case reactor(String)

        /// The error in words, with what to do next.
        public var description: String {
            switch self {
            case .pathTooLong(let path): "The socket path \(path) is longer than 107 bytes; choose a shorter one."
            case .inUse(let path):
                "Another process listens at the socket \(path); stop it, or choose another path."
            case .notASocket(let path): "\(path) exists and is no socket; remove it, or choose another path."
            case .notPassedIn(let path):
                "\(path) is no Unix stream socket; pass one in as this file descriptor, or choose a path."
            case .system(let path, let operation, let code):
                "Cannot \(operation) the socket \(path): \(unsafe String(cString: strerror(code)))."
            case .reactor(let what): what
            }
        }
    }

    private var configuration: Configuration
    private let reactor: Reactor
    private let report: (Event) -> Void
    /// How long after a failed attempt, or the end of a connection, the next attempt to connect comes, in nanoseconds:
    /// soon for a guest that starts, seldom beside what else a reactor does.
    private static let connectInterval: UInt64 = 200_000_000

    private var listener: Int32 = -1
    private var listenerToken: DescriptorToken?
    /// Kept for the moment when there is no other.
    private var spare: Int32 = -1
    private var socketIdentity: (device: UInt, inode: UInt)?
    private var session: VhostUserSession?
    /// Sessions that have ended while requests of theirs were in flight.
    private var ended: [VhostUserSession] = []
    private var source: WorkSourceToken?
    private var whenStopped: (() -> Void)?
    /// The next attempt to connect, in client mode.
    private var attempt: TimerToken?
    /// Why the last attempt failed, said once.
    private var connectError: Int32 = 0
    private var lifetime = VirtioFrontStatistics()

    /// A server that does not listen yet.
    ///
    /// - Parameter report: Called on the reactor's thread, seldom.
    public init(configuration: Configuration, reactor: Reactor, report: @escaping (Event) -> Void) {
        precondition((1...126).contains(configuration.requestQueues))
        self.configuration = configuration
        self.reactor = reactor
        self.report = report
    }

    /// What the device has done since the server was made.
    public var statistics: VirtioFrontStatistics { session?.device.totalStatistics ?? lifetime }

    /// Whether a front-end is connected.
    public var isConnected: Bool { session != nil }

    // MARK: Targets

    /// Adds a target; a guest that is connected is told to look for it.
    public func attach(_ target: TargetDevice, number: UInt8) {
        configuration.targets[number] = target
        session?.device.attach(target, number: number)
    }

    /// Takes a target away; a guest that is connected is told so, and its commands for the target end.
    public func detach(number: UInt8) {
        configuration.targets[number] = nil
        session?.device.detach(number: number)
    }

    // MARK: Start and stop

    /// Makes the socket and listens. The file of a dead process is replaced. A descriptor that was passed in is used as
    /// it is: one that listens as our own would be, one that is connected for that one front-end. In client mode begins
    /// to try to connect; it is no error if nobody listens yet.
    public func start() throws(StartError) {
        if configuration.mode == .client {
            _ = try address()
            addSource()
            return connect()
        }
        var connected: Int32?
        if let descriptor = Self.passedIn(configuration.socketPath) {
            let passed = try adopt(descriptor)
            if passed.isListening { listener = passed.socket } else { connected = passed.socket }
        } else {
            try removeStaleSocket()
            try listen()
        }
        addSource()
        if let connected { return begin(connected) }
        spare = eventfd(0, Int32(EFD_CLOEXEC))
        do {
            listenerToken = unsafe try reactor.watch(
                listener, events: EPOLLIN.rawValue,
                { context, _ in
                    unsafe Unmanaged<VhostUserSCSIServer>.fromOpaque(context).takeUnretainedValue().accept()
                }, Unmanaged.passUnretained(self).toOpaque())
        } catch {
            closeListener()
            removeSource()
            throw .reactor("\(error)")
        }
    }

    /// The number in `/proc/self/fd/N`.
    private static func passedIn(_ path: String) -> Int32? {
        let prefix = "/proc/self/fd/"
        return path.hasPrefix(prefix) ? Int32(path.dropFirst(prefix.count)) : nil
    }

    /// A copy of a descriptor that was passed in, so that a second start finds it as the first did.
    private func adopt(_ descriptor: Int32) throws(StartError) -> (socket: Int32, isListening: Bool) {
        let path = configuration.socketPath
        guard clinux_socket_option(descriptor, SO_DOMAIN) == AF_UNIX,
            clinux_socket_option(descriptor, SO_TYPE) == Int32(SOCK_STREAM.rawValue)
        else { throw .notPassedIn(path) }
        let copy = fcntl(descriptor, F_DUPFD_CLOEXEC, 3)
        guard copy >= 0 else { throw .system(path, operation: "take over", errno: errno) }
        _ = fcntl(copy, F_SETFL, fcntl(copy, F_GETFL) | O_NONBLOCK)
        return (copy, clinux_socket_option(copy, SO_ACCEPTCONN) == 1)
    }

    // MARK: Client mode

    /// One attempt to reach the front-end. It does not wait: a Unix socket connects at once or not at all.
    private func connect() {
        attempt = nil
        guard whenStopped == nil, session == nil, ended.isEmpty else { return }
        let flags = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)
        let socket = socket(AF_UNIX, flags, 0)
        guard socket >= 0 else { return connectFailed(errno) }
        guard var address = try? address() else { preconditionFailure("the path was checked at the start") }
        let length = socklen_t(MemoryLayout<sockaddr_un>.size)
        let result = unsafe withUnsafePointer(to: &address) {
            unsafe Glibc.connect(socket, UnsafeRawPointer($0).assumingMemoryBound(to: sockaddr.self), length)
        }
        guard result == 0 else {
            let code = errno
            close(socket)
            return connectFailed(code)
        }
        connectError = 0
        begin(socket)
    }

    private func connectFailed(_ code: Int32) {
        // That nobody listens yet, or that their queue is full, is what we wait for.
        if code != connectError, ![ENOENT, ECONNREFUSED, EAGAIN].contains(code) {
            let why = unsafe String(cString: strerror(code))
            report(.fault("Cannot connect to the front-end at \(configuration.socketPath): \(why); trying on."))
        }
        connectError = code
        connectLater()
    }

    /// Tries again after a while, and not at once: a front-end that takes connections only to end them would keep us.
    private func connectLater() {
        guard configuration.mode == .client, whenStopped == nil, attempt == nil else { return }
        attempt = unsafe reactor.setTimer(
            at: reactor.now + Self.connectInterval,
            { unsafe Unmanaged<VhostUserSCSIServer>.fromOpaque($0).takeUnretainedValue().connect() },
            Unmanaged.passUnretained(self).toOpaque())
    }

    private func removeSource() {
        if let source { reactor.remove(source) }
        source = nil
    }

    private func addSource() {
        source = unsafe reactor.add(
            Reactor.WorkSource(
                poll: { unsafe Unmanaged<VhostUserSCSIServer>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.poll() } },
                flush: { unsafe Unmanaged<VhostUserSCSIServer>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.flush() } },
                prepareToSleep: {
                    unsafe Unmanaged<VhostUserSCSIServer>.fromOpaque($0)._withUnsafeGuaranteedRef {
                        $0.prepareToSleep()
                    }
                },
                context: Unmanaged.passUnretained(self).toOpaque()))
    }

    /// Stops listening, removes the socket, answers what is in flight, ends the connection, and calls `stopped` then,
    /// maybe before this returns. What the guest makes available meanwhile stays in its rings. The server must live
    /// until then.
    public func stop(_ stopped: @escaping () -> Void) {
        whenStopped = stopped
        closeListener()
        if let attempt { reactor.cancel(attempt) }
        attempt = nil
        session?.finish()
        checkStopped()
    }

    /// Ends a stop that is under way without answers: the connection ends now and commands in flight are aborted, as if
    /// the front-end had gone. The stop is over when the medium has none of them any more.
    public func abandon() {
        precondition(whenStopped != nil || session == nil, "abandoned while it serves")
        session?.end(nil)
        checkStopped()
    }

    private func checkStopped() {
        if !ended.isEmpty {
            for session in ended where session.device.isDrained { session.device.close() }
            ended.removeAll { $0.device.isDrained }
            if ended.isEmpty {
                if let listenerToken { reactor.change(listenerToken, events: EPOLLIN.rawValue) }
                connectLater()
            }
        }
        guard ended.isEmpty, session == nil, let stopped = whenStopped else { return }
        whenStopped = nil
        removeSource()
        stopped()
    }

    private func address() throws(StartError) -> sockaddr_un {
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        let path = Array(configuration.socketPath.utf8)
        guard path.count < MemoryLayout.size(ofValue: address.sun_path) else {
            throw .pathTooLong(configuration.socketPath)
        }
        unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: path) }
        return address
    }

    private func removeStaleSocket() throws(StartError) {
        let path = configuration.socketPath
        var status = stat()
        guard unsafe lstat(path, &status) == 0 else { return }
        guard status.st_mode & S_IFMT == S_IFSOCK else { throw .notASocket(path) }
        let probe = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue), 0)
        guard probe >= 0 else { throw .system(path, operation: "probe", errno: errno) }
        defer { close(probe) }
        var address = try address()
        let length = socklen_t(MemoryLayout<sockaddr_un>.size)
        let connected = unsafe withUnsafePointer(to: &address) {
            unsafe Glibc.connect(probe, UnsafeRawPointer($0).assumingMemoryBound(to: sockaddr.self), length)
        }
        if connected == 0 || errno != ECONNREFUSED { throw .inUse(path) }
        unsafe unlink(path)
    }

    private func listen() throws(StartError) {
        let path = configuration.socketPath
        let flags = Int32(SOCK_STREAM.rawValue | SOCK_CLOEXEC.rawValue | SOCK_NONBLOCK.rawValue)
        listener = socket(AF_UNIX, flags, 0)
        guard listener >= 0 else { throw .system(path, operation: "create", errno: errno) }
        var address = try address()
        let length = socklen_t(MemoryLayout<sockaddr_un>.size)
        let bound = unsafe withUnsafePointer(to: &address) {
            unsafe bind(listener, UnsafeRawPointer($0).assumingMemoryBound(to: sockaddr.self), length)
        }
        guard bound == 0, Glibc.listen(listener, 1) == 0 else {
            let code = errno
            close(listener)
            listener = -1
            throw code == EADDRINUSE ? .inUse(path) : .system(path, operation: "listen at", errno: code)
        }
        var status = stat()
        if unsafe lstat(path, &status) == 0 { socketIdentity = (UInt(status.st_dev), UInt(status.st_ino)) }
    }

    private func closeListener() {
        if let listenerToken { reactor.unwatch(listenerToken) }
        listenerToken = nil
        if spare >= 0 { close(spare) }
        spare = -1
        guard listener >= 0 else { return }
        close(listener)
        listener = -1
        // Only our own file: somebody may have put another one there.
        var status = stat()
        guard unsafe lstat(configuration.socketPath, &status) == 0, let socketIdentity,
            socketIdentity == (UInt(status.st_dev), UInt(status.st_ino))
        else { return }
        unsafe unlink(configuration.socketPath)
    }

    // MARK: Connections

    private func accept() {
        let socket = clinux_accept(listener)
        guard socket >= 0 else {
            if errno == EMFILE || errno == ENFILE { refuseForWantOfDescriptors() }
            return
        }
        guard session == nil else {
            report(.fault("A second front-end tried to connect; one at a time is served."))
            close(socket)
            return
        }
        begin(socket)
    }

    /// The connection would stay in the queue and wake us without end: a descriptor that was kept for this takes it, to
    /// close it.
    private func refuseForWantOfDescriptors() {
        guard spare >= 0 else { return }
        close(spare)
        let socket = clinux_accept(listener)
        if socket >= 0 { close(socket) }
        spare = eventfd(0, Int32(EFD_CLOEXEC))
        report(.fault("A front-end was refused because the process has no file descriptors left; raise their limit."))
    }

    /// The reactors, our own first.
    private var spread: [ShardReactor]? {
        configuration.spread.map { all in
            all.filter { $0.reactor === reactor } + all.filter { $0.reactor !== reactor }
        }
    }

    private func begin(_ socket: Int32) {
        lifetime.connections += 1
        let queues = configuration.requestQueues + VirtioSCSIDevice.firstRequestQueue
        let device = VirtioSCSIDevice(
            targets: configuration.targets, initiatorPort: configuration.initiatorPort,
            targetPort: configuration.targetPort, queueCapacity: queues, reactor: reactor, spread: spread,
            drainPatience: configuration.drainPatience, statistics: lifetime,
            onFault: { [weak self] index, fault in self?.session?.fault(index, fault.rawValue) })
        let session = VhostUserSession(
            socket: socket, reactor: reactor, queueCapacity: queues, device: device, options: configuration.options,
            report: { [weak self] in self?.report(.fault($0)) })
        session.onEnd = { [weak self] in self?.sessionEnded($0) }
        self.session = session
        do {
            try session.start()
            report(.connected)
        } catch {
            session.end("\(error)")
        }
    }

    private func sessionEnded(_ reason: String?) {
        guard let session else { return }
        self.session = nil
        lifetime = session.device.totalStatistics
        if session.device.isDrained {
            session.device.close()
        } else {
            ended.append(session)
            // The next front-end may be the same guest, which sends again what was in flight: a write of the old
            // connection must not come behind those of the new one. It waits in the listener's queue.
            if let listenerToken { reactor.change(listenerToken, events: 0) }
        }
        report(.disconnected(reason: reason))
        if ended.isEmpty { connectLater() }
        checkStopped()
    }

    // MARK: The reactor's side

    private func poll() -> Bool { session?.device.poll() ?? false }

    private func flush() {
        session?.device.flush()
        guard !ended.isEmpty else { return }
        for session in ended { session.device.flush() }
        checkStopped()
    }

    private func prepareToSleep() -> Bool { session?.device.prepareToSleep() ?? false }
}
