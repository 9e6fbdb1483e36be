// MODE SENSE and MODE SELECT.
//
// Called by: DeviceServer. Must not know: what the pages mean (ModePages).

import CBackstore
import CTarget

extension SPC {
    private static let allPages: UInt8 = 0x3f
    private static let allSubpages: UInt8 = 0xff

    /// MODE SENSE(6), (10) (SPC-4 6.13, 6.14).
    static func modeSense(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let long = cdb[0] == 0x5a
        let control = cdb[2] >> 6
        let (code, subpage) = (cdb[2] & 0x3f, cdb[3])
        let saves = unit.persistentState.canSave
        if control == 3, !saves { return .failed(SenseData(.illegalRequest, .savingParametersNotSupported)) }
        // All pages have no subpage but all or none (SPC-4 6.13.1).
        if code == allPages, subpage != 0, subpage != allSubpages { return .failed(.invalidField(inCDB: 3)) }
        let pages = unit.modePages.pages.filter {
            (code == allPages || $0.code == code) && (subpage == allSubpages || $0.subpage == subpage)
        }
        if pages.isEmpty {
            let known = code == allPages || unit.modePages.pages.contains { $0.code == code }
            return .failed(known ? .invalidField(inCDB: 3) : .invalidField(inCDB: 2, bit: 5))
        }
        let allocationLength = long ? Int(cdb.uint16(7)) : Int(cdb[4])
        return DeviceServer.parameterData(task, unit.shard, allocationLength: allocationLength) { writer in
            let longLBA = long && cdb.bit(1, 4)
            let descriptorLength = cdb.bit(1, 3) ? 0 : longLBA ? 16 : 8
            modeHeader(long: long, longLBA: longLBA, descriptorLength, unit, &writer)
            if descriptorLength > 0 { blockDescriptor(longLBA: longLBA, unit, &writer) }
            for page in pages {
                let values = [page.current, page.changeable, page.defaults, page.saved]
                page.write(values[Int(control)], saves: saves, to: &writer)
            }
            if long {
                writer.patch16(UInt16(clamping: writer.length - 2), at: 0)
            } else {
                writer.patch(UInt8(clamping: writer.length - 1), at: 0)
            }
        }
    }

    private static func modeHeader(
        long: Bool, longLBA: Bool, _ descriptorLength: Int, _ unit: LogicalUnit, _ writer: inout ParameterWriter
    ) {
        // DEVICE-SPECIFIC PARAMETER (SBC-4 6.5.1): WP, DPOFUA.
        let specific: UInt8 = (unit.isWriteProtected ? 0x80 : 0) | 0x10
        if long {
            writer.uint16(0)
            writer.byte(0)
            writer.byte(specific)
            writer.byte(longLBA && descriptorLength > 0 ? 1 : 0)
            writer.byte(0)
            writer.uint16(UInt16(descriptorLength))
        } else {
            writer.byte(0)
            writer.byte(0)
            writer.byte(specific)
            writer.byte(UInt8(descriptorLength))
        }
    }

    /// The short and the long LBA mode parameter block descriptor (SBC-4 6.5.2).
    private static func blockDescriptor(longLBA: Bool, _ unit: LogicalUnit, _ writer: inout ParameterWriter) {
        let length = unit.geometry.logical_block_size
        if longLBA {
            writer.uint64(unit.reportedBlocks)
            writer.uint32(0)
        } else {
            writer.uint32(UInt32(clamping: unit.reportedBlocks))
        }
        writer.uint32(length)
    }

    /// MODE SELECT(6), (10) (SPC-4 6.11, 6.12): the whole list is checked before any of it takes effect, and with SP it
    /// takes effect when it is saved.
    static func modeSelect(_ task: TaskHandle, _ cdb: CDB, on unit: LogicalUnit) -> Outcome {
        let long = cdb[0] == 0x55
        let length = long ? Int(cdb.uint16(7)) : Int(cdb[4])
        // Pages that are being saved are not changed meanwhile.
        if unit.persistentState.isBusy { return .needsState }
        let save = cdb.bit(1, 0)
        if length == 0, !save { return .done(.good) }
        guard length == 0 || cdb.bit(1, 4) else { return .failed(.invalidField(inCDB: 1, bit: 4)) }
        guard let list = unsafe DeviceServer.parameterList(task, length: length, into: unit.shard.parameters) else {
            return .overrun
        }
        var pages = unit.modePages
        if length > 0, let sense = parse(list, long: long, unit, into: &pages) { return .failed(sense) }
        let flush = unit.modePages.writeCacheEnable && !pages.writeCacheEnable
        if save {
            pages.saveCurrent()
            task.step = flush ? 1 : 0
            let nexus = task.nexus
            return unit.save(.savedModePages, pages.savedBytes) { unit.setModePages(pages, by: nexus) }
        }
        unit.setModePages(pages, by: task.nexus)
        return flush ? flushBeforeStatus(task) : .done(.good)
    }

    /// What was cached before becomes stable before the initiator may rely on the cache being off.
    static func flushBeforeStatus(_ task: TaskHandle) -> Outcome {
        task.step = 0
        DeviceServer.fillFlush(task)
        return .submit
    }

    private static func parse(
        _ list: ParameterReader, long: Bool, _ unit: LogicalUnit, into pages: inout ModePages
    ) -> SenseData? {
        let header = long ? 8 : 4
        if list.count < header { return .parameterListLengthError }
        if list.byte(long ? 2 : 1) != 0 { return .invalidField(inParameterList: long ? 2 : 1) }
        let longLBA = long && list.byte(4) & 1 != 0
        let descriptorLength = long ? Int(list.uint16(6)) : Int(list.byte(3))
        if descriptorLength != 0 {
            guard descriptorLength == (longLBA ? 16 : 8) else { return .invalidField(inParameterList: long ? 6 : 3) }
            if list.count < header + descriptorLength { return .parameterListLengthError }
            if let sense = checkBlockDescriptor(list, at: header, longLBA: longLBA, unit) { return sense }
        }
        var offset = header + descriptorLength
        while offset < list.count {
            if let sense = parsePage(list, &offset, into: &pages) { return sense }
        }
        return nil
    }

    /// The number and length of the blocks cannot be changed (SBC-4 6.5.2); 0 blocks, or the maximum, mean "as it is".
    private static func checkBlockDescriptor(
        _ list: ParameterReader, at offset: Int, longLBA: Bool, _ unit: LogicalUnit
    ) -> SenseData? {
        let blocks = longLBA ? list.uint64(offset) : UInt64(list.uint32(offset))
        let all = longLBA ? UInt64.max : UInt64(UInt32.max)
        if blocks != 0, blocks != all, blocks != unit.reportedBlocks {
            return .invalidField(inParameterList: offset)
        }
        let lengthOffset = offset + (longLBA ? 12 : 4)
        let length = longLBA ? list.uint32(lengthOffset) : list.uint32(lengthOffset) & 0xff_ffff
        return length == unit.geometry.logical_block_size ? nil : .invalidField(inParameterList: lengthOffset)
    }

    private static func parsePage(
        _ list: ParameterReader, _ offset: inout Int, into pages: inout ModePages
    ) -> SenseData? {
        guard list.count >= offset + 2 else { return .parameterListLengthError }
        let hasSubpage = list.byte(offset) & 0x40 != 0
        let header = hasSubpage ? 4 : 2
        guard list.count >= offset + header else { return .parameterListLengthError }
        let (code, subpage) = (list.byte(offset) & 0x3f, hasSubpage ? list.byte(offset + 1) : 0)
        guard let index = pages.index(code: code, subpage: subpage) else {
            return .invalidField(inParameterList: offset)
        }
        let lengthOffset = offset + (hasSubpage ? 2 : 1)
        let length = hasSubpage ? Int(list.uint16(lengthOffset)) : Int(list.byte(lengthOffset))
        guard length == pages.pages[index].current.count else { return .invalidField(inParameterList: lengthOffset) }
        guard list.count >= offset + header + length else { return .parameterListLengthError }
        let values = (0..<length).map { list.byte(offset + header + $0) }
        if let fault = pages.set(index, values) { return .invalidField(inParameterList: offset + header + fault) }
        offset += header + length
        return nil
    }
}
