// RingFuzzTests: a hostile guest: requests of noise, and a second thread that writes into the ring while it is read.

import CTarget
import CXen
import Glibc
@testable import SCSICore
import Synchronization
import Testing

@testable import XenFront
@testable import Xenbus

@Suite("The vscsiif ring under a hostile guest")
struct RingFuzzTests {
    /// A request in which most fields make sense most of the time.
    private func request(_ rqid: UInt16, _ guest: RingGuest, _ pages: [UInt32], _ random: inout SeededGenerator)
        -> vscsiif_request
    {
        func rarely<Value>(_ usual: Value, _ odd: Value) -> Value {
            Int.random(in: 0..<12, using: &random) == 0 ? odd : usual
        }
        let page = pages.randomElement(using: &random)!
        var segments: [(UInt32, UInt16, UInt16)] = []
        for _ in 0..<Int.random(in: 0...26, using: &random) {
            segments.append(
                (
                    rarely(page, UInt32.random(in: 0...UInt32.max, using: &random)),
                    rarely(
                        UInt16.random(in: 0..<8, using: &random) * 512,
                        UInt16.random(in: 0...UInt16.max, using: &random)),
                    rarely(512, UInt16.random(in: 0...UInt16.max, using: &random))
                ))
        }
        let isIndirect = Int.random(in: 0..<4, using: &random) == 0
        if isIndirect {
            guest.set(page, segmentTable(segments))
            segments = [(page, 0, UInt16(segments.count * 8))]
        }
        var request = command(
            rqid, cdb: (0..<10).map { _ in UInt8.random(in: 0...255, using: &random) },
            direction: rarely(UInt8.random(in: 0...3, using: &random), UInt8.random(in: 0...255, using: &random)),
            target: UInt16.random(in: 0...3, using: &random), lun: UInt16.random(in: 0...2, using: &random),
            segments: segments, indirect: isIndirect, timeout: UInt16.random(in: 0...UInt16.max, using: &random))
        request.act = rarely(UInt8.random(in: 1...3, using: &random), UInt8.random(in: 0...255, using: &random))
        request.cmd_len = rarely(request.cmd_len, UInt8.random(in: 0...255, using: &random))
        request.nr_segments = rarely(request.nr_segments, UInt8.random(in: 0...255, using: &random))
        request.ref_rqid = UInt16.random(in: 0...15, using: &random)
        return request
    }

    /// Completes as the core may: any service response, any status, any residual.
    private func answer(_ nexus: ScriptedNexus, _ task: TaskHandle, _ random: inout SeededGenerator) {
        let length = unsafe task.command.data_in_length
        task.fillDataIn([UInt8](repeating: 0x5a, count: Int.random(in: 0...Int(length), using: &random)))
        let status: UInt8 = [0, 0, 0, 2, 4, 8, 0x18, 0x28, 0x40].randomElement(using: &random)!
        let service = Int.random(in: 0..<6, using: &random) == 0 ? Int.random(in: 1...4, using: &random) : 0
        if status == 2 { unsafe task.pointer.pointee.sense = .invalidOperationCode }
        nexus.complete(task, service: service, status: status)
    }

    @Test("Each request of noise gets exactly one answer", arguments: 1...12)
    func noise(seed: UInt64) {
        var random = SeededGenerator(seed: seed)
        let guest = RingGuest(wholeTarget: seed % 3 == 0, stagingBytes: 512 << 10)
        let nexus = guest.attach(VirtualDevice(channel: 0, target: 0, lun: 0))
        _ = guest.attach(VirtualDevice(channel: 0, target: 1, lun: 1), unit: 1, nexus: nexus)
        _ = guest.attach(VirtualDevice(channel: 0, target: 2, lun: 2), unit: 2, nexus: nexus)
        let other = guest.attach(VirtualDevice(channel: 0, target: 3, lun: 0), unit: 3)
        other.immediately = { [unowned other] task in other.complete(task) }
        let pages = (0..<20).map { _ in guest.grant() }
        var outstanding: Set<UInt16> = []
        for _ in 0..<1500 {
            for rqid in 0..<UInt16(16) where !outstanding.contains(rqid) && Bool.random(using: &random) {
                guest.put(request(rqid, guest, pages, &random))
                outstanding.insert(rqid)
            }
            _ = guest.port.poll()
            answerSome(nexus, &random)
            answerSome(other, &random)
            guest.port.flush()
            for response in guest.responses() {
                #expect(outstanding.remove(response.rqid) != nil, "seed \(seed): an answer to nothing")
            }
        }
        #expect(guest.port.fault == nil)
        while !outstanding.isEmpty {
            _ = guest.port.poll()
            answerAll(nexus, &random)
            answerAll(other, &random)
            guest.port.flush()
            let responses = guest.responses()
            for response in responses { #expect(outstanding.remove(response.rqid) != nil) }
            if responses.isEmpty && outstandingCannotMove(guest, nexus) { break }
        }
        #expect(outstanding.isEmpty, "seed \(seed): requests without an answer")
        #expect(guest.staging.freePages == 128)
    }

    private func answerSome(_ nexus: ScriptedNexus, _ random: inout SeededGenerator) {
        for task in nexus.tasks where Bool.random(using: &random) { answer(nexus, task, &random) }
        for function in nexus.functions where Bool.random(using: &random) {
            nexus.answer(function, Int.random(in: 0...3, using: &random))
        }
    }

    private func answerAll(_ nexus: ScriptedNexus, _ random: inout SeededGenerator) {
        let tasks = nexus.tasks
        for task in tasks { answer(nexus, task, &random) }
        let functions = nexus.functions
        for function in functions { nexus.answer(function, 0) }
    }

    private func outstandingCannotMove(_ guest: RingGuest, _ nexus: ScriptedNexus) -> Bool {
        nexus.tasks.isEmpty && nexus.functions.isEmpty && !guest.port.prepareToSleep()
    }

    @Test("A guest that writes into the ring and its pages all the time breaks only itself", arguments: 1...4)
    func mutation(seed: UInt64) throws {
        var random = SeededGenerator(seed: seed)
        for round in 0..<20 {
            let guest = RingGuest(stagingBytes: 1 << 20)
            let nexus = guest.attach(VirtualDevice(channel: 0, target: 0, lun: 0))
            let pages = (0..<4).map { _ in guest.grant() }
            nonisolated(unsafe) let page = unsafe guest.page
            let thread = MutatingThread(seed: seed &* 100 &+ UInt64(round)) { random in
                let offset = Int.random(in: 0..<1024, using: &random) * 4
                // The indices seldom: most of the time the ring shall live.
                if offset >= 64 || Int.random(in: 0..<2000, using: &random) == 0 {
                    unsafe page.storeBytes(
                        of: UInt32.random(in: 0...UInt32.max, using: &random), toByteOffset: offset, as: UInt32.self)
                }
            }
            for rqid in 0..<UInt16(400) where guest.port.fault == nil {
                guest.put(request(rqid, guest, pages, &random))
                _ = guest.port.poll()
                answerAll(nexus, &random)
                guest.port.flush()
            }
            thread.join()
            guest.port.stop()
            #expect(guest.port.isIdle)
            #expect(guest.staging.freePages == 256)
        }
    }
}

/// A thread that does something over and over until it is joined.
@safe
final class MutatingThread: @unchecked Sendable {
    private let body: (inout SeededGenerator) -> Void
    private let seed: UInt64
    private let stop = Atomic(false)
    private var thread: pthread_t = 0

    init(seed: UInt64, _ body: @escaping (inout SeededGenerator) -> Void) {
        self.body = body
        self.seed = seed
        let context = unsafe Unmanaged.passUnretained(self).toOpaque()
        unsafe pthread_create(
            &thread, nil,
            { context in
                let thread = unsafe Unmanaged<MutatingThread>.fromOpaque(context!).takeUnretainedValue()
                var random = SeededGenerator(seed: thread.seed)
                while !thread.stop.load(ordering: .relaxed) { thread.body(&random) }
                return nil
            }, context)
    }

    func join() {
        stop.store(true, ordering: .relaxed)
        pthread_join(thread, nil)
    }
}
