// EnvironmentRules: what this machine must have for a configuration to work on it.
//
// Owns: the rules about files, devices and folders. Called by: the command line, reload. Must not know: YAML. Changes
// nothing: what it finds can be gone a moment later, so opening still has its own errors.

import Glibc
import XenFront

/// Checks a configuration against the file system.
struct EnvironmentRules {
    private let source: SourceMap
    /// What this daemon serves already: a file of its own may grow.
    private let running: Configuration?
    private var problems: [Problem] = []

    /// All problems, in the order of the file's sections.
    ///
    /// - Parameter running: What runs and is to be changed; `nil` before a start.
    static func check(_ configuration: Configuration, source: SourceMap, running: Configuration? = nil) -> [Problem] {
        var rules = EnvironmentRules(source: source, running: running)
        if let path = configuration.stateDirectory { rules.checkStateDirectory(path) }
        if let control = configuration.control { rules.check(control) }
        var inodes: [FileStatus.Identity: (name: String, path: String)] = [:]
        for (name, backstore) in configuration.backstores.sorted(by: { $0.key < $1.key }) {
            rules.check(backstore, at: "backstores.\(name)", name, &inodes)
        }
        for (index, front) in configuration.vhostUserFronts.enumerated() where !front.socket.isEmpty {
            let isOurs = front.mode == .server
            rules.checkSocket(front.socket, at: "vhost-user-scsi[\(index)].socket", isMadeByUs: isOurs)
        }
        if configuration.xen?.enabled == .always, !XenFront.isXenDomain {
            rules.report(
                "xen.enabled",
                "this machine is no domain of Xen's: write auto, which serves Xen guests where there is Xen")
        }
        return rules.problems
    }

    private init(source: SourceMap, running: Configuration?) {
        self.source = source
        self.running = running
    }

    private mutating func report(_ key: String, _ text: String) {
        problems.append(source.problem(key, text))
    }

    private mutating func checkStateDirectory(_ path: String) {
        switch FileStatus.of(path) {
        case .success(let status) where status.kind == .folder: break
        case .success(let status): report("state-directory", "\(path) is \(status.kind.rawValue), not a folder")
        case .failure(let error) where error.number == ENOENT:
            checkFolder(of: path, at: "state-directory", toMake: "it")
        case .failure(let error): report("state-directory", "\(path) cannot be looked at: \(error.text)")
        }
    }

    private mutating func check(_ control: ControlConfiguration) {
        checkSocket(control.socket, at: "control.socket")
        if let group = control.group, GroupDatabase.identifier(of: group) == nil {
            report("control.group", "there is no group \(group): make it with groupadd, or correct the name")
        }
    }

    private mutating func check(
        _ backstore: BackstoreConfiguration, at key: String, _ name: String,
        _ inodes: inout [FileStatus.Identity: (name: String, path: String)]
    ) {
        let status: FileStatus?
        switch backstore.medium {
        case .ram: return
        case .file(let path, let size, _):
            // A file that runs with a size is resized to what is asked for; what is possible there, the plan knows.
            let served = running?.usedBackstores[name]
            let canGrow = served?.path == path && served?.medium.size != nil
            status = checkFile(path, size: canGrow ? nil : size, backstore, at: key)
        case .blockDevice(let path, _): status = checkBlockDevice(path, at: key)
        }
        // The same medium by two paths, through links. Equal paths were found without looking at the machine.
        guard let status, let path = backstore.path else { return }
        if let other = inodes.updateValue((name, path), forKey: status.identity), other.path != path {
            report(
                "\(key).path",
                "is the same medium as \(other.path) of backstore \(other.name): two would overwrite "
                    + "each other")
        }
    }

    private mutating func checkFile(
        _ path: String, size: UInt64?, _ backstore: BackstoreConfiguration, at key: String
    ) -> FileStatus? {
        let blockSize = UInt64(backstore.blockSize ?? 512)
        switch FileStatus.of(path) {
        case .success(let status) where status.kind == .regular:
            if let size, size != status.size {
                report(
                    "\(key).size",
                    "is \(Size.format(size)), but \(path) has \(Size.format(status.size)): a file that "
                        + "exists keeps its size; correct the size here, or the file with truncate")
            } else if status.size == 0 {
                report("\(key).path", "\(path) is empty: give it a size with truncate, or remove it to have it created")
            } else if status.size % blockSize != 0 {
                report(
                    "\(key).path",
                    "\(path) has \(status.size) bytes, which is not a multiple of the logical block of "
                        + "\(blockSize) bytes")
            }
            return status
        case .success(let status) where status.kind == .blockDevice:
            report("\(key).path", "\(path) is a block device: use type: block-device")
        case .success(let status):
            report("\(key).path", "\(path) is \(status.kind.rawValue), not a file")
        case .failure(let error) where error.number == ENOENT && size != nil && !backstore.readOnly:
            checkFolder(of: path, at: "\(key).path", toMake: "the file")
        case .failure(let error) where error.number == ENOENT && size != nil:
            report("\(key).path", "\(path) does not exist, and is not created because read-only is set")
        case .failure(let error) where error.number == ENOENT:
            report("\(key).path", "\(path) does not exist: correct the path, or add size: to have it created")
        case .failure(let error):
            report("\(key).path", "\(path) cannot be looked at: \(error.text)")
        }
        return nil
    }

    private mutating func checkBlockDevice(_ path: String, at key: String) -> FileStatus? {
        switch FileStatus.of(path) {
        case .success(let status) where status.kind == .blockDevice: return status
        case .success(let status) where status.kind == .regular:
            report("\(key).path", "\(path) is a file: use type: file")
        case .success(let status):
            report("\(key).path", "\(path) is \(status.kind.rawValue), not a block device")
        case .failure(let error):
            report("\(key).path", "\(path): \(error.text)")
        }
        return nil
    }

    private mutating func checkSocket(_ path: String, at key: String, isMadeByUs: Bool = true) {
        switch FileStatus.of(path) {
        // Whether somebody listens there is found out when the socket is made: --check must work beside a daemon.
        case .success(let status) where status.kind == .socket: break
        case .success(let status):
            let consequence = isMadeByUs ? "it is not replaced" : "nobody can listen there"
            report(key, "\(path) exists and is \(status.kind.rawValue), not a socket: \(consequence)")
        case .failure(let error) where error.number == ENOENT:
            // A front-end that makes it may come later, and its folder with it.
            if isMadeByUs { checkFolder(of: path, at: key, toMake: "the socket") }
        case .failure(let error):
            report(key, "\(path) cannot be looked at: \(error.text)")
        }
    }

    private mutating func checkFolder(of path: String, at key: String, toMake what: String) {
        let folder = path.lastIndex(of: "/").map { path[..<$0] } ?? ""
        switch FileStatus.of(folder.isEmpty ? "/" : String(folder)) {
        case .success(let status) where status.kind == .folder: break
        case .success: report(key, "\(folder) is not a folder")
        case .failure(let error) where error.number == ENOENT:
            report(
                key,
                "the folder \(folder) does not exist: make it, or correct the path, so that \(what) can be made there")
        case .failure(let error): report(key, "the folder \(folder) cannot be looked at: \(error.text)")
        }
    }
}

/// The groups of this machine.
enum GroupDatabase {
    /// The number of a group; `nil` if there is none of that name.
    static func identifier(of name: String) -> gid_t? {
        var entry = unsafe group()
        var found: UnsafeMutablePointer<group>?
        // Enough for a group with a few thousand members.
        var buffer = [CChar](repeating: 0, count: 64 << 10)
        guard unsafe getgrnam_r(name, &entry, &buffer, buffer.count, &found) == 0, unsafe found != nil else {
            return nil
        }
        return unsafe entry.gr_gid
    }
}

/// IP addresses as texts.
enum NumericAddress {
    /// Whether the text is an IPv4 or IPv6 address, not a name.
    static func isValid(_ text: String) -> Bool {
        var (four, six) = (in_addr(), in6_addr())
        return unsafe inet_pton(AF_INET, text, &four) == 1 || inet_pton(AF_INET6, text, &six) == 1
    }
}

/// An error of a system call.
struct SystemError: Error, Equatable {
    /// The errno value.
    let number: Int32

    /// The value that the last failed call left.
    static var last: SystemError { SystemError(number: errno) }

    /// The C library's sentence for it.
    var text: String { unsafe String(cString: strerror(number)) }
}

/// What is at a path.
struct FileStatus {
    enum Kind: String {
        case regular = "a file"
        case folder = "a folder"
        case blockDevice = "a block device"
        case characterDevice = "a character device"
        case socket = "a socket"
        case other = "something else"
    }

    /// What tells a file or device from all others.
    struct Identity: Hashable {
        let device: UInt64
        let inode: UInt64
    }

    let kind: Kind
    let identity: Identity
    /// Bytes.
    let size: UInt64

    /// Looks at a path, through symbolic links.
    static func of(_ path: String) -> Result<FileStatus, SystemError> {
        var status = stat()
        guard unsafe stat(path, &status) == 0 else { return .failure(.last) }
        let kind: Kind
        switch status.st_mode & S_IFMT {
        case S_IFREG: kind = .regular
        case S_IFDIR: kind = .folder
        case S_IFBLK: kind = .blockDevice
        case S_IFCHR: kind = .characterDevice
        case S_IFSOCK: kind = .socket
        default: kind = .other
        }
        // A block device is the same under each of its nodes: what counts is the device that the node stands for.
        let identity =
            kind == .blockDevice
            ? Identity(device: UInt64(status.st_rdev), inode: .max)
            : Identity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
        return .success(FileStatus(kind: kind, identity: identity, size: UInt64(max(0, status.st_size))))
    }
}
