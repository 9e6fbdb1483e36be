// FileTests: opening, creating, locking and measuring files, and what they say when they refuse.
//
// Called by: swift test. Must not know: the inside of the backstores.

import Backstores
import CBackstore
import CLinux
import Glibc
import Reactor
import SCSICore
import Testing

@Suite struct FileTests {
    let directory = TemporaryDirectory()
    let reactor: Reactor

    init() throws { reactor = try makeReactor(.automatic) }

    private func options(_ name: String = "disk", size: UInt64? = nil) -> FileBackstore.Options {
        var options = FileBackstore.Options(path: directory.path + "/" + name)
        options.size = size
        return options
    }

    /// The reason why opening fails.
    private func refusal(_ options: FileBackstore.Options) -> BackstoreError.Reason? {
        do {
            try FileBackstore(options, reactor: reactor).close()
            return nil
        } catch {
            #expect(error.path == options.path)
            #expect(error.description.contains(options.path))
            return error.reason
        }
    }

    @Test func aMissingFileIsCreatedSparseAndPrivate() throws {
        var options = options(size: 1 << 30)
        options.create = true
        let backstore = try FileBackstore(options, reactor: reactor)
        let status = status(options.path)
        #expect(status.st_size == 1 << 30)
        #expect(status.st_blocks < 100)
        #expect(status.st_mode & 0o777 == 0o600)
        let geometry = backstore.handle.geometry()
        #expect(geometry.size == 1 << 30)
        #expect(geometry.logical_block_size == 512)
        #expect(geometry.physical_block_size == 4096)
        #expect(geometry.capabilities & UInt32(SCSI_BACKSTORE_WRITABLE) != 0)
        #expect(geometry.capabilities & UInt32(SCSI_BACKSTORE_VOLATILE_CACHE) != 0)
        #expect(geometry.capabilities & UInt32(SCSI_BACKSTORE_CAN_DISCARD) != 0)
        try backstore.close()
    }

    @Test func anExistingFileIsOpenedAtItsSizeAndKeepsItsData() throws {
        let data = [UInt8](repeating: 3, count: 8192)
        writeFile(directory.path + "/disk", data)
        let backstore = try FileBackstore(options(), reactor: reactor)
        #expect(backstore.handle.geometry().size == 8192)
        try backstore.close()
        #expect(status(directory.path + "/disk").st_size == 8192)
    }

    @Test func aFileOfAnotherSizeIsRefusedAndLeftAlone() {
        writeFile(directory.path + "/disk", [UInt8](repeating: 3, count: 8192))
        var options = options(size: 1 << 20)
        options.create = true
        #expect(refusal(options) == .sizeDiffers(configured: 1 << 20, actual: 8192))
        #expect(status(options.path).st_size == 8192)
    }

    @Test func sizesThatAreNotBlocksAreRefused() {
        writeFile(directory.path + "/disk", [UInt8](repeating: 3, count: 1000))
        #expect(refusal(options()) == .sizeNotMultiple(size: 1000, blockSize: 512))
        writeFile(directory.path + "/empty", [])
        #expect(refusal(options("empty")) == .sizeZero)
        var new = options("new", size: 0)
        new.create = true
        #expect(refusal(new) == .sizeZero)
        new.size = 1000
        #expect(refusal(new) == .sizeNotMultiple(size: 1000, blockSize: 512))
        new.size = UInt64.max / 4096 * 4096
        #expect(refusal(new) == .sizeTooLarge(UInt64.max / 4096 * 4096))
        // What no file system here can hold: the file must not stay behind.
        new.size = UInt64(Int64.max) / 4096 * 4096 - 4096
        #expect(refusal(new) == .sizeTooLarge(UInt64(Int64.max) / 4096 * 4096 - 4096))
        #expect(!directory.names.contains("new"))
    }

    @Test func blockSizesThatHostsDoNotKnowAreRefused() {
        for size in [0, -512, 256, 520, 1024, 8192] {
            var options = options(size: 1 << 20)
            options.logicalBlockSize = size
            #expect(refusal(options) == .invalidBlockSize(size))
        }
    }

    @Test func whatIsMissingIsNamed() {
        #expect(refusal(options()) == .missing)
        #expect(refusal(options("no/disk")) == .missingDirectory)
        var create = options("no/disk", size: 4096)
        create.create = true
        #expect(refusal(create) == .missingDirectory)
        create = options()
        create.create = true
        #expect(refusal(create) == .missingSize)
        create.size = 4096
        create.readOnly = true
        #expect(refusal(create) == .createReadOnly)
        #expect(refusal(FileBackstore.Options(path: "")) == .invalidPath)
        #expect(refusal(FileBackstore.Options(path: "/tmp/a\0b")) == .invalidPath)
        #expect(directory.names.isEmpty)
    }

    @Test func otherKindsOfFilesAreRefused() {
        #expect(refusal(FileBackstore.Options(path: directory.path)) == .notRegularFile)
        #expect(refusal(FileBackstore.Options(path: "/dev/null")) == .notRegularFile)
        unsafe mkfifo(directory.path + "/pipe", 0o600)
        var pipe = options("pipe")
        #expect(refusal(pipe) == .notRegularFile)
        pipe.readOnly = true
        #expect(refusal(pipe) == .notRegularFile)
    }

    @Test func aFileInUseIsRefused() throws {
        writeFile(directory.path + "/disk", [UInt8](repeating: 3, count: 8192))
        let first = try FileBackstore(options(), reactor: reactor)
        #expect(refusal(options()) == .locked)
        var readOnly = options()
        readOnly.readOnly = true
        #expect(refusal(readOnly) == .locked)
        try first.close()
        #expect(refusal(options()) == nil)
    }

    @Test func thoseWhoAgreeToShareAFile() throws {
        writeFile(directory.path + "/disk", [UInt8](repeating: 3, count: 8192))
        var shared = options()
        shared.isShared = true
        let first = try FileBackstore(shared, reactor: reactor)
        #expect(refusal(shared) == nil)
        #expect(refusal(options()) == .locked)
        try first.close()
        let alone = try FileBackstore(options(), reactor: reactor)
        #expect(refusal(shared) == .locked)
        try alone.close()
    }

    @Test func readersShareAFile() throws {
        writeFile(directory.path + "/disk", [UInt8](repeating: 3, count: 8192))
        var options = options()
        options.readOnly = true
        let first = try FileBackstore(options, reactor: reactor)
        #expect(refusal(options) == nil)
        options.readOnly = false
        #expect(refusal(options) == .locked)
        try first.close()
    }

    @Test(.enabled(if: SmallFileSystem.isPossible, "mounting is not allowed here: the test of ramfs is skipped"))
    func aFileSystemWithoutDirectIOIsBuffered() throws {
        unsafe mkdir(directory.path + "/ramfs", 0o700)
        #expect(unsafe mount("targetd-test", directory.path + "/ramfs", "ramfs", 0, nil) == 0)
        defer {
            unsafe umount2(directory.path + "/ramfs", Int32(MNT_DETACH))
            unsafe rmdir(directory.path + "/ramfs")
        }
        var options = options("ramfs/disk", size: 1 << 20)
        options.create = true
        let backstore = try FileBackstore(options, reactor: reactor)
        #expect(!backstore.isDirect)
        var run = ModelRun(backstore.handle, reactor, seed: 5)
        run.run(steps: 50, concurrency: 8)
        try backstore.close()
    }

    @Test func aFileThatHasGrownIsNoticed() throws {
        writeFile(directory.path + "/disk", [UInt8](repeating: 3, count: 8192))
        let backstore = try FileBackstore(options(), reactor: reactor)
        #expect(!backstore.refreshGeometry())
        unsafe #expect(truncate(directory.path + "/disk", 20_000) == 0)
        #expect(backstore.refreshGeometry())
        #expect(backstore.handle.geometry().size == 20_000 / 512 * 512)
        #expect(!backstore.refreshGeometry())
        unsafe #expect(truncate(directory.path + "/disk", 4096) == 0)
        #expect(!backstore.refreshGeometry())
        #expect(backstore.handle.geometry().size == 20_000 / 512 * 512)
        try backstore.close()
    }

    @Test func openingAndFailingToOpenLeavesNoDescriptor() throws {
        writeFile(directory.path + "/disk", [UInt8](repeating: 3, count: 8192))
        for _ in 0..<20 {
            #expect(refusal(options()) == nil)
            #expect(refusal(options(size: 4096)) != nil)
            #expect(refusal(FileBackstore.Options(path: "/dev/null")) != nil)
        }
        var open = 0
        for number in Int32(0)..<4096 {
            var target = [UInt8](repeating: 0, count: 512)
            let count = unsafe readlink("/proc/self/fd/\(number)", &target, target.count)
            if count > 0, String(decoding: target[..<count], as: UTF8.self).hasPrefix(directory.path) { open += 1 }
        }
        #expect(open == 0)
    }

    @Test func everyErrorSaysWhatToDo() {
        let reasons: [BackstoreError.Reason] = [
            .invalidPath, .invalidBlockSize(520), .blockSizeTooSmall(configured: 512, device: 4096), .sizeZero,
            .sizeNotMultiple(size: 1000, blockSize: 512), .sizeTooLarge(1 << 63),
            .sizeDiffers(configured: 1, actual: 2),
            .missing, .missingSize, .createReadOnly, .missingDirectory, .locked, .deviceBusy, .deviceReadOnly,
            .notRegularFile, .notBlockDevice, .systemCall("open", errno: EACCES), .flushFailed(errno: EIO),
        ]
        for reason in reasons {
            let text = BackstoreError(path: "/srv/disk", reason: reason).description
            #expect(text.hasPrefix("/srv/disk: "))
            #expect(text.contains("; "), "no advice in: \(text)")
        }
        let text = BackstoreError(path: "a", reason: .sizeDiffers(configured: 111, actual: 222)).description
        #expect(text.contains("111") && text.contains("222"))
    }
}
