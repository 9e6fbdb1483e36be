// ThinMediumTests: what media tell of their space; a logical unit on a file system that is full, or on a backstore that
// says so, with each error policy.
//
// Called by: swift test. Must not know: the inside of the backstores.

import Backstores
import CBackstore
import CLinux
import CoreTestSupport
import Glibc
import Reactor
import SCSICore
import Testing

/// A logical unit on a real medium, and one initiator.
private final class UnitWorld {
    let reactor: Reactor
    let shard = Shard()
    let unit: LogicalUnit
    let port: MockPort
    private let target: TargetDevice

    init(_ policy: ErrorPolicy, _ handle: BackstoreHandle, _ reactor: Reactor) {
        self.reactor = reactor
        shard.now = reactor.now
        var configuration = LogicalUnitConfiguration(name: 0x3001_4054_0000_0001, serial: "S")
        configuration.errorPolicy = policy
        unit = LogicalUnit(configuration: configuration, backstore: handle, shard: shard)
        target = TargetDevice(name: 0x3001_4054_0000_00ff, shard: shard)
        #expect(target.add(unit, at: LUN(0)!))
        port = MockPort(name: "A", target: target, journal: Journal(), violations: Violations())
        port.connect()
        _ = run(CDB.requestSense(), dataIn: 18)
    }

    /// Lets the reactor and the shard work until a condition holds, with time as it passes.
    func work(until condition: () -> Bool) {
        while !condition() {
            reactor.turn(mayWait: false)
            shard.now = reactor.now
            shard.expireDeadlines()
            shard.retryWaiting()
        }
    }

    func run(_ cdb: [UInt8], dataOut: [UInt8] = [], dataIn: Int = 0) -> Completion {
        let tag = port.send(cdb, dataOut: dataOut, dataIn: dataIn)
        work { !port.tagsInFlight.contains(tag) }
        return port.completions.last { $0.tag == tag }!
    }

    /// 64 KiB that tell where they are.
    static let pieceBlocks: UInt64 = 128
    static func piece(_ index: UInt64) -> [UInt8] {
        var random = SplitMix(seed: index)
        return random.bytes(Int(pieceBlocks) * 512)
    }

    func write(_ index: UInt64) -> String {
        run(CDB.write(.ten, index * Self.pieceBlocks, Self.pieceBlocks), dataOut: Self.piece(index)).summary
    }

    func read(_ index: UInt64) -> [UInt8] {
        run(CDB.read(.ten, index * Self.pieceBlocks, Self.pieceBlocks), dataIn: Int(Self.pieceBlocks) * 512).data
    }

    func close() {
        target.remove(at: LUN(0)!) {}
        #expect(unit.tasksInFlight == 0)
    }
}

/// A disk of 4 MiB on a file system of 2 MiB, of which a ballast takes half.
private final class FullFileSystem {
    let reactor: Reactor
    let file: FileBackstore
    private let fileSystem: SmallFileSystem
    private var ballast: String { fileSystem.path + "/ballast" }

    init(_ engine: Reactor.Configuration.Engine) throws {
        fileSystem = try #require(SmallFileSystem(bytes: 2 << 20))
        reactor = try makeReactor(engine)
        var options = FileBackstore.Options(path: fileSystem.path + "/disk")
        options.size = 4 << 20
        options.create = true
        options.direct = false
        file = try FileBackstore(options, reactor: reactor)
        writeFile(ballast, [UInt8](repeating: 1, count: 1 << 20))
    }

    func removeBallast() { unsafe unlink(ballast) }

    /// Writes pieces until one does not end with GOOD; gives its number and its end.
    func fill(_ world: UnitWorld) -> (index: UInt64, end: String) {
        for index in 0..<64 as Range<UInt64> {
            let end = world.write(index)
            if end != "good" { return (index, end) }
        }
        return (64, "good")
    }
}

@Suite struct ThinMediumTests {
    private static let engines: [Reactor.Configuration.Engine] = [.ioUring, .libaio]

    @Test(arguments: Variant.all)
    func mediaTellWhatTheyTakeAndWhatThereIs(_ variant: Variant) throws {
        let medium = try OpenMedium(variant)
        #expect(medium.handle.geometry().capabilities & UInt32(SCSI_BACKSTORE_CAN_REPORT_SPACE) != 0)
        func space() -> scsi_backstore_space {
            let size = MemoryLayout<scsi_backstore_space>.size
            let request = TestRequest(SCSI_BACKSTORE_SPACE, offset: 0, length: 0, lengths: [size], gap: 16)
            request.data = [UInt8](repeating: 0, count: size)
            #expect(medium.perform(request) == 0)
            #expect(request.isGuardIntact)
            return unsafe request.data.withUnsafeBytes { unsafe $0.loadUnaligned(as: scsi_backstore_space.self) }
        }
        let before = space()
        #expect(before.available > 0)
        #expect(before.flags == UInt32(SCSI_BACKSTORE_SPACE_SHARED))
        medium.write([UInt8](repeating: 9, count: 1 << 20), at: 1 << 20)
        #expect(medium.flush() == 0)
        let after = space()
        #expect(after.used >= before.used + 1 << 20 && after.used < before.used + 2 << 20)
        if variant.kind != .ram { #expect(after.used == UInt64(status(medium.path).st_blocks) * 512) }
        medium.perform(TestRequest(SCSI_BACKSTORE_DISCARD, offset: 1 << 20, length: 1 << 20))
        #expect(space().used < after.used)
        try medium.close()
    }

    @Test func aRAMDiskCountsEachPageOnce() throws {
        let medium = try OpenMedium(Variant(engine: .automatic, kind: .ram), size: 1 << 20)
        func used() -> UInt64 {
            let size = MemoryLayout<scsi_backstore_space>.size
            let request = TestRequest(SCSI_BACKSTORE_SPACE, offset: 0, length: 0, lengths: [size])
            request.data = [UInt8](repeating: 0, count: size)
            #expect(medium.perform(request) == 0)
            return unsafe request.data.withUnsafeBytes { unsafe $0.loadUnaligned(as: UInt64.self) }
        }
        #expect(used() == 0)
        for _ in 0..<2 { medium.write([UInt8](repeating: 1, count: 8192), at: 2048) }
        #expect(used() == 3 * 4096)
        medium.perform(TestRequest(SCSI_BACKSTORE_DISCARD, offset: 0, length: 8192))
        #expect(used() == 4096)
        medium.perform(TestRequest(SCSI_BACKSTORE_DISCARD, offset: 0, length: 1 << 20))
        #expect(used() == 0)
        try medium.close()
    }

    @Test(.enabled(if: SmallFileSystem.isPossible, "no privilege to mount a tmpfs"), arguments: engines)
    func aFullFileSystemFailsWritesUntilThereIsSpaceAgain(_ engine: Reactor.Configuration.Engine) throws {
        let full = try FullFileSystem(engine)
        let world = UnitWorld(.report, full.file.handle, full.reactor)
        let (index, end) = full.fill(world)
        #expect(end == "7/2707", "SPACE ALLOCATION FAILED WRITE PROTECT")
        #expect(index >= 8 && index < 20)
        #expect(world.write(index + 1) == "7/2707")
        for written in 0..<index { #expect(world.read(written) == UnitWorld.piece(written)) }
        #expect(world.write(0) == "good", "what has its space can be written")
        full.removeBallast()
        for more in index..<index + 4 { #expect(world.write(more) == "good") }
        for written in 0..<index + 4 { #expect(world.read(written) == UnitWorld.piece(written)) }
        world.close()
        try full.file.close()
    }

    @Test(.enabled(if: SmallFileSystem.isPossible, "no privilege to mount a tmpfs"), arguments: engines)
    func aFullFileSystemStopsAUnitThatIsToStop(_ engine: Reactor.Configuration.Engine) throws {
        let full = try FullFileSystem(engine)
        let world = UnitWorld(.stop, full.file.handle, full.reactor)
        var index: UInt64 = 0
        while world.unit.frozen == nil, index < 64 {
            let blocks = UnitWorld.pieceBlocks
            let tag = world.port.send(CDB.write(.ten, index * blocks, blocks), dataOut: UnitWorld.piece(index))
            world.work { world.unit.frozen != nil || !world.port.tagsInFlight.contains(tag) }
            index += 1
        }
        #expect(world.unit.frozen == .mediumError(errno: ENOSPC))
        #expect(world.port.tagsInFlight.count == 1)
        full.removeBallast()
        world.unit.thaw()
        world.work { world.port.tagsInFlight.isEmpty }
        #expect(world.port.completions.allSatisfy { $0.summary == "good" })
        for written in 0..<index { #expect(world.read(written) == UnitWorld.piece(written)) }
        world.close()
        try full.file.close()
    }

    @Test(.enabled(if: SmallFileSystem.isPossible, "no privilege to mount a tmpfs"), arguments: engines)
    func aFullFileSystemIsWaitedForByAUnitThatRetries(_ engine: Reactor.Configuration.Engine) throws {
        let full = try FullFileSystem(engine)
        let world = UnitWorld(.retry(nanoseconds: 600_000_000_000), full.file.handle, full.reactor)
        var index: UInt64 = 0
        while world.unit.statistics.writeErrors.corrected == 0, index < 64 {
            let blocks = UnitWorld.pieceBlocks
            let tag = world.port.send(CDB.write(.ten, index * blocks, blocks), dataOut: UnitWorld.piece(index))
            // A deadline is there only while a request waits to be tried again.
            world.work { world.shard.nextDeadline != nil || !world.port.tagsInFlight.contains(tag) }
            if world.port.tagsInFlight.contains(tag) { full.removeBallast() }
            world.work { !world.port.tagsInFlight.contains(tag) }
            index += 1
        }
        #expect(world.unit.statistics.writeErrors == MediumErrorCounters(corrected: 1, uncorrected: 0))
        #expect(world.port.completions.allSatisfy { $0.summary == "good" })
        for written in 0..<index { #expect(world.read(written) == UnitWorld.piece(written)) }
        world.close()
        try full.file.close()
    }

    @Test(arguments: [EIO, ENOSPC, EREMOTEIO])
    func aFaultyMediumFollowsEachPolicy(_ code: Int32) throws {
        let reactor = try makeReactor(.automatic)
        let ram = try RAMBackstore(size: 8 << 20, reactor: reactor)
        for policy in [ErrorPolicy.report, .stop, .retry(nanoseconds: 600_000_000_000)] {
            let faulty = FaultInjectionBackstore(wrapping: ram.handle, reactor: reactor)
            let world = UnitWorld(policy, faulty.handle, reactor)
            faulty.inject(
                FaultInjectionBackstore.Fault(
                    .torn(bytes: 4096, errno: code), operations: [UInt8(SCSI_BACKSTORE_WRITE)], times: 3))
            let tag = world.port.send(CDB.write(.ten, 0, 128), dataOut: UnitWorld.piece(0))
            switch policy {
            case .report:
                world.work { world.port.tagsInFlight.isEmpty }
                #expect(world.port.completions.last?.status == .checkCondition)
                for _ in 0..<2 { #expect(world.write(0) != "good") }
                #expect(world.write(0) == "good")
            case .stop:
                for _ in 0..<3 {
                    world.work { world.unit.frozen != nil }
                    #expect(world.port.tagsInFlight == [tag])
                    world.unit.thaw()
                }
            case .retry: break
            }
            world.work { world.port.tagsInFlight.isEmpty }
            #expect(world.port.completions.last?.summary == "good")
            #expect(world.read(0) == UnitWorld.piece(0))
            #expect(faulty.faultCount == 3)
            world.close()
            faulty.close()
        }
        ram.close()
    }
}
