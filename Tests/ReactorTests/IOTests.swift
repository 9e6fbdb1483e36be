// IOTests: the reactor's I/O on both engines.
//
// Called by: swift test. Must not know: the inside of the reactor.

import CLinux
import Glibc
import Reactor
import Testing

@Suite struct IOTests {
    @Test(arguments: engines)
    func whatWasWrittenIsRead(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let file = TemporaryFile(size: 65536)
        let writer = RecordedRequest(bytes: 8192, fill: 0xa5)
        #expect(
            unsafe reactor.write(
                writer.pointer, descriptor: file.descriptor, writer.segments, count: 1, offset: 4096,
                flags: Int32(RWF_DSYNC)))
        #expect(writer.completions == 0, "submitting must not complete")
        turns(reactor) { writer.completions == 1 }
        #expect(writer.result == 8192)
        let synchronizer = RecordedRequest()
        #expect(unsafe reactor.synchronizeData(synchronizer.pointer, descriptor: file.descriptor))
        turns(reactor) { synchronizer.completions == 1 }
        #expect(synchronizer.result == 0)
        let reader = RecordedRequest(bytes: 8192)
        #expect(
            unsafe reactor.read(reader.pointer, descriptor: file.descriptor, reader.segments, count: 1, offset: 8192))
        turns(reactor) { reader.completions == 1 }
        #expect(reader.result == 8192)
        #expect(reader.bytes == [UInt8](repeating: 0xa5, count: 4096) + [UInt8](repeating: 0, count: 4096))
        #expect(reactor.requestsInFlight == 0)
    }

    @Test(arguments: engines)
    func aReadAtTheEndOfTheFileIsShort(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let file = TemporaryFile(size: 1000)
        let reader = RecordedRequest(bytes: 4096)
        #expect(unsafe reactor.read(reader.pointer, descriptor: file.descriptor, reader.segments, count: 1, offset: 0))
        turns(reactor) { reader.completions == 1 }
        #expect(reader.result == 1000)
    }

    @Test(arguments: engines)
    func aBadDescriptorFailsAtCompletionAndOthersAreNotHurt(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let file = TemporaryFile(size: 65536)
        let requests = (0..<8).map { _ in RecordedRequest() }
        for (number, request) in requests.enumerated() {
            let descriptor = number % 3 == 1 ? Int32(-1) : file.descriptor
            #expect(
                unsafe reactor.read(request.pointer, descriptor: descriptor, request.segments, count: 1, offset: 0))
        }
        #expect(requests.allSatisfy { $0.completions == 0 })
        turns(reactor) { requests.allSatisfy { $0.completions == 1 } }
        for (number, request) in requests.enumerated() {
            #expect(request.result == (number % 3 == 1 ? -Int(EBADF) : 4096))
        }
    }

    @Test(arguments: engines)
    func punchingAHoleGivesZeros(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let file = TemporaryFile()
        let data = [UInt8](repeating: 7, count: 16384)
        #expect(unsafe pwrite(file.descriptor, data, data.count, 0) == 16384)
        let request = RecordedRequest()
        #expect(
            unsafe reactor.allocate(
                request.pointer, descriptor: file.descriptor, mode: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                offset: 4096, length: 4096))
        turns(reactor) { request.completions == 1 }
        #expect(request.result == 0)
        var back = [UInt8](repeating: 1, count: 16384)
        #expect(unsafe pread(file.descriptor, &back, back.count, 0) == 16384)
        #expect(back[4096..<8192].allSatisfy { $0 == 0 })
        #expect(back[..<4096].allSatisfy { $0 == 7 } && back[8192...].allSatisfy { $0 == 7 })
    }

    @Test(arguments: engines)
    func anOffloadedFunctionRunsElsewhereAndCompletesHere(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let requests = (0..<20).map { _ in RecordedRequest() }
        for request in requests {
            let accepted = unsafe reactor.offload(request.pointer) { _ in
                Int(gettid())
            }
            #expect(accepted)
        }
        turns(reactor) { requests.allSatisfy { $0.completions == 1 } }
        #expect(requests.allSatisfy { $0.result > 0 && $0.result != Int(gettid()) })
    }

    @Test(arguments: engines)
    func aFullReactorRefusesAndAcceptsAgainAfterACompletion(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine, depth: 4)
        let file = TemporaryFile(size: 65536)
        let requests = (0..<5).map { _ in RecordedRequest() }
        func submit(_ request: RecordedRequest) -> Bool {
            unsafe reactor.read(request.pointer, descriptor: file.descriptor, request.segments, count: 1, offset: 0)
        }
        #expect(requests.map(submit) == [true, true, true, true, false])
        #expect(reactor.statistics.refused == 1)
        turns(reactor) { requests[..<4].contains { $0.completions == 1 } }
        #expect(submit(requests[4]))
        turns(reactor) { requests.allSatisfy { $0.completions == 1 } }
        #expect(requests.allSatisfy { $0.result == 4096 })
    }

    @Test(arguments: engines)
    func manyRequestsAtTheFullDepthAllComplete(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine, depth: 256)
        let file = TemporaryFile(size: 1 << 20)
        let requests = (0..<256).map { _ in RecordedRequest() }
        for round in 1...20 {
            for (number, request) in requests.enumerated() {
                #expect(
                    unsafe reactor.read(
                        request.pointer, descriptor: file.descriptor, request.segments, count: 1,
                        offset: UInt64(number) * 4096))
            }
            turns(reactor) { requests.allSatisfy { $0.completions == round } }
        }
        // Batched: far fewer calls than requests.
        #expect(reactor.statistics.submissions <= 20 * 8)
    }

    @Test(arguments: engines)
    func stoppingWaitsForTheIOInFlight(_ engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        var ends: [Int32] = [0, 0]
        #expect(unsafe pipe(&ends) == 0)
        defer { ends.forEach { close($0) } }
        // A job that lasts until somebody writes into a pipe.
        let request = RecordedRequest()
        let pointer = unsafe SendablePointer(request.pointer)
        request.tag(ends[0])
        withRunningReactor(reactor) {
            let accepted = onReactor(reactor) {
                unsafe reactor.offload(pointer.pointer) { context in
                    var byte: UInt8 = 0
                    return unsafe read(RecordedRequest.tag(of: context), &byte, 1)
                }
            }
            #expect(accepted)
            // Posted before the stop, so that it is seen to run before the job can end.
            reactor.stop()
            #expect(unsafe write(ends[1], [UInt8(1)], 1) == 1)
        }
        #expect(request.completions == 1)
        #expect(request.result == 1)
        #expect(reactor.requestsInFlight == 0)
    }
}

@safe
private struct SendablePointer: @unchecked Sendable {
    let pointer: UnsafeMutablePointer<IORequest>
    init(_ pointer: UnsafeMutablePointer<IORequest>) { unsafe self.pointer = pointer }
}
