// scsi-command: SCSI commands from standard input, one a line, sent to a vhost-user socket or to an sg node.
//
//   scsi-command /run/vm.sock|/dev/sg0
//   <CDB in hexadecimal> [in=<bytes>] [out=<data in hexadecimal>]   prints "status 02 key 6 asc 2900", data after "in"
//   count <LBA> <times>      adds 1 to the number in a block, by COMPARE AND WRITE; prints "counted", and the retries
//
// Called by: the end-to-end tests of Xen guests. Must not know: what they show.

import CLinux
import Glibc
import VhostUserInitiator

/// How a command has ended.
struct Answer {
    /// The host, or the front, could not carry it out.
    var transport = 0
    var status: UInt8 = 0
    var sense: [UInt8] = []
    var data: [UInt8] = []

    var key: UInt8 { sense.count > 2 ? sense[2] & 0xf : 0 }
    var isUnitAttention: Bool { status == 2 && key == 6 }

    var text: String {
        if transport != 0 { return "transport \(transport)" }
        var text = "status \(hexadecimal([status]))"
        if sense.count > 13 { text += " key \(key) asc \(hexadecimal([sense[12], sense[13]]))" }
        return data.isEmpty ? text : text + " in \(hexadecimal(data))"
    }
}

/// Something that takes SCSI commands.
protocol Initiator {
    func send(_ cdb: [UInt8], out: [UInt8], in length: Int) throws -> Answer
}

/// A vhost-user-scsi front-end, target 0, logical unit 0.
struct SocketInitiator: Initiator {
    private let frontEnd: VhostUserFrontEnd

    init(_ path: String) throws { frontEnd = try VhostUserFrontEnd.started(path: path) }

    func send(_ cdb: [UInt8], out: [UInt8], in length: Int) throws -> Answer {
        let result = try frontEnd.queues[2].run(
            SCSICommand(.flat(target: 0, lun: 0), cdb, dataOut: out, dataIn: length))
        return Answer(
            transport: Int(result.response), status: result.status, sense: result.sense,
            data: Array(result.dataIn.prefix(max(0, length - Int(result.residual)))))
    }
}

/// An sg node.
struct NodeInitiator: Initiator {
    private let descriptor: Int32

    init(_ path: String) throws {
        descriptor = unsafe open(path, O_RDWR)
        guard descriptor >= 0 else { throw Mistake("\(path) cannot be opened: errno \(errno)") }
    }

    func send(_ cdb: [UInt8], out: [UInt8], in length: Int) throws -> Answer {
        var cdb = cdb
        var data = out.isEmpty ? [UInt8](repeating: 0, count: length) : out
        var sense = [UInt8](repeating: 0, count: 96)
        var header = unsafe sg_io_hdr_t()
        unsafe header.interface_id = Int32(UInt8(ascii: "S"))
        unsafe header.dxfer_direction =
            data.isEmpty ? SG_DXFER_NONE : out.isEmpty ? SG_DXFER_FROM_DEV : SG_DXFER_TO_DEV
        unsafe header.cmd_len = UInt8(cdb.count)
        unsafe header.dxfer_len = UInt32(data.count)
        unsafe header.mx_sb_len = 96
        unsafe header.timeout = 30_000
        let result = unsafe cdb.withUnsafeMutableBufferPointer { cdb in
            unsafe data.withUnsafeMutableBytes { data in
                unsafe sense.withUnsafeMutableBufferPointer { sense in
                    unsafe header.cmdp = cdb.baseAddress
                    unsafe header.dxferp = data.baseAddress
                    unsafe header.sbp = sense.baseAddress
                    return unsafe ioctl(descriptor, UInt(SG_IO), &header)
                }
            }
        }
        guard result == 0 else { throw Mistake("SG_IO: errno \(errno)") }
        let transferred = unsafe max(0, length - Int(header.resid))
        return unsafe Answer(
            transport: Int(header.host_status), status: header.status,
            sense: Array(sense.prefix(Int(header.sb_len_wr))), data: Array(data.prefix(out.isEmpty ? transferred : 0)))
    }
}

struct Mistake: Error, CustomStringConvertible {
    let description: String
    init(_ text: String) { description = text }
}

func hexadecimal(_ bytes: [UInt8]) -> String {
    bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
}

func bytes(_ text: some StringProtocol) throws -> [UInt8] {
    let digits = Array(text)
    guard digits.count % 2 == 0 else { throw Mistake("\(text) is not hexadecimal") }
    return try stride(from: 0, to: digits.count, by: 2).map { index in
        guard let byte = UInt8(String(digits[index...(index + 1)]), radix: 16) else {
            throw Mistake("\(text) is not hexadecimal")
        }
        return byte
    }
}

/// Adds 1 to the number in the first eight bytes of a block, so that no two who do this lose one.
func count(_ lba: UInt8, _ times: Int, _ initiator: any Initiator) throws -> String {
    func good(_ cdb: [UInt8], out: [UInt8] = [], in length: Int = 0) throws -> Answer {
        while true {
            let answer = try initiator.send(cdb, out: out, in: length)
            if !answer.isUnitAttention { return answer }
        }
    }
    var done = 0
    var retries = 0
    while done < times {
        let old = try good([0x28, 0, 0, 0, 0, lba, 0, 0, 1, 0], in: 512)
        guard old.transport == 0, old.status == 0, old.data.count == 512 else { throw Mistake("READ: \(old.text)") }
        var new = old.data
        for index in 0..<8 {
            new[index] &+= 1
            if new[index] != 0 { break }
        }
        // COMPARE AND WRITE (SBC-4 5.3): one block to compare, then one to write.
        let cdb: [UInt8] = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, 1, 0, 0]
        let answer = try good(cdb, out: old.data + new)
        switch (answer.transport, answer.status, answer.key) {
        case (0, 0, _): done += 1
        case (0, 2, 0xe): retries += 1  // MISCOMPARE: the other was faster
        default: throw Mistake("COMPARE AND WRITE: \(answer.text)")
        }
    }
    return "counted \(done), \(retries) retries"
}

func carryOut(_ line: String, _ initiator: any Initiator) throws -> String {
    let words = line.split(separator: " ")
    if words.count == 3, words[0] == "count", let lba = UInt8(words[1]), let times = Int(words[2]) {
        return try count(lba, times, initiator)
    }
    var (out, length): ([UInt8], Int) = ([], 0)
    for word in words.dropFirst() {
        if word.hasPrefix("in="), let number = Int(word.dropFirst(3)) {
            length = number
        } else if word.hasPrefix("out=") {
            out = try bytes(word.dropFirst(4))
        } else {
            throw Mistake("\(word) is not understood")
        }
    }
    return try initiator.send(try bytes(words[0]), out: out, in: length).text
}

@main
struct ScsiCommand {
    static func main() {
        do {
            guard CommandLine.arguments.count == 2 else { throw Mistake("name a socket or an sg node") }
            let path = CommandLine.arguments[1]
            let initiator: any Initiator =
                path.hasPrefix("/dev/") ? try NodeInitiator(path) : try SocketInitiator(path)
            while let line = readLine() {
                if line.isEmpty { continue }
                print(try carryOut(line, initiator))
                fflush(nil)
            }
        } catch {
            print("scsi-command: \(error)")
            exit(1)
        }
    }
}
