// SharedMemory: memory that the front-end shares with the back-end: a guest's memory, as far as the back-end can tell.
//
// Owns: a memfd and its mapping. Called by: VhostUserFrontEnd, the rings, tests. Must not know: what lies in it.

import CLinux
import Glibc

/// One range of guest-physical addresses in a memfd. Every access is checked against it: an address that is outside
/// is a bug of the test. Hand addresses outside to the back-end, not to this.
@safe
public final class SharedMemory {
    /// The memfd.
    public let descriptor: Int32
    /// The guest-physical address of the first byte.
    public let guestAddress: UInt64
    /// Bytes.
    public let size: Int
    private let base: UnsafeMutableRawPointer
    private var free: [Range<UInt64>]

    /// Makes memory of `size` bytes that begins at a guest-physical address.
    public init(size: Int, guestAddress: UInt64) throws(InitiatorError) {
        precondition(size > 0)
        let descriptor = unsafe memfd_create("vhost-user-initiator", UInt32(MFD_CLOEXEC))
        guard descriptor >= 0 else { throw .systemCall("memfd_create", errno: errno) }
        guard ftruncate(descriptor, size) == 0 else {
            let code = errno
            close(descriptor)
            throw .systemCall("ftruncate of shared memory to \(size) bytes", errno: code)
        }
        let mapped = unsafe mmap(nil, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0)
        guard let mapped = unsafe mapped, unsafe mapped != UnsafeMutableRawPointer(bitPattern: -1) else {
            let code = errno
            close(descriptor)
            throw .systemCall("mmap of \(size) bytes", errno: code)
        }
        unsafe base = mapped
        self.descriptor = descriptor
        self.guestAddress = guestAddress
        self.size = size
        free = [guestAddress..<guestAddress + UInt64(size)]
    }

    deinit {
        unsafe munmap(base, size)
        close(descriptor)
    }

    /// The address in this process; what SET_MEM_TABLE and SET_VRING_ADDR call the user address.
    public var userAddress: UInt64 { unsafe UInt64(UInt(bitPattern: base)) }

    /// The user address of a guest-physical address.
    public func userAddress(of address: UInt64) -> UInt64 { address &- guestAddress &+ userAddress }

    /// Whether `count` bytes from an address are inside.
    public func contains(_ address: UInt64, _ count: Int) -> Bool {
        address >= guestAddress && address - guestAddress <= UInt64(size)
            && UInt64(count) <= UInt64(size) - (address - guestAddress)
    }

    /// The host address of `count` bytes.
    @unsafe
    public func pointer(_ address: UInt64, _ count: Int) -> UnsafeMutableRawPointer {
        precondition(contains(address, count), "not in the shared memory")
        return unsafe base + Int(address - guestAddress)
    }

    /// Takes bytes that nobody has; returns the guest-physical address of the first.
    public func allocate(_ count: Int, alignment: Int = 16) -> UInt64 {
        for (index, range) in free.enumerated() {
            let start = (range.lowerBound + UInt64(alignment) - 1) / UInt64(alignment) * UInt64(alignment)
            let end = start + UInt64(count)
            guard end <= range.upperBound else { continue }
            let rest = [range.lowerBound..<start, end..<range.upperBound]
            free.replaceSubrange(index...index, with: rest.filter { !$0.isEmpty })
            return start
        }
        preconditionFailure("the shared memory is used up; make it larger")
    }

    /// Gives bytes back that `allocate` returned.
    public func deallocate(_ address: UInt64, _ count: Int) {
        guard count > 0 else { return }
        var range = address..<address + UInt64(count)
        let index = free.firstIndex { $0.lowerBound >= range.upperBound } ?? free.count
        var replaced = index..<index
        if index < free.count, free[index].lowerBound == range.upperBound {
            range = range.lowerBound..<free[index].upperBound
            replaced = replaced.lowerBound..<index + 1
        }
        if index > 0 {
            precondition(free[index - 1].upperBound <= range.lowerBound, "given back twice")
            if free[index - 1].upperBound == range.lowerBound {
                range = free[index - 1].lowerBound..<range.upperBound
                replaced = index - 1..<replaced.upperBound
            }
        }
        free.replaceSubrange(replaced, with: [range])
    }

    /// Copies bytes into the memory.
    public func write(_ bytes: [UInt8], at address: UInt64) {
        let target = unsafe pointer(address, bytes.count)
        unsafe bytes.withUnsafeBytes { source in
            guard let start = source.baseAddress else { return }
            unsafe target.copyMemory(from: start, byteCount: source.count)
        }
    }

    /// Copies bytes out of the memory.
    public func read(_ count: Int, at address: UInt64) -> [UInt8] {
        let source = unsafe pointer(address, count)
        return unsafe [UInt8](UnsafeRawBufferPointer(start: source, count: count))
    }

    /// Sets bytes to one value.
    public func fill(_ count: Int, with value: UInt8, at address: UInt64) {
        unsafe pointer(address, count).initializeMemory(as: UInt8.self, repeating: value, count: count)
    }

    /// One 16-bit load.
    public func load16(_ address: UInt64) -> UInt16 { unsafe clinux_load16_acquire(pointer(address, 2)) }

    /// One 32-bit load.
    public func load32(_ address: UInt64) -> UInt32 { unsafe clinux_load32_relaxed(pointer(address, 4)) }

    /// One 16-bit store, behind all that was stored before.
    public func store16(_ value: UInt16, at address: UInt64) {
        unsafe clinux_store16_release(pointer(address, 2), value)
    }
}
