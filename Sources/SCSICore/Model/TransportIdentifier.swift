// TransportIdentifier: initiator ports as TransportIDs (SPC-4 7.6.4).
//
// Called by: TargetDevice (names), the PERSISTENT RESERVE commands. Must not know: transports.
//
// No SCSI standard defines a TransportID for virtio-scsi or vscsiif. An initiator port has the format of SAS here
// (SPC-4 7.6.4), as the targets in Linux give their virtual ports: 24 bytes with a SAS address, which every tool can
// show. The address is derived from the name that the front gives the port, so it is the same after each restart.

/// A TransportID of an initiator port.
enum TransportIdentifier {
    /// Bytes of a TransportID.
    static let length = 24
    /// FORMAT CODE 00b, PROTOCOL IDENTIFIER 6h: SAS.
    private static let format: UInt8 = 0x06

    /// The SAS address of the port with a name: an NAA locally assigned designator (SPC-4 7.8.6) with 60 bits of
    /// FNV-1a of the name. Two names with the same bits are less likely than a broken processor.
    static func address(of name: String) -> UInt64 {
        var hash: UInt64 = 0xcbf2_9ce4_8422_2325
        for byte in name.utf8 { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01b3 }
        return hash & 0x0fff_ffff_ffff_ffff | 0x3 << 60
    }

    static func write(_ address: UInt64, to writer: inout ParameterWriter) {
        writer.byte(format)
        writer.zeros(3)
        writer.uint64(address)
        writer.zeros(12)
    }

    /// The address in a TransportID of a parameter list; `nil` if it is of another format, or too short.
    static func read(_ list: ParameterReader, at offset: Int) -> UInt64? {
        guard list.count >= offset + length, list.byte(offset) == format else { return nil }
        for reserved in [1, 2, 3] + Array(12..<length) where list.byte(offset + reserved) != 0 { return nil }
        return list.uint64(offset + 4)
    }
}
