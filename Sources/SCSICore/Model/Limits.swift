// Limits: every bound of the core, in one place, with its unit, its reason, and what an initiator sees when it is hit.
//
// Called by: everything in SCSICore. Must not know: anything else.

/// The bounds of the core. Nothing grows past them, whatever a guest sends.
public enum Limits {
    /// I_T nexuses of one target device. One more is refused when its front connects.
    public static let nexusesPerTarget = 64

    /// Tasks of one logical unit that have been received and not completed. One more gets TASK SET FULL
    /// (SAM-6 5.3.1), so one guest with many queues cannot hold all of the daemon's memory.
    public static let tasksPerLogicalUnit = 4096

    /// Of these, the places that only a nexus without a task in the set may take, with one task each, so that the first
    /// command of an initiator gets in beside one that keeps the set full. When they are taken, too, an initiator
    /// without a task gets BUSY. More initiators than this hardly share a disk.
    public static let tasksForIdleNexuses = 16

    /// Target port groups of one target device: more paths to a disk than anybody has. SET TARGET PORT GROUPS with more
    /// descriptors gets INVALID FIELD IN CDB.
    public static let portGroupsPerTarget = 16

    /// Target ports of one target device: one for each nexus that there can be. Registrations for all ports are made of
    /// each initiator port and each of these.
    public static let portsPerTarget = 64

    /// Logical units of one target device. REPORT LUNS lists them all; single-level flat addressing reaches 16 384
    /// (SAM-6 4.7.7).
    public static let logicalUnitsPerTarget = 16_384

    /// Elements of a task's data segment list, both directions together: a descriptor chain as long as the longest
    /// ring, and some more where the guest's memory is in pieces.
    public static let segmentsPerTask = 2048

    /// Bytes of one READ or WRITE data transfer: MAXIMUM TRANSFER LENGTH of the Block Limits VPD page. A longer one
    /// gets INVALID FIELD IN CDB (SBC-4 6.6.4). 32 MiB is what no guest driver exceeds and 32-bit sums cannot overflow.
    public static let transferBytes: UInt64 = 32 << 20

    /// Bytes of one WRITE SAME: MAXIMUM WRITE SAME LENGTH. One that is neither zeros nor a deallocation is written
    /// from a staging buffer in as many pieces as this holds of them; the bound is for how long it keeps the buffer
    /// from others.
    public static let writeSameBytes: UInt64 = 16 << 20

    /// Block descriptors of one UNMAP parameter list: MAXIMUM UNMAP BLOCK DESCRIPTOR COUNT.
    public static let unmapDescriptors = 256

    /// Logical blocks of one UNMAP, all its descriptors together: MAXIMUM UNMAP LBA COUNT.
    public static let unmapBlocks: UInt64 = 1 << 32 - 1

    /// Bytes that one PRE-FETCH brings into memory. Of a longer one the first of them are fetched, and its status is
    /// GOOD and not CONDITION MET (SBC-4, PRE-FETCH(10)): a guest cannot fill the host's cache with one command.
    public static let prefetchBytes: UInt64 = 32 << 20

    /// Bytes of the data buffer of READ BUFFER and WRITE BUFFER, a unit's own. What does not fit is INVALID FIELD IN
    /// CDB.
    public static let dataBufferBytes = 64 << 10

    /// Bytes of the echo buffer: its descriptor can say 8191.
    public static let echoBufferBytes = 4096

    /// Bytes of each kind of identifying information. SPC-6 asks for 64 at least of one and 256 of the other; longer
    /// information is INVALID FIELD IN CDB.
    public static let identifyingInformationBytes = 512

    /// LBA status descriptors of one GET LBA STATUS. What they do not reach, the initiator asks for next.
    public static let lbaStatusDescriptors = 256

    /// Task management functions of one target that wait for tasks to end. One more is rejected (SAM-6 7.1).
    public static let waitingFunctions = 256

    /// Links into one shard: one for each other thread that has ports of its targets.
    public static let linksPerShard = 64

    /// Tasks under way in one link: as many as all the rings of a thread hold. One more stays with its front, in the
    /// guest's ring.
    public static let tasksPerLink = 1 << 16

    /// Task management functions under way in one link. One more stays with its front.
    public static let functionsPerLink = 256

    /// Nexuses that are being lost at the same moment in one link. One more is lost when the shard has run.
    static let lossesPerLink = 64

    /// Events and lost nexuses on the way to one port's thread. More wait at the shard, each once; past as many again,
    /// events become one that says that some were missed.
    static let noticesPerLink = 64

    /// Bytes of a parameter list or of parameter data: one shard's staging buffer. A MODE SELECT list or an INQUIRY
    /// answer is far shorter; REPORT LUNS of 16 384 units is the longest (131 080 bytes).
    public static let parameterBytes = 132 << 10

    /// Staging buffers of one shard, for commands whose data the core must look at (VERIFY with BYTCHK, WRITE SAME).
    /// A command that finds none waits for one.
    public static let stagingBuffers = 4

    /// Bytes of one staging buffer: the 255 blocks of the longest COMPARE AND WRITE at 4096 bytes a block. XDWRITEREAD
    /// keeps two pieces in it.
    public static let stagingBytes = 1 << 20

    /// How long unused rate is saved if nothing else is said, in nanoseconds: a tenth of a second, so that a limit of a
    /// second's operations is one of any second's, within a tenth.
    public static let defaultBurstNanoseconds: UInt64 = 100_000_000

    /// Commands that the trace of a logical unit keeps: at the most, 6 MiB of them.
    public static let traceEntries = 1...65_536

    /// Bytes that a command of several steps moves in one of them: an abort does not wait for more than that.
    public static let pieceBytes = 256 << 10

    /// Registrations of one logical unit. One more gets INSUFFICIENT REGISTRATION RESOURCES (SPC-4 5.13.7): every nexus
    /// four times over, because SPEC_I_PT registers nexuses that do not exist yet.
    public static let registrations = 256

    /// Bytes of what one logical unit keeps over power loss: room for the registrations of every nexus, all mode pages
    /// and the identifying information, many times over.
    public static let unitStateBytes = 1 << 20
}
