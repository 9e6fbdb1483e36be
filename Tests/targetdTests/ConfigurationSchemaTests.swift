// ConfigurationSchemaTests: Docs/configuration.schema.json has the keys and the words that the reader takes. Must not
// know: what they mean.

import Foundation
import Testing

@testable import targetd

@Suite struct ConfigurationSchemaTests {
    private let schema: [String: Any]

    init() throws {
        let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent().deletingLastPathComponent()
            .deletingLastPathComponent()
        let data = try Data(contentsOf: root.appendingPathComponent("Docs/configuration.schema.json"))
        schema = try #require(try JSONSerialization.jsonObject(with: data) as? [String: Any])
    }

    /// An object's schema by its name; the whole file's for none.
    private func object(_ name: String?) throws -> [String: Any] {
        guard let name else { return schema }
        let found = try #require((schema["definitions"] as? [String: Any])?[name] as? [String: Any], "\(name)")
        // A target may be empty.
        return (found["oneOf"] as? [[String: Any]])?.first { $0["properties"] != nil } ?? found
    }

    private func properties(_ name: String?) throws -> [String: Any] {
        try #require(try object(name)["properties"] as? [String: Any], "\(name ?? "")")
    }

    /// What the reader says is allowed where something is not: the words behind "allowed: ".
    private func allowed(_ yaml: String) throws -> Set<String> {
        let problems = ConfigurationReader.read(yaml, name: "f").problems
        let text = try #require(problems.compactMap { $0.text.split(separator: "allowed: ").last }.first, "\(problems)")
        return Set(text.split(separator: ", ").map(String.init))
    }

    @Test(arguments: [
        (nil, "colour: 1"), ("control", "control: { colour: 1 }"),
        ("ram", "backstores: { a: { type: ram, size: 1MiB, colour: 1 } }"),
        ("file", "backstores: { a: { type: file, path: /a, colour: 1 } }"),
        ("block-device", "backstores: { a: { type: block-device, path: /a, colour: 1 } }"),
        ("target", "targets: { naa.6000000000000001: { colour: 1 } }"),
        ("port-group", "targets: { naa.6000000000000001: { port-groups: [ { id: 1, ports: [1], colour: 1 } ] } }"),
        ("lun", "targets: { naa.6000000000000001: { luns: { 0: { backstore: a, colour: 1 } } } }"),
        ("limits", "vhost-user-scsi: [ { socket: /a, targets: {}, limits: { colour: 1 } } ]"),
        ("front", "vhost-user-scsi: [ { socket: /a, targets: {}, colour: 1 } ]"), ("xen", "xen: { colour: 1 }"),
    ])
    func keysAreThoseOfTheReader(name: String?, yaml: String) throws {
        #expect(Set(try properties(name).keys) == (try allowed(yaml)), "\(name ?? "the file")")
        #expect(try object(name)["additionalProperties"] as? Bool == false)
    }

    @Test(arguments: [
        (nil, "io-engine", "io-engine: x"), (nil, "log-level", "log-level: x"),
        ("ram", "block-size", "backstores: { a: { type: ram, size: 1MiB, block-size: x } }"),
        ("lun", "on-error", "targets: { naa.6000000000000001: { luns: { 0: { backstore: a, on-error: x } } } }"),
        (
            "port-group", "state",
            "targets: { naa.6000000000000001: { port-groups: [ { id: 1, ports: [1], state: x } ] } }"
        ),
        ("front", "mode", "vhost-user-scsi: [ { socket: /a, targets: {}, mode: x } ]"),
        ("xen", "enabled", "xen: { enabled: x }"),
    ])
    func wordsAreThoseOfTheReader(name: String?, key: String, yaml: String) throws {
        let property = try #require(try properties(name)[key] as? [String: Any])
        let values = try #require(property["enum"] as? [Any])
        let words = values.map { (value: Any) -> String in
            // A truth value is a word of the file as well.
            guard let number = value as? NSNumber else { return value as? String ?? "" }
            return number === (true as NSNumber) ? "true" : number === (false as NSNumber) ? "false" : "\(number)"
        }
        #expect(Set(words) == (try allowed(yaml)))
    }

    @Test(arguments: [
        ("control", "control: {}"), ("ram", "backstores: { a: { type: ram } }"),
        ("file", "backstores: { a: { type: file } }"), ("block-device", "backstores: { a: { type: block-device } }"),
        ("lun", "targets: { naa.6000000000000001: { luns: { 0: {} } } }"),
        ("port-group", "targets: { naa.6000000000000001: { port-groups: [ {} ] } }"),
        ("front", "vhost-user-scsi: [ {} ]"),
    ])
    func whatIsRequiredIsMissed(name: String, yaml: String) throws {
        let missed = ConfigurationReader.read(yaml, name: "f").problems.compactMap { problem in
            problem.text.split(separator: " has no ").last.flatMap { $0.split(separator: ":").first }.map(String.init)
                ?? problem.text
        }
        let required = Set(try #require(try object(name)["required"] as? [String])).subtracting(["type"])
        for key in required {
            #expect(missed.contains { $0.contains(key) || $0.contains("size") }, "\(key): \(missed)")
        }
    }

    @Test func numbersHaveTheBoundsOfTheReader() throws {
        func bounds(_ name: String?, _ key: String) throws -> ClosedRange<Int> {
            let property = try #require(try properties(name)[key] as? [String: Any])
            return try #require(property["minimum"] as? Int)...(try #require(property["maximum"] as? Int))
        }
        #expect(try bounds(nil, "reactors") == ConfigurationLimits.reactors)
        #expect(try bounds("front", "queues") == ConfigurationLimits.queues)
        #expect(try bounds("front", "port") == ConfigurationLimits.targetPorts)
        #expect(try bounds("xen", "port") == ConfigurationLimits.targetPorts)
        #expect(try bounds("port-group", "id") == ConfigurationLimits.portGroupIdentifiers)
        #expect(try bounds("limits", "iops") == ConfigurationLimits.operationsPerSecond)
    }
}
