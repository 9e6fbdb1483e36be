// FileStyle: rules about single files: the comment at the top, marks of unfinished work, the length of lines.
//
// Owns: these rules. Called by: TidyTests. Must not know: what is in the files beyond their lines.

/// Rules that look at one file.
enum FileStyle {
    static let longestLine = 120

    /// Each program file opens with a comment that says what it is; those that others are built on say as well what
    /// they must not know. Tests and headers of C may know what they like.
    static func headerProblems(in file: TextFile) -> [Problem] {
        let mark: String
        if file.isSwift || file.isC {
            mark = "//"
        } else if file.isScript {
            mark = "#"
        } else {
            return []
        }
        // The manifest must begin with its tools version, which is a comment as well.
        let header = file.lines.drop { $0.hasPrefix("#!") }.prefix { isComment($0, mark: mark) }
        guard !header.isEmpty else {
            return [Problem(path: file.path, line: 1, text: "it begins without a comment that says what it is")]
        }
        guard file.isScript || (file.isSwift && isBuiltOn(file)) else { return [] }
        let text = header.joined(separator: " ").replacing(mark, with: "").split(separator: " ").joined(separator: " ")
        guard text.contains("ust not know") else {
            return [Problem(path: file.path, line: 1, text: "its first comment does not say what it must not know")]
        }
        return []
    }

    private static func isBuiltOn(_ file: TextFile) -> Bool {
        file.directories.first == "Sources" || file.directories.starts(with: ["Tests", "Support"])
    }

    private static func isComment(_ line: Substring, mark: String) -> Bool {
        line.hasPrefix(mark) || (mark == "//" && (line.hasPrefix("/*") || line.hasPrefix(" *")))
    }

    /// Marks of work that somebody meant to finish later. Spelt in halves, for this file is looked at as well.
    static let unfinished = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "not built " + "yet", "not " + "implemented yet"]

    /// Places that exist on the machine of one developer only.
    static let foreign = ["/wo" + "rk/", ".." + "/shared", "design" + ".md", "/tmp/" + "brief"]

    static func wordProblems(in file: TextFile) -> [Problem] {
        var problems: [Problem] = []
        for (index, line) in file.lines.enumerated() {
            for word in unfinished where line.contains(word) {
                let text = "'\(word)': finish it, or open an issue"
                problems.append(Problem(path: file.path, line: index + 1, text: text))
            }
            for word in foreign where line.contains(word) {
                let text = "'\(word)' is not in this repository"
                problems.append(Problem(path: file.path, line: index + 1, text: text))
            }
        }
        return problems
    }

    /// Lines that are too long. Tables are exempt, so that their columns align; of Swift, the formatter looks at the
    /// code, so what is looked at here is the comments.
    static func lengthProblems(in file: TextFile) -> [Problem] {
        guard file.isSwift || file.isC || file.isScript || file.isMarkdown else { return [] }
        var isTable = false
        return file.lines.enumerated().compactMap { index, line in
            if line.contains("swift-format-ignore-start") { isTable = true }
            if line.contains("swift-format-ignore-end") { isTable = false }
            let isComment = line.drop { $0 == " " }.hasPrefix("//")
            guard !isTable, isComment || !file.isSwift, !(file.isMarkdown && line.hasPrefix("|")) else { return nil }
            guard line.count > longestLine else { return nil }
            return Problem(
                path: file.path, line: index + 1, text: "\(line.count) columns; \(longestLine) are the limit")
        }
    }
}
