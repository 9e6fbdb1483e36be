// XenStatus: what the control API tells of Xen guests.
//
// Owns: the names and units of what is told. Called by: targetd, targetctl. Must not know: how it is found out or
// shown.

/// The Xen front. There is none where Xen guests are not served.
public struct XenStatus: Codable, Equatable, Sendable {
    /// What it waits for before it can serve, such as xenstored; `nil`: it serves.
    public var waitsFor: String?
    /// The vhosts of all guests, by domain and number.
    public var vhosts: [XenVhostStatus]

    /// A status of these values.
    public init(waitsFor: String?, vhosts: [XenVhostStatus]) {
        self.waitsFor = waitsFor
        self.vhosts = vhosts
    }
}

/// A virtual SCSI host of a Xen guest. Counters count from the moment at which its ring was mapped.
public struct XenVhostStatus: Codable, Equatable, Sendable {
    /// The guest's domain.
    public var domain: Int
    /// The number of the vhost in its guest.
    public var vhost: Int
    /// The reactor that serves it; `nil` while it has no ring.
    public var reactor: Int?
    /// The state of our end in xenstore, such as `connected`.
    public var backendState: String
    /// The state of the guest's end.
    public var frontendState: String
    /// Its devices.
    public var devices: [XenDeviceStatus]
    /// Why it is not served, if it is not.
    public var fault: String?
    /// Commands that the guest has sent.
    public var commands: UInt64
    /// Task management functions that the guest has sent.
    public var taskManagementFunctions: UInt64
    /// Notifications that were sent to the guest.
    public var notifications: UInt64
    /// Commands that had to wait for staging memory.
    public var waits: UInt64

    /// A vhost that has done nothing yet.
    public init(domain: Int, vhost: Int, backendState: String, frontendState: String, devices: [XenDeviceStatus]) {
        self.domain = domain
        self.vhost = vhost
        self.backendState = backendState
        self.frontendState = frontendState
        self.devices = devices
        (commands, taskManagementFunctions, notifications, waits) = (0, 0, 0, 0)
    }
}

/// A device of a vhost.
public struct XenDeviceStatus: Codable, Equatable, Sendable {
    /// Its directory in xenstore, `dev-N`.
    public var name: String
    /// `p-dev`: what is behind it.
    public var physicalDevice: String
    /// `v-dev`: where the guest sees it.
    public var virtualDevice: String
    /// Its state, such as `connected`.
    public var state: String

    /// A status of these values.
    public init(name: String, physicalDevice: String, virtualDevice: String, state: String) {
        self.name = name
        self.physicalDevice = physicalDevice
        self.virtualDevice = virtualDevice
        self.state = state
    }
}
