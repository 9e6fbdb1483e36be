// DirectAlignment: what O_DIRECT asks of addresses, offsets and lengths on a descriptor.
//
// Owns: nothing. Called by: FileBackstore and BlockDeviceBackstore, when they open. Must not know: requests.

import CLinux
import Glibc

/// What direct I/O asks for, in bytes.
struct DirectAlignment {
    /// Of memory addresses.
    var memory: Int
    /// Of offsets on the medium and of lengths, each segment's too.
    var offset: Int

    /// Turns direct I/O on.
    ///
    /// - Returns: The alignment, or `nil` if the file system refuses direct I/O or wants blocks larger than the logical
    ///   ones; the descriptor is then buffered.
    static func enable(_ descriptor: Int32, logicalBlockSize: Int) -> DirectAlignment? {
        let flags = fcntl(descriptor, F_GETFL)
        guard flags >= 0, fcntl(descriptor, F_SETFL, flags | O_DIRECT) == 0 else { return nil }
        if let found = reported(descriptor) ?? probed(descriptor), found.offset <= logicalBlockSize { return found }
        _ = fcntl(descriptor, F_SETFL, flags & ~O_DIRECT)
        return nil
    }

    /// What statx reports (6.1 and later, where the file system knows it).
    private static func reported(_ descriptor: Int32) -> DirectAlignment? {
        var memory: UInt32 = 0
        var offset: UInt32 = 0
        guard unsafe clinux_direct_alignment(descriptor, &memory, &offset) == 0 else { return nil }
        guard isPowerOfTwo(memory), isPowerOfTwo(offset) else { return DirectAlignment(memory: 1, offset: .max) }
        return DirectAlignment(memory: Int(memory), offset: Int(offset))
    }

    private static func isPowerOfTwo(_ value: UInt32) -> Bool { value != 0 && value & (value - 1) == 0 }

    /// The smallest length that can be read; memory is then aligned alike, which is always enough.
    private static func probed(_ descriptor: Int32) -> DirectAlignment? {
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096, alignment: 4096)
        defer { unsafe buffer.deallocate() }
        for length in [512, 1024, 2048, 4096] where unsafe pread(descriptor, buffer, length, 0) >= 0 {
            return DirectAlignment(memory: length, offset: length)
        }
        return nil
    }
}
