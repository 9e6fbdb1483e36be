public struct LogicalUnitConfiguration: Sendable {
    /// NAA IEEE registered name of the unit (64 bits), its identity through every front and over restarts.
    public var name: UInt64
    public var vendor = "TARGETD"
    public var product = "VIRTUAL DISK"
    public var serial: String
    public var readOnly = false
    public init(name: UInt64, serial: String) { self.name = name; self.serial = serial }
}
public final class LogicalUnit {
    public init(configuration: LogicalUnitConfiguration, backstore: BackstoreHandle, shard: Shard) {}
    /// Tells the unit that the backstore's geometry may have changed.
    public func backstoreGeometryChanged() {}
    /// Tasks received and not completed.
    public var tasksInFlight: Int { 0 }
    var usesDescriptorSense: Bool { false }
}
