// The shortest way through the whole core: the commands that every guest sends first.

import CoreTestSupport
import SCSICore
import Testing

@Suite("The first commands of a guest")
struct SmokeTests {
    let world = TestTarget()

    @Test("INQUIRY returns standard data")
    func inquiry() {
        let end = world.run(CDB.inquiry(), dataIn: 255)
        #expect(end.summary == "good")
        #expect(end.data.count == 96)
    }

    @Test("READ(10) returns what WRITE(10) wrote, through buffers of odd segments")
    func readsWhatWasWritten() {
        let data = (0..<1024).map { UInt8(truncatingIfNeeded: $0 * 7) }
        let written = world.run(CDB.write(.ten, 5, 2), dataOut: data, outLayout: [1, 510, 0, 3, 510])
        #expect(written.summary == "good")
        #expect(world.backstore.block(5) + world.backstore.block(6) == data)
        let read = world.run(CDB.read(.ten, 5, 2), dataIn: 1024, inLayout: [7, 1000, 17])
        #expect(read.summary == "good")
        #expect(read.data == data)
    }
}
