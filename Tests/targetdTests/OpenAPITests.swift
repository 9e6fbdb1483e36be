// OpenAPITests: Docs/openapi.yaml says exactly what is implemented: paths, methods, parameters, fields, error codes.
// Must not know: what the paths do.

import ControlAPI
import Foundation
import Testing
import Yams

@testable import targetd

@Suite struct OpenAPITests {
    private let document: Node

    init() throws {
        let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
            .deletingLastPathComponent()
        let text = try String(contentsOf: root.appendingPathComponent("Docs/openapi.yaml"), encoding: .utf8)
        document = try #require(try Yams.compose(yaml: text))
    }

    private func keys(_ node: Node?) -> Set<String> { Set(node?.mapping?.keys.compactMap(\.string) ?? []) }

    @Test func pathsMethodsAndParametersAreThoseOfTheRouter() throws {
        let methods: Set<String> = ["get", "put", "post", "delete", "patch"]
        let paths = try #require(document["paths"]?.mapping)
        let described = paths.flatMap { path, item in
            keys(item).intersection(methods).map { "\($0.uppercased()) \(path.string ?? "")" }
        }
        let implemented = ControlRouter.routes.flatMap { route in route.operations.keys.map { "\($0) \(route.path)" } }
        #expect(Set(described) == Set(implemented))
        for route in ControlRouter.routes {
            let item = try #require(paths[Node(route.path)])
            let flags = keys(item).intersection(methods).flatMap { method in
                (item[method]?["parameters"]?.sequence ?? []).compactMap { $0["name"]?.string }
            }
            #expect(Set(flags) == Set(route.flags), "\(route.path)")
            #expect(keys(item).contains("parameters") == route.path.contains("{"), "\(route.path)")
        }
    }

    /// What operations take.
    private static let bodies = [
        "Backstore", "Target", "LogicalUnit", "Front", "PortGroup", "RateLimits", "AccessState", "ReadOnly",
        "TraceSettings", "LogLevel",
    ]

    private static let command = CommandStatus(
        ageMilliseconds: 0, initiator: "", tag: 0, operationCode: 0, lba: 0, blocks: 0, place: "", expired: false)

    /// A value of each kind that is told, with all that can be absent present.
    private static let samples: [(name: String, value: any Encodable & Sendable)] = [
        (
            "Status",
            {
                var status = Status(
                    version: "", ioEngine: "", reactors: [], backstores: [], targets: [], fronts: [])
                status.xen = XenStatus(waitsFor: nil, vhosts: [])
                return status
            }()
        ),
        ("XenStatus", XenStatus(waitsFor: "", vhosts: [])),
        (
            "XenVhostStatus",
            {
                var vhost = XenVhostStatus(domain: 0, vhost: 0, backendState: "", frontendState: "", devices: [])
                (vhost.reactor, vhost.fault) = (0, "")
                return vhost
            }()
        ),
        ("XenDeviceStatus", XenDeviceStatus(name: "", physicalDevice: "", virtualDevice: "", state: "")),
        ("ReactorStatus", ReactorStatus(index: 0)),
        ("BackstoreStatus", BackstoreStatus(name: "", type: "", path: "", size: 0, readOnly: false)),
        ("TargetStatus", TargetStatus(name: "", reactor: 0, luns: [])),
        (
            "PortGroupStatus",
            PortGroupStatus(id: 0, state: "", preferred: false, explicit: false, statusCode: "", ports: [])
        ),
        (
            "LogicalUnitStatus",
            {
                var unit = LogicalUnitStatus(
                    lun: 0, backstore: "", name: "", serial: "", size: 0, writeProtected: false)
                unit.oldest = command
                return unit
            }()
        ),
        ("CommandStatus", command),
        ("FrontStatus", FrontStatus(socket: "", reactor: 0, queues: 0, connected: false, targets: [:])),
        ("StatisticsReport", StatisticsReport(time: 0, units: [], nexuses: [])),
        ("UnitStatistics", UnitStatistics(target: "", lun: 0, backstore: "")),
        ("LatencyReport", LatencyReport(operation: "", sumNanoseconds: 0, buckets: [])),
        ("LatencyBucket", LatencyBucket(from: 0, to: 0, count: 0)),
        (
            "InitiatorReport",
            InitiatorReport(initiator: "", commands: [], bytesRead: 0, bytesWritten: 0, unitAttentions: 0)
        ),
        ("CommandCount", CommandCount(operation: "", status: "", count: 0)),
        (
            "NexusReport",
            NexusReport(target: "", initiator: "", connected: false, inFlight: 0, connections: 0, functions: [])
        ),
        ("FunctionCount", FunctionCount(function: "", count: 0)),
        (
            "TaskReport",
            TaskReport(
                target: "", lun: 0, initiator: "", tag: 0, cdb: "", attribute: "", state: "", waitsFor: "",
                aborted: false, ageNanoseconds: 0)
        ),
        ("TraceReport", TraceReport(target: "", lun: 0, capacity: 0, entries: [])),
        ("TraceCommand", traceCommand(sense: "")),
        ("ReservationReport", reservations(type: "", by: "")),
        ("RegistrantReport", registrant("")),
        ("ReservationState", ReservationState(name: "", state: "")),
        ("OperationStatus", operation(message: "")),
        ("EventReport", EventReport(sequence: 0, time: 0, kind: "", subject: "", text: "")),
        ("ChangeReport", ChangeReport(changes: [], warnings: [])),
        ("FailureReport", FailureReport(error: Failure(.failed, ""))),
        ("Failure", Failure(.failed, "")),
        ("ProblemReport", ProblemReport(severity: "", line: 0, key: "", text: "")),
    ]

    private static func traceCommand(sense: String?) -> TraceCommand {
        TraceCommand(
            sequence: 0, initiator: "", tag: 0, cdb: "", attribute: "", ageNanoseconds: 0, latencyNanoseconds: 0,
            status: "", sense: sense, bytes: 0)
    }

    private static func reservations(type: String?, by initiator: String?) -> ReservationReport {
        ReservationReport(
            target: "", lun: 0, type: type, generation: 0, persists: false, registrants: [], reservedBy: initiator,
            lost: false)
    }

    private static func registrant(_ initiator: String?) -> RegistrantReport {
        RegistrantReport(initiator: initiator, port: "", targetPort: 0, key: "", holds: false)
    }

    private static func operation(message: String?) -> OperationStatus {
        var operation = OperationStatus(id: 0, what: "")
        operation.message = message
        return operation
    }

    @Test func fieldsAreThoseThatAreWritten() throws {
        let schemas = document["components"]?["schemas"]
        #expect(keys(schemas) == Set(Self.samples.map(\.name)).union(Self.bodies))
        for (name, value) in Self.samples {
            let written = try JSONSerialization.jsonObject(with: JSON.encode(value)) as? [String: Any]
            #expect(keys(schemas?[name]?["properties"]) == Set(try #require(written).keys), "\(name)")
        }
    }

    @Test func fieldsThatMayBeAbsentAreNotRequired() throws {
        let schemas = document["components"]?["schemas"]
        let absent = [
            "Status": JSON.encode(
                Status(version: "", ioEngine: "", reactors: [], backstores: [], targets: [], fronts: [])),
            "XenStatus": JSON.encode(XenStatus(waitsFor: nil, vhosts: [])),
            "XenVhostStatus": JSON.encode(
                XenVhostStatus(domain: 0, vhost: 0, backendState: "", frontendState: "", devices: [])),
            "BackstoreStatus": JSON.encode(
                BackstoreStatus(name: "", type: "", path: nil, size: nil, readOnly: false)),
            "ProblemReport": JSON.encode(ProblemReport(severity: "", line: nil, key: "", text: "")),
            "TaskReport": JSON.encode(
                TaskReport(
                    target: "", lun: 0, initiator: "", tag: 0, cdb: "", attribute: "", state: "", waitsFor: nil,
                    aborted: false, ageNanoseconds: 0)),
            "TraceCommand": JSON.encode(Self.traceCommand(sense: nil)),
            "ReservationReport": JSON.encode(Self.reservations(type: nil, by: nil)),
            "RegistrantReport": JSON.encode(Self.registrant(nil)),
            "OperationStatus": JSON.encode(Self.operation(message: nil)),
            "EventReport": JSON.encode(EventReport(sequence: 0, time: 0, kind: "", subject: nil, text: "")),
            "LogicalUnitStatus": JSON.encode(
                LogicalUnitStatus(lun: 0, backstore: "", name: "", serial: "", size: 0, writeProtected: false)),
        ]
        for (name, value) in Self.samples {
            let least = try JSONSerialization.jsonObject(with: absent[name] ?? JSON.encode(value)) as? [String: Any]
            let required = schemas?[name]?["required"]?.sequence?.compactMap(\.string) ?? []
            #expect(Set(required) == Set(try #require(least).keys), "\(name)")
        }
    }

    @Test func kindsOfEventsAreThoseThatExist() {
        let kinds = document["components"]?["schemas"]?["EventReport"]?["properties"]?["kind"]?["enum"]?.sequence
        #expect(Set(kinds?.compactMap(\.string) ?? []) == Set(EventHub.Kind.allCases.map(\.rawValue)))
    }

    @Test func errorCodesAreThoseThatExist() {
        let codes = document["components"]?["schemas"]?["Failure"]?["properties"]?["code"]?["enum"]?.sequence
        #expect(Set(codes?.compactMap(\.string) ?? []) == Set(FailureCode.allCases.map(\.rawValue)))
    }

    @Test func limitsAreThoseOfTheServer() throws {
        let text = try #require(document["info"]?["description"]?.string)
        #expect(text.contains("at most \(ControlLimits().bodyBytes >> 20) MiB"))
        #expect(text.contains("within \(Int(ControlLimits().transferSeconds)) seconds"))
    }
}
