// Memory that a front-end takes back while it is mapped.
//
// Must not know: rings, messages.

import CLinux
import Glibc
import Testing

@testable import VirtioFront

@Suite("Guest memory whose file is made shorter", .serialized)
struct MemoryGuardTests {
    private static let size: UInt64 = 1 << 20

    private func region() throws -> (region: MemoryRegion, descriptor: Int32) {
        let descriptor = unsafe memfd_create("guard-test", UInt32(MFD_CLOEXEC))
        try #require(descriptor >= 0)
        #expect(ftruncate(descriptor, off_t(Self.size)) == 0)
        let region = try MemoryRegion(
            guestAddress: 0, size: Self.size, userAddress: 0x7000_0000, offset: 0, descriptor: descriptor)
        return (region, descriptor)
    }

    @Test("Reading and writing behind the new end goes on with zeros, and the process lives")
    func touchedAfterTruncation() throws {
        let (region, descriptor) = try region()
        defer { close(descriptor) }
        let memory = GuestMemory(regions: [region])
        guard let piece = unsafe memory.piece(Self.size - 4096, 4096) else {
            Issue.record("the region is not where it was put")
            return
        }
        unsafe piece.storeBytes(of: 0x1234_5678, as: UInt32.self)
        #expect(ftruncate(descriptor, 4096) == 0)
        let gone = unsafe piece.load(as: UInt32.self)
        #expect(gone == 0)
        unsafe piece.storeBytes(of: 7, as: UInt32.self)
        let kept = unsafe piece.load(as: UInt32.self)
        #expect(kept == 7)
    }

    @Test("A region that is there to begin with but not in its file is refused")
    func refusedAtOnce() throws {
        let (_, descriptor) = try region()
        defer { close(descriptor) }
        #expect(throws: MemoryRegion.Fault.self) {
            _ = try MemoryRegion(
                guestAddress: 0, size: Self.size + 1, userAddress: 0x7000_0000, offset: 0, descriptor: descriptor)
        }
    }

    @Test("A fault outside of any guarded range ends the process as ever")
    func otherFaults() async {
        await #expect(processExitsWith: .failure) {
            let descriptor = unsafe memfd_create("guard-test-outside", UInt32(MFD_CLOEXEC))
            _ = ftruncate(descriptor, 4096)
            _ = try MemoryRegion(guestAddress: 0, size: 4096, userAddress: 0, offset: 0, descriptor: descriptor)
            let other = unsafe clinux_map_shared(4096, descriptor)!
            _ = ftruncate(descriptor, 0)
            unsafe other.storeBytes(of: 1, as: UInt8.self)
        }
    }
}
