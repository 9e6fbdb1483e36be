// DeviceQueue: a queue of a virtio-scsi device in service, a target of the device, and what handling them comes to.
//
// Owns: what belongs to a queue beside its ring: tasks, responses, flags. Called by: VirtioSCSIDevice. Must not know:
// vhost-user, what a command does.

import CTarget
import SCSICore

/// A queue in service.
@safe
final class DeviceQueue {
    let ring: Virtqueue
    /// Where to notify the guest, -1 for nowhere. The session closes it.
    var call: Int32
    let index: Int
    /// A task for each slot of a request queue.
    let pool: TaskPool
    unowned(unsafe) let device: VirtioSCSIDevice
    /// Where each slot's response goes.
    let responses: UnsafeMutablePointer<ResponsePieces?>
    /// Which target each slot's task management function waits for; used on the control queue only.
    let functions: UnsafeMutablePointer<UnsafeMutablePointer<DeviceTarget>?>
    /// Which target each slot's command was handed to.
    let targetNumbers: UnsafeMutablePointer<UInt8>
    /// The driver broke the rules: it is not served any more, what is in flight is still answered.
    var isBroken = false
    /// Whether the front-end wants it served (SET_VRING_ENABLE).
    var isEnabled = true
    /// The front-end has no way to notify us: the queue is looked at without pause.
    var mustPoll = false
    /// What is available waits for room in a link, which completions make; or, of functions, for queues with commands
    /// that are noted in flight.
    var isStalled = false
    /// It stops and does not wait for its commands: targets that are to be told so, and are not yet.
    var suspending: [UInt8] = []

    init(ring: Virtqueue, call: Int32, index: Int, device: VirtioSCSIDevice) {
        self.ring = ring
        self.call = call
        self.index = index
        unsafe self.device = device
        pool = TaskPool(capacity: ring.size, segmentsPerTask: 1)
        for slot in 0..<ring.size { unsafe pool[slot].command.group = UInt8(index) }
        unsafe responses = .allocate(capacity: ring.size)
        unsafe responses.initialize(repeating: nil, count: ring.size)
        unsafe functions = .allocate(capacity: ring.size)
        unsafe functions.initialize(repeating: nil, count: ring.size)
        unsafe targetNumbers = .allocate(capacity: ring.size)
        unsafe targetNumbers.initialize(repeating: 0, count: ring.size)
        unsafe ring.owner = Unmanaged.passUnretained(self)
    }

    deinit {
        unsafe responses.deallocate()
        unsafe functions.deallocate()
        unsafe targetNumbers.deallocate()
    }
}

/// A target of the device, at the address that the port seam has as its context.
@safe
struct DeviceTarget {
    let target: Unmanaged<TargetDevice>
    /// `nil`: the target is reached through `link`.
    var nexus: NexusIdentifier?
    let number: UInt8
    let device: Unmanaged<VirtioSCSIDevice>
    var link: Unmanaged<ShardLink>?
    var linkedNexus: Unmanaged<LinkedNexus>?
}

/// What became of a chain that was taken.
enum ChainOutcome {
    case done
    /// There is no room for it now: it goes back into the ring, and is taken again.
    case later
    case broken(VirtqueueFault)
}

/// What a queue's stop found.
enum QueueStop {
    case notInService
    /// Nothing was in flight; GET_VRING_BASE reports this.
    case drained(base: UInt32)
    /// Requests are in flight; `takeBase` has the answer when they have ended.
    case busy
}
