// core-bench: the core alone, driven through both seams: READ(10) or WRITE(10) of 4 KiB at a queue depth of 32 on a
// medium that copies and completes in the next turn. Prints nanoseconds per command; under callgrind, the gate of
// Scripts counts instructions.
//
// Called by: developers, the instruction gate. Must not know: the engine's inside.
//
// Usage: core-bench [commands] [read|write] [bytes to copy per command: 0 or 4096]

import CBackstore
import CTarget
import Glibc
import SCSICore

/// A medium of 1 MiB that wraps around, and completes what it was given when `drain` is called.
@safe
final class BenchMedium {
    let memory = UnsafeMutableRawPointer.allocate(byteCount: 1 << 20, alignment: 4096)
    let queue = UnsafeMutablePointer<UnsafeMutablePointer<scsi_backstore_request>>.allocate(capacity: 64)
    var count = 0
    let copies: Bool

    init(copies: Bool) {
        unsafe memory.initializeMemory(as: UInt8.self, repeating: 0x5a, count: 1 << 20)
        self.copies = copies
    }

    func drain() {
        let completed = count
        count = 0
        for index in 0..<completed {
            let request = unsafe queue[index]
            if copies { unsafe copy(request) }
            unsafe request.pointee.complete(request, 0)
        }
    }

    func copy(_ request: UnsafeMutablePointer<scsi_backstore_request>) {
        var offset = unsafe Int(request.pointee.offset & (1 << 20 - 1))
        for index in 0..<Int(unsafe request.pointee.segment_count) {
            let segment = unsafe request.pointee.segments[index]
            if unsafe request.pointee.operation == UInt8(SCSI_BACKSTORE_READ) {
                unsafe memcpy(segment.iov_base, memory + offset, segment.iov_len)
            } else {
                unsafe memcpy(memory + offset, segment.iov_base, segment.iov_len)
            }
            unsafe offset += segment.iov_len
        }
    }
}

/// Counts completions and hands the task out again.
@safe
final class BenchPort {
    var completed = 0
    var failures = 0
}

/// The whole bench: medium, port, target, unit, tasks.
@safe
final class Bench {
    let depth = 32
    let medium: BenchMedium
    let port = BenchPort()
    let target: TargetDevice
    let unit: LogicalUnit
    let nexus: NexusIdentifier
    let pool: TaskPool
    let buffers: UnsafeMutableRawPointer
    let writes: Bool

    init(writes: Bool, copies: Bool) {
        self.writes = writes
        medium = BenchMedium(copies: copies)
        let shard = Shard()
        target = TargetDevice(name: 0x3000_0000_0000_0001, shard: shard)
        unit = unsafe LogicalUnit(
            configuration: LogicalUnitConfiguration(name: 0x3000_0000_0000_0002, serial: "bench"),
            backstore: BackstoreHandle(
                operations: Self.mediumOperations(), context: Unmanaged.passUnretained(medium).toOpaque()),
            shard: shard)
        precondition(target.add(unit, at: LUN(0)!))
        nexus = unsafe target.establishNexus(
            initiatorPort: "bench",
            port: TargetPortHandle(
                operations: Self.portOperations(), context: Unmanaged.passUnretained(port).toOpaque()))!
        pool = TaskPool(capacity: depth, segmentsPerTask: 4)
        unsafe buffers = .allocate(byteCount: depth * 4096, alignment: 4096)
        unsafe buffers.initializeMemory(as: UInt8.self, repeating: 0, count: depth * 4096)
    }

    static func mediumOperations() -> UnsafePointer<scsi_backstore_operations> {
        let mediumOperations = UnsafeMutablePointer<scsi_backstore_operations>.allocate(capacity: 1)
        unsafe mediumOperations.initialize(
            to: scsi_backstore_operations(
                struct_size: UInt32(MemoryLayout<scsi_backstore_operations>.size),
                abi_version: SCSI_BACKSTORE_ABI_VERSION,
                get_geometry: { _, geometry in
                    unsafe geometry!.pointee.size = 1 << 42
                    unsafe geometry!.pointee.logical_block_size = 512
                    unsafe geometry!.pointee.physical_block_size = 4096
                    unsafe geometry!.pointee.capabilities = UInt32(SCSI_BACKSTORE_WRITABLE)
                },
                submit: { context, request in
                    unsafe Unmanaged<BenchMedium>.fromOpaque(context!)._withUnsafeGuaranteedRef {
                        unsafe $0.queue[$0.count] = unsafe request!
                        $0.count += 1
                    }
                    return 0
                },
                cancel: { _, _ in }))

        return unsafe UnsafePointer(mediumOperations)
    }

    static func portOperations() -> UnsafePointer<scsi_target_port_operations> {
        let portOperations = UnsafeMutablePointer<scsi_target_port_operations>.allocate(capacity: 1)
        unsafe portOperations.initialize(
            to: scsi_target_port_operations(
                struct_size: UInt32(MemoryLayout<scsi_target_port_operations>.size),
                abi_version: SCSI_TARGET_ABI_VERSION,
                complete_task: { context, task in
                    unsafe Unmanaged<BenchPort>.fromOpaque(context!)._withUnsafeGuaranteedRef {
                        $0.completed += 1
                        if unsafe task!.pointee.response.status != 0 { $0.failures += 1 }
                    }
                },
                complete_task_management: { _, _, _, _ in },
                report_event: { _, _ in }))

        return unsafe UnsafePointer(portOperations)
    }

    /// Fills and sends one command.
    @inline(__always)
    func send(_ task: TaskHandle, _ block: UInt32) {
        let segments = unsafe pool.segments(of: task)
        unsafe segments.pointee = unsafe iovec(iov_base: buffers + task.index * 4096, iov_len: 4096)
        unsafe task.command.lun = (0, 0, 0, 0, 0, 0, 0, 0)
        unsafe task.command.cdb_length = 32
        unsafe task.command.cdb.0 = writes ? 0x2a : 0x28
        unsafe task.command.cdb.2 = UInt8(truncatingIfNeeded: block >> 24)
        unsafe task.command.cdb.3 = UInt8(truncatingIfNeeded: block >> 16)
        unsafe task.command.cdb.4 = UInt8(truncatingIfNeeded: block >> 8)
        unsafe task.command.cdb.5 = UInt8(truncatingIfNeeded: block)
        unsafe task.command.cdb.8 = 8
        if writes {
            unsafe task.command.data_out = segments
            unsafe task.command.data_out_count = 1
            unsafe task.command.data_out_length = 4096
        } else {
            unsafe task.command.data_in = segments
            unsafe task.command.data_in_count = 1
            unsafe task.command.data_in_length = 4096
        }
        target.receive(task, nexus: nexus)
    }

    /// Sends `count` commands in batches of the queue depth.
    func run(_ count: Int) {
        var block: UInt32 = 12345
        for _ in 0..<count / depth {
            for index in 0..<depth {
                block = block &* 1_664_525 &+ 1_013_904_223
                send(pool[index], block & ~7)
            }
            medium.drain()
        }
    }

}

func nanoseconds() -> UInt64 {
    var time = timespec()
    unsafe clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
}

@main
enum CoreBench {
    static func main() {
        let arguments = CommandLine.arguments
        let commands = arguments.count > 1 ? Int(arguments[1])! : 1_000_000
        let bench = Bench(
            writes: arguments.count > 2 && arguments[2] == "write", copies: arguments.count > 3 && arguments[3] != "0")
        bench.run(bench.depth * 2)  // takes the power on unit attention
        let failuresBefore = bench.port.failures
        let start = nanoseconds()
        bench.run(commands)
        let elapsed = nanoseconds() - start
        precondition(bench.port.failures == failuresBefore, "a command failed")
        print("\(commands / bench.depth * bench.depth) commands, \(Double(elapsed) / Double(commands)) ns each")
    }
}
