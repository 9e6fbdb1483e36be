// XenCommands: targetctl xen: the toolstack's side of vscsi, which xl does not know.
//
// Owns: these commands. Called by: the system. Must not know: the daemon: both meet in xenstore only.

import ArgumentParser
import ControlAPI
import Foundation
import Xenbus

struct Xen: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Attach disks to Xen guests, and take them away.",
        discussion: """
            A device is written pdev,vdev as in SUSE's xl. pdev is a unit of a target of targetd \
            (naa.60014054ac780582:0), or a SCSI device of this host (1:0:0:0 or /dev/sdb). vdev is where the guest \
            sees it, vhost:channel:target:lun. These commands need no targetd to answer, only xenstore.
            """,
        subcommands: [XenAttach.self, XenDetach.self, XenList.self, XenWait.self])
}

/// What every Xen command takes.
struct XenOptions: ParsableArguments {
    @Option(help: "The domain that targetd runs in: a number or a name.") var backend = "0"

    /// The toolstack, with its connection to xenstore.
    func connect() throws -> XenSession {
        let client: XenStoreClient
        do {
            client = try XenStoreClient()
        } catch {
            throw CommonOptions.end(
                .unreachable, "\(error). Is this a domain of Xen's with xenstored, and are you root?")
        }
        let session = XenSession(client: client, toolstack: Toolstack(store: client, backendDomain: 0))
        let domain = try session.attempt { toolstack throws(ToolstackError) in try toolstack.domain(backend) }
        return XenSession(client: client, toolstack: Toolstack(store: client, backendDomain: domain))
    }
}

/// How long to wait.
struct WaitOptions: ParsableArguments {
    @Option(help: "Seconds to wait for both ends.") var timeout = 60.0
    @Flag(help: "Print nothing while waiting.") var quiet = false

    func validate() throws {
        guard timeout >= 0, timeout <= 86_400 else { throw ValidationError("--timeout must be from 0 to 86400.") }
    }
}

/// A connection to xenstore, and what is done over it.
struct XenSession {
    let client: XenStoreClient
    let toolstack: Toolstack

    /// Does something; an error ends the process, with the reason on standard error.
    func attempt<Value>(_ body: (Toolstack) throws(ToolstackError) -> Value) throws -> Value {
        do throws(ToolstackError) {
            return try body(toolstack)
        } catch {
            throw Self.end(error)
        }
    }

    static func end(_ error: ToolstackError) -> ExitCode {
        let status: ExitStatus =
            switch error.kind {
            case .notFound: .notFound
            case .conflict: .conflict
            case .refused, .store: .failed
            case .timeout: .timeout
            }
        return CommonOptions.end(status, error.text)
    }

    /// Waits until `look` is no longer waiting, and tells what happens meanwhile.
    ///
    /// - Parameter advice: Why it may not go on; asked after the time-out.
    func wait(
        _ options: WaitOptions, for what: String, _ look: (Toolstack) throws(ToolstackError) -> ToolstackProgress,
        advice: (Toolstack) throws(ToolstackError) -> String
    ) throws {
        // Any change of any vhost is a reason to look again.
        let root = "/local/domain/\(toolstack.backendDomain)/backend/vscsi"
        do { try client.watch(root, token: "targetctl") } catch { throw Self.end(ToolstackError(.store, "\(error)")) }
        defer { client.unwatch(root, token: "targetctl") }
        let deadline = Date(timeIntervalSinceNow: options.timeout)
        var told = ""
        while true {
            while client.nextEvent() != nil {}
            switch try attempt(look) {
            case .done: return
            case .failed(let reason): throw Self.end(ToolstackError(.refused, reason))
            case .waiting(let state):
                if state != told && !options.quiet { CommonOptions.complain(state) }
                told = state
            }
            let left = deadline.timeIntervalSinceNow
            guard left > 0 else {
                let reason = try attempt(advice)
                throw Self.end(
                    ToolstackError(.timeout, "\(what) has not happened in \(Int(options.timeout)) s: \(reason)"))
            }
            // The front end's nodes are not watched: what changes there, our end follows in a moment.
            _ = client.waitForEvent(milliseconds: Int32(min(left, 1) * 1000))
        }
    }
}

struct XenAttach: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "attach", abstract: "Attach devices to a guest, all of them or none, and wait for them.")
    @Argument(help: "The guest: its number or its name.") var domain: String
    @Argument(help: "Devices: pdev,vdev or pdev,vdev,feature-host.") var devices: [String]
    @Flag(help: "Do not wait: the guest is not running yet.") var noWait = false
    @OptionGroup var xen: XenOptions
    @OptionGroup var waiting: WaitOptions

    func run() throws {
        let specifications = try devices.map { text in
            do throws(DeviceSpecification.Mistake) {
                return try DeviceSpecification(parsing: text)
            } catch {
                throw ValidationError(error.text)
            }
        }
        let session = try xen.connect()
        let guest = try session.attempt { toolstack throws(ToolstackError) in try toolstack.domain(domain) }
        var attached: [AttachedDevice]?
        try session.wait(waiting, for: "the end of another change") { toolstack throws(ToolstackError) in
            attached = try toolstack.attach(specifications, to: guest)
            return attached == nil ? .waiting("another change is under way") : .done
        } advice: { _ in
            "the vhost is in the middle of another change, or about to close"
        }
        guard let attached, !noWait else { return }
        try session.wait(waiting, for: "attaching") { toolstack throws(ToolstackError) in
            try toolstack.progress(of: attached)
        } advice: { toolstack throws(ToolstackError) in
            try toolstack.advice(attached[0].vhost) + "; the nodes are written, targetctl xen wait waits on"
        }
    }
}

struct XenDetach: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "detach",
        abstract: "Take a device away from a guest; with its last device a vhost goes too.")
    @Argument(help: "The guest: its number or its name.") var domain: String
    @Argument(help: "The device: its vdev or its pdev.") var device: String?
    @Option(help: "Take away this vhost with all of its devices.") var vhost: UInt32?
    @OptionGroup var xen: XenOptions
    @OptionGroup var waiting: WaitOptions

    func validate() throws {
        if (device == nil) == (vhost == nil) { throw ValidationError("Name a device, or a vhost with --vhost.") }
    }

    func run() throws {
        let session = try xen.connect()
        let guest = try session.attempt { toolstack throws(ToolstackError) in try toolstack.domain(domain) }
        var begun: Detachment?
        try session.wait(waiting, for: "the end of another change") { toolstack throws(ToolstackError) in
            begun = try begin(toolstack, guest)
            return begun == nil ? .waiting("another change is under way") : .done
        } advice: { _ in
            "the vhost is in the middle of another change"
        }
        guard let begun else { return }
        try session.wait(waiting, for: "detaching") { toolstack throws(ToolstackError) in
            try toolstack.progress(of: begun)
        } advice: { _ in
            "the guest still uses it, or its driver does not answer; the request stands"
        }
        try session.attempt { toolstack throws(ToolstackError) in try toolstack.clean(begun) }
    }

    private func begin(_ toolstack: Toolstack, _ guest: UInt16) throws(ToolstackError) -> Detachment? {
        if let device { return try toolstack.detach(device, from: guest) }
        let identifier = VhostIdentifier(domain: guest, number: vhost!)
        guard try toolstack.nodes(identifier).backendState != nil else {
            throw ToolstackError(.notFound, "domain \(guest) has no vhost \(identifier.number)")
        }
        return try toolstack.detach(identifier, nil)
    }
}

struct XenList: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "list", abstract: "List the vhosts and devices of one guest, or of all.")
    @Argument(help: "The guest: its number or its name.") var domain: String?
    @Flag(help: "Print it in JSON.") var json = false
    @OptionGroup var xen: XenOptions

    func run() throws {
        let session = try xen.connect()
        let vhosts = try session.attempt { toolstack throws(ToolstackError) in
            let guest = try domain.map { name throws(ToolstackError) in try toolstack.domain(name) }
            return try toolstack.vhosts(of: guest)
        }
        print(json ? String(decoding: JSON.encode(vhosts.map(Self.report)), as: UTF8.self) : Text.vhosts(vhosts))
    }

    /// One vhost as xenstore has it.
    private struct Report: Encodable {
        struct Device: Encodable {
            var name: String
            var physicalDevice: String
            var virtualDevice: String
            var state: String
            var error: String?
        }

        var domain: Int
        var vhost: Int
        var backendState: String
        var frontendState: String
        var error: String?
        var devices: [Device]
    }

    private static func report(_ vhost: VhostIdentifier, _ nodes: VhostNodes) -> Report {
        Report(
            domain: Int(vhost.domain), vhost: Int(vhost.number), backendState: "\(nodes.backendState ?? .unknown)",
            frontendState: nodes.frontendState.map { "\($0)" } ?? "absent", error: nodes.error,
            devices: nodes.devices.map {
                Report.Device(
                    name: $0.name, physicalDevice: $0.physicalDevice, virtualDevice: $0.virtualDevice,
                    state: "\($0.state)", error: $0.error)
            })
    }
}

struct XenWait: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "wait", abstract: "Wait until all devices of a guest are connected.")
    @Argument(help: "The guest: its number or its name.") var domain: String
    @OptionGroup var xen: XenOptions
    @OptionGroup var waiting: WaitOptions

    func run() throws {
        let session = try xen.connect()
        let guest = try session.attempt { toolstack throws(ToolstackError) in try toolstack.domain(domain) }
        let devices = try session.attempt { toolstack throws(ToolstackError) in
            try toolstack.vhosts(of: guest).flatMap { vhost, nodes in
                nodes.devices.map { AttachedDevice(vhost: vhost, name: $0.name) }
            }
        }
        guard let first = devices.first else {
            throw XenSession.end(ToolstackError(.notFound, "domain \(guest) has no devices"))
        }
        try session.wait(waiting, for: "attaching") { toolstack throws(ToolstackError) in
            try toolstack.progress(of: devices)
        } advice: { toolstack throws(ToolstackError) in
            try toolstack.advice(first.vhost)
        }
    }
}

extension Text {
    static func vhosts(_ vhosts: [(vhost: VhostIdentifier, nodes: VhostNodes)]) -> String {
        let rows = vhosts.flatMap { vhost, nodes -> [[String]] in
            let front = nodes.frontendState.map { "\($0)" } ?? "absent"
            let head = ["\(vhost.domain)", "\(vhost.number)", "\(nodes.backendState ?? .unknown)", front]
            guard !nodes.devices.isEmpty else { return [head + ["", "", "", nodes.error ?? ""]] }
            return nodes.devices.map {
                head + [$0.virtualDevice, $0.physicalDevice, "\($0.state)", $0.error ?? nodes.error ?? ""]
            }
        }
        return table(
            ["DOMAIN", "VHOST", "BACK END", "FRONT END", "VDEV", "PDEV", "STATE", "ERROR"], rows, right: [0, 1])
    }
}
