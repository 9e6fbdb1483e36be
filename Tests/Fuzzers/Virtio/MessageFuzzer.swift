// MessageFuzzer: a vhost-user-scsi server and a front-end that sends any sequence of messages with any file
// descriptors, fills rings, kicks, shortens its memory's file, and goes away at any moment.
//
// Oracles, beside that nothing traps and the sanitizer is content: the server stops when it is told to, all tasks end,
// no memory stays mapped, and no file descriptor is left.
//
// Called by: libFuzzer. Must not know: what the messages do.

import CFuzzer
import CoreTestSupport
import Glibc
import Reactor
import SCSICore
import VirtioFront

enum MessageFuzzer {
    static func run(_ input: FuzzInput) {
        let before = OpenDescriptors()
        let guest = FuzzedGuest()
        serve(input, guest)
        guest.release()
        precondition(OpenDescriptors() == before, "a file descriptor was left open")
    }

    private static func serve(_ input: FuzzInput, _ guest: FuzzedGuest) {
        let world = MessageWorld(input, guest)
        world.act()
        world.finish()
    }
}

/// The numbers of the messages that the fuzzer knows how to fill.
private enum Request {
    static let getFeatures: UInt32 = 1, setFeatures: UInt32 = 2, setOwner: UInt32 = 3, setMemoryTable: UInt32 = 5
    static let setLogBase: UInt32 = 6, setNumber: UInt32 = 8, setAddress: UInt32 = 9, setBase: UInt32 = 10
    static let getBase: UInt32 = 11, setKick: UInt32 = 12, setCall: UInt32 = 13, setError: UInt32 = 14
    static let setProtocolFeatures: UInt32 = 16, setEnable: UInt32 = 18, setChannel: UInt32 = 21
    static let getConfiguration: UInt32 = 24, setConfiguration: UInt32 = 25, getInflight: UInt32 = 31
    static let setInflight: UInt32 = 32, resetDevice: UInt32 = 34, kick: UInt32 = 35, addRegion: UInt32 = 37
    static let removeRegion: UInt32 = 38, setStatus: UInt32 = 39
}

private final class MessageWorld {
    private var input: FuzzInput
    private let guest: FuzzedGuest
    private let core = FuzzedTarget()
    private let server: VhostUserSCSIServer
    private var socket: Int32
    /// A file of no use yet: the dirty log, the notes of what is in flight.
    private let file = fuzzer_memory(0x4000)
    /// What GET_INFLIGHT_FD brought.
    private var inflight: Int32 = -1
    private var kicks: [Int32]
    private let calls: [Int32]
    private var isStopped = false, hasAskedToStop = false
    /// Whether the front-end is gone before the server is told to stop.
    private let goesFirst: Bool
    private var hasSecondTarget = false
    private let second: TargetDevice

    init(_ input: FuzzInput, _ guest: FuzzedGuest) {
        self.guest = guest
        var input = input
        let choice = input.byte()
        var sockets: [Int32] = [-1, -1]
        _ = unsafe fuzzer_socket_pair(&sockets)
        var configuration = VhostUserSCSIServer.Configuration(
            socketPath: "/proc/self/fd/\(sockets[0])", requestQueues: 2, targets: [0: core.target],
            initiatorPort: "guest")
        configuration.options.offersConfiguration = choice & 1 != 0
        configuration.options.offersRingReset = choice & 2 != 0
        goesFirst = choice & 4 != 0
        server = VhostUserSCSIServer(
            configuration: configuration, reactor: FuzzedTarget.reactor, report: { _ in })
        try! server.start()
        close(sockets[0])
        socket = sockets[1]
        kicks = (0..<FuzzedGuest.rings).map { _ in eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) }
        calls = (0..<3).map { _ in eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK)) }
        second = unsafe TargetDevice(name: 0x3001_4054_0000_0fff, shard: FuzzedTarget.shard)
        self.input = input
    }

    // MARK: Actions

    func act() {
        // Most inputs begin as front-ends do, so that the others' noise gets deep.
        if input.byte() & 7 != 0 { setUp(input.byte()) }
        while !input.isEmpty {
            let action = input.below(20)
            Trace.note("action \(action)")
            switch action {
            case 0...2: sendKnown()
            case 3: sendNoise()
            case 4...8: guest.put([2, 2, 3, 0, 1][input.below(5)], &input)
            case 9: _ = clinux_signal(kicks[input.below(kicks.count)])
            case 10, 11: turn()
            case 12: kickAll()
            case 13: core.complete(&input)
            case 14: core.completeAll()
            case 15: guest.store(input.number(UInt32.self), at: Int(input.number(UInt16.self)))
            case 16: core.toggleUnit()
            case 17: setUp(input.byte())
            case 18: rarelyDone()
            default: stopAndStart(input.below(FuzzedGuest.rings))
            }
        }
    }

    private func rarelyDone() {
        switch input.below(8) {
        case 0: shutdown(socket, Int32(SHUT_WR))
        case 1: disconnect()
        case 2: stop()
        // The file of the guest's memory becomes shorter while it is mapped, and whole again.
        case 3:
            _ = ftruncate(guest.descriptors[input.below(2)], off_t(input.number(UInt16.self)))
            turn()
            _ = ftruncate(guest.descriptors[0], FuzzedGuest.split)
            _ = ftruncate(guest.descriptors[1], FuzzedGuest.size - FuzzedGuest.split)
        case 4:
            if hasSecondTarget { server.detach(number: 9) } else { server.attach(second, number: 9) }
            hasSecondTarget.toggle()
        case 5:
            var bytes = [UInt8](repeating: 0, count: 0x400)
            for index in bytes.indices where input.rarely(3) { bytes[index] = input.byte() }
            _ = unsafe pwrite(input.flag() && inflight >= 0 ? inflight : file, bytes, bytes.count, 0)
        default:
            let index = input.below(kicks.count)
            close(kicks[index])
            kicks[index] = eventfd(0, Int32(EFD_CLOEXEC | EFD_NONBLOCK))
        }
    }

    private func kickAll() {
        for kick in kicks { _ = clinux_signal(kick) }
        turn()
    }

    /// Turns the reactor until it has seen everything that is there, and reads what the server has said.
    private func turn() {
        for _ in 0..<4 { FuzzedTarget.reactor.turn(mayWait: false) }
        guard socket >= 0 else { return }
        var bytes = [UInt8](repeating: 0, count: 4096)
        var received = [Int32](repeating: -1, count: 32)
        var count: Int32 = 0
        while unsafe clinux_receive(socket, &bytes, bytes.count, &received, 32, &count) > 0 {
            for descriptor in received[..<Int(count)] {
                if inflight >= 0 { close(inflight) }
                inflight = descriptor
            }
        }
    }

    // MARK: Messages

    private func send(_ request: UInt32, _ payload: [UInt8], _ descriptors: [Int32] = [], flags: UInt32 = 9) {
        guard socket >= 0 else { return }
        Trace.note("message \(request) with \(payload), descriptors \(descriptors), flags \(flags)")
        let bytes = wire(request) + wire(flags) + wire(UInt32(payload.count)) + payload
        _ = unsafe fuzzer_send(socket, bytes, bytes.count, descriptors, Int32(descriptors.count))
    }

    private func wire<Value: FixedWidthInteger>(_ values: Value...) -> [UInt8] {
        values.flatMap { value in
            (0..<MemoryLayout<Value>.size).map { UInt8(truncatingIfNeeded: value >> Value(8 * $0)) }
        }
    }

    /// A device as a front-end makes it.
    private func setUp(_ choice: UInt8) {
        var features: UInt64 = 1 << 32 | 1 << 30 | 3 << 1
        if choice & 1 != 0 { features |= 1 << 34 }
        if choice & 2 != 0 { features |= 1 << 28 }
        if choice & 4 != 0 { features |= 1 << 29 }
        if choice & 8 != 0 { features |= 1 << 35 }
        if choice & 16 != 0 { features |= 1 << 26 }
        if choice & 64 != 0 { features |= 1 }
        send(Request.setOwner, [])
        send(Request.setProtocolFeatures, wire(choice & 32 != 0 ? 0x1f02b as UInt64 : 0x1b02b))
        send(Request.setFeatures, wire(features))
        sendMemory()
        turn()
        if choice & 64 != 0 {
            send(Request.getInflight, wire(UInt64(0), 0) + wire(UInt16(4), 16))
            turn()
            sendInflight()
        }
        for ring in 0..<FuzzedGuest.rings {
            guest.resetRing(ring, RingShape(size: choice & 128 != 0 ? 4 : 16, isPacked: choice & 1 != 0))
            start(ring)
        }
    }

    private func sendMemory() {
        let regions = guest.regions
        let table = regions.flatMap { wire($0.guestAddress, $0.size, $0.userAddress, 0) }
        send(Request.setMemoryTable, wire(UInt32(regions.count), 0) + table, regions.map(\.descriptor))
    }

    private func sendInflight() {
        let size = inflight >= 0 ? UInt64(lseek(inflight, 0, Int32(SEEK_END))) : 0x4000
        send(
            Request.setInflight, wire(size, 0) + wire(UInt16(4), 16), [inflight >= 0 ? inflight : file])
    }

    private func start(_ ring: Int) {
        let index = UInt32(ring)
        send(Request.setNumber, wire(index, UInt32(guest.shapes[ring].size)))
        send(Request.setBase, wire(index, guest.shapes[ring].isPacked ? 0x8000_8000 : 0))
        send(Request.setAddress, addresses(ring))
        send(Request.setCall, wire(UInt64(ring)), [calls[0]])
        send(Request.setError, wire(UInt64(ring)), [calls[1]])
        send(Request.setKick, wire(UInt64(ring)), [kicks[ring]])
        send(Request.setEnable, wire(index, 1))
        turn()
    }

    private func addresses(_ ring: Int) -> [UInt8] {
        let base = FuzzedGuest.userAddress
        return wire(UInt32(ring), 1)
            + wire(
                base + UInt64(FuzzedGuest.descriptorArea(ring)), base + UInt64(FuzzedGuest.usedArea(ring)),
                base + UInt64(FuzzedGuest.availableArea(ring)),
                FuzzedGuest.guestAddress + UInt64(FuzzedGuest.usedArea(ring)))
    }

    private func stopAndStart(_ ring: Int) {
        send(Request.getBase, wire(UInt32(ring), 0))
        turn()
        core.completeAll()
        turn()
        guest.resetRing(ring, guest.shapes[ring])
        start(ring)
    }

    private func anyRing() -> UInt32 { input.rarely(16) ? input.number() : UInt32(input.below(FuzzedGuest.rings)) }

    private func anyDescriptor() -> Int32 {
        switch input.below(12) {
        case 0: file
        case 1: inflight >= 0 ? inflight : file
        case 2: socket
        case 3: guest.descriptors[0]
        case 4: guest.descriptors[1]
        case 5: calls[2]
        default: kicks[input.below(kicks.count)]
        }
    }

    /// A message with the right form and, mostly, contents that make sense.
    private func sendKnown() {
        var (request, payload, descriptors) = known()
        if input.rarely(8), !payload.isEmpty { payload[input.below(payload.count)] = input.byte() }
        if input.rarely(32) { payload = Array(payload.prefix(input.below(64))) }
        if input.rarely(16) { descriptors = (0..<input.below(4)).map { _ in anyDescriptor() } }
        if input.rarely(32) { request = UInt32(input.byte()) }
        send(request, payload, descriptors, flags: input.rarely(32) ? UInt32(input.byte()) : 9)
        if input.flag() { turn() }
    }

    private func known() -> (UInt32, [UInt8], [Int32]) {
        let ring = input.below(FuzzedGuest.rings)
        switch input.below(26) {
        case 0: return (Request.setFeatures, wire(input.number(UInt64.self)), [])
        case 1: return (Request.setFeatures, wire(1 << 32 | 1 << 30 | UInt64(input.byte() & 0x2f) << 26), [])
        case 2: return (Request.setProtocolFeatures, wire(0x1f22b & input.number(UInt64.self) | 8), [])
        case 3: return (Request.setOwner, [], [])
        case 4: return (Request.setMemoryTable, wire(UInt32(1), 0) + region(), [anyDescriptor()])
        case 5: return (Request.setMemoryTable, wire(UInt32(0), 0), [])
        case 6: return (Request.setNumber, wire(anyRing(), UInt32(input.byte())), [])
        case 7: return (Request.setBase, wire(anyRing(), input.number()), [])
        case 8: return (Request.setAddress, addresses(ring), [])
        case 9: return (Request.setEnable, wire(anyRing(), UInt32(input.byte() & 1)), [])
        case 10, 11: return (Request.getBase, wire(anyRing(), 0), [])
        case 12: return (Request.setKick, wire(UInt64(ring)), [input.flag() ? kicks[ring] : anyDescriptor()])
        case 13: return (Request.setKick, wire(UInt64(ring) | 0x100), [])
        case 14:
            return (Request.setCall, wire(UInt64(ring) | (input.flag() ? 0x100 : 0)), input.flag() ? [] : [calls[0]])
        case 15: return (Request.setLogBase, wire(UInt64(input.number(UInt16.self)), UInt64(input.byte())), [file])
        case 16:
            return (Request.getInflight, wire(UInt64(0), 0) + wire(UInt16(input.byte() & 7), UInt16(input.byte())), [])
        case 17:
            return (
                Request.setInflight, wire(UInt64(input.number(UInt16.self)), 0) + wire(4, UInt16(16)), [anyDescriptor()]
            )
        case 18: return (Request.setChannel, [], [socket])
        case 19: return (Request.getConfiguration, configuration(), [])
        case 20: return (Request.setConfiguration, configuration(), [])
        case 21: return (Request.resetDevice, [], [])
        case 22: return (Request.kick, wire(anyRing(), 0), [])
        case 23: return (Request.addRegion, wire(UInt64(0)) + region(), [anyDescriptor()])
        case 24: return (Request.removeRegion, wire(UInt64(0)) + region(), [])
        default: return (Request.setStatus, wire(UInt64(input.byte() & 0x0f)), [])
        }
    }

    private func region() -> [UInt8] {
        var region = guest.regions[input.below(2)]
        if input.rarely(3) { region.guestAddress = input.rarely(4) ? input.number() : UInt64(input.byte()) << 28 }
        if input.rarely(6) { region.size = input.rarely(4) ? input.number() : UInt64(input.byte()) << 12 }
        let offset = input.rarely(6) ? input.number(UInt64.self) : input.rarely(3) ? UInt64(input.byte()) : 0
        return wire(region.guestAddress, region.size, region.userAddress, offset)
    }

    private func configuration() -> [UInt8] {
        let size = input.below(40)
        return wire(UInt32(input.below(64)), UInt32(size), UInt32(input.below(3))) + input.exactly(size)
    }

    /// Bytes that may be a message, in part or several, with any file descriptors.
    private func sendNoise() {
        guard socket >= 0 else { return }
        let bytes = input.bytes(1 + input.below(80))
        let descriptors = (0..<input.below(40)).map { _ in anyDescriptor() }
        guard !bytes.isEmpty else { return }
        _ = unsafe fuzzer_send(socket, bytes, bytes.count, descriptors, Int32(descriptors.count))
    }

    // MARK: The end

    private func disconnect() {
        if socket >= 0 { close(socket) }
        socket = -1
    }

    private func stop() {
        guard !hasAskedToStop else { return }
        hasAskedToStop = true
        server.stop { [unowned self] in
            precondition(!self.isStopped, "a server stopped twice")
            self.isStopped = true
        }
    }

    func finish() {
        if goesFirst { disconnect() }
        turn()
        stop()
        for _ in 0..<4 {
            turn()
            core.completeAll()
        }
        precondition(isStopped, "the server does not stop")
        disconnect()
        turn()
        for descriptor in kicks + calls + [file] { close(descriptor) }
        if inflight >= 0 { close(inflight) }
        core.checkIdle()
    }
}
