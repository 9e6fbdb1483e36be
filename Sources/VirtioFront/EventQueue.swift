// EventQueue: what a virtio-scsi device tells its driver unasked (virtio 1.3, 5.6.6.3): kept while the driver has no
// buffer, and given to it in order.
//
// Called by: the core (events of targets), VirtioSCSIDevice (targets that come and go, buffers). Must not know: the
// other queues, what an event is caused by.

import CLinux
import CTarget
import SCSICore

extension VirtioSCSIDevice {
    /// An event of a target for the guest (5.6.6.3), if the driver has negotiated that kind.
    func report(_ event: scsi_target_event, from number: UInt8) {
        let lun = VirtioSCSILUN.bytes(target: number, samField: LUN.field(event.lun))
        let hotplug = features & VirtioFeature.hotplug != 0
        switch Int32(event.kind) {
        case Int32(SCSI_EVENT_LOGICAL_UNIT_ADDED) where hotplug:
            enqueue(VIRTIO_SCSI_T_TRANSPORT_RESET, lun, UInt32(VIRTIO_SCSI_EVT_RESET_RESCAN))
        case Int32(SCSI_EVENT_LOGICAL_UNIT_REMOVED) where hotplug:
            enqueue(VIRTIO_SCSI_T_TRANSPORT_RESET, lun, UInt32(VIRTIO_SCSI_EVT_RESET_REMOVED))
        case Int32(SCSI_EVENT_HARD_RESET) where hotplug:
            enqueue(VIRTIO_SCSI_T_TRANSPORT_RESET, lun, UInt32(VIRTIO_SCSI_EVT_RESET_HARD))
        case Int32(SCSI_EVENT_EVENTS_MISSED):
            eventsMissed = true
            statistics.eventsMissed += 1
            deliverEvents()
        case Int32(SCSI_EVENT_PARAMETERS_CHANGED) where features & VirtioFeature.change != 0:
            let reason = UInt32(event.additional_sense_code) | UInt32(event.additional_sense_code_qualifier) << 8
            enqueue(VIRTIO_SCSI_T_PARAM_CHANGE, lun, reason)
        default: break
        }
        if Int32(event.kind) == Int32(SCSI_EVENT_LOGICAL_UNIT_REMOVED) { subscriptions[lun] = nil }
        if Int32(event.kind) == Int32(SCSI_EVENT_PARAMETERS_CHANGED), let wanted = subscriptions[lun] {
            let reason = AsynchronousEvent.reason(event.additional_sense_code) & wanted
            if reason != 0 { enqueue(VIRTIO_SCSI_T_ASYNC_NOTIFY, lun, reason) }
        }
    }

    func enqueue(_ event: Int32, _ lun: UInt64, _ reason: UInt32) {
        if events.count - eventsDelivered < Self.pendingEvents {
            events.append((event: UInt32(event), lun: lun, reason: reason))
        } else {
            eventsMissed = true
            statistics.eventsMissed += 1
        }
        deliverEvents()
    }

    /// Gives pending events to the driver as long as it has buffers.
    func deliverEvents() {
        guard let queue = running[Self.eventQueue], queue.isEnabled, !queue.isBroken, !isPaused else { return }
        defer { notify(queue) }
        while eventsDelivered < events.count || eventsMissed {
            switch queue.ring.pop() {
            case .nothing:
                // Buffers wake us only if they are asked for behind those that were taken.
                if queue.ring.wantNotifications() { continue }
                return
            case .broken(let fault): return breakQueue(queue, fault)
            case .chain(let slot):
                guard let response = unsafe slot.pointee.takeResponse(VirtioSCSILayout.event) else {
                    unsafe queue.ring.unpop(slot)
                    return breakQueue(queue, .header)
                }
                unsafe writeEvent(response, slot)
                unsafe queue.ring.pushUsed(slot, length: UInt32(VirtioSCSILayout.event))
            }
        }
    }

    private func nextEvent() -> (event: UInt32, lun: UInt64, reason: UInt32) {
        guard eventsDelivered < events.count else { return (event: UInt32(VIRTIO_SCSI_T_NO_EVENT), lun: 0, reason: 0) }
        defer {
            eventsDelivered += 1
            if eventsDelivered == events.count {
                events = []
                eventsDelivered = 0
            }
        }
        return events[eventsDelivered]
    }

    func writeEvent(_ response: ResponsePieces, _ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        let next = nextEvent()
        let event =
            next.event | (eventsMissed ? UInt32(bitPattern: Int32(truncatingIfNeeded: VIRTIO_SCSI_T_EVENTS_MISSED)) : 0)
        eventsMissed = false
        statistics.events += 1
        unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSILayout.event, alignment: 8) { bytes in
            unsafe bytes.storeBytes(of: event.littleEndian, as: UInt32.self)
            unsafe bytes.storeBytes(of: next.lun.bigEndian, toByteOffset: 4, as: UInt64.self)
            unsafe bytes.storeBytes(of: next.reason.littleEndian, toByteOffset: 12, as: UInt32.self)
            unsafe response.write(UnsafeRawBufferPointer(bytes))
        }
        if isLogging { unsafe note(response, slot) }
    }
}
