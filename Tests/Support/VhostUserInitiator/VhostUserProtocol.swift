// VhostUserProtocol: the numbers of the vhost-user protocol and the feature bits of virtio, as a front-end needs them.
//
// Called by: VhostUserChannel, VhostUserFrontEnd, tests. Must not know: the back-end's own view of the same numbers,
// which is written apart on purpose.

/// A request of the front-end, by the specification's name ("Front-end message types").
public struct VhostUserRequest: Equatable, Hashable, Sendable, CustomStringConvertible {
    /// The number on the wire.
    public let rawValue: UInt32
    /// The specification's name without VHOST_USER_.
    public let description: String

    private init(_ rawValue: UInt32, _ description: String) {
        self.rawValue = rawValue
        self.description = description
    }

    /// A request by its number alone.
    public static func number(_ number: UInt32) -> Self { Self(number, "request \(number)") }
}

extension VhostUserRequest {
    /// Features of the device: a reply of 64 bits.
    public static let getFeatures = Self(1, "GET_FEATURES")
    /// Features that the driver accepted.
    public static let setFeatures = Self(2, "SET_FEATURES")
    /// Begins a session.
    public static let setOwner = Self(3, "SET_OWNER")
    /// Deprecated: the specification advises back-ends to ignore it.
    public static let resetOwner = Self(4, "RESET_OWNER")
    /// The memory regions, each with a descriptor.
    public static let setMemoryTable = Self(5, "SET_MEM_TABLE")
    /// The log of dirty pages.
    public static let setLogBase = Self(6, "SET_LOG_BASE")
    /// Where to tell that the log was written.
    public static let setLogDescriptor = Self(7, "SET_LOG_FD")
    /// Size of a ring.
    public static let setVringNumber = Self(8, "SET_VRING_NUM")
    /// Addresses of a ring, as user addresses.
    public static let setVringAddress = Self(9, "SET_VRING_ADDR")
    /// Where in the ring to begin.
    public static let setVringBase = Self(10, "SET_VRING_BASE")
    /// Stops a ring: a reply that tells where it stood.
    public static let getVringBase = Self(11, "GET_VRING_BASE")
    /// Starts a ring: the eventfd of the driver's notifications.
    public static let setVringKick = Self(12, "SET_VRING_KICK")
    /// The eventfd of the device's notifications.
    public static let setVringCall = Self(13, "SET_VRING_CALL")
    /// The eventfd that tells that a ring is broken.
    public static let setVringError = Self(14, "SET_VRING_ERR")
    /// Protocol features of the back-end: a reply of 64 bits.
    public static let getProtocolFeatures = Self(15, "GET_PROTOCOL_FEATURES")
    /// Protocol features that the front-end accepted.
    public static let setProtocolFeatures = Self(16, "SET_PROTOCOL_FEATURES")
    /// Queues that the back-end has at most: a reply of 64 bits.
    public static let getQueueNumber = Self(17, "GET_QUEUE_NUM")
    /// Enables or disables a ring.
    public static let setVringEnable = Self(18, "SET_VRING_ENABLE")
    /// A socket for requests of the back-end.
    public static let setBackendChannel = Self(21, "SET_BACKEND_REQ_FD")
    /// Bytes of the configuration space: a reply.
    public static let getConfiguration = Self(24, "GET_CONFIG")
    /// Writes bytes of the configuration space.
    public static let setConfiguration = Self(25, "SET_CONFIG")
    /// A memory in which the back-end remembers what is in flight.
    public static let getInflight = Self(31, "GET_INFLIGHT_FD")
    /// Hands that memory to a new back-end.
    public static let setInflight = Self(32, "SET_INFLIGHT_FD")
    /// Resets the device.
    public static let resetDevice = Self(34, "RESET_DEVICE")
    /// A kick without an eventfd (INBAND_NOTIFICATIONS).
    public static let vringKick = Self(35, "VRING_KICK")
    /// Memory regions that the back-end takes: a reply of 64 bits.
    public static let getMaximumMemorySlots = Self(36, "GET_MAX_MEM_SLOTS")
    /// One more memory region.
    public static let addMemoryRegion = Self(37, "ADD_MEM_REG")
    /// One memory region less.
    public static let removeMemoryRegion = Self(38, "REM_MEM_REG")
    /// The device status that the driver wrote.
    public static let setStatus = Self(39, "SET_STATUS")
    /// The device status: a reply of 64 bits.
    public static let getStatus = Self(40, "GET_STATUS")
}

/// Feature bits (virtio 1.2 clauses 5.6.3 and 6; bit 30 is vhost-user's).
public enum VirtioFeatureBit {
    /// Bidirectional commands.
    public static let inOut: UInt64 = 1 << 0
    /// Events of logical units that come and go.
    public static let hotplug: UInt64 = 1 << 1
    /// Events of changed parameters.
    public static let change: UInt64 = 1 << 2
    /// Dirty logging (vhost).
    public static let logAll: UInt64 = 1 << 26
    /// Headers may be cut anywhere, in legacy devices.
    public static let anyLayout: UInt64 = 1 << 27
    /// Descriptors in a table of their own.
    public static let indirectDescriptors: UInt64 = 1 << 28
    /// Notifications by index.
    public static let eventIndex: UInt64 = 1 << 29
    /// There are protocol features.
    public static let protocolFeatures: UInt64 = 1 << 30
    /// Virtio 1.0 and later.
    public static let version1: UInt64 = 1 << 32
    /// Packed rings.
    public static let ringPacked: UInt64 = 1 << 34
    /// Buffers are used in the order in which they were made available.
    public static let inOrder: UInt64 = 1 << 35
    /// Single queues can be reset.
    public static let ringReset: UInt64 = 1 << 40
}

/// Protocol feature bits ("Protocol features").
public enum VhostUserProtocolBit {
    /// Several queues; GET_QUEUE_NUM.
    public static let multiqueue: UInt64 = 1 << 0
    /// The dirty log as a descriptor.
    public static let logSharedMemory: UInt64 = 1 << 1
    /// The need_reply flag.
    public static let replyAcknowledge: UInt64 = 1 << 3
    /// Requests of the back-end.
    public static let backendRequests: UInt64 = 1 << 5
    /// GET_CONFIG, SET_CONFIG.
    public static let configuration: UInt64 = 1 << 9
    /// The memory of what is in flight.
    public static let inflightSharedMemory: UInt64 = 1 << 12
    /// RESET_DEVICE.
    public static let resetDevice: UInt64 = 1 << 13
    /// Notifications as messages.
    public static let inbandNotifications: UInt64 = 1 << 14
    /// ADD_MEM_REG, REM_MEM_REG, GET_MAX_MEM_SLOTS.
    public static let configureMemorySlots: UInt64 = 1 << 15
    /// SET_STATUS, GET_STATUS.
    public static let status: UInt64 = 1 << 16
    /// A ring may stop with requests in flight.
    public static let getVringBaseInflight: UInt64 = 1 << 20
}

/// Integers in the order of the wire: little-endian.
public enum WireBytes {
    /// The bytes of integers of one type.
    public static func of<Value: FixedWidthInteger>(_ values: Value...) -> [UInt8] {
        values.flatMap { value in
            (0..<MemoryLayout<Value>.size).map { UInt8(truncatingIfNeeded: value >> Value(8 * $0)) }
        }
    }

    /// Reads an integer; `nil` where the bytes end before it does.
    public static func read<Value: FixedWidthInteger & UnsignedInteger>(
        _ type: Value.Type, _ bytes: [UInt8], at offset: Int
    ) -> Value? {
        let size = MemoryLayout<Value>.size
        guard offset >= 0, bytes.count >= size, offset <= bytes.count - size else { return nil }
        return (0..<size).reduce(Value(0)) { $0 | Value(bytes[offset + $1]) << Value(8 * $1) }
    }
}
