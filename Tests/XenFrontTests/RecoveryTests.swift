// RecoveryTests: a daemon that dies at any instant, and its successor on the same ring: each request is answered once.

import CTarget
import CXen
import Glibc
@testable import SCSICore
import Testing

@testable import XenFront
@testable import Xenbus

@Suite("Coming back to a ring after a crash")
struct RecoveryTests {
    private static let ring = RingGuest.ring

    /// What a daemon leaves behind: copies of the ring page and of the record.
    @safe
    private final class Remains {
        let page: UnsafeMutableRawPointer
        let memory: UnsafeMutableRawPointer

        init(_ page: UnsafeMutableRawPointer, _ memory: UnsafeMutableRawPointer) {
            unsafe self.page = .allocate(byteCount: 4096, alignment: 4096)
            unsafe self.page.copyMemory(from: page, byteCount: 4096)
            unsafe self.memory = .allocate(byteCount: InflightRecord.bytes, alignment: 64)
            unsafe self.memory.copyMemory(from: memory, byteCount: InflightRecord.bytes)
        }

        deinit {
            unsafe page.deallocate()
            unsafe memory.deallocate()
        }

        /// The request numbers that the successor takes up from the record, and those that it finds in the ring.
        func found() -> (recovered: [UInt16], inRing: [UInt16])? {
            let record = unsafe InflightRecord(memory: memory)
            let answered = unsafe VSCSIIFRing.answered(in: page)
            guard let resumption = record.resume(RecoveryTests.ring, answered: answered) else { return nil }
            let recovered = resumption.requests.map { recovered in
                var request = vscsiif_request()
                unsafe record.copyRequest(recovered.index, into: &request)
                return request.rqid
            }
            var ring = unsafe VSCSIIFRing(
                page: page, requestConsumer: resumption.requestConsumer, responseProducer: answered)
            guard let available = ring.available() else { return nil }
            let inRing = (0..<available).map { _ in
                var request = vscsiif_request()
                unsafe ring.take(into: &request)
                return request.rqid
            }
            return (recovered, inRing)
        }
    }

    @Test("At each step of a long run the record and the ring tell what is in flight", arguments: [1, 2, 3, 4])
    func everyStep(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        let page = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
        let memory = UnsafeMutableRawPointer.allocate(byteCount: InflightRecord.bytes, alignment: 64)
        defer {
            unsafe page.deallocate()
            unsafe memory.deallocate()
        }
        unsafe memory.initializeMemory(as: UInt8.self, repeating: 0, count: InflightRecord.bytes)
        unsafe cxen_init_shared_ring(page)
        let record = unsafe InflightRecord(memory: memory)
        record.reset(Self.ring, requestConsumer: 0)
        var ring = unsafe VSCSIIFRing(page: page, requestConsumer: 0, responseProducer: 0)
        var producer: UInt32 = 0
        var number: UInt16 = 0
        // Request numbers by where they are.
        var inRing: [UInt16] = []
        var inFlight: [(slot: Int, number: UInt16)] = []

        func check(_ what: Comment, sourceLocation: SourceLocation = #_sourceLocation) throws {
            let found = try #require(unsafe Remains(page, memory).found(), what, sourceLocation: sourceLocation)
            #expect(found.recovered == inFlight.map(\.number), what, sourceLocation: sourceLocation)
            #expect(found.inRing == inRing, what, sourceLocation: sourceLocation)
        }

        for _ in 0..<400 {
            switch Int.random(in: 0..<3, using: &random) {
            case 0 where inRing.count + inFlight.count < 16:
                number &+= 1
                var request = command(number)
                unsafe cxen_write_request(page, producer, &request)
                producer &+= 1
                unsafe cxen_set_request_producer(page, producer)
                inRing.append(number)
            case 1 where !inRing.isEmpty:
                let slot = (0..<16).first { slot in !inFlight.contains { $0.slot == slot } }!
                let order = ring.requestConsumer
                var request = vscsiif_request()
                unsafe ring.take(into: &request)
                try check("copied")
                unsafe record.take(slot, &request, requestIndex: order)
                // The last store of `take` is the consumer index: before it, the request is still in the ring.
                unsafe cxen_store32(memory + 16, order)
                try check("noted, but not taken")
                unsafe cxen_store32(memory + 16, order &+ 1)
                inFlight.append((slot, inRing.removeFirst()))
                try check("taken")
            case 2 where !inFlight.isEmpty:
                // A turn answers some of them, in any order.
                inFlight.shuffle(using: &random)
                let leaving = inFlight.prefix(Int.random(in: 1...inFlight.count, using: &random))
                inFlight.sort { $0.number < $1.number }
                for (slot, number) in leaving {
                    var response = vscsiif_response()
                    response.rqid = number
                    record.answer(slot, responseIndex: ring.responseProducer)
                    try check("about to be answered")
                    unsafe ring.put(&response)
                    // The slot of another request in flight may be overwritten by now.
                    try check("answered, but not shown")
                }
                _ = ring.publish()
                inFlight.removeAll { entry in leaving.contains { $0.slot == entry.slot } }
                try check("shown")
                for (slot, _) in leaving {
                    record.free(slot)
                    try check("freed")
                }
            default: break
            }
        }
    }

    @Test("A successor answers what its predecessor had in flight, and goes on", arguments: [1, 2, 3])
    func successor(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        let guest = RingGuest()
        var nexus = guest.attach(VirtualDevice(channel: 0, target: 0, lun: 0))
        let page = guest.grant()
        var port = guest.port
        var expected: Set<UInt16> = []
        var free = Set<UInt16>(0..<16)
        var deaths = 0
        for _ in 0..<300 {
            for rqid in free where Bool.random(using: &random) {
                guest.put(command(rqid, direction: 1, segments: [(page, 0, 512)]))
                free.remove(rqid)
                expected.insert(rqid)
            }
            _ = port.poll()
            for task in nexus.tasks.shuffled(using: &random) where Bool.random(using: &random) { nexus.complete(task) }
            if Int.random(in: 0..<8, using: &random) == 0 {
                // Dies before the answers of this turn are given. What it held in memory is lost.
                deaths += 1
                port.stop()
                let (next, nextNexus) = try #require(revive(guest))
                port = next
                nexus = nextNexus
            } else {
                port.flush()
            }
            for response in guest.responses() {
                #expect(expected.remove(response.rqid) != nil, "an answer that nobody waits for")
                free.insert(response.rqid)
            }
        }
        while !expected.isEmpty {
            _ = port.poll()
            let tasks = nexus.tasks
            for task in tasks { nexus.complete(task) }
            port.flush()
            let responses = guest.responses()
            #expect(!responses.isEmpty)
            if responses.isEmpty { break }
            for response in responses { #expect(expected.remove(response.rqid) != nil) }
        }
        #expect(deaths > 10)
        port.stop()
    }

    @Test("A command that the predecessor had in flight says that it may have been carried out, a new one does not")
    func repeatedCommands() throws {
        let guest = RingGuest()
        let first = guest.attach(VirtualDevice(channel: 0, target: 0, lun: 0))
        guest.put(command(1))
        _ = guest.port.poll()
        #expect(first.tasks.map { unsafe $0.command.flags } == [0])
        guest.port.stop()
        let (port, nexus) = try #require(revive(guest))
        guest.put(command(2))
        _ = port.poll()
        #expect(nexus.tasks.map { unsafe $0.command.flags } == [UInt8(SCSI_COMMAND_REPEATED), 0])
        for rqid in 3..<20 as Range<UInt16> {
            let tasks = nexus.tasks
            for task in tasks { nexus.complete(task) }
            port.flush()
            #expect(!guest.responses().isEmpty)
            guest.put(command(rqid))
            _ = port.poll()
            #expect(nexus.tasks.map { unsafe $0.command.flags } == [0])
        }
        port.stop()
    }

    private func revive(_ guest: RingGuest) -> (XenPort, ScriptedNexus)? {
        let record = unsafe InflightRecord(memory: guest.recordMemory)
        let answered = unsafe VSCSIIFRing.answered(in: guest.page)
        guard let resumption = record.resume(Self.ring, answered: answered) else { return nil }
        let port = XenPort(
            domain: RingGuest.domain, wholeTarget: false, grants: guest.grants, staging: guest.staging,
            batch: GrantBatch())
        port.connect(
            unsafe VSCSIIFRing(
                page: guest.page, requestConsumer: resumption.requestConsumer, responseProducer: answered),
            channel: guest.channel, record: record, recovered: resumption.requests)
        let nexus = ScriptedNexus(port)
        _ = port.attach(VirtualDevice(channel: 0, target: 0, lun: 0), unit: LUN(0)!, nexus: nexus)
        port.startRecovered()
        return (port, nexus)
    }

    @Test("A record of another ring, of none, or that contradicts the ring, is not used")
    func foreignRecord() {
        let memory = UnsafeMutableRawPointer.allocate(byteCount: InflightRecord.bytes, alignment: 64)
        defer { unsafe memory.deallocate() }
        unsafe memory.initializeMemory(as: UInt8.self, repeating: 0, count: InflightRecord.bytes)
        let record = unsafe InflightRecord(memory: memory)
        #expect(record.resume(Self.ring, answered: 0) == nil)
        record.reset(Self.ring, requestConsumer: 9)
        #expect(record.resume(RingParameters(ringReference: 8, eventChannel: 4), answered: 9) == nil)
        #expect(record.resume(RingParameters(ringReference: 9, eventChannel: 3), answered: 9) == nil)
        #expect(record.resume(Self.ring, answered: 8) == nil)
        #expect(record.resume(Self.ring, answered: 9) == InflightRecord.Resumption(requestConsumer: 9, requests: []))
        record.invalidate()
        #expect(record.resume(Self.ring, answered: 9) == nil)
    }

    @Test("A record full of noise is refused or used, and never traps", arguments: [1, 2, 3, 4, 5])
    func noise(seed: UInt64) {
        var random = SeededGenerator(seed: seed)
        let memory = UnsafeMutableRawPointer.allocate(byteCount: InflightRecord.bytes, alignment: 64)
        defer { unsafe memory.deallocate() }
        unsafe memory.initializeMemory(as: UInt8.self, repeating: 0, count: InflightRecord.bytes)
        let record = unsafe InflightRecord(memory: memory)
        for _ in 0..<2000 {
            record.reset(Self.ring, requestConsumer: UInt32.random(in: 0...20, using: &random))
            for _ in 0..<Int.random(in: 0..<8, using: &random) {
                let offset = Int.random(in: 5..<InflightRecord.bytes / 4, using: &random) * 4
                unsafe memory.storeBytes(
                    of: UInt32.random(in: 0...24, using: &random), toByteOffset: offset, as: UInt32.self)
            }
            let answered = UInt32.random(in: 0...20, using: &random)
            if let resumption = record.resume(Self.ring, answered: answered) {
                #expect(resumption.requestConsumer &- answered == UInt32(resumption.requests.count))
            }
        }
    }
}
