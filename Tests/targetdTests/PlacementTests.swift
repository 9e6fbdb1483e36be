// PlacementTests: what shares a logical unit is on one reactor, and the groups are spread evenly. Must not know:
// reactors.

import Testing

@testable import targetd

@Suite struct PlacementTests {
    private func name(_ number: Int) -> NAAName { NAAName(0x6000_0000_0000_0000 + UInt64(number)) }

    /// Targets with one unit each, and sockets with the targets of their numbers.
    private func configuration(reactors: Int, targets: Int, sockets: [[Int]]) -> Configuration {
        var configuration = Configuration(reactors: reactors)
        for number in 0..<targets {
            configuration.targets[name(number)] = TargetConfiguration(
                logicalUnits: [0: LogicalUnitSettings(backstore: "b\(number)")])
        }
        for (index, targets) in sockets.enumerated() {
            let targets = Dictionary(uniqueKeysWithValues: targets.enumerated().map { ($0, name($1)) })
            configuration.vhostUserFronts.append(VhostUserFrontConfiguration(socket: "/s\(index)", targets: targets))
        }
        return configuration
    }

    @Test func groupsAreDealtOutInTheOrderOfTheSockets() {
        let placement = Placement(configuration(reactors: 2, targets: 4, sockets: [[3], [2], [1], [0]]))
        #expect(placement.sockets == ["/s0": 0, "/s1": 1, "/s2": 0, "/s3": 1])
        #expect(placement.targets == [name(3): 0, name(2): 1, name(1): 0, name(0): 1])
    }

    @Test func socketsThatShareATargetAreTogether() {
        let placement = Placement(configuration(reactors: 3, targets: 3, sockets: [[0], [1], [2, 0]]))
        #expect(placement.sockets == ["/s0": 0, "/s1": 1, "/s2": 0])
        #expect(placement.targets == [name(0): 0, name(1): 1, name(2): 0])
    }

    @Test func chainOfSharedTargetsIsOneGroup() {
        let placement = Placement(
            configuration(reactors: 4, targets: 6, sockets: [[0, 1], [2, 3], [4, 5], [1, 2], [3, 4]]))
        #expect(Set(placement.sockets.values) == [0])
        #expect(Set(placement.targets.values) == [0])
    }

    @Test func targetsThatShareABackstoreAreTogether() {
        var configuration = configuration(reactors: 2, targets: 2, sockets: [[0], [1]])
        configuration.targets[name(1)]?.logicalUnits[1] = LogicalUnitSettings(backstore: "b0")
        #expect(Set(Placement(configuration).targets.values) == [0])
    }

    @Test func targetWithoutASocketHasAReactorToo() {
        let placement = Placement(configuration(reactors: 2, targets: 2, sockets: [[1]]))
        #expect(placement.targets == [name(1): 0, name(0): 1])
    }

    @Test func aSocketThatIsSpreadBindsNothing() {
        var configuration = configuration(reactors: 2, targets: 4, sockets: [[0, 1], [2, 3]])
        configuration.vhostUserFronts[0].isSpread = true
        let placement = Placement(configuration)
        #expect(placement.sockets == ["/s0": 0, "/s1": 1])
        #expect(placement.targets == [name(0): 0, name(1): 1, name(2): 1, name(3): 1])
    }

    @Test func oneReactorHasAll() {
        let placement = Placement(configuration(reactors: 1, targets: 5, sockets: [[0], [1], [2]]))
        #expect(Set(placement.sockets.values) == [0])
        #expect(placement.targets.count == 5)
    }

    /// Every configuration of up to three targets and three sockets: whatever shares is together.
    @Test func sharedTargetIsAlwaysWithItsSockets() {
        let choices = (1..<8).map { mask in (0..<3).filter { mask >> $0 & 1 == 1 } }
        for first in choices {
            for second in choices {
                for third in choices {
                    let sockets = [first, second, third]
                    let placement = Placement(configuration(reactors: 2, targets: 3, sockets: sockets))
                    for (index, targets) in sockets.enumerated() {
                        for target in targets {
                            #expect(placement.sockets["/s\(index)"] == placement.targets[name(target)])
                        }
                    }
                }
            }
        }
    }
}
