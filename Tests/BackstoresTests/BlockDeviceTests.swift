// BlockDeviceTests: block devices, on loop devices over temporary files.
//
// Called by: swift test, with the right to make loop devices. Must not know: the inside of the backstore.

import Backstores
import CBackstore
import CLinux
import Glibc
import Reactor
import SCSICore
import Testing

/// A loop device over a sparse temporary file, detached at the end.
final class LoopDevice {
    let path: String
    private let descriptor: Int32

    init?(size: Int, logicalBlockSize: UInt32 = 512, readOnly: Bool = false) {
        let directory = TemporaryDirectory()
        writeFile(directory.path + "/image", [])
        unsafe precondition(truncate(directory.path + "/image", size) == 0)
        let image = unsafe open(directory.path + "/image", (readOnly ? O_RDONLY : O_RDWR) | O_CLOEXEC)
        let control = unsafe open("/dev/loop-control", O_RDWR | O_CLOEXEC)
        defer {
            close(image)
            close(control)
        }
        // Somebody else may take the free device that we were told: look again then.
        for _ in 0..<32 where control >= 0 {
            var number: Int32 = 0
            guard unsafe clinux_loop_get_free(control, &number) == 0 else { return nil }
            let device = unsafe open("/dev/loop\(number)", (readOnly ? O_RDONLY : O_RDWR) | O_CLOEXEC)
            guard device >= 0 else { return nil }
            if clinux_loop_configure(device, image, logicalBlockSize, readOnly ? 1 : 0) == 0 {
                descriptor = device
                path = "/dev/loop\(number)"
                return
            }
            let code = errno
            close(device)
            if code != EBUSY { return nil }
        }
        return nil
    }

    deinit {
        _ = clinux_loop_clear(descriptor)
        close(descriptor)
    }

    /// Whether this machine allows it: tried once.
    static let isPossible = LoopDevice(size: 1 << 20) != nil
}

@Suite(.enabled(if: LoopDevice.isPossible, "no loop devices here: BLOCK DEVICE BACKSTORES ARE NOT TESTED"))
struct BlockDeviceTests {
    private func refusal(_ options: BlockDeviceBackstore.Options) throws -> BackstoreError.Reason? {
        let reactor = try makeReactor(.automatic)
        do {
            try BlockDeviceBackstore(options, reactor: reactor).close()
            return nil
        } catch {
            #expect(error.path == options.path)
            return error.reason
        }
    }

    @Test(arguments: [Reactor.Configuration.Engine.ioUring, .libaio], [true, false])
    func randomRequestsMatchTheModel(_ engine: Reactor.Configuration.Engine, direct: Bool) throws {
        let device = try #require(LoopDevice(size: 2 << 20))
        let reactor = try makeReactor(engine)
        var options = BlockDeviceBackstore.Options(path: device.path)
        options.direct = direct
        let backstore = try BlockDeviceBackstore(options, reactor: reactor)
        #expect(backstore.isDirect == direct)
        var run = ModelRun(backstore.handle, reactor, seed: 21)
        run.run(steps: 150, concurrency: 16)
        try backstore.close()
    }

    @Test(arguments: [Reactor.Configuration.Engine.ioUring, .libaio])
    func discardAndZerosWork(_ engine: Reactor.Configuration.Engine) throws {
        let device = try #require(LoopDevice(size: 4 << 20))
        let reactor = try makeReactor(engine)
        let backstore = try BlockDeviceBackstore(BlockDeviceBackstore.Options(path: device.path), reactor: reactor)
        func perform(_ request: TestRequest) -> Int32 {
            #expect(request.submit(backstore.handle))
            turns(reactor) { request.isDone }
            return request.error
        }
        let write = TestRequest(SCSI_BACKSTORE_WRITE, offset: 0, length: 1 << 20, lengths: [1 << 20])
        #expect(perform(write) == 0)
        #expect(
            perform(TestRequest(SCSI_BACKSTORE_DISCARD, offset: 4096, length: 8192, flags: SCSI_BACKSTORE_FUA)) == 0)
        for flags in [0, SCSI_BACKSTORE_MAY_UNMAP, SCSI_BACKSTORE_FUA] {
            let zeroes = TestRequest(SCSI_BACKSTORE_WRITE_ZEROES, offset: 65_536, length: 65_536, flags: flags)
            #expect(perform(zeroes) == 0)
        }
        let read = TestRequest(SCSI_BACKSTORE_READ, offset: 0, length: 1 << 20, lengths: [1 << 20])
        #expect(perform(read) == 0)
        let data = read.data
        #expect(data[65_536..<131_072].allSatisfy { $0 == 0 })
        #expect(data[..<4096].allSatisfy { $0 == 0xee } && data[131_072...].allSatisfy { $0 == 0xee })
        #expect(perform(TestRequest(SCSI_BACKSTORE_FLUSH, offset: 0, length: 0)) == 0)
        try backstore.close()
    }

    @Test func theGeometryIsTheDevices() throws {
        let device = try #require(LoopDevice(size: 4 << 20, logicalBlockSize: 4096))
        let reactor = try makeReactor(.automatic)
        let backstore = try BlockDeviceBackstore(BlockDeviceBackstore.Options(path: device.path), reactor: reactor)
        let geometry = backstore.handle.geometry()
        #expect(geometry.size == 4 << 20)
        #expect(geometry.logical_block_size == 4096)
        #expect(geometry.physical_block_size == 4096)
        #expect(geometry.lowest_aligned_offset == 0)
        #expect(geometry.capabilities & UInt32(SCSI_BACKSTORE_CAN_DISCARD) != 0)
        #expect(geometry.capabilities & UInt32(SCSI_BACKSTORE_DISCARD_READS_ZEROS) == 0)
        #expect(geometry.maximum_discard > 0 && geometry.maximum_discard % 4096 == 0)
        #expect(geometry.discard_granularity >= 4096)
        try backstore.close()
    }

    @Test func logicalBlocksMayBeLargerThanTheDevicesAndNotSmaller() throws {
        let small = try #require(LoopDevice(size: 4 << 20))
        var options = BlockDeviceBackstore.Options(path: small.path)
        options.logicalBlockSize = 4096
        let reactor = try makeReactor(.automatic)
        let backstore = try BlockDeviceBackstore(options, reactor: reactor)
        #expect(backstore.handle.geometry().logical_block_size == 4096)
        #expect(backstore.handle.geometry().physical_block_size == 4096)
        try backstore.close()
        let large = try #require(LoopDevice(size: 4 << 20, logicalBlockSize: 4096))
        options.path = large.path
        options.logicalBlockSize = 512
        #expect(try refusal(options) == .blockSizeTooSmall(configured: 512, device: 4096))
    }

    @Test func whatCannotBeUsedIsRefused() throws {
        let device = try #require(LoopDevice(size: 4 << 20))
        let reactor = try makeReactor(.automatic)
        let options = BlockDeviceBackstore.Options(path: device.path)
        let backstore = try BlockDeviceBackstore(options, reactor: reactor)
        #expect(try refusal(options) == .deviceBusy)
        try backstore.close()
        #expect(try refusal(options) == nil)
        #expect(try refusal(BlockDeviceBackstore.Options(path: "/dev/null")) == .notBlockDevice)
        #expect(try refusal(BlockDeviceBackstore.Options(path: "/dev/no-such-device")) == .missing)
        #expect(try refusal(BlockDeviceBackstore.Options(path: "")) == .invalidPath)
    }

    @Test func aWriteProtectedDeviceIsServedReadOnly() throws {
        let device = try #require(LoopDevice(size: 1 << 20, readOnly: true))
        var options = BlockDeviceBackstore.Options(path: device.path)
        #expect(try refusal(options) == .deviceReadOnly)
        options.readOnly = true
        let reactor = try makeReactor(.automatic)
        let backstore = try BlockDeviceBackstore(options, reactor: reactor)
        #expect(backstore.handle.geometry().capabilities & UInt32(SCSI_BACKSTORE_WRITABLE) == 0)
        let write = TestRequest(SCSI_BACKSTORE_WRITE, offset: 0, length: 512, lengths: [512])
        #expect(write.submit(backstore.handle))
        turns(reactor) { write.isDone }
        #expect(write.error == EROFS)
        try backstore.close()
    }
}
