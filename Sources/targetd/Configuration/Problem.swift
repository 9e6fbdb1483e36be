// Problem: one thing that is wrong with a configuration, said so that it can be put right.
//
// Owns: the notation. Called by: the reader, the rules and the command line. Must not know: how a problem is found.

/// One thing that is wrong, or looks wrong.
struct Problem: Equatable, Sendable {
    enum Severity: String, Sendable {
        case error
        case warning
    }

    var severity = Severity.error
    /// Line of the file, from 1; `nil` where there is no file.
    var line: Int?
    /// The key that it is about, with all keys above it: `backstores.root.size`. Empty for the whole file.
    var key: String
    /// What is wrong, and what is allowed.
    var text: String

    /// `file:line: error: key: text`, as compilers write it and editors read it.
    func rendered(source: String) -> String {
        let place = line.map { "\(source):\($0)" } ?? source
        return "\(place): \(severity.rawValue): \(key.isEmpty ? "" : key + ": ")\(text)"
    }
}

/// Where each key stands in the source: a line of a file, or an option of the command line.
struct SourceMap: Equatable, Sendable {
    /// The file's name, or the program's for the command line.
    var source: String
    /// Lines from 1, by key.
    var lines: [String: Int] = [:]
    /// What a key is called where it is not called as in a file.
    var spellings: [String: String] = [:]

    /// A problem with a key, placed at that key, or at the nearest one above it that stands in the source.
    func problem(_ key: String, _ text: String, severity: Problem.Severity = .error) -> Problem {
        Problem(severity: severity, line: line(of: key), key: spellings[key] ?? key, text: text)
    }

    private func line(of key: String) -> Int? {
        var key = key[...]
        while true {
            if let line = lines[String(key)] { return line }
            guard let end = key.lastIndex(where: { $0 == "." || $0 == "[" }) else { return nil }
            key = key[..<end]
        }
    }
}

/// The best of `candidates` for a word that was meant to be one of them, if one is near enough.
func nearest(_ word: String, in candidates: [String]) -> String? {
    let allowedDistance = max(1, word.count / 3)
    let ranked = candidates.map { (candidate: $0, distance: editDistance(word.lowercased(), $0.lowercased())) }
    guard let best = ranked.min(by: { $0.distance < $1.distance }), best.distance <= allowedDistance else { return nil }
    return best.candidate
}

/// How many letters must be inserted, removed, replaced or swapped with their neighbour (optimal string alignment).
func editDistance(_ left: String, _ right: String) -> Int {
    // A word this long is no typing error, and the work grows with the product of the lengths.
    guard left.utf8.count <= 64, right.utf8.count <= 64 else { return .max }
    let (left, right) = (Array(left), Array(right))
    var before: [Int] = []
    var last = Array(0...right.count)
    for row in left.indices {
        var next = [row + 1]
        for column in right.indices {
            let replaced = last[column] + (left[row] == right[column] ? 0 : 1)
            var best = min(replaced, last[column + 1] + 1, next[column] + 1)
            if row > 0, column > 0, left[row] == right[column - 1], left[row - 1] == right[column] {
                best = min(best, before[column - 1] + 1)
            }
            next.append(best)
        }
        (before, last) = (last, next)
    }
    return last[right.count]
}
