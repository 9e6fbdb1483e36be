// LifecycleTests: rings and memory that change while requests are in flight; stop, reconnect, sockets.
//
// Called by: swift test. Must not know: how the server is written.

import CLinux
import CoreTestSupport
import Glibc
import Reactor
import Testing
import VhostUserInitiator
import VirtioFront

@Suite struct LifecycleTests {
    private var fourQueues: VhostUserFrontEnd.Options {
        var options = VhostUserFrontEnd.Options()
        options.queues = 4
        return options
    }

    private static func write(_ block: UInt8) -> SCSICommand {
        SCSICommand(unit0, CDB.write(.ten, UInt64(block), 1), dataOut: [UInt8](repeating: block, count: 512))
    }

    @Test func memoryAddedUnderRequestsInFlightLosesNoCompletion() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        let first = frontEnd.requests.submit(Self.write(1))
        world.wait { $0.backstore.pending.count == 1 }
        try frontEnd.addRegion(SharedMemory(size: 1 << 20, guestAddress: 0x10_0000_0000))
        let second = frontEnd.requests.submit(Self.write(2))
        world.wait { $0.backstore.pending.count == 2 }
        // The one that came after the change ends first: each has its own used element.
        world.perform { $0.backstore.complete(1) }
        #expect(try second.wait().isGood)
        world.hold(false)
        #expect(try first.wait().isGood)
        #expect(frontEnd.requests.ring.deviceUsedIndex == frontEnd.requests.ring.usedIndex)
    }

    @Test func memoryTakenAwayFromARequestInFlightStaysMappedUntilItsEnd() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let extra = try SharedMemory(size: 1 << 20, guestAddress: 0x10_0000_0000)
        try frontEnd.addRegion(extra)
        world.hold(true)
        // A READ whose data goes to the memory that is then taken away.
        let ring = frontEnd.requests.ring
        let memory = frontEnd.memories[0]
        let command = SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512)
        let (request, response) = (memory.allocate(51), memory.allocate(108))
        memory.write(command.header, at: request)
        ring.setDescriptor(100, address: request, length: 51, flags: DescriptorFlag.next, next: 101)
        ring.setDescriptor(
            101, address: response, length: 108, flags: DescriptorFlag.next | DescriptorFlag.write, next: 102)
        ring.setDescriptor(102, address: extra.guestAddress, length: 512, flags: DescriptorFlag.write, next: 0)
        extra.fill(512, with: 0xee, at: extra.guestAddress)
        ring.makeAvailable(100)
        frontEnd.requests.publish()
        world.wait { $0.backstore.pending.count == 1 }
        try frontEnd.removeRegion(extra)
        world.hold(false)
        try frontEnd.requests.waitForUsed()
        let used = try #require(ring.nextUsed())
        #expect(used.head == 100 && used.length == 108 + 512)
        #expect(extra.read(512, at: extra.guestAddress).allSatisfy { $0 == 0 })
    }

    @Test func aRingDisabledUnderRequestsStillAnswersThemAndTakesNoMore() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        let first = frontEnd.requests.submit(Self.write(1))
        world.wait { $0.backstore.pending.count == 1 }
        try frontEnd.enable(frontEnd.requests, false)
        let second = frontEnd.requests.submit(Self.write(2))
        world.hold(false)
        #expect(try first.wait().isGood)
        #expect(world.perform { $0.backstore.accepted.filter { $0.operation == .write }.count } == 1)
        #expect(!frontEnd.requests.ring.hasUsed)
        try frontEnd.enable(frontEnd.requests, true)
        #expect(try second.wait().isGood)
    }

    @Test func getVringBaseIsAnsweredAfterTheRingsLastRequest() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world, fourQueues)
        world.hold(true)
        let request = frontEnd.requests.submit(Self.write(1))
        world.wait { $0.backstore.pending.count == 1 }
        let used = frontEnd.requests.ring.deviceUsedIndex
        try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(2), 0))
        #expect(world.sleeps())
        // The other queues go on meanwhile.
        #expect(try frontEnd.queues[3].run(SCSICommand(unit0, CDB.inquiry(), dataIn: 255)).isGood)
        #expect(frontEnd.requests.ring.deviceUsedIndex == used)
        world.hold(false)
        let reply = try frontEnd.channel.receive()
        #expect(frontEnd.requests.ring.deviceUsedIndex == used &+ 1)
        #expect(reply.payload == WireBytes.of(UInt32(2), UInt32(frontEnd.requests.ring.availableIndex)))
        try frontEnd.requests.collect()
        #expect(try request.result().isGood)
    }

    @Test func aFrontEndThatDiesWhileGetVringBaseWaitsIsNoticed() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        _ = frontEnd.requests.submit(Self.write(1))
        world.wait { $0.backstore.pending.count == 1 }
        try frontEnd.channel.send(.getVringBase, WireBytes.of(UInt32(2), 0))
        frontEnd.disconnect()
        world.wait { !$0.server.isConnected }
        world.hold(false)
    }

    @Test func aStoppedRingGoesOnWhereItWas() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        let base = try frontEnd.stop(frontEnd.requests)
        #expect(base == frontEnd.requests.ring.availableIndex)
        let waiting = frontEnd.requests.submit(Self.write(1))
        try frontEnd.start(frontEnd.requests)
        #expect(try waiting.wait().isGood)
    }

    @Test func nothingOfAFrontEndStaysMappedAfterItsLastRequest() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let old = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        _ = old.requests.submit(SCSICommand(unit0, CDB.read(.ten, 0, 1), dataIn: 512))
        world.wait { $0.backstore.pending.count == 1 }
        old.disconnect()
        world.wait { !$0.server.isConnected }
        #expect(try mappings(of: old.memories[0]) == 2)
        world.hold(false)
        world.wait { $0.backstore.pending.isEmpty }
        // The server lets go at the end of that turn.
        world.onReactor {}
        #expect(try mappings(of: old.memories[0]) == 1)
    }

    @Test func aStopAnswersWhatIsInFlightAndLeavesTheRestInTheRing() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        world.hold(true)
        let first = frontEnd.requests.submit(Self.write(1))
        world.wait { $0.backstore.pending.count == 1 }
        let stopped = world.beginStop()
        let second = frontEnd.requests.submit(Self.write(2))
        #expect(world.perform { $0.server.isConnected })
        world.hold(false)
        stopped.wait()
        #expect(try first.wait().isGood)
        #expect(!second.chain.isComplete)
        #expect(throws: InitiatorError.disconnected) { try frontEnd.channel.receive() }
        #expect(unsafe access(world.socketPath, F_OK) != 0)
    }

    @Test func theSocketOfADeadServerIsReplacedAndThatOfALiveOneIsNot() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let path = world.socketPath
        func start(_ path: String) throws {
            try world.onReactor {
                let server = VhostUserSCSIServer(
                    configuration: VhostUserSCSIServer.Configuration(
                        socketPath: path, targets: [:], initiatorPort: "other"),
                    reactor: world.reactor, report: { _ in })
                return Result {
                    try server.start()
                    server.stop {}
                }
            }.get()
        }
        let error = #expect(throws: VhostUserSCSIServer.StartError.self) { try start(path) }
        guard case .inUse = error else {
            Issue.record("\(String(describing: error))")
            return
        }
        // A socket that was bound and whose process is gone.
        let stale = path + "2"
        try makeStaleSocket(stale)
        try start(stale)
        #expect(unsafe access(stale, F_OK) != 0)
    }

    @Test(arguments: [false, true])
    func aSocketThatIsPassedInIsServed(_ isConnected: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var ends: [Int32] = [-1, -1]
        let path = world.socketPath + "3"
        if isConnected {
            precondition(unsafe socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends) == 0)
        } else {
            ends[1] = try listeningSocket(path)
        }
        let passed = ends[1]
        let server = try world.onReactor {
            let server = VhostUserSCSIServer(
                configuration: VhostUserSCSIServer.Configuration(
                    socketPath: "/proc/self/fd/\(passed)", targets: [:], initiatorPort: "passed in"),
                reactor: world.reactor, report: { _ in })
            return Result {
                try server.start()
                return server
            }
        }.get()
        if isConnected {
            let message = VhostUserChannel.message(.getFeatures, [])
            #expect(unsafe Glibc.write(ends[0], message, message.count) == message.count)
            var reply = [UInt8](repeating: 0, count: 20)
            var entry = pollfd(fd: ends[0], events: Int16(POLLIN), revents: 0)
            #expect(unsafe poll(&entry, 1, 30_000) == 1)
            #expect(unsafe read(ends[0], &reply, 20) == 20)
        } else {
            let channel = try VhostUserChannel(path: path)
            try channel.send(.getFeatures)
            #expect(try channel.receive().number != nil)
        }
        let signal = ServerWorld.Signal()
        world.onReactor { server.stop { signal.raise() } }
        signal.wait()
        for end in ends where end >= 0 { close(end) }
        // The file is that of whoever made the socket.
        #expect(unsafe isConnected || access(path, F_OK) == 0)
        unsafe unlink(path)
    }

    @Test func inClientModeAFrontEndIsServedWheneverItListens() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let path = world.socketPath + "4"
        let server = try world.onReactor {
            var configuration = VhostUserSCSIServer.Configuration(
                socketPath: path, targets: [:], initiatorPort: "client")
            configuration.mode = .client
            let server = VhostUserSCSIServer(
                configuration: configuration, reactor: world.reactor, report: { _ in })
            return Result {
                try server.start()
                return server
            }
        }.get()
        #expect(world.sleeps())
        // Nobody listened until now; then one front-end after another is there, at a socket that is made anew.
        for _ in 0..<3 {
            let listener = try listeningSocket(path)
            let connection = try acceptOne(listener)
            let message = VhostUserChannel.message(.getFeatures, [])
            #expect(unsafe Glibc.write(connection, message, message.count) == message.count)
            var reply = [UInt8](repeating: 0, count: 20)
            try waitUntilReadable(connection)
            #expect(unsafe read(connection, &reply, 20) == 20)
            #expect(world.onReactor { server.isConnected })
            close(listener)
            unsafe unlink(path)
            close(connection)
        }
        let signal = ServerWorld.Signal()
        world.onReactor { server.stop { signal.raise() } }
        signal.wait()
    }

    @Test func whatIsPassedInAndIsNoSocketIsRefused() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let file = eventfd(0, Int32(EFD_CLOEXEC))
        defer { close(file) }
        let error = #expect(throws: VhostUserSCSIServer.StartError.self) {
            try world.onReactor {
                let server = VhostUserSCSIServer(
                    configuration: VhostUserSCSIServer.Configuration(
                        socketPath: "/proc/self/fd/\(file)", targets: [:], initiatorPort: "passed in"),
                    reactor: world.reactor, report: { _ in })
                return Result { try server.start() }
            }.get()
        }
        guard case .notPassedIn = error else {
            Issue.record("\(String(describing: error))")
            return
        }
    }

    @Test func anIdleServerSleeps() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        #expect(world.sleeps())
        #expect(try frontEnd.requests.run(Self.write(1)).isGood)
    }

    @Test func aRingWithoutAKickDescriptorIsPolled() throws {
        let world = try ServerWorld()
        defer { world.stop() }
        let frontEnd = try VhostUserFrontEnd.ready(world)
        _ = try frontEnd.stop(frontEnd.requests)
        try frontEnd.setUp(frontEnd.requests, base: UInt32(frontEnd.requests.ring.usedIndex))
        try frontEnd.tell(.setVringKick, WireBytes.of(UInt64(2 | 0x100)))
        let request = frontEnd.requests.enqueue(Self.write(1))
        _ = frontEnd.requests.ring.publish()
        #expect(try request.wait().isGood)
    }
}

/// How many mappings of a shared memory this process has.
func mappings(of memory: SharedMemory) throws -> Int {
    var status = stat()
    guard unsafe fstat(memory.descriptor, &status) == 0 else { return -1 }
    let file = unsafe fopen("/proc/self/maps", "r")
    guard let file = unsafe file else { return -1 }
    defer { unsafe fclose(file) }
    var count = 0
    var line: UnsafeMutablePointer<CChar>?
    var capacity = 0
    while unsafe getline(&line, &capacity, file) > 0 {
        let fields = unsafe String(cString: line!).split(separator: " ")
        if fields.count > 4, fields[4] == "\(status.st_ino)", fields.last?.contains("deleted") == true { count += 1 }
    }
    unsafe free(line)
    return count
}

/// Waits until something can be read, or taken, at a descriptor.
private func waitUntilReadable(_ descriptor: Int32) throws {
    var entry = pollfd(fd: descriptor, events: Int16(POLLIN), revents: 0)
    guard unsafe poll(&entry, 1, 30_000) == 1 else { throw InitiatorError.timeout("a descriptor to become readable") }
}

/// Waits for a connection and takes it.
private func acceptOne(_ listener: Int32) throws -> Int32 {
    try waitUntilReadable(listener)
    let connection = Glibc.accept(listener, nil, nil)
    guard connection >= 0 else { throw InitiatorError.systemCall("accept", errno: errno) }
    return connection
}

/// A socket that listens at a path.
private func listeningSocket(_ path: String) throws -> Int32 {
    let descriptor = try boundSocket(path)
    precondition(listen(descriptor, 1) == 0)
    return descriptor
}

/// Binds a socket and closes it: what a process leaves behind that was killed.
private func makeStaleSocket(_ path: String) throws { close(try boundSocket(path)) }

private func boundSocket(_ path: String) throws -> Int32 {
    let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0)
    var address = sockaddr_un()
    address.sun_family = sa_family_t(AF_UNIX)
    unsafe withUnsafeMutableBytes(of: &address.sun_path) { unsafe $0.copyBytes(from: path.utf8) }
    let code = unsafe withUnsafePointer(to: &address) {
        unsafe bind(
            descriptor, UnsafeRawPointer($0).assumingMemoryBound(to: sockaddr.self),
            socklen_t(MemoryLayout<sockaddr_un>.size))
    }
    precondition(code == 0)
    return descriptor
}
