// TargetProcess: processor time and memory of the process that serves the socket, from /proc.
//
// Called by: the command. Must not know: what the process does.

import Glibc

/// What a process had used at a moment.
struct ProcessUsage {
    /// Processor time of all its threads, user and system, in microseconds; exact to a clock tick.
    let processorMicroseconds: Double
    /// Bytes in memory.
    let residentBytes: Int
}

/// A process by its number.
struct TargetProcess {
    let identifier: Int32

    func usage() throws -> ProcessUsage {
        // The name, in parentheses, may hold spaces and parentheses.
        let stat = try read("stat")
        let fields = stat[(stat.lastIndex(of: ")") ?? stat.startIndex)...].split(separator: " ")
        guard fields.count > 22, let user = Double(fields[12]), let system = Double(fields[13]),
            let pages = Int(fields[22])
        else { throw LoadError("/proc/\(identifier)/stat is not as proc(5) describes it") }
        let ticks = Double(sysconf(Int32(_SC_CLK_TCK)))
        return ProcessUsage(
            processorMicroseconds: (user + system) / ticks * 1e6, residentBytes: pages * sysconf(Int32(_SC_PAGESIZE)))
    }

    private func read(_ name: String) throws -> Substring {
        let path = "/proc/\(identifier)/\(name)"
        let descriptor = unsafe open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else {
            throw LoadError("\(path) cannot be read: is there a process \(identifier)?")
        }
        defer { close(descriptor) }
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = unsafe Glibc.read(descriptor, &bytes, bytes.count)
        return Substring(decoding: bytes.prefix(max(0, count)), as: UTF8.self)
    }
}

/// What went wrong, for people.
struct LoadError: Error, CustomStringConvertible {
    let description: String

    init(_ description: String) { self.description = description }
}
