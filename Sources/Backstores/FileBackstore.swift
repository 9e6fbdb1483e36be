// FileBackstore: a disk in a file.
//
// Owns: how the file is created, opened, locked and measured. Called by: the daemon (open, close), a logical unit
// through the handle. Must not know: SCSI; how requests are served (DescriptorIO).

import CBackstore
import CLinux
import Glibc
public import Reactor
public import SCSICore

/// A disk in a regular file.
///
/// The file is locked for this process alone (an open file description lock: `lslocks` shows it), and never changes its
/// size unless somebody else changes it. A sparse file stays sparse: unmapped ranges are punched out.
///
/// A flush that failed makes all later flushes fail until the file is opened again, because the kernel reports lost
/// writes only once.
@safe
public final class FileBackstore {
    /// How to open the file.
    public struct Options: Sendable {
        /// The path of the file.
        public var path: String
        /// Bytes, a multiple of the logical block size; `nil`: the size that the file has.
        public var size: UInt64?
        /// Whether a missing file is created, sparse, with `size` and mode 0600.
        public var create = false
        /// 512 or 4096 bytes.
        public var logicalBlockSize = 512
        /// Whether to go around the page cache where the file system allows it (`isDirect` tells).
        public var direct = true
        /// Whether writes are refused (EROFS).
        public var readOnly = false
        /// Whether others may have the file open who say the same: their locks are shared ones. It is for whoever says
        /// so to see to it that one of them at a time writes, as a virtual machine that moves does.
        public var isShared = false

        /// The defaults for a file.
        public init(path: String) { self.path = path }
    }

    /// The backstore as a logical unit uses it. Valid until `close`.
    public var handle: BackstoreHandle { io.handle }

    /// Whether data goes around the page cache.
    public var isDirect: Bool { io.isDirect }

    /// Requests accepted and not completed.
    public var requestsInFlight: Int { io.inFlight }

    private let io: DescriptorIO
    private let path: String

    /// Opens the file, or creates it.
    ///
    /// - Parameter reactor: The reactor of the logical unit that will use it.
    public init(_ options: Options, reactor: Reactor) throws(BackstoreError) {
        path = options.path
        try checkPath(options.path)
        try checkBlockSize(options.logicalBlockSize, options.path)
        if let size = options.size { try checkSize(size, blockSize: options.logicalBlockSize, options.path) }
        let descriptor = try Self.open(options)
        do {
            let status = try Self.measure(descriptor, options)
            let alignment =
                options.direct
                ? DirectAlignment.enable(descriptor, logicalBlockSize: options.logicalBlockSize) : nil
            let canPunch = !options.readOnly && Self.canPunch(descriptor, size: status.st_size)
            io = try DescriptorIO(
                path: options.path, descriptor: descriptor, kind: .file, alignment: alignment, canPunch: canPunch,
                geometry: Self.geometry(descriptor, options, status, canPunch: canPunch), reactor: reactor)
        } catch {
            Glibc.close(descriptor)
            throw error
        }
    }

    /// Flushes and closes the file. Nothing may be in flight. On the reactor's thread, or after its end.
    ///
    /// Throws if this flush or an earlier one failed; the file is closed all the same.
    public func close() throws(BackstoreError) {
        let code = io.close()
        if code != 0 { throw BackstoreError(path, .flushFailed(errno: code)) }
    }

    /// Looks at the file's size again.
    ///
    /// - Returns: Whether the file has grown, and the geometry with it. A file that became shorter keeps its geometry,
    ///   and what lies past its end gives EIO.
    public func refreshGeometry() -> Bool {
        var status = stat()
        guard unsafe fstat(io.descriptor, &status) == 0 else { return false }
        let blockSize = UInt64(io.geometry.logical_block_size)
        let size = UInt64(status.st_size) / blockSize * blockSize
        guard size > io.geometry.size else { return false }
        io.resize(to: size)
        return true
    }

    // MARK: Opening

    private static func open(_ options: Options) throws(BackstoreError) -> Int32 {
        let flags = (options.readOnly ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK
        // Twice: somebody else may create the file after we found none.
        for _ in 0..<2 {
            let descriptor = unsafe Glibc.open(options.path, flags)
            if descriptor >= 0 {
                do {
                    try checkIsFile(descriptor, options.path)
                    try lock(descriptor, options)
                } catch {
                    Glibc.close(descriptor)
                    throw error
                }
                return descriptor
            }
            guard errno == ENOENT else { throw openError(options.path, errno) }
            guard options.create else { throw missing(options.path) }
            if let descriptor = try create(options) { return descriptor }
        }
        throw BackstoreError(options.path, .systemCall("open", errno: ENOENT))
    }

    private static func openError(_ path: String, _ code: Int32) -> BackstoreError {
        // A directory cannot be opened for writing, and other kinds of files only in their own ways.
        code == EISDIR || code == ENXIO
            ? BackstoreError(path, .notRegularFile) : BackstoreError(path, .systemCall("open", errno: code))
    }

    private static func missing(_ path: String) -> BackstoreError {
        unsafe BackstoreError(path, access(directory(of: path), F_OK) == 0 ? .missing : .missingDirectory)
    }

    private static func directory(of path: String) -> String {
        guard let slash = path.utf8.lastIndex(of: UInt8(ascii: "/")) else { return "." }
        return slash == path.startIndex ? "/" : String(path[..<slash])
    }

    private static func checkIsFile(_ descriptor: Int32, _ path: String) throws(BackstoreError) {
        var status = stat()
        guard unsafe fstat(descriptor, &status) == 0 else {
            throw BackstoreError(path, .systemCall("fstat", errno: errno))
        }
        guard status.st_mode & S_IFMT == S_IFREG else { throw BackstoreError(path, .notRegularFile) }
    }

    /// The kernel ends what a killed process had in flight, and lets go of its locks with that, after the process is
    /// gone already: a daemon that follows one must not fail for it. So a lock is asked for again for two seconds.
    private static func lock(_ descriptor: Int32, _ options: Options) throws(BackstoreError) {
        for attempt in 0...100 {
            if attempt > 0 { usleep(20_000) }
            // Readers may share, and so may those who have agreed to.
            guard clinux_lock(descriptor, options.readOnly || options.isShared ? 1 : 0) != 0 else { return }
            guard errno == EAGAIN || errno == EACCES else {
                throw BackstoreError(options.path, .systemCall("lock", errno: errno))
            }
        }
        throw BackstoreError(options.path, .locked)
    }

    /// Creates the file with its size; `nil` if somebody else has created it meanwhile. A file that could not be
    /// completed is removed again.
    private static func create(_ options: Options) throws(BackstoreError) -> Int32? {
        let path = options.path
        guard !options.readOnly else { throw BackstoreError(path, .createReadOnly) }
        guard let size = options.size else { throw BackstoreError(path, .missingSize) }
        let descriptor = unsafe Glibc.open(path, O_RDWR | O_CLOEXEC | O_CREAT | O_EXCL, 0o600)
        if descriptor < 0 {
            if errno == EEXIST { return nil }
            if errno == ENOENT { throw BackstoreError(path, .missingDirectory) }
            throw BackstoreError(path, .systemCall("open to create", errno: errno))
        }
        do throws(BackstoreError) {
            try lock(descriptor, options)
            guard ftruncate(descriptor, off_t(size)) == 0 else {
                throw BackstoreError(
                    path, errno == EFBIG ? .sizeTooLarge(size) : .systemCall("ftruncate", errno: errno))
            }
            guard fsync(descriptor) == 0 else { throw BackstoreError(path, .systemCall("fsync", errno: errno)) }
            try synchronizeDirectory(path)
        } catch {
            unsafe unlink(path)
            Glibc.close(descriptor)
            throw error
        }
        return descriptor
    }

    private static func synchronizeDirectory(_ path: String) throws(BackstoreError) {
        let descriptor = unsafe Glibc.open(directory(of: path), O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard descriptor >= 0 else { throw BackstoreError(path, .systemCall("open of the directory", errno: errno)) }
        defer { Glibc.close(descriptor) }
        guard fsync(descriptor) == 0 else {
            throw BackstoreError(path, .systemCall("fsync of the directory", errno: errno))
        }
    }

    // MARK: Measuring

    /// Checks the size of the file against the configured one.
    private static func measure(_ descriptor: Int32, _ options: Options) throws(BackstoreError) -> stat {
        var status = stat()
        guard unsafe fstat(descriptor, &status) == 0 else {
            throw BackstoreError(options.path, .systemCall("fstat", errno: errno))
        }
        let actual = UInt64(status.st_size)
        if let size = options.size, size != actual {
            throw BackstoreError(options.path, .sizeDiffers(configured: size, actual: actual))
        }
        try checkSize(actual, blockSize: options.logicalBlockSize, options.path)
        return status
    }

    /// Whether holes can be punched: tried past the end, where it changes nothing.
    private static func canPunch(_ descriptor: Int32, size: off_t) -> Bool {
        fallocate(descriptor, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (size + 4095) / 4096 * 4096, 4096) == 0
    }

    /// Whether a range can be given space without data, and be seen to have it. Tried past the end like `canPunch`;
    /// what the trial allocates is given back at once.
    private static func canAnchor(_ descriptor: Int32, size: off_t) -> Bool {
        guard clinux_file_extents(descriptor, 0, 1, 0, nil) == 0 else { return false }
        let past = (size + 4095) / 4096 * 4096
        let result = fallocate(descriptor, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, past, 4096)
        // A full file system can do it, only not now.
        let isSupported = result == 0 || errno == ENOSPC || errno == EDQUOT
        return isSupported && canPunch(descriptor, size: size)
    }

    private static func geometry(
        _ descriptor: Int32, _ options: Options, _ status: stat, canPunch: Bool
    ) -> scsi_backstore_geometry {
        var geometry = scsi_backstore_geometry()
        geometry.capabilities = UInt32(
            SCSI_BACKSTORE_CAN_REPORT_EXTENTS | SCSI_BACKSTORE_CAN_PREFETCH | SCSI_BACKSTORE_CAN_REPORT_SPACE)
        if !options.readOnly {
            geometry.capabilities |= UInt32(
                SCSI_BACKSTORE_WRITABLE | SCSI_BACKSTORE_VOLATILE_CACHE | SCSI_BACKSTORE_CAN_WRITE_ZEROES)
            if canPunch {
                geometry.capabilities |= UInt32(SCSI_BACKSTORE_CAN_DISCARD | SCSI_BACKSTORE_DISCARD_READS_ZEROS)
                if canAnchor(descriptor, size: status.st_size) {
                    geometry.capabilities |= UInt32(SCSI_BACKSTORE_CAN_ANCHOR)
                }
            }
        }
        geometry.size = UInt64(status.st_size)
        geometry.logical_block_size = UInt32(options.logicalBlockSize)
        // What the file system allocates at once; a page at most, because the page cache is as good.
        let unit = UInt32(clamping: status.st_blksize)
        let isPowerOfTwo = unit != 0 && unit & (unit - 1) == 0
        let isUsable = isPowerOfTwo && unit >= geometry.logical_block_size
        geometry.physical_block_size = isUsable ? max(min(unit, 4096), geometry.logical_block_size) : 4096
        geometry.optimal_transfer_granularity = isUsable ? unit : 0
        if canPunch { geometry.discard_granularity = isUsable ? unit : geometry.logical_block_size }
        return geometry
    }
}
