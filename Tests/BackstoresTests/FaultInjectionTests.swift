// FaultInjectionTests: each fault does what it says, and nothing else happens.
//
// Called by: swift test. Must not know: the inside of the backstores.

import Backstores
import CBackstore
import Glibc
import Reactor
import SCSICore
import Testing

@Suite struct FaultInjectionTests {
    let reactor: Reactor
    let disk: RAMBackstore
    let faulty: FaultInjectionBackstore

    init() throws {
        reactor = try makeReactor(.automatic)
        disk = try RAMBackstore(size: 1 << 20, reactor: reactor)
        faulty = FaultInjectionBackstore(wrapping: disk.handle, reactor: reactor)
    }

    private func end() {
        #expect(faulty.requestsInFlight == 0)
        faulty.close()
        disk.close()
    }

    private func write(_ number: Int, blocks: Int = 1) -> TestRequest {
        let request = TestRequest(
            SCSI_BACKSTORE_WRITE, offset: UInt64(number) * 512, length: blocks * 512,
            lengths: [Int](repeating: 256, count: blocks * 2), gap: 1)
        request.data = [UInt8](repeating: UInt8(number + 1), count: blocks * 512)
        return request
    }

    private func read(_ number: Int, blocks: Int = 1) -> [UInt8] {
        let request = TestRequest(
            SCSI_BACKSTORE_READ, offset: UInt64(number) * 512, length: blocks * 512, lengths: [blocks * 512])
        #expect(request.submit(disk.handle))
        turns(reactor) { request.isDone }
        return request.data
    }

    private func perform(_ request: TestRequest) -> Int32 {
        #expect(request.submit(faulty.handle))
        turns(reactor) { request.isDone }
        #expect(request.completions == 1)
        return request.error
    }

    @Test func withoutFaultsItIsTheBackstoreItself() {
        #expect(faulty.handle.geometry().size == disk.handle.geometry().size)
        var run = ModelRun(faulty.handle, reactor, seed: 8)
        run.run(steps: 300, concurrency: 32)
        #expect(faulty.faultCount == 0)
        end()
    }

    @Test func theChosenRequestFailsAndIsNotDone() {
        faulty.inject(.init(.fail(errno: EIO), operations: [UInt8(SCSI_BACKSTORE_WRITE)], skip: 2))
        #expect((0..<4).map { perform(write($0)) } == [0, 0, EIO, 0])
        #expect(read(2).allSatisfy { $0 == 0 })
        #expect(read(3).allSatisfy { $0 == 4 })
        #expect(faulty.faultCount == 1)
        end()
    }

    @Test func aRangeFailsUntilTheFaultIsCleared() {
        faulty.inject(.init(.fail(errno: EILSEQ), range: 1024..<1536, times: .max))
        #expect((0..<4).map { perform(write($0)) } == [0, 0, EILSEQ, 0])
        #expect(perform(write(1, blocks: 2)) == EILSEQ)
        faulty.clearFaults()
        #expect(perform(write(2)) == 0)
        end()
    }

    @Test func aFullBackstoreRefuses() {
        faulty.inject(.init(.full, times: 2))
        let request = write(0)
        #expect(!request.submit(faulty.handle))
        #expect(!request.submit(faulty.handle))
        #expect(perform(request) == 0)
        end()
    }

    @Test func aTornWriteLeavesItsBeginning() {
        faulty.inject(.init(.torn(bytes: 1100, errno: EIO)))
        let request = write(8, blocks: 4)
        #expect(perform(request) == EIO)
        #expect(request.errorOffset == 8 * 512 + 1024)
        let after = read(8, blocks: 4)
        #expect(after[..<1024].allSatisfy { $0 == 9 } && after[1024...].allSatisfy { $0 == 0 })
        faulty.inject(.init(.torn(bytes: 0, errno: EIO)))
        #expect(perform(write(20)) == EIO)
        #expect(read(20).allSatisfy { $0 == 0 })
        end()
    }

    @Test func aDelayedCompletionComesAtItsTime() {
        faulty.inject(.init(.delay(nanoseconds: 2_000_000)))
        let start = reactor.now
        #expect(perform(write(0)) == 0)
        #expect(reactor.now >= start + 2_000_000)
        end()
    }

    @Test func heldCompletionsWaitForTheirRelease() {
        faulty.inject(.init(.hold, times: 3))
        var order: [Int] = []
        let requests = (0..<4).map { number in
            let request = write(number)
            request.whenDone = { order.append(number) }
            return request
        }
        for request in requests { #expect(request.submit(faulty.handle)) }
        turns(reactor) { requests[3].isDone && faulty.heldCount == 3 }
        for _ in 0..<10 { reactor.turn(mayWait: false) }
        #expect(order == [3])
        unsafe faulty.handle.cancel(requests[0].pointer)
        faulty.releaseHeldReversed()
        turns(reactor) { requests.allSatisfy(\.isDone) }
        #expect(order == [3, 2, 1, 0])
        #expect(requests.allSatisfy { $0.error == 0 })
        end()
    }

    @Test func reorderedCompletionsComeInReverse() {
        faulty.inject(.init(.reorder(count: 3), times: 6))
        var order: [Int] = []
        let requests = (0..<6).map { number in
            let request = write(number)
            request.whenDone = { order.append(number) }
            return request
        }
        for request in requests { #expect(request.submit(faulty.handle)) }
        turns(reactor) { requests.allSatisfy(\.isDone) }
        #expect(order == [2, 1, 0, 5, 4, 3])
        end()
    }

    @Test func moreRequestsThanItHasRoomForAreRefused() {
        faulty.inject(.init(.hold, times: .max))
        let requests = (0...BackstoreLimits.faultInjectionRequests).map { _ in write(0) }
        let accepted = requests.count { $0.submit(faulty.handle) }
        #expect(accepted == BackstoreLimits.faultInjectionRequests)
        turns(reactor) { faulty.heldCount == accepted }
        faulty.releaseHeld()
        turns(reactor) { faulty.requestsInFlight == 0 }
        faulty.clearFaults()
        #expect(perform(requests.last!) == 0)
        end()
    }
}
