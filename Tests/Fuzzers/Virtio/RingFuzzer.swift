// RingFuzzer: a virtio-scsi device on rings of both formats that a hostile driver fills, and whose memory a second
// thread changes between the device's reads.
//
// Oracles, beside that nothing traps and the sanitizer is content: all that was taken from a ring is used exactly once
// or the ring is broken, nothing is in flight when the rings have stopped, nothing keeps the guest's memory mapped, and
// no file descriptor is left. Half of the inputs are a driver that keeps the rules: what must hold for that is in
// HonestDriver.
//
// Called by: libFuzzer. Must not know: how the device reads its rings.

import CFuzzer
import CoreTestSupport
import Glibc
import SCSICore
import Synchronization

@testable import VirtioFront

enum RingFuzzer {
    static func run(_ input: FuzzInput) {
        let before = OpenDescriptors()
        let guest = FuzzedGuest()
        serve(input, guest)
        guest.release()
        precondition(OpenDescriptors() == before, "a file descriptor was left open")
    }

    private static func serve(_ input: FuzzInput, _ guest: FuzzedGuest) {
        let world = RingWorld(input, guest)
        world.act()
        world.finish()
    }
}

private final class RingWorld {
    private var input: FuzzInput
    private let guest: FuzzedGuest
    private let core = FuzzedTarget()
    private let device: VirtioSCSIDevice
    private let memory: GuestMemory
    private let features: UInt64
    private let shape: RingShape
    private let goesAtOnce: Bool
    private let mutations: [Mutation]
    private let guards: [UInt]

    private static let guardBytes = 1 << 20

    init(_ input: FuzzInput, _ guest: FuzzedGuest) {
        self.guest = guest
        var input = input
        let choice = input.byte()
        var features = VirtioFeature.version1 | VirtioFeature.hotplug | VirtioFeature.change
        if choice & 1 != 0 { features |= VirtioFeature.ringPacked }
        if choice & 2 != 0 { features |= VirtioFeature.indirectDescriptors }
        if choice & 4 != 0 { features |= VirtioFeature.eventIndex }
        if choice & 8 != 0 { features |= VirtioFeature.inOrder }
        if choice & 0x80 != 0 { features |= VirtioFeature.inOut }
        self.features = features
        shape = RingShape(size: [16, 4, 128, 1][Int(choice >> 4 & 3)], isPacked: choice & 1 != 0)
        goesAtOnce = (choice & 0x15).nonzeroBitCount == 1
        let isHonest = choice & 0x80 != 0
        mutations = (0..<(choice & 0xc0 != 0 ? 0 : input.below(24))).map { _ in Mutation(&input) }
        if isHonest { guest.honest = HonestDriver(mayBeIndirect: choice & 2 != 0, isInOrder: choice & 8 != 0) }
        device = VirtioSCSIDevice(
            targets: [0: core.target], initiatorPort: "guest", queueCapacity: FuzzedGuest.rings,
            reactor: FuzzedTarget.reactor, statistics: VirtioFrontStatistics(), onFault: { _, _ in })
        device.setFeatures(features)
        var guards: [UInt] = []
        device.install(
            guest.regions.map {
                // Whoever reads on behind the end of a region shall find nothing there.
                guards.append(unsafe UInt(bitPattern: fuzzer_guard(Self.guardBytes, Int($0.size))!))
                return try! MemoryRegion(
                    guestAddress: $0.guestAddress, size: $0.size, userAddress: $0.userAddress, offset: 0,
                    descriptor: $0.descriptor)
            })
        memory = device.memory
        self.guards = guards
        self.input = input
        for ring in 0..<FuzzedGuest.rings { start(ring) }
    }

    deinit {
        for guardAddress in guards { unsafe munmap(UnsafeMutableRawPointer(bitPattern: guardAddress), Self.guardBytes) }
    }

    private func start(_ ring: Int) {
        guest.resetRing(ring, shape)
        let areas = unsafe Virtqueue.Areas(
            descriptors: pointer(FuzzedGuest.descriptorArea(ring)), available: pointer(FuzzedGuest.availableArea(ring)),
            used: pointer(FuzzedGuest.usedArea(ring)))
        let queue = try! Virtqueue(size: shape.size, memory: memory, areas: areas, base: nil, features: features)
        device.start(ring, ring: queue, call: -1, mustPoll: true)
    }

    /// Where the device has mapped the guest's memory, which is not where the driver has.
    @unsafe
    private func pointer(_ offset: Int) -> UnsafeMutableRawPointer {
        unsafe memory.piece(FuzzedGuest.guestAddress + UInt64(offset), 1)!.baseAddress!
    }

    func act() {
        let mutator = mutations.isEmpty ? nil : Mutator.shared
        mutator?.begin(mutations, guest)
        while !input.isEmpty {
            let action = input.below(12)
            Trace.note("action \(action)")
            switch action {
            case 0..<6: guest.put([2, 2, 3, 0, 0, 1][input.below(6)], &input)
            case 6, 7: turn()
            case 8: core.complete(&input)
            case 9: if guest.honest == nil { poke() }
            case 10: core.toggleUnit()
            default: restart(input.below(FuzzedGuest.rings))
            }
        }
        for _ in 0..<4 { turn() }
        mutator?.end()
        turn()
    }

    private func poke() { guest.store(input.number(UInt32.self), at: Int(input.number(UInt16.self))) }

    private func turn() {
        _ = device.poll()
        device.deliverEvents()
        device.flush()
        _ = device.prepareToSleep()
        guest.honest?.collect(guest)
    }

    /// The driver resets a ring.
    private func restart(_ ring: Int) {
        guard let queue = device.queue(ring) else { return }
        _ = device.stop(ring)
        if input.below(2) == 0 { device.losePatience() }
        core.completeAll()
        device.flush()
        guest.honest?.collect(guest)
        check(queue)
        start(ring)
    }

    /// What was taken has been used, each once: the positions where the device takes and where it puts are the same.
    private func check(_ queue: DeviceQueue) {
        let ring = queue.ring
        precondition(ring.inFlight == 0, "requests are in flight when all tasks have ended")
        precondition(ring.usedIndex == ring.lastAvailable, "what was taken was not used, or twice")
        guard ring.isPacked else { return }
        precondition(ring.usedWrap == ring.availableWrap && ring.descriptorsInFlight == 0, "used in another lap")
        precondition(ring.freeSlotCount == ring.size, "a slot was not given back")
    }

    /// A driver that keeps the rules gets everything back, and loses no queue.
    private func finish(_ honest: HonestDriver) {
        for _ in 0..<8 {
            turn()
            core.completeAll()
        }
        turn()
        honest.checkEverythingIsBack()
        for ring in 0..<FuzzedGuest.rings {
            precondition(device.queue(ring)?.isBroken == false, "an honest driver has lost a queue")
        }
    }

    func finish() {
        if goesAtOnce {
            // The front-end is gone while commands are in flight, and nobody is told.
            device.disconnect()
            core.completeAll()
            device.flush()
        } else {
            core.completeAll()
            device.flush()
            if let honest = guest.honest { finish(honest) }
            for ring in 0..<FuzzedGuest.rings {
                let queue = device.queue(ring)
                _ = device.stop(ring)
                if let queue { check(queue) }
            }
            device.disconnect()
        }
        precondition(device.isDrained && device.requestsInFlight == 0, "requests are in flight at the end")
        core.checkIdle()
        precondition(memory.references == 0, "somebody still leads into the guest's memory")
    }
}
