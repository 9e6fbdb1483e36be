// ControlQueueTests: each function of the control queue against a command in each state that it can be in, on both ring
// formats: what the function answers, how the command ends, and that it ends first.
//
// Called by: swift test. Must not know: the server's inside.

import CLinux
import CoreTestSupport
import SCSICore
import Testing
import VhostUserInitiator
import VirtioFront

/// Where a command is when the function comes.
enum CommandState: CaseIterable, Sendable {
    /// An ORDERED command behind one that the medium has.
    case dormant
    /// The medium takes no more, so it waits for room there.
    case enabled
    /// The medium has it.
    case submitted
    /// The medium has it, and an ACA condition withholds its end.
    case blocked
    /// The medium has let go of it, and its answer waits for its turn (IN_ORDER) behind another command.
    case answerWaits
}

struct ControlQueueCase: CustomStringConvertible, Sendable {
    let function: Int32
    let state: CommandState
    let isPacked: Bool

    static let functions: [(number: Int32, name: String)] = [
        (VIRTIO_SCSI_T_TMF_ABORT_TASK, "ABORT TASK"), (VIRTIO_SCSI_T_TMF_ABORT_TASK_SET, "ABORT TASK SET"),
        (VIRTIO_SCSI_T_TMF_CLEAR_ACA, "CLEAR ACA"), (VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET, "CLEAR TASK SET"),
        (VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET, "I_T NEXUS RESET"),
        (VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, "LOGICAL UNIT RESET"), (VIRTIO_SCSI_T_TMF_QUERY_TASK, "QUERY TASK"),
        (VIRTIO_SCSI_T_TMF_QUERY_TASK_SET, "QUERY TASK SET"),
    ]

    static let all = functions.flatMap { function in
        CommandState.allCases.flatMap { state in
            [false, true].map { ControlQueueCase(function: function.number, state: state, isPacked: $0) }
        }
    }

    var description: String {
        let name = Self.functions.first { $0.number == function }?.name ?? ""
        return "\(name) while the command is \(state), \(isPacked ? "packed" : "split") rings"
    }

    /// What the function answers: FUNCTION COMPLETE or FUNCTION SUCCEEDED.
    var answer: UInt8 {
        switch function {
        case VIRTIO_SCSI_T_TMF_QUERY_TASK: state == .answerWaits ? 0 : UInt8(VIRTIO_SCSI_S_FUNCTION_SUCCEEDED)
        // With an answer that waits there is the command that it waits for.
        case VIRTIO_SCSI_T_TMF_QUERY_TASK_SET: UInt8(VIRTIO_SCSI_S_FUNCTION_SUCCEEDED)
        default: 0
        }
    }

    /// Whether the function ends the command.
    var ends: Bool {
        let harmless = [VIRTIO_SCSI_T_TMF_CLEAR_ACA, VIRTIO_SCSI_T_TMF_QUERY_TASK, VIRTIO_SCSI_T_TMF_QUERY_TASK_SET]
        return state != .answerWaits && !harmless.contains(function)
    }

    /// The response to the command.
    var response: UInt8 {
        guard ends else { return 0 }
        let resets = [VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET, VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET]
        return UInt8(resets.contains(function) ? VIRTIO_SCSI_S_RESET : VIRTIO_SCSI_S_ABORTED)
    }
}

@Suite
struct ControlQueueTests {
    private static let tag: UInt64 = 7

    private static func read(_ block: UInt64, tag: UInt64, attribute: Int32 = VIRTIO_SCSI_S_SIMPLE) -> SCSICommand {
        var command = SCSICommand(unit0, CDB.read(.ten, block, 1), dataIn: 512)
        command.tag = tag
        command.attribute = UInt8(attribute)
        return command
    }

    /// Brings a command into a state.
    ///
    /// - Returns: It, and the one before it, if there is one.
    private static func bring(
        into state: CommandState, _ frontEnd: VhostUserFrontEnd, _ world: ServerWorld
    ) throws -> (command: SCSIInFlight, other: SCSIInFlight?) {
        let requests = frontEnd.requests
        world.hold(true)
        switch state {
        case .dormant:
            let other = requests.submit(read(1, tag: 1))
            let command = requests.submit(read(2, tag: tag, attribute: VIRTIO_SCSI_S_ORDERED))
            world.wait { $0.unit.tasksInFlight == 2 }
            return (command, other)
        case .enabled:
            world.perform { $0.backstore.capacity = 0 }
            let command = requests.submit(read(2, tag: tag))
            world.wait { $0.backstore.refusals > 0 }
            return (command, nil)
        case .submitted:
            let command = requests.submit(read(2, tag: tag))
            world.wait { $0.backstore.pending.count == 1 }
            return (command, nil)
        case .blocked:
            let command = requests.submit(read(2, tag: tag))
            world.wait { $0.backstore.pending.count == 1 }
            // NACA, and an operation code that there is not.
            let fault = requests.submit(SCSICommand(unit0, [0x1f, 0, 0, 0, 0, 4]))
            #expect(try fault.wait().senseKey == 5)
            return (command, nil)
        case .answerWaits:
            let other = requests.submit(read(1, tag: 1))
            world.wait { $0.backstore.pending.count == 1 }
            let command = requests.submit(read(2, tag: tag))
            world.wait { $0.backstore.pending.count == 2 }
            world.perform { $0.backstore.complete(1) }
            world.wait { $0.unit.tasksInFlight == 1 }
            return (command, other)
        }
    }

    /// Lets everything go on.
    private static func release(_ world: ServerWorld) {
        world.perform { objects in
            objects.isHeld = false
            objects.backstore.capacity = .max
            objects.shard.retryWaiting()
        }
    }

    @Test(arguments: ControlQueueCase.all)
    func aFunctionAnswersAsItsCommandEnds(_ test: ControlQueueCase) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        if test.isPacked { options.features |= VirtioFeatureBit.ringPacked }
        if test.state == .answerWaits { options.features |= VirtioFeatureBit.inOrder }
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        let (command, other) = try Self.bring(into: test.state, frontEnd, world)
        let function = frontEnd.control.submitTaskManagement(test.function, unit0, tag: Self.tag)
        world.wait { $0.server.statistics.taskManagementFunctions == 1 }
        try frontEnd.requests.collect()
        let isWithTheMedium = test.state == .submitted || test.state == .blocked || test.state == .answerWaits
        if isWithTheMedium { #expect(!command.chain.isComplete, "its memory is in use, or its turn has not come") }
        Self.release(world)
        try frontEnd.control.wait(for: function)
        #expect(function.written == [test.answer])
        if test.ends {
            // Not waited for: the initiator takes its memory for free now.
            try frontEnd.requests.collect()
            #expect(command.chain.isComplete)
        }
        if test.state == .blocked, !test.ends {
            #expect(try frontEnd.control.taskManagement(VIRTIO_SCSI_T_TMF_CLEAR_ACA, unit0) == 0)
        }
        let result = try command.wait()
        #expect(result.response == test.response)
        if test.response == 0 { #expect(result.isGood) }
        if let other { _ = try other.wait() }
        #expect(world.perform { $0.unit.tasksInFlight } == 0)
    }

    /// Nothing is there for any of them, in any format.
    @Test(arguments: [false, true])
    func withoutACommandEveryFunctionIsComplete(_ isPacked: Bool) throws {
        let world = try ServerWorld()
        defer { world.stop() }
        var options = VhostUserFrontEnd.Options()
        if isPacked { options.features |= VirtioFeatureBit.ringPacked }
        let frontEnd = try VhostUserFrontEnd.ready(world, options)
        for function in ControlQueueCase.functions {
            #expect(try frontEnd.control.taskManagement(function.number, unit0, tag: Self.tag) == 0, "\(function.name)")
        }
    }
}
