// Documents: rules about Markdown: links lead somewhere, and a walk through the sources names functions that exist.
//
// Owns: these rules. Called by: TidyTests. Must not know: what the documents say beyond that.

/// Rules that compare documents with the rest of the repository.
enum Documents {
    // MARK: Links

    /// Links to files and headings that are not there.
    static func linkProblems(in file: TextFile, tree: SourceTree) -> [Problem] {
        guard file.isMarkdown else { return [] }
        return proseLines(of: file).flatMap { index, line in
            line.matches(of: #/\[[^\]]*\]\(([^)\s]+)\)/#).compactMap { match in
                let target = match.output.1
                guard !target.contains("://"), !target.hasPrefix("mailto:") else { return nil }
                return missing(target, from: file, tree: tree).map {
                    Problem(path: file.path, line: index + 1, text: "the link to \(target) leads nowhere: \($0)")
                }
            }
        }
    }

    private static func missing(_ target: Substring, from file: TextFile, tree: SourceTree) -> String? {
        let parts = target.split(separator: "#", maxSplits: 1, omittingEmptySubsequences: false)
        let path = parts[0].isEmpty ? file.path : resolve(parts[0], in: file.directories)
        let document = parts[0].isEmpty ? file : tree.file(path)
        guard document != nil || tree.exists(path) else { return "there is no \(path)" }
        guard parts.count == 2, let document, document.isMarkdown else { return nil }
        return headings(of: document).contains(String(parts[1])) ? nil : "\(path) has no such heading"
    }

    private static func resolve(_ path: Substring, in directories: [Substring]) -> String {
        var result = path.hasPrefix("/") ? [] : directories
        for part in path.split(separator: "/") where part != "." {
            if part == ".." { _ = result.popLast() } else { result.append(part) }
        }
        return result.joined(separator: "/")
    }

    /// The names that links give to headings: lower case, spaces as hyphens, no punctuation.
    static func headings(of file: TextFile) -> Set<String> {
        Set(
            proseLines(of: file).filter { $0.1.hasPrefix("#") }.map { _, line in
                line.drop { $0 == "#" || $0 == " " }.lowercased()
                    .filter { $0.isLetter || $0.isNumber || $0 == " " || $0 == "-" || $0 == "_" }
                    .replacing(" ", with: "-")
            })
    }

    /// The lines outside fenced code, with their indices.
    private static func proseLines(of file: TextFile) -> [(Int, Substring)] {
        var isCode = false
        return file.lines.enumerated().filter { _, line in
            if line.hasPrefix("```") { isCode.toggle() }
            return !isCode
        }.map { ($0.offset, $0.element) }
    }

    // MARK: The walk of a READ

    /// A function as a walk names it.
    struct FunctionName: Hashable, CustomStringConvertible {
        let type: String
        let function: String
        let line: Int

        var description: String { "\(type).\(function)" }
    }

    /// Each `Type.function` in backticks in the file's tables.
    static func functionNames(in file: TextFile) -> [FunctionName] {
        file.lines.enumerated().filter { $0.element.hasPrefix("|") }.flatMap { index, line in
            line.matches(of: #/`([A-Z]\w*)\.([a-z]\w*)[^`]*`/#).map {
                FunctionName(type: String($0.output.1), function: String($0.output.2), line: index + 1)
            }
        }
    }

    /// Names in a walk that are in no source, and walks that name too little to be one.
    static func walkProblems(in file: TextFile, sources: [TextFile], atLeast: Int) -> [Problem] {
        let names = functionNames(in: file)
        var problems = names.filter { !isDeclared($0, in: sources) }.map {
            Problem(path: file.path, line: $0.line, text: "no source declares \($0)")
        }
        if names.count < atLeast {
            let text = "the tables name \(names.count) functions as `Type.function`; a walk has at least \(atLeast)"
            problems.append(Problem(path: file.path, line: 1, text: text))
        }
        return problems
    }

    /// Whether a file declares or extends the type, and declares the function.
    private static func isDeclared(_ name: FunctionName, in sources: [TextFile]) -> Bool {
        sources.contains { file in
            file.lines.contains { declares($0, typeKeywords, name.type) }
                && file.lines.contains { declares($0, ["func", "var", "let"], name.function) }
        }
    }

    private static let typeKeywords = ["struct", "class", "enum", "actor", "protocol", "extension"]

    private static func declares(_ line: Substring, _ keywords: [String], _ name: String) -> Bool {
        let words = line.split { !($0.isLetter || $0.isNumber || $0 == "_") }
        return zip(words, words.dropFirst()).contains { keywords.contains(String($0)) && $1 == name }
            && !line.drop { $0 == " " }.hasPrefix("//")
    }
}
