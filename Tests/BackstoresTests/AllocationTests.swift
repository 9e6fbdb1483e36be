// AllocationTests: what media tell of the allocation of their ranges, and what changes it; prefetching; atomic writes.
//
// Called by: swift test. Must not know: the inside of the backstores.

import Backstores
import CBackstore
import CLinux
import Glibc
import Reactor
import SCSICore
import Testing

/// One stretch as a test writes it.
private struct Stretch: Equatable, CustomStringConvertible {
    let length: UInt64
    let state: UInt32
    var description: String { "\(length) \(["mapped", "deallocated", "anchored"][Int(state)])" }

    static func mapped(_ length: UInt64) -> Stretch { Stretch(length: length, state: 0) }
    static func deallocated(_ length: UInt64) -> Stretch { Stretch(length: length, state: 1) }
    static func anchored(_ length: UInt64) -> Stretch { Stretch(length: length, state: 2) }
}

extension OpenMedium {
    /// What the medium tells of a range, in an array of `room` elements.
    fileprivate func extents(_ offset: UInt64, _ length: UInt64, room: Int = 32) -> [Stretch] {
        let bytes = room * MemoryLayout<scsi_backstore_extent>.stride
        let request = TestRequest(
            SCSI_BACKSTORE_EXTENTS, offset: offset, length: Int(length), lengths: [bytes], gap: 16)
        request.data = [UInt8](repeating: 0, count: bytes)
        #expect(perform(request) == 0)
        #expect(request.isGuardIntact)
        let data = request.data
        let list = (0..<room).map { index in
            unsafe data.withUnsafeBytes {
                let extent = unsafe $0.loadUnaligned(
                    fromByteOffset: index * MemoryLayout<scsi_backstore_extent>.stride, as: scsi_backstore_extent.self)
                return Stretch(length: extent.length, state: extent.state)
            }
        }
        return Array(list.prefix { $0.length > 0 })
    }

    fileprivate func change(_ operation: Int, _ offset: UInt64, _ length: Int, flags: Int = 0) -> Int32 {
        perform(TestRequest(operation, offset: offset, length: length, flags: flags))
    }
}

@Suite struct AllocationTests {
    private func bytes(_ count: Int) -> [UInt8] { (0..<count).map { UInt8(truncatingIfNeeded: $0 * 7 + 1) } }

    @Test(arguments: Variant.all)
    func writtenRangesAreMappedAndTheRestIsNot(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        #expect(medium.handle.geometry().capabilities & UInt32(SCSI_BACKSTORE_CAN_REPORT_EXTENTS) != 0)
        #expect(medium.extents(0, 8 << 20) == [.deallocated(8 << 20)])
        medium.write(bytes(8192), at: 65536)
        medium.write(bytes(4096), at: 1 << 20)
        let all: [Stretch] = [
            .deallocated(65536), .mapped(8192), .deallocated(974_848), .mapped(4096), .deallocated(7_335_936),
        ]
        #expect(medium.extents(0, 8 << 20) == all)
        // A range that begins and ends within stretches.
        #expect(medium.extents(65536 + 512, 8192) == [.mapped(7680), .deallocated(512)])
        #expect(medium.change(SCSI_BACKSTORE_DISCARD, 65536, 8192) == 0)
        #expect(medium.extents(0, 1 << 20) == [.deallocated(1 << 20)])
        try medium.close()
    }

    @Test(arguments: Variant.all)
    func anAnswerIsNoLongerThanTheArrayAndGoesOnWhereItEnded(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        for index in 0..<300 as Range<UInt64> { medium.write(bytes(4096), at: index * 8192) }
        #expect(medium.extents(0, 8 << 20, room: 1) == [.mapped(4096)])
        #expect(medium.extents(0, 8 << 20, room: 3) == [.mapped(4096), .deallocated(4096), .mapped(4096)])
        var position: UInt64 = 0
        var mapped: UInt64 = 0
        var rounds = 0
        let size: UInt64 = 8 << 20
        while position < size {
            let list = medium.extents(position, size - position, room: 1000)
            #expect(!list.isEmpty)
            mapped += list.filter { $0.state == 0 }.reduce(0) { $0 + $1.length }
            position += list.reduce(0) { $0 + $1.length }
            rounds += 1
        }
        #expect(position == size)
        #expect(mapped == 300 * 4096)
        #expect(rounds <= 3, "an answer with nearly nothing in it")
        try medium.close()
    }

    @Test(arguments: Variant.files)
    func anAnchoredRangeHasSpaceAndReadsAsZeros(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        #expect(medium.handle.geometry().capabilities & UInt32(SCSI_BACKSTORE_CAN_ANCHOR) != 0)
        medium.write(bytes(16384), at: 1 << 20)
        #expect(medium.change(SCSI_BACKSTORE_ANCHOR, 1 << 20, 65536, flags: SCSI_BACKSTORE_FUA) == 0)
        #expect(medium.read(65536, at: 1 << 20).allSatisfy { $0 == 0 })
        #expect(medium.extents(1 << 20, 131072) == [.anchored(65536), .deallocated(65536)])
        #expect(status(medium.path).st_blocks * 512 >= 65536)
        // What is written there is mapped, the rest stays anchored.
        medium.write(bytes(4096), at: (1 << 20) + 8192)
        #expect(medium.extents(1 << 20, 65536) == [.anchored(8192), .mapped(4096), .anchored(53248)])
        #expect(medium.change(SCSI_BACKSTORE_DISCARD, 1 << 20, 65536) == 0)
        #expect(medium.extents(1 << 20, 65536) == [.deallocated(65536)])
        try medium.close()
    }

    @Test func openingAFileLeavesNothingAllocated() throws {
        let medium = try OpenMedium(Variant(engine: .automatic, kind: .direct))
        #expect(status(medium.path).st_blocks < 16)
        try medium.close()
    }

    @Test func aRAMDiskCannotAnchorAndSaysSo() throws {
        let medium = try OpenMedium(Variant(engine: .automatic, kind: .ram))
        #expect(medium.handle.geometry().capabilities & UInt32(SCSI_BACKSTORE_CAN_ANCHOR) == 0)
        #expect(medium.change(SCSI_BACKSTORE_ANCHOR, 0, 4096) == EOPNOTSUPP)
        try medium.close()
    }

    @Test(.enabled(if: SmallFileSystem.isPossible, "no privilege to mount a tmpfs"))
    func aFileSystemThatKnowsNoExtentsTellsHoles() throws {
        let fileSystem = try #require(SmallFileSystem(bytes: 1 << 20))
        let reactor = try makeReactor(.automatic)
        var options = FileBackstore.Options(path: fileSystem.path + "/disk")
        options.size = 256 << 10
        options.create = true
        options.direct = false
        let file = try FileBackstore(options, reactor: reactor)
        let capabilities = file.handle.geometry().capabilities
        #expect(capabilities & UInt32(SCSI_BACKSTORE_CAN_REPORT_EXTENTS) != 0)
        #expect(capabilities & UInt32(SCSI_BACKSTORE_CAN_ANCHOR) == 0, "tmpfs cannot tell what is anchored")
        let write = TestRequest(SCSI_BACKSTORE_WRITE, offset: 8192, length: 4096, lengths: [4096])
        #expect(write.submit(file.handle))
        turns(reactor) { write.isDone }
        let size = MemoryLayout<scsi_backstore_extent>.stride * 4
        let query = TestRequest(SCSI_BACKSTORE_EXTENTS, offset: 0, length: 256 << 10, lengths: [size])
        query.data = [UInt8](repeating: 0, count: size)
        #expect(query.submit(file.handle))
        turns(reactor) { query.isDone }
        #expect(query.error == 0)
        let lengths = (0..<4).map { index in
            unsafe query.data.withUnsafeBytes { unsafe $0.loadUnaligned(fromByteOffset: index * 16, as: UInt64.self) }
        }
        #expect(lengths == [8192, 4096, (256 << 10) - 12288, 0])
        try file.close()
    }

    @Test(arguments: Variant.all, [0, SCSI_BACKSTORE_IMMEDIATE])
    func prefetchingTellsWhetherThereIsACache(_ variant: Variant, flags: Int) throws {
        let medium = try OpenMedium(variant)
        medium.write(bytes(1 << 20), at: 0)
        let request = TestRequest(SCSI_BACKSTORE_PREFETCH, offset: 0, length: 1 << 20, flags: flags)
        // Memory has no cache before it.
        let expected = variant.kind == .ram ? EOPNOTSUPP : variant.kind == .direct ? ENOBUFS : 0
        #expect(medium.perform(request) == expected)
        try medium.close()
    }

    @Test func prefetchingBringsAFileIntoThePageCache() throws {
        let medium = try OpenMedium(Variant(engine: .automatic, kind: .buffered))
        medium.write(bytes(1 << 20), at: 0)
        #expect(medium.flush() == 0)
        // Not by a read that may not wait (RWF_NOWAIT): that fetches what it does not find.
        let isCached = {
            let page = unsafe mmap(nil, 4096, PROT_READ, MAP_SHARED, medium.descriptor, 171 << 12)!
            defer { unsafe munmap(page, 4096) }
            var residency: UInt8 = 0
            #expect(unsafe mincore(page, 4096, &residency) == 0)
            return residency & 1 == 1
        }
        #expect(isCached())
        // Advice, and no order: a page on its way between the kernel's lists stays.
        for _ in 0..<10_000 where isCached() {
            #expect(posix_fadvise(medium.descriptor, 0, 0, Int32(POSIX_FADV_DONTNEED)) == 0)
            usleep(1000)
        }
        #expect(!isCached(), "the page cache does not let go here: the test shows nothing")
        #expect(medium.change(SCSI_BACKSTORE_PREFETCH, 0, 1 << 20) == 0)
        #expect(isCached())
        try medium.close()
    }

    @Test(arguments: Variant.all)
    func atomicWritesAreOfferedOnlyWhereTheyAreAtomicOverTheLossOfPower(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        let geometry = medium.handle.geometry()
        let request = TestRequest(
            SCSI_BACKSTORE_WRITE, offset: 65536, length: 65536, lengths: [4096, 61440], flags: SCSI_BACKSTORE_ATOMIC)
        request.data = bytes(65536)
        if variant.kind == .ram {
            #expect(geometry.atomic_write_maximum >= 32 << 20)
            #expect(medium.perform(request) == 0)
        } else if geometry.atomic_write_maximum == 0 {
            // The kernel refuses what it has not promised: nothing is written.
            #expect(medium.perform(request) != 0)
            #expect(medium.read(65536, at: 65536).allSatisfy { $0 == 0 })
        } else {
            #expect(geometry.atomic_write_maximum & (geometry.atomic_write_maximum - 1) == 0)
            #expect(geometry.atomic_write_alignment == geometry.atomic_write_maximum)
        }
        try medium.close()
    }
}
