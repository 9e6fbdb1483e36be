// PlanTests: the changes between two configurations are the smallest that do, in an order that never leaves anything
// in use without what it uses. Must not know: how changes are made.

import Testing

@testable import targetd

@Suite struct PlanTests {
    private let first = NAAName(0x6000_0000_0000_0001)
    private let second = NAAName(0x6000_0000_0000_0002)

    /// Two sockets with a target of one RAM disk each.
    private var base: Configuration {
        var configuration = Configuration(reactors: 2)
        configuration.backstores = [
            "a": BackstoreConfiguration(medium: .ram(size: 1 << 20)),
            "b": BackstoreConfiguration(medium: .file(path: "/b", size: 1 << 20, buffered: false)),
        ]
        configuration.targets = [
            first: TargetConfiguration(logicalUnits: [0: LogicalUnitSettings(backstore: "a")]),
            second: TargetConfiguration(logicalUnits: [0: LogicalUnitSettings(backstore: "b")]),
        ]
        configuration.vhostUserFronts = [
            VhostUserFrontConfiguration(socket: "/1", targets: [0: first]),
            VhostUserFrontConfiguration(socket: "/2", targets: [0: second]),
        ]
        return configuration
    }

    private func plan(_ change: (inout Configuration) -> Void) -> Plan {
        var wanted = base
        change(&wanted)
        return Plan(from: base, placement: Placement(base), to: wanted)
    }

    @Test func sameConfigurationNeedsNoChange() {
        let plan = plan { _ in }
        #expect(plan.changes == [])
        #expect(plan.refusals == [])
        #expect(plan.placement == Placement(base))
    }

    @Test func newLogicalUnitTouchesNothingElse() {
        let plan = plan {
            $0.backstores["c"] = BackstoreConfiguration(medium: .ram(size: 512))
            $0.targets[first]!.logicalUnits[7] = LogicalUnitSettings(backstore: "c")
        }
        #expect(plan.changes == [.addBackstore("c"), .addLogicalUnit(7, target: first)])
        #expect(plan.refusals == [])
    }

    private func groups(_ state: PortGroupConfiguration.AccessState, ports: [Int] = [1]) -> [PortGroupConfiguration] {
        [
            PortGroupConfiguration(identifier: 1, state: state, ports: ports),
            PortGroupConfiguration(identifier: 2, ports: [2, 7]),
        ]
    }

    @Test func stateOfAPortGroupChangesInPlace() {
        var (old, new) = (base, base)
        old.targets[first]!.portGroups = groups(.standby)
        new.targets[first]!.portGroups = groups(.unavailable)
        let plan = Plan(from: old, placement: Placement(old), to: new)
        let change = Change.setAccessState(first, group: 1, old: .standby, new: .unavailable)
        #expect(plan.changes == [change])
        #expect(change.inverse == .setAccessState(first, group: 1, old: .unavailable, new: .standby))
        #expect("\(change)" == "~ target \(first) port group 1: unavailable")
    }

    @Test func otherPortsComeWhenSocketsThatLeaveThemAreGoneAndBeforeThoseThatNeedThem() {
        var (old, new) = (base, base)
        old.targets[first]!.portGroups = groups(.standby)
        new.targets[first]!.portGroups = groups(.standby, ports: [3])
        new.vhostUserFronts[0].port = 3
        let plan = Plan(from: old, placement: Placement(old), to: new)
        #expect(plan.changes == [.removeSocket("/1"), .setPortGroups(first), .addSocket("/1")])
        #expect(plan.refusals == [])
        #expect(plan.changes[1].inverse == .setPortGroups(first))
    }

    @Test func commandTimeoutChangesInPlace() {
        let plan = plan { $0.targets[first]!.logicalUnits[0]!.commandTimeoutNanoseconds = 5_000_000_000 }
        #expect(plan.changes == [.setCommandTimeout(0, target: first)])
        #expect(plan.changes.map(\.inverse) == plan.changes)
        #expect(plan.refusals == [])
    }

    @Test func commandTimeoutThatComesWithAnotherDiskIsTheNewDisks() {
        let plan = plan {
            $0.targets[first]!.logicalUnits[0]!.commandTimeoutNanoseconds = 5_000_000_000
            $0.targets[first]!.logicalUnits[0]!.serial = "OTHER"
        }
        #expect(plan.changes == [.removeLogicalUnit(0, target: first), .addLogicalUnit(0, target: first)])
    }

    @Test func removedLogicalUnitGoesBeforeItsBackstore() {
        let plan = plan {
            $0.backstores["a"] = nil
            $0.targets[first]!.logicalUnits = [:]
        }
        #expect(plan.changes == [.removeLogicalUnit(0, target: first), .removeBackstore("a")])
    }

    @Test func removedSocketGoesFirstAndNewSocketComesLast() {
        let third = NAAName(0x6000_0000_0000_0003)
        let plan = plan {
            $0.backstores["a"] = nil
            $0.backstores["c"] = BackstoreConfiguration(medium: .ram(size: 512))
            $0.targets[first] = nil
            $0.targets[third] = TargetConfiguration(logicalUnits: [3: LogicalUnitSettings(backstore: "c")])
            $0.vhostUserFronts[0] = VhostUserFrontConfiguration(socket: "/3", targets: [0: third])
        }
        #expect(
            plan.changes == [
                .addBackstore("c"), .removeSocket("/1"), .removeLogicalUnit(0, target: first), .removeTarget(first),
                .removeBackstore("a"), .addTarget(third), .addLogicalUnit(3, target: third), .addSocket("/3"),
            ])
        #expect(plan.placement.sockets == ["/3": 0, "/2": 1])
        #expect(plan.placement.targets == [third: 0, second: 1])
    }

    @Test func backstoreThatTakesOverAFileIsOpenedAfterTheOther() {
        let plan = plan {
            $0.backstores["c"] = $0.backstores.removeValue(forKey: "b")
            $0.targets[second]!.logicalUnits[0] = LogicalUnitSettings(backstore: "c")
        }
        #expect(
            plan.changes == [
                .removeLogicalUnit(0, target: second), .removeBackstore("b"), .addBackstore("c"),
                .addLogicalUnit(0, target: second),
            ])
    }

    @Test func backstoreWithoutALogicalUnitIsNotOpened() {
        let added = plan { $0.backstores["c"] = BackstoreConfiguration(medium: .ram(size: 512)) }
        #expect(added.changes == [])
        let unused = plan { $0.targets[first]!.logicalUnits = [:] }
        #expect(unused.changes == [.removeLogicalUnit(0, target: first), .removeBackstore("a")])
    }

    @Test func backstoreThatMovesToAnotherReactorIsOpenedAgainThere() {
        let plan = plan {
            $0.targets[first]!.logicalUnits = [:]
            $0.targets[second]!.logicalUnits[1] = LogicalUnitSettings(backstore: "a")
        }
        #expect(
            plan.changes == [
                .removeLogicalUnit(0, target: first), .removeBackstore("a"), .addBackstore("a"),
                .addLogicalUnit(1, target: second),
            ])
        #expect(plan.placement.backstores == ["a": 1, "b": 1])
    }

    @Test func backstoreThatMovesOnItsReactorStaysOpen() {
        var running = base
        running.reactors = 1
        var wanted = running
        wanted.targets[first]!.logicalUnits = [:]
        wanted.targets[second]!.logicalUnits[1] = LogicalUnitSettings(backstore: "a")
        let plan = Plan(from: running, placement: Placement(running), to: wanted)
        #expect(plan.changes == [.removeLogicalUnit(0, target: first), .addLogicalUnit(1, target: second)])
    }

    @Test func largerMediumIsResizedInPlace() {
        let plan = plan { $0.backstores["b"]!.medium = .file(path: "/b", size: 3 << 20, buffered: false) }
        #expect(plan.changes == [.resizeBackstore("b", size: 3 << 20)])
        #expect(plan.refusals == [])
    }

    @Test func smallerMediumIsRefused() {
        let plan = plan { $0.backstores["b"]!.medium = .file(path: "/b", size: 512, buffered: false) }
        #expect(plan.refusals.map(\.key) == ["backstores.b.size"])
        #expect(plan.refusals.first?.text.contains("would shrink from 1MiB to 512B") == true)
    }

    @Test(arguments: [512, 2 << 20] as [UInt64])
    func memoryOfAnotherSizeIsRefused(size: UInt64) {
        let plan = plan { $0.backstores["a"] = BackstoreConfiguration(medium: .ram(size: size)) }
        #expect(plan.changes == [])
        #expect(plan.refusals.map(\.key) == ["backstores.a.size"])
    }

    @Test func changesAreTakenBackByTheirInverses() {
        let plan = plan {
            $0.backstores["b"]!.readOnly = true
            $0.vhostUserFronts[0].queues = 3
            $0.stopTimeoutNanoseconds = 1
        }
        let back = plan.changes.compactMap(\.inverse)
        #expect(back.compactMap(\.inverse) == plan.changes)
        #expect(Change.resizeBackstore("b", size: 1).inverse == nil)
    }

    @Test func sizeThatIsNoLongerSaidChangesNothing() {
        let plan = plan { $0.backstores["b"]!.medium = .file(path: "/b", size: nil, buffered: false) }
        #expect(plan.changes == [])
        #expect(plan.refusals == [])
    }

    @Test(arguments: [
        BackstoreConfiguration(medium: .file(path: "/other", size: 1 << 20, buffered: false)),
        BackstoreConfiguration(medium: .file(path: "/b", size: 1 << 20, buffered: true)),
        BackstoreConfiguration(medium: .file(path: "/b", size: 2 << 20, buffered: true)),
        BackstoreConfiguration(medium: .file(path: "/b", size: 1 << 20, buffered: false), blockSize: 4096),
        BackstoreConfiguration(medium: .file(path: "/b", size: 1 << 20, buffered: false), readOnly: true),
        BackstoreConfiguration(medium: .file(path: "/b", size: nil, buffered: false), readOnly: true),
        BackstoreConfiguration(medium: .ram(size: 1 << 20)),
        BackstoreConfiguration(medium: .blockDevice(path: "/b", buffered: false)),
    ])
    func otherMediumIsReplacedWithItsLogicalUnit(medium: BackstoreConfiguration) {
        let plan = plan { $0.backstores["b"] = medium }
        #expect(
            plan.changes == [
                .removeLogicalUnit(0, target: second), .removeBackstore("b"), .addBackstore("b"),
                .addLogicalUnit(0, target: second),
            ])
        #expect(plan.refusals == [])
    }

    @Test func changedUnitIsReplacedAndItsBackstoreStays() {
        let plan = plan { $0.targets[first]!.logicalUnits[0]!.serial = "OTHER" }
        #expect(plan.changes == [.removeLogicalUnit(0, target: first), .addLogicalUnit(0, target: first)])
    }

    @Test func protectionAndLimitsChangeInPlace() {
        let plan = plan {
            $0.targets[first]!.logicalUnits[0]!.readOnly = true
            $0.targets[first]!.logicalUnits[0]!.limits.operationsPerSecond = 7
            $0.vhostUserFronts[1].limits.bytesPerSecond = 1 << 20
        }
        #expect(
            plan.changes == [
                .protectLogicalUnit(0, target: first, isProtected: true), .limitLogicalUnit(0, target: first),
                .limitSocket("/2"),
            ])
    }

    @Test func otherNumberOfQueuesReplacesTheSocket() {
        let plan = plan { $0.vhostUserFronts[1].queues = 8 }
        #expect(plan.changes == [.removeSocket("/2"), .addSocket("/2")])
    }

    @Test func aSocketThatIsMadeByTheOtherSideIsReplaced() {
        let plan = plan { $0.vhostUserFronts[1].mode = .client }
        #expect(plan.changes == [.removeSocket("/2"), .addSocket("/2")])
    }

    @Test func orderOfTheSocketsDoesNotMatter() {
        let plan = plan { $0.vhostUserFronts.reverse() }
        #expect(plan.changes == [])
        #expect(plan.placement == Placement(base))
    }

    @Test func targetsOfASocketAreAttachedAndDetached() {
        let third = NAAName(0x6000_0000_0000_0003)
        let plan = plan {
            $0.targets[third] = TargetConfiguration()
            $0.vhostUserFronts[0].targets = [0: third, 5: first]
        }
        #expect(
            plan.changes == [
                .detachTarget(first, number: 0, socket: "/1"), .addTarget(third),
                .attachTarget(third, number: 0, socket: "/1"), .attachTarget(first, number: 5, socket: "/1"),
            ])
        #expect(plan.placement.targets[third] == 0)
    }

    @Test(arguments: ["reactors", "io-engine", "poll", "control"])
    func whatNeedsARestartIsRefused(key: String) {
        let plan = plan {
            switch key {
            case "reactors": $0.reactors = 3
            case "io-engine": $0.ioEngine = .libaio
            case "control": $0.control = ControlConfiguration(socket: "/c")
            default: $0.pollNanoseconds = 1
            }
        }
        #expect(plan.refusals == [Plan.Refusal(key: key, text: "cannot change while targetd runs: restart it")])
    }

    @Test func settingsOfTheProcessChangeInPlace() {
        let plan = plan {
            $0.stopTimeoutNanoseconds = 1
            $0.logLevel = "debug"
        }
        #expect(plan.changes == [.setStopTimeout, .setLogLevel])
        #expect(plan.refusals == [])
    }

    @Test func joiningWhatRunsOnTwoReactorsIsRefused() {
        let plan = plan { $0.vhostUserFronts[0].targets[1] = second }
        #expect(plan.refusals.map(\.key) == ["targets.\(second)"])
    }

    @Test func joiningIsAllowedWhereThereIsOneReactor() {
        var running = base
        running.reactors = 1
        var wanted = running
        wanted.vhostUserFronts[0].targets[1] = second
        let plan = Plan(from: running, placement: Placement(running), to: wanted)
        #expect(plan.refusals == [])
        #expect(plan.changes == [.attachTarget(second, number: 1, socket: "/1")])
    }

    @Test func changesReadLikeADifference() {
        let changes: [Change] = [
            .removeSocket("/1"), .addLogicalUnit(7, target: first), .resizeBackstore("a", size: 2 << 30),
            .attachTarget(first, number: 3, socket: "/2"),
        ]
        #expect(
            changes.map(\.description) == [
                "- vhost-user-scsi /1", "+ target naa.6000000000000001 LUN 7", "~ backstore a to 2GiB",
                "+ vhost-user-scsi /2 target 3: naa.6000000000000001",
            ])
    }

    /// Applies a plan's changes to a model of what is there, checking at each step that nothing is used which is not
    /// there, over all pairs of a set of small configurations.
    @Test func everyStepOfEveryPlanIsPossibleAndTheEndIsWhatWasWanted() {
        let configurations = smallConfigurations()
        for old in configurations {
            for new in configurations {
                let plan = Plan(from: old, placement: Placement(old), to: new)
                guard plan.refusals.isEmpty else { continue }
                var model = Model(old)
                for change in plan.changes { model.apply(change, wanted: new) }
                #expect(model == Model(new))
            }
        }
    }

    private func smallConfigurations() -> [Configuration] {
        let media: [BackstoreConfiguration?] = [
            nil, BackstoreConfiguration(medium: .ram(size: 512)),
            BackstoreConfiguration(medium: .file(path: "/f", size: 512, buffered: false)),
            BackstoreConfiguration(medium: .file(path: "/f", size: 1024, buffered: false)),
            BackstoreConfiguration(medium: .ram(size: 512), readOnly: true),
        ]
        let fronts: [[VhostUserFrontConfiguration]] = [
            [], [VhostUserFrontConfiguration(socket: "/1", targets: [0: first])],
            [VhostUserFrontConfiguration(socket: "/1", queues: 2, targets: [0: first, 1: second])],
            [
                VhostUserFrontConfiguration(socket: "/2", targets: [0: second], port: 3),
                VhostUserFrontConfiguration(socket: "/1", targets: [1: first]),
            ],
        ]
        var all: [Configuration] = []
        for a in media {
            for b in media {
                for units in 0..<3 {
                    for front in fronts {
                        var configuration = Configuration()
                        configuration.backstores["a"] = a
                        configuration.backstores["b"] = b
                        configuration.targets = [first: TargetConfiguration(), second: TargetConfiguration()]
                        if a != nil {
                            configuration.targets[first]!.logicalUnits[units] = .init(backstore: "a")
                            // Of each shape, some are in another state.
                            configuration.targets[first]!.logicalUnits[units]!.readOnly = b == nil
                            if front.count == 1 {
                                configuration.targets[first]!.logicalUnits[units]!.limits.operationsPerSecond = 7
                            }
                        }
                        if b != nil { configuration.targets[second]!.logicalUnits[0] = .init(backstore: "b") }
                        if front.isEmpty { configuration.targets[second]!.logicalUnits = [:] }
                        configuration.vhostUserFronts = front
                        if front.count != 1 || a == nil {
                            configuration.targets[second]!.portGroups = [
                                PortGroupConfiguration(
                                    identifier: 1, state: units == 0 ? .standby : .activeOptimized, ports: [2, 3])
                            ]
                            if front.isEmpty { configuration.targets[second]!.portGroups[0].ports = [2] }
                        }
                        if front.contains(where: { $0.port == 1 && $0.targets.values.contains(second) }) {
                            configuration.targets[second]!.portGroups = []
                        }
                        if front.isEmpty || units == 2 { configuration.xen = XenConfiguration() }
                        if units == 1, !front.isEmpty {
                            configuration.vhostUserFronts[0].limits.bytesPerSecond = 1 << 20
                        }
                        all.append(configuration)
                    }
                }
            }
        }
        return all
    }

    /// What is there, and who uses whom.
    private struct Model: Equatable {
        var backstores: [String: BackstoreConfiguration]
        var targets: [NAAName: TargetConfiguration]
        var fronts: [String: VhostUserFrontConfiguration]
        var xen: XenConfiguration?

        init(_ configuration: Configuration) {
            backstores = configuration.usedBackstores
            targets = configuration.targets
            fronts = Dictionary(uniqueKeysWithValues: configuration.vhostUserFronts.map { ($0.socket, $0) })
            xen = configuration.servedXen
        }

        /// A front never is at a port that its target does not have.
        private func checkPorts() {
            for front in fronts.values {
                #expect(front.targets.values.allSatisfy { targets[$0]!.ports.contains(front.port) })
            }
        }

        mutating func apply(_ change: Change, wanted: Configuration) {
            switch change {
            case .removeSocket(let socket): #expect(fronts.removeValue(forKey: socket) != nil)
            case .detachTarget(let name, let number, let socket):
                #expect(fronts[socket]?.targets.removeValue(forKey: number) == name)
            case .removeLogicalUnit(let number, let target):
                #expect(targets[target]?.logicalUnits.removeValue(forKey: number) != nil)
            case .removeTarget(let name):
                #expect(!fronts.values.contains { $0.targets.values.contains(name) })
                #expect(targets.removeValue(forKey: name)?.logicalUnits == [:])
            case .removeBackstore(let name):
                #expect(!targets.values.contains { $0.logicalUnits.values.contains { $0.backstore == name } })
                #expect(backstores.removeValue(forKey: name) != nil)
            case .addBackstore(let name):
                #expect(backstores.updateValue(wanted.backstores[name]!, forKey: name) == nil)
            case .resizeBackstore(let name, let size):
                #expect(wanted.backstores[name]!.medium.size == size)
                backstores[name] = wanted.backstores[name]
            case .addTarget(let name):
                let target = TargetConfiguration(portGroups: wanted.targets[name]!.portGroups)
                #expect(targets.updateValue(target, forKey: name) == nil)
            case .setPortGroups(let name):
                targets[name]!.portGroups = wanted.targets[name]!.portGroups
                checkPorts()
            case .setAccessState(let name, let group, let old, let new):
                let index = targets[name]!.portGroups.firstIndex { $0.identifier == group }!
                #expect(targets[name]!.portGroups[index].state == old)
                targets[name]!.portGroups[index].state = new
            case .addLogicalUnit(let number, let target):
                let unit = wanted.targets[target]!.logicalUnits[number]!
                #expect(backstores[unit.backstore] != nil)
                #expect(targets[target]?.logicalUnits.updateValue(unit, forKey: number) == nil)
            case .attachTarget(let name, let number, let socket):
                #expect(targets[name] != nil)
                #expect(fronts[socket]?.targets.updateValue(name, forKey: number) == nil)
            case .addSocket(let socket):
                let front = wanted.front(socket)!
                #expect(front.targets.values.allSatisfy { targets[$0] != nil })
                #expect(fronts.updateValue(front, forKey: socket) == nil)
                checkPorts()
            case .stopXen:
                #expect(xen != nil)
                xen = nil
            case .startXen:
                #expect(xen == nil && targets == wanted.targets)
                xen = wanted.servedXen
            case .swapMedium(let number, let target, let backstore):
                #expect(backstores[backstore] != nil)
                #expect(targets[target]?.logicalUnits[number]?.removable == true)
                targets[target]?.logicalUnits[number]?.backstore = backstore
            case .protectLogicalUnit(let number, let target, let isProtected):
                #expect(targets[target]?.logicalUnits[number]?.readOnly == !isProtected)
                targets[target]?.logicalUnits[number]?.readOnly = isProtected
            case .limitLogicalUnit(let number, let target):
                #expect(targets[target]?.logicalUnits[number] != nil)
                targets[target]?.logicalUnits[number]?.limits =
                    wanted.targets[target]!.logicalUnits[number]!.limits
            case .limitSocket(let socket):
                #expect(fronts[socket] != nil)
                fronts[socket]?.limits = wanted.front(socket)!.limits
            case .setCommandTimeout(let number, let target):
                let unit = wanted.targets[target]!.logicalUnits[number]!
                #expect(targets[target]?.logicalUnits[number] != nil)
                targets[target]?.logicalUnits[number]?.commandTimeoutNanoseconds = unit.commandTimeoutNanoseconds
            case .setStopTimeout, .setLogLevel: break
            }
        }
    }
}
