// Problem: what a tidy rule says about a place.
//
// Called by: the rules and their tests. Must not know: any rule.

/// Something to mend, at a place.
struct Problem: CustomStringConvertible, Equatable {
    let path: String
    /// From 1.
    let line: Int
    let text: String

    var description: String { "\(path):\(line): \(text)" }
}
