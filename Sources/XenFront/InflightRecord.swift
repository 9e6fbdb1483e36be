// InflightRecord: which requests of a ring are taken and not answered, in memory that outlives the process.
//
// Owns: the layout of that memory. Called by: XenPort, around each request; VhostServer, to come back after a crash.
// Must not know: what requests mean.
//
// A response may overwrite the ring slot of a request that is not answered yet, so the ring alone cannot tell what was
// in flight when a daemon died. The record holds a copy of each request. Every step leaves it so that a successor can
// tell what happened, whichever instruction was the last:
//
//   take     copy of the request and its index, then state "in flight", then `requestConsumer` + 1
//   answer   index of the response, then state "answered", then the response and the ring's producer index, then "free"
//
// A request in flight with an index that `requestConsumer` does not cover was not taken: it is still in the ring. One
// that is "answered" was answered if the ring's producer index covers its response, else it is in flight.

import CXen
import Glibc
import Xenbus

/// The record of one ring.
@safe
struct InflightRecord {
    /// Bytes of a record: a page for the head and the slots.
    static let bytes = 64 + slotBytes * VSCSIIFLimits.requests
    private static let slotBytes = 320
    private static let magic: UInt32 = 0x5653_4652
    private static let version: UInt32 = 1

    private enum Head {
        static let magic = 0
        static let version = 4
        static let ringReference = 8
        static let eventChannel = 12
        static let requestConsumer = 16
    }
    private enum Slot {
        static let state = 0
        static let requestIndex = 4
        static let responseIndex = 8
        static let request = 16
    }
    private enum State {
        static let free: UInt32 = 0
        static let inFlight: UInt32 = 1
        static let answered: UInt32 = 2
    }

    private let memory: UnsafeMutableRawPointer

    /// The record in `bytes` bytes of zeroed memory or in what an earlier process left there.
    init(memory: UnsafeMutableRawPointer) { unsafe self.memory = memory }

    @inline(__always)
    private func slot(_ index: Int) -> UnsafeMutableRawPointer { unsafe memory + 64 + index &* Self.slotBytes }

    private func head(_ offset: Int) -> UInt32 { unsafe cxen_load32(memory + offset) }
    private func setHead(_ offset: Int, _ value: UInt32) { unsafe cxen_store32(memory + offset, value) }

    /// Begins anew for a ring that nobody has served.
    func reset(_ ring: RingParameters, requestConsumer: UInt32) {
        setHead(Head.magic, 0)
        for index in 0..<VSCSIIFLimits.requests { unsafe cxen_store32(slot(index) + Slot.state, State.free) }
        setHead(Head.version, Self.version)
        setHead(Head.ringReference, ring.ringReference)
        setHead(Head.eventChannel, ring.eventChannel)
        setHead(Head.requestConsumer, requestConsumer)
        setHead(Head.magic, Self.magic)
    }

    /// Forgets the ring: it is not served any more.
    func invalidate() { setHead(Head.magic, 0) }

    /// Notes a request that was copied from the ring and is taken from it now.
    @inline(__always)
    func take(_ index: Int, _ request: UnsafePointer<vscsiif_request>, requestIndex: UInt32) {
        let slot = unsafe slot(index)
        unsafe (slot + Slot.request).copyMemory(from: request, byteCount: MemoryLayout<vscsiif_request>.size)
        unsafe cxen_store32(slot + Slot.requestIndex, requestIndex)
        unsafe cxen_store32(slot + Slot.state, State.inFlight)
        setHead(Head.requestConsumer, requestIndex &+ 1)
    }

    /// Notes that a request is about to be answered.
    @inline(__always)
    func answer(_ index: Int, responseIndex: UInt32) {
        let slot = unsafe slot(index)
        unsafe cxen_store32(slot + Slot.responseIndex, responseIndex)
        unsafe cxen_store32(slot + Slot.state, State.answered)
    }

    /// Notes that the front end can see the answer.
    @inline(__always)
    func free(_ index: Int) { unsafe cxen_store32(slot(index) + Slot.state, State.free) }

    /// A request that an earlier process has taken and not answered.
    struct Recovered: Equatable {
        /// Its place in the record.
        let index: Int
        let requestIndex: UInt32
    }

    /// What a ring's successor goes on with.
    struct Resumption: Equatable {
        let requestConsumer: UInt32
        /// In the order in which they were taken.
        let requests: [Recovered]
    }

    /// Works out what was in flight.
    ///
    /// - Parameter answered: The ring page's response producer index.
    /// - Returns: `nil` if the record is not of this ring, or says something that cannot be.
    func resume(_ ring: RingParameters, answered: UInt32) -> Resumption? {
        guard head(Head.magic) == Self.magic, head(Head.version) == Self.version,
            head(Head.ringReference) == ring.ringReference, head(Head.eventChannel) == ring.eventChannel
        else { return nil }
        let consumer = head(Head.requestConsumer)
        var requests: [Recovered] = []
        for index in 0..<VSCSIIFLimits.requests {
            let slot = unsafe slot(index)
            let requestIndex = unsafe cxen_load32(slot + Slot.requestIndex)
            let responseIndex = unsafe cxen_load32(slot + Slot.responseIndex)
            let wasTaken = Int32(bitPattern: consumer &- requestIndex) > 0
            switch unsafe cxen_load32(slot + Slot.state) {
            case State.inFlight where wasTaken: requests.append(Recovered(index: index, requestIndex: requestIndex))
            case State.answered where Int32(bitPattern: answered &- responseIndex) <= 0:
                requests.append(Recovered(index: index, requestIndex: requestIndex))
            default: break
            }
        }
        guard consumer &- answered == UInt32(requests.count) else { return nil }
        requests.sort { Int32(bitPattern: $0.requestIndex &- $1.requestIndex) < 0 }
        for index in 0..<VSCSIIFLimits.requests where !requests.contains(where: { $0.index == index }) { free(index) }
        for request in requests { unsafe cxen_store32(slot(request.index) + Slot.state, State.inFlight) }
        return Resumption(requestConsumer: consumer, requests: requests)
    }

    /// Copies a recovered request out of the record.
    func copyRequest(_ index: Int, into request: UnsafeMutablePointer<vscsiif_request>) {
        unsafe UnsafeMutableRawPointer(request).copyMemory(
            from: slot(index) + Slot.request, byteCount: MemoryLayout<vscsiif_request>.size)
    }
}
