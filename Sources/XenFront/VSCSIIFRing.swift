// VSCSIIFRing: the back end's side of one vscsiif ring page.
//
// Owns: the private indices. Called by: XenPort, on the reactor's thread. Must not know: what requests mean.
//
// The page is shared with a guest that may write anything into it at any time. Indices are read once and checked
// against our own; entries are copied once, and the copy is what is used.

import CXen

/// A mapped ring.
@safe
struct VSCSIIFRing {
    private let page: UnsafeMutableRawPointer
    /// The index of the next request to take.
    private(set) var requestConsumer: UInt32
    /// The index of the next response to put.
    private(set) var responseProducer: UInt32
    /// Responses before this index have been shown to the front end.
    private var published: UInt32

    /// Attaches to a ring page. `requestConsumer` requests have been taken and `responseProducer` answered so far.
    init(page: UnsafeMutableRawPointer, requestConsumer: UInt32, responseProducer: UInt32) {
        unsafe self.page = page
        self.requestConsumer = requestConsumer
        self.responseProducer = responseProducer
        published = responseProducer
    }

    /// Where a ring page claims to be answered up to.
    static func answered(in page: UnsafeMutableRawPointer) -> UInt32 { unsafe cxen_response_producer(page) }

    /// How many requests wait; `nil` if the front end's index cannot be.
    @inline(__always)
    func available() -> Int? {
        let waiting = unsafe cxen_request_producer(page) &- requestConsumer
        let room = cxen_ring_size() &- (requestConsumer &- responseProducer)
        return waiting <= room ? Int(waiting) : nil
    }

    /// Copies the next request out. The caller has seen that there is one.
    @inline(__always)
    mutating func take(into request: UnsafeMutablePointer<vscsiif_request>) {
        unsafe cxen_copy_request(page, requestConsumer, request)
        requestConsumer &+= 1
    }

    /// Writes the next response. It is not shown before `publish`.
    @inline(__always)
    mutating func put(_ response: UnsafePointer<vscsiif_response>) {
        precondition(responseProducer != requestConsumer, "a response without a request")
        unsafe cxen_write_response(page, responseProducer, response)
        responseProducer &+= 1
    }

    /// Shows the responses to the front end.
    ///
    /// - Returns: Whether it wants to be notified.
    mutating func publish() -> Bool {
        let old = published
        published = responseProducer
        unsafe cxen_set_response_producer(page, published)
        cxen_fence()
        return unsafe published &- cxen_response_event(page) < published &- old
    }

    /// Asks to be notified of the next request.
    ///
    /// - Returns: Whether one has come meanwhile, or the indices are broken, so that nobody may go to sleep.
    func requestNotification() -> Bool {
        unsafe cxen_set_request_event(page, requestConsumer &+ 1)
        cxen_fence()
        return available() != 0
    }
}
