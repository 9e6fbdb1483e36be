// TargetPortHandle: the safe Swift face of the target port seam (scsi_target.h).
//
// Owns nothing: the front keeps its context alive until its nexuses are lost.
// Called by: the task engine, to give tasks back. Must not know: what transport is behind it.

public import CTarget

extension scsi_task_management_request {
    /// SCSI_SUSPEND_TASKS: takes the commands of one of the front's groups back (scsi_target.h says how).
    ///
    /// - Parameters:
    ///   - group: `scsi_command.group` of the commands.
    ///   - cookie: What `complete_task_management` gets when the last of them was given back.
    public static func suspension(ofGroup group: UInt8, cookie: UInt64) -> Self {
        var request = Self()
        request.struct_size = UInt32(MemoryLayout<Self>.size)
        request.function = UInt8(SCSI_SUSPEND_TASKS)
        request.group = group
        request.cookie = cookie
        return request
    }
}

/// A target port as the task engine sees it: a vtable and its context.
@safe
public struct TargetPortHandle {
    private let operations: UnsafePointer<scsi_target_port_operations>
    private let context: UnsafeMutableRawPointer

    /// Wraps a front's target port.
    ///
    /// - Parameters:
    ///   - operations: The vtable; must stay valid as long as a nexus uses it, and have every function set.
    ///   - context: What the vtable's functions take as their first argument.
    public init(operations: UnsafePointer<scsi_target_port_operations>, context: UnsafeMutableRawPointer) {
        precondition(unsafe operations.pointee.abi_version == SCSI_TARGET_ABI_VERSION, "target port of another ABI")
        unsafe self.operations = operations
        unsafe self.context = context
    }

    /// Gives a task back: its response is filled, and the core will not touch its memory again.
    @inline(__always)
    func complete(_ task: UnsafeMutablePointer<scsi_task>) {
        unsafe operations.pointee.complete_task(context, task)
    }

    /// Answers a task management function.
    func completeTaskManagement(cookie: UInt64, response: UInt8, additional: UInt32 = 0) {
        unsafe operations.pointee.complete_task_management(context, cookie, response, additional)
    }

    /// Reports what an initiator may want to know without having asked.
    func report(_ event: scsi_target_event) {
        var event = event
        unsafe operations.pointee.report_event(context, &event)
    }
}
