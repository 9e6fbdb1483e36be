// VirtualDeviceMap: what a guest's channel, target and logical unit numbers lead to.
//
// Owns: the map of one vhost and its references to nexuses. Called by: XenPort. Must not know: rings, the core.

import SCSICore
import Xenbus

/// The devices of one vhost, sorted by what requests name them by.
@safe
struct VirtualDeviceMap: ~Copyable {
    /// One device.
    @safe
    struct Entry {
        let key: UInt64
        /// The eight bytes of the LUN field; `nil`: the request's own number, for a whole target is mapped.
        fileprivate let mapped: UInt64?
        /// Kept alive by `nexuses`.
        let nexus: Unmanaged<TargetNexus>

        /// The LUN field for a request that names this number.
        @inline(__always)
        func unit(_ lun: UInt16) -> UInt64? { mapped ?? LUN(Int(lun))?.field }
    }

    private let entries: UnsafeMutablePointer<Entry>
    private(set) var count = 0
    private let wholeTarget: Bool
    private var nexuses: [TargetNexus] = []
    /// Lost ones: commands in flight may still refer to them.
    private var lost: [TargetNexus] = []

    init(wholeTarget: Bool) {
        self.wholeTarget = wholeTarget
        unsafe entries = .allocate(capacity: VSCSIIFLimits.devices)
    }

    deinit { unsafe entries.deallocate() }

    private func key(_ device: VirtualDevice) -> UInt64 { wholeTarget ? device.key & ~0xffff : device.key }

    /// Where a key is or would be.
    @inline(__always)
    private func position(_ key: UInt64) -> Int {
        var low = 0
        var high = count
        while low < high {
            let middle = (low + high) / 2
            if unsafe entries[middle].key < key { low = middle + 1 } else { high = middle }
        }
        return low
    }

    /// Adds a device; `false` if there is no room, or one with this address.
    mutating func add(_ device: VirtualDevice, unit: LUN, nexus: TargetNexus) -> Bool {
        let key = key(device)
        let place = position(key)
        guard count < VSCSIIFLimits.devices, unsafe place == count || entries[place].key != key else { return false }
        for index in stride(from: count, to: place, by: -1) { unsafe entries[index] = entries[index - 1] }
        let entry = unsafe Entry(
            key: key, mapped: wholeTarget ? nil : unit.field, nexus: Unmanaged.passUnretained(nexus))
        unsafe (entries + place).initialize(to: entry)
        count += 1
        if !nexuses.contains(where: { $0 === nexus }) { nexuses.append(nexus) }
        return true
    }

    /// Removes a device.
    ///
    /// - Returns: Its nexus if no other device uses it.
    mutating func remove(_ device: VirtualDevice) -> TargetNexus? {
        let key = key(device)
        let place = position(key)
        guard unsafe place < count && entries[place].key == key else { return nil }
        let nexus = unsafe entries[place].nexus.takeUnretainedValue()
        count -= 1
        for index in place..<count { unsafe entries[index] = entries[index + 1] }
        let used = (0..<count).contains {
            unsafe entries[$0].nexus.toOpaque() == Unmanaged.passUnretained(nexus).toOpaque()
        }
        guard !used else { return nil }
        nexuses.removeAll { $0 === nexus }
        lost.append(nexus)
        return nexus
    }

    /// Removes all devices.
    ///
    /// - Returns: Their nexuses.
    mutating func removeAll() -> [TargetNexus] {
        count = 0
        lost += nexuses
        defer { nexuses = [] }
        return nexuses
    }

    /// Forgets lost nexuses: no command refers to them any more.
    mutating func forgetLost() { lost = [] }

    /// The device that a request names.
    @inline(__always)
    func find(channel: UInt16, target: UInt16, lun: UInt16) -> Entry? {
        let key = VirtualDevice.key(channel: channel, target: target, lun: wholeTarget ? 0 : lun)
        let place = position(key)
        return unsafe place < count && entries[place].key == key ? entries[place] : nil
    }

    /// Whether any device has this channel and target.
    func hasTarget(channel: UInt16, target: UInt16) -> Bool { !entries(channel: channel, target: target).isEmpty }

    /// The devices of a channel and target.
    func entries(channel: UInt16, target: UInt16) -> [Entry] {
        let prefix = VirtualDevice.key(channel: channel, target: target, lun: 0)
        return (0..<count).filter { unsafe entries[$0].key & ~0xffff == prefix }.map { unsafe entries[$0] }
    }

    /// Writes REPORT LUNS parameter data (SPC-6 6.36) that lists the devices of a channel and target, as much as fits.
    ///
    /// - Returns: Bytes written.
    func writeReport(channel: UInt16, target: UInt16, empty: Bool, into buffer: UnsafeMutableRawBufferPointer) -> Int {
        var bytes = [UInt8](repeating: 0, count: 8)
        for entry in empty ? [] : entries(channel: channel, target: target) {
            let field = LUN(Int(entry.key & 0xffff))?.field ?? 0
            for shift in stride(from: 56, through: 0, by: -8) {
                bytes.append(UInt8(truncatingIfNeeded: field >> UInt64(shift)))
            }
        }
        let length = bytes.count - 8
        for index in 0..<4 { bytes[index] = UInt8(truncatingIfNeeded: length >> (8 * (3 - index))) }
        let count = min(bytes.count, buffer.count)
        unsafe UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]).copyBytes(from: bytes[..<count])
        return count
    }
}

extension VirtualDevice {
    /// What a request names, as one number: channel, target, logical unit.
    var key: UInt64 { VirtualDevice.key(channel: channel, target: target, lun: lun) }

    @inline(__always)
    static func key(channel: UInt16, target: UInt16, lun: UInt16) -> UInt64 {
        UInt64(channel) << 32 | UInt64(target) << 16 | UInt64(lun)
    }
}
