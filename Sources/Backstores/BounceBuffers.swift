// BounceBuffers: memory that direct I/O accepts, for data that lies where it does not.
//
// Owns: a fixed number of page-aligned buffers, and the zeros that every backstore writes from.
// Called by: DescriptorIO. Must not know: requests.

import Glibc

/// A bounded pool of buffers, mapped once; the kernel gives them memory at their first use.
@safe
struct BounceBuffers {
    private let memory: UnsafeMutableRawPointer
    /// The numbers of the free buffers.
    private let free: UnsafeMutablePointer<Int32>
    private var freeCount: Int

    init(path: String) throws(BackstoreError) {
        let count = BackstoreLimits.bounceBuffers
        let bytes = count * BackstoreLimits.bounceBytes
        let mapping = unsafe mmap(nil, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        guard let memory = unsafe mapping, unsafe memory != MAP_FAILED else {
            throw BackstoreError(path, .systemCall("mmap of \(bytes) bytes of bounce buffers", errno: errno))
        }
        unsafe self.memory = memory
        unsafe free = .allocate(capacity: count)
        for index in 0..<count { unsafe (free + index).initialize(to: Int32(index)) }
        freeCount = count
    }

    func destroy() {
        precondition(freeCount == BackstoreLimits.bounceBuffers, "a bounce buffer is still in use")
        unsafe munmap(memory, BackstoreLimits.bounceBuffers * BackstoreLimits.bounceBytes)
        unsafe free.deallocate()
    }

    /// A buffer's number, or -1 if there is none.
    mutating func take() -> Int32 {
        guard freeCount > 0 else { return -1 }
        freeCount -= 1
        return unsafe free[freeCount]
    }

    mutating func give(back number: Int32) {
        precondition(freeCount < BackstoreLimits.bounceBuffers, "a bounce buffer was given back twice")
        unsafe free[freeCount] = number
        freeCount += 1
    }

    func address(_ number: Int32) -> UnsafeMutableRawPointer {
        unsafe memory + Int(number) * BackstoreLimits.bounceBytes
    }
}

/// Memory that only holds zeros, and takes none: it is the kernel's zero page many times over.
@safe
enum Zeros {
    nonisolated(unsafe) private static let memory: UnsafeMutableRawPointer = {
        let memory = unsafe mmap(nil, BackstoreLimits.zeroBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        precondition(unsafe memory != MAP_FAILED, "no address space for a page of zeros")
        return unsafe memory!
    }()

    /// `BackstoreLimits.zeroBytes` of zeros, read-only.
    static var address: UnsafeMutableRawPointer { unsafe memory }
}
