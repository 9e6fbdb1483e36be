// ControlRouter: the paths of the control API, and what each method does there.
//
// Owns: the table of paths. Called by: the server. Must not know: sockets.

import ControlAPI
import Foundation

/// Answers requests for one daemon.
struct ControlRouter: Sendable {
    /// What is at one path. A word in braces stands for any one part.
    struct Route: Sendable {
        var path: String
        /// The operations by method.
        var operations: [String: @Sendable (ControlRouter, Call) async throws(Failure) -> ControlResponse]
        /// Parameters of the query that one of the operations takes, each `true` or `false`.
        var flags: [String] = []
    }

    /// A request, taken apart.
    struct Call: Sendable {
        /// What stands for the words in braces.
        var parameters: [String: String] = [:]
        var flags: Set<String> = []
        var body: Data
    }

    /// All paths.
    static let routes: [Route] = generalRoutes + objectRoutes

    /// The paths for everything of a kind.
    private static let generalRoutes: [Route] = [
        Route(
            path: "/v1/status",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.daemon.status()) }]),
        Route(
            path: "/v1/reactors",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.daemon.status().reactors) }]),
        Route(
            path: "/v1/backstores",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.daemon.status().backstores) }]
        ),
        Route(
            path: "/v1/backstores/{name}/resize",
            operations: ["POST": { router, call throws(Failure) in try await router.resize(call) }]),
        Route(
            path: "/v1/targets",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.daemon.status().targets) }]),
        Route(
            path: "/v1/fronts",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.daemon.status().fronts) }]),
        Route(
            path: "/v1/statistics",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.daemon.statistics()) }]),
        Route(
            path: "/v1/nexuses",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.daemon.statistics().nexuses) }]),
        Route(
            path: "/v1/reservations",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.daemon.reservations()) }]),
        Route(
            path: "/v1/tasks",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.daemon.tasks()) }]),
        Route(
            path: "/v1/operations",
            operations: ["GET": { router, _ in .init(await router.daemon.operations) }]),
        Route(
            path: "/v1/events",
            operations: ["GET": { router, call throws(Failure) in try router.listen(call) }], flags: ["recent"]),
        Route(
            path: "/v1/xen",
            operations: ["GET": { router, _ throws(Failure) in .init(try await router.xen()) }]),
        Route(
            path: "/v1/configuration",
            operations: [
                "GET": { router, _ throws(Failure) in
                    .init(text: ConfigurationWriter.yaml(await router.daemon.configuration), type: "application/yaml")
                },
                "PUT": { router, call throws(Failure) in try await router.apply(call) },
            ], flags: ["dry-run"]),
        Route(
            path: "/metrics",
            operations: [
                "GET": { router, _ throws(Failure) in
                    .init(
                        text: PrometheusText.render(
                            try await router.daemon.status(), try await router.daemon.statistics()),
                        type: "text/plain; version=0.0.4; charset=utf-8")
                }
            ]),
    ]

    let daemon: Daemon
    /// What the command line says in place of the file.
    let overrides: OverrideOptions

    // MARK: Finding the operation

    /// Answers a request of a peer who may do everything.
    func respond(to request: ControlRequest) async -> ControlResponse {
        await respond(to: request, in: Self.routes)
    }

    /// Answers a request of anybody, who may read metrics.
    func respondToAnybody(_ request: ControlRequest) async -> ControlResponse {
        await respond(to: request, in: Self.routes.filter { $0.path == "/metrics" })
    }

    private func respond(to request: ControlRequest, in routes: [Route]) async -> ControlResponse {
        let parts = request.target.split(separator: "?", maxSplits: 1, omittingEmptySubsequences: false)
        let path = String(parts.first ?? "")
        guard let (route, parameters) = Self.match(path, in: routes) else {
            return ControlResponse(Failure(.notFound, "There is nothing at \(path)."))
        }
        guard let operation = route.operations[request.method] else {
            let allowed = route.operations.keys.sorted().joined(separator: ", ")
            return ControlResponse(
                Failure(.methodNotAllowed, "\(route.path) takes \(allowed), not \(request.method)."),
                fields: [("Allow", allowed)])
        }
        do throws(Failure) {
            let flags = try Self.flags(parts.count > 1 ? parts[1] : "", allowed: route.flags)
            return try await operation(self, Call(parameters: parameters, flags: flags, body: request.body))
        } catch {
            return ControlResponse(error)
        }
    }

    /// The route for a path, and what stands for its words in braces.
    static func match(_ path: String, in routes: [Route]) -> (route: Route, parameters: [String: String])? {
        let parts = path.split(separator: "/", omittingEmptySubsequences: false)
        for route in routes {
            let pattern = route.path.split(separator: "/", omittingEmptySubsequences: false)
            guard pattern.count == parts.count else { continue }
            var parameters: [String: String] = [:]
            let matches = zip(pattern, parts).allSatisfy { expected, part in
                guard expected.hasPrefix("{") else { return expected == part }
                // Decoded after the parts were told apart: a slash in a name is a part of the name.
                let value = part.removingPercentEncoding ?? ""
                parameters[String(expected.dropFirst().dropLast())] = value
                return !value.isEmpty
            }
            if matches { return (route, parameters) }
        }
        return nil
    }

    private static func flags(_ query: Substring, allowed: [String]) throws(Failure) -> Set<String> {
        var flags: Set<String> = []
        for item in query.split(separator: "&") {
            let pair = item.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            guard allowed.contains(String(pair[0])), pair.count == 2, pair[1] == "true" || pair[1] == "false" else {
                let list = allowed.isEmpty ? "none" : allowed.map { "\($0)=true" }.joined(separator: ", ")
                throw Failure(.invalidRequest, "\"\(item)\" is not a parameter of this path: allowed: \(list).")
            }
            if pair[1] == "true" { flags.insert(String(pair[0])) }
        }
        return flags
    }

    static func find<Value>(
        _ name: String, _ kind: String, in values: [Value], _ key: KeyPath<Value, String>
    ) throws(Failure) -> Value {
        guard let value = values.first(where: { $0[keyPath: key] == name }) else {
            throw Failure(.notFound, "There is no \(kind) \(name).")
        }
        return value
    }

    private func listen(_ call: Call) throws(Failure) -> ControlResponse {
        guard let events = daemon.events.listen(includesRecent: call.flags.contains("recent")) else {
            throw Failure(.conflict, "\(EventHub.listeners) clients listen to events already; try again later.")
        }
        return ControlResponse(lines: events)
    }

    private func xen() async throws(Failure) -> XenStatus {
        guard let xen = try await daemon.status().xen else {
            throw Failure(
                .notFound, "Xen guests are not served: the configuration has no xen:, or this is no domain of Xen's.")
        }
        return xen
    }

    // MARK: The operations that change something

    private func apply(_ call: Call) async throws(Failure) -> ControlResponse {
        guard let text = String(validating: call.body, as: UTF8.self) else {
            throw Failure(.invalidRequest, "The body is not UTF-8 text.")
        }
        let load: @Sendable (Configuration) -> ConfigurationSource.Loaded = { [overrides] running in
            var loaded = ConfigurationSource.load(text: text, name: "body", running: running)
            loaded.configuration = overrides.applied(to: loaded.configuration)
            return loaded
        }
        return ControlResponse(
            call.flags.contains("dry-run") ? try await daemon.diff(load) : try await daemon.apply(load))
    }

    private func resize(_ call: Call) async throws(Failure) -> ControlResponse {
        let size = try ResizeBody.size(call.body)
        let changes = try await daemon.resize(call.name, to: size)
        return ControlResponse(ChangeReport(changes: changes.map(\.description), warnings: []))
    }
}

/// The body of a resize: `{"size": "20GiB"}`, or with a number of bytes.
enum ResizeBody {
    static func size(_ body: Data) throws(Failure) -> UInt64 {
        let expected = "write {\"size\": \"20GiB\"}, or a whole number of bytes"
        guard let value = try? JSONSerialization.jsonObject(with: body) else {
            throw Failure(.invalidRequest, "The body is not JSON: \(expected).")
        }
        guard let fields = value as? [String: Any] else {
            throw Failure(.invalidRequest, "The body is not an object: \(expected).")
        }
        if let unknown = fields.keys.sorted().first(where: { $0 != "size" }) {
            throw Failure(.invalidRequest, "\"\(unknown)\" is not a field here: \(expected).")
        }
        switch fields["size"] {
        case let text as String:
            do {
                return try Size.parse(text)
            } catch {
                throw Failure(.invalidRequest, "size: \"\(text)\" \(error.text).")
            }
        case let number as NSNumber where UInt64(exactly: number).map { NSNumber(value: $0) == number } ?? false:
            return number.uint64Value
        case nil: throw Failure(.invalidRequest, "The body has no size: \(expected).")
        default: throw Failure(.invalidRequest, "size is neither a text nor a whole number: \(expected).")
        }
    }
}
