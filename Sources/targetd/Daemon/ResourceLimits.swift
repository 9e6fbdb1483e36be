// ResourceLimits: raises what the kernel allows this process, as far as the configuration needs it.
//
// Called by: the daemon, before it opens anything. Must not know: what the descriptors are for.

import Glibc

/// The limits of the process (setrlimit(2)).
enum ResourceLimits {
    /// What cannot be raised as far as needed, as a sentence for the operator.
    struct Shortage: Equatable {
        let text: String
    }

    /// How many descriptors a configuration can come to use.
    static func descriptorsNeeded(_ configuration: Configuration) -> UInt64 {
        // A socket: itself, its connection, memory regions and logs of the guest, and for each queue (and the two of
        // virtio-scsi that are always there) a kick, a call and an error descriptor.
        let sockets = configuration.vhostUserFronts.map { 2 + 512 + 3 * ($0.queues + 2) }.reduce(0, +)
        // A reactor: its wait, its wake-up, its I/O rings. A medium: itself and a second opening for buffered parts.
        let rest = 16 * configuration.reactors + 2 * configuration.backstores.count
        return UInt64(256 + sockets + rest)
    }

    /// Raises the number of descriptors and the memory that may be locked.
    static func raise(for configuration: Configuration) -> [Shortage] {
        var shortages: [Shortage] = []
        let descriptors = descriptorsNeeded(configuration)
        if let reached = raise(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), to: descriptors) {
            shortages.append(
                Shortage(
                    text: "\(descriptors) open files may be needed, but only \(reached) are allowed: raise "
                        + "LimitNOFILE= of the service, or ulimit -n"))
        }
        // Kernels before 5.12 count the rings of io_uring as locked memory.
        let memory = UInt64(configuration.reactors) << 20
        if let reached = raise(lockedMemory, to: memory) {
            shortages.append(
                Shortage(
                    text: "\(Size.format(memory)) of locked memory may be needed, but only \(Size.format(reached)) is "
                        + "allowed: raise LimitMEMLOCK= of the service, or ulimit -l"))
        }
        return shortages
    }

    /// RLIMIT_MEMLOCK of <sys/resource.h>, a macro that Swift does not import.
    private static let lockedMemory: __rlimit_resource_t = 8

    /// Raises one limit to at least `needed`; what was reached if that is less.
    private static func raise(_ resource: __rlimit_resource_t, to needed: UInt64) -> UInt64? {
        var limit = rlimit()
        guard unsafe getrlimit(resource, &limit) == 0, limit.rlim_cur < needed else { return nil }
        var raised = rlimit(rlim_cur: rlim_t(needed), rlim_max: max(limit.rlim_max, rlim_t(needed)))
        if unsafe setrlimit(resource, &raised) == 0 { return nil }
        // Only a privileged process may go over the hard limit.
        raised = rlimit(rlim_cur: limit.rlim_max, rlim_max: limit.rlim_max)
        guard unsafe setrlimit(resource, &raised) == 0 else { return UInt64(limit.rlim_cur) }
        return UInt64(limit.rlim_max)
    }
}
