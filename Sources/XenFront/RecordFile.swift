// RecordFile: the memory of an in-flight record, shared with the daemon that comes after this one.
//
// Owns: the file and its mapping. Called by: VhostServer. Must not know: what is in the record.

import Glibc
import Xenbus

/// A small file in a directory of the running system (/run), mapped.
@safe
final class RecordFile {
    private let path: String
    private let memory: UnsafeMutableRawPointer
    /// Whether a successor will find it.
    let isDurable: Bool

    /// Opens or creates the file of a vhost. Without one the vhost is served all the same, but requests in flight are
    /// lost if the daemon dies.
    init(_ vhost: VhostIdentifier, in directory: String) {
        path = "\(directory)/\(vhost.domain)-\(vhost.number).inflight"
        let descriptor = unsafe open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0o600)
        defer { if descriptor >= 0 { Glibc.close(descriptor) } }
        var mapped: UnsafeMutableRawPointer?
        if descriptor >= 0, ftruncate(descriptor, off_t(InflightRecord.bytes)) == 0 {
            unsafe mapped = mmap(nil, InflightRecord.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0)
        }
        isDurable = unsafe mapped != nil && mapped != MAP_FAILED
        if !isDurable {
            unsafe mapped = mmap(
                nil, InflightRecord.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        }
        guard let mapped = unsafe mapped, unsafe mapped != MAP_FAILED else {
            fatalError("no memory for an in-flight record")
        }
        unsafe memory = mapped
    }

    /// The record in the memory. It may not be used after `close`.
    var record: InflightRecord { unsafe InflightRecord(memory: memory) }

    /// The ring is gone: nobody will come back to it.
    func remove() {
        record.invalidate()
        _ = unsafe unlink(path)
    }

    func close() { _ = unsafe munmap(memory, InflightRecord.bytes) }
}
