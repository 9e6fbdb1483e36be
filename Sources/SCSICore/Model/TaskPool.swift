// TaskPool: the slab in which tasks live, allocated once.
//
// Owns: the memory of its tasks and of their data segment lists. Called by: fronts, one pool a ring or a port.
// Must not know: rings.

public import CIOVector
import CBackstore
import CTarget

/// A fixed number of tasks and, for each, room for a list of data segments. Allocates at creation and never again; the
/// memory of the lists is not touched before a front writes there.
///
/// The owner destroys the pool only when all its tasks are free.
@safe
public struct TaskPool: ~Copyable {
    /// How many tasks.
    public let capacity: Int
    /// How many data segments each task has room for, both directions together.
    public let segmentsPerTask: Int
    private let tasks: UnsafeMutablePointer<SCSITask>
    private let segmentMemory: UnsafeMutablePointer<iovec>

    /// Allocates `capacity` free tasks with room for `segmentsPerTask` data segments each.
    public init(capacity: Int, segmentsPerTask: Int) {
        precondition(capacity > 0 && segmentsPerTask > 0 && segmentsPerTask <= Limits.segmentsPerTask)
        self.capacity = capacity
        self.segmentsPerTask = segmentsPerTask
        unsafe tasks = .allocate(capacity: capacity)
        for index in 0..<capacity { unsafe (tasks + index).initialize(to: SCSITask(index: UInt32(index))) }
        unsafe Self.checkLayout(tasks)
        unsafe segmentMemory = .allocate(capacity: capacity * segmentsPerTask)
    }

    /// TaskHandle computes two addresses; here a value written by the compiler's way is read back by that way.
    private static func checkLayout(_ task: UnsafeMutablePointer<SCSITask>) {
        let handle = unsafe TaskHandle(task)
        unsafe task.pointee.request.error_offset = 0x5ca1_ab1e
        unsafe task.pointee.stagingSegment.iov_len = 0x0b57_ac1e
        unsafe precondition(MemoryLayout<scsi_command>.offset(of: \.cdb) == SCSITask.cdbOffset)
        precondition(unsafe handle.request.pointee.error_offset == 0x5ca1_ab1e)
        precondition(unsafe handle.stagingSegment.pointee.iov_len == 0x0b57_ac1e)
        unsafe task.pointee.stagingSegment = iovec()
    }

    deinit {
        for index in 0..<capacity {
            precondition(unsafe tasks[index].state == .free, "a task pool went away with a task in flight")
        }
        unsafe tasks.deinitialize(count: capacity)
        unsafe tasks.deallocate()
        unsafe segmentMemory.deallocate()
    }

    /// The task at an index below `capacity`.
    @inline(__always)
    public subscript(index: Int) -> TaskHandle {
        precondition(index >= 0 && index < capacity)
        return unsafe TaskHandle(tasks + index)
    }

    /// The memory for the data segments of a task; the front writes them there and points the command at it.
    @inline(__always)
    public func segments(of task: TaskHandle) -> UnsafeMutablePointer<iovec> {
        unsafe segmentMemory + task.index &* segmentsPerTask
    }
}
