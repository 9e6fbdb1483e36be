// UnitStateStore: the safe Swift face of the state seam (scsi_unit_state.h).
//
// Owns nothing: whoever opened the store keeps it alive for as long as a logical unit uses the handle.
// Called by: PersistentState. Must not know: what keeps the bytes, what they mean.

public import CBackstore

/// What keeps a logical unit's state over power loss, as the unit sees it: a vtable and its context.
@safe
public struct UnitStateStore {
    private let operations: UnsafePointer<scsi_unit_state_operations>
    private let context: UnsafeMutableRawPointer

    /// Wraps a store.
    ///
    /// - Parameters:
    ///   - operations: The vtable; must stay valid as long as the handle is used, and have every function set.
    ///   - context: What the vtable's functions take as their first argument.
    public init(operations: UnsafePointer<scsi_unit_state_operations>, context: UnsafeMutableRawPointer) {
        precondition(unsafe operations.pointee.abi_version == SCSI_UNIT_STATE_ABI_VERSION, "state store of another ABI")
        unsafe self.operations = operations
        unsafe self.context = context
    }

    /// Saves bytes, which stay as they are until `done` is called: later, exactly once, with `token`.
    public func save(
        _ bytes: UnsafeBufferPointer<UInt8>, token: UnsafeMutableRawPointer, done: @escaping scsi_unit_state_done
    ) {
        unsafe operations.pointee.save(context, bytes.baseAddress, UInt64(bytes.count), token, done)
    }
}
