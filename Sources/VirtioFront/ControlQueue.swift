// ControlQueue: the requests of a virtio-scsi device's control queue (virtio 1.3, 5.6.6.2): task management functions
// and asynchronous notifications.
//
// Called by: VirtioSCSIDevice (chains), the core (answers). Must not know: how a function is carried out, the events
// themselves.

import CLinux
import CTarget
import SCSICore

extension VirtioSCSIDevice {
    /// Carries a request of the control queue out (5.6.6.2).
    func control(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> ChainOutcome {
        var type: UInt32 = 0
        guard unsafe withUnsafeMutableBytes(of: &type, { unsafe slot.pointee.takeHeader($0) }) else {
            return .broken(.header)
        }
        switch Int32(bitPattern: UInt32(littleEndian: type)) {
        case VIRTIO_SCSI_T_TMF: return unsafe taskManagement(queue, slot)
        case VIRTIO_SCSI_T_AN_QUERY:
            return unsafe asynchronousNotification(queue, slot, isSubscription: false)
        case VIRTIO_SCSI_T_AN_SUBSCRIBE:
            return unsafe asynchronousNotification(queue, slot, isSubscription: true)
        default:
            // Nothing says how its response looks: the buffer goes back without one.
            unsafe queue.ring.pushUsed(slot, length: 0)
            return .done
        }
    }

    private func taskManagement(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> ChainOutcome {
        guard let response = unsafe slot.pointee.takeResponse(1) else { return .broken(.header) }
        // A command that is noted in flight has been sent before it, and comes when its queue is in service.
        guard withheld.isEmpty, takeCommands() else { return .later }
        unsafe queue.responses[Int(slot.pointee.number)] = response
        statistics.taskManagementFunctions += 1
        var request = scsi_task_management_request()
        request.struct_size = UInt32(MemoryLayout<scsi_task_management_request>.size)
        request.cookie = UInt64(UInt(bitPattern: slot))
        var entry: UnsafeMutablePointer<DeviceTarget>?
        var answer: VirtioSCSIResponse?
        unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSILayout.taskManagementRest, alignment: 8) { rest in
            guard unsafe slot.pointee.takeHeader(rest) else { return answer = .failure }
            let subtype = unsafe UInt32(littleEndian: rest.loadUnaligned(as: UInt32.self))
            let lun = unsafe VirtioSCSILUN(
                bytes: UInt64(bigEndian: rest.loadUnaligned(fromByteOffset: 4, as: UInt64.self)))
            unsafe request.tag = UInt64(littleEndian: rest.loadUnaligned(fromByteOffset: 12, as: UInt64.self))
            unsafe withUnsafeMutableBytes(of: &request.lun) {
                unsafe $0.storeBytes(of: lun.samField.bigEndian, as: UInt64.self)
            }
            unsafe entry = unsafe target(lun)
            if unsafe entry == nil { answer = missing(lun) }
            guard let function = VirtioSCSIResponse.function(subtype: subtype) else {
                return answer = .functionRejected
            }
            request.function = function.rawValue
        }
        if let answer {
            unsafe finishControl(slot, [answer.rawValue])
        } else {
            let entry = unsafe entry!
            unsafe queue.functions[Int(slot.pointee.number)] = entry
            if let nexus = unsafe entry.pointee.nexus {
                unsafe entry.pointee.target._withUnsafeGuaranteedRef { $0.receive(request, nexus: nexus) }
            } else if unsafe !entry.pointee.link!._withUnsafeGuaranteedRef({ link in
                unsafe entry.pointee.linkedNexus!._withUnsafeGuaranteedRef { link.send(request, nexus: $0) }
            }) {
                unsafe finishControl(slot, [VirtioSCSIResponse.busy.rawValue])
            }
        }
        return .done
    }

    /// AN_QUERY and AN_SUBSCRIBE (5.6.6.2): which of the events asked for a logical unit reports, and from now on does.
    private func asynchronousNotification(
        _ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>, isSubscription: Bool
    ) -> ChainOutcome {
        guard let response = unsafe slot.pointee.takeResponse(5) else { return .broken(.header) }
        unsafe queue.responses[Int(slot.pointee.number)] = response
        unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSILayout.asynchronousNotificationRest, alignment: 8) {
            rest in
            var code = VirtioSCSIResponse.failure
            var granted: UInt32 = 0
            if unsafe slot.pointee.takeHeader(rest) {
                let lun = unsafe VirtioSCSILUN(bytes: UInt64(bigEndian: rest.loadUnaligned(as: UInt64.self)))
                let requested = unsafe UInt32(littleEndian: rest.loadUnaligned(fromByteOffset: 8, as: UInt32.self))
                (code, granted) = subscribe(lun, requested, isSubscription: isSubscription)
            }
            unsafe finishControl(slot, VhostUserMessage.bytes(granted) + [code.rawValue])
        }
        return .done
    }

    private func subscribe(
        _ lun: VirtioSCSILUN, _ requested: UInt32, isSubscription: Bool
    ) -> (VirtioSCSIResponse, UInt32) {
        guard let entry = unsafe target(lun), let number = lun.target else { return (missing(lun), 0) }
        // Both ways to write a LUN name one unit; its events carry the one that REPORT LUNS has.
        let target = unsafe entry.pointee.target.takeUnretainedValue()
        let unit = onOwner(of: target) {
            target.logicalUnits.first { LUN.parse(lun.samField) == .unit($0.lun) }?.lun
        }
        guard let unit else { return (.incorrectLUN, 0) }
        let granted = requested & AsynchronousEvent.supported
        guard isSubscription else { return (.ok, granted) }
        let address = VirtioSCSILUN.bytes(target: number, samField: unit.field)
        guard granted != 0 else {
            subscriptions[address] = nil
            return (.ok, 0)
        }
        guard subscriptions[address] != nil || subscriptions.count < Self.subscriptionCapacity else {
            return (.busy, 0)
        }
        subscriptions[address] = granted
        return (.ok, granted)
    }

    static func completeTaskManagement(cookie: UInt64, response: UInt8) {
        // None: a suspension, which nobody waits for.
        guard let slot = unsafe UnsafeMutablePointer<VirtqueueSlot>(bitPattern: UInt(cookie)) else { return }
        unsafe slot.pointee.queue._withUnsafeGuaranteedRef { ring in
            unsafe ring.owner.unsafelyUnwrapped._withUnsafeGuaranteedRef { queue in
                unsafe queue.device.finishControl(slot, [VirtioSCSIResponse(function: response).rawValue])
            }
        }
    }

    func finishControl(_ slot: UnsafeMutablePointer<VirtqueueSlot>, _ bytes: [UInt8]) {
        unsafe slot.pointee.queue._withUnsafeGuaranteedRef { ring in
            let pieces = unsafe ring.owner.unsafelyUnwrapped._withUnsafeGuaranteedRef { queue in
                unsafe queue.functions[Int(slot.pointee.number)] = nil
                return unsafe queue.responses[Int(slot.pointee.number)]
            }
            if !ring.isDetached, let pieces = pieces {
                unsafe bytes.withUnsafeBytes { unsafe pieces.write($0) }
                if isLogging { unsafe note(pieces, slot) }
            }
            unsafe ring.pushUsed(slot, length: UInt32(bytes.count))
        }
    }
}
