// ControlServerTests: the HTTP server of the control API with an answerer of the test's own: bounds, clocks, order,
// permissions. Must not know: what the daemon answers.

import ControlAPI
import Foundation
import Glibc
import Logging
import Testing

@testable import targetd

@Suite struct ControlServerTests {
    private let folder: TemporaryFolder
    private let logger = Logger(label: "test") { _ in SwiftLogNoOpLogHandler() }
    private var client: ControlClient { ControlClient(socket: folder("c")) }

    init() throws { folder = try TemporaryFolder() }

    /// Runs `body` with a server that answers with what it was asked.
    private func serve(
        _ limits: ControlLimits = ControlLimits(), mode: UInt16? = nil,
        respond: @escaping ControlServer.Responder = {
            ControlResponse(text: "\($0.method) \($0.target)", type: "t/t")
        },
        _ body: (ControlServer) async throws -> Void
    ) async throws {
        let server = try await ControlServer(
            ControlConfiguration(socket: folder("c"), mode: mode), limits: limits, logger: logger, respond: respond,
            respondToAnybody: respond)
        do {
            try await body(server)
        } catch {
            await server.stop()
            throw error
        }
        await server.stop()
    }

    private func code(_ answer: ControlClient.Answer) throws -> String {
        try JSON.decode(FailureReport.self, from: answer.body).error.code
    }

    @Test func requestIsAnsweredAndSocketIsRemovedAtTheEnd() async throws {
        try await serve { _ throws in
            let answer = try client.exchange("GET", "/x?y=z")
            #expect(answer.status == 200)
            #expect(answer.fields["content-type"] == "t/t")
            #expect(String(decoding: answer.body, as: UTF8.self) == "GET /x?y=z")
        }
        #expect(!FileManager.default.fileExists(atPath: folder("c")))
    }

    @Test func connectionServesOneRequestAfterAnother() async throws {
        try await serve { _ throws in
            let requests = "GET /1 HTTP/1.1\r\nHost: x\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            let text = String(decoding: try client.exchange(raw: Data(requests.utf8)), as: UTF8.self)
            let first = try #require(text.firstRange(of: "GET /1"))
            let second = try #require(text.firstRange(of: "GET /2"))
            #expect(first.upperBound < second.lowerBound)
        }
    }

    @Test func whatIsNotHTTPIsAnsweredWithAStructuredError() async throws {
        try await serve { _ throws in
            let answer = try ControlClient.parse(client.exchange(raw: Data("\u{16}\u{3}\u{1} hello\r\n\r\n".utf8)))
            #expect(answer.status == 400)
            #expect(try code(answer) == "invalid-request")
        }
    }

    @Test func endlessHeaderIsRefused() async throws {
        try await serve { _ throws in
            let request = "GET / HTTP/1.1\r\nX: " + String(repeating: "x", count: 1 << 20) + "\r\n\r\n"
            #expect(try ControlClient.parse(client.exchange(raw: Data(request.utf8))).status == 400)
        }
    }

    @Test(arguments: [true, false]) func bodyBeyondTheLimitIsRefused(isAnnounced: Bool) async throws {
        var limits = ControlLimits()
        limits.bodyBytes = 1000
        try await serve(limits) { _ throws in
            let length = isAnnounced ? "Content-Length: 1001" : "Transfer-Encoding: chunked"
            let body = String(repeating: "x", count: 1001)
            let coded = isAnnounced ? body : "3e9\r\n\(body)\r\n0\r\n\r\n"
            let request = "PUT / HTTP/1.1\r\nHost: x\r\n\(length)\r\n\r\n\(coded)"
            let answer = try ControlClient.parse(client.exchange(raw: Data(request.utf8)))
            #expect(answer.status == 413)
            #expect(try code(answer) == "too-large")
            #expect(try client.exchange("PUT", "/", body: Data(count: 1000)).status == 200)
        }
    }

    @Test(arguments: ["", "GET / HT", "GET / HTTP/1.1\r\nHost: x\r\n", "PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"])
    func clientThatDoesNotFinishIsTimedOut(request: String) async throws {
        var limits = ControlLimits()
        limits.transferSeconds = 0.05
        try await serve(limits) { _ throws in
            // Ends only because the server closes the connection.
            let answer = try ControlClient.parse(client.exchange(raw: Data(request.utf8)))
            #expect(answer.status == 408)
            #expect(try code(answer) == "timeout")
        }
    }

    @Test func clientThatDoesNotTakeItsAnswerLosesItAndHoldsNobodyUp() async throws {
        var limits = ControlLimits()
        limits.transferSeconds = 0.05
        let size = 64 << 20
        try await serve(
            limits,
            respond: { request in
                ControlResponse(text: String(repeating: "x", count: request.target == "/long" ? size : 1), type: "t/t")
            }
        ) { _ throws in
            let slow = try client.connect()
            defer { close(slow) }
            try ControlClient.send(Data("GET /long HTTP/1.1\r\nHost: x\r\n\r\n".utf8), to: slow)
            #expect(try client.exchange("GET", "/short").status == 200)
            // The server's end, and not the next bytes, is what is waited for: POLLRDHUP.
            var end = pollfd(fd: slow, events: 0x2000, revents: 0)
            #expect(unsafe poll(&end, 1, -1) == 1)
            var (bytes, total) = ([UInt8](repeating: 0, count: 1 << 16), 0)
            while true {
                let count = unsafe recv(slow, &bytes, bytes.count, 0)
                if count <= 0 { break }
                total += count
            }
            #expect(total > 0 && total < size)
        }
    }

    @Test func silentClientsTakeNobodysPlace() async throws {
        var limits = ControlLimits()
        limits.connections = 4
        limits.transferSeconds = 3600
        try await serve(limits) { _ throws in
            let silent = try (0..<12).map { _ in try client.connect() }
            defer { for descriptor in silent { close(descriptor) } }
            #expect(try client.exchange("GET", "/").status == 200)
        }
    }

    @Test func longOperationHoldsNobodyUpAndIsAnsweredAfterTheClock() async throws {
        var limits = ControlLimits()
        limits.transferSeconds = 0.01
        let (gate, opened) = AsyncStream.makeStream(of: Void.self)
        try await serve(
            limits,
            respond: { request in
                if request.target == "/slow" { for await _ in gate {} }
                return ControlResponse(text: request.target, type: "t/t")
            }
        ) { _ throws in
            let slow = try client.connect()
            defer { close(slow) }
            try ControlClient.send(Data("GET /slow HTTP/1.1\r\nHost: x\r\n\r\n".utf8), to: slow)
            // The time-outs of these end after the slow one's would.
            #expect(try ControlClient.parse(client.exchange(raw: Data())).status == 408)
            #expect(try client.exchange("GET", "/fast").status == 200)
            opened.finish()
            var bytes = [UInt8](repeating: 0, count: 4096)
            let count = unsafe recv(slow, &bytes, bytes.count, 0)
            #expect(String(decoding: bytes.prefix(max(0, count)), as: UTF8.self).hasPrefix("HTTP/1.1 200 OK"))
        }
    }

    @Test(arguments: [(nil, 0o600), (UInt16(0o640), 0o640)] as [(UInt16?, Int)])
    func fileHasItsPermissions(mode: UInt16?, expected: Int) async throws {
        try await serve(mode: mode) { _ throws in
            let attributes = try FileManager.default.attributesOfItem(atPath: folder("c"))
            #expect(attributes[.posixPermissions] as? Int == expected)
        }
    }

    @Test func socketOfALivingServerIsLeftAlone() async throws {
        try await serve { _ throws in
            let error = await #expect(throws: ChangeError.self) { try await serve { _ in } }
            #expect(error?.text.hasPrefix("Another process listens at the control socket") == true)
            #expect(try client.exchange("GET", "/").status == 200)
        }
    }

    @Test func onlyRootTheOwnerAndTheGroupMayManage() {
        #expect(PeerCredentials(user: 0, groups: []).mayManage(owner: 5, group: nil))
        #expect(PeerCredentials(user: 5, groups: []).mayManage(owner: 5, group: nil))
        #expect(PeerCredentials(user: 6, groups: [1, 7]).mayManage(owner: 5, group: 7))
        #expect(!PeerCredentials(user: 6, groups: [1, 7]).mayManage(owner: 5, group: nil))
        #expect(!PeerCredentials(user: 6, groups: [0, 5]).mayManage(owner: 5, group: 7))
    }
}
