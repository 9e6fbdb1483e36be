// CommandLineTests: what the targetd executable says and how it exits, without serving anything. Must not know: how
// the daemon works.

import Foundation
import Glibc
import Testing

@testable import targetd

@Suite struct CommandLineTests {
    private let folder: TemporaryFolder

    init() throws { folder = try TemporaryFolder() }

    private func configuration(medium: String, socket: String? = nil) -> String {
        """
        backstores:
          disk: \(medium)
        targets:
          naa.60014054ac780582:
            luns: { 0: disk }
        vhost-user-scsi:
          - { socket: \(socket ?? folder("s")), targets: { 0: naa.60014054ac780582 } }
        """
    }

    /// What --check prints to standard error for a medium, one problem expected.
    private func check(_ medium: String, socket: String? = nil) throws -> (status: Int32, problem: String) {
        let file = try folder.write("c.yaml", configuration(medium: medium, socket: socket))
        let result = try targetd("--check", file)
        #expect(result.output == "" || result.status == 0)
        return (result.status, result.errors.replacing(folder.path, with: "DIR"))
    }

    @Test func goodFileIsSummarized() throws {
        let file = try folder.write("c.yaml", configuration(medium: "{ type: ram, size: 1MiB }"))
        let result = try targetd("--check", file)
        #expect(result.status == 0)
        #expect(result.errors == "")
        #expect(result.output == "\(file): no errors: 1 backstore, 1 target with 1 logical unit, 1 socket\n")
    }

    @Test func allProblemsArePrintedWithTheirLines() throws {
        let file = try folder.write(
            "c.yaml", configuration(medium: "{ type: ram, size: 0, sise: 1 }") + "\nreactor: 7\n")
        let result = try targetd("--check", file)
        #expect(result.status == ExitStatus.configuration.rawValue)
        let lines = result.errors.split(separator: "\n")
        #expect(lines.count == 3)
        #expect(lines.first?.hasPrefix("\(file):2: error: backstores.disk.") == true)
        #expect(lines.last?.hasPrefix("\(file):8: error: reactor: is not a key here: did you mean reactors?") == true)
    }

    @Test func warningsDoNotFail() throws {
        let file = try folder.write(
            "c.yaml",
            configuration(medium: "{ type: ram, size: 1MiB }").replacing(
                "targets:\n", with: "  spare: { type: ram, size: 1MiB }\ntargets:\n"))
        let result = try targetd("--check", file)
        #expect(result.status == 0)
        #expect(result.errors == "\(file):3: warning: backstores.spare: is not a logical unit of any target\n")
    }

    @Test func fileThatIsNotThereIsAnError() throws {
        let result = try targetd("--check", folder("none.yaml"))
        #expect(result.status == ExitStatus.configuration.rawValue)
        #expect(result.errors == "\(folder("none.yaml")): error: cannot be read: No such file or directory\n")
    }

    @Test func folderAndForeignBytesAreErrors() throws {
        #expect(try targetd("--check", folder.path).errors.hasSuffix("error: cannot be read: Is a directory\n"))
        try Data([0x61, 0xff, 0xfe]).write(to: URL(fileURLWithPath: folder("b.yaml")))
        let result = try targetd("--check", folder("b.yaml"))
        #expect(result.status == ExitStatus.configuration.rawValue)
        #expect(result.errors == "\(folder("b.yaml")): error: is not UTF-8 text\n")
    }

    @Test func missingFileOfABackstoreIsAnError() throws {
        let (status, problem) = try check("{ type: file, path: \(folder("none.img")) }")
        #expect(status == ExitStatus.configuration.rawValue)
        #expect(
            problem == """
                DIR/c.yaml:2: error: backstores.disk.path: DIR/none.img does not exist: correct the path, or add size: \
                to have it created

                """)
    }

    @Test func missingFolderOfABackstoreIsAnError() throws {
        let (status, problem) = try check("{ type: file, path: \(folder("no/d.img")), size: 1MiB }")
        #expect(status == ExitStatus.configuration.rawValue)
        #expect(
            problem == """
                DIR/c.yaml:2: error: backstores.disk.path: the folder DIR/no does not exist: make it, or correct the \
                path, so that the file can be made there

                """)
    }

    @Test func missingFileThatIsToBeReadOnlyIsAnError() throws {
        let (_, problem) = try check("{ type: file, path: \(folder("d.img")), size: 1MiB, read-only: true }")
        #expect(problem.hasSuffix("DIR/d.img does not exist, and is not created because read-only is set\n"))
    }

    @Test func fileOfAnotherSizeIsAnError() throws {
        try Data(count: 4096).write(to: URL(fileURLWithPath: folder("d.img")))
        let (status, problem) = try check("{ type: file, path: \(folder("d.img")), size: 1MiB }")
        #expect(status == ExitStatus.configuration.rawValue)
        #expect(problem.hasPrefix("DIR/c.yaml:2: error: backstores.disk.size: is 1MiB, but DIR/d.img has 4KiB: "))
    }

    @Test(arguments: [
        (0, "is empty"), (1000, "has 1000 bytes, which is not a multiple of the logical block of 512 bytes"),
    ])
    func fileThatIsNoDiskIsAnError(bytes: Int, reason: String) throws {
        try Data(count: bytes).write(to: URL(fileURLWithPath: folder("d.img")))
        let (status, problem) = try check("{ type: file, path: \(folder("d.img")) }")
        #expect(status == ExitStatus.configuration.rawValue)
        #expect(problem.contains(reason), "\(problem)")
    }

    @Test func mediaOfTheWrongKindAreErrors() throws {
        #expect(try check("{ type: file, path: /dev/null }").problem.contains("is a character device, not a file"))
        #expect(try check("{ type: file, path: \(folder.path) }").problem.contains("is a folder, not a file"))
        #expect(try check("{ type: block-device, path: /dev/null }").problem.contains("not a block device"))
        try Data(count: 512).write(to: URL(fileURLWithPath: folder("d.img")))
        #expect(try check("{ type: block-device, path: \(folder("d.img")) }").problem.contains("use type: file"))
        #expect(try check("{ type: block-device, path: /dev/none }").problem.contains("No such file or directory"))
    }

    @Test func twoPathsToOneFileAreAnError() throws {
        try Data(count: 512).write(to: URL(fileURLWithPath: folder("a.img")))
        try FileManager.default.createSymbolicLink(atPath: folder("b.img"), withDestinationPath: folder("a.img"))
        let medium = "{ type: file, path: \(folder("a.img")) }\n  twin: { type: file, path: \(folder("b.img")) }"
        let (status, problem) = try check(medium)
        #expect(status == ExitStatus.configuration.rawValue)
        #expect(
            problem.contains("c.yaml:3: error: backstores.twin.path: is the same medium as DIR/a.img of backstore disk")
        )
    }

    @Test func placeOfTheSocketMustBeUsable() throws {
        let ram = "{ type: ram, size: 1MiB }"
        #expect(
            try check(ram, socket: folder("no/s")).problem.contains(
                "7: error: vhost-user-scsi[0].socket: the folder DIR/no"))
        _ = try folder.write("file", "")
        #expect(
            try check(ram, socket: folder("file")).problem.contains(
                "DIR/file exists and is a file, not a socket: it is not replaced"))
        #expect(FileManager.default.fileExists(atPath: folder("file")))
    }

    @Test(arguments: [
        [], ["--config", "a", "--check", "b"], ["--ram", "1GiB"],
        ["--ram", "1GiB", "--file", "x", "--vhost-user", "s"],
        ["--ram", "1GiB", "--fd", "3", "--vhost-user", "s"], ["--config", "a", "--fd", "3"],
        ["--config", "a", "--ram", "1GiB"], ["--vhost-user", "s"], ["--ram", "1G", "--vhost-user", "s"],
        ["--ram", "1GiB", "--size", "1GiB", "--vhost-user", "s"], ["--config", "a", "--read-only"],
        ["--config", "a", "--queues", "2"], ["--ram", "1GiB", "--vhost-user", "s", "--queues", "0"],
        ["--ram", "1GiB", "--vhost-user", "s", "--block-size", "520"], ["--config", "a", "--reactors", "0"],
        ["--config", "a", "--io-engine", "uring"], ["--config", "a", "--poll-microseconds", "1000001"],
        ["--config", "a", "--log-level", "loud"], ["--ram", "1GiB", "--vhost-user", "s", "--buffered"], ["--unknown"],
        ["--ram", "1GiB", "--fd", "3", "--client"], ["--config", "a", "--client"],
    ])
    func wrongCommandLineIsRefusedWithTheUsage(arguments: [String]) throws {
        let result = try RunningDaemon(arguments).finish()
        #expect(result.status == ExitStatus.usage.rawValue)
        #expect(result.errors.contains("Error: "))
        #expect(result.output == "")
    }

    @Test func ambiguousSizeIsExplained() throws {
        let result = try targetd("--ram", "10G", "--vhost-user", "s")
        #expect(result.errors.contains("write 10GiB (powers of 1024) or 10GB (powers of 1000)"), "\(result.errors)")
    }

    @Test func optionIsNamedWhereThereIsNoFile() throws {
        let result = try targetd("--ram", "100", "--vhost-user", folder("s"))
        #expect(result.status == ExitStatus.configuration.rawValue)
        #expect(result.errors == "targetd: error: --ram: 100B is not a multiple of the logical block of 512 bytes\n")
        let missing = try targetd("--file", folder("none"), "--vhost-user", folder("no/s"))
        #expect(
            missing.errors.replacing(folder.path, with: "DIR") == """
                targetd: error: --file: DIR/none does not exist: correct the path, or add size: to have it created
                targetd: error: --vhost-user: the folder DIR/no does not exist: make it, or correct the path, so that \
                the socket can be made there

                """)
    }

    @Test func capabilitiesArePrintedWhateverElseIsAsked() throws {
        let result = try targetd("--print-capabilities", "--ram", "1GiB")
        #expect(result.status == 0)
        #expect(result.output == "{ \"type\": \"scsi\", \"features\": [] }\n")
    }

    @Test func versionAndHelpArePrinted() throws {
        let version = try targetd("--version")
        #expect(version.status == 0)
        #expect(version.output == Version.text + "\n")
        let help = try targetd("--help")
        #expect(help.status == 0)
        for option in ["--config", "--check", "--ram", "--file", "--block-device", "--vhost-user", "--io-engine"] {
            #expect(help.output.contains(option))
        }
    }
}
