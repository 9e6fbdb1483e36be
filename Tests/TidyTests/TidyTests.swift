// TidyTests: the repository keeps its own rules; and each rule is shown to catch what it is for.
//
// Called by: swift test. Must not know: how the rules find their problems.

import Testing

@Suite("The repository is tidy")
struct TidyTests {
    let tree: SourceTree

    init() throws { tree = try SourceTree() }

    /// Reports each problem by itself.
    private func expectNone(_ problems: [Problem]) {
        for problem in problems { Issue.record(Comment(rawValue: problem.description)) }
    }

    @Test("the files of every part of the repository are looked at")
    func everythingIsRead() {
        #expect(tree.files.filter { $0.isSwift && $0.path.hasPrefix("Sources/SCSICore/") }.count > 10)
        #expect(tree.file("Tests/TidyTests/TidyTests.swift") != nil)
        #expect(tree.file("README.md") != nil)
        #expect(tree.file("Tests/EndToEnd/run.py")?.isScript == true)
        #expect(tree.file("Scripts/test")?.isScript == true)
    }

    @Test("modules import only what the dependency rule allows")
    func dependencies() { expectNone(tree.files.flatMap(Dependencies.problems)) }

    @Test("every program file says at its top what it must not know")
    func headers() { expectNone(tree.files.flatMap(FileStyle.headerProblems)) }

    @Test("nothing is left to be finished later, nothing refers to places outside the repository")
    func words() { expectNone(tree.files.flatMap(FileStyle.wordProblems)) }

    @Test("no line is longer than the limit")
    func lineLengths() { expectNone(tree.files.flatMap(FileStyle.lengthProblems)) }

    @Test("links in documents lead to files and headings that exist")
    func links() { expectNone(tree.files.flatMap { Documents.linkProblems(in: $0, tree: tree) }) }

    @Test(
        "the walk of a READ names functions that exist",
        arguments: ["Sources/SCSICore/README.md", "Docs/ARCHITECTURE.md"])
    func walk(path: String) throws {
        let found = tree.file(path)
        let file = try #require(found, "\(path) is not there")
        let sources = tree.files.filter { $0.isSwift && $0.path.hasPrefix("Sources/") }
        expectNone(Documents.walkProblems(in: file, sources: sources, atLeast: 8))
    }
}

@Suite("Each tidy rule catches what it is for")
struct TidyRuleTests {
    private func swift(_ text: String, at path: String = "Sources/SCSICore/Model/Made.swift") -> TextFile {
        TextFile(path: path, text: text)
    }

    @Test(
        "an import is recognized in every spelling",
        arguments: [
            ("import Glibc", "Glibc"), ("public import CTarget", "CTarget"), ("  internal import Reactor", "Reactor"),
            ("@preconcurrency import Logging", "Logging"), ("@_spi(Testing) public import SCSICore", "SCSICore"),
            ("import struct Glibc.iovec", "Glibc"), ("private import func Foundation.NSLog", "Foundation"),
        ])
    func importSpellings(line: String, module: String) { #expect(Dependencies.importedModule(line[...]) == module) }

    @Test(
        "what only looks like an import is none",
        arguments: ["// import Foundation", "let important = 1", "imports Foundation"])
    func noImport(line: String) { #expect(Dependencies.importedModule(line[...]) == nil) }

    @Test(
        "an import against the rule is a problem",
        arguments: [
            ("Sources/SCSICore/A.swift", "Glibc"), ("Sources/Reactor/A.swift", "SCSICore"),
            ("Sources/Backstores/A.swift", "VirtioFront"), ("Sources/VirtioFront/A.swift", "Backstores"),
            ("Sources/VirtioFront/Deep/A.swift", "Foundation"), ("Sources/targetctl/A.swift", "SCSICore"),
        ])
    func forbiddenImport(path: String, module: String) {
        #expect(Dependencies.problems(in: swift("// A\nimport \(module)", at: path)).map(\.line) == [2])
    }

    @Test("a module without a row in the table is a problem")
    func unknownModule() { #expect(Dependencies.problems(in: swift("//", at: "Sources/Extra/A.swift")).count == 1) }

    @Test(
        "a file without the comment at its top, or with half of it, is a problem",
        arguments: ["import CTarget\n", "\n// Made: this.\n", "// Made: this.\n\n// Must not know: that.\n"])
    func badHeader(text: String) { #expect(FileStyle.headerProblems(in: swift(text)).count == 1) }

    @Test(
        "a comment at the top that says what the file must not know is fine, over two lines too",
        arguments: [
            "// Made: this. Must not know: that.\n", "// Made: this.\n//\n// Called by: all. Must not\n// know: it.\n",
        ])
    func goodHeader(text: String) { #expect(FileStyle.headerProblems(in: swift(text)) == []) }

    @Test("a test need not say what it must not know, but what it is")
    func headerOfTest() {
        #expect(FileStyle.headerProblems(in: swift("// Made: this.\n", at: "Tests/MadeTests/A.swift")) == [])
        #expect(FileStyle.headerProblems(in: swift("import Testing\n", at: "Tests/MadeTests/A.swift")).count == 1)
    }

    @Test("a mark of unfinished work is a problem", arguments: FileStyle.unfinished + FileStyle.foreign)
    func mark(word: String) { #expect(FileStyle.wordProblems(in: swift("//\n// \(word)")).map(\.line) == [2]) }

    @Test("a long line is a problem, in a table it is not")
    func longLine() {
        let long = String(repeating: "x", count: FileStyle.longestLine + 1)
        #expect(FileStyle.lengthProblems(in: swift("//\n//\(long)")).map(\.line) == [2])
        let table = "// swift-format-ignore-start\n//\(long)\n// swift-format-ignore-end\n    //\(long)"
        #expect(FileStyle.lengthProblems(in: swift(table)).map(\.line) == [4])
        let script = TextFile(path: "Scripts/made.py", text: "#\n\(long)")
        #expect(FileStyle.lengthProblems(in: script).map(\.line) == [2])
    }

    @Test("a link to a missing file or heading is a problem, one to an existing one is not")
    func brokenLinks() throws {
        let tree = try SourceTree()
        let text = """
            # A Heading, with punctuation
            [good](../README.md) [good](https://example.org) [good](#a-heading-with-punctuation)
            [bad](../NOWHERE.md)
            [bad](#another-heading)
            """
        let file = TextFile(path: "Docs/Made.md", text: text)
        #expect(Documents.linkProblems(in: file, tree: tree).map(\.line) == [3, 4])
    }

    @Test("a walk that names a function that no source declares is a problem")
    func walkOfMissing() {
        let sources = [
            swift("extension Walker {\n    func step(_ length: Int) {}\n}"), swift("struct Other {}\nfunc walk() {}"),
            swift("// func leap of Walker"),
        ]
        let text = """
            | 1 | `Walker.step` | exists |
            | 2 | `Walker.step(_:)` → `Walker.leap` | the second does not |
            | 3 | `Walker.walk` | another type's |
            """
        let file = TextFile(path: "Docs/Made.md", text: text)
        let problems = Documents.walkProblems(in: file, sources: sources, atLeast: 4)
        #expect(problems.map(\.line) == [2, 3])
    }

    @Test("a walk with too few names is a problem")
    func emptyWalk() {
        let file = TextFile(path: "Docs/Made.md", text: "| 1 | nothing |")
        #expect(Documents.walkProblems(in: file, sources: [], atLeast: 1).count == 1)
    }
}
