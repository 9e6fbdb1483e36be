// SourceTree: the project's own files, read from where this file stands.
//
// Owns: which files the tidy rules look at. Called by: TidyTests. Must not know: any rule.

import Foundation

/// A text file of the project.
struct TextFile {
    /// Relative to the top of the repository.
    let path: String
    /// Without their line ends.
    let lines: [Substring]

    init(path: String, text: String) {
        self.path = path
        lines = text.split(separator: "\n", omittingEmptySubsequences: false)
    }

    var directories: [Substring] { path.split(separator: "/").dropLast() }
    var name: Substring { path.split(separator: "/").last ?? "" }
    var isSwift: Bool { path.hasSuffix(".swift") }
    var isMarkdown: Bool { path.hasSuffix(".md") }
    var isC: Bool { path.hasSuffix(".h") || path.hasSuffix(".c") }
    /// A program in Python or for a shell, which has no suffix where people call it by name.
    var isScript: Bool { path.hasSuffix(".py") || (lines.first?.hasPrefix("#!") ?? false) }
}

/// The repository's files, as they are on the disk.
struct SourceTree {
    let root: URL
    let files: [TextFile]

    init() throws {
        root = URL(filePath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
            .deletingLastPathComponent()
        var found: [TextFile] = []
        for top in ["Package.swift", "README.md", "Sources", "Tests", "Scripts", "Docs", ".ci"] {
            found += try Self.read(top, under: root)
        }
        files = found.sorted { $0.path < $1.path }
    }

    private static func read(_ path: String, under root: URL) throws -> [TextFile] {
        let url = root.appending(path: path)
        let values = try url.resourceValues(forKeys: [.isDirectoryKey])
        guard values.isDirectory == true else {
            // What is not text has no style.
            guard let text = String(bytes: try Data(contentsOf: url), encoding: .utf8) else { return [] }
            return [TextFile(path: path, text: text)]
        }
        let generated = ["__pycache__", ".build"]
        return try FileManager.default.contentsOfDirectory(atPath: url.path)
            .filter { !generated.contains($0) }
            .flatMap { try read("\(path)/\($0)", under: root) }
    }

    func file(_ path: String) -> TextFile? { files.first { $0.path == path } }

    func exists(_ path: String) -> Bool { FileManager.default.fileExists(atPath: root.appending(path: path).path) }
}
