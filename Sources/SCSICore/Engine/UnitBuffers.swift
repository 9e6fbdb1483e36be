// UnitBuffers: the memory of a logical unit that READ BUFFER and WRITE BUFFER reach: a data buffer for all nexuses and
// an echo buffer.
//
// Owns: the bytes, and whose the echo is. Called by: the buffer commands, LogicalUnit (resets, new nexuses).
// Must not know: CDBs.

/// The buffers of one unit. They take no memory before they are written.
final class UnitBuffers {
    /// What reading the echo buffer gives.
    enum Echo {
        case bytes([UInt8])
        /// Another nexus has written it since this one did.
        case overwritten
        /// This nexus has not written it.
        case nothing
    }

    private var data: [UInt8] = []
    private var echo: [UInt8] = []
    private var echoOwner: UInt16?
    /// Nexuses whose echo was overwritten and that have not been told.
    private var overwritten: UInt64 = 0

    /// Writes into the data buffer; the caller has checked that it fits.
    func write(_ bytes: [UInt8], at offset: Int) {
        if data.isEmpty { data = Array(repeating: 0, count: Limits.dataBufferBytes) }
        data.replaceSubrange(offset..<offset + bytes.count, with: bytes)
    }

    /// Bytes of the data buffer; the caller has checked that there are as many.
    func read(_ count: Int, at offset: Int) -> [UInt8] {
        data.isEmpty ? Array(repeating: 0, count: count) : Array(data[offset..<offset + count])
    }

    func writeEcho(_ bytes: [UInt8], nexus: UInt16) {
        if let echoOwner, echoOwner != nexus { overwritten |= 1 << UInt64(echoOwner) }
        overwritten &= ~(1 << UInt64(nexus))
        echoOwner = nexus
        echo = bytes
    }

    /// Says once that the echo was overwritten.
    func readEcho(nexus: UInt16) -> Echo {
        if echoOwner == nexus { return .bytes(echo) }
        defer { overwritten &= ~(1 << UInt64(nexus)) }
        return overwritten & 1 << UInt64(nexus) == 0 ? .nothing : .overwritten
    }

    /// The echo of a nexus is not wanted any more.
    func forgetEcho(nexus: UInt16) {
        overwritten &= ~(1 << UInt64(nexus))
        if echoOwner == nexus { echoOwner = nil }
    }

    /// The echoes of all nexuses are not wanted any more.
    func reset() {
        overwritten = 0
        echoOwner = nil
    }
}
