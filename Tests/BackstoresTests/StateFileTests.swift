// State files: crash at each byte, errors of each system call, what is not a unit's state, and a save on a reactor.

import CBackstore
import CLinux
import Glibc
import Reactor
import SCSICore
import Synchronization
import Testing

@testable import Backstores

/// A directory that remembers what of it is stable. Directory operations become stable in their order; of a file's
/// bytes any prefix may be there until the file is synchronized.
private final class ModelDirectory: Sendable {
    struct Crash: Error {}

    struct State {
        var names: [String: Int] = [:]
        /// The names as they were stable, and after each directory operation since.
        var history: [[String: Int]] = [[:]]
        var files: [(bytes: [UInt8], stable: Int)] = []
        /// Calls made, the call that fails, and with what.
        var calls = 0
        var failure: (call: Int, result: Int32)?
        /// The state after this many calls is the last.
        var crashAfter = Int.max
        var bytesPerWrite = Int.max
    }

    /// The descriptor of the directory; others are 100 and the number of the file.
    static let directory: Int32 = 7

    let state = Mutex(State())

    /// Whether the call that begins is carried out; else its result.
    private static func begin(_ state: inout State) -> Int32? {
        state.calls += 1
        if state.calls > state.crashAfter { return -EIO }
        if let failure = state.failure, failure.call == state.calls { return failure.result }
        return nil
    }

    private func call(_ body: (inout State) -> Int32) -> Int32 {
        state.withLock { state in Self.begin(&state) ?? body(&state) }
    }

    private static func changeNames(_ state: inout State, _ body: (inout [String: Int]) -> Int32) -> Int32 {
        let result = body(&state.names)
        if result == 0 { state.history.append(state.names) }
        return result
    }

    var calls: StateCalls {
        unsafe StateCalls(
            create: { [self] _, name in
                call { state in
                    guard state.names[name] == nil else { return -EEXIST }
                    state.files.append((bytes: [], stable: 0))
                    let file = state.files.count - 1
                    _ = Self.changeNames(&state) { names in
                        names[name] = file
                        return 0
                    }
                    return 100 + Int32(file)
                }
            },
            write: { [self] descriptor, bytes in
                let bytes = unsafe Array(bytes)
                let result = call { state in
                    let count = min(bytes.count, state.bytesPerWrite)
                    state.files[Int(descriptor) - 100].bytes += bytes[..<count]
                    return Int32(count)
                }
                return Int(result)
            },
            synchronize: { [self] descriptor in
                call { state in
                    if descriptor >= 100 {
                        state.files[Int(descriptor) - 100].stable = state.files[Int(descriptor) - 100].bytes.count
                    } else {
                        state.history = [state.names]
                    }
                    return 0
                }
            },
            close: { [self] _ in call { _ in 0 } },
            rename: { [self] _, from, to in
                call { state in
                    Self.changeNames(&state) { names in
                        guard let file = names.removeValue(forKey: from) else { return -ENOENT }
                        names[to] = file
                        return 0
                    }
                }
            },
            remove: { [self] _, name in
                call { state in Self.changeNames(&state) { $0.removeValue(forKey: name) == nil ? -ENOENT : 0 } }
            })
    }

    /// What a file may hold after a power loss at this moment.
    func contentsAfterCrash(of name: String) -> Set<[UInt8]?> {
        state.withLock { state in
            var contents: Set<[UInt8]?> = []
            for names in state.history {
                guard let file = names[name].map({ state.files[$0] }) else {
                    contents.insert(nil)
                    continue
                }
                for length in file.stable...file.bytes.count { contents.insert(Array(file.bytes[..<length])) }
            }
            return contents
        }
    }

    /// What whoever reads a file now finds.
    func content(of name: String) -> [UInt8]? {
        state.withLock { state in state.names[name].map { state.files[$0].bytes } }
    }

    /// After a crash: what is stable is all there is.
    func set(_ body: (inout State) -> Void) { state.withLock { body(&$0) } }
}

@Suite("The file of a logical unit's state")
struct StateFileTests {
    private let old = Array("the state before".utf8)
    private let new = Array("and after".utf8)
    private let scratch = TemporaryDirectory()

    /// A state directory on a model, with a file that holds the old state.
    private func make() throws -> (StateDirectory, ModelDirectory) {
        let model = ModelDirectory()
        let directory = try StateDirectory(path: scratch.path, calls: model.calls)
        #expect(replace(directory, old) == 0)
        model.set {
            $0.calls = 0
            $0.bytesPerWrite = 1
        }
        return (directory, model)
    }

    private func replace(_ directory: StateDirectory, _ bytes: [UInt8]) -> Int32 {
        unsafe bytes.withUnsafeBytes { unsafe directory.replace("naa", by: $0) }
    }

    @Test("a power loss at each byte of a save leaves the state before or the state after, whole")
    func crashAnywhere() throws {
        let total: Int
        do {
            let (directory, model) = try make()
            #expect(replace(directory, new) == 0)
            #expect(model.contentsAfterCrash(of: "naa") == [new])
            total = model.state.withLock { $0.calls }
        }
        #expect(total == new.count + 6)
        for crash in 0...total {
            let (directory, model) = try make()
            model.set { $0.crashAfter = crash }
            let error = replace(directory, new)
            #expect((error == 0) == (crash == total))
            let contents = model.contentsAfterCrash(of: "naa")
            #expect(contents.isSubset(of: [old, new]), "after \(crash) calls")
            #expect(!contents.isEmpty)
        }
    }

    @Test("an error of each system call is reported, leaves a whole state, and the next save succeeds")
    func errorAnywhere() throws {
        for call in 1...new.count + 6 {
            let (directory, model) = try make()
            model.set { $0.failure = (call, -ENOSPC) }
            #expect(replace(directory, new) == ENOSPC, "call \(call)")
            #expect([old, new].contains(model.content(of: "naa")), "call \(call)")
            #expect(model.contentsAfterCrash(of: "naa").isSubset(of: [old, new]), "call \(call)")
            #expect(replace(directory, new) == 0)
            #expect(model.contentsAfterCrash(of: "naa") == [new])
        }
    }

    @Test("an interrupted write goes on, and a write that writes nothing is an error")
    func oddWrites() throws {
        let (directory, model) = try make()
        model.set { $0.failure = (4, -EINTR) }
        #expect(replace(directory, new) == 0)
        #expect(model.content(of: "naa") == new)
        model.set { $0.failure = ($0.calls + 4, 0) }
        #expect(replace(directory, old) == EIO)
        #expect(model.content(of: "naa") == new)
    }

    @Test("a directory is made for its owner alone, and one process has it at a time")
    func lock() throws {
        let path = scratch.path + "/state"
        let first = try StateDirectory(path: path)
        var status = stat()
        #expect(unsafe stat(path, &status) == 0)
        #expect(status.st_mode & 0o777 == 0o700)
        let error = #expect(throws: StateError.self) { try StateDirectory(path: path) }
        #expect(error?.description.contains("\(path): another targetd keeps its state here") == true)
        withExtendedLifetime(first) {}
    }

    @Test("a directory that cannot be made is named")
    func missingParent() {
        let error = #expect(throws: StateError.self) { try StateDirectory(path: scratch.path + "/a/b") }
        #expect(error?.description.hasPrefix("\(scratch.path)/a/b: mkdir: No such file or directory") == true)
    }

    private let unit: UInt64 = 0x3001_4054_0000_0001
    private var file: String { scratch.path + "/naa.3001405400000001" }

    private func put(_ bytes: [UInt8]) {
        let descriptor = unsafe Glibc.open(file, O_WRONLY | O_CREAT | O_TRUNC, 0o600)
        #expect(unsafe Glibc.write(descriptor, bytes, bytes.count) == bytes.count)
        Glibc.close(descriptor)
    }

    private func open() throws -> StateFile {
        try StateFile(
            unit: unit, in: try StateDirectory(path: scratch.path), reactor: try makeReactor(.automatic))
    }

    @Test("a unit that saved nothing has no state, and one that did has it")
    func restore() throws {
        #expect(try open().saved == nil)
        put(UnitState(name: unit).encoded)
        #expect(try open().saved == UnitState(name: unit))
    }

    private func content() throws -> [UInt8]? {
        try StateDirectory(path: scratch.path).read("naa.3001405400000001", limit: 1 << 20)
    }

    @Test("a damaged file is a loss that names the file and what to do, at each length and each bit; it stays as it is")
    func damaged() throws {
        let bytes = UnitState(name: unit).encoded
        var all = (0..<bytes.count).map { Array(bytes[..<$0]) } + [Array("#!/bin/sh\n".utf8)]
        // The version of the format, bytes 8 to 11, is looked at before the checksum: a later one is no loss.
        for bit in 0..<bytes.count * 8 where !(8..<12).contains(bit / 8) {
            all.append(bytes)
            all[all.count - 1][bit / 8] ^= 1 << UInt8(bit % 8)
        }
        for damaged in all {
            put(damaged)
            let opened = try open()
            #expect(opened.saved == nil)
            #expect(opened.loss?.path == file)
            #expect(opened.loss?.text.contains("REPLACE LOST RESERVATION") == true)
            #expect(try content() == damaged)
        }
    }

    @Test("a save replaces a damaged file, and the next life of the unit has lost nothing")
    func lossAndSave() throws {
        put(Array(UnitState(name: unit).encoded.dropLast()))
        let reactor = try makeReactor(.automatic)
        let opened = try StateFile(unit: unit, in: try StateDirectory(path: scratch.path), reactor: reactor)
        #expect(opened.loss != nil)
        #expect(save(UnitState(name: unit).encoded, to: opened, on: reactor) == [0])
        let next = try open()
        #expect(next.loss == nil)
        #expect(next.saved == UnitState(name: unit))
    }

    @Test("the file of another unit or of a later version, a directory and a link are refused")
    func foreign() throws {
        put(UnitState(name: unit + 1).encoded)
        #expect(throws: StateError.self) { try open() }
        var later = UnitState(name: unit).encoded
        later[11] = 2
        put(later)
        #expect(throws: StateError.self) { try open() }
        unsafe unlink(file)
        unsafe mkdir(file, 0o700)
        #expect(throws: StateError.self) { try open() }
        unsafe rmdir(file)
        unsafe symlink("/dev/null", file)
        #expect(throws: StateError.self) { try open() }
    }

    private final class Ended { var errors: [Int32] = [] }

    private func save(_ bytes: [UInt8], to file: StateFile, on reactor: Reactor) -> [Int32] {
        let ended = Ended()
        let handle = file.handle
        unsafe bytes.withUnsafeBufferPointer { buffer in
            unsafe handle.save(buffer, token: Unmanaged.passUnretained(ended).toOpaque()) { token, error in
                unsafe Unmanaged<Ended>.fromOpaque(token!).takeUnretainedValue().errors.append(error)
            }
            #expect(ended.errors.isEmpty)
            while ended.errors.isEmpty { reactor.turn(mayWait: true) }
        }
        return ended.errors
    }

    @Test(
        "a save on a reactor ends on its thread, and the next life of the unit finds it",
        arguments: [
            Reactor.Configuration.Engine.ioUring, .libaio,
        ])
    func saves(engine: Reactor.Configuration.Engine) throws {
        let reactor = try makeReactor(engine)
        let state = UnitState(name: unit)
        do {
            let file = try StateFile(unit: unit, in: try StateDirectory(path: scratch.path), reactor: reactor)
            for _ in 0..<3 { #expect(save(state.encoded, to: file, on: reactor) == [0]) }
        }
        #expect(try open().saved == state)
        #expect(unsafe access(scratch.path + "/naa.3001405400000001.new", F_OK) != 0)
    }

    @Test("a save that fails says why")
    func failedSave() throws {
        let reactor = try makeReactor(.automatic)
        let model = ModelDirectory()
        model.set { $0.failure = (2, -EDQUOT) }
        let directory = try StateDirectory(path: scratch.path, calls: model.calls)
        let file = try StateFile(unit: unit, in: directory, reactor: reactor)
        #expect(save(UnitState(name: unit).encoded, to: file, on: reactor) == [EDQUOT])
        #expect(save(UnitState(name: unit).encoded, to: file, on: reactor) == [0])
    }
}
