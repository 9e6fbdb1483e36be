// BlockDeviceBackstore: a disk on a block device of the host: a partition, a logical volume, a whole disk.
//
// Owns: how the device is opened and what it is asked for. Called by: the daemon (open, close), a logical unit through
// the handle. Must not know: SCSI; how requests are served (DescriptorIO).

import CBackstore
import CLinux
import Glibc
public import Reactor
public import SCSICore

/// A disk on a block device. The device is opened exclusively: nobody can mount it meanwhile.
///
/// A flush that failed makes all later flushes fail until the device is opened again, because the kernel reports lost
/// writes only once.
@safe
public final class BlockDeviceBackstore {
    /// How to open the device.
    public struct Options: Sendable {
        /// The path of the device.
        public var path: String
        /// 512 or 4096 bytes, not smaller than the device's own; `nil`: the device's own.
        public var logicalBlockSize: Int?
        /// Whether to go around the page cache.
        public var direct = true
        /// Whether writes are refused (EROFS).
        public var readOnly = false

        /// The defaults for a device.
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

    /// Opens the device.
    ///
    /// - Parameter reactor: The reactor of the logical unit that will use it.
    public init(_ options: Options, reactor: Reactor) throws(BackstoreError) {
        path = options.path
        try checkPath(options.path)
        if let size = options.logicalBlockSize { try checkBlockSize(size, options.path) }
        let descriptor = try Self.open(options)
        do {
            let queue = DeviceQueue(descriptor)
            let geometry = try Self.geometry(descriptor, queue, options)
            let alignment =
                options.direct
                ? DirectAlignment.enable(descriptor, logicalBlockSize: Int(geometry.logical_block_size)) : nil
            io = try DescriptorIO(
                path: options.path, descriptor: descriptor, kind: .blockDevice, alignment: alignment,
                // Tried at the first WRITE ZEROES that may unmap: fallocate on a device has no harmless trial.
                canPunch: !options.readOnly, geometry: geometry, reactor: reactor)
        } catch {
            Glibc.close(descriptor)
            throw error
        }
        if !isDirect && !options.readOnly { io.declareVolatileCache() }
    }

    /// Flushes and closes the device. Nothing may be in flight. On the reactor's thread, or after its end.
    ///
    /// Throws if this flush or an earlier one failed; the device is closed all the same.
    public func close() throws(BackstoreError) {
        let code = io.close()
        if code != 0 { throw BackstoreError(path, .flushFailed(errno: code)) }
    }

    /// Looks at the device's size again.
    ///
    /// - Returns: Whether the device has grown, and the geometry with it. One that became smaller keeps its geometry,
    ///   and what lies past its end gives EIO.
    public func refreshGeometry() -> Bool {
        var bytes: UInt64 = 0
        guard unsafe clinux_block_size(io.descriptor, &bytes) == 0 else { return false }
        let blockSize = UInt64(io.geometry.logical_block_size)
        let size = bytes / blockSize * blockSize
        guard size > io.geometry.size else { return false }
        io.resize(to: size)
        return true
    }

    private static func open(_ options: Options) throws(BackstoreError) -> Int32 {
        // Looked at first: O_EXCL means something else for other kinds of files.
        var status = stat()
        guard unsafe stat(options.path, &status) == 0 else {
            throw BackstoreError(options.path, errno == ENOENT ? .missing : .systemCall("stat", errno: errno))
        }
        guard status.st_mode & S_IFMT == S_IFBLK else { throw BackstoreError(options.path, .notBlockDevice) }
        let descriptor = unsafe Glibc.open(options.path, (options.readOnly ? O_RDONLY : O_RDWR) | O_EXCL | O_CLOEXEC)
        if descriptor < 0 {
            switch errno {
            case EBUSY: throw BackstoreError(options.path, .deviceBusy)
            case EROFS where !options.readOnly: throw BackstoreError(options.path, .deviceReadOnly)
            case let code: throw BackstoreError(options.path, .systemCall("open", errno: code))
            }
        }
        var isWriteProtected: Int32 = 0
        if !options.readOnly, unsafe clinux_block_read_only(descriptor, &isWriteProtected) == 0, isWriteProtected != 0 {
            Glibc.close(descriptor)
            throw BackstoreError(options.path, .deviceReadOnly)
        }
        return descriptor
    }

    private static func geometry(
        _ descriptor: Int32, _ queue: DeviceQueue, _ options: Options
    ) throws(BackstoreError) -> scsi_backstore_geometry {
        var bytes: UInt64 = 0
        var logical: Int32 = 0
        guard unsafe clinux_block_size(descriptor, &bytes) == 0, unsafe clinux_block_logical(descriptor, &logical) == 0
        else { throw BackstoreError(options.path, .systemCall("ioctl for the size", errno: errno)) }
        let blockSize = options.logicalBlockSize ?? Int(logical)
        guard blockSize >= Int(logical) else {
            throw BackstoreError(options.path, .blockSizeTooSmall(configured: blockSize, device: Int(logical)))
        }
        try checkBlockSize(blockSize, options.path)
        var geometry = scsi_backstore_geometry()
        geometry.logical_block_size = UInt32(blockSize)
        geometry.size = bytes / UInt64(blockSize) * UInt64(blockSize)
        try checkSize(geometry.size, blockSize: blockSize, options.path)
        fillAlignment(descriptor, &geometry)
        geometry.capabilities = capabilities(queue, options)
        if queue.discardMaximum > 0 {
            geometry.maximum_discard = queue.discardMaximum / UInt64(blockSize) * UInt64(blockSize)
            geometry.discard_granularity = UInt32(clamping: max(queue.discardGranularity, UInt64(blockSize)))
            geometry.discard_alignment = UInt32(clamping: queue.discardAlignment)
        }
        return geometry
    }

    private static func fillAlignment(_ descriptor: Int32, _ geometry: inout scsi_backstore_geometry) {
        var physical: UInt32 = 0
        var offset: Int32 = 0
        _ = unsafe clinux_block_physical(descriptor, &physical)
        _ = unsafe clinux_block_alignment_offset(descriptor, &offset)
        geometry.physical_block_size = max(physical, geometry.logical_block_size)
        // -1: the device says that it cannot be told.
        geometry.lowest_aligned_offset =
            UInt32(max(0, offset)) / geometry.logical_block_size * geometry.logical_block_size
        var minimum: UInt32 = 0
        var optimal: UInt32 = 0
        if unsafe clinux_block_minimum_io(descriptor, &minimum) == 0, minimum % geometry.logical_block_size == 0 {
            geometry.optimal_transfer_granularity = minimum
        }
        if unsafe clinux_block_optimal_io(descriptor, &optimal) == 0, optimal % geometry.logical_block_size == 0 {
            geometry.optimal_transfer = UInt64(optimal)
        }
    }

    private static func capabilities(_ queue: DeviceQueue, _ options: Options) -> UInt32 {
        var capabilities = UInt32(SCSI_BACKSTORE_CAN_PREFETCH)
        if queue.isRotational { capabilities |= UInt32(SCSI_BACKSTORE_ROTATIONAL) }
        guard !options.readOnly else { return capabilities }
        // Zeros can always be had: the kernel writes them where the device cannot.
        capabilities |= UInt32(SCSI_BACKSTORE_WRITABLE | SCSI_BACKSTORE_CAN_WRITE_ZEROES)
        if queue.hasWriteBackCache { capabilities |= UInt32(SCSI_BACKSTORE_VOLATILE_CACHE) }
        if queue.discardMaximum > 0 { capabilities |= UInt32(SCSI_BACKSTORE_CAN_DISCARD) }
        return capabilities
    }
}

/// What sysfs says about the request queue of a block device.
private struct DeviceQueue {
    let discardMaximum: UInt64
    let discardGranularity: UInt64
    let discardAlignment: UInt64
    let isRotational: Bool
    /// True also if it cannot be told: then a flush too many is the safe answer.
    let hasWriteBackCache: Bool

    init(_ descriptor: Int32) {
        var status = stat()
        _ = unsafe fstat(descriptor, &status)
        let number = UInt64(status.st_rdev)
        let device = "/sys/dev/block/\(clinux_device_major(number)):\(clinux_device_minor(number))"
        // A partition has no queue of its own: its disk's is one level up.
        let queue = unsafe access(device + "/queue", F_OK) == 0 ? device + "/queue" : device + "/../queue"
        discardMaximum = UInt64(Self.text(queue + "/discard_max_bytes")) ?? 0
        discardGranularity = UInt64(Self.text(queue + "/discard_granularity")) ?? 0
        discardAlignment = UInt64(Self.text(device + "/discard_alignment")) ?? 0
        isRotational = Self.text(queue + "/rotational") == "1"
        hasWriteBackCache = Self.text(queue + "/write_cache") != "write through"
    }

    /// The one line of an attribute, or "" if there is none.
    private static func text(_ path: String) -> String {
        let descriptor = unsafe Glibc.open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return "" }
        defer { Glibc.close(descriptor) }
        var bytes = [UInt8](repeating: 0, count: 64)
        let count = unsafe read(descriptor, &bytes, bytes.count)
        guard count > 0 else { return "" }
        return String(decoding: bytes[..<count].prefix { $0 != UInt8(ascii: "\n") }, as: UTF8.self)
    }
}
