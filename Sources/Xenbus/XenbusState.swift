// XenbusState, VirtualDevice, PhysicalDevice: the values of vscsi's xenstore nodes, read strictly.
//
// Called by: the control plane of the Xen front, the toolstack. Must not know: xenstore, rings.

/// The state of one end of a xenbus connection, or of a device on it (xen/io/xenbus.h).
package enum XenbusState: Int, Sendable, CaseIterable {
    case unknown = 0
    case initialising = 1
    case initWait = 2
    case initialised = 3
    case connected = 4
    case closing = 5
    case closed = 6
    case reconfiguring = 7
    case reconfigured = 8

    /// Reads a `state` node. What is no state is unknown, never a trap: a guest writes these.
    package init(node: String) { self = decimal(node).flatMap { XenbusState(rawValue: Int($0)) } ?? .unknown }

    /// What the node holds.
    package var node: String { String(rawValue) }
}

/// Reads a decimal number of at most ten digits and nothing else.
package func decimal(_ text: some StringProtocol) -> UInt64? {
    guard !text.isEmpty, text.utf8.count <= 10, text.utf8.allSatisfy({ $0 >= 0x30 && $0 <= 0x39 }) else { return nil }
    return UInt64(text)
}

/// Reads `h:c:t:l`, four decimal numbers that fit 16 bits.
private func hctl(_ text: String) -> (UInt16, UInt16, UInt16, UInt16)? {
    let parts = text.split(separator: ":", omittingEmptySubsequences: false)
    guard parts.count == 4 else { return nil }
    let numbers = parts.compactMap { decimal($0).flatMap { UInt16(exactly: $0) } }
    return numbers.count == 4 ? (numbers[0], numbers[1], numbers[2], numbers[3]) : nil
}

/// Where a guest sees a device: `v-dev`, of which the guest's own driver chooses the host number.
package struct VirtualDevice: Hashable, Sendable, CustomStringConvertible {
    package let host: UInt16
    package let channel: UInt16
    package let target: UInt16
    package let lun: UInt16

    /// The address of these numbers.
    package init(host: UInt16 = 0, channel: UInt16, target: UInt16, lun: UInt16) {
        self.host = host
        self.channel = channel
        self.target = target
        self.lun = lun
    }

    /// Reads `h:c:t:l`; `nil` if it is anything else.
    package init?(node: String) {
        guard let (host, channel, target, lun) = hctl(node) else { return nil }
        self.init(host: host, channel: channel, target: target, lun: lun)
    }

    package var description: String { "\(host):\(channel):\(target):\(lun)" }
}

/// What is behind a device: `p-dev`.
package enum PhysicalDevice: Hashable, Sendable, CustomStringConvertible {
    /// `naa.<16 hexadecimal digits>:<lun>`: a target of this daemon and a logical unit of it.
    case named(target: UInt64, lun: UInt16)
    /// `h:c:t:l`: a SCSI device of this host.
    case host(host: UInt16, channel: UInt16, target: UInt16, lun: UInt16)

    /// Reads a `p-dev` node; `nil` if it is neither form.
    package init?(node: String) {
        if node.hasPrefix("naa.") {
            let parts = node.dropFirst(4).split(separator: ":", omittingEmptySubsequences: false)
            guard parts.count == 2, parts[0].utf8.count == 16, parts[0].allSatisfy(\.isHexDigit),
                let name = UInt64(parts[0], radix: 16), let lun = decimal(parts[1]).flatMap({ UInt16(exactly: $0) })
            else { return nil }
            self = .named(target: name, lun: lun)
        } else {
            guard let (host, channel, target, lun) = hctl(node) else { return nil }
            self = .host(host: host, channel: channel, target: target, lun: lun)
        }
    }

    package var description: String {
        switch self {
        case .named(let target, let lun):
            let digits = String(target, radix: 16)
            return "naa." + String(repeating: "0", count: 16 - digits.count) + digits + ":\(lun)"
        case .host(let host, let channel, let target, let lun): return "\(host):\(channel):\(target):\(lun)"
        }
    }
}

/// How a front end offers its ring.
package struct RingParameters: Hashable, Sendable {
    /// The grant reference of the ring page.
    package let ringReference: UInt32
    /// The front end's port of the event channel.
    package let eventChannel: UInt32

    package init(ringReference: UInt32, eventChannel: UInt32) {
        self.ringReference = ringReference
        self.eventChannel = eventChannel
    }
}
