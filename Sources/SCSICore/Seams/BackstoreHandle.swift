// BackstoreHandle: the safe Swift face of the backstore seam (scsi_backstore.h).
//
// Owns nothing: whoever opened the backstore keeps it alive for as long as a logical unit uses the handle.
// Called by: LogicalUnit and the device server. Must not know: what kind of medium is behind it.

public import CBackstore

/// A backstore as a logical unit sees it: a vtable and its context, two words, no reference counting.
///
/// All functions are called on the reactor thread that owns the logical unit (scsi_backstore.h, "One thread").
@safe
public struct BackstoreHandle {
    private let operations: UnsafePointer<scsi_backstore_operations>
    private let context: UnsafeMutableRawPointer

    /// Wraps a backstore.
    ///
    /// - Parameters:
    ///   - operations: The vtable; must stay valid as long as the handle is used, and have every function set.
    ///   - context: What the vtable's functions take as their first argument.
    public init(operations: UnsafePointer<scsi_backstore_operations>, context: UnsafeMutableRawPointer) {
        precondition(unsafe operations.pointee.abi_version == SCSI_BACKSTORE_ABI_VERSION, "backstore of another ABI")
        unsafe self.operations = operations
        unsafe self.context = context
    }

    /// What the medium is at this moment: size, block sizes, limits, capabilities.
    public func geometry() -> scsi_backstore_geometry {
        var geometry = scsi_backstore_geometry()
        geometry.struct_size = UInt32(MemoryLayout<scsi_backstore_geometry>.size)
        unsafe operations.pointee.get_geometry(context, &geometry)
        return geometry
    }

    /// Hands a request over.
    ///
    /// - Returns: `true` if accepted, and then its completion comes later and exactly once; `false` if the backstore
    ///   is full.
    @inline(__always)
    public func submit(_ request: UnsafeMutablePointer<scsi_backstore_request>) -> Bool {
        unsafe operations.pointee.submit(context, request) == 0
    }

    /// Asks the backstore to end a request soon. Its completion still comes.
    public func cancel(_ request: UnsafeMutablePointer<scsi_backstore_request>) {
        unsafe operations.pointee.cancel(context, request)
    }
}
