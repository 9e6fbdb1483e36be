// RequestQueues: the way of a command from a request queue of a virtio-scsi device to its target, and of its response
// back (virtio 1.3, 5.6.6.1). The hot path of the front.
//
// Called by: VirtioSCSIDevice (chains), the core (completions). Must not know: rings, what a command does.

import CIOVector
import CTarget
import SCSICore

extension VirtioSCSIDevice {
    /// Hands a command to its target.
    @inline(__always)
    func command(_ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>) -> ChainOutcome {
        guard let response = unsafe slot.pointee.takeResponse(sizes.response) else { return .broken(.header) }
        statistics.commands += 1
        return unsafe withUnsafeTemporaryAllocation(byteCount: VirtioSCSISizes.requestCapacity, alignment: 8) { whole in
            let header = unsafe UnsafeMutableRawBufferPointer(rebasing: whole[..<sizes.requestHeader])
            guard unsafe slot.pointee.takeHeader(header) else {
                unsafe refuse(queue, slot, response, .failure)
                return .done
            }
            let lun = unsafe VirtioSCSILUN(bytes: UInt64(bigEndian: header.loadUnaligned(as: UInt64.self)))
            guard let target = unsafe target(lun) else {
                unsafe refuse(queue, slot, response, missing(lun))
                return .done
            }
            // Data both ways is what INOUT is about (5.6.6.1).
            if unsafe slot.pointee.readableLength > 0 && slot.pointee.writableLength > 0,
                features & VirtioFeature.inOut == 0
            {
                unsafe refuse(queue, slot, response, .failure)
                return .done
            }
            let head = unsafe Int(slot.pointee.number)
            unsafe queue.responses[head] = response
            unsafe queue.targetNumbers[head] = target.pointee.number
            let task = queue.pool[head]
            unsafe VirtioSCSICommandHeader.fill(
                &task.command, from: UnsafeRawBufferPointer(header), cdbSize: sizes.cdb)
            unsafe task.command.flags = commandFlags
            unsafe task.command.cookie = UInt64(UInt(bitPattern: slot))
            unsafe task.command.data_out = slot.pointee.readable
            unsafe task.command.data_out_count = UInt32(slot.pointee.readableCount)
            unsafe task.command.data_out_length = slot.pointee.readableLength
            unsafe task.command.data_in = slot.pointee.writable
            unsafe task.command.data_in_count = UInt32(slot.pointee.writableCount)
            unsafe task.command.data_in_length = slot.pointee.writableLength
            guard let nexus = unsafe target.pointee.nexus else { return unsafe send(task, to: target, from: queue) }
            unsafe target.pointee.target._withUnsafeGuaranteedRef { $0.receive(task, nexus: nexus) }
            return .done
        }
    }

    /// Hands a command over to the thread of its target.
    func send(
        _ task: TaskHandle, to target: UnsafeMutablePointer<DeviceTarget>, from queue: DeviceQueue
    ) -> ChainOutcome {
        unsafe target.pointee.link!._withUnsafeGuaranteedRef { link in
            let isSent = unsafe target.pointee.linkedNexus!._withUnsafeGuaranteedRef { link.send(task, nexus: $0) }
            queue.isStalled = false
            if !isSent { statistics.commands -= 1 }
            return isSent ? .done : .later
        }
    }

    /// The target that a LUN addresses. The REPORT LUNS well-known unit is that of the first target.
    @inline(__always)
    func target(_ lun: VirtioSCSILUN) -> UnsafeMutablePointer<DeviceTarget>? {
        if let number = lun.target { return unsafe targets[Int(number)] }
        guard lun.isReportLUNsWellKnown else { return nil }
        for number in 0..<256 { if let target = unsafe targets[number] { return unsafe target } }
        return nil
    }

    /// What is said of a LUN for which there is no nexus.
    func missing(_ lun: VirtioSCSILUN) -> VirtioSCSIResponse {
        lun.target.map { withoutNexus.contains($0) } ?? false ? .nexusFailure : .badTarget
    }

    /// Answers a command that no target saw.
    private func refuse(
        _ queue: DeviceQueue, _ slot: UnsafeMutablePointer<VirtqueueSlot>, _ response: ResponsePieces,
        _ code: VirtioSCSIResponse
    ) {
        let residual = unsafe UInt32(clamping: slot.pointee.writableLength + slot.pointee.readableLength)
        response.writeCommand(code, status: 0, qualifier: 0, residual: residual, senseSize: sizes.sense)
        if isLogging { unsafe note(response, slot) }
        unsafe queue.ring.pushUsed(slot, length: UInt32(sizes.response))
    }

    /// A command has ended: its response goes to the guest.
    @inline(__always)
    static func complete(_ task: TaskHandle) {
        let slot = unsafe UnsafeMutablePointer<VirtqueueSlot>(bitPattern: UInt(task.command.cookie))!
        let ring = unsafe slot.pointee.queue
        unsafe ring._withUnsafeGuaranteedRef { ring in
            unsafe ring.owner.unsafelyUnwrapped._withUnsafeGuaranteedRef { queue in
                unsafe queue.device.complete(task, slot, queue, ring)
            }
        }
    }

    @inline(__always)
    func complete(
        _ task: TaskHandle, _ slot: UnsafeMutablePointer<VirtqueueSlot>, _ queue: DeviceQueue, _ ring: Virtqueue
    ) {
        if ring.isQuiet { return unsafe completeQuietly(task, slot, queue, ring) }
        unsafe answer(task, slot, queue, ring)
    }

    /// A command of a queue whose front-end is gone, or that stops without being drained.
    @inline(never)
    private func completeQuietly(
        _ task: TaskHandle, _ slot: UnsafeMutablePointer<VirtqueueSlot>, _ queue: DeviceQueue, _ ring: Virtqueue
    ) {
        if ring.isDetached { return unsafe ring.pushUsed(slot, length: 0) }
        guard task.response.service_response == ServiceResponse.suspended.rawValue else {
            return unsafe answer(task, slot, queue, ring)
        }
        // What of it was done may have been written there.
        if isLogging { unsafe noteData(slot) }
        unsafe ring.suspend(slot)
    }

    @inline(__always)
    func answer(
        _ task: TaskHandle, _ slot: UnsafeMutablePointer<VirtqueueSlot>, _ queue: DeviceQueue, _ ring: Virtqueue
    ) {
        let head = unsafe Int(slot.pointee.number)
        let written = unsafe task.command.data_in_length &- task.response.data_in_residual
        let pieces = unsafe queue.responses[head].unsafelyUnwrapped
        // One field for both ways: what was offered less what was moved (5.6.6.1).
        let residual = UInt32(clamping: task.response.data_in_residual &+ task.response.data_out_residual)
        let (status, qualifier) = (task.response.status, task.response.status_qualifier)
        var code = VirtioSCSIResponse(task.response.service_response)
        // It was not a function that ended it: the target was taken away.
        if code == .aborted, unsafe targets[Int(queue.targetNumbers[head])] == nil { code = .transportFailure }
        if status == SCSIStatus.checkCondition.rawValue, code == .ok {
            pieces.writeCommand(
                task, status: status, qualifier: qualifier, residual: residual, senseSize: sizes.sense)
        } else {
            pieces.writeCommand(
                code, status: status, qualifier: qualifier, residual: residual, senseSize: sizes.sense)
        }
        if isLogging {
            unsafe note(pieces, slot)
            unsafe noteData(slot)
        }
        unsafe ring.pushUsed(slot, length: UInt32(sizes.response) &+ UInt32(truncatingIfNeeded: written))
    }

    // MARK: Dirty logging

    /// Notes a response that was written.
    func note(_ pieces: ResponsePieces, _ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        for index in 0..<pieces.count { unsafe note(pieces.first[index], slot) }
    }

    /// Notes the buffer of a command's data: all of it, for a command that failed may have written anywhere in it.
    private func noteData(_ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        for index in unsafe 0..<slot.pointee.writableCount { unsafe note(slot.pointee.writable[index], slot) }
    }

    func note(_ piece: iovec, _ slot: UnsafeMutablePointer<VirtqueueSlot>) {
        unsafe slot.pointee.memory?._withUnsafeGuaranteedRef { memory in
            unsafe log?.mark(piece.iov_base, piece.iov_len, in: memory)
        }
    }
}
