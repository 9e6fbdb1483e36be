// XenRingFuzzer: a vhost's port with the core behind it, on a ring that a hostile guest fills and a second thread
// changes between the port's reads; devices come and go, and the daemon dies and comes back on the same ring.
//
// Oracles, beside that nothing traps and the sanitizer is content: as long as the guest writes only what it owns, each
// request is answered exactly once, and a function after the commands that it has ended; the port is idle at the end;
// all staging memory is given back, and nothing that lay in it comes to the guest; the copies name the guest's domain.
//
// Called by: libFuzzer. Must not know: how the port reads its ring.

import CXen
import SCSICore

@testable import XenFront
@testable import Xenbus

enum XenRingFuzzer {
    static func run(_ input: FuzzInput) {
        let world = XenRingWorld(input)
        world.act()
        world.finish()
    }
}

private final class XenRingWorld {
    private var input: FuzzInput
    private let guest = FuzzedXenGuest()
    private let core = FuzzedTarget()
    private let staging = StagingPool(bytes: 1)
    private let batch = GrantBatch()
    private let wholeTarget: Bool
    private let mutations: [Mutation]
    private var port: XenPort
    private var nexus: CoreNexus?
    private var attached: Set<Int> = []

    private static let devices = [
        VirtualDevice(channel: 0, target: 0, lun: 0), VirtualDevice(channel: 0, target: 1, lun: 0),
        VirtualDevice(channel: 0, target: 2, lun: 3),
    ]

    init(_ input: FuzzInput) {
        var input = input
        wholeTarget = input.flag()
        mutations = input.rarely(3) ? (0..<input.below(16)).map { _ in Mutation(&input) } : []
        guest.readOnly = UInt16(input.byte() & 3)
        self.input = input
        Self.hideSecrets(in: staging)
        port = XenPort(
            domain: FuzzedXenGuest.domain, wholeTarget: wholeTarget, grants: guest.grants, staging: staging,
            batch: batch)
        let record = unsafe InflightRecord(memory: guest.recordMemory)
        record.reset(FuzzedXenGuest.ring, requestConsumer: 0)
        port.connect(
            unsafe VSCSIIFRing(page: guest.page, requestConsumer: 0, responseProducer: 0), channel: guest.channel,
            record: record, recovered: [])
        attach(0)
    }

    private static func hideSecrets(in staging: StagingPool) {
        let bytes = staging.freePages * StagingPool.pageBytes
        let run = staging.allocate(bytes: bytes)
        for offset in stride(from: 0, to: bytes, by: 8) {
            unsafe (staging.memory(run) + offset).storeBytes(of: FuzzedXenGuest.secret, as: UInt64.self)
        }
        staging.free(run, bytes: bytes)
    }

    private func attach(_ device: Int) {
        let nexus = nexus ?? CoreNexus(target: core.target, initiatorPort: "guest", port: port.handle)!
        self.nexus = nexus
        if port.attach(Self.devices[device], unit: LUN(device & 1)!, nexus: nexus) { attached.insert(device) }
    }

    private func detach(_ device: Int) {
        guard attached.remove(device) != nil else { return }
        guest.hasLostDevices = true
        port.detach(Self.devices[device])
        if attached.isEmpty { nexus = nil }
    }

    func act() {
        let mutator = mutations.isEmpty ? nil : Mutator.shared
        mutator?.begin(mutations, guest)
        while !input.isEmpty {
            let action = input.below(16)
            Trace.note(
                "action \(action), \(guest.outstanding.count) requests outstanding, devices \(attached.sorted())")
            switch action {
            case 0..<6: guest.put(&input)
            case 6...8: turn()
            case 9, 10: core.complete(&input)
            case 11: attached.contains(input.below(3)) ? detach(input.below(3)) : attach(input.below(3))
            case 12: if input.rarely(4) { guest.poke(&input) }
            case 13: guest.granted = input.rarely(3) ? input.number() : .max
            case 14: core.toggleUnit()
            default: rarelyDone()
            }
        }
        turn()
        mutator?.end()
    }

    private func rarelyDone() {
        switch input.below(4) {
        case 0: guest.failures = input.below(3)
        case 1: comeBack()
        case 2:
            unsafe FuzzedTarget.shard.now += UInt64(input.byte()) * 1_000_000_000
            unsafe FuzzedTarget.shard.expireDeadlines()
        default:
            port.drain()
            core.completeAll()
            turn()
            comeBack()
        }
    }

    private func turn() {
        _ = port.poll()
        port.flush()
        _ = port.prepareToSleep()
        guest.takeAnswers()
    }

    /// The daemon is gone and another one comes: what the first had in flight is ended by its media without a word.
    private func comeBack() {
        let wasAttached = attached
        leave()
        let record = unsafe InflightRecord(memory: guest.recordMemory)
        let answered = unsafe VSCSIIFRing.answered(in: guest.page)
        guard let resumption = record.resume(FuzzedXenGuest.ring, answered: answered) else {
            // The front end's index cannot be: the vhost is closed.
            precondition(guest.isHostile, "an honest guest's requests are lost")
            input = FuzzInput([])
            return
        }
        port = XenPort(
            domain: FuzzedXenGuest.domain, wholeTarget: wholeTarget, grants: guest.grants, staging: staging,
            batch: batch)
        port.connect(
            unsafe VSCSIIFRing(
                page: guest.page, requestConsumer: resumption.requestConsumer, responseProducer: answered),
            channel: guest.channel, record: record, recovered: resumption.requests)
        for device in wasAttached.sorted() { attach(device) }
        port.startRecovered()
    }

    private func leave() {
        port.stop()
        core.completeAll()
        precondition(port.isIdle, "a port is not idle when all tasks have ended")
        port.disconnect()
        (nexus, attached) = (nil, [])
    }

    func finish() {
        guest.granted = .max
        for _ in 0..<16 {
            core.completeAll()
            turn()
        }
        Trace.note("at the end: executing \(port.executing), tasks \(core.unit.tasks(limit: 16))")
        precondition(guest.isHostile || port.fault == nil, "an honest guest is said to be hostile")
        precondition(guest.isHostile || guest.outstanding.isEmpty || attached.isEmpty, "requests were never answered")
        leave()
        guest.checkSecrets()
        precondition(staging.freePages == 128, "staging memory was not given back")
        core.checkIdle()
    }
}
