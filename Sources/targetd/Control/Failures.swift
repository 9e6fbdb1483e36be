// Failures: what went wrong in the daemon, in the words of the control API.
//
// Called by: the daemon, the router. Must not know: HTTP.

import ControlAPI

extension ChangeError {
    /// The error for a difference that only a restart, or two steps, can bring about.
    init(_ refusal: Plan.Refusal) { self.init(text: "\(refusal.key): \(refusal.text)", kind: .conflict) }
}

extension Failure {
    init(_ error: ChangeError) {
        let code: FailureCode =
            switch error.kind {
            case .failed: .failed
            case .conflict: .conflict
            case .notFound: .notFound
            case .stopping: .stopping
            }
        self.init(code, error.text)
    }

    /// The failure for a configuration with errors.
    init(_ loaded: ConfigurationSource.Loaded) {
        let errors = loaded.problems.count { $0.severity == .error }
        let count = "\(errors) error\(errors == 1 ? "" : "s")"
        self.init(
            .invalidConfiguration, "the configuration has \(count); nothing was changed",
            details: loaded.problems.map(ProblemReport.init))
    }
}

extension ProblemReport {
    init(_ problem: Problem) {
        self.init(severity: problem.severity.rawValue, line: problem.line, key: problem.key, text: problem.text)
    }
}

extension ChangeReport {
    /// - Parameter loaded: Where the changes come from; a configuration without errors.
    init(_ changes: [Change], _ loaded: ConfigurationSource.Loaded) {
        self.init(changes: changes.map(\.description), warnings: loaded.problems.map(ProblemReport.init))
    }
}
