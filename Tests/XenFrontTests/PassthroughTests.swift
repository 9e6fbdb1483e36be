// PassthroughTests: commands for SCSI devices of this host: what reaches the device, what comes back, and what becomes
// of commands under way when they are aborted, reset or lost.
//
// Must not know: sg, whose part the tests play.

import CLinux
import CTarget
import CXen
import Glibc
@testable import Reactor
@testable import SCSICore
import Testing

@testable import XenFront
@testable import Xenbus

/// A device that keeps what it gets until the test answers.
@safe
private final class ScriptedDevice: HostDevice {
    let descriptor = eventfd(0, Int32(EFD_NONBLOCK | EFD_CLOEXEC))
    var type: UInt8 = 0
    /// How many commands it takes at once.
    var room = 16
    var refuses = false
    private(set) var commands: [HostCommand] = unsafe []
    private(set) var resets: [(wholeTarget: Bool, done: @Sendable (Bool) -> Void)] = []
    private(set) var isClosed = false
    private var ended: [HostCompletion] = []

    func submit(_ command: HostCommand) -> HostSubmission {
        precondition(!isClosed)
        if refuses { return .refused }
        guard unsafe commands.count < room else { return .full }
        unsafe commands.append(command)
        return .accepted
    }

    func next() -> HostCompletion? {
        var count: UInt64 = 0
        _ = unsafe read(descriptor, &count, 8)
        return ended.isEmpty ? nil : ended.removeFirst()
    }

    func reset(wholeTarget: Bool, done: @escaping @Sendable (Bool) -> Void) { resets.append((wholeTarget, done)) }

    func close() {
        isClosed = true
        Glibc.close(descriptor)
    }

    func end(
        _ slot: Int, status: UInt8 = 0, host: UInt8 = 0, residual: Int = 0, sense: [UInt8] = [], data: [UInt8] = []
    ) {
        let command = unsafe commands.remove(at: commands.firstIndex { unsafe $0.slot == slot }!)
        unsafe command.sense.copyBytes(from: sense)
        if !data.isEmpty { unsafe command.data!.copyMemory(from: data, byteCount: data.count) }
        ended.append(
            HostCompletion(slot: slot, status: status, host: host, residual: residual, senseLength: sense.count))
        var one: UInt64 = 1
        _ = unsafe write(descriptor, &one, 8)
    }
}

@Suite("Devices of this host")
struct PassthroughTests {
    private let guest = RingGuest()
    private let reactor: Reactor
    private let device = ScriptedDevice()
    private let nexus: PassthroughNexus
    private let disk = VirtualDevice(channel: 0, target: 1, lun: 2)

    private init() throws {
        reactor = try Reactor(Reactor.Configuration())
        nexus = PassthroughNexus(port: guest.port, reactor: reactor) { [device] _ in device }
        try nexus.add(5)
        #expect(guest.port.attach(disk, unit: LUN(5)!, nexus: nexus))
    }

    private func put(_ rqid: UInt16, cdb: [UInt8] = [0, 0, 0, 0, 0, 0], direction: UInt8 = 3, _ grants: UInt32...) {
        let segments = grants.map { ($0, UInt16(0), UInt16(512)) }
        guest.put(command(rqid, cdb: cdb, direction: direction, target: 1, lun: 2, segments: segments, timeout: 7))
        turn()
    }

    private func turn() {
        reactor.turn(mayWait: false)
        guest.turn()
    }

    @Test("A command reaches the device with its CDB, its data and its time-out")
    func write() throws {
        let bytes = (0..<512).map { UInt8(truncatingIfNeeded: $0 * 3) }
        put(1, cdb: [0x2a, 0, 0, 0, 0, 9, 0, 0, 1, 0], direction: 1, guest.grant(bytes, readOnly: true))
        let command = unsafe try #require(device.commands.first)
        #expect(
            unsafe [UInt8](UnsafeBufferPointer(start: command.cdb, count: command.cdbLength))[..<6] == [
                0x2a, 0, 0, 0, 0, 9,
            ])
        #expect(unsafe command.toDevice && command.length == 512 && command.timeoutMilliseconds == 7000)
        #expect(unsafe [UInt8](UnsafeRawBufferPointer(start: command.data, count: 512)) == bytes)
        device.end(unsafe command.slot)
        turn()
        #expect(guest.responses().map(\.rslt) == [0])
    }

    @Test("Data, status, sense data and residual are the device's")
    func answers() throws {
        let page = guest.grant()
        put(1, cdb: [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], direction: 2, page)
        device.end(unsafe device.commands[0].slot, residual: 500, data: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
        turn()
        #expect(guest.responses().map(\.residual_len) == [500])
        #expect(guest.bytes(page, 0..<14) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0xee, 0xee])
        put(2)
        device.end(unsafe device.commands[0].slot, status: 2, sense: [0x70, 0, 6, 0, 0, 0, 0, 10])
        turn()
        let response = guest.responses()[0]
        #expect(response.rslt == 2 && response.sense_len == 8)
        #expect(unsafe withUnsafeBytes(of: response.sense_buffer) { unsafe $0[2] } == 6)
    }

    @Test(
        "Host codes are passed on; one that guests do not know is ERROR",
        arguments: (1...20).map { ($0, Int32($0)) } + [(21, 7), (200, 7)])
    func hostCodes(_ code: UInt8, _ expected: Int32) {
        put(1)
        device.end(unsafe device.commands[0].slot, host: code)
        turn()
        #expect(guest.responses().map(\.host) == [expected])
    }

    @Test("What the device has no room for waits, in its order")
    func full() {
        device.room = 1
        for rqid in 1...3 { put(UInt16(rqid)) }
        #expect(unsafe device.commands.count == 1)
        for _ in 1...3 {
            device.end(unsafe device.commands[0].slot)
            turn()
        }
        #expect(guest.responses().map(\.rqid) == [1, 2, 3])
    }

    @Test("A command that cannot be handed over is answered")
    func refused() {
        device.refuses = true
        put(1)
        turn()
        #expect(guest.responses().map(\.host) == [7])
    }

    @Test(
        "Commands that reach beyond the device are refused, others are not",
        arguments: [
            ([0x83, 0x00], 0, false), ([0xa4, 0x0a], 0, false), ([0x3b, 0x05], 0, false), ([0x3b, 0x0e], 0, false),
            ([0x3b, 0x02], 0, true), ([0x85, 0x08], 0, false), ([0xa1, 0x08], 0, false), ([0xa1, 0x00], 5, true),
            ([0x04, 0x00], 0, true), ([0x5f, 0x00], 0, true), ([0x84, 0x00], 0, true),
        ] as [([UInt8], UInt8, Bool)])
    func policy(_ begin: [UInt8], _ type: UInt8, _ isAllowed: Bool) {
        device.type = type
        put(1, cdb: begin + [UInt8](repeating: 0, count: 10))
        #expect(unsafe device.commands.isEmpty == !isAllowed)
        if isAllowed { device.end(unsafe device.commands[0].slot) }
        turn()
        let response = guest.responses()[0]
        #expect(response.rslt == (isAllowed ? 0 : 2))
        if !isAllowed {
            #expect(
                unsafe withUnsafeBytes(of: response.sense_buffer) { unsafe [$0[2], $0[12], $0[13]] } == [5, 0x20, 0])
        }
    }

    @Test("An abort resets the device, and is answered after the command")
    func abort() {
        put(1)
        guest.put(function(2, VSCSIIF_ACT_SCSI_ABORT, reference: 1, target: 1, lun: 2))
        turn()
        #expect(device.resets.map(\.wholeTarget) == [false])
        device.resets[0].done(true)
        turn()
        #expect(guest.responses().isEmpty)
        device.end(unsafe device.commands[0].slot, host: 8)
        turn()
        let responses = guest.responses()
        #expect(responses.map(\.rqid) == [1, 2])
        #expect(responses.last?.rslt == XEN_VSCSIIF_RSLT_RESET_SUCCESS)
    }

    @Test("A command that still waits is aborted without a reset")
    func abortQueued() {
        device.room = 1
        put(1)
        put(2)
        guest.put(function(3, VSCSIIF_ACT_SCSI_ABORT, reference: 2, target: 1, lun: 2))
        turn()
        #expect(device.resets.isEmpty)
        let responses = guest.responses()
        #expect(responses.map(\.rqid) == [2, 3] && responses[0].host == 5)
        device.end(unsafe device.commands[0].slot)
        turn()
    }

    @Test("A reset that the device refuses fails, and its commands go on")
    func resetFails() {
        put(1)
        guest.put(function(2, VSCSIIF_ACT_SCSI_RESET, target: 1, lun: 2))
        turn()
        device.resets[0].done(false)
        turn()
        #expect(guest.responses().map(\.rslt) == [XEN_VSCSIIF_RSLT_RESET_FAILED])
        device.end(unsafe device.commands[0].slot)
        turn()
        #expect(guest.responses().map(\.rslt) == [0])
    }

    @Test("A device that is taken away ends its commands and functions, and is closed")
    func detach() {
        device.room = 1
        put(1)
        put(2)
        guest.put(function(3, VSCSIIF_ACT_SCSI_RESET, target: 1, lun: 2))
        turn()
        guest.port.detach(disk)
        turn()
        #expect(device.isClosed)
        let responses = guest.responses()
        #expect(Set(responses.map(\.rqid)) == [1, 2, 3])
        #expect(responses.first { $0.rqid == 3 }?.rslt == XEN_VSCSIIF_RSLT_RESET_FAILED)
        // The reset ends when nobody is there any more.
        device.resets[0].done(true)
        turn()
        #expect(guest.responses().isEmpty)
    }

    @Test("What an earlier daemon may have sent is not sent again")
    func recovered() throws {
        let record = unsafe InflightRecord(memory: guest.recordMemory)
        var request = command(9, cdb: [0x0a, 0, 0, 0, 0, 0], target: 1, lun: 2)
        unsafe record.take(0, &request, requestIndex: 0)
        let port = XenPort(
            domain: RingGuest.domain, wholeTarget: false, grants: guest.grants, staging: guest.staging,
            batch: GrantBatch())
        let unused = ScriptedDevice()
        let second = PassthroughNexus(port: port, reactor: reactor) { _ in unused }
        try second.add(5)
        port.connect(
            unsafe VSCSIIFRing(page: guest.page, requestConsumer: 1, responseProducer: 0), channel: guest.channel,
            record: record, recovered: [InflightRecord.Recovered(index: 0, requestIndex: 0)])
        #expect(port.attach(disk, unit: LUN(5)!, nexus: second))
        port.startRecovered()
        port.flush()
        #expect(unsafe unused.commands.isEmpty)
        #expect(guest.responses().map(\.host) == [8])
    }
}
