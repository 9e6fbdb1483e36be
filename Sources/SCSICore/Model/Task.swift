// Task: SAM's task, one command from its arrival to its response.
//
// Owns: the command as the front filled it, the response, the embedded backstore request, and the links of the task
// set. Called by: fronts (the public head), the engine (all of it). Must not know: transports, media, commands.
//
//   free ── receive ──► received ── admitted ──► enabled ◄── barrier gone ── dormant
//                          │  └──── behind a barrier or a hazard ───────────────▲
//                          │                        │
//                          │                        ├── backstore has it ──► transferring ──► enabled (next step)
//                          │                        ├── ACA condition ──► blocked ──► enabled (cleared)
//                          └── refused ──► completing ◄── done, or aborted ────────┘
//                                             └──► free

import CBackstore
public import CTarget

/// Where a task is. Every change goes through `SCSITask.transition(to:)`.
enum TaskState: UInt8 {
    /// The front's: not in any task set.
    case free
    /// Handed to the target, not yet in the task set.
    case received
    /// In the task set, waiting behind a barrier, a hazard, a full backstore or a staging buffer (SAM-6 8.4).
    case dormant
    /// In the task set, being executed.
    case enabled
    /// In the task set, and the backstore has its request.
    case transferring
    /// In the task set, kept from starting or from ending by an ACA condition (SAM-6 8.4).
    case blocked
    /// Out of the task set; its response is being given to the front.
    case completing
    /// In the task set, and what it does is under way elsewhere than at its backstore: its change of the persistent
    /// state is being saved. It cannot be cancelled.
    case settling

    /// The states that may follow, as a bit mask by raw value.
    var successors: UInt8 {
        switch self {
        case .free: 1 << TaskState.received.rawValue
        case .received:
            1 << TaskState.dormant.rawValue | 1 << TaskState.enabled.rawValue | 1 << TaskState.completing.rawValue
        case .dormant: 1 << TaskState.enabled.rawValue | 1 << TaskState.completing.rawValue
        case .enabled:
            1 << TaskState.dormant.rawValue | 1 << TaskState.transferring.rawValue
                | 1 << TaskState.blocked.rawValue | 1 << TaskState.completing.rawValue
                | 1 << TaskState.settling.rawValue
        case .blocked: 1 << TaskState.enabled.rawValue | 1 << TaskState.completing.rawValue
        case .transferring, .settling: 1 << TaskState.enabled.rawValue
        case .completing: 1 << TaskState.free.rawValue
        }
    }
}

/// What a task management function or an event has decided about a task that cannot end at once.
enum AbortDisposition: UInt8 {
    /// Nothing: it ends with its own status.
    case none
    /// Ended by a function of its own nexus: no status (SAM-6 5.6).
    case aborted
    /// Ended by a reset: no status.
    case reset
    /// Ended by another nexus with TAS set to one: TASK ABORTED status (SPC-4 7.5.8).
    case taskAborted
    /// Its front is to have it back as soon as possible: to be carried out again later, or with its response
    /// (Suspension). Any of the others takes precedence.
    case suspended

    /// Whether it ends for that, and not by itself.
    @inline(__always)
    var isAbort: Bool { self != .none && self != .suspended }
}

/// What keeps a dormant task from being enabled, and what a blocked one does when its ACA condition is cleared.
enum WaitReason: UInt8 {
    /// Older tasks: a barrier of task attributes, or an overlapping extent.
    case order
    /// A staging buffer of the shard; then its handler runs (again) from the step it is at.
    case staging
    /// Room in the backstore; then its request is submitted again.
    case backstore
    /// Its turn under a limit of operations or bytes per second (Throttle).
    case quota
    /// The unit to be thawed; then its request is submitted.
    case thaw
    /// A better moment for its request, which has failed: its time, or a thaw.
    case recovery
    /// The end of a save of the unit's persistent state; then its handler runs again.
    case state
    /// Nothing: it has ended but for its response, which is filled (a blocked task only).
    case response
}

/// The memory of one task. Lives in a `TaskPool` and nowhere else.
@unsafe
struct SCSITask: ~Copyable {
    /// The public head: what scsi_target.h shows to a front. Must be first.
    var head: scsi_task
    /// The one request that this task can have at its backstore.
    var request: scsi_backstore_request
    /// The one segment of a request that reads or writes the task's staging buffer.
    var stagingSegment: iovec

    var state: TaskState
    var disposition: AbortDisposition
    /// What the command's handler does next when the backstore has completed.
    var step: UInt8
    var attribute: TaskAttribute
    /// Grows each time the task becomes free. The engine itself tells an earlier occupant by other means: a
    /// completion of a task that is not transferring traps, and functions that wait for tasks go by `sequence`.
    var generation: UInt32
    /// The task's place in its pool.
    let index: UInt32
    /// Which of the target's nexuses sent it.
    var nexus: UInt16
    /// The staging buffer it holds, or -1.
    var staging: Int16

    /// The row of the command table; `nil` before it is matched, and if the operation code is not in the table.
    var row: CommandRow?
    /// The unit that the task is in; unretained, the target keeps it as long as tasks are in it.
    var logicalUnit: Unmanaged<LogicalUnit>?
    /// What a dormant task waits for.
    var waitsFor: WaitReason
    /// Its deadline has passed while the backstore had its request: it goes no further than that.
    var hasExpired: Bool

    /// The logical blocks that a medium access command names, for hazards and for progress.
    var address: UInt64
    var blocks: UInt64
    /// How much of a command of several steps is done; the handler defines the unit.
    var progress: UInt64
    /// Order of arrival in the logical unit.
    var sequence: UInt64
    /// When it arrived, in nanoseconds of the shard's clock.
    var receivedAt: UInt64
    /// Of a request that is tried again: when it failed first, and when it is submitted the next time.
    var failedAt: UInt64
    var retryAt: UInt64

    /// Neighbours in the task set, in order of arrival.
    var next: TaskHandle?
    var previous: TaskHandle?
    /// The next one among the tasks that wait for a resource of the shard.
    var nextWaiting: TaskHandle?

    /// Set together with CHECK CONDITION, and with it the format that the unit's D_SENSE bit selected at that moment:
    /// the port that encodes it may be on another thread.
    var sense: SenseData
    var descriptorSense: Bool
    /// The link through which the task was handed over from another thread; `nil` if it was not.
    var link: Unmanaged<ShardLink>?

    init(index: UInt32) {
        unsafe head = scsi_task()
        unsafe request = scsi_backstore_request()
        unsafe stagingSegment = iovec()
        unsafe request.struct_size = UInt32(MemoryLayout<scsi_backstore_request>.size)
        unsafe state = .free
        unsafe disposition = .none
        unsafe step = 0
        unsafe attribute = .simple
        unsafe generation = 0
        unsafe self.index = index
        unsafe nexus = 0
        unsafe staging = -1
        unsafe row = nil
        unsafe logicalUnit = nil
        unsafe waitsFor = .order
        unsafe hasExpired = false
        unsafe address = 0
        unsafe blocks = 0
        unsafe progress = 0
        unsafe sequence = 0
        unsafe receivedAt = 0
        unsafe failedAt = 0
        unsafe retryAt = 0
        unsafe next = nil
        unsafe previous = nil
        unsafe nextWaiting = nil
        unsafe sense = SenseData.none
        unsafe descriptorSense = false
        unsafe link = nil
    }

    /// The one way to change the state. An edge that the diagram does not have is our own bug and traps.
    @inline(__always)
    mutating func transition(to new: TaskState) {
        precondition(unsafe state.successors & (1 << new.rawValue) != 0, "illegal task state change")
        unsafe state = new
    }
}

/// A reference to a task: one word, no reference counting. Valid as long as its pool lives.
///
/// A front fills `command`, hands the task to `TargetDevice.receive`, and reads `response` when its
/// `complete_task` is called.
@safe
public struct TaskHandle: Equatable {
    /// The public head, as C code of a port sees it.
    public let head: UnsafeMutablePointer<scsi_task>

    /// The task whose public head the port seam names in `complete_task`.
    @inlinable @inline(__always)
    public init(head: UnsafeMutablePointer<scsi_task>) { unsafe self.head = head }

    @inline(__always)
    init(_ pointer: UnsafeMutablePointer<SCSITask>) {
        unsafe head = UnsafeMutableRawPointer(pointer).assumingMemoryBound(to: scsi_task.self)
    }

    /// The whole task. `head` is its first field.
    @inline(__always)
    var pointer: UnsafeMutablePointer<SCSITask> {
        unsafe UnsafeMutableRawPointer(head).assumingMemoryBound(to: SCSITask.self)
    }

    /// The task's place in its pool: a front uses the number of the ring slot.
    @inline(__always)
    public var index: Int { unsafe Int(pointer.pointee.index) }

    /// Whether the front owns the task.
    @inline(__always)
    public var isFree: Bool { unsafe pointer.pointee.state == .free }

    /// What the front fills.
    @inlinable @inline(__always)
    public var command: scsi_command {
        @inline(__always) _read { yield unsafe head.pointee.command }
        @inline(__always) nonmutating _modify { yield unsafe &head.pointee.command }
    }

    /// What the core fills.
    @inlinable @inline(__always)
    public var response: scsi_response {
        @inline(__always) _read { yield unsafe head.pointee.response }
        @inline(__always) nonmutating _modify { yield unsafe &head.pointee.response }
    }

    /// Writes the sense data of a CHECK CONDITION status, in the format that the logical unit's D_SENSE bit selects.
    ///
    /// - Returns: The number of bytes written; 0 if there is no sense data.
    public func copySense(into buffer: UnsafeMutableRawBufferPointer) -> Int {
        // A task slot is used again: what its last command left behind is not this one's sense data.
        guard response.service_response == ServiceResponse.commandComplete.rawValue,
            response.status == SCSIStatus.checkCondition.rawValue
        else { return 0 }
        return unsafe pointer.pointee.sense.encode(descriptorFormat: pointer.pointee.descriptorSense, into: buffer)
    }

    /// Two handles are equal if they name the same task.
    public static func == (left: Self, right: Self) -> Bool { unsafe left.head == right.head }
}

// What the engine reads and writes: the fields of SCSITask, one accessor each, so that the engine's own files need no
// unsafe code. They hold as long as the pool lives, which is the front's obligation (TaskPool).
extension TaskHandle {
    @inline(__always) var cdbPointer: UnsafePointer<UInt8> {
        unsafe UnsafeRawPointer(pointer).advanced(by: SCSITask.cdbOffset).assumingMemoryBound(to: UInt8.self)
    }
    @inline(__always) var request: UnsafeMutablePointer<scsi_backstore_request> {
        unsafe UnsafeMutableRawPointer(pointer).advanced(by: SCSITask.requestOffset)
            .assumingMemoryBound(to: scsi_backstore_request.self)
    }

    @inline(__always) var stagingSegment: UnsafeMutablePointer<iovec> {
        unsafe UnsafeMutableRawPointer(pointer).advanced(by: SCSITask.stagingSegmentOffset)
            .assumingMemoryBound(to: iovec.self)
    }

    @inline(__always) var state: TaskState { unsafe pointer.pointee.state }
    @inline(__always) func transition(to state: TaskState) { unsafe pointer.pointee.transition(to: state) }

    @inline(__always) var disposition: AbortDisposition {
        get { unsafe pointer.pointee.disposition }
        nonmutating set { unsafe pointer.pointee.disposition = newValue }
    }
    @inline(__always) var step: UInt8 {
        get { unsafe pointer.pointee.step }
        nonmutating set { unsafe pointer.pointee.step = newValue }
    }
    @inline(__always) var attribute: TaskAttribute {
        get { unsafe pointer.pointee.attribute }
        nonmutating set { unsafe pointer.pointee.attribute = newValue }
    }
    @inline(__always) var nexus: UInt16 {
        get { unsafe pointer.pointee.nexus }
        nonmutating set { unsafe pointer.pointee.nexus = newValue }
    }
    @inline(__always) var staging: Int16 {
        get { unsafe pointer.pointee.staging }
        nonmutating set { unsafe pointer.pointee.staging = newValue }
    }
    @inline(__always) var row: CommandRow? {
        get { unsafe pointer.pointee.row }
        nonmutating set { unsafe pointer.pointee.row = newValue }
    }
    @inline(__always) var logicalUnit: Unmanaged<LogicalUnit>? {
        get { unsafe pointer.pointee.logicalUnit }
        nonmutating set { unsafe pointer.pointee.logicalUnit = newValue }
    }
    @inline(__always) var waitsFor: WaitReason {
        get { unsafe pointer.pointee.waitsFor }
        nonmutating set { unsafe pointer.pointee.waitsFor = newValue }
    }
    @inline(__always) var hasExpired: Bool {
        get { unsafe pointer.pointee.hasExpired }
        nonmutating set { unsafe pointer.pointee.hasExpired = newValue }
    }
    @inline(__always) var address: UInt64 {
        get { unsafe pointer.pointee.address }
        nonmutating set { unsafe pointer.pointee.address = newValue }
    }
    @inline(__always) var blocks: UInt64 {
        get { unsafe pointer.pointee.blocks }
        nonmutating set { unsafe pointer.pointee.blocks = newValue }
    }
    @inline(__always) var progress: UInt64 {
        get { unsafe pointer.pointee.progress }
        nonmutating set { unsafe pointer.pointee.progress = newValue }
    }
    @inline(__always) var sequence: UInt64 {
        get { unsafe pointer.pointee.sequence }
        nonmutating set { unsafe pointer.pointee.sequence = newValue }
    }
    var failedAt: UInt64 {
        get { unsafe pointer.pointee.failedAt }
        nonmutating set { unsafe pointer.pointee.failedAt = newValue }
    }
    var retryAt: UInt64 {
        get { unsafe pointer.pointee.retryAt }
        nonmutating set { unsafe pointer.pointee.retryAt = newValue }
    }
    @inline(__always) var receivedAt: UInt64 {
        get { unsafe pointer.pointee.receivedAt }
        nonmutating set { unsafe pointer.pointee.receivedAt = newValue }
    }
    @inline(__always) var descriptorSense: Bool {
        get { unsafe pointer.pointee.descriptorSense }
        nonmutating set { unsafe pointer.pointee.descriptorSense = newValue }
    }
    @inline(__always) var link: Unmanaged<ShardLink>? {
        get { unsafe pointer.pointee.link }
        nonmutating set { unsafe pointer.pointee.link = newValue }
    }
    @inline(__always) var next: TaskHandle? {
        get { unsafe pointer.pointee.next }
        nonmutating set { unsafe pointer.pointee.next = newValue }
    }
    @inline(__always) var previous: TaskHandle? {
        get { unsafe pointer.pointee.previous }
        nonmutating set { unsafe pointer.pointee.previous = newValue }
    }
    @inline(__always) var nextWaiting: TaskHandle? {
        get { unsafe pointer.pointee.nextWaiting }
        nonmutating set { unsafe pointer.pointee.nextWaiting = newValue }
    }
    @inline(__always) var sense: SenseData {
        get { unsafe pointer.pointee.sense }
        nonmutating set { unsafe pointer.pointee.sense = newValue }
    }
    @inline(__always) func free() {
        transition(to: .free)
        unsafe pointer.pointee.generation &+= 1
    }
}

extension SCSITask {
    /// Bytes from the start of a task to its CDB: `head.command` is at offset 0, and three fields of eight bytes
    /// precede the CDB in it. Computed and not stored: a stored static would cost a `swift_once` per access.
    @inline(__always) static var cdbOffset: Int { 24 }
    /// Bytes to the backstore request, which follows the head, and to the staging segment, which follows that.
    /// `TaskPool.init` checks all three.
    @inline(__always) static var requestOffset: Int { unsafe MemoryLayout<scsi_task>.stride }
    @inline(__always) static var stagingSegmentOffset: Int {
        unsafe requestOffset + MemoryLayout<scsi_backstore_request>.stride
    }
}
