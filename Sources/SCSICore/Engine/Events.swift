// Events: what happens to a logical unit or a target beside its commands, and the unit attention conditions that tell
// the initiators (SAM-6 5.14, 6.2).
//
// Called by: the daemon or an embedder (changes while they run), device servers (media, thresholds). Must not know: how
// it came to pass.

import CBackstore

extension LogicalUnit {
    /// Changes the name, the serial number, the texts and the write protection that the unit was created with; the
    /// other fields of `new` are not looked at. New INQUIRY data are told by INQUIRY DATA HAS CHANGED, write
    /// protection that comes or goes by MODE PARAMETERS CHANGED, because it is a bit of the mode parameter header
    /// (SBC-4 6.5.1).
    public func reconfigure(_ new: LogicalUnitConfiguration) {
        let old = configuration
        var configuration = old
        configuration.name = new.name
        configuration.serial = new.serial
        configuration.vendor = new.vendor
        configuration.product = new.product
        configuration.revision = new.revision
        configuration.readOnly = new.readOnly
        replaceConfiguration(configuration)
        let isSame =
            old.name == new.name && old.serial == new.serial && old.vendor == new.vendor && old.product == new.product
            && old.revision == new.revision
        if !isSame { establish(.inquiryDataChanged, exceptFor: nil) }
    }

    /// Tells the unit that the backstore's geometry may have changed. Initiators learn of a new size by CAPACITY DATA
    /// HAS CHANGED (SBC-4 4.10) and by an event, of new limits by INQUIRY DATA HAS CHANGED (SPC-4 7.8: vital product
    /// data), of new write protection by MODE PARAMETERS CHANGED.
    public func backstoreGeometryChanged() {
        // The backstore of a medium that was taken away is not the unit's any more.
        if mediumState == .absent { return }
        let (old, oldMedium) = (geometry, medium)
        readGeometry()
        if medium.blocks != oldMedium.blocks { establish(.capacityChanged, exceptFor: nil) }
        if !geometry.hasSameLimits(as: old) { establish(.inquiryDataChanged, exceptFor: nil) }
    }
}

extension scsi_backstore_geometry {
    /// Whether the vital product data that come from the two are the same.
    fileprivate func hasSameLimits(as other: Self) -> Bool {
        // Write protection is in the mode parameter header and not in the vital product data.
        let elsewhere = UInt32(SCSI_BACKSTORE_WRITABLE)
        return capabilities | elsewhere == other.capabilities | elsewhere
            && optimal_transfer_granularity == other.optimal_transfer_granularity
            && maximum_transfer == other.maximum_transfer && optimal_transfer == other.optimal_transfer
            && discard_granularity == other.discard_granularity && discard_alignment == other.discard_alignment
    }
}

extension TargetDevice {
    /// A hard reset (SAM-6 6.3.2), for a transport that has such an event: ends all commands of all nexuses on all
    /// units without a status, and resets each unit. Each nexus is told by SCSI BUS RESET OCCURRED.
    public func hardReset() {
        let units = allUnits
        for unit in units { unit.mark { _ in .reset } }
        for unit in units {
            unit.endMarked()
            unit.reset(.hardReset)
        }
    }
}
