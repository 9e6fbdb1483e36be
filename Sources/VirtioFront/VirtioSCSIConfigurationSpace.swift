// VirtioSCSIConfigurationSpace: the device's configuration space (virtio 1.2 clause 5.6.4), for front-ends that ask the
// back-end for it; QEMU's vhost-user-scsi has its own.
//
// Called by: VhostUserSession. Must not know: messages, rings.

import CLinux

/// The fields as bytes, little-endian.
struct VirtioSCSIConfigurationSpace {
    /// Bytes of it, and the most that one message carries (vhost-user, "Virtio device config space").
    static let size = 36
    static let capacity = 256
    // swift-format-ignore
    private enum Offset {
        static let senseSize = 20, cdbSize = 24
    }

    let requestQueues: Int
    let segments: Int
    var sizes = VirtioSCSISizes()

    /// All of it.
    var bytes: [UInt8] {
        // Segments of data: a ring's descriptors but the two of the request and response headers.
        let words: [UInt32] = [
            UInt32(requestQueues), UInt32(segments), 0xffff, 128, UInt32(VirtioSCSILayout.event),
            UInt32(sizes.sense), UInt32(sizes.cdb),
        ]
        let (channel, target, lun): (UInt16, UInt16, UInt32) = (0, 255, 16_383)
        return words.flatMap(VhostUserMessage.bytes) + VhostUserMessage.bytes(channel)
            + VhostUserMessage.bytes(target) + VhostUserMessage.bytes(lun)
    }

    /// Writes to it: sense_size and cdb_size as a whole, one or both; nothing else is writable.
    ///
    /// - Returns: Whether it was accepted.
    mutating func write(_ data: [UInt8], at offset: Int) -> Bool {
        guard !data.isEmpty, offset % 4 == 0, data.count % 4 == 0, offset >= Offset.senseSize,
            data.count <= Offset.cdbSize + 4 - offset
        else { return false }
        var new = sizes
        for index in stride(from: 0, to: data.count, by: 4) {
            let value = (0..<4).reduce(0) { $0 | Int(data[index + $1]) << (8 * $1) }
            if offset + index == Offset.senseSize { new.sense = value } else { new.cdb = value }
        }
        guard VirtioSCSISizes.senses.contains(new.sense), VirtioSCSISizes.cdbs.contains(new.cdb) else { return false }
        sizes = new
        return true
    }
}
