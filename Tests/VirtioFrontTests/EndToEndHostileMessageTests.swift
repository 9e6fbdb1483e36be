// EndToEndHostileMessageTests: what a front-end may send over the socket, and that it harms nobody but itself.
//
// Called by: swift test. Must not know: the server's inside.

import CLinux
import Glibc
import Testing
import VhostUserInitiator

/// A message, or a part of one, that no honest front-end sends.
struct BadMessage: CustomTestStringConvertible, Sendable {
    let testDescription: String
    let bytes: [UInt8]
    var descriptors = 0

    init(_ name: String, _ bytes: [UInt8], descriptors: Int = 0) {
        testDescription = name
        self.bytes = bytes
        self.descriptors = descriptors
    }

    init(_ name: String, _ request: VhostUserRequest, _ payload: [UInt8], descriptors: Int = 0) {
        self.init(name, VhostUserChannel.message(request, payload), descriptors: descriptors)
    }

    private static func header(_ request: UInt32, _ flags: UInt32, _ size: UInt32) -> [UInt8] {
        WireBytes.of(request, flags, size)
    }

    /// Messages that end the connection: with these nothing that follows could be understood.
    static let fatal: [BadMessage] = [
        BadMessage("version 0", header(1, 0, 0)),
        BadMessage("version 2", header(1, 2, 0)),
        BadMessage("a reply", header(1, 1 | 4, 0)),
        BadMessage("a payload of 4 GiB", header(5, 1, UInt32.max)),
        BadMessage("a payload longer than any", header(5, 1, 1 << 20)),
        BadMessage("GET_FEATURES with a payload", .getFeatures, [0]),
        BadMessage("SET_FEATURES without a payload", .setFeatures, []),
        BadMessage("SET_FEATURES of 7 bytes", .setFeatures, [UInt8](repeating: 0, count: 7)),
        BadMessage("SET_VRING_NUM of 4 bytes", .setVringNumber, WireBytes.of(UInt32(0))),
        BadMessage("SET_VRING_ADDR of 39 bytes", .setVringAddress, [UInt8](repeating: 0, count: 39)),
        BadMessage("SET_VRING_KICK of 4 bytes", .setVringKick, WireBytes.of(UInt32(0))),
        BadMessage("SET_MEM_TABLE of 4 bytes", .setMemoryTable, WireBytes.of(UInt32(0))),
        BadMessage("ADD_MEM_REG of 8 bytes", .addMemoryRegion, WireBytes.of(UInt64(0))),
        BadMessage("GET_VRING_BASE of a ring that is not there", .getVringBase, WireBytes.of(UInt32(99), 0)),
    ]

    /// Messages that are refused: by the acknowledgement if one is asked for, else by the end of the connection.
    static let refused: [BadMessage] = [
        BadMessage("features that are not offered", .setFeatures, WireBytes.of(UInt64.max)),
        BadMessage("protocol features that are not offered", .setProtocolFeatures, WireBytes.of(UInt64.max)),
        BadMessage("an unknown request", .number(77), []),
        BadMessage("request 0", .number(0), []),
        BadMessage("SET_VRING_NUM 0", .setVringNumber, WireBytes.of(UInt32(3), 0)),
        BadMessage("SET_VRING_NUM 3", .setVringNumber, WireBytes.of(UInt32(3), 3)),
        BadMessage("SET_VRING_NUM of 32,768", .setVringNumber, WireBytes.of(UInt32(3), 32768)),
        BadMessage("SET_VRING_NUM of a ring that is not there", .setVringNumber, WireBytes.of(UInt32(6), 128)),
        BadMessage("SET_VRING_NUM of ring 2^32-1", .setVringNumber, WireBytes.of(UInt32.max, 128)),
        BadMessage("SET_VRING_BASE of a ring that is not there", .setVringBase, WireBytes.of(UInt32(6), 0)),
        BadMessage("SET_VRING_ENABLE of a ring that is not there", .setVringEnable, WireBytes.of(UInt32(6), 1)),
        BadMessage(
            "SET_VRING_KICK of a ring that is not there", .setVringKick, WireBytes.of(UInt64(6)), descriptors: 1),
        BadMessage("SET_VRING_KICK without a descriptor", .setVringKick, WireBytes.of(UInt64(3))),
        BadMessage("SET_VRING_CALL without a descriptor", .setVringCall, WireBytes.of(UInt64(3))),
        BadMessage("SET_VRING_ERR without a descriptor", .setVringError, WireBytes.of(UInt64(3))),
        BadMessage("SET_VRING_KICK with two descriptors", .setVringKick, WireBytes.of(UInt64(3)), descriptors: 2),
        BadMessage(
            "SET_VRING_KICK with a descriptor that it denies", .setVringKick, WireBytes.of(UInt64(3 | 256)),
            descriptors: 1),
        BadMessage("SET_VRING_KICK with a file", .setVringKick, WireBytes.of(UInt64(3)), descriptors: -1),
        BadMessage("SET_MEM_TABLE of 1 region in 8 bytes", .setMemoryTable, WireBytes.of(UInt32(1), 0), descriptors: 1),
        BadMessage("SET_MEM_TABLE of 2^32-1 regions", .setMemoryTable, WireBytes.of(UInt32.max, 0)),
        BadMessage("SET_MEM_TABLE without its descriptor", .setMemoryTable, table((0x1000, 4096, 0x1000, 0))),
        BadMessage("SET_MEM_TABLE with an eventfd", .setMemoryTable, table((0x1000, 4096, 0x1000, 0)), descriptors: 1),
        BadMessage(
            "a region longer than its file", .setMemoryTable, table((0x1000, 1 << 40, 0x1000, 0)), descriptors: -1),
        BadMessage(
            "a region whose end is no address", .setMemoryTable, table((UInt64.max - 4095, 8192, 0x1000, 0)),
            descriptors: -1),
        BadMessage(
            "a region whose offset is no number", .setMemoryTable, table((0x1000, 4096, 0x1000, UInt64.max)),
            descriptors: -1),
        BadMessage("an empty region", .setMemoryTable, table((0x1000, 0, 0x1000, 0)), descriptors: -1),
        BadMessage(
            "regions that overlap", .setMemoryTable, table((0x1000, 8192, 0x1000, 0), (0x2000, 4096, 0x8000, 0)),
            descriptors: -2),
        BadMessage("ADD_MEM_REG without a descriptor", .addMemoryRegion, region((0x1000, 4096, 0x1000, 0))),
        BadMessage("REM_MEM_REG of no region", .removeMemoryRegion, region((0x1000, 4096, 0x1000, 0))),
        BadMessage(
            "SET_LOG_BASE without its feature", .setLogBase, WireBytes.of(UInt64(4096), 0), descriptors: -1),
        BadMessage(
            "SET_VRING_ADDR with unknown flags", .setVringAddress,
            WireBytes.of(UInt32(3), 2) + [UInt8](repeating: 0, count: 32)),
    ]

    private typealias Region = (guest: UInt64, size: UInt64, user: UInt64, offset: UInt64)

    private static func table(_ regions: Region...) -> [UInt8] {
        WireBytes.of(UInt32(regions.count), 0)
            + regions.flatMap { WireBytes.of($0.guest, $0.size, $0.user, $0.offset) }
    }

    private static func region(_ region: Region) -> [UInt8] {
        WireBytes.of(UInt64(0), region.guest, region.size, region.user, region.offset)
    }

    /// Descriptors for the message: eventfds, or for a negative count files of 64 KiB. The caller closes them.
    func openDescriptors() -> [Int32] {
        (0..<abs(descriptors)).map { _ in
            guard descriptors < 0 else { return eventfd(0, Int32(EFD_CLOEXEC)) }
            let file = unsafe memfd_create("hostile", UInt32(MFD_CLOEXEC))
            _ = ftruncate(file, 65_536)
            return file
        }
    }
}

/// How many descriptors of this process lead to the same files as these, themselves included. The other tests of this
/// process open and close descriptors meanwhile, so all of them together would tell nothing.
private func references(_ descriptors: [Int32]) -> Int {
    guard let directory = unsafe opendir("/proc/self/fd") else { return -1 }
    defer { unsafe closedir(directory) }
    var open: [Int32] = []
    while let entry = unsafe readdir(directory) {
        let name = unsafe withUnsafeBytes(of: entry.pointee.d_name) { unsafe $0.prefix { $0 != 0 }.map { $0 } }
        if let number = Int32(String(decoding: name, as: UTF8.self)) { open.append(number) }
    }
    return descriptors.reduce(0) { count, descriptor in
        count + open.filter { clinux_peer_same_file(descriptor, $0) == 1 }.count
    }
}

@Suite
struct EndToEndHostileMessageTests {
    /// Runs hostile front-ends at socket 0 while a guest works at socket 1; then socket 0 serves an honest one, and no
    /// descriptor is left behind.
    private func nobodyIsHarmed(_ attack: (TestDaemon) throws -> Void) throws {
        try withDaemon(sockets: 2) { daemon in
            let other = try VhostUserFrontEnd.ready(daemon, socket: 1)
            try attack(daemon)
            try daemon.waitForDisconnection()
            #expect(try other.requests.run(read10(unit(0), block: 0, count: 1)).isGood)
            let honest = try VhostUserFrontEnd.ready(daemon)
            #expect(try honest.requests.run(read10(unit(0), block: 0, count: 1)).isGood)
        }
    }

    @Test(arguments: BadMessage.fatal)
    func whatCannotBeUnderstoodEndsTheConnection(message: BadMessage) throws {
        try nobodyIsHarmed { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            try frontEnd.channel.sendRaw(message.bytes)
            try frontEnd.channel.waitForClose()
            try daemon.waitForDisconnection()
            #expect(!daemon.complaints().isEmpty, "somebody is told why")
        }
    }

    @Test(arguments: BadMessage.refused)
    func whatCannotBeDoneIsRefused(message: BadMessage) throws {
        try nobodyIsHarmed { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let descriptors = message.openDescriptors()
            defer { for descriptor in descriptors { close(descriptor) } }
            var bytes = message.bytes
            bytes[4] |= UInt8(VhostUserChannel.needReplyFlag)
            try frontEnd.channel.sendRaw(bytes, descriptors: descriptors)
            let reply = try frontEnd.channel.receive()
            #expect(reply.number != nil && reply.number != 0)
            #expect(try frontEnd.requests.run(read10(unit(0), block: 0, count: 1)).isGood, "the session goes on")
            try frontEnd.channel.sendRaw(message.bytes, descriptors: descriptors)
            try frontEnd.channel.waitForClose()
        }
    }

    @Test
    func messagesInAnyOrderAreSurvived() throws {
        try nobodyIsHarmed { daemon in
            let file = unsafe memfd_create("hostile", UInt32(MFD_CLOEXEC))
            let event = eventfd(0, Int32(EFD_CLOEXEC))
            defer {
                close(file)
                close(event)
            }
            _ = ftruncate(file, 1 << 20)
            let memory = WireBytes.of(UInt32(1), 0) + WireBytes.of(UInt64(0x1000), 1 << 20, 0x10000, 0)
            let addresses = WireBytes.of(UInt32(2), 0) + WireBytes.of(UInt64(0x10000), 0x11000, 0x12000, 0)
            let messages: [(VhostUserRequest, [UInt8], [Int32])] = [
                (.setOwner, [], []), (.resetOwner, [], []), (.setFeatures, WireBytes.of(UInt64(1) << 32 | 1 << 30), []),
                (.setProtocolFeatures, WireBytes.of(UInt64(1)), []), (.setMemoryTable, memory, [file]),
                (.setMemoryTable, WireBytes.of(UInt32(0), 0), []), (.setVringNumber, WireBytes.of(UInt32(2), 64), []),
                (.setVringBase, WireBytes.of(UInt32(2), 60_000), []), (.setVringAddress, addresses, []),
                (.setVringKick, WireBytes.of(UInt64(2)), [event]), (.setVringCall, WireBytes.of(UInt64(2)), [event]),
                (.setVringEnable, WireBytes.of(UInt32(2), 1), []), (.setVringEnable, WireBytes.of(UInt32(2), 0), []),
                (.getVringBase, WireBytes.of(UInt32(2), 0), []), (.getFeatures, [], []),
            ]
            var random: UInt64 = 88_172_645_463_325_252
            for _ in 0..<50 {
                let channel = try VhostUserChannel(path: daemon.paths[0])
                do {
                    for _ in 0..<60 {
                        random ^= random << 13
                        random ^= random >> 7
                        random ^= random << 17
                        let (request, payload, descriptors) = messages[Int(random >> 33) % messages.count]
                        try channel.send(request, payload, descriptors: descriptors)
                        if request == .getVringBase || request == .getFeatures { _ = try channel.receive() }
                    }
                } catch InitiatorError.disconnected {
                    // A message that makes no sense there was refused, and no acknowledgement had been asked for.
                }
                channel.shutDown()
                try daemon.waitForDisconnection()
            }
        }
    }

    @Test
    func aFrontEndMayGoAtAnyByte() throws {
        try nobodyIsHarmed { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let recorded = frontEnd.channel.sent
            let descriptors = Array(Set(recorded.flatMap(\.descriptors)))
            frontEnd.disconnect()
            try daemon.waitForDisconnection()
            #expect(references(descriptors) == descriptors.count)
            for (number, message) in recorded.enumerated() {
                for length in message.bytes.indices where length < 14 || length == message.bytes.count - 1 {
                    let before = daemon.connections()
                    let channel = try VhostUserChannel(path: daemon.paths[0])
                    // It has to be accepted before it goes: the next one would be refused beside it.
                    try daemon.eventually("the server to accept the front-end") { _ in daemon.connections() > before }
                    for earlier in recorded[..<number] {
                        try channel.sendRaw(earlier.bytes, descriptors: earlier.descriptors)
                        if earlier.awaitedReply { _ = try channel.receive() }
                    }
                    if length > 0 {
                        try channel.sendRaw(Array(message.bytes[..<length]), descriptors: message.descriptors)
                    }
                    channel.shutDown()
                    try daemon.waitForDisconnection()
                }
                #expect(references(descriptors) == descriptors.count, "after part of \(message)")
            }
        }
    }

    @Test
    func messagesMayComeByteByByte() throws {
        try nobodyIsHarmed { daemon in
            let channel = try VhostUserChannel(path: daemon.paths[0])
            for byte in VhostUserChannel.message(.getFeatures, []) + VhostUserChannel.message(.getQueueNumber, []) {
                try channel.sendRaw([byte])
            }
            #expect(try channel.receive().request == VhostUserRequest.getFeatures.rawValue)
            #expect(try channel.receive().number == UInt64(TestDaemon.requestQueues + 2))
            channel.shutDown()
        }
    }

    @Test
    func descriptorsThatNobodyAskedForAreClosed() throws {
        try nobodyIsHarmed { daemon in
            let channel = try VhostUserChannel(path: daemon.paths[0])
            try channel.send(.getFeatures)
            _ = try channel.receive()
            let descriptors = (0..<20).map { _ in eventfd(0, Int32(EFD_CLOEXEC)) }
            defer { for descriptor in descriptors { close(descriptor) } }
            for _ in 0..<10 {
                try channel.send(.getFeatures, descriptors: descriptors)
                _ = try channel.receive()
            }
            // The reply goes out before the message is over.
            daemon.performOnServers { _ in }
            #expect(references(descriptors) == descriptors.count)
            channel.shutDown()
        }
    }

    @Test
    func moreDescriptorsThanAnyMessageNeedsAreSurvived() throws {
        try nobodyIsHarmed { daemon in
            let descriptors = (0..<200).map { _ in eventfd(0, Int32(EFD_CLOEXEC)) }
            defer { for descriptor in descriptors { close(descriptor) } }
            let channel = try VhostUserChannel(path: daemon.paths[0])
            // One byte at a time, each with as many as there are.
            do {
                for byte in VhostUserChannel.message(.getFeatures, []) {
                    try channel.sendRaw([byte], descriptors: descriptors)
                }
            } catch InitiatorError.disconnected {
                // That is an answer as well.
            }
            channel.shutDown()
            try daemon.waitForDisconnection()
            #expect(references(descriptors) == descriptors.count)
        }
    }

    @Test
    func aSecondFrontEndIsTurnedAway() throws {
        try withDaemon { daemon in
            let first = try VhostUserFrontEnd.ready(daemon)
            let second = try VhostUserChannel(path: daemon.paths[0])
            try second.waitForClose()
            #expect(try first.requests.run(testUnitReady(unit(0))).isGood)
        }
    }

    @Test
    func aCallDescriptorThatIsNoEventfdIsRefused() throws {
        try nobodyIsHarmed { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            var ends: [Int32] = [-1, -1]
            precondition(unsafe pipe(&ends) == 0)
            defer {
                close(ends[0])
                close(ends[1])
            }
            for request in [VhostUserRequest.setVringCall, .setVringKick, .setVringError] {
                #expect(throws: InitiatorError.refused(request, code: 1)) {
                    try frontEnd.tell(request, WireBytes.of(UInt64(2)), descriptors: [ends[1]])
                }
            }
            #expect(try frontEnd.requests.run(read10(unit(0), block: 0, count: 1)).isGood)
            frontEnd.disconnect()
        }
    }

    @Test
    func aCallDescriptorThatIsFullAndBlocksKeepsNobody() throws {
        try nobodyIsHarmed { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            let call = frontEnd.requests.callDescriptor
            var full = UInt64.max - 1
            #expect(unsafe write(call, &full, 8) == 8)
            // The flags belong to the open file, which both sides share.
            #expect(fcntl(call, F_SETFL, 0) == 0)
            // The used ring tells, though nobody is notified.
            let read = frontEnd.requests.submit(read10(unit(0), block: 0, count: 1))
            while !frontEnd.requests.ring.hasUsed { sched_yield() }
            #expect(try read.wait().isGood)
            frontEnd.disconnect()
        }
    }

    @Test
    func ringsOutsideOfTheMemoryAreNotServed() throws {
        try nobodyIsHarmed { daemon in
            let frontEnd = try VhostUserFrontEnd.ready(daemon)
            _ = try frontEnd.stop(frontEnd.requests)
            let memory = frontEnd.memories[0]
            let end = memory.userAddress + UInt64(memory.size)
            for address in [0, end - 16, end, UInt64.max, memory.userAddress + 1] {
                let payload = WireBytes.of(UInt32(2), 0) + WireBytes.of(address, address, address, 0)
                try frontEnd.tell(.setVringAddress, payload)
                try frontEnd.tell(
                    .setVringKick, WireBytes.of(UInt64(2)), descriptors: [frontEnd.requests.kickDescriptor])
                try frontEnd.requests.waitForError()
            }
            frontEnd.requests.reset()
            try frontEnd.start(frontEnd.requests)
            #expect(try frontEnd.requests.run(testUnitReady(unit(0))).isGood)
            frontEnd.disconnect()
        }
    }
}
