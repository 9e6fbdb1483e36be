// StateFile: what one logical unit keeps over power loss, in a file of a state directory (scsi_unit_state.h).
//
// Owns: the file and the save in flight. Called by: the daemon (open), a logical unit through the handle. Must not
// know: what the bytes mean. It stands beside the media because it is made as they are: a seam of CBackstore, served on
// the reactor's thread, with its blocking calls on the reactor's helper threads.

import CBackstore
import Glibc
public import Reactor
public import SCSICore

/// The state file of a logical unit.
///
/// A save writes a new file, makes it stable, renames it over the old one, and makes the directory stable: a crash at
/// any byte leaves the old content or the new.
@safe
public final class StateFile {
    /// What the unit's earlier life saved; `nil` if it saved nothing, or if that is lost.
    public let saved: UnitState?
    /// Why what was saved is lost, in words and with what to do next; `nil` if it is not. The file stays as it is until
    /// the unit saves something.
    public let loss: StateError?

    private let directory: StateDirectory
    private let name: String
    private let reactor: Reactor
    private let job: UnsafeMutablePointer<Job>

    /// A save in flight, in memory that does not move. The request must be first.
    @safe
    private struct Job {
        var io: IORequest
        var bytes: UnsafeRawBufferPointer
        var token: UnsafeMutableRawPointer?
        var done: scsi_unit_state_done?
        /// The file, held from `save` to `done`.
        var file: Unmanaged<StateFile>?
    }

    /// Reads the file of the unit with an NAA name, if there is one. Bytes that are damaged are a loss, which the unit
    /// has to know of (`LogicalUnit.init`, `reservationsLost`): nothing is forgotten silently. A file that cannot be
    /// read at all, that a later version has written, or that is another unit's, is an error.
    ///
    /// - Parameter reactor: The reactor of the logical unit.
    public init(unit: UInt64, in directory: StateDirectory, reactor: Reactor) throws(StateError) {
        let digits = String(unit, radix: 16)
        name = "naa." + String(repeating: "0", count: 16 - digits.count) + digits
        self.directory = directory
        self.reactor = reactor
        unsafe job = .allocate(capacity: 1)
        unsafe job.initialize(
            to: Job(
                io: IORequest(completion: { context, result in
                    unsafe context.assumingMemoryBound(to: Job.self).pointee.file!.takeRetainedValue().completed(result)
                }), bytes: UnsafeRawBufferPointer(start: nil, count: 0)))
        guard let bytes = try directory.read(name, limit: Limits.unitStateBytes) else {
            (saved, loss) = (nil, nil)
            return
        }
        let path = "\(directory.path)/\(name)"
        do {
            (saved, loss) = (try UnitState(parsing: bytes, name: unit), nil)
        } catch let error where error.isLoss {
            saved = nil
            loss = StateError(
                path,
                "\(error); which reservations, saved mode pages and identifying information this logical unit had is "
                    + "not known, and it refuses commands until an initiator replaces the reservations (REPLACE LOST "
                    + "RESERVATION) or you clear them; or stop targetd and bring the file back from a copy")
        } catch {
            throw StateError(
                path,
                "\(error); bring the right file, or the right version of targetd, or move the file away: then the "
                    + "reservations, saved mode pages and identifying information of this logical unit are lost")
        }
    }

    deinit {
        unsafe job.deinitialize(count: 1)
        unsafe job.deallocate()
    }

    /// The file as a logical unit sees it. Whoever has opened the file keeps it as long as the unit.
    public var handle: UnitStateStore {
        unsafe UnitStateStore(
            operations: stateOperations.pointer, context: Unmanaged.passUnretained(self).toOpaque())
    }

    fileprivate func save(
        _ bytes: UnsafeRawBufferPointer, _ token: UnsafeMutableRawPointer?, _ done: scsi_unit_state_done?
    ) {
        unsafe precondition(job.pointee.file == nil, "a second save while one was in flight")
        unsafe job.pointee.bytes = unsafe bytes
        unsafe job.pointee.token = unsafe token
        unsafe job.pointee.done = unsafe done
        unsafe job.pointee.file = unsafe Unmanaged.passRetained(self)
        start()
    }

    private func start() {
        let accepted = unsafe reactor.offload(UnsafeMutableRawPointer(job).assumingMemoryBound(to: IORequest.self)) {
            let job = unsafe $0.assumingMemoryBound(to: Job.self)
            // The file is held by the job; here only what does not change is used.
            return unsafe job.pointee.file!._withUnsafeGuaranteedRef { file in
                unsafe -Int(file.directory.replace(file.name, by: job.pointee.bytes))
            }
        }
        guard !accepted else { return }
        // The reactor is full: a later turn has room. Safe to hand over, because it does not leave the thread.
        nonisolated(unsafe) let file = self
        reactor.post { unsafe file.start() }
    }

    private func completed(_ result: Int) {
        let done = unsafe job.pointee.done
        let token = unsafe job.pointee.token
        unsafe job.pointee.file = nil
        unsafe done?(token, Int32(-result))
    }
}

/// The vtable of all state files. It must not move, so it is allocated once and stays.
@safe
private struct StateOperations: @unchecked Sendable {
    let pointer: UnsafePointer<scsi_unit_state_operations>

    init() {
        let operations = UnsafeMutablePointer<scsi_unit_state_operations>.allocate(capacity: 1)
        unsafe operations.initialize(
            to: scsi_unit_state_operations(
                struct_size: UInt32(MemoryLayout<scsi_unit_state_operations>.size),
                abi_version: SCSI_UNIT_STATE_ABI_VERSION,
                save: { store, bytes, length, token, done in
                    unsafe Unmanaged<StateFile>.fromOpaque(store!)._withUnsafeGuaranteedRef {
                        unsafe $0.save(UnsafeRawBufferPointer(start: bytes, count: Int(length)), token, done)
                    }
                }))
        unsafe pointer = UnsafePointer(operations)
    }
}

private let stateOperations = StateOperations()
