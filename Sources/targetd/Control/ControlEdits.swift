// ControlEdits: the paths of the control API that add, change and take away single objects, and those that act on one.
//
// Owns: these paths, and what their bodies take. Called by: ControlRouter. Must not know: sockets.

import ControlAPI
import Foundation

extension ControlRouter {
    /// The paths for single objects.
    static let objectRoutes: [Route] = [
        Route(
            path: "/v1/backstores/{name}",
            operations: [
                "GET": { router, call throws(Failure) in
                    .init(try find(call.name, "backstore", in: await router.daemon.status().backstores, \.name))
                },
                "PUT": { router, call throws(Failure) in try await router.putBackstore(call) },
                "DELETE": { router, call throws(Failure) in try await router.deleteBackstore(call) },
            ], flags: ["force"]),
        Route(
            path: "/v1/targets/{name}",
            operations: [
                "GET": { router, call throws(Failure) in
                    .init(try find(call.name, "target", in: await router.daemon.status().targets, \.name))
                },
                "PUT": { router, call throws(Failure) in try await router.putTarget(call) },
                "DELETE": { router, call throws(Failure) in try await router.deleteTarget(call) },
            ], flags: ["force"]),
        Route(
            path: "/v1/targets/{name}/port-groups/{group}/state",
            operations: ["PUT": { router, call throws(Failure) in try await router.setAccessState(call) }]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}",
            operations: [
                "GET": { router, call throws(Failure) in
                    let address = try call.unit
                    let target = try find(
                        "\(address.target)", "target", in: await router.daemon.status().targets, \.name)
                    guard let unit = target.luns.first(where: { $0.lun == address.number }) else {
                        throw missing(address)
                    }
                    return .init(unit)
                },
                "PUT": { router, call throws(Failure) in try await router.putUnit(call) },
                "DELETE": { router, call throws(Failure) in try await router.deleteUnit(call) },
            ], flags: ["force"]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/limits",
            operations: ["PUT": { router, call throws(Failure) in try await router.limitUnit(call) }]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/read-only",
            operations: ["PUT": { router, call throws(Failure) in try await router.protectUnit(call) }]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/reset",
            operations: [
                "POST": { router, call throws(Failure) in .init(try await router.daemon.reset(try call.unit)) }
            ]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/freeze",
            operations: [
                "POST": { router, call throws(Failure) in .init(try await router.daemon.freeze(try call.unit)) }
            ]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/thaw",
            operations: [
                "POST": { router, call throws(Failure) in .init(try await router.daemon.thaw(try call.unit)) }
            ]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/eject",
            operations: [
                "POST": { router, call throws(Failure) in
                    .init(try await router.daemon.eject(try call.unit, isForced: call.flags.contains("force")))
                }
            ], flags: ["force"]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/load",
            operations: [
                "POST": { router, call throws(Failure) in .init(try await router.daemon.load(try call.unit)) }
            ]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/trace",
            operations: [
                "GET": { router, call throws(Failure) in .init(try await router.daemon.trace(try call.unit)) },
                "PUT": { router, call throws(Failure) in
                    let entries = try JSONBody(call.body, ["entries"], "{\"entries\": 1024}").integer(
                        "entries", ConfigurationLimits.traceEntries)
                    return .init(try await router.daemon.setTrace(try call.unit, entries: entries))
                },
                "DELETE": { router, call throws(Failure) in
                    .init(try await router.daemon.setTrace(try call.unit, entries: nil))
                },
            ]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/reservations",
            operations: [
                "GET": { router, call throws(Failure) in .init(try await router.daemon.reservations(try call.unit)) },
                "DELETE": { router, call throws(Failure) in
                    .init(try await router.daemon.clearReservations(try call.unit))
                },
            ]),
        Route(
            path: "/v1/targets/{name}/luns/{lun}/reservations/state",
            operations: [
                "GET": { router, call throws(Failure) in
                    .init(try await router.daemon.exportReservations(try call.unit))
                },
                "PUT": { router, call throws(Failure) in try await router.importReservations(call) },
            ]),
        Route(
            path: "/v1/fronts/{socket}",
            operations: [
                "GET": { router, call throws(Failure) in
                    .init(try find(call.socket, "front", in: await router.daemon.status().fronts, \.socket))
                },
                "PUT": { router, call throws(Failure) in try await router.putFront(call) },
                "DELETE": { router, call throws(Failure) in try await router.deleteFront(call) },
            ], flags: ["force"]),
        Route(
            path: "/v1/fronts/{socket}/limits",
            operations: ["PUT": { router, call throws(Failure) in try await router.limitFront(call) }]),
        Route(
            path: "/v1/log-level",
            operations: ["PUT": { router, call throws(Failure) in try await router.setLogLevel(call) }]),
    ]

    private static func missing(_ address: UnitAddress) -> Failure {
        Failure(.notFound, "There is no logical unit \(address.number) of \(address.target).")
    }

    // MARK: Media

    private func putBackstore(_ call: Call) async throws(Failure) -> ControlResponse {
        let name = call.name
        let backstore = try Self.part(call.body) { ConfigurationReader.backstore($0, name: name) }
        return .init(
            try await daemon.edit("put backstore \(name)") { configuration throws(Failure) in
                configuration.backstores[name] = backstore
            })
    }

    private func deleteBackstore(_ call: Call) async throws(Failure) -> ControlResponse {
        let name = call.name
        let isForced = call.flags.contains("force")
        return .init(
            try await daemon.edit("remove backstore \(name)", isForced: isForced) { configuration throws(Failure) in
                for (target, units) in configuration.targets {
                    guard let unit = units.logicalUnits.first(where: { $0.value.backstore == name }) else { continue }
                    guard isForced else {
                        throw Failure(
                            .conflict,
                            "Backstore \(name) is LUN \(unit.key) of \(target): remove that logical unit first, or use "
                                + "force.")
                    }
                    configuration.targets[target]!.logicalUnits[unit.key] = nil
                }
                guard configuration.backstores.removeValue(forKey: name) != nil else {
                    throw Failure(.notFound, "There is no backstore \(name).")
                }
            })
    }

    // MARK: Targets and logical units

    private func putTarget(_ call: Call) async throws(Failure) -> ControlResponse {
        let name = try call.target
        let target = try Self.part(call.body) { ConfigurationReader.target($0, name: "\(name)") }
        return .init(
            try await daemon.edit("put target \(name)") { configuration throws(Failure) in
                configuration.targets[name] = target
            })
    }

    private func deleteTarget(_ call: Call) async throws(Failure) -> ControlResponse {
        let name = try call.target
        let isForced = call.flags.contains("force")
        return .init(
            try await daemon.edit("remove target \(name)", isForced: isForced) { configuration throws(Failure) in
                guard configuration.targets.removeValue(forKey: name) != nil else {
                    throw Failure(.notFound, "There is no target \(name).")
                }
                for (index, front) in configuration.vhostUserFronts.enumerated() {
                    guard let number = front.targets.first(where: { $0.value == name })?.key else { continue }
                    guard isForced else {
                        throw Failure(
                            .conflict,
                            "Target \(name) is target \(number) of the socket \(front.socket): take it away there "
                                + "first, or use force.")
                    }
                    configuration.vhostUserFronts[index].targets[number] = nil
                }
                // A socket without a target is nothing.
                configuration.vhostUserFronts.removeAll { $0.targets.isEmpty }
            })
    }

    private func setAccessState(_ call: Call) async throws(Failure) -> ControlResponse {
        let text = call.parameters["group"] ?? ""
        guard let group = Int(text), "\(group)" == text else {
            throw Failure(.notFound, "\"\(text)\" is not the number of a port group.")
        }
        let word = try JSONBody(call.body, ["state"], "{\"state\": \"standby\"}").string("state")
        guard let state = PortGroupConfiguration.AccessState(rawValue: word) else {
            let allowed = PortGroupConfiguration.AccessState.allCases.map(\.rawValue).joined(separator: ", ")
            throw Failure(.invalidRequest, "state cannot be \"\(word)\": allowed: \(allowed).")
        }
        return .init(try await daemon.setAccessState(state, ofPortGroup: group, target: try call.target))
    }

    private func putUnit(_ call: Call) async throws(Failure) -> ControlResponse {
        let address = try call.unit
        let unit = try Self.part(call.body) {
            ConfigurationReader.logicalUnit($0, key: "targets.\(address.target).luns.\(address.number)")
        }
        return .init(
            try await daemon.edit("put \(address.text)") { configuration throws(Failure) in
                guard configuration.targets[address.target] != nil else {
                    throw Failure(.notFound, "There is no target \(address.target).")
                }
                configuration.targets[address.target]!.logicalUnits[address.number] = unit
            })
    }

    private func deleteUnit(_ call: Call) async throws(Failure) -> ControlResponse {
        let address = try call.unit
        let isForced = call.flags.contains("force")
        return .init(
            try await daemon.edit("remove \(address.text)", isForced: isForced) { configuration throws(Failure) in
                guard configuration.targets[address.target]?.logicalUnits.removeValue(forKey: address.number) != nil
                else { throw Self.missing(address) }
            })
    }

    /// Changes the settings of a logical unit.
    private func change(
        _ what: String, _ address: UnitAddress, _ body: @escaping @Sendable (inout LogicalUnitSettings) -> Void
    ) async throws(Failure) -> ControlResponse {
        .init(
            try await daemon.edit("\(what) \(address.text)") { configuration throws(Failure) in
                guard var unit = configuration.targets[address.target]?.logicalUnits[address.number] else {
                    throw Self.missing(address)
                }
                body(&unit)
                configuration.targets[address.target]!.logicalUnits[address.number] = unit
            })
    }

    private func limitUnit(_ call: Call) async throws(Failure) -> ControlResponse {
        let limits = try Self.part(call.body) { ConfigurationReader.limits($0) }
        return try await change("limit", try call.unit) { $0.limits = limits }
    }

    private func protectUnit(_ call: Call) async throws(Failure) -> ControlResponse {
        let isReadOnly = try JSONBody(call.body, ["read-only"], "{\"read-only\": true}").boolean("read-only")
        return try await change(isReadOnly ? "protect" : "unprotect", try call.unit) { $0.readOnly = isReadOnly }
    }

    private func importReservations(_ call: Call) async throws(Failure) -> ControlResponse {
        let body = try JSONBody(
            call.body, ["name", "state"], "what GET of this path gives: {\"name\": \"naa.…\", \"state\": \"…\"}")
        let name = try body.string("name")
        guard let state = Data(base64Encoded: try body.string("state")) else {
            throw Failure(.invalidRequest, "state is not in Base64: send what GET of this path gives.")
        }
        return .init(try await daemon.importReservations(try call.unit, name: name, state: Array(state)))
    }

    // MARK: Fronts

    private func putFront(_ call: Call) async throws(Failure) -> ControlResponse {
        let socket = call.socket
        let front = try Self.part(try Self.adding("socket", socket, to: call.body)) { ConfigurationReader.front($0) }
        return .init(
            try await daemon.edit("put front \(socket)") { configuration throws(Failure) in
                if let index = configuration.vhostUserFronts.firstIndex(where: { $0.socket == socket }) {
                    configuration.vhostUserFronts[index] = front
                } else {
                    configuration.vhostUserFronts.append(front)
                }
            })
    }

    private func deleteFront(_ call: Call) async throws(Failure) -> ControlResponse {
        let socket = call.socket
        let isForced = call.flags.contains("force")
        // A removal that waits for the guest is no reason to wait, too: it is the same removal.
        let wasHurried = isForced ? await daemon.hurry(front: socket) : false
        return .init(
            try await daemon.edit("remove front \(socket)", isForced: isForced) { configuration throws(Failure) in
                guard let index = configuration.vhostUserFronts.firstIndex(where: { $0.socket == socket }) else {
                    if wasHurried { return }
                    throw Failure(.notFound, "There is no front \(socket).")
                }
                configuration.vhostUserFronts.remove(at: index)
            })
    }

    private func limitFront(_ call: Call) async throws(Failure) -> ControlResponse {
        let socket = call.socket
        let limits = try Self.part(call.body) { ConfigurationReader.limits($0) }
        return .init(
            try await daemon.edit("limit front \(socket)") { configuration throws(Failure) in
                guard let index = configuration.vhostUserFronts.firstIndex(where: { $0.socket == socket }) else {
                    throw Failure(.notFound, "There is no front \(socket).")
                }
                configuration.vhostUserFronts[index].limits = limits
            })
    }

    // MARK: The daemon

    private func setLogLevel(_ call: Call) async throws(Failure) -> ControlResponse {
        let names = LogLevels.names.joined(separator: ", ")
        let level = try JSONBody(call.body, ["level"], "{\"level\": \"info\"}").string("level")
        guard LogLevels.names.contains(level) else {
            throw Failure(.invalidRequest, "level cannot be \"\(level)\": allowed: \(names).")
        }
        return .init(
            try await daemon.edit("log level \(level)") { configuration throws(Failure) in
                configuration.logLevel = level
            })
    }

    // MARK: Bodies

    /// A part of a configuration, in JSON.
    private static func part<Value>(
        _ body: Data, _ read: (String) -> (value: Value?, problems: [Problem])
    ) throws(Failure) -> Value {
        guard (try? JSONSerialization.jsonObject(with: body)) != nil,
            let text = String(validating: body, as: UTF8.self)
        else { throw Failure(.invalidRequest, "The body is not JSON.") }
        let (value, problems) = read(text)
        guard let value, problems.isEmpty else {
            throw Failure(
                .invalidConfiguration,
                "the body has \(problems.count) error\(problems.count == 1 ? "" : "s"); "
                    + "nothing was changed", details: problems.map(ProblemReport.init))
        }
        return value
    }

    /// The body with what its path says already.
    private static func adding(_ name: String, _ value: String, to body: Data) throws(Failure) -> Data {
        guard var fields = (try? JSONSerialization.jsonObject(with: body)) as? [String: Any] else {
            throw Failure(.invalidRequest, "The body is not a JSON object.")
        }
        if let own = fields[name], own as? String != value {
            throw Failure(.invalidRequest, "\(name) is not the one of the path: leave it out.")
        }
        fields[name] = value
        guard let data = try? JSONSerialization.data(withJSONObject: fields, options: [.withoutEscapingSlashes]) else {
            throw Failure(.invalidRequest, "The body is not JSON.")
        }
        return data
    }
}

extension ControlRouter.Call {
    /// What stands for `{name}`.
    var name: String { parameters["name"] ?? "" }

    /// What stands for `{socket}`.
    var socket: String { parameters["socket"] ?? "" }

    /// The target that `{name}` names.
    var target: NAAName {
        get throws(Failure) {
            do {
                return try NAAName(parsing: name, kinds: 2...3, 5...6)
            } catch {
                throw Failure(.notFound, "\"\(name)\" \(error.text).")
            }
        }
    }

    /// The logical unit that the path names.
    var unit: UnitAddress {
        get throws(Failure) {
            let text = parameters["lun"] ?? ""
            guard let number = Int(text), "\(number)" == text, ConfigurationLimits.logicalUnitNumbers.contains(number)
            else { throw Failure(.notFound, "\"\(text)\" is not a logical unit number.") }
            return UnitAddress(target: try target, number: number)
        }
    }
}

/// A small body: an object with these fields and no others.
struct JSONBody {
    private let fields: [String: Any]
    private let expected: String

    /// - Parameters:
    ///   - allowed: The fields, all of which must be there.
    ///   - example: What to write.
    init(_ body: Data, _ allowed: [String], _ example: String) throws(Failure) {
        expected = "write \(example)"
        guard let value = try? JSONSerialization.jsonObject(with: body) else {
            throw Failure(.invalidRequest, "The body is not JSON: \(expected).")
        }
        guard let fields = value as? [String: Any] else {
            throw Failure(.invalidRequest, "The body is not an object: \(expected).")
        }
        if let unknown = fields.keys.sorted().first(where: { !allowed.contains($0) }) {
            throw Failure(.invalidRequest, "\"\(unknown)\" is not a field here: \(expected).")
        }
        if let absent = allowed.first(where: { fields[$0] == nil }) {
            throw Failure(.invalidRequest, "The body has no \(absent): \(expected).")
        }
        self.fields = fields
    }

    func integer(_ name: String, _ range: ClosedRange<Int>) throws(Failure) -> Int {
        guard let number = fields[name] as? NSNumber, let value = Int(exactly: number),
            NSNumber(value: value) == number, !Self.isBoolean(number), range.contains(value)
        else {
            throw Failure(
                .invalidRequest,
                "\(name) is no whole number from \(range.lowerBound) to \(range.upperBound): \(expected).")
        }
        return value
    }

    func boolean(_ name: String) throws(Failure) -> Bool {
        guard let number = fields[name] as? NSNumber, Self.isBoolean(number) else {
            throw Failure(.invalidRequest, "\(name) is neither true nor false: \(expected).")
        }
        return number.boolValue
    }

    func string(_ name: String) throws(Failure) -> String {
        guard let text = fields[name] as? String else {
            throw Failure(.invalidRequest, "\(name) is no text: \(expected).")
        }
        return text
    }

    private static func isBoolean(_ number: NSNumber) -> Bool {
        // Foundation reads true as a number, whose type is that of a C bool.
        unsafe String(cString: number.objCType) == "c" || number === (true as NSNumber)
            || number === (false as NSNumber)
    }
}
