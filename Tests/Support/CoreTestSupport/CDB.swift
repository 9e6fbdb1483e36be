// CDB: builders of command descriptor blocks, by the standards' names.
//
// Called by: tests. Must not know: the core's command table.

/// Command descriptor blocks as bytes.
public enum CDB {
    /// The bytes of a number, most significant first.
    public static func bytes(_ value: UInt64, _ count: Int) -> [UInt8] {
        (0..<count).map { UInt8(truncatingIfNeeded: value >> UInt64(8 * (count - 1 - $0))) }
    }

    /// The length of a command that addresses blocks.
    public enum Form: Int, CaseIterable, Sendable {
        case six = 6, ten = 10, twelve = 12, sixteen = 16
    }

    /// A command with an LBA and a number of blocks: `codes` in the order of the forms 6, 10, 12, 16.
    private static func extent(
        _ codes: [Form: UInt8], _ form: Form, _ address: UInt64, _ blocks: UInt64, _ flags: UInt8
    ) -> [UInt8] {
        let code = codes[form]!
        switch form {
        case .six: return [code] + bytes(address, 3) + bytes(blocks, 1) + [0]
        case .ten: return [code, flags] + bytes(address, 4) + [0] + bytes(blocks, 2) + [0]
        case .twelve: return [code, flags] + bytes(address, 4) + bytes(blocks, 4) + [0, 0]
        case .sixteen: return [code, flags] + bytes(address, 8) + bytes(blocks, 4) + [0, 0]
        }
    }

    /// READ (SBC-5). `flags` is byte 1: DPO 10h, FUA 08h.
    public static func read(_ form: Form = .ten, _ address: UInt64, _ blocks: UInt64, flags: UInt8 = 0) -> [UInt8] {
        extent([.six: 0x08, .ten: 0x28, .twelve: 0xa8, .sixteen: 0x88], form, address, blocks, flags)
    }

    /// WRITE (SBC-5).
    public static func write(_ form: Form = .ten, _ address: UInt64, _ blocks: UInt64, flags: UInt8 = 0) -> [UInt8] {
        extent([.six: 0x0a, .ten: 0x2a, .twelve: 0xaa, .sixteen: 0x8a], form, address, blocks, flags)
    }

    /// VERIFY (SBC-5). `byteCheck` is BYTCHK.
    public static func verify(
        _ form: Form = .ten, _ address: UInt64, _ blocks: UInt64, byteCheck: UInt8 = 0
    ) -> [UInt8] {
        extent([.ten: 0x2f, .twelve: 0xaf, .sixteen: 0x8f], form, address, blocks, byteCheck << 1)
    }

    /// WRITE SAME (SBC-5). `flags` is byte 1: UNMAP 08h, NDOB 01h.
    public static func writeSame(_ form: Form = .ten, _ address: UInt64, _ blocks: UInt64, flags: UInt8 = 0) -> [UInt8]
    {
        extent([.ten: 0x41, .sixteen: 0x93], form, address, blocks, flags)
    }

    /// SYNCHRONIZE CACHE (SBC-5).
    public static func synchronizeCache(_ form: Form = .ten, _ address: UInt64 = 0, _ blocks: UInt64 = 0) -> [UInt8] {
        extent([.ten: 0x35, .sixteen: 0x91], form, address, blocks, 0)
    }

    /// PRE-FETCH (SBC-5).
    public static func preFetch(
        _ form: Form = .ten, _ address: UInt64, _ blocks: UInt64, immediate: Bool = false
    ) -> [UInt8] {
        extent([.ten: 0x34, .sixteen: 0x90], form, address, blocks, immediate ? 2 : 0)
    }

    /// WRITE ATOMIC(16) (SBC-5). `flags` is byte 1: DPO 10h, FUA 08h.
    public static func writeAtomic(
        _ address: UInt64, _ blocks: UInt64, flags: UInt8 = 0, boundary: UInt16 = 0
    ) -> [UInt8] {
        [0x9c, flags] + bytes(address, 8) + bytes(UInt64(boundary), 2) + bytes(blocks, 2) + [0, 0]
    }

    /// XPWRITE(10) or (32) (SBC-3). `flags` is the byte with DPO 10h, FUA 08h.
    public static func xpWrite(_ address: UInt64, _ blocks: UInt64, flags: UInt8 = 0, isLong: Bool = false) -> [UInt8] {
        isLong
            ? thirtyTwo(6, address, blocks, flags)
            : [0x51, flags] + bytes(address, 4) + [0] + bytes(blocks, 2) + [0]
    }

    /// XDWRITEREAD(10) or (32) (SBC-3). `flags` is the byte with DPO 10h, FUA 08h, DISABLE WRITE 04h.
    public static func xdWriteRead(
        _ address: UInt64, _ blocks: UInt64, flags: UInt8 = 0, isLong: Bool = false
    ) -> [UInt8] {
        isLong
            ? thirtyTwo(7, address, blocks, flags)
            : [0x53, flags] + bytes(address, 4) + [0] + bytes(blocks, 2) + [0]
    }

    private static func thirtyTwo(_ action: UInt8, _ address: UInt64, _ blocks: UInt64, _ flags: UInt8) -> [UInt8] {
        [0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, action, flags, 0] + bytes(address, 8) + Array(repeating: 0, count: 8)
            + bytes(blocks, 4)
    }

    /// GET LBA STATUS(16) (SBC-5).
    public static func getLBAStatus(_ address: UInt64, allocation: UInt32 = 4096) -> [UInt8] {
        [0x9e, 0x12] + bytes(address, 8) + bytes(UInt64(allocation), 4) + [0, 0]
    }

    /// UNMAP (SBC-5).
    public static func unmap(listLength: Int, anchor: Bool = false) -> [UInt8] {
        [0x42, anchor ? 1 : 0, 0, 0, 0, 0, 0] + bytes(UInt64(listLength), 2) + [0]
    }

    /// The parameter list of UNMAP.
    public static func unmapList(_ extents: [(address: UInt64, blocks: UInt64)]) -> [UInt8] {
        bytes(UInt64(extents.count * 16 + 6), 2) + bytes(UInt64(extents.count * 16), 2) + [0, 0, 0, 0]
            + extents.flatMap { bytes($0.address, 8) + bytes($0.blocks, 4) + [0, 0, 0, 0] }
    }

    /// TEST UNIT READY (SPC-6).
    public static let testUnitReady: [UInt8] = [0, 0, 0, 0, 0, 0]

    /// REQUEST SENSE (SPC-6).
    public static func requestSense(allocation: UInt8 = 252, descriptorFormat: Bool = false) -> [UInt8] {
        [0x03, descriptorFormat ? 1 : 0, 0, 0, allocation, 0]
    }

    /// INQUIRY (SPC-6), of a vital product data page if one is given.
    public static func inquiry(page: UInt8? = nil, allocation: UInt16 = 255) -> [UInt8] {
        [0x12, page == nil ? 0 : 1, page ?? 0] + bytes(UInt64(allocation), 2) + [0]
    }

    /// REPORT LUNS (SPC-6).
    public static func reportLUNs(select: UInt8 = 0, allocation: UInt32 = 4096) -> [UInt8] {
        [0xa0, 0, select, 0, 0, 0] + bytes(UInt64(allocation), 4) + [0, 0]
    }

    /// MODE SENSE(6) (SPC-6).
    public static func modeSense6(
        _ page: UInt8, _ subpage: UInt8 = 0, control: UInt8 = 0, noDescriptors: Bool = true, allocation: UInt8 = 255
    ) -> [UInt8] {
        [0x1a, noDescriptors ? 8 : 0, control << 6 | page, subpage, allocation, 0]
    }

    /// MODE SENSE(10) (SPC-6). `flags` is byte 1: LLBAA 10h, DBD 08h.
    public static func modeSense10(
        _ page: UInt8, _ subpage: UInt8 = 0, control: UInt8 = 0, flags: UInt8 = 8, allocation: UInt16 = 4096
    ) -> [UInt8] {
        [0x5a, flags, control << 6 | page, subpage, 0, 0, 0] + bytes(UInt64(allocation), 2) + [0]
    }

    /// MODE SELECT(6) (SPC-6) with PF.
    public static func modeSelect6(listLength: Int, flags: UInt8 = 0x10) -> [UInt8] {
        [0x15, flags, 0, 0, UInt8(listLength), 0]
    }

    /// MODE SELECT(10) (SPC-6) with PF.
    public static func modeSelect10(listLength: Int, flags: UInt8 = 0x10) -> [UInt8] {
        [0x55, flags, 0, 0, 0, 0, 0] + bytes(UInt64(listLength), 2) + [0]
    }

    /// LOG SENSE (SPC-6). `control` is PC.
    public static func logSense(
        _ page: UInt8, _ subpage: UInt8 = 0, control: UInt8 = 1, pointer: UInt16 = 0, allocation: UInt16 = 4096,
        flags: UInt8 = 0
    ) -> [UInt8] {
        [0x4d, flags, control << 6 | page, subpage, 0] + bytes(UInt64(pointer), 2) + bytes(UInt64(allocation), 2) + [0]
    }

    /// LOG SELECT (SPC-6). `flags` is byte 1: PCR 02h, SP 01h.
    public static func logSelect(
        _ page: UInt8 = 0, _ subpage: UInt8 = 0, control: UInt8 = 1, listLength: Int = 0, flags: UInt8 = 0
    ) -> [UInt8] {
        [0x4c, flags, control << 6 | page, subpage, 0, 0, 0] + bytes(UInt64(listLength), 2) + [0]
    }

    /// REPORT TARGET PORT GROUPS (SPC-6).
    public static func reportTargetPortGroups(extended: Bool = false, allocation: UInt32 = 255) -> [UInt8] {
        [0xa3, extended ? 0x2a : 0x0a, 0, 0, 0, 0] + bytes(UInt64(allocation), 4) + [0, 0]
    }

    /// SET TARGET PORT GROUPS (SPC-6).
    public static func setTargetPortGroups(listLength: Int) -> [UInt8] {
        [0xa4, 0x0a, 0, 0, 0, 0] + bytes(UInt64(listLength), 4) + [0, 0]
    }

    /// The parameter list of SET TARGET PORT GROUPS: state codes and groups.
    public static func targetPortGroups(_ states: [(state: UInt8, group: UInt16)]) -> [UInt8] {
        [0, 0, 0, 0] + states.flatMap { [$0.state, 0] + bytes(UInt64($0.group), 2) }
    }

    /// READ CAPACITY(10) (SBC-5).
    public static let readCapacity10: [UInt8] = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]

    /// READ CAPACITY(16) (SBC-5).
    public static func readCapacity16(allocation: UInt32 = 32) -> [UInt8] {
        [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0] + bytes(UInt64(allocation), 4) + [0, 0]
    }

    /// START STOP UNIT (SBC-5).
    public static func startStopUnit(start: Bool, noFlush: Bool = false) -> [UInt8] {
        [0x1b, 0, 0, 0, (start ? 1 : 0) | (noFlush ? 4 : 0), 0]
    }

    /// REPORT SUPPORTED OPERATION CODES (SPC-6).
    public static func reportSupportedOperationCodes(
        options: UInt8 = 0, timeouts: Bool = false, code: UInt8 = 0, serviceAction: UInt16 = 0,
        allocation: UInt32 = 65535
    ) -> [UInt8] {
        [0xa3, 0x0c, (timeouts ? 0x80 : 0) | options, code] + bytes(UInt64(serviceAction), 2)
            + bytes(UInt64(allocation), 4) + [0, 0]
    }

    /// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS (SPC-6).
    public static func reportSupportedTaskManagementFunctions(extended: Bool = false, allocation: UInt32 = 64)
        -> [UInt8]
    {
        [0xa3, 0x0d, extended ? 0x80 : 0, 0, 0, 0] + bytes(UInt64(allocation), 4) + [0, 0]
    }
}
