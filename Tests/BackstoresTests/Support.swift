// Support: what the backstores' tests share: media to run on, requests with odd segments, temporary directories,
// mounts.
//
// Called by: the tests here. Must not know: the inside of the backstores.

import Backstores
import CBackstore
import CLinux
import Glibc
import Reactor
import SCSICore
import Testing

/// A medium of a kind, on a reactor with an engine: what a test runs on.
struct Variant: Sendable, CustomTestStringConvertible {
    enum Kind: String, Sendable, CaseIterable {
        case ram = "RAM"
        case direct = "direct file"
        case buffered = "buffered file"
    }
    let engine: Reactor.Configuration.Engine
    let kind: Kind

    var testDescription: String { "\(kind.rawValue), \(engine.rawValue)" }

    static let all = [Reactor.Configuration.Engine.ioUring, .libaio].flatMap { engine in
        Kind.allCases.map { Variant(engine: engine, kind: $0) }
    }
    /// Those that are files.
    static let files = all.filter { $0.kind != .ram }
}

func makeReactor(_ engine: Reactor.Configuration.Engine, depth: Int = 64) throws -> Reactor {
    var configuration = Reactor.Configuration()
    configuration.engine = engine
    configuration.ioDepth = depth
    configuration.pollMicroseconds = 0
    return try Reactor(configuration)
}

/// A medium that is open, and its reactor; closed by `close`.
final class OpenMedium {
    let reactor: Reactor
    let handle: BackstoreHandle
    let path: String
    let file: FileBackstore?
    private let ram: RAMBackstore?
    private let directory = TemporaryDirectory()

    init(
        _ variant: Variant, size: UInt64 = 8 << 20, depth: Int = 64, blockSize: Int = 512, readOnly: Bool = false
    ) throws {
        reactor = try makeReactor(variant.engine, depth: depth)
        path = directory.path + "/disk"
        if variant.kind == .ram {
            file = nil
            ram = try RAMBackstore(size: size, logicalBlockSize: blockSize, readOnly: readOnly, reactor: reactor)
            handle = ram!.handle
        } else {
            ram = nil
            if readOnly { writeFile(path, [UInt8](repeating: 0x5a, count: Int(size))) }
            var options = FileBackstore.Options(path: path)
            options.size = size
            options.create = !readOnly
            options.readOnly = readOnly
            options.direct = variant.kind == .direct
            options.logicalBlockSize = blockSize
            file = try FileBackstore(options, reactor: reactor)
            handle = file!.handle
            #expect(file!.isDirect == (variant.kind == .direct), "/tmp is on a file system with direct I/O")
        }
    }

    func close() throws {
        ram?.close()
        try file?.close()
    }

    /// The descriptor that the backstore has open, found by its path.
    var descriptor: Int32 {
        for number in Int32(0)..<4096 {
            var target = [UInt8](repeating: 0, count: 512)
            let count = unsafe readlink("/proc/self/fd/\(number)", &target, target.count)
            if count > 0, String(decoding: target[..<count], as: UTF8.self) == path { return number }
        }
        preconditionFailure("the backstore has no descriptor open on \(path)")
    }

    /// What the backstore's descriptor leads to is replaced by something else for the time of `body`.
    func replacingDescriptor(by other: Int32, _ body: () throws -> Void) rethrows {
        let descriptor = self.descriptor
        let saved = dup(descriptor)
        precondition(dup2(other, descriptor) == descriptor)
        defer {
            precondition(dup2(saved, descriptor) == descriptor)
            Glibc.close(saved)
        }
        try body()
    }
}

/// One request in memory of its own. Its segments may begin anywhere and have any length; the bytes between them are
/// watched.
@safe
final class TestRequest {
    let pointer: UnsafeMutablePointer<scsi_backstore_request>
    let length: Int
    private let memory: UnsafeMutableRawBufferPointer
    private let segments: UnsafeMutablePointer<iovec>
    private let segmentCount: Int
    private(set) var error: Int32 = -1
    private(set) var completions = 0
    var isDone: Bool { completions > 0 }
    /// What is done at completion.
    var whenDone: () -> Void = {}

    private static let guardByte: UInt8 = 0xee

    /// - Parameters:
    ///   - lengths: The segments' lengths; empty for an operation without data.
    ///   - gap: Bytes before each segment: with an odd number, addresses are odd.
    init(_ operation: Int, offset: UInt64, length: Int, lengths: [Int] = [], gap: Int = 0, flags: Int = 0) {
        unsafe pointer = .allocate(capacity: 1)
        self.length = length
        segmentCount = lengths.count
        unsafe segments = .allocate(capacity: max(lengths.count, 1))
        unsafe memory = .allocate(byteCount: lengths.reduce(0) { $0 + $1 + gap } + gap + 1, alignment: 4096)
        unsafe memory.initializeMemory(as: UInt8.self, repeating: Self.guardByte)
        var place = 0
        for (index, count) in lengths.enumerated() {
            place += gap
            unsafe (segments + index).initialize(to: iovec(iov_base: memory.baseAddress! + place, iov_len: count))
            place += count
        }
        var request = unsafe scsi_backstore_request()
        unsafe request.struct_size = UInt32(MemoryLayout<scsi_backstore_request>.size)
        unsafe request.operation = UInt8(operation)
        unsafe request.flags = UInt16(flags)
        unsafe request.offset = offset
        unsafe request.length = UInt64(length)
        unsafe request.segments = UnsafePointer(segments)
        unsafe request.segment_count = UInt32(lengths.count)
        unsafe request.error_offset = .max
        unsafe request.owner = Unmanaged.passUnretained(self).toOpaque()
        unsafe request.complete = { request, error in
            let this = unsafe Unmanaged<TestRequest>.fromOpaque(request!.pointee.owner).takeUnretainedValue()
            this.completions += 1
            this.error = error
            this.whenDone()
        }
        unsafe pointer.initialize(to: request)
        // The scratch is the backstore's to initialise.
        unsafe memset(UnsafeMutableRawPointer(pointer) + MemoryLayout<scsi_backstore_request>.size - 192, 0xa5, 192)
    }

    deinit {
        unsafe pointer.deallocate()
        unsafe memory.deallocate()
        unsafe segments.deallocate()
    }

    var errorOffset: UInt64 { unsafe pointer.pointee.error_offset }

    /// The data of the segments in order.
    var data: [UInt8] {
        get {
            var bytes: [UInt8] = []
            bytes.reserveCapacity(length)
            for index in 0..<segmentCount {
                let segment = unsafe segments[index]
                unsafe bytes.append(
                    contentsOf: UnsafeRawBufferPointer(start: segment.iov_base, count: segment.iov_len))
            }
            return bytes
        }
        set {
            var place = 0
            for index in 0..<segmentCount {
                let segment = unsafe segments[index]
                unsafe newValue[place..<(place + segment.iov_len)].withUnsafeBytes { source in
                    if source.count > 0 { unsafe memcpy(segment.iov_base, source.baseAddress!, source.count) }
                }
                unsafe place += segment.iov_len
            }
        }
    }

    /// Whether the bytes around the segments are what they were.
    var isGuardIntact: Bool {
        var place = 0
        for index in 0..<segmentCount {
            let segment = unsafe segments[index]
            let start = unsafe segment.iov_base - memory.baseAddress!
            if unsafe memory[place..<start].contains(where: { $0 != Self.guardByte }) { return false }
            place = unsafe start + segment.iov_len
        }
        return unsafe !memory[place...].contains { $0 != Self.guardByte }
    }

    /// Submits, and checks that nothing completes from within.
    func submit(_ handle: BackstoreHandle) -> Bool {
        let before = completions
        let accepted = unsafe handle.submit(pointer)
        #expect(completions == before, "submit completed a request before it returned")
        return accepted
    }
}

/// Makes turns until a condition holds.
func turns(_ reactor: Reactor, until condition: () -> Bool) {
    while !condition() { reactor.turn(mayWait: true) }
}

extension OpenMedium {
    /// Does one request and returns its errno value.
    @discardableResult
    func perform(_ request: TestRequest) -> Int32 {
        #expect(request.submit(handle))
        turns(reactor) { request.isDone }
        #expect(request.completions == 1)
        return request.error
    }

    @discardableResult
    func write(_ data: [UInt8], at offset: UInt64, flags: Int = 0, gap: Int = 0) -> Int32 {
        let request = TestRequest(
            SCSI_BACKSTORE_WRITE, offset: offset, length: data.count, lengths: [data.count], gap: gap, flags: flags)
        request.data = data
        return perform(request)
    }

    func read(_ count: Int, at offset: UInt64, gap: Int = 0) -> [UInt8] {
        let request = TestRequest(SCSI_BACKSTORE_READ, offset: offset, length: count, lengths: [count], gap: gap)
        #expect(perform(request) == 0)
        #expect(request.isGuardIntact)
        return request.data
    }

    func flush() -> Int32 { perform(TestRequest(SCSI_BACKSTORE_FLUSH, offset: 0, length: 0)) }
}

/// A directory of its own, removed at the end with the files in it.
final class TemporaryDirectory: Sendable {
    let path: String

    init() {
        var template = Array(("/tmp/targetd-test-" + String(repeating: "X", count: 6)).utf8CString)
        precondition(unsafe mkdtemp(&template) != nil, "no temporary directory in /tmp")
        path = String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    deinit {
        for name in names { unsafe unlink(path + "/" + name) }
        unsafe rmdir(path)
    }

    var names: [String] {
        guard let directory = unsafe opendir(path) else { return [] }
        defer { unsafe closedir(directory) }
        var names: [String] = []
        while let entry = unsafe readdir(directory) {
            let name = unsafe withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
                unsafe String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
            }
            if name != "." && name != ".." { names.append(name) }
        }
        return names
    }
}

func writeFile(_ path: String, _ bytes: [UInt8]) {
    let descriptor = unsafe open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0o600)
    precondition(descriptor >= 0, "no file at \(path)")
    precondition(unsafe write(descriptor, bytes, bytes.count) == bytes.count)
    close(descriptor)
}

func status(_ path: String) -> stat {
    var status = stat()
    precondition(unsafe stat(path, &status) == 0, "no file at \(path)")
    return status
}

/// A tmpfs of its own, for a file system that is full. Mounting needs privileges.
final class SmallFileSystem {
    let path: String
    private let directory = TemporaryDirectory()

    init?(bytes: Int) {
        path = directory.path + "/mount"
        unsafe mkdir(path, 0o700)
        guard unsafe mount("targetd-test", path, "tmpfs", 0, "size=\(bytes)") == 0 else {
            unsafe rmdir(path)
            return nil
        }
    }

    deinit {
        unsafe umount2(path, Int32(MNT_DETACH))
        unsafe rmdir(path)
    }

    /// Whether this machine allows it: tried once.
    static let isPossible = SmallFileSystem(bytes: 4096) != nil
}

/// A small generator with a seed.
struct SplitMix: RandomNumberGenerator {
    private var state: UInt64
    init(seed: UInt64) { state = seed }
    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var value = state
        value = (value ^ value >> 30) &* 0xbf58_476d_1ce4_e5b9
        value = (value ^ value >> 27) &* 0x94d0_49bb_1331_11eb
        return value ^ value >> 31
    }
    mutating func below(_ bound: Int) -> Int { Int(next() % UInt64(bound)) }
    mutating func bytes(_ count: Int) -> [UInt8] {
        let words = (0..<(count + 7) / 8).map { _ in next() }
        return unsafe words.withUnsafeBytes { unsafe Array($0.prefix(count)) }
    }
}
