// ScriptedStateStore: what keeps a logical unit's state, in memory: saves end when the test says so, and as it says.
//
// Called by: tests and the simulator. Must not know: what the bytes mean.

import CBackstore
public import SCSICore

/// The vtable of all scripted stores. It must not move, so it is allocated once and stays.
private nonisolated(unsafe) let storeOperations: UnsafePointer<scsi_unit_state_operations> = {
    let operations = UnsafeMutablePointer<scsi_unit_state_operations>.allocate(capacity: 1)
    unsafe operations.initialize(
        to: scsi_unit_state_operations(
            struct_size: UInt32(MemoryLayout<scsi_unit_state_operations>.size),
            abi_version: SCSI_UNIT_STATE_ABI_VERSION,
            save: { store, bytes, length, token, done in
                unsafe Unmanaged<ScriptedStateStore>.fromOpaque(store!).takeUnretainedValue()
                    .save(Array(UnsafeBufferPointer(start: bytes, count: Int(length)))) { unsafe done!(token, $0) }
            }))
    return unsafe UnsafePointer(operations)
}()

/// A state store whose saves the test ends.
public final class ScriptedStateStore {
    /// What survives a power loss at this moment; `nil` before the first save.
    public private(set) var kept: [UInt8]?
    /// What the save in flight would keep.
    public private(set) var pending: [UInt8]?
    /// Saves that ended without error.
    public private(set) var saves = 0
    /// The errno values with which the next saves end, 0 for none; afterwards all succeed.
    public var errors: [Int32] = []

    private var done: ((Int32) -> Void)?
    private let violations: Violations

    /// A store that keeps what it is given; `kept` is what an earlier life saved.
    public init(kept: [UInt8]? = nil, violations: Violations) {
        self.kept = kept
        self.violations = violations
    }

    /// The store as a logical unit sees it. The caller keeps the store alive.
    public var handle: UnitStateStore {
        unsafe UnitStateStore(operations: storeOperations, context: Unmanaged.passUnretained(self).toOpaque())
    }

    fileprivate func save(_ bytes: [UInt8], done: @escaping (Int32) -> Void) {
        violations.require(pending == nil, "a second save while one was in flight")
        pending = bytes
        self.done = done
    }

    /// Ends the save in flight, if there is one.
    ///
    /// - Returns: Whether there was one.
    @discardableResult
    public func complete() -> Bool {
        guard let bytes = pending, let done else { return false }
        let error = errors.isEmpty ? 0 : errors.removeFirst()
        pending = nil
        self.done = nil
        if error == 0 {
            kept = bytes
            saves += 1
        }
        done(error)
        return true
    }
}
