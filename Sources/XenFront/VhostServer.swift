// VhostServer: a vhost on its reactor: the ring that is mapped, the devices that are attached, the record on disk.
//
// Owns: one connection of a vhost: port, mapping, event channel, in-flight record, nexuses. Called by: XenWorker, on
// the reactor's thread. Must not know: xenstore.

import CLinux
import CXen
import Glibc
import Reactor
import SCSICore
import Xenbus

/// What the data plane of the front needs to know to connect a vhost.
struct VhostConnection: Sendable {
    let vhost: VhostIdentifier
    let ring: RingParameters
    let wholeTarget: Bool
    /// The front end has used this ring before we mapped it.
    let recovering: Bool
    /// Names the guest's side of each I_T nexus, the same after a restart of the daemon and of the guest.
    let initiatorPort: String
    /// The relative target port identifier of our side.
    let targetPort: UInt16
}

/// Why a vhost could not be connected.
struct VhostError: Error {
    let text: String
}

/// One connected vhost.
@safe
final class VhostServer {
    private let worker: XenWorker
    private let connection: VhostConnection
    private let port: XenPort
    private let page: UnsafeMutableRawPointer
    private let channel: EventChannel
    private let recordFile: RecordFile
    private var nexuses: [UInt64: CoreNexus] = [:]
    private var passthroughs: [HostTarget: PassthroughNexus] = [:]
    /// What each attached device leads to.
    private var devices: [VirtualDevice: Destination] = [:]
    private var source: WorkSourceToken?
    private var descriptor: DescriptorToken?
    /// Set while requests wait for staging memory, for the first of them whose time-out ends.
    private var timer: (token: TimerToken, time: UInt64)?
    private var whenIdle: [(condition: () -> Bool, action: () -> Void)] = []
    private var faultReported = false

    /// Maps the ring and binds the event channel.
    init(_ connection: VhostConnection, on worker: XenWorker) throws(VhostError) {
        self.worker = worker
        self.connection = connection
        let domain = connection.vhost.domain
        recordFile = RecordFile(connection.vhost, in: worker.recordDirectory)
        guard let page = unsafe worker.grants.map(domain: domain, reference: connection.ring.ringReference) else {
            throw VhostError(
                text: "ring-ref \(connection.ring.ringReference) of domain \(domain) cannot be mapped: errno \(errno)")
        }
        let start: Start
        do throws(VhostError) {
            start = unsafe try Self.start(connection, page: page, record: recordFile.record)
            guard let channel = EventChannel.bind(domain: domain, remotePort: connection.ring.eventChannel) else {
                throw VhostError(
                    text: "event-channel \(connection.ring.eventChannel) of domain \(domain) cannot be bound: "
                        + "errno \(errno)")
            }
            self.channel = channel
        } catch {
            unsafe worker.grants.unmap(page)
            throw error
        }
        unsafe self.page = page
        port = XenPort(
            domain: domain, wholeTarget: connection.wholeTarget, grants: worker.grants, staging: worker.staging,
            batch: worker.batch)
        port.connect(start.ring, channel: channel, record: recordFile.record, recovered: start.recovered)
    }

    /// What was done on the ring.
    var statistics: XenFront.Statistics { port.statistics }

    private enum Destination: Hashable {
        /// A target of the daemon.
        case target(UInt64)
        /// A target of this host.
        case host(HostTarget)
    }

    private struct Start {
        let ring: VSCSIIFRing
        let recovered: [InflightRecord.Recovered]
    }

    /// Finds out where in the ring to begin, and what an earlier process has left unanswered.
    private static func start(
        _ connection: VhostConnection, page: UnsafeMutableRawPointer, record: InflightRecord
    ) throws(VhostError) -> Start {
        let answered = unsafe VSCSIIFRing.answered(in: page)
        if let resumption = record.resume(connection.ring, answered: answered) {
            let ring = unsafe VSCSIIFRing(
                page: page, requestConsumer: resumption.requestConsumer, responseProducer: answered)
            return Start(ring: ring, recovered: resumption.requests)
        }
        let ring = unsafe VSCSIIFRing(page: page, requestConsumer: answered, responseProducer: answered)
        guard let waiting = ring.available() else {
            throw VhostError(text: "the indices of the ring are out of range")
        }
        // Without the record nobody knows which requests of a ring in use were answered: the ring keeps them in the
        // order of their answers.
        if connection.recovering && waiting > 0 {
            throw VhostError(
                text:
                    "\(waiting) requests were in flight and their record is lost; detach the vhost and attach it again")
        }
        record.reset(connection.ring, requestConsumer: answered)
        return Start(ring: ring, recovered: [])
    }

    // MARK: Devices

    /// Makes a device reachable.
    func attach(_ device: VirtualDevice, to target: TargetDevice, unit: LUN) throws(VhostError) {
        let nexus: CoreNexus
        if let known = nexuses[target.name] {
            nexus = known
        } else if let new = CoreNexus(
            target: target, initiatorPort: connection.initiatorPort, targetPort: connection.targetPort,
            port: port.handle)
        {
            nexus = new
        } else {
            throw VhostError(text: "the target has no room for another initiator (\(Limits.nexusesPerTarget))")
        }
        guard port.attach(device, unit: unit, nexus: nexus) else {
            if nexuses[target.name] == nil { nexus.lose() }
            throw VhostError(
                text: "v-dev \(device) is in use, or the vhost has \(VSCSIIFLimits.devices) devices already")
        }
        nexuses[target.name] = nexus
        devices[device] = .target(target.name)
    }

    /// Makes a SCSI device of this host reachable.
    func attach(_ device: VirtualDevice, to target: HostTarget, lun: UInt16) throws(VhostError) {
        let nexus =
            passthroughs[target]
            ?? PassthroughNexus(port: port, reactor: worker.reactor) { lun throws(VhostError) in
                try GenericDevice(target, lun: lun)
            }
        guard let unit = LUN(Int(lun)) else { throw VhostError(text: "\(target) has no logical unit \(lun)") }
        try nexus.add(lun)
        if connection.wholeTarget { for lun in GenericDevice.units(of: target) { try nexus.add(lun) } }
        guard port.attach(device, unit: unit, nexus: nexus) else {
            throw VhostError(
                text: "v-dev \(device) is in use, or the vhost has \(VSCSIIFLimits.devices) devices already")
        }
        passthroughs[target] = nexus
        devices[device] = .host(target)
    }

    /// The opposite. Commands of the last device of a target are ended.
    func detach(_ device: VirtualDevice) {
        guard let target = devices.removeValue(forKey: device) else { return }
        port.detach(device)
        guard !devices.values.contains(target) else { return }
        switch target {
        case .target(let name): nexuses[name] = nil
        case .host(let target): passthroughs[target] = nil
        }
    }

    /// Takes all devices of a target away.
    ///
    /// - Parameter done: Called when the target has no more commands of this vhost, maybe before this returns.
    func withdraw(_ target: UInt64, done: @escaping () -> Void) {
        guard let nexus = nexuses[target] else { return done() }
        for (device, destination) in devices where destination == .target(target) { detach(device) }
        wait(for: { nexus.isIdle }, then: done)
    }

    // MARK: Service

    /// Begins to take requests; what an earlier process had in flight comes first.
    func serve() throws(VhostError) {
        guard source == nil else { return }
        do {
            if channel.descriptor >= 0 {
                descriptor = try unsafe worker.reactor.watch(
                    channel.descriptor, events: EPOLLIN.rawValue,
                    { context, _ in
                        unsafe Unmanaged<VhostServer>.fromOpaque(context)._withUnsafeGuaranteedRef {
                            $0.channel.acknowledge()
                        }
                    }, Unmanaged.passUnretained(self).toOpaque())
            }
        } catch {
            throw VhostError(text: "the event channel cannot be watched: \(error)")
        }
        source = unsafe worker.reactor.add(
            Reactor.WorkSource(
                poll: { context in
                    unsafe Unmanaged<VhostServer>.fromOpaque(context)._withUnsafeGuaranteedRef { $0.poll() }
                },
                flush: { context in
                    unsafe Unmanaged<VhostServer>.fromOpaque(context)._withUnsafeGuaranteedRef { $0.flush() }
                },
                prepareToSleep: { context in
                    unsafe Unmanaged<VhostServer>.fromOpaque(context)._withUnsafeGuaranteedRef {
                        $0.port.prepareToSleep()
                    }
                }, context: Unmanaged.passUnretained(self).toOpaque()))
        port.startRecovered()
    }

    @inline(__always)
    private func poll() -> Bool {
        let worked = port.poll()
        if port.fault != nil { reportFault() }
        return worked
    }

    @inline(__always)
    private func flush() {
        if port.isShortOfMemory { expireWaiting() }
        port.flush()
        if !whenIdle.isEmpty { checkIdle() }
    }

    /// Ends what has waited too long for staging memory, and has the reactor come back when the next one will have.
    private func expireWaiting() {
        guard let time = port.expireWaiting(now: worker.reactor.now), time != timer?.time else { return }
        if let timer { worker.reactor.cancel(timer.token) }
        let token = unsafe worker.reactor.setTimer(
            at: time,
            { context in
                unsafe Unmanaged<VhostServer>.fromOpaque(context)._withUnsafeGuaranteedRef {
                    $0.timer = nil
                    $0.expireWaiting()
                }
            }, Unmanaged.passUnretained(self).toOpaque())
        timer = (token, time)
    }

    private func reportFault() {
        guard !faultReported, let fault = port.fault else { return }
        faultReported = true
        worker.reportFault(connection.vhost, fault)
    }

    private func wait(for condition: @escaping () -> Bool, then action: @escaping () -> Void) {
        if condition() { return action() }
        whenIdle.append((condition, action))
    }

    private func checkIdle() {
        let ready = whenIdle.filter { $0.condition() }
        guard !ready.isEmpty else { return }
        whenIdle.removeAll { $0.condition() }
        for entry in ready { entry.action() }
    }

    // MARK: End

    /// Ends all commands and lets go of the ring.
    ///
    /// - Parameters:
    ///   - keepingRecord: The daemon stops in good order: what the core has is answered, the rest is left for the
    ///     successor. Else nothing is answered any more.
    ///   - done: Called when nothing is mapped any more.
    func disconnect(keepingRecord: Bool, done: @escaping () -> Void) {
        keepingRecord ? port.drain() : port.stop()
        wait(for: { [port] in port.isIdle }) { [self] in
            // Not from within the walk over the work sources, which may have brought us here.
            nonisolated(unsafe) let finish = {
                self.finish(keepingRecord: keepingRecord)
                done()
            }
            worker.reactor.post { unsafe finish() }
        }
    }

    private func finish(keepingRecord: Bool) {
        if keepingRecord { port.stop() }
        if let source { worker.reactor.remove(source) }
        if let descriptor { worker.reactor.unwatch(descriptor) }
        if let timer { worker.reactor.cancel(timer.token) }
        (source, descriptor) = (nil, nil)
        timer = nil
        port.disconnect()
        channel.close()
        unsafe worker.grants.unmap(page)
        if !keepingRecord { recordFile.remove() }
        recordFile.close()
        nexuses = [:]
        passthroughs = [:]
        devices = [:]
    }
}
