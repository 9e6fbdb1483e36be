// PassthroughPolicy: which commands a guest may send to a device of this host that it was given.
//
// Owns: the list of those that it may not, with the reasons. Called by: PassthroughNexus. Must not know: devices.

/// The guest owns the device it was given, and may do to it what it likes: format it, write its mode pages, reserve it,
/// set its passwords. It may not reach through it to anything else.
enum PassthroughPolicy {
    /// - Parameters:
    ///   - cdb: At least one byte.
    ///   - type: The peripheral device type.
    static func allows(_ cdb: UnsafeBufferPointer<UInt8>, type: UInt8) -> Bool {
        switch unsafe cdb[0] {
        // EXTENDED COPY, POPULATE TOKEN, WRITE USING TOKEN: the array would copy from and to units that it gives to
        // this host, not to the guest.
        case 0x83: return false
        // MAINTENANCE OUT: SET TARGET PORT GROUPS, CHANGE ALIASES and others change the state of all units of the
        // array.
        case 0xa4: return false
        // WRITE BUFFER: microcode is the whole device's, which may have other units, and outlives the guest. Its data
        // and echo modes (0, 2, 0Ah) are harmless.
        case 0x3b: return unsafe cdb.count > 1 && [0x00, 0x02, 0x0a].contains(cdb[1] & 0x1f)
        // ATA PASS-THROUGH: ATA commands, of which DOWNLOAD MICROCODE is one, without what SCSI would check. A1h is
        // BLANK to a CD or DVD writer.
        case 0x85: return false
        case 0xa1: return type == 5
        default: return true
        }
    }

    /// ILLEGAL REQUEST, INVALID COMMAND OPERATION CODE (SPC-6 4.4), in the fixed format.
    static let refusal: [UInt8] = [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0]
}
