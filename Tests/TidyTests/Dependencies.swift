// Dependencies: which module may import what.
//
// Owns: the table of the dependency rule. Called by: TidyTests. Must not know: what the modules do.

/// The dependency rule: the core knows nobody; fronts and media know the core and the reactor, never each other; only
/// the daemon knows them all; no library knows Foundation.
enum Dependencies {
    /// Modules that each directory of Sources may import.
    static let allowed: [String: Set<String>] = [
        "SCSICore": ["CBackstore", "CTarget", "CIOVector", "Synchronization"],
        "Reactor": ["CLinux", "CIOVector", "Glibc", "Synchronization"],
        "Backstores": ["SCSICore", "Reactor", "CBackstore", "CLinux", "CIOVector", "Glibc", "Synchronization"],
        "VirtioFront": [
            "SCSICore", "Reactor", "CTarget", "CLinux", "CIOVector", "CMemoryGuard", "Glibc", "Synchronization",
        ],
        "Xenbus": ["CXenStore", "Glibc"],
        "XenFront": [
            "SCSICore", "Reactor", "Xenbus", "CTarget", "CLinux", "CIOVector", "CXen", "Glibc", "Synchronization",
        ],
        "targetd": [
            "SCSICore", "Reactor", "Backstores", "VirtioFront", "XenFront", "CBackstore", "CTarget", "CLinux", "Glibc",
            "Synchronization", "ArgumentParser", "Logging", "Yams", "ServiceLifecycle", "UnixSignals", "ControlAPI",
            "Foundation", "NIOCore", "NIOHTTP1", "NIOPosix",
        ],
        "ControlAPI": ["Foundation", "Glibc"],
        "targetctl": ["ControlAPI", "Xenbus", "Foundation", "ArgumentParser"],
        // Headers only: they hold no Swift.
        "CBackstore": [], "CTarget": [], "CIOVector": [], "CLinux": [], "CXen": [], "CXenStore": [], "CMemoryGuard": [],
    ]

    static func problems(in file: TextFile) -> [Problem] {
        guard file.isSwift, file.directories.first == "Sources" else { return [] }
        let module = String(file.directories.dropFirst().first ?? "")
        guard let allowed = allowed[module] else {
            return [Problem(path: file.path, line: 1, text: "no row in Dependencies.swift for the module '\(module)'")]
        }
        return file.lines.enumerated().compactMap { index, line in
            guard let imported = importedModule(line), !allowed.contains(imported) else { return nil }
            return Problem(path: file.path, line: index + 1, text: "\(module) must not import \(imported)")
        }
    }

    /// The module that a line imports: `Glibc` of `@preconcurrency internal import struct Glibc.iovec`.
    static func importedModule(_ line: Substring) -> String? {
        let pattern = #/^\s*(?:(?:@\w+(?:\([^)]*\))?|public|package|internal|fileprivate|private)\s+)*import\s+/#
        let kinds = #/^(?:struct|class|enum|protocol|func|var|let|typealias)\s+/#
        guard line.contains("import "), let start = try? pattern.prefixMatch(in: line) else { return nil }
        var rest = line[start.range.upperBound...]
        if let kind = try? kinds.prefixMatch(in: rest) { rest = rest[kind.range.upperBound...] }
        return String(rest.prefix { $0.isLetter || $0.isNumber || $0 == "_" })
    }
}
