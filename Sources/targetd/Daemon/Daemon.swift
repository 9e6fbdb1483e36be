import Logging
struct StartError: Error { let text: String }
struct ReactorObjects {}
final class Daemon: Sendable {
    static func start(_ configuration: Configuration, logger: Logger) async throws(StartError) -> Daemon {
        throw StartError(text: "")
    }
    var socketCount: Int { 0 }
    func stop() async -> ExitStatus { .success }
    func hurry() {}
    func ping() async {}
}
