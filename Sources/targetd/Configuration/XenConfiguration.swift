// XenConfiguration: how targetd serves Xen guests, as a value.
//
// Owns: the shape and the limits of `xen:`. Called by: everything in the daemon. Must not know: YAML, Xen.

/// What stands under `xen:`. Without it no Xen guest is served.
struct XenConfiguration: Equatable, Sendable {
    enum Enabled: String, Sendable, CaseIterable {
        /// Where this machine is a domain of Xen's.
        case auto
        /// Here, and it is an error if this machine is none.
        case always = "true"
        case never = "false"
    }

    var enabled = Enabled.auto
    /// Where the records of requests in flight are, by which a daemon follows one that died.
    var records = "/run/targetd/xen"
    /// Whether a toolstack may give guests SCSI devices of this host (`p-dev` as h:c:t:l).
    var hostDevices = true
    /// The relative target port identifier of the Xen front, at each target.
    var port = Self.defaultPort
    /// Bytes of memory, on each reactor, through which data of guests passes.
    var staging: UInt64 = 64 << 20

    /// Other than that of sockets.
    static let defaultPort = 2

    /// Bytes of staging memory: at least one full ring of the largest requests (512 KiB each), at most what helps 128
    /// guests to have that at once.
    static let stagingBytes: ClosedRange<UInt64> = 16 << 20...1 << 30
}

extension Configuration {
    /// What is to be served to Xen guests; `nil`: nothing.
    var servedXen: XenConfiguration? { xen?.enabled == .never ? nil : xen }
}
