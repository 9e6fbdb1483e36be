// xen-target: one reactor, targets with disks from the command line, and the Xen front: what the end-to-end tests of
// the front run in dom0, without the daemon around it.
//
//   xen-target naa.60014054ac780582:0=ram:64 naa.60014054ac780582:1=file:/dev/shm/disk:64        (sizes in MiB)
//
// Called by: Tests/EndToEnd/xen. Must not know: what the tests do.

import Backstores
import Glibc
import Reactor
import SCSICore
import XenFront

/// A line on standard output, at once: a killed process loses what it has buffered.
func say(_ text: String) {
    let line = "xen-target: \(text)\n"
    _ = unsafe write(1, line, line.utf8.count)
}

func complain(_ text: String) -> Never {
    say("\(text)")
    exit(1)
}

/// A medium, kept as long as the process.
enum Medium {
    case ram(RAMBackstore)
    case file(FileBackstore)

    var handle: BackstoreHandle {
        switch self {
        case .ram(let disk): disk.handle
        case .file(let disk): disk.handle
        }
    }

    init(_ text: Substring, reactor: Reactor) throws {
        let parts = text.split(separator: ":")
        switch parts.first {
        case "ram" where parts.count == 2:
            self = .ram(try RAMBackstore(size: UInt64(parts[1])! << 20, reactor: reactor))
        case "file" where parts.count == 3:
            var options = FileBackstore.Options(path: String(parts[1]))
            options.size = UInt64(parts[2])! << 20
            options.create = true
            options.direct = false
            self = .file(try FileBackstore(options, reactor: reactor))
        default: complain("a disk is ram:<MiB> or file:<path>:<MiB>, not \(text)")
        }
    }
}

/// In a function of its own: closures in top-level code would belong to the main actor.
func serve() throws {
    var signals = sigset_t()
    unsafe sigemptyset(&signals)
    unsafe sigaddset(&signals, SIGTERM)
    unsafe sigaddset(&signals, SIGINT)
    unsafe pthread_sigmask(SIG_BLOCK, &signals, nil)

    let reactor = try Reactor(Reactor.Configuration())
    let shard = Shard()
    var media: [Medium] = []
    var targets: [UInt64: (target: TargetDevice, units: Set<UInt16>)] = [:]
    for argument in CommandLine.arguments.dropFirst() {
        let halves = argument.split(separator: "=", maxSplits: 1)
        let address = halves[0].dropFirst(4).split(separator: ":")
        guard halves.count == 2, address.count == 2, let name = UInt64(address[0], radix: 16),
            let number = UInt16(address[1])
        else { complain("say naa.<16 digits>:<lun>=<disk>, not \(argument)") }
        let medium = try Medium(halves[1], reactor: reactor)
        media.append(medium)
        if targets[name] == nil { targets[name] = (TargetDevice(name: name, shard: shard), []) }
        let unit = LogicalUnit(
            configuration: LogicalUnitConfiguration(name: name &+ UInt64(number) << 8, serial: "xen-\(number)"),
            backstore: medium.handle, shard: shard)
        guard targets[name]!.target.add(unit, at: LUN(Int(number))!) else { complain("\(halves[0]) twice") }
        targets[name]!.units.insert(number)
    }
    var configuration = XenFront.Configuration()
    configuration.stagingBytes = 16 << 20
    configuration.log = { vhost, text, isError in say("\(isError ? "error: " : "")vhost \(vhost): \(text)") }
    let front = try XenFront(configuration, reactors: [reactor])
    for (target, units) in targets.values { front.publish(target, reactor: 0, units: units) }

    // The core's clock, and tasks that wait for memory.
    let drive = unsafe Unmanaged.passRetained(Drive(reactor, shard)).toOpaque()
    _ = unsafe reactor.add(
        Reactor.WorkSource(
            poll: { unsafe Unmanaged<Drive>.fromOpaque($0)._withUnsafeGuaranteedRef { $0.poll() } }, flush: { _ in },
            prepareToSleep: { _ in false }, context: drive))
    try front.start()

    var thread = pthread_t()
    let stopper = unsafe Unmanaged.passRetained(Stopper(front, reactor, signals)).toOpaque()
    unsafe pthread_create(
        &thread, nil,
        { context in
            unsafe Unmanaged<Stopper>.fromOpaque(context!).takeRetainedValue().wait()
            return nil
        }, stopper)
    say("ready")
    withExtendedLifetime((media, targets, front)) { reactor.run() }
    say("stopped")
    exit(0)
}

do { try serve() } catch { complain("\(error)") }

/// Gives the core its clock, and lets tasks that wait try again.
final class Drive {
    private let reactor: Reactor
    private let shard: Shard
    init(_ reactor: Reactor, _ shard: Shard) { (self.reactor, self.shard) = (reactor, shard) }
    func poll() -> Bool {
        shard.now = reactor.now
        guard shard.hasWaiting else { return false }
        shard.retryWaiting()
        return true
    }
}

/// Waits for a signal that asks for the end.
final class Stopper {
    private let front: XenFront
    private let reactor: Reactor
    private var signals: sigset_t
    init(_ front: XenFront, _ reactor: Reactor, _ signals: sigset_t) {
        (self.front, self.reactor, self.signals) = (front, reactor, signals)
    }
    func wait() {
        var number: Int32 = 0
        unsafe sigwait(&signals, &number)
        front.stop { [reactor] in reactor.stop() }
    }
}
