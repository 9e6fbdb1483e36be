// ControlServer: HTTP/1.1 at the control socket, and for metrics at a TCP address.
//
// Owns: the listeners, their one thread, and how many connections there may be. Called by: the daemon process. Must not
// know: what requests mean.

import ControlAPI
import Foundation
import Glibc
import Logging
import NIOCore
import NIOHTTP1
import NIOPosix

/// The servers of the control API. All their connections share one thread of their own, which never waits for one.
final class ControlServer: Sendable {
    /// Answers a request, however long that takes.
    typealias Responder = @Sendable (ControlRequest) async -> ControlResponse

    private let group: MultiThreadedEventLoopGroup
    private let socket: ControlSocket
    private let listeners: [any Channel]
    /// A table for each listener, so that readers of metrics take nobody's place at the control socket.
    private let connections: NIOLoopBoundBox<[ControlConnections]>

    /// Listens; connections are answered from now on.
    ///
    /// - Parameters:
    ///   - respond: Answers at the control socket.
    ///   - respondToAnybody: Answers at the metrics address, where nobody is asked who he is.
    init(
        _ configuration: ControlConfiguration, limits: ControlLimits = ControlLimits(), logger: Logger,
        respond: @escaping Responder, respondToAnybody: @escaping Responder
    ) async throws(ChangeError) {
        let peerGroup = configuration.group.flatMap(GroupDatabase.identifier)
        let owner = geteuid()
        socket = try ControlSocket(configuration)
        group = MultiThreadedEventLoopGroup(numberOfThreads: 1)
        let loop = group.next()
        let refusals = NIOLoopBoundBox.makeBoxSendingValue(LogRate(), eventLoop: loop)
        let connections = NIOLoopBoundBox.makeBoxSendingValue(
            [ControlConnections(limit: limits.connections), ControlConnections(limit: limits.connections)],
            eventLoop: loop)
        self.connections = connections
        do {
            let own = try await Self.bootstrap(group, { connections.value[0] }, limits, respond) { channel in
                let peer = try channel.pipeline.syncOperations.withUnsafeTransportIfAvailable(
                    of: NIOBSDSocket.Handle.self
                ) { PeerCredentials(descriptor: $0) }
                guard let peer = peer ?? nil else { return "The kernel does not say who asks." }
                if peer.mayManage(owner: owner, group: peerGroup) { return nil }
                // Anybody who may open the file can be refused without end.
                if let suppressed = refusals.withValue({ $0.admit(DispatchTime.now().uptimeNanoseconds) }) {
                    logger.notice(
                        "control connection refused",
                        metadata: ["user": "\(peer.user)", "suppressed": "\(suppressed)"])
                }
                return "User \(peer.user) may not use this socket: root may, the daemon's own user, and members of "
                    + "the group that control: names."
            }.withBoundSocket(socket.descriptor).get()
            guard let metrics = configuration.metrics else {
                listeners = [own]
                return
            }
            do {
                let bootstrap = Self.bootstrap(group, { connections.value[1] }, limits, respondToAnybody) { _ in nil }
                    .serverChannelOption(.socketOption(.so_reuseaddr), value: 1)
                listeners = [own, try await bootstrap.bind(host: metrics.host, port: metrics.port).get()]
            } catch {
                try? await own.close().get()
                throw ChangeError(text: "metrics cannot be served at \(metrics.text): \(error)")
            }
        } catch {
            socket.removeFile()
            try? await group.shutdownGracefully()
            throw error as? ChangeError ?? ChangeError(text: "the control socket cannot be served: \(error)")
        }
    }

    private static func bootstrap(
        _ group: MultiThreadedEventLoopGroup, _ connections: @escaping @Sendable () -> ControlConnections,
        _ limits: ControlLimits, _ respond: @escaping Responder,
        refusal: @escaping @Sendable (any Channel) throws -> String?
    ) -> ServerBootstrap {
        ServerBootstrap(group: group)
            .serverChannelOption(.backlog, value: 16)
            .childChannelInitializer { channel in
                channel.eventLoop.makeCompletedFuture {
                    let pipeline = channel.pipeline.syncOperations
                    if let text = try refusal(channel) {
                        return try pipeline.addHandler(RefusedConnection(Failure(.notAuthorized, text)))
                    }
                    try pipeline.configureHTTPServerPipeline(
                        withPipeliningAssistance: false, withErrorHandling: false)
                    try pipeline.addHandler(ControlConnection(connections(), limits, respond))
                }
            }
    }

    /// Removes the socket and takes no more connections; those that are open may end what they are in.
    func stopListening() async {
        socket.removeFile()
        for listener in listeners { try? await listener.close().get() }
        try? await group.next().submit { [connections] in
            for table in connections.value { table.closeIdle() }
        }.get()
    }

    /// Ends all connections, and the thread. Answers that are there already are given first, as far as clients take
    /// them.
    func stop() async {
        await stopListening()
        let loop = group.next()
        // A client that does not take its answer must not hold up the stop.
        let timer = loop.makePromise(of: Void.self)
        let timeout = loop.scheduleTask(in: .seconds(1)) { timer.succeed() }
        let ended = loop.flatSubmit { [connections] in
            EventLoopFuture.andAllSucceed(connections.value.map { $0.whenEmpty(loop) }, on: loop)
        }
        ended.cascade(to: timer)
        try? await timer.futureResult.get()
        timeout.cancel()
        try? await group.shutdownGracefully()
    }
}

/// The connections that are open. Used on their one thread.
final class ControlConnections {
    private let limit: Int
    private var open: [ControlConnection] = []
    private var isClosing = false
    private var emptied: EventLoopPromise<Void>?

    init(limit: Int) { self.limit = limit }

    /// Takes one more, for which the one that has waited longest makes room. `false`: all are at work.
    func add(_ connection: ControlConnection) -> Bool {
        guard !isClosing else { return false }
        if open.count >= limit {
            guard let idle = open.first(where: \.isWaiting) else { return false }
            idle.close()
            open.removeAll { $0 === idle }
        }
        open.append(connection)
        return true
    }

    /// Puts a connection behind those that have waited longer.
    func renew(_ connection: ControlConnection) {
        guard open.contains(where: { $0 === connection }) else { return }
        open.removeAll { $0 === connection }
        open.append(connection)
        if isClosing { connection.close() }
    }

    func remove(_ connection: ControlConnection) {
        open.removeAll { $0 === connection }
        if open.isEmpty { emptied?.succeed() }
    }

    /// Fulfilled when no connection is open.
    func whenEmpty(_ loop: any EventLoop) -> EventLoopFuture<Void> {
        let promise = emptied ?? loop.makePromise(of: Void.self)
        emptied = promise
        if open.isEmpty { promise.succeed() }
        return promise.futureResult
    }

    /// Closes those that wait for a request now, and the others when they have their answer.
    func closeIdle() {
        isClosing = true
        for connection in open where connection.isWaiting { connection.close() }
    }
}

extension ControlResponse {
    /// The header, without what says how long the body is.
    var head: HTTPResponseHead {
        var headers = HTTPHeaders(fields.map { ($0.name, $0.value) })
        headers.add(name: "Content-Type", value: type)
        if events == nil { headers.add(name: "Content-Length", value: "\(body.count)") }
        headers.add(name: "Cache-Control", value: "no-store")
        return HTTPResponseHead(version: .http1_1, status: HTTPResponseStatus(statusCode: status), headers: headers)
    }
}

/// A connection whose peer has no right to it: it is told so, and closed, whatever it sends.
final class RefusedConnection: ChannelInboundHandler {
    typealias InboundIn = ByteBuffer
    typealias OutboundOut = ByteBuffer

    private let response: ControlResponse

    init(_ failure: Failure) { response = ControlResponse(failure, fields: [("Connection", "close")]) }

    func channelActive(context: ChannelHandlerContext) {
        let head = response.head
        var text = "HTTP/1.1 \(head.status.code) \(head.status.reasonPhrase)\r\n"
        for (name, value) in head.headers { text += "\(name): \(value)\r\n" }
        var buffer = context.channel.allocator.buffer(capacity: text.utf8.count + 2 + response.body.count)
        buffer.writeString(text + "\r\n")
        buffer.writeBytes(response.body)
        let channel = context.channel
        context.writeAndFlush(wrapOutboundOut(buffer)).whenComplete { _ in channel.close(promise: nil) }
    }
}
