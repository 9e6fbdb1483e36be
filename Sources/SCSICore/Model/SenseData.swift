// SenseData: why a command ended with CHECK CONDITION, as a value; bytes only when a port asks for them.
//
// Called by: everything that refuses or fails a command; ports, through TaskHandle.copySense.
// Must not know: commands, tasks.

/// A sense key (SPC-4: sense key descriptions).
public enum SenseKey: UInt8, Sendable {
    case noSense = 0x0
    case recoveredError = 0x1
    case notReady = 0x2
    case mediumError = 0x3
    case hardwareError = 0x4
    case illegalRequest = 0x5
    case unitAttention = 0x6
    case dataProtect = 0x7
    case blankCheck = 0x8
    case copyAborted = 0xa
    case abortedCommand = 0xb
    case volumeOverflow = 0xd
    case miscompare = 0xe
    case completed = 0xf
}

/// Sense data: a key, an additional sense code, and what goes with them.
public struct SenseData: Equatable, Sendable {
    /// What class of condition it is.
    public var key: SenseKey
    /// What exactly it is.
    public var code: AdditionalSense
    /// The INFORMATION field, if valid: an LBA, or the offset of a difference (SPC-4: INFORMATION field).
    public var information: UInt64?
    /// The sense key specific bytes, if valid: SKSV, C/D, BPV, bit pointer and field pointer (SPC-4 4.5.2.4).
    var specific: (UInt8, UInt16)?
    /// Whether the error is that of an earlier command, whose status did not tell (response codes 71h and 73h).
    public var isDeferred = false

    /// NO SENSE.
    public static let none = SenseData(.noSense, .noAdditionalSense)

    /// A key and a code.
    public init(_ key: SenseKey, _ code: AdditionalSense, information: UInt64? = nil) {
        self.key = key
        self.code = code
        self.information = information
        specific = nil
    }

    /// The same, field by field.
    public static func == (left: Self, right: Self) -> Bool {
        left.key == right.key && left.code == right.code && left.information == right.information
            && left.specific?.0 == right.specific?.0 && left.specific?.1 == right.specific?.1
            && left.isDeferred == right.isDeferred
    }

    private static func illegal(_ code: AdditionalSense, inCDB: Bool, byte: Int, bit: UInt8?) -> SenseData {
        var sense = SenseData(.illegalRequest, code)
        sense.specific = (0x80 | (inCDB ? 0x40 : 0) | (bit.map { 0x08 | $0 } ?? 0), UInt16(truncatingIfNeeded: byte))
        return sense
    }

    /// INVALID FIELD IN CDB, pointing at a byte and, where one is to blame, at the most significant bit of the field.
    public static func invalidField(inCDB byte: Int, bit: UInt8? = nil) -> SenseData {
        illegal(.invalidFieldInCDB, inCDB: true, byte: byte, bit: bit)
    }

    /// INVALID FIELD IN PARAMETER LIST, pointing at a byte of the list.
    public static func invalidField(inParameterList byte: Int, bit: UInt8? = nil) -> SenseData {
        illegal(.invalidFieldInParameterList, inCDB: false, byte: byte, bit: bit)
    }

    /// INVALID COMMAND OPERATION CODE, pointing at byte 0.
    public static var invalidOperationCode: SenseData {
        illegal(.invalidCommandOperationCode, inCDB: true, byte: 0, bit: nil)
    }

    /// PARAMETER LIST LENGTH ERROR.
    public static var parameterListLengthError: SenseData { SenseData(.illegalRequest, .parameterListLengthError) }

    /// LOGICAL BLOCK ADDRESS OUT OF RANGE, pointing at the CDB's LBA field.
    public static func lbaOutOfRange(_ address: LogicalBlockAddress, field byte: Int = 2) -> SenseData {
        illegal(.logicalBlockAddressOutOfRange, inCDB: true, byte: byte, bit: nil).with(information: address.value)
    }

    private func with(information: UInt64) -> SenseData {
        var copy = self
        copy.information = information
        return copy
    }

    /// Writes fixed (70h, deferred 71h) or descriptor (72h, 73h) format (SPC-4: fixed and descriptor format sense
    /// data), as much as fits.
    ///
    /// - Returns: The number of bytes written.
    func encode(descriptorFormat: Bool, into buffer: UnsafeMutableRawBufferPointer) -> Int {
        guard key != .noSense || code != .noAdditionalSense else { return 0 }
        var writer = unsafe ParameterWriter(buffer)
        write(descriptorFormat: descriptorFormat, to: &writer)
        return writer.written
    }

    /// The same for REQUEST SENSE, which reports NO SENSE as well.
    func write(descriptorFormat: Bool, to writer: inout ParameterWriter) {
        descriptorFormat ? writeDescriptors(to: &writer) : writeFixed(to: &writer)
    }

    private func writeFixed(to writer: inout ParameterWriter) {
        // The INFORMATION field has four bytes; a larger value is not valid in this format (SPC-4: fixed format sense
        // data).
        let information = self.information.flatMap { UInt32(exactly: $0) }
        writer.byte((information == nil ? 0x70 : 0xf0) | (isDeferred ? 0x01 : 0))
        writer.byte(0)
        writer.byte(key.rawValue)
        writer.uint32(information ?? 0)
        writer.byte(10)
        writer.zeros(4)
        writer.uint16(code.rawValue)
        writer.byte(0)
        writer.byte(specific?.0 ?? 0)
        writer.uint16(specific?.1 ?? 0)
    }

    private func writeDescriptors(to writer: inout ParameterWriter) {
        writer.byte(isDeferred ? 0x73 : 0x72)
        writer.byte(key.rawValue)
        writer.uint16(code.rawValue)
        writer.zeros(3)
        writer.byte((information == nil ? 0 : 12) + (specific == nil ? 0 : 8))
        if let information {
            writer.byte(0x00)
            writer.byte(0x0a)
            writer.byte(0x80)
            writer.byte(0)
            writer.uint64(information)
        }
        if let specific {
            writer.byte(0x02)
            writer.byte(0x06)
            writer.zeros(2)
            writer.byte(specific.0)
            writer.uint16(specific.1)
            writer.byte(0)
        }
    }
}
