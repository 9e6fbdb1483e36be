// RequestTests: single requests: flags, holes, limits, and every way in which one can fail.
//
// Called by: swift test. Must not know: the inside of the backstores.

import Backstores
import CBackstore
import CLinux
import Glibc
import Reactor
import SCSICore
import Testing

@Suite struct RequestTests {
    @Test(arguments: Variant.all)
    func aNewMediumReadsAsZeros(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        #expect(medium.read(65_536, at: (8 << 20) - 65_536).allSatisfy { $0 == 0 })
        try medium.close()
    }

    @Test(arguments: Variant.all)
    func forcedUnitAccessAndFlushSucceed(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        let data = [UInt8](repeating: 9, count: 4096)
        #expect(medium.write(data, at: 4096, flags: SCSI_BACKSTORE_FUA) == 0)
        #expect(medium.write(data, at: 8192, flags: SCSI_BACKSTORE_FUA, gap: 1) == 0)
        #expect(medium.flush() == 0)
        #expect(medium.read(12_288, at: 0) == [UInt8](repeating: 0, count: 4096) + data + data)
        try medium.close()
    }

    @Test(arguments: Variant.all)
    func discardedBlocksReadAsZerosAndGiveSpaceBack(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        let data = [UInt8](repeating: 7, count: 1 << 20)
        #expect(medium.write(data, at: 0) == 0)
        #expect(medium.flush() == 0)
        let before = medium.file.map { _ in status(medium.path).st_blocks }
        // Not on the boundaries of anything but blocks.
        let discard = TestRequest(SCSI_BACKSTORE_DISCARD, offset: 512, length: (768 << 10) + 512)
        #expect(medium.perform(discard) == 0)
        let after = medium.read(1 << 20, at: 0)
        let end = (768 << 10) + 1024
        #expect(after[..<512].allSatisfy { $0 == 7 } && after[end...].allSatisfy { $0 == 7 })
        #expect(after[512..<end].allSatisfy { $0 == 0 })
        if let before { #expect(status(medium.path).st_blocks < before - 1024) }
        try medium.close()
    }

    @Test(arguments: Variant.all, [0, SCSI_BACKSTORE_MAY_UNMAP])
    func writtenZerosReadAsZeros(_ variant: Variant, flags: Int) throws {
        let medium = try OpenMedium(variant)
        #expect(medium.write([UInt8](repeating: 7, count: 1 << 20), at: 0) == 0)
        let zeroes = TestRequest(
            SCSI_BACKSTORE_WRITE_ZEROES, offset: 1536, length: 640 << 10, flags: flags | SCSI_BACKSTORE_FUA)
        #expect(medium.perform(zeroes) == 0)
        let after = medium.read(1 << 20, at: 0)
        let end = 1536 + (640 << 10)
        #expect(after[..<1536].allSatisfy { $0 == 7 } && after[end...].allSatisfy { $0 == 7 })
        #expect(after[1536..<end].allSatisfy { $0 == 0 })
        try medium.close()
    }

    @Test(
        .enabled(
            if: SmallFileSystem.isPossible, "mounting is not allowed here: zeros without ZERO_RANGE are not tested"),
        arguments: [Reactor.Configuration.Engine.ioUring, .libaio])
    func zerosAreWrittenWhereTheFileSystemCannotZeroARange(_ engine: Reactor.Configuration.Engine) throws {
        // tmpfs punches holes but knows no FALLOC_FL_ZERO_RANGE.
        let mount = try #require(SmallFileSystem(bytes: 16 << 20))
        let reactor = try makeReactor(engine)
        var options = FileBackstore.Options(path: mount.path + "/disk")
        options.size = 8 << 20
        options.create = true
        let backstore = try FileBackstore(options, reactor: reactor)
        var run = ModelRun(backstore.handle, reactor, seed: 6)
        run.run(steps: 100, concurrency: 8)
        let zeroes = TestRequest(SCSI_BACKSTORE_WRITE_ZEROES, offset: 0, length: 8 << 20)
        #expect(zeroes.submit(backstore.handle))
        turns(reactor) { zeroes.isDone }
        #expect(zeroes.error == 0)
        #expect(status(options.path).st_blocks == (8 << 20) / 512, "zeros that may not be unmapped take space")
        try backstore.close()
    }

    @Test(
        .enabled(if: SmallFileSystem.isPossible, "mounting is not allowed here: a full file system is not tested"),
        arguments: Variant.files)
    func aFullFileSystemIsSaidToBeFull(_ variant: Variant) throws {
        let mount = try #require(SmallFileSystem(bytes: 1 << 20))
        let reactor = try makeReactor(variant.engine)
        var options = FileBackstore.Options(path: mount.path + "/disk")
        options.size = 8 << 20
        options.create = true
        options.direct = variant.kind == .direct
        let backstore = try FileBackstore(options, reactor: reactor)
        let write = TestRequest(SCSI_BACKSTORE_WRITE, offset: 0, length: 4 << 20, lengths: [4 << 20])
        #expect(write.submit(backstore.handle))
        turns(reactor) { write.isDone }
        #expect(write.error == ENOSPC)
        // What did fit was written, and the first byte that did not is named.
        #expect(write.errorOffset > 0 && write.errorOffset <= 1 << 20)
        // Giving space back helps.
        let discard = TestRequest(SCSI_BACKSTORE_DISCARD, offset: 0, length: 8 << 20)
        #expect(discard.submit(backstore.handle))
        turns(reactor) { discard.isDone }
        #expect(discard.error == 0)
        let again = TestRequest(SCSI_BACKSTORE_WRITE, offset: 0, length: 65_536, lengths: [65_536])
        #expect(again.submit(backstore.handle))
        turns(reactor) { again.isDone }
        #expect(again.error == 0)
        try backstore.close()
    }

    @Test(arguments: Variant.all)
    func aReadOnlyMediumReadsAndRefusesWrites(_ variant: Variant) throws {
        let medium = try OpenMedium(variant, size: 65_536, readOnly: true)
        #expect(medium.handle.geometry().capabilities & UInt32(SCSI_BACKSTORE_WRITABLE) == 0)
        #expect(medium.read(4096, at: 0, gap: 1).count == 4096)
        #expect(medium.write([UInt8](repeating: 1, count: 512), at: 0) == EROFS)
        #expect(medium.perform(TestRequest(SCSI_BACKSTORE_DISCARD, offset: 0, length: 512)) == EROFS)
        #expect(medium.perform(TestRequest(SCSI_BACKSTORE_WRITE_ZEROES, offset: 0, length: 512)) == EROFS)
        #expect(medium.flush() == 0)
        try medium.close()
    }

    @Test(arguments: Variant.all)
    func anUnknownOperationIsRefused(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        #expect(medium.perform(TestRequest(77, offset: 0, length: 512)) == EOPNOTSUPP)
        try medium.close()
    }

    @Test(arguments: Variant.all)
    func longSegmentListsAndLongRequestsAreDoneInPieces(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        for (lengths, gap) in [([Int](repeating: 512, count: 3000), 512), ([Int](repeating: 256, count: 6000), 1)] {
            let length = 3000 * 512
            let write = TestRequest(
                SCSI_BACKSTORE_WRITE, offset: 1024, length: length, lengths: lengths, gap: gap)
            var generator = SplitMix(seed: 9)
            let data = generator.bytes(length)
            write.data = data
            #expect(medium.perform(write) == 0)
            let read = TestRequest(SCSI_BACKSTORE_READ, offset: 1024, length: length, lengths: lengths, gap: gap)
            #expect(medium.perform(read) == 0)
            #expect(read.data == data)
            #expect(read.isGuardIntact)
        }
        try medium.close()
    }

    @Test(arguments: Variant.files)
    func moreUnalignedRequestsThanBounceBuffersWaitForTheirTurn(_ variant: Variant) throws {
        let medium = try OpenMedium(variant, depth: 256)
        let requests = (0..<BackstoreLimits.bounceBuffers * 4).map { number in
            let request = TestRequest(
                SCSI_BACKSTORE_WRITE, offset: UInt64(number) * 1024, length: 1024, lengths: [3, 1021], gap: 1)
            request.data = [UInt8](repeating: UInt8(number + 1), count: 1024)
            return request
        }
        for request in requests { #expect(request.submit(medium.handle)) }
        turns(medium.reactor) { requests.allSatisfy(\.isDone) }
        #expect(requests.allSatisfy { $0.error == 0 && $0.completions == 1 })
        let all = medium.read(requests.count * 1024, at: 0)
        #expect(all == (0..<requests.count).flatMap { [UInt8](repeating: UInt8($0 + 1), count: 1024) })
        try medium.close()
    }

    @Test(arguments: [Reactor.Configuration.Engine.ioUring, .libaio])
    func aRequestThatWaitsForABufferCanBeCancelled(_ engine: Reactor.Configuration.Engine) throws {
        let medium = try OpenMedium(Variant(engine: engine, kind: .direct), depth: 256)
        let requests = (0..<BackstoreLimits.bounceBuffers + 2).map { number in
            TestRequest(SCSI_BACKSTORE_WRITE, offset: UInt64(number) * 1024, length: 1024, lengths: [1024], gap: 1)
        }
        for request in requests { #expect(request.submit(medium.handle)) }
        let waiting = requests[BackstoreLimits.bounceBuffers]
        unsafe medium.handle.cancel(waiting.pointer)
        #expect(!waiting.isDone, "cancel completed a request before it returned")
        turns(medium.reactor) { requests.allSatisfy(\.isDone) }
        // It may have got its buffer first; the others are not touched.
        #expect(waiting.error == ECANCELED || waiting.error == 0)
        for request in requests where request !== waiting { #expect(request.error == 0) }
        #expect(requests.allSatisfy { $0.completions == 1 })
        try medium.close()
    }

    @Test(arguments: Variant.files)
    func aFileThatBecameShorterGivesAnErrorAndNotZeros(_ variant: Variant) throws {
        let medium = try OpenMedium(variant, size: 65_536)
        unsafe #expect(truncate(medium.path, 8192) == 0)
        let read = TestRequest(SCSI_BACKSTORE_READ, offset: 4096, length: 16_384, lengths: [16_384])
        #expect(medium.perform(read) == EIO)
        #expect(read.errorOffset == 8192)
        let unaligned = TestRequest(SCSI_BACKSTORE_READ, offset: 4096, length: 16_384, lengths: [16_384], gap: 1)
        #expect(medium.perform(unaligned) == EIO)
        #expect(unaligned.errorOffset == 8192)
        #expect(medium.read(4096, at: 4096).count == 4096)
        try medium.close()
    }

    @Test(arguments: Variant.files)
    func aFailedWriteIsReportedAndGivesItsBufferBack(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        // Writes to a descriptor that is open for reading fail with EBADF.
        let readOnly = unsafe open(medium.path, O_RDONLY | O_CLOEXEC)
        defer { close(readOnly) }
        medium.replacingDescriptor(by: readOnly) {
            for gap in [0, 1] {
                for _ in 0..<BackstoreLimits.bounceBuffers * 2 {
                    #expect(medium.write([UInt8](repeating: 1, count: 4096), at: 4096, gap: gap) == EBADF)
                }
            }
            #expect(medium.perform(TestRequest(SCSI_BACKSTORE_DISCARD, offset: 0, length: 4096)) == EBADF)
            #expect(medium.perform(TestRequest(SCSI_BACKSTORE_WRITE_ZEROES, offset: 0, length: 4096)) == EBADF)
        }
        #expect(medium.write([UInt8](repeating: 1, count: 4096), at: 4096, gap: 1) == 0)
        #expect(medium.flush() == 0)
        try medium.close()
    }

    @Test(arguments: Variant.files)
    func aFailedFlushIsRememberedUntilTheFileIsOpenedAgain(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        var ends: [Int32] = [0, 0]
        #expect(unsafe pipe(&ends) == 0)
        defer { ends.forEach { close($0) } }
        // fdatasync of a pipe fails with EINVAL.
        medium.replacingDescriptor(by: ends[0]) { #expect(medium.flush() == EINVAL) }
        #expect(medium.flush() == EINVAL, "a later fdatasync that succeeds says nothing about what was lost")
        #expect(medium.write([UInt8](repeating: 1, count: 512), at: 0, flags: SCSI_BACKSTORE_FUA) == EINVAL)
        #expect(medium.write([UInt8](repeating: 1, count: 512), at: 0) == 0)
        #expect(throws: BackstoreError(path: medium.path, reason: .flushFailed(errno: EINVAL))) { try medium.close() }
    }

    @Test(arguments: [Reactor.Configuration.Engine.ioUring, .libaio])
    func aShortReadIsContinuedWhereItEnded(_ engine: Reactor.Configuration.Engine) throws {
        let medium = try OpenMedium(Variant(engine: engine, kind: .buffered))
        // A pipe in packet mode gives one packet a read, however long the buffer is.
        var ends: [Int32] = [0, 0]
        #expect(unsafe pipe2(&ends, O_DIRECT) == 0)
        defer { ends.forEach { close($0) } }
        var generator = SplitMix(seed: 11)
        let data = generator.bytes(4096)
        var place = 0
        // Ends within segments, at their boundaries, and within the same segment again.
        for count in [100, 412, 1, 512, 999, 2072] {
            #expect(unsafe Glibc.write(ends[1], Array(data[place..<(place + count)]), count) == count)
            place += count
        }
        let read = TestRequest(SCSI_BACKSTORE_READ, offset: 0, length: 4096, lengths: [512, 513, 999, 2072], gap: 1)
        medium.replacingDescriptor(by: ends[0]) { #expect(medium.perform(read) == 0) }
        #expect(read.data == data)
        #expect(read.isGuardIntact)
        try medium.close()
    }

    @Test(arguments: [Reactor.Configuration.Engine.ioUring, .libaio])
    func aShortWriteIsContinuedAndAnInterruptedOneRepeated(_ engine: Reactor.Configuration.Engine) throws {
        let medium = try OpenMedium(Variant(engine: engine, kind: .buffered))
        // A pipe of one page takes 4096 bytes and then says EAGAIN until it is read.
        var ends: [Int32] = [0, 0]
        #expect(unsafe pipe2(&ends, O_NONBLOCK) == 0)
        defer { ends.forEach { close($0) } }
        _ = fcntl(ends[1], F_SETPIPE_SZ, Int32(4096))
        var generator = SplitMix(seed: 12)
        let data = generator.bytes(16_384)
        let write = TestRequest(
            SCSI_BACKSTORE_WRITE, offset: 0, length: 16_384, lengths: [1000, 9000, 6384], gap: 1)
        write.data = data
        var received: [UInt8] = []
        func drainPipe() {
            var bytes = [UInt8](repeating: 0, count: 4096)
            let count = unsafe Glibc.read(ends[0], &bytes, bytes.count)
            if count > 0 { received += bytes[..<count] }
        }
        medium.replacingDescriptor(by: ends[1]) {
            #expect(write.submit(medium.handle))
            while !write.isDone {
                medium.reactor.turn(mayWait: false)
                drainPipe()
            }
        }
        drainPipe()
        #expect(write.error == 0)
        #expect(received == data)
        try medium.close()
    }

    @Test func aWriteThatNeverGetsAnywhereFailsInTheEnd() throws {
        // Only libaio reports EAGAIN for a full pipe; io_uring waits until there is room.
        let medium = try OpenMedium(Variant(engine: .libaio, kind: .buffered))
        var ends: [Int32] = [0, 0]
        #expect(unsafe pipe2(&ends, O_NONBLOCK) == 0)
        defer { ends.forEach { close($0) } }
        _ = fcntl(ends[1], F_SETPIPE_SZ, Int32(4096))
        medium.replacingDescriptor(by: ends[1]) {
            let write = TestRequest(SCSI_BACKSTORE_WRITE, offset: 512, length: 16_384, lengths: [16_384])
            #expect(medium.perform(write) == EAGAIN)
            #expect(write.errorOffset == 512 + 4096)
        }
        try medium.close()
    }

    @Test(arguments: Variant.all)
    func aCompletionMaySubmitTheNextRequest(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        let requests = (0..<50).map { number in
            TestRequest(
                SCSI_BACKSTORE_WRITE, offset: UInt64(number) * 512, length: 512, lengths: [512], gap: number % 2)
        }
        for number in 0..<49 {
            requests[number].whenDone = { #expect(requests[number + 1].submit(medium.handle)) }
        }
        #expect(requests[0].submit(medium.handle))
        turns(medium.reactor) { requests[49].isDone }
        #expect(requests.allSatisfy { $0.error == 0 && $0.completions == 1 })
        for request in requests { request.whenDone = {} }
        try medium.close()
    }
}
