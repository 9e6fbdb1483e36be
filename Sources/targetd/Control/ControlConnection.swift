// ControlConnection: one connection of the control API: reads a request, has it answered, writes the answer.
//
// Owns: the state of the connection, its bounds and its clock. Called by: NIO, on the server's one thread. Must not
// know: what requests mean.

import ControlAPI
import Foundation
import NIOCore
import NIOHTTP1

/// The last handler of a connection. It reads on only when the request before has its answer, so that a client which
/// sends without reading fills no memory.
final class ControlConnection: ChannelInboundHandler {
    typealias InboundIn = HTTPServerRequestPart
    typealias OutboundOut = HTTPServerResponsePart

    private enum State {
        /// For a request, or the rest of its header.
        case waiting
        /// For the rest of a body.
        case reading(HTTPRequestHead, Data)
        /// The request is being answered.
        case answering
        /// The last answer is on its way; what still comes is not read.
        case closing
    }

    private let connections: ControlConnections
    private let limits: ControlLimits
    private let respond: ControlServer.Responder
    private var state = State.waiting
    /// What came in the same piece as the request that is being answered.
    private var pending = CircularBuffer<HTTPServerRequestPart>()
    private var context: ChannelHandlerContext?
    private var clock: Scheduled<Void>?
    /// Writes events, for a client that listens.
    private var streaming: Task<Void, Never>?

    init(_ connections: ControlConnections, _ limits: ControlLimits, _ respond: @escaping ControlServer.Responder) {
        self.connections = connections
        self.limits = limits
        self.respond = respond
    }

    /// Whether nothing of a request has come, or not all of it: the connection can be closed without loss.
    var isWaiting: Bool {
        switch state {
        case .waiting, .reading: true
        case .answering, .closing: false
        }
    }

    /// Ends the connection.
    func close() { context?.close(promise: nil) }

    // MARK: Its life

    func channelActive(context: ChannelHandlerContext) {
        self.context = context
        guard connections.add(self) else { return context.close(promise: nil) }
        startClock { $0.refuse(Failure(.timeout, "The request did not come in time.")) }
    }

    func channelInactive(context: ChannelHandlerContext) {
        clock?.cancel()
        streaming?.cancel()
        connections.remove(self)
        state = .closing
        self.context = nil
    }

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        guard error is HTTPParserError, isWaiting else { return context.close(promise: nil) }
        refuse(Failure(.invalidRequest, "This is not a request of HTTP/1.1: \(error)."))
    }

    /// Does something when a transfer takes longer than it may.
    private func startClock(_ late: @escaping (ControlConnection) -> Void) {
        clock?.cancel()
        let time = TimeAmount.nanoseconds(Int64(limits.transferSeconds * 1e9))
        clock = context?.eventLoop.assumeIsolated().scheduleTask(in: time) { [weak self] in
            if let self { late(self) }
        }
    }

    // MARK: The request

    func channelRead(context: ChannelHandlerContext, data: NIOAny) {
        pending.append(unwrapInboundIn(data))
        takePending()
    }

    private func takePending() {
        while isWaiting, let part = pending.popFirst() { take(part) }
    }

    private func take(_ part: HTTPServerRequestPart) {
        switch (part, state) {
        case (.head(let head), .waiting): begin(head)
        case (.body(let part), .reading(let head, var body)):
            // Taken out of the state, so that appending does not copy.
            state = .waiting
            body.append(contentsOf: part.readableBytesView)
            if body.count > limits.bodyBytes { return refuseTooLarge() }
            state = .reading(head, body)
        case (.end, .reading(let head, let body)): answer(head, body)
        default: break
        }
    }

    private func begin(_ head: HTTPRequestHead) {
        let length = head.headers.first(name: "content-length").flatMap { Int($0) } ?? 0
        if length > limits.bodyBytes { return refuseTooLarge() }
        state = .reading(head, Data())
        if head.headers.first(name: "expect")?.lowercased() == "100-continue" {
            context?.writeAndFlush(
                wrapOutboundOut(.head(HTTPResponseHead(version: .http1_1, status: .continue))), promise: nil)
        }
    }

    private func refuseTooLarge() {
        refuse(Failure(.tooLarge, "The body is longer than the \(limits.bodyBytes) bytes that are allowed."))
    }

    /// Answers a request that is not read to its end; the connection cannot be used after that.
    private func refuse(_ failure: Failure) {
        write(ControlResponse(failure), isLast: true)
    }

    private func answer(_ head: HTTPRequestHead, _ body: Data) {
        clock?.cancel()
        state = .answering
        guard let context else { return }
        setReading(false)
        let request = ControlRequest(method: head.method.rawValue, target: head.uri, body: body)
        let promise = context.eventLoop.makePromise(of: ControlResponse.self)
        promise.completeWithTask { [respond] in await respond(request) }
        promise.futureResult.assumeIsolated().whenSuccess { [self] in write($0, isLast: !head.isKeepAlive) }
    }

    // MARK: The answer

    private func write(_ response: ControlResponse, isLast: Bool) {
        guard let context else { return }
        if let events = response.events { return stream(events, response, context) }
        state = isLast ? .closing : .answering
        // A client that does not take its answer loses it.
        startClock { $0.close() }
        var head = response.head
        if isLast { head.headers.add(name: "Connection", value: "close") }
        context.write(wrapOutboundOut(.head(head)), promise: nil)
        context.write(wrapOutboundOut(.body(.byteBuffer(ByteBuffer(bytes: response.body)))), promise: nil)
        context.writeAndFlush(wrapOutboundOut(.end(nil))).assumeIsolated().whenComplete { [self] _ in
            if isLast { return close() }
            guard self.context != nil else { return }
            state = .waiting
            startClock { $0.close() }
            connections.renew(self)
            setReading(true)
            takePending()
        }
    }

    /// Writes events as they come, each in a chunk. A client that does not take one in time loses the connection; one
    /// that goes away is noticed by what it sends: nothing more.
    private func stream(
        _ events: AsyncStream<EventReport>, _ response: ControlResponse, _ context: ChannelHandlerContext
    ) {
        clock?.cancel()
        state = .closing
        var head = response.head
        head.headers.add(name: "Connection", value: "close")
        context.writeAndFlush(wrapOutboundOut(.head(head)), promise: nil)
        setReading(true)
        let loop = context.eventLoop
        let connection = NIOLoopBound(self, eventLoop: loop)
        streaming = Task {
            for await event in events {
                let line = JSON.line(event)
                let written = loop.flatSubmit { connection.value.writeChunk(line, on: loop) }
                if (try? await written.get()) == nil { return }
            }
            // Fallen behind, or the daemon stops: what was sent is complete.
            loop.execute { connection.value.endStream() }
        }
    }

    private func writeChunk(_ line: Data, on loop: any EventLoop) -> EventLoopFuture<Void> {
        guard let context else { return loop.makeFailedFuture(ChannelError.ioOnClosedChannel) }
        startClock { $0.close() }
        let written = context.writeAndFlush(wrapOutboundOut(.body(.byteBuffer(ByteBuffer(bytes: line)))))
        written.assumeIsolated().whenComplete { [self] _ in clock?.cancel() }
        return written
    }

    private func endStream() {
        guard let context else { return }
        startClock { $0.close() }
        context.writeAndFlush(wrapOutboundOut(.end(nil))).assumeIsolated().whenComplete { [self] _ in close() }
    }

    private func setReading(_ isReading: Bool) {
        // Fails only where the connection is gone.
        try? context?.channel.syncOptions?.setOption(.autoRead, value: isReading)
    }
}
