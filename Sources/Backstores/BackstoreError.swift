// BackstoreError: why a medium could not be opened or closed, in words for the person who configured it.
//
// Called by: every backstore here; shown by the daemon. Must not know: SCSI.

import Glibc

/// Why a backstore could not be opened or closed: which medium, what is wrong, and what to do next.
public struct BackstoreError: Error, Equatable, CustomStringConvertible {
    /// What is wrong.
    public enum Reason: Equatable, Sendable {
        /// The path is empty or contains a NUL character.
        case invalidPath
        /// The logical block size is neither 512 nor 4096 bytes.
        case invalidBlockSize(Int)
        /// The device's own logical blocks, in bytes, are larger than the configured ones.
        case blockSizeTooSmall(configured: Int, device: Int)
        /// A size of 0 bytes.
        case sizeZero
        /// A size in bytes that is no multiple of the logical block size.
        case sizeNotMultiple(size: UInt64, blockSize: Int)
        /// A size in bytes that no medium here can have.
        case sizeTooLarge(UInt64)
        /// The file exists with another size than the configured one, in bytes.
        case sizeDiffers(configured: UInt64, actual: UInt64)
        /// There is no such file, and it is not to be created.
        case missing
        /// The file is to be created but no size is given.
        case missingSize
        /// A file to be created read-only.
        case createReadOnly
        /// The directory of the file does not exist.
        case missingDirectory
        /// Somebody else has the file locked.
        case locked
        /// Somebody else uses the block device, or it is mounted.
        case deviceBusy
        /// The block device is write-protected.
        case deviceReadOnly
        /// Not a regular file.
        case notRegularFile
        /// Not a block device.
        case notBlockDevice
        /// A system call failed.
        case systemCall(String, errno: Int32)
        /// The last flush failed: writes that were completed may be lost.
        case flushFailed(errno: Int32)
    }

    /// The path of the medium, or its kind if it has none.
    public let path: String
    /// What is wrong.
    public let reason: Reason

    /// An error of the medium at `path`.
    public init(path: String, reason: Reason) {
        self.path = path
        self.reason = reason
    }

    init(_ path: String, _ reason: Reason) { self.init(path: path, reason: reason) }

    /// What is wrong, where, and what to do next.
    public var description: String { "\(path): \(text)" }

    private var text: String {
        switch reason {
        case .invalidPath: "not a path; give the path of a file or a block device"
        case .invalidBlockSize(let size): "a logical block size of \(size) bytes; choose 512 or 4096"
        case .blockSizeTooSmall(let configured, let device):
            "a logical block size of \(configured) bytes, but the device's is \(device); "
                + "choose \(device) or leave it out"
        case .sizeZero: "a size of 0 bytes; give the size that the disk is to have"
        case .sizeNotMultiple(let size, let blockSize):
            "a size of \(size) bytes is no multiple of the logical block size of \(blockSize); choose "
                + "\(size / UInt64(blockSize) * UInt64(blockSize)) or "
                + "\((size / UInt64(blockSize) + 1) * UInt64(blockSize))"
        case .sizeTooLarge(let size): "a size of \(size) bytes is too large for this medium; choose a smaller one"
        case .sizeDiffers(let configured, let actual):
            "the configured size is \(configured) bytes but the file has \(actual); change the configuration, or "
                + "resize the file yourself (targetd never does it by accident)"
        case .missing: "no such file; create it, or allow it to be created by giving a size"
        case .missingSize: "no such file, and no size to create it with; give a size"
        case .createReadOnly: "no such file, and a read-only one is not created; create it, or drop read-only"
        case .missingDirectory: "its directory does not exist; create the directory, or correct the path"
        case .locked: "locked by another process (another targetd or QEMU?); stop the other user, `lslocks` shows it; "
                + "or have both share it, for a guest that moves"
        case .deviceBusy:
            "the device is mounted or in use; unmount it or stop the other user (`lsblk` shows mounts)"
        case .deviceReadOnly: "the device is write-protected; configure the backstore read-only"
        case .notRegularFile: "not a regular file; use a block device backstore for a device, or correct the path"
        case .notBlockDevice: "not a block device; use a file backstore for a file, or correct the path"
        case .systemCall(let call, let code): "\(call): \(errorText(code))\(Self.advice(code))"
        case .flushFailed(let code):
            "the last flush failed: \(errorText(code)); completed writes may be lost: check the "
                + "medium and the data on it"
        }
    }

    private static func advice(_ code: Int32) -> String {
        switch code {
        case EACCES, EPERM: "; let targetd's user have access"
        case EROFS: "; the file system is read-only: remount it, or configure the backstore read-only"
        case ENOSPC, EDQUOT: "; free some space"
        case EMFILE, ENFILE: "; raise the limit on open files (LimitNOFILE= of the service)"
        case ENOTDIR, ELOOP, ENAMETOOLONG, EISDIR: "; correct the path"
        case ENOMEM: "; choose a smaller size, or give the machine more memory"
        default: "; see the kernel's log"
        }
    }
}

/// The C library's text for an errno value.
private func errorText(_ code: Int32) -> String {
    guard let text = unsafe strerror(code) else { return "error \(code)" }
    return unsafe String(cString: text)
}

/// The sizes that SCSI hosts understand everywhere.
func checkBlockSize(_ size: Int, _ path: String) throws(BackstoreError) {
    guard size == 512 || size == 4096 else { throw BackstoreError(path, .invalidBlockSize(size)) }
}

/// Checks the size of a medium in bytes.
func checkSize(_ size: UInt64, blockSize: Int, _ path: String) throws(BackstoreError) {
    guard size > 0 else { throw BackstoreError(path, .sizeZero) }
    guard size % UInt64(blockSize) == 0 else {
        throw BackstoreError(path, .sizeNotMultiple(size: size, blockSize: blockSize))
    }
    guard size <= UInt64(Int64.max) - 4096 else { throw BackstoreError(path, .sizeTooLarge(size)) }
}

/// Checks that a path can be given to the kernel as it stands.
func checkPath(_ path: String) throws(BackstoreError) {
    guard !path.isEmpty, !path.utf8.contains(0) else { throw BackstoreError(path, .invalidPath) }
}
