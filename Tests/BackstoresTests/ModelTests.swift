// ModelTests: random requests on every medium against a model in memory.
//
// Called by: swift test. Must not know: the inside of the backstores.

import Backstores
import CBackstore
import Glibc
import Reactor
import SCSICore
import Testing

/// Sends random requests to a medium, several at once, and compares what comes back with a model.
struct ModelRun {
    let handle: BackstoreHandle
    let reactor: Reactor
    let blockSize: Int
    let discardReadsZeros: Bool
    var generator: SplitMix
    var model: [UInt8]
    var refusals = 0

    private struct Outstanding {
        let request: TestRequest
        let range: Range<Int>
        let changes: Bool
        let expected: [UInt8]?
    }
    private var outstanding: [Outstanding] = []

    init(_ handle: BackstoreHandle, _ reactor: Reactor, seed: UInt64) {
        self.handle = handle
        self.reactor = reactor
        let geometry = handle.geometry()
        blockSize = Int(geometry.logical_block_size)
        discardReadsZeros = geometry.capabilities & UInt32(SCSI_BACKSTORE_DISCARD_READS_ZEROS) != 0
        generator = SplitMix(seed: seed)
        model = [UInt8](repeating: 0, count: Int(geometry.size))
    }

    mutating func run(steps: Int, concurrency: Int) {
        for _ in 0..<steps {
            let blocks = model.count / blockSize
            // Mostly small; now and then longer than a bounce buffer.
            let longest = generator.below(25) == 0 ? (768 << 10) / blockSize : 24
            let count = min(1 + generator.below(longest), blocks)
            let first = generator.below(blocks - count + 1)
            step(first * blockSize..<(first + count) * blockSize, concurrency)
        }
        finish(0)
        let all = TestRequest(SCSI_BACKSTORE_READ, offset: 0, length: model.count, lengths: [model.count])
        submit(Outstanding(request: all, range: 0..<model.count, changes: false, expected: model))
        finish(0)
    }

    private mutating func step(_ range: Range<Int>, _ concurrency: Int) {
        let isRead = generator.below(3) == 0
        // The core keeps commands that overlap apart, so the model does too.
        if outstanding.contains(where: { $0.range.overlaps(range) && ($0.changes || !isRead) }) { finish(0) }
        finish(concurrency - 1)
        if isRead {
            let request = transfer(SCSI_BACKSTORE_READ, range, flags: 0)
            submit(Outstanding(request: request, range: range, changes: false, expected: Array(model[range])))
            return
        }
        switch generator.below(12) {
        case 0: submit(without(SCSI_BACKSTORE_FLUSH, 0..<0, flags: 0))
        case 1:
            submit(without(SCSI_BACKSTORE_WRITE_ZEROES, range, flags: randomFUA))
            clear(range)
        case 2:
            submit(without(SCSI_BACKSTORE_WRITE_ZEROES, range, flags: randomFUA | SCSI_BACKSTORE_MAY_UNMAP))
            clear(range)
        case 3 where discardReadsZeros:
            submit(without(SCSI_BACKSTORE_DISCARD, range, flags: randomFUA))
            clear(range)
        default:
            let request = transfer(SCSI_BACKSTORE_WRITE, range, flags: randomFUA)
            let data = generator.bytes(range.count)
            request.data = data
            submit(Outstanding(request: request, range: range, changes: true, expected: nil))
            model.replaceSubrange(range, with: data)
        }
    }

    private var randomFUA: Int {
        mutating get { generator.below(8) == 0 ? SCSI_BACKSTORE_FUA : 0 }
    }

    private mutating func clear(_ range: Range<Int>) {
        model.replaceSubrange(range, with: repeatElement(0, count: range.count))
    }

    private func without(_ operation: Int, _ range: Range<Int>, flags: Int) -> Outstanding {
        Outstanding(
            request: TestRequest(operation, offset: UInt64(range.lowerBound), length: range.count, flags: flags),
            range: range, changes: true, expected: nil)
    }

    /// A request whose segments have aligned or odd lengths and addresses.
    private mutating func transfer(_ operation: Int, _ range: Range<Int>, flags: Int) -> TestRequest {
        let sizes = generator.below(2) == 0 ? [512, 4096, 8192] : [1, 511, 512, 513, 4095, 4096, 4097, 65_536]
        var lengths: [Int] = []
        var rest = range.count
        while rest > 0 {
            let length = lengths.count == 1000 ? rest : min(rest, sizes[generator.below(sizes.count)])
            lengths.append(length)
            rest -= length
        }
        let gap = [0, 0, 512, 1, 3, 4][generator.below(6)]
        return TestRequest(
            operation, offset: UInt64(range.lowerBound), length: range.count, lengths: lengths, gap: gap, flags: flags)
    }

    private mutating func submit(_ one: Outstanding) {
        while !one.request.submit(handle) {
            refusals += 1
            // Full: it must become free by one of the completions.
            precondition(!outstanding.isEmpty, "refused with nothing in flight")
            finish(outstanding.count - 1)
        }
        outstanding.append(one)
    }

    /// Makes turns until at most `count` requests are outstanding.
    private mutating func finish(_ count: Int) {
        while outstanding.count > count {
            reactor.turn(mayWait: true)
            for one in outstanding where one.request.isDone {
                #expect(one.request.error == 0)
                #expect(one.request.completions == 1)
                #expect(one.request.isGuardIntact, "memory outside the segments was written")
                if let expected = one.expected {
                    #expect(one.request.data == expected, "wrong data at \(one.range)")
                }
            }
            outstanding.removeAll { $0.request.isDone }
        }
    }
}

@Suite struct ModelTests {
    @Test(arguments: Variant.all, [UInt64(1), 2])
    func randomRequestsMatchTheModel(_ variant: Variant, seed: UInt64) throws {
        let medium = try OpenMedium(variant, size: 2 << 20)
        var run = ModelRun(medium.handle, medium.reactor, seed: seed)
        run.run(steps: 300, concurrency: 32)
        #expect(medium.reactor.requestsInFlight == 0)
        try medium.close()
    }

    @Test(arguments: Variant.all)
    func randomRequestsMatchTheModelWithBlocksOf4096(_ variant: Variant) throws {
        let medium = try OpenMedium(variant, size: 8 << 20, blockSize: 4096)
        var run = ModelRun(medium.handle, medium.reactor, seed: 3)
        run.run(steps: 150, concurrency: 16)
        try medium.close()
    }

    @Test(arguments: Variant.files)
    func aFullReactorLosesNothing(_ variant: Variant) throws {
        let medium = try OpenMedium(variant, size: 2 << 20, depth: 2)
        var run = ModelRun(medium.handle, medium.reactor, seed: 4)
        run.run(steps: 300, concurrency: 12)
        #expect(run.refusals > 0, "the reactor was never full: the test shows nothing")
        try medium.close()
    }
}
