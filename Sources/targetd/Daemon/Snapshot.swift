// Snapshot: what one reactor can tell of what is on it, in the words of the control API.
//
// Called by: the daemon, through ReactorThread.perform. Must not know: how it is asked for or shown.

import ControlAPI
import Reactor
import SCSICore
import VirtioFront

/// What one reactor tells.
struct ReactorSnapshot: Sendable {
    var reactor: ReactorStatus
    var backstores: [BackstoreStatus] = []
    var targets: [TargetStatus] = []
    var fronts: [FrontStatus] = []
}

extension ReactorObjects {
    /// Everything that is here at this moment.
    ///
    /// - Parameter reactor: The number of this reactor.
    func snapshot(reactor index: Int) -> ReactorSnapshot {
        shard.now = reactor.now
        var snapshot = ReactorSnapshot(reactor: ReactorStatus(index: index, reactor.statistics))
        let names = unitBackstores
        snapshot.backstores = openBackstores.map { name, configuration, size in
            BackstoreStatus(name, configuration, size: size)
        }
        snapshot.targets = servedTargets.map { name, target in
            let units = target.logicalUnits.map { lun, unit in
                LogicalUnitStatus(Int(lun.number), unit, backstore: names[ObjectIdentifier(unit)] ?? "")
            }
            var status = TargetStatus(name: name.description, reactor: index, luns: units.sorted { $0.lun < $1.lun })
            status.portGroups = target.portGroups.map(PortGroupStatus.init)
            return status
        }
        snapshot.fronts = servedFronts.map { FrontStatus($0, reactor: index, $1) }
        return snapshot
    }
}

extension ReactorStatus {
    init(index: Int, _ statistics: Reactor.Statistics) {
        self.init(index: index)
        turns = statistics.turns
        waits = statistics.waits
        requests = statistics.requests
        refused = statistics.refused
        submissions = statistics.submissions
        busyNanoseconds = statistics.busyNanoseconds
    }
}

extension BackstoreStatus {
    init(_ name: String, _ configuration: BackstoreConfiguration, size: UInt64?) {
        let type =
            switch configuration.medium {
            case .ram: "ram"
            case .file: "file"
            case .blockDevice: "block-device"
            }
        self.init(name: name, type: type, path: configuration.path, size: size, readOnly: configuration.readOnly)
    }
}

extension PortGroupStatus {
    init(_ group: TargetPortGroup) {
        self.init(
            id: Int(group.identifier), state: group.state.configured.rawValue, preferred: group.isPreferred,
            explicit: group.isExplicit, statusCode: "\(group.statusCode)", ports: group.ports.map { Int($0) })
    }
}

extension LogicalUnitStatus {
    init(_ lun: Int, _ unit: LogicalUnit, backstore: String) {
        let name = NAAName(unit.configuration.name).description
        self.init(
            lun: lun, backstore: backstore, name: name, serial: unit.configuration.serial, size: unit.size,
            writeProtected: unit.isWriteProtected)
        frozen = unit.frozen != nil
        medium = "\(unit.mediumState)"
        let statistics = unit.statistics
        inFlight = unit.tasksInFlight
        reads = statistics.reads
        writes = statistics.writes
        others = statistics.others
        bytesRead = statistics.bytesRead
        bytesWritten = statistics.bytesWritten
        notGood = statistics.notGood
        aborted = statistics.aborted
        backstoreErrors = statistics.backstoreErrors
        expired = statistics.expired
        oldest = unit.oldestTask.map { CommandStatus($0) }
    }
}

extension CommandStatus {
    init(_ task: TaskInFlight) {
        let place =
            switch task.place {
            case .waiting: "waiting"
            case .waitingForResource: "waiting-for-resource"
            case .backstore: "backstore"
            case .stateStore: "state-store"
            }
        self.init(
            ageMilliseconds: task.age / 1_000_000, initiator: task.initiatorPort, tag: task.tag,
            operationCode: Int(task.operationCode), lba: task.address, blocks: task.blocks, place: place,
            expired: task.hasExpired)
    }
}

extension FrontStatus {
    init(_ front: VhostUserFrontConfiguration, reactor: Int, _ server: VhostUserSCSIServer) {
        let targets = Dictionary(uniqueKeysWithValues: front.targets.map { ("\($0.key)", $0.value.description) })
        self.init(
            socket: front.socket, reactor: reactor, queues: front.queues, connected: server.isConnected,
            targets: targets)
        port = front.port
        let statistics = server.statistics
        connections = statistics.connections
        commands = statistics.commands
        taskManagementFunctions = statistics.taskManagementFunctions
        notifications = statistics.notifications
        events = statistics.events
        eventsMissed = statistics.eventsMissed
        brokenQueues = statistics.brokenQueues
    }
}
