// PassthroughNexus: the way of a vhost's commands to SCSI devices of this host, past the core.
//
// Owns: the devices of one host target that a vhost has, and their commands under way. Called by: XenPort, and the
// reactor when commands have ended; all on the reactor's thread. Must not know: the ring.
//
// What the kernel cannot do, is not pretended: there is no abort of one command, so an abort resets the device, and is
// answered when that is done and the command has ended.

import CLinux
import CTarget
import CXen
import Reactor
import SCSICore

/// Devices of this host, given to a guest.
@safe
final class PassthroughNexus: TargetNexus {
    /// Opens a logical unit of the host target.
    typealias Open = (_ lun: UInt16) throws(VhostError) -> any HostDevice

    private final class Unit {
        let device: any HostDevice
        /// Commands that wait for room in sg, in their order.
        var queue: [Int] = []
        var watch: DescriptorToken?
        unowned let nexus: PassthroughNexus

        init(_ device: any HostDevice, _ nexus: PassthroughNexus) { (self.device, self.nexus) = (device, nexus) }
    }

    private enum Stage { case none, queued, sent }

    private struct Command {
        var stage = Stage.none
        var lun: UInt16 = 0
        var tag: UInt64 = 0
        var task: TaskHandle?
    }

    /// A task management function under way: it waits for the reset, then for what was sent before it.
    private struct Function {
        let cookie: UInt64
        var isReset = false
        var succeeded = true
        var waitsFor: Set<Int>
    }

    private let reactor: Reactor
    private unowned let port: XenPort
    private let open: Open
    private var units: [UInt16: Unit] = [:]
    private var commands = [Command](repeating: Command(), count: VSCSIIFLimits.requests)
    private var functions: [UInt64: Function] = [:]
    private var nextFunction: UInt64 = 0

    /// - Parameter port: Gets the completions; it outlives the nexus.
    init(port: XenPort, reactor: Reactor, open: @escaping Open) {
        (self.port, self.reactor, self.open) = (port, reactor, open)
    }

    deinit { closeAll() }

    /// A command may have been carried out before the daemon that sent it died, and what it was is not known.
    override var repeatsSafely: Bool { false }

    /// Makes a logical unit reachable.
    func add(_ lun: UInt16) throws(VhostError) {
        guard units[lun] == nil else { return }
        let unit = Unit(try open(lun), self)
        do {
            if unit.device.descriptor >= 0 {
                unit.watch = try unsafe reactor.watch(
                    unit.device.descriptor, events: EPOLLIN.rawValue,
                    { context, _ in
                        unsafe Unmanaged<Unit>.fromOpaque(context)._withUnsafeGuaranteedRef { $0.nexus.collect($0) }
                    }, Unmanaged.passUnretained(unit).toOpaque())
            }
        } catch {
            unit.device.close()
            throw VhostError(text: "the device cannot be watched: \(error)")
        }
        units[lun] = unit
    }

    private func closeAll() {
        for unit in units.values {
            if let watch = unit.watch { reactor.unwatch(watch) }
            unit.device.close()
        }
        units = [:]
    }

    // MARK: Commands

    override func receive(_ task: TaskHandle) {
        let slot = Int(unsafe task.command.cookie)
        let lun = unsafe Self.number(task.command.lun)
        precondition(commands[slot].stage == .none)
        guard let unit = units[lun] else {
            return port.completeForeign(slot, .host(UInt8(XEN_VSCSIIF_RSLT_HOST_NO_CONNECT)))
        }
        let length = unsafe Int(task.command.cdb_length)
        let isAllowed = unsafe withUnsafeBytes(of: task.command.cdb) { bytes in
            unsafe PassthroughPolicy.allows(
                UnsafeBufferPointer(rebasing: bytes.bindMemory(to: UInt8.self)[..<length]), type: unit.device.type)
        }
        guard isAllowed else { return port.refuseForeign(slot, sense: PassthroughPolicy.refusal) }
        commands[slot] = Command(stage: .queued, lun: lun, tag: unsafe task.command.tag, task: task)
        unit.queue.append(slot)
        send(unit)
    }

    /// Sends what waits, as far as there is room.
    private func send(_ unit: Unit) {
        while let slot = unit.queue.first {
            switch unsafe unit.device.submit(hostCommand(slot)) {
            case .full: return
            case .accepted: commands[slot].stage = .sent
            case .refused: end(slot, .host(UInt8(XEN_VSCSIIF_RSLT_HOST_ERROR)))
            }
            unit.queue.removeFirst()
        }
    }

    private func hostCommand(_ slot: Int) -> HostCommand {
        let command = unsafe commands[slot].task!.command
        let toDevice = unsafe command.data_out_length > 0
        let segment = unsafe toDevice ? command.data_out : command.data_in
        return unsafe HostCommand(
            slot: slot, cdb: port.cdb(of: slot), cdbLength: Int(command.cdb_length), toDevice: toDevice,
            data: segment?.pointee.iov_base, length: segment.map { unsafe Int($0.pointee.iov_len) } ?? 0,
            sense: port.senseBuffer(of: slot), timeoutMilliseconds: command.timeout_milliseconds)
    }

    /// Fetches what has ended.
    private func collect(_ unit: Unit) {
        while let completion = unit.device.next() {
            guard commands.indices.contains(completion.slot), commands[completion.slot].stage == .sent else { continue }
            end(completion.slot, .status(completion))
        }
        send(unit)
    }

    private func end(_ slot: Int, _ result: ForeignResult) {
        commands[slot] = Command()
        port.completeForeign(slot, result)
        for (key, function) in functions where function.waitsFor.contains(slot) {
            functions[key]!.waitsFor.remove(slot)
            finish(key)
        }
    }

    /// Takes a command that was not sent yet out of the queue.
    private func withdraw(_ slot: Int, _ host: Int32) {
        units[commands[slot].lun]?.queue.removeAll { $0 == slot }
        end(slot, .host(UInt8(host)))
    }

    // MARK: Task management

    override func receive(_ request: scsi_task_management_request) {
        let lun = Self.number(request.lun)
        switch Int32(request.function) {
        case Int32(SCSI_ABORT_TASK): abort(request.tag, cookie: request.cookie)
        case Int32(SCSI_LOGICAL_UNIT_RESET): reset(lun, wholeTarget: false, cookie: request.cookie)
        case Int32(SCSI_TARGET_RESET): reset(lun, wholeTarget: true, cookie: request.cookie)
        default: port.completeManagement(cookie: request.cookie, response: UInt8(SCSI_FUNCTION_REJECTED))
        }
    }

    private func abort(_ tag: UInt64, cookie: UInt64) {
        guard let slot = commands.firstIndex(where: { $0.stage != .none && $0.tag == tag }) else {
            return port.completeManagement(cookie: cookie, response: UInt8(SCSI_FUNCTION_COMPLETE))
        }
        if commands[slot].stage == .queued {
            withdraw(slot, XEN_VSCSIIF_RSLT_HOST_ABORT)
            return port.completeManagement(cookie: cookie, response: UInt8(SCSI_FUNCTION_COMPLETE))
        }
        start(Function(cookie: cookie, waitsFor: [slot]), units[commands[slot].lun]!, wholeTarget: false)
    }

    private func reset(_ lun: UInt16, wholeTarget: Bool, cookie: UInt64) {
        guard let unit = units[lun] ?? (wholeTarget ? units.values.first : nil) else {
            return port.completeManagement(
                cookie: cookie, response: UInt8(SCSI_FUNCTION_INCORRECT_LOGICAL_UNIT_NUMBER))
        }
        let affected = commands.indices.filter {
            commands[$0].stage != .none && (wholeTarget || commands[$0].lun == lun)
        }
        for slot in affected where commands[slot].stage == .queued { withdraw(slot, XEN_VSCSIIF_RSLT_HOST_RESET) }
        let sent = affected.filter { commands[$0].stage == .sent }
        start(Function(cookie: cookie, waitsFor: Set(sent)), unit, wholeTarget: wholeTarget)
    }

    private func start(_ function: Function, _ unit: Unit, wholeTarget: Bool) {
        nextFunction += 1
        let key = nextFunction
        functions[key] = function
        // Comes back to this thread before it is used, and then only if the nexus is still there.
        nonisolated(unsafe) weak let nexus = self
        unit.device.reset(wholeTarget: wholeTarget) { [reactor] succeeded in
            reactor.post { unsafe nexus?.wasReset(key, succeeded) }
        }
    }

    private func wasReset(_ key: UInt64, _ succeeded: Bool) {
        guard functions[key] != nil else { return }
        functions[key]!.isReset = true
        functions[key]!.succeeded = succeeded
        // Not reset: its commands go on, and nobody waits for them.
        if !succeeded { functions[key]!.waitsFor = [] }
        finish(key)
    }

    private func finish(_ key: UInt64) {
        guard let function = functions[key], function.isReset, function.waitsFor.isEmpty else { return }
        functions[key] = nil
        let response = function.succeeded ? SCSI_FUNCTION_COMPLETE : SCSI_FUNCTION_REJECTED
        port.completeManagement(cookie: function.cookie, response: UInt8(response))
    }

    override func lose() {
        closeAll()
        let unfinished = functions.values.map(\.cookie)
        functions = [:]
        for cookie in unfinished { port.completeManagement(cookie: cookie, response: UInt8(SCSI_FUNCTION_REJECTED)) }
        for slot in commands.indices where commands[slot].stage != .none {
            end(slot, .host(UInt8(XEN_VSCSIIF_RSLT_HOST_RESET)))
        }
    }

    /// A logical unit number out of a LUN field.
    private static func number(_ lun: (UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8, UInt8)) -> UInt16 {
        UInt16(lun.0 & 0x3f) << 8 | UInt16(lun.1)
    }
}
