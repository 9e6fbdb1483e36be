// FileExtents: which stretches of a file have data, space without data, or neither.
//
// Owns: nothing. Called by: DescriptorIO, on a helper thread, because a file system may have to read its maps first.
// Must not know: requests.

import CBackstore
import CLinux
import Glibc

enum FileExtents {
    /// As the file system tells (FIEMAP): extents that are allocated and not written are anchored, what is between
    /// extents is deallocated.
    ///
    /// - Parameter synchronize: Whether the page cache may hold data for what the file system still calls not written.
    /// - Returns: 0 or a negative errno value.
    static func report(
        _ descriptor: Int32, _ writer: inout ExtentWriter, _ end: UInt64, _ blockSize: UInt64, synchronize: Bool
    ) -> Int {
        let capacity = Int(CLINUX_FILE_EXTENTS)
        return unsafe withUnsafeTemporaryAllocation(of: fiemap_extent.self, capacity: capacity) { extents in
            let start = writer.position
            let count = unsafe Int(
                clinux_file_extents(descriptor, start, end - start, synchronize ? 1 : 0, extents.baseAddress!))
            guard count >= 0 else { return count }
            for index in 0..<count {
                let extent = unsafe extents[index]
                let limit = extent.fe_logical + extent.fe_length
                if extent.fe_logical > writer.position,
                    !writer.add(SCSI_BACKSTORE_DEALLOCATED, to: extent.fe_logical)
                {
                    return 0
                }
                // A block that is anchored in part only is called mapped, which says nothing.
                let isWhole = extent.fe_logical % blockSize == 0 && limit % blockSize == 0
                let isAnchored = isWhole && extent.fe_flags & UInt32(FIEMAP_EXTENT_UNWRITTEN) != 0
                if !writer.add(isAnchored ? SCSI_BACKSTORE_ANCHORED : SCSI_BACKSTORE_MAPPED, to: limit) { return 0 }
            }
            // As many as there was room for: what follows is not known.
            if count < capacity { _ = writer.add(SCSI_BACKSTORE_DEALLOCATED, to: end) }
            return 0
        }
    }

    /// As every file system tells: data and holes, with everything that it cannot tell as data.
    ///
    /// - Returns: 0 or a negative errno value.
    static func reportHoles(
        _ descriptor: Int32, _ writer: inout ExtentWriter, _ end: UInt64, _ blockSize: UInt64
    ) -> Int {
        var goesOn = true
        for _ in 0..<CLINUX_FILE_EXTENTS where goesOn {
            let data = lseek(descriptor, off_t(writer.position), Int32(SEEK_DATA))
            // ENXIO: a hole up to the end of the file.
            guard data >= 0 || errno == ENXIO else { return -Int(errno) }
            let firstData = data < 0 ? end : UInt64(data)
            // A hole that ends within the block in which it begins leaves that block mapped.
            if firstData / blockSize * blockSize > writer.position || firstData == end {
                goesOn = writer.add(SCSI_BACKSTORE_DEALLOCATED, to: firstData)
            } else {
                let hole = lseek(descriptor, off_t(firstData), Int32(SEEK_HOLE))
                guard hole >= 0 else { return -Int(errno) }
                goesOn = writer.add(SCSI_BACKSTORE_MAPPED, to: UInt64(hole))
            }
        }
        return 0
    }
}
