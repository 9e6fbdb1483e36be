// Violations: what the mock port and the scripted backstore do when the core breaks a rule of a seam.
//
// Called by: the mocks. Must not know: the test that runs.

/// Collects broken rules. Without a collector a broken rule ends the process: no test can overlook it.
public final class Violations {
    /// Whether broken rules are kept in `found` instead of ending the process.
    public var collects = false
    /// The broken rules so far, in words.
    public private(set) var found: [String] = []

    /// A collector that ends the process.
    public init() {}

    /// Notes a broken rule.
    public func report(_ rule: String) {
        guard collects else { fatalError("a rule of a seam was broken: \(rule)") }
        found.append(rule)
    }

    /// Notes a broken rule unless the condition holds.
    public func require(_ condition: Bool, _ rule: @autoclosure () -> String) {
        if !condition { report(rule()) }
    }
}
