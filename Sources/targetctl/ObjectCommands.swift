// ObjectCommands: the commands of targetctl that add, change and take away single objects.
//
// Owns: their options. Called by: Targetctl. Must not know: how the daemon works.

import ArgumentParser
import ControlAPI
import Foundation

/// Paths of the control API.
enum Path {
    static func backstore(_ name: String) -> String { "/v1/backstores/\(encoded(name))" }
    static func target(_ name: String) -> String { "/v1/targets/\(encoded(name))" }
    static func unit(_ target: String, _ lun: Int) -> String { "\(Self.target(target))/luns/\(lun)" }
    static func front(_ socket: String) -> String { "/v1/fronts/\(encoded(socket))" }

    /// A name as one part of a path.
    static func encoded(_ name: String) -> String {
        let plain = CharacterSet(charactersIn: "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
        return name.addingPercentEncoding(withAllowedCharacters: plain) ?? name
    }
}

/// A value of a body.
enum Field: Encodable {
    case text(String)
    case number(UInt64)
    case truth(Bool)
    case object([String: Field])

    func encode(to encoder: any Encoder) throws {
        switch self {
        case .text(let value): try value.encode(to: encoder)
        case .number(let value): try value.encode(to: encoder)
        case .truth(let value): try value.encode(to: encoder)
        case .object(let value): try value.encode(to: encoder)
        }
    }
}

extension CommonOptions {
    /// Sends a change and shows what was changed.
    func change(_ method: String, _ path: String, _ body: [String: Field]? = nil) throws {
        _ = try show(
            method, path, body: body.map { JSON.encode(Field.object($0)) }, as: ChangeReport.self,
            { Text.changes($0, none: "Done. Nothing that runs had to change.") })
    }
}

/// A logical unit on the command line.
struct UnitArguments: ParsableArguments {
    @Argument(help: "The target, such as naa.60014054ac780582.") var target: String
    @Argument(help: "The logical unit number.") var lun: Int

    var path: String { Path.unit(target, lun) }

    func validate() throws {
        guard (0...16_383).contains(lun) else { throw ValidationError("The LUN must be from 0 to 16383.") }
    }
}

/// Limits on the command line.
struct LimitOptions: ParsableArguments {
    @Option(help: "Commands in a second.") var iops: UInt64?
    @Option(help: "Bytes in a second, such as 200MiB.") var bandwidth: String?
    @Option(help: "How long unused rate is saved, such as 2s (default: 100ms).") var burst: String?

    var isEmpty: Bool { iops == nil && bandwidth == nil && burst == nil }

    var body: [String: Field] {
        var fields: [String: Field] = [:]
        if let iops { fields["iops"] = .number(iops) }
        if let bandwidth { fields["bandwidth"] = .text(bandwidth) }
        if let burst { fields["burst"] = .text(burst) }
        return fields
    }
}

struct Add: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Add a backstore, a target, a logical unit or a socket.",
        subcommands: [AddBackstore.self, AddTarget.self, AddUnit.self, AddFront.self])
}

struct AddBackstore: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "backstore", abstract: "Add a medium. It is opened when a logical unit has it.")
    @Argument(help: "Its name.") var name: String
    @Option(help: "Memory of this size, such as 1GiB.") var ram: String?
    @Option(help: "A file.", completion: .file()) var file: String?
    @Option(help: "A block device.", completion: .file()) var blockDevice: String?
    @Option(help: "Create the file with this size if it does not exist.") var size: String?
    @Option(help: "Bytes of a logical block: 512 or 4096.") var blockSize: UInt64?
    @Flag(help: "Do I/O through the page cache of the host.") var buffered = false
    @Flag(help: "Open it for reading only.") var readOnly = false
    @OptionGroup var common: CommonOptions

    func validate() throws {
        guard [ram, file, blockDevice].count(where: { $0 != nil }) == 1 else {
            throw ValidationError("Give exactly one of --ram, --file and --block-device.")
        }
    }

    func run() throws {
        var body: [String: Field] = [:]
        if let ram { body = ["type": .text("ram"), "size": .text(ram)] }
        if let file { body = ["type": .text("file"), "path": .text(file)] }
        if let blockDevice { body = ["type": .text("block-device"), "path": .text(blockDevice)] }
        if let size { body["size"] = .text(size) }
        if let blockSize { body["block-size"] = .number(blockSize) }
        if buffered { body["buffered"] = .truth(true) }
        if readOnly { body["read-only"] = .truth(true) }
        try common.change("PUT", Path.backstore(name), body)
    }
}

struct AddTarget: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "target", abstract: "Add a target device without logical units.")
    @Argument(help: "Its name, such as naa.60014054ac780582.") var name: String
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("PUT", Path.target(name), [:]) }
}

struct AddUnit: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "lun", abstract: "Add a logical unit to a target. Its guests are told.")
    @OptionGroup var unit: UnitArguments
    @Argument(help: "The backstore that is its medium.") var backstore: String
    @Flag(help: "Refuse writes.") var readOnly = false
    @Flag(help: "The medium can be ejected, and another be put in; needs --name.") var removable = false
    @Option(help: "Its name, such as naa.3000000000000001.") var name: String?
    @Option(help: "Its serial number.") var serial: String?
    @OptionGroup var limits: LimitOptions
    @OptionGroup var common: CommonOptions

    func run() throws {
        var body: [String: Field] = ["backstore": .text(backstore)]
        if readOnly { body["read-only"] = .truth(true) }
        if removable { body["removable"] = .truth(true) }
        if let name { body["name"] = .text(name) }
        if let serial { body["serial"] = .text(serial) }
        if !limits.isEmpty { body["limits"] = .object(limits.body) }
        try common.change("PUT", unit.path, body)
    }
}

struct AddFront: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "front", abstract: "Make a vhost-user socket at which a guest attaches.")
    @Argument(help: "The path of the socket.", completion: .file()) var path: String
    @Option(help: "A target by its virtio-scsi target number, such as 0=naa.60014054ac780582.") var target: [String]
    @Option(help: "Request queues that the guest may use (default: 1).") var queues: UInt64?
    @Option(help: "Its relative target port identifier (default: 1).") var port: UInt64?
    @Flag(help: "Connect to the socket, where the front-end listens, instead of making it.") var client = false
    @OptionGroup var limits: LimitOptions
    @OptionGroup var common: CommonOptions

    func run() throws {
        var targets: [String: Field] = [:]
        for text in target {
            let parts = text.split(separator: "=", maxSplits: 1)
            guard parts.count == 2 else {
                throw CommonOptions.end(.usage, "\(text) is no target: write NUMBER=NAME")
            }
            targets[String(parts[0])] = .text(String(parts[1]))
        }
        var body: [String: Field] = ["targets": .object(targets)]
        if let queues { body["queues"] = .number(queues) }
        if let port { body["port"] = .number(port) }
        if client { body["mode"] = .text("client") }
        if !limits.isEmpty { body["limits"] = .object(limits.body) }
        try common.change("PUT", Path.front(path), body)
    }
}

struct Remove: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Take a backstore, a target, a logical unit or a socket away.",
        subcommands: [RemoveBackstore.self, RemoveTarget.self, RemoveUnit.self, RemoveFront.self])
}

struct RemoveBackstore: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "backstore", abstract: "Take a medium away that no logical unit has.")
    @Argument(help: "Its name.") var name: String
    @Flag(help: "Take the logical unit that has it away first, and abort its commands in flight.") var force = false
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("DELETE", Path.backstore(name) + (force ? "?force=true" : "")) }
}

struct RemoveTarget: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "target", abstract: "Take a target device and its logical units away.")
    @Argument(help: "Its name.") var name: String
    @Flag(help: "Take it away from its sockets first, and abort its commands in flight.") var force = false
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("DELETE", Path.target(name) + (force ? "?force=true" : "")) }
}

struct RemoveUnit: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "lun", abstract: "Take a logical unit away, once its commands in flight have ended.")
    @OptionGroup var unit: UnitArguments
    @Flag(help: "Abort its commands in flight.") var force = false
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("DELETE", unit.path + (force ? "?force=true" : "")) }
}

struct RemoveFront: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "front", abstract: "Take a socket away, once the commands of its guest have ended.")
    @Argument(help: "The path of the socket.", completion: .file()) var path: String
    @Flag(help: "Abort its guest's commands in flight; also of a removal that waits for them.") var force = false
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("DELETE", Path.front(path) + (force ? "?force=true" : "")) }
}

struct Limit: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Limit what may be done in a second at a logical unit or a socket; without options, nothing.",
        subcommands: [LimitUnit.self, LimitFront.self])
}

struct LimitUnit: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "lun", abstract: "Limit all initiators of a logical unit together.")
    @OptionGroup var unit: UnitArguments
    @OptionGroup var limits: LimitOptions
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("PUT", unit.path + "/limits", limits.body) }
}

struct LimitFront: ParsableCommand {
    static let configuration = CommandConfiguration(commandName: "front", abstract: "Limit the guest at a socket.")
    @Argument(help: "The path of the socket.", completion: .file()) var path: String
    @OptionGroup var limits: LimitOptions
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("PUT", Path.front(path) + "/limits", limits.body) }
}

struct Protect: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Protect a logical unit against writes, or with --off let it be written. Its guests are told.")
    @OptionGroup var unit: UnitArguments
    @Flag(help: "Let it be written.") var off = false
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("PUT", unit.path + "/read-only", ["read-only": .truth(!off)]) }
}

struct Reset: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Reset a logical unit: commands of all guests end, and all learn of it.")
    @OptionGroup var unit: UnitArguments
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("POST", unit.path + "/reset") }
}

struct Freeze: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Let nothing of a logical unit reach its medium; its commands wait, until it is thawed.")
    @OptionGroup var unit: UnitArguments
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("POST", unit.path + "/freeze") }
}

struct Thaw: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Let the commands of a frozen logical unit go on.")
    @OptionGroup var unit: UnitArguments
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("POST", unit.path + "/thaw") }
}

struct Eject: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Take the medium out of a removable logical unit. Its guests are told.",
        discussion: "To put another medium in, use: targetctl add lun TARGET LUN BACKSTORE --removable --name NAME")
    @OptionGroup var unit: UnitArguments
    @Flag(help: "Also if a guest prevents it.") var force = false
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("POST", unit.path + "/eject" + (force ? "?force=true" : "")) }
}

struct Load: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Put the medium of a removable logical unit in again. Its guests are told.")
    @OptionGroup var unit: UnitArguments
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("POST", unit.path + "/load") }
}

struct LogLevel: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "log-level", abstract: "Change the least severe messages that are logged.")
    @Argument(
        help: "trace, debug, info, notice, warning, error or critical.",
        completion: .list(["trace", "debug", "info", "notice", "warning", "error", "critical"]))
    var level: String
    @OptionGroup var common: CommonOptions

    func run() throws { try common.change("PUT", "/v1/log-level", ["level": .text(level)]) }
}
