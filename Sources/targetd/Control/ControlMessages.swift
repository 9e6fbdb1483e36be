// ControlMessages: a request of the control API and its answer, free of sockets.
//
// Owns: the bounds of requests. Called by: the server, the router. Must not know: NIO, the daemon.

import ControlAPI
import Foundation

/// A request that has arrived in full.
struct ControlRequest: Sendable {
    var method: String
    /// The path, with its query, as it was sent.
    var target: String
    var body: Data
}

/// An answer.
struct ControlResponse: Sendable {
    var status = 200
    var type = "application/json"
    /// Further header fields.
    var fields: [(name: String, value: String)] = []
    var body: Data
    /// What follows the body, line by line, for as long as it lasts; `nil`: nothing.
    var events: AsyncStream<EventReport>?

    /// The answer that goes on: a line in JSON for each event.
    init(lines events: AsyncStream<EventReport>) {
        type = "application/jsonl"
        body = Data()
        self.events = events
    }

    /// The answer that says why not.
    init(_ failure: Failure, fields: [(name: String, value: String)] = []) {
        status = FailureCode(rawValue: failure.code)?.httpStatus ?? 500
        self.fields = fields
        body = JSON.encode(FailureReport(error: failure))
    }

    /// The answer with a value.
    init(_ value: some Encodable) { body = JSON.encode(value) }

    /// The answer with a text of another kind.
    init(text: String, type: String) {
        self.type = type
        body = Data(text.utf8)
    }
}

/// Bounds of the control API, with their reasons.
struct ControlLimits: Sendable {
    /// Connections at once: many times what operators and scripts have open. Another takes the place of the one that
    /// has waited longest for its next request.
    var connections = 32
    /// Bytes of a body: a configuration of twenty thousand disks.
    var bodyBytes = 4 << 20
    /// How long a client may take to send a request, from its connection or the answer before, and to take an answer.
    var transferSeconds: Double = 10
}
