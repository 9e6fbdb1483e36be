// VhostUserMessage: the vhost-user protocol's messages as values: header, identifiers, payload fields.
//
// Owns: nothing but its bytes and descriptors. Called by: VhostUserConnection, VhostUserSession. Must not know: what
// the messages do.

import CLinux
import Glibc

/// A request of the front-end, by the name that the vhost-user specification gives it.
enum VhostUserRequest: UInt32 {
    case getFeatures = 1, setFeatures, setOwner, resetOwner, setMemoryTable, setLogBase, setLogDescriptor
    case setVringNumber, setVringAddress, setVringBase, getVringBase, setVringKick, setVringCall, setVringError
    case getProtocolFeatures, setProtocolFeatures, getQueueNumber, setVringEnable
    case setBackendRequestDescriptor = 21
    case getConfiguration = 24, setConfiguration
    case getInflightDescriptor = 31, setInflightDescriptor
    case resetDevice = 34, vringKick, getMaximumMemorySlots, addMemoryRegion, removeMemoryRegion, setStatus, getStatus

    /// Payload sizes that are right, in bytes. The table of memory regions has any whole number of regions.
    // swift-format-ignore
    var payloadSizes: ClosedRange<Int> {
        switch self {
        case .getFeatures, .setOwner, .resetOwner, .getProtocolFeatures, .getQueueNumber, .getMaximumMemorySlots: 0...0
        case .setBackendRequestDescriptor, .resetDevice, .getStatus:                     0...0
        case .setStatus, .vringKick:                                                     8...8
        case .getConfiguration, .setConfiguration:                                       12...12 + VirtioSCSIConfigurationSpace.capacity
        case .getInflightDescriptor, .setInflightDescriptor:                             20...24
        case .setFeatures, .setProtocolFeatures:                                         8...8
        case .setLogBase:                                                                16...16
        case .setLogDescriptor:                                                          0...8
        case .setMemoryTable:                                                            8...8 + 32 * VhostUserMessage.descriptorCapacity
        case .setVringNumber, .setVringBase, .getVringBase, .setVringEnable:             8...8
        case .setVringAddress:                                                           40...40
        case .setVringKick, .setVringCall, .setVringError:                               8...8
        case .addMemoryRegion, .removeMemoryRegion:                                      40...40
        }
    }

    /// Whether the request always has a reply of its own; the others are acknowledged if the front-end asks for it.
    var hasReply: Bool {
        switch self {
        case .getFeatures, .getProtocolFeatures, .getQueueNumber, .getVringBase, .getMaximumMemorySlots, .setLogBase,
            .getConfiguration, .getInflightDescriptor, .getStatus:
            true
        default: false
        }
    }
}

extension VhostUserRequest {
    /// The protocol feature without which the request does not exist; those that front-ends send without (SPDK's
    /// GET_QUEUE_NUM) have none.
    var protocolFeature: UInt64? {
        switch self {
        case .setLogBase, .setLogDescriptor: VhostUserProtocolFeature.logSharedMemory
        case .setBackendRequestDescriptor: VhostUserProtocolFeature.backendRequests
        case .getConfiguration, .setConfiguration: VhostUserProtocolFeature.configuration
        case .getInflightDescriptor, .setInflightDescriptor: VhostUserProtocolFeature.inflightSharedMemory
        case .resetDevice: VhostUserProtocolFeature.resetDevice
        case .vringKick: VhostUserProtocolFeature.inbandNotifications
        case .setStatus, .getStatus: VhostUserProtocolFeature.status
        default: nil
        }
    }
}

/// Feature bits that this device offers (virtio 1.2 clauses 5.6.3 and 6, vhost-user).
enum VirtioFeature {
    static let inOut: UInt64 = 1 << 0
    static let hotplug: UInt64 = 1 << 1
    static let change: UInt64 = 1 << 2
    static let logAll: UInt64 = 1 << 26
    static let anyLayout: UInt64 = 1 << 27
    static let indirectDescriptors: UInt64 = 1 << 28
    static let eventIndex: UInt64 = 1 << 29
    static let protocolFeatures: UInt64 = 1 << 30
    static let version1: UInt64 = 1 << 32
    static let ringPacked: UInt64 = 1 << 34
    static let inOrder: UInt64 = 1 << 35
    static let ringReset: UInt64 = 1 << 40

    /// RING_RESET is among them where it is configured.
    static let offered =
        inOut | hotplug | change | logAll | anyLayout | indirectDescriptors | eventIndex | protocolFeatures | version1
        | ringPacked | inOrder
}

/// Protocol feature bits of vhost-user that this device offers.
enum VhostUserProtocolFeature {
    static let multiqueue: UInt64 = 1 << 0
    static let logSharedMemory: UInt64 = 1 << 1
    static let replyAcknowledge: UInt64 = 1 << 3
    static let backendRequests: UInt64 = 1 << 5
    static let configuration: UInt64 = 1 << 9
    static let inflightSharedMemory: UInt64 = 1 << 12
    static let resetDevice: UInt64 = 1 << 13
    static let inbandNotifications: UInt64 = 1 << 14
    static let configureMemorySlots: UInt64 = 1 << 15
    static let status: UInt64 = 1 << 16

    /// CONFIG is among them where it is configured: QEMU's vhost-user-scsi warns of it at each start.
    static let offered =
        multiqueue | logSharedMemory | replyAcknowledge | backendRequests | inflightSharedMemory | resetDevice
        | inbandNotifications | configureMemorySlots | status
}

/// A request that the back-end sends at the channel that SET_BACKEND_REQ_FD brought.
enum BackendRequest: UInt32 {
    case vringCall = 4, vringError
}

/// One message: a request of the front-end with what came along.
struct VhostUserMessage {
    static let headerSize = 12
    /// File descriptors of one message: the memory table has the most.
    static let descriptorCapacity = 32
    /// Bytes of the longest payload that is read; a longer one ends the connection.
    static let payloadCapacity = 8 + 32 * descriptorCapacity

    private static let version: UInt32 = 1
    private static let versionMask: UInt32 = 3
    private static let replyFlag: UInt32 = 1 << 2
    private static let needReplyFlag: UInt32 = 1 << 3

    let identifier: UInt32
    let flags: UInt32
    var payload: [UInt8] = []
    /// The message owns them until somebody takes them.
    var descriptors: [Int32] = []

    /// Reads a header; `nil` if it is not one of a front-end that we understand.
    init?(header: [UInt8]) {
        identifier = Self.uint32(header, 0)
        flags = Self.uint32(header, 4)
        guard flags & Self.versionMask == Self.version, flags & Self.replyFlag == 0 else { return nil }
    }

    static func payloadSize(header: [UInt8]) -> Int { Int(uint32(header, 8)) }

    var request: VhostUserRequest? { VhostUserRequest(rawValue: identifier) }
    var needsReply: Bool { flags & Self.needReplyFlag != 0 }

    func uint32(_ offset: Int) -> UInt32 { Self.uint32(payload, offset) }
    func uint64(_ offset: Int) -> UInt64 { UInt64(uint32(offset)) | UInt64(uint32(offset + 4)) << 32 }

    /// Takes the message's first descriptor away; the caller closes it.
    mutating func takeDescriptor() -> Int32? { descriptors.isEmpty ? nil : descriptors.removeFirst() }

    func closeDescriptors() { for descriptor in descriptors { close(descriptor) } }

    /// The bytes of a reply.
    static func reply(to identifier: UInt32, payload: [UInt8]) -> [UInt8] {
        [identifier, version | replyFlag, UInt32(payload.count)].flatMap(bytes) + payload
    }

    /// The bytes of a request of the back-end, without need of a reply.
    static func backendRequest(_ request: BackendRequest, payload: [UInt8]) -> [UInt8] {
        [request.rawValue, version, UInt32(payload.count)].flatMap(bytes) + payload
    }

    static func bytes<Value: FixedWidthInteger>(_ value: Value) -> [UInt8] {
        (0..<MemoryLayout<Value>.size).map { UInt8(truncatingIfNeeded: value >> ($0 * 8)) }
    }

    private static func uint32(_ bytes: [UInt8], _ offset: Int) -> UInt32 {
        (0..<4).reduce(0) { $0 | UInt32(bytes[offset + $1]) << UInt32($1 * 8) }
    }
}
