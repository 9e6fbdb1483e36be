// StateDirectory: the directory in which logical units keep what survives power loss, one file each.
//
// Owns: the directory's descriptor and its lock. Called by: the daemon (open), StateFile. Must not know: what the
// files mean.

import CLinux
import Glibc

/// Why state cannot be kept or read: where, what is wrong, and what to do next.
public struct StateError: Error, Equatable, CustomStringConvertible {
    /// The path of the file or directory.
    public let path: String
    /// What is wrong, and what to do next.
    public let text: String

    /// What is wrong, where, and what to do next.
    public var description: String { "\(path): \(text)" }

    init(_ path: String, _ text: String) { (self.path, self.text) = (path, text) }

    /// A system call failed.
    init(_ path: String, call: String, errno code: Int32) {
        let advice =
            switch code {
            case EACCES, EPERM: "let targetd's user write there"
            case ENOSPC, EDQUOT: "free some space"
            case EROFS: "the file system is read-only: choose another directory"
            case ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG: "create the directory above it, or correct the path"
            default: "see the kernel's log"
            }
        let reason = unsafe strerror(code).map { unsafe String(cString: $0) } ?? "error \(code)"
        self.init(path, "\(call): \(reason); \(advice)")
    }
}

/// The system calls that a state file makes, each with 0, a count or a negative errno value as its result, so that
/// tests can fail each of them and stop after each.
@safe
struct StateCalls: Sendable {
    /// Creates a file that does not exist, for writing: its descriptor.
    var create: @Sendable (_ directory: Int32, _ name: String) -> Int32
    var write: @Sendable (_ descriptor: Int32, _ bytes: UnsafeRawBufferPointer) -> Int
    /// Makes a file's content, or a directory's entries, stable.
    var synchronize: @Sendable (_ descriptor: Int32) -> Int32
    var close: @Sendable (_ descriptor: Int32) -> Int32
    var rename: @Sendable (_ directory: Int32, _ from: String, _ to: String) -> Int32
    var remove: @Sendable (_ directory: Int32, _ name: String) -> Int32

    /// Those of the kernel.
    static let system = unsafe StateCalls(
        create: { directory, name in
            let descriptor = unsafe clinux_create_at(directory, name, 0o600)
            return descriptor < 0 ? -errno : descriptor
        },
        write: { descriptor, bytes in
            let count = unsafe Glibc.write(descriptor, bytes.baseAddress, bytes.count)
            return count < 0 ? -Int(errno) : count
        },
        synchronize: { fsync($0) == 0 ? 0 : -errno },
        close: { Glibc.close($0) == 0 ? 0 : -errno },
        rename: { directory, from, to in unsafe renameat(directory, from, directory, to) == 0 ? 0 : -errno },
        remove: { directory, name in unsafe unlinkat(directory, name, 0) == 0 ? 0 : -errno })
}

/// A directory of state files. One process has it at a time.
@safe
public final class StateDirectory: Sendable {
    /// Its path.
    public let path: String
    let descriptor: Int32
    let calls: StateCalls

    /// Opens the directory, creates it if only its last part is missing, and locks it for this process.
    public convenience init(path: String) throws(StateError) { try self.init(path: path, calls: .system) }

    init(path: String, calls: StateCalls) throws(StateError) {
        if unsafe mkdir(path, 0o700) != 0, errno != EEXIST { throw StateError(path, call: "mkdir", errno: errno) }
        let descriptor = unsafe open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        guard descriptor >= 0 else { throw StateError(path, call: "open", errno: errno) }
        guard flock(descriptor, LOCK_EX | LOCK_NB) == 0 else {
            let code = errno
            Glibc.close(descriptor)
            if code == EWOULDBLOCK {
                throw StateError(path, "another targetd keeps its state here; stop it, or choose another directory")
            }
            throw StateError(path, call: "flock", errno: code)
        }
        self.path = path
        self.descriptor = descriptor
        self.calls = calls
    }

    deinit { Glibc.close(descriptor) }

    /// The content of a file; `nil` if there is none.
    func read(_ name: String, limit: Int) throws(StateError) -> [UInt8]? {
        let path = "\(self.path)/\(name)"
        let file = unsafe clinux_open_at(descriptor, name)
        guard file >= 0 else {
            if errno == ENOENT { return nil }
            throw StateError(path, call: "open", errno: errno)
        }
        defer { Glibc.close(file) }
        var status = stat()
        guard unsafe fstat(file, &status) == 0 else { throw StateError(path, call: "fstat", errno: errno) }
        guard status.st_mode & S_IFMT == S_IFREG else { throw StateError(path, "not a regular file; move it away") }
        guard status.st_size <= limit else { throw StateError(path, "too long to be state; move it away") }
        var bytes = [UInt8](repeating: 0, count: Int(status.st_size))
        var done = 0
        while done < bytes.count {
            let count = unsafe bytes.withUnsafeMutableBytes {
                unsafe Glibc.read(file, $0.baseAddress! + done, $0.count - done)
            }
            if count < 0, errno == EINTR { continue }
            guard count > 0 else {
                throw count == 0
                    ? StateError(path, "became shorter while it was read; stop who writes to it")
                    : StateError(path, call: "read", errno: errno)
            }
            done += count
        }
        return bytes
    }

    /// Replaces the content of a file, or creates it: whoever reads it after a crash at any moment finds all of the old
    /// bytes or all of these; these, once this has returned 0. Blocks.
    ///
    /// - Returns: 0 or a positive errno value. After an error the file may have either content.
    func replace(_ name: String, by bytes: UnsafeRawBufferPointer) -> Int32 {
        let new = name + ".new"
        let removed = calls.remove(descriptor, new)  // what a crash has left
        guard removed == 0 || removed == -ENOENT else { return -removed }
        var error = unsafe write(bytes, to: new)
        if error == 0 { error = -calls.rename(descriptor, new, name) }
        guard error == 0 else {
            _ = calls.remove(descriptor, new)
            return error
        }
        return -calls.synchronize(descriptor)
    }

    private func write(_ bytes: UnsafeRawBufferPointer, to name: String) -> Int32 {
        let file = calls.create(descriptor, name)
        guard file >= 0 else { return -file }
        var done = 0
        while done < bytes.count {
            let count = unsafe calls.write(file, UnsafeRawBufferPointer(rebasing: bytes[done...]))
            if count == -Int(EINTR) { continue }
            guard count > 0 else {
                _ = calls.close(file)
                return count == 0 ? EIO : Int32(-count)
            }
            done += count
        }
        let synchronized = calls.synchronize(file)
        let closed = calls.close(file)
        return -(synchronized != 0 ? synchronized : closed)
    }
}
