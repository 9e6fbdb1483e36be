// RAMTests: what is particular to a disk in memory.
//
// Called by: swift test. Must not know: the inside of the backstore.

import Backstores
import CBackstore
import Glibc
import Reactor
import SCSICore
import Testing

@Suite struct RAMTests {
    @Test func aDiskLargerThanTheMachinesMemoryCostsNothingUntilItIsWritten() throws {
        let reactor = try makeReactor(.automatic)
        let disk = try RAMBackstore(size: 4 << 40, reactor: reactor)
        let last = TestRequest(
            SCSI_BACKSTORE_WRITE, offset: (4 << 40) - 4096, length: 4096, lengths: [4096])
        #expect(last.submit(disk.handle))
        turns(reactor) { last.isDone }
        #expect(last.error == 0)
        disk.close()
    }

    @Test func sizesAreChecked() throws {
        let reactor = try makeReactor(.automatic)
        #expect(throws: BackstoreError(path: "RAM disk", reason: .sizeZero)) {
            try RAMBackstore(size: 0, reactor: reactor)
        }
        #expect(throws: BackstoreError(path: "RAM disk", reason: .sizeNotMultiple(size: 1000, blockSize: 512))) {
            try RAMBackstore(size: 1000, reactor: reactor)
        }
        #expect(throws: BackstoreError(path: "RAM disk", reason: .invalidBlockSize(520))) {
            try RAMBackstore(size: 5200, logicalBlockSize: 520, reactor: reactor)
        }
        #expect(throws: BackstoreError.self) { try RAMBackstore(size: 1 << 62, reactor: reactor) }
    }

    @Test func completionsComeFromALaterTurnInOrder() throws {
        let reactor = try makeReactor(.automatic)
        let disk = try RAMBackstore(size: 1 << 20, reactor: reactor)
        var order: [Int] = []
        let requests = (0..<10).map { number in
            let request = TestRequest(SCSI_BACKSTORE_READ, offset: 0, length: 512, lengths: [512])
            request.whenDone = { order.append(number) }
            return request
        }
        for request in requests { #expect(request.submit(disk.handle)) }
        #expect(order.isEmpty)
        reactor.turn(mayWait: true)
        #expect(order == Array(0..<10))
        disk.close()
    }

    @Test func aReactorWithACompletionToReportDoesNotSleep() throws {
        let reactor = try makeReactor(.automatic)
        let disk = try RAMBackstore(size: 1 << 20, reactor: reactor)
        // The completion is listed after the disk was polled in this turn: by a source that is polled later.
        let late = TestRequest(SCSI_BACKSTORE_READ, offset: 0, length: 512, lengths: [512])
        let submitter = Submitter(request: late, handle: disk.handle)
        let token = reactor.add(submitter.workSource)
        turns(reactor) { late.isDone }
        #expect(late.error == 0)
        reactor.remove(token)
        disk.close()
    }
}

/// Submits a request in its first poll, and says that it did no work.
private final class Submitter {
    let request: TestRequest
    let handle: BackstoreHandle
    var isSubmitted = false

    init(request: TestRequest, handle: BackstoreHandle) {
        self.request = request
        self.handle = handle
    }

    var workSource: Reactor.WorkSource {
        unsafe Reactor.WorkSource(
            poll: { context in
                let this = unsafe Unmanaged<Submitter>.fromOpaque(context).takeUnretainedValue()
                if !this.isSubmitted {
                    this.isSubmitted = true
                    #expect(this.request.submit(this.handle))
                }
                return false
            }, flush: { _ in }, prepareToSleep: { _ in false }, context: Unmanaged.passUnretained(self).toOpaque())
    }
}
