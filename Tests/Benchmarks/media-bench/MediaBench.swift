// media-bench: the reactor and the backstores alone, through the backstore seam: 4 KiB at a queue depth of 32, without
// a guest and without the core. Prints nanoseconds for each I/O; gates.py runs it under valgrind and counts
// instructions and allocations.
//
// Called by: developers, the gates. Must not know: the inside of the reactor and of the backstores.
//
// Usage: media-bench --list | --workload <name> [--count <I/Os>]

import Backstores
import CBackstore
import CIOVector
import Glibc
import Reactor
import SCSICore

/// What is measured.
enum Workload: String, CaseIterable {
    case ramRead = "ram-read"
    case ramWrite = "ram-write"
    case ramReadPages = "ram-read-8-segments"
    case fileRead = "file-read"
    case fileReadUnaligned = "file-read-unaligned"
    case fileReadAIO = "file-read-libaio"

    var operation: Int { self == .ramWrite ? SCSI_BACKSTORE_WRITE : SCSI_BACKSTORE_READ }
    var segments: Int { self == .ramReadPages ? 8 : 1 }
    var isFile: Bool { rawValue.hasPrefix("file") }
    var isUnaligned: Bool { self == .fileReadUnaligned }
    var engine: Reactor.Configuration.Engine { self == .fileReadAIO ? .libaio : .automatic }
}

/// Keeps a number of requests in flight until enough have been done.
@safe
final class Load {
    static let depth = 32
    static let bytes = 4096
    static let mediumBytes: UInt64 = 64 << 20

    let handle: BackstoreHandle
    private let requests: UnsafeMutablePointer<scsi_backstore_request>
    private let segments: UnsafeMutablePointer<iovec>
    private let memory: UnsafeMutableRawPointer
    private(set) var completed = 0
    private(set) var failed = 0
    private var submitted = 0
    private var random: UInt64 = 0x9e37_79b9_7f4a_7c15
    private let count: Int

    init(_ workload: Workload, handle: BackstoreHandle, count: Int) {
        self.handle = handle
        self.count = count
        unsafe requests = .allocate(capacity: Self.depth)
        unsafe segments = .allocate(capacity: Self.depth * workload.segments)
        unsafe memory = .allocate(byteCount: Self.depth * Self.bytes + 4096, alignment: 4096)
        unsafe memory.initializeMemory(as: UInt8.self, repeating: 0x5a, count: Self.depth * Self.bytes + 4096)
        let length = Self.bytes / workload.segments
        let skew = workload.isUnaligned ? 1 : 0
        for index in 0..<Self.depth * workload.segments {
            unsafe (segments + index).initialize(to: iovec(iov_base: memory + index * length + skew, iov_len: length))
        }
        for index in 0..<Self.depth {
            var request = unsafe scsi_backstore_request()
            unsafe request.struct_size = UInt32(MemoryLayout<scsi_backstore_request>.size)
            unsafe request.operation = UInt8(workload.operation)
            unsafe request.length = UInt64(Self.bytes)
            unsafe request.segments = UnsafePointer(segments + index * workload.segments)
            unsafe request.segment_count = UInt32(workload.segments)
            unsafe request.owner = Unmanaged.passUnretained(self).toOpaque()
            unsafe request.complete = { request, error in
                unsafe Unmanaged<Load>.fromOpaque(request!.pointee.owner)
                    ._withUnsafeGuaranteedRef { unsafe $0.done(request!, error) }
            }
            unsafe (requests + index).initialize(to: request)
        }
    }

    deinit {
        unsafe requests.deallocate()
        unsafe segments.deallocate()
        unsafe memory.deallocate()
    }

    func start() {
        for index in 0..<Self.depth { unsafe submit(requests + index) }
    }

    var isDone: Bool { completed == submitted }

    private func done(_ request: UnsafeMutablePointer<scsi_backstore_request>, _ error: Int32) {
        completed += 1
        if error != 0 { failed += 1 }
        unsafe submit(request)
    }

    private func submit(_ request: UnsafeMutablePointer<scsi_backstore_request>) {
        guard submitted < count else { return }
        submitted += 1
        random ^= random << 13
        random ^= random >> 7
        random ^= random << 17
        unsafe request.pointee.offset = random % (Self.mediumBytes / 4096) * 4096
        precondition(unsafe handle.submit(request), "the backstore is full at a depth of \(Self.depth)")
    }
}

@main
struct MediaBench {
    static func main() throws {
        let arguments = CommandLine.arguments
        if arguments.contains("--list") {
            for workload in Workload.allCases { print(workload.rawValue) }
            return
        }
        guard let name = value(of: "--workload", arguments), let workload = Workload(rawValue: name),
            let count = Int(value(of: "--count", arguments) ?? "1000000"), count > 0
        else {
            print("usage: media-bench --list | --workload <name> [--count <I/Os>]")
            exit(2)
        }
        var configuration = Reactor.Configuration()
        configuration.engine = workload.engine
        let reactor = try Reactor(configuration)
        if workload.isFile {
            try measureFile(workload, count, reactor)
        } else {
            let disk = try RAMBackstore(size: Load.mediumBytes, reactor: reactor)
            fill(disk.handle, reactor)
            measure(workload, count, disk.handle, reactor)
            disk.close()
        }
    }

    private static func value(of option: String, _ arguments: [String]) -> String? {
        guard let index = arguments.firstIndex(of: option), index + 1 < arguments.count else { return nil }
        return arguments[index + 1]
    }

    private static func measureFile(_ workload: Workload, _ count: Int, _ reactor: Reactor) throws {
        let path = "/tmp/media-bench.\(getpid())"
        defer { unsafe unlink(path) }
        var options = FileBackstore.Options(path: path)
        options.size = Load.mediumBytes
        options.create = true
        let file = try FileBackstore(options, reactor: reactor)
        measure(workload, count, file.handle, reactor)
        try file.close()
    }

    /// Gives each page of a RAM disk its memory, so that the kernel's page faults are not what is measured.
    private static func fill(_ handle: BackstoreHandle, _ reactor: Reactor) {
        let bytes = 1 << 20
        let memory = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: 4096)
        defer { unsafe memory.deallocate() }
        unsafe memory.initializeMemory(as: UInt8.self, repeating: 0xa5, count: bytes)
        var segment = unsafe iovec(iov_base: memory, iov_len: bytes)
        unsafe withUnsafePointer(to: &segment) { segment in
            var request = unsafe scsi_backstore_request()
            unsafe withUnsafeMutablePointer(to: &request) { request in
                unsafe request.pointee.struct_size = UInt32(MemoryLayout<scsi_backstore_request>.size)
                unsafe request.pointee.operation = UInt8(SCSI_BACKSTORE_WRITE)
                unsafe request.pointee.length = UInt64(bytes)
                unsafe request.pointee.segments = segment
                unsafe request.pointee.segment_count = 1
                unsafe request.pointee.complete = { request, _ in unsafe request!.pointee.length = 0 }
                for offset in stride(from: 0, to: Load.mediumBytes, by: bytes) {
                    unsafe request.pointee.offset = offset
                    unsafe request.pointee.length = UInt64(bytes)
                    precondition(unsafe handle.submit(request))
                    while unsafe request.pointee.length != 0 { reactor.turn(mayWait: false) }
                }
            }
        }
    }

    private static func measure(_ workload: Workload, _ count: Int, _ handle: BackstoreHandle, _ reactor: Reactor) {
        let load = Load(workload, handle: handle, count: count)
        var start = timespec()
        var end = timespec()
        unsafe clock_gettime(CLOCK_MONOTONIC, &start)
        load.start()
        while !load.isDone { reactor.turn(mayWait: true) }
        unsafe clock_gettime(CLOCK_MONOTONIC, &end)
        precondition(load.completed == count && load.failed == 0, "\(load.failed) I/Os failed")
        let nanoseconds = (end.tv_sec - start.tv_sec) * 1_000_000_000 + end.tv_nsec - start.tv_nsec
        print("\(workload.rawValue): \(count) I/Os, \(nanoseconds / count) ns each, \(reactor.engine.rawValue)")
    }
}
