// DeviceSpecification: a device as people name it to a toolstack, `pdev,vdev`, as in SUSE's xl.
//
// Owns: that notation, and how a path of this host becomes a SCSI address. Called by: targetctl. Must not know:
// xenstore.

import Glibc

/// What is to be attached, and where.
package struct DeviceSpecification: Equatable, Sendable {
    /// What goes into `p-dev`.
    package var physicalDevice: PhysicalDevice
    /// What goes into `p-devname`: what the user wrote, where that is not `p-dev` itself.
    package var name: String?
    /// Where the guest sees it. `host` is the number of the vhost.
    package var virtualDevice: VirtualDevice
    /// The guest sees the whole target.
    package var featureHost = false

    /// Why a text is no device.
    package struct Mistake: Error, Equatable {
        package let text: String
    }

    /// Reads `pdev,vdev` or `pdev,vdev,feature-host`.
    ///
    /// - Parameter resolve: Finds the SCSI address of a device node.
    package init(
        parsing text: String, resolve: (String) -> PhysicalDevice? = DeviceSpecification.hostDevice
    ) throws(Mistake) {
        let parts = text.split(separator: ",", omittingEmptySubsequences: false).map(String.init)
        guard parts.count == 2 || (parts.count == 3 && parts[2] == "feature-host") else {
            throw Mistake(
                text: "\"\(text)\" is no device: write pdev,vdev or pdev,vdev,feature-host, such as "
                    + "naa.60014054ac780582:0,0:0:0:0")
        }
        physicalDevice = try Self.physicalDevice(parts[0], resolve)
        name = parts[0].hasPrefix("/") ? parts[0] : nil
        guard let virtual = VirtualDevice(node: parts[1]) else {
            throw Mistake(text: "\"\(parts[1])\" is no v-dev: write four numbers, vhost:channel:target:lun")
        }
        virtualDevice = virtual
        featureHost = parts.count == 3
    }

    private static func physicalDevice(_ text: String, _ resolve: (String) -> PhysicalDevice?) throws(Mistake)
        -> PhysicalDevice
    {
        if text.hasPrefix("/") {
            guard let found = resolve(text) else {
                throw Mistake(
                    text: "\(text) is no SCSI device of this host: name a target of targetd, naa.<16 digits>:<lun>, "
                        + "or a SCSI device, such as /dev/sdb or 1:0:0:0")
            }
            return found
        }
        guard let device = PhysicalDevice(node: text) else {
            throw Mistake(
                text: "\"\(text)\" is no p-dev: write naa.<16 digits>:<lun>, h:c:t:l, or the path of a SCSI device")
        }
        return device
    }

    /// The SCSI address of a device node such as /dev/sdb, /dev/sg1, or a link to one; `nil` if it has none.
    package static func hostDevice(_ path: String) -> PhysicalDevice? {
        guard let real = unsafe realpath(path, nil) else { return nil }
        defer { unsafe free(real) }
        let node = unsafe String(cString: real).split(separator: "/").last.map(String.init) ?? ""
        for kind in ["block", "scsi_generic", "scsi_tape", "scsi_changer"] {
            guard let device = unsafe realpath("/sys/class/\(kind)/\(node)/device", nil) else { continue }
            defer { unsafe free(device) }
            let address = unsafe String(cString: device).split(separator: "/").last.map(String.init) ?? ""
            if let found = PhysicalDevice(node: address) { return found }
        }
        return nil
    }
}
