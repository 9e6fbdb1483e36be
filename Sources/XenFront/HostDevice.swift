// HostDevice: a SCSI device of this host, through its node of the driver sg.
//
// Owns: the file descriptor. Called by: PassthroughNexus, on the reactor's thread; tests have one of their own. Must
// not know: rings, guests.

import CLinux
import CXen
import Glibc

/// Where a SCSI device of this host is, but for the logical unit.
struct HostTarget: Hashable, Sendable, CustomStringConvertible {
    let host: UInt16
    let channel: UInt16
    let target: UInt16

    var description: String { "\(host):\(channel):\(target)" }
}

/// A command for a host's device. Everything that it points to stays until its completion is fetched.
@unsafe
struct HostCommand {
    /// Names the command in its completion.
    let slot: Int
    let cdb: UnsafePointer<UInt8>
    let cdbLength: Int
    let toDevice: Bool
    let data: UnsafeMutableRawPointer?
    let length: Int
    let sense: UnsafeMutableRawBufferPointer
    let timeoutMilliseconds: UInt32
}

/// How a command of a host's device has ended.
struct HostCompletion {
    let slot: Int
    /// SAM status.
    let status: UInt8
    /// A host code of Linux; those of vscsiif have the same numbers.
    let host: UInt8
    let residual: Int
    let senseLength: Int
}

/// What became of a command that was handed over.
enum HostSubmission {
    case accepted
    /// As many as can be are under way: try again when one has ended.
    case full
    /// Not possible, for this command.
    case refused
}

/// A logical unit of this host.
protocol HostDevice: AnyObject {
    /// Readable when a command has ended.
    var descriptor: Int32 { get }
    /// SCSI's peripheral device type.
    var type: UInt8 { get }
    func submit(_ command: HostCommand) -> HostSubmission
    /// A command that has ended.
    func next() -> HostCompletion?
    /// Resets the unit, or the whole target, which may take seconds.
    ///
    /// - Parameter done: Called on any thread.
    func reset(wholeTarget: Bool, done: @escaping @Sendable (Bool) -> Void)
    /// No command is fetched any more; those under way end by themselves.
    func close()
}

/// A device through /dev/sgN. Its commands are written and read one by one and never block (sg's version 3 interface);
/// sg copies the data when a command is written and when its completion is read, so memory of a command that is not
/// fetched is never touched.
@safe
final class GenericDevice: HostDevice {
    let descriptor: Int32
    let type: UInt8

    // Linux' include/scsi/sg.h; the C library's is older.
    private static let resetTarget: Int32 = 4
    private static let noEscalation: Int32 = 0x100
    private static let system = "/sys/bus/scsi/devices"

    /// Opens the device.
    init(_ target: HostTarget, lun: UInt16) throws(VhostError) {
        let address = "\(target):\(lun)"
        let directory = "\(Self.system)/\(address)"
        guard unsafe access(directory, F_OK) == 0 else {
            throw VhostError(text: "this host has no SCSI device \(address): lsscsi shows them all")
        }
        guard let node = directoryEntries("\(directory)/scsi_generic").first else {
            throw VhostError(text: "the SCSI device \(address) has no sg node: modprobe sg")
        }
        type = readNumber("\(directory)/type") ?? 0x1f
        descriptor = unsafe open("/dev/\(node)", O_RDWR | O_NONBLOCK | O_CLOEXEC)
        guard descriptor >= 0 else {
            throw VhostError(
                text: unsafe "/dev/\(node), which is \(address), cannot be opened: \(String(cString: strerror(errno)))")
        }
    }

    /// The logical units of a target, by what Linux has found.
    static func units(of target: HostTarget) -> [UInt16] {
        directoryEntries(system).compactMap { entry in
            guard entry.hasPrefix("\(target):") else { return nil }
            return UInt16(entry.dropFirst("\(target):".utf8.count))
        }
    }

    func submit(_ command: HostCommand) -> HostSubmission {
        var header = unsafe sg_io_hdr_t()
        unsafe header.interface_id = Int32(UInt8(ascii: "S"))
        unsafe header.dxfer_direction =
            unsafe command.length == 0 ? SG_DXFER_NONE : command.toDevice ? SG_DXFER_TO_DEV : SG_DXFER_FROM_DEV
        unsafe header.cmdp = UnsafeMutablePointer(mutating: command.cdb)
        unsafe header.cmd_len = UInt8(command.cdbLength)
        unsafe header.dxferp = command.length == 0 ? nil : command.data
        unsafe header.dxfer_len = UInt32(command.length)
        unsafe header.sbp = command.sense.baseAddress?.assumingMemoryBound(to: UInt8.self)
        unsafe header.mx_sb_len = UInt8(command.sense.count)
        unsafe header.timeout = command.timeoutMilliseconds
        unsafe header.pack_id = Int32(command.slot)
        while true {
            let size = unsafe MemoryLayout<sg_io_hdr_t>.size
            if unsafe write(descriptor, &header, size) == size { return .accepted }
            switch errno {
            case EINTR: continue
            // EDOM: sg has its limit of 16 commands.
            case EAGAIN, EDOM, ENOMEM: return .full
            default: return .refused
            }
        }
    }

    func next() -> HostCompletion? {
        var header = unsafe sg_io_hdr_t()
        unsafe header.interface_id = Int32(UInt8(ascii: "S"))
        let size = unsafe MemoryLayout<sg_io_hdr_t>.size
        guard unsafe read(descriptor, &header, size) == size else { return nil }
        var host = unsafe UInt8(truncatingIfNeeded: header.host_status)
        // DRIVER_TIMEOUT, of kernels before 5.14.
        if unsafe host == 0 && header.driver_status & 0x0f == 6 { host = UInt8(XEN_VSCSIIF_RSLT_HOST_TIME_OUT) }
        return unsafe HostCompletion(
            slot: Int(header.pack_id), status: header.status, host: host, residual: Int(header.resid),
            senseLength: Int(header.sb_len_wr))
    }

    func reset(wholeTarget: Bool, done: @escaping @Sendable (Bool) -> Void) {
        let kind = Self.noEscalation | (wholeTarget ? Self.resetTarget : SG_SCSI_RESET_DEVICE)
        // A descriptor of its own, because ours may be closed meanwhile.
        let job = ResetJob(descriptor: dup(descriptor), kind: kind, done: done)
        guard job.descriptor >= 0 else { return done(false) }
        let context = unsafe Unmanaged.passRetained(job)
        var thread = pthread_t()
        let error = unsafe pthread_create(
            &thread, nil,
            { context in
                unsafe Unmanaged<ResetJob>.fromOpaque(context!).takeRetainedValue().run()
                return nil
            }, context.toOpaque())
        if error == 0 {
            pthread_detach(thread)
        } else {
            unsafe context.takeRetainedValue().abandon()
        }
    }

    func close() { Glibc.close(descriptor) }
}

/// A reset on a thread of its own: the call blocks until the device has been reset.
private final class ResetJob: Sendable {
    let descriptor: Int32
    private let kind: Int32
    private let done: @Sendable (Bool) -> Void

    init(descriptor: Int32, kind: Int32, done: @escaping @Sendable (Bool) -> Void) {
        (self.descriptor, self.kind, self.done) = (descriptor, kind, done)
    }

    func run() {
        var kind = kind
        let result = unsafe ioctl(descriptor, UInt(SG_SCSI_RESET), &kind)
        Glibc.close(descriptor)
        done(result == 0)
    }

    func abandon() {
        Glibc.close(descriptor)
        done(false)
    }
}

private func directoryEntries(_ path: String) -> [String] {
    guard let directory = unsafe opendir(path) else { return [] }
    defer { unsafe closedir(directory) }
    var names: [String] = []
    while let entry = unsafe readdir(directory) {
        let name = unsafe withUnsafeBytes(of: &entry.pointee.d_name) {
            unsafe String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self)
        }
        if name != "." && name != ".." { names.append(name) }
    }
    return names
}

private func readNumber(_ path: String) -> UInt8? {
    let file = unsafe open(path, O_RDONLY | O_CLOEXEC)
    guard file >= 0 else { return nil }
    defer { Glibc.close(file) }
    var bytes = [UInt8](repeating: 0, count: 16)
    let count = unsafe read(file, &bytes, bytes.count)
    return UInt8(String(decoding: bytes.prefix(max(0, count)).prefix { $0 != 10 }, as: UTF8.self))
}
