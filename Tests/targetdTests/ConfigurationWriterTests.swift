// ConfigurationWriterTests: what is written reads back as the same, and looks as people write it. Must not know:
// files.

import Testing

@testable import targetd

@Suite struct ConfigurationWriterTests {
    private func readBack(_ configuration: Configuration) -> ConfigurationReader.Result {
        ConfigurationReader.read(ConfigurationWriter.yaml(configuration), name: "f.yaml")
    }

    @Test func everythingIsWrittenAsAPersonWould() {
        let read = ConfigurationReader.read(goodConfiguration, name: "f.yaml")
        #expect(
            ConfigurationWriter.yaml(read.configuration) == """
                reactors: 2
                io-engine: libaio
                poll: 50us
                stop-timeout: 30s
                log-level: debug
                backstores:
                  disk: { type: block-device, path: /dev/sdz, read-only: true }
                  root: { type: file, path: /srv/vm1.img, size: 10GiB, buffered: true, block-size: 4096 }
                  scratch: { type: ram, size: 1GiB }
                targets:
                  naa.60014054ac780582:
                    luns:
                      0: root
                      1: { backstore: scratch, read-only: true, name: naa.3000000000000001, serial: S1, \
                command-timeout: 90s, removable: true, on-error: retry, retry-timeout: 5s }
                  naa.60014054ac780583:
                    luns:
                      255: disk
                vhost-user-scsi:
                  - { socket: /run/vm1.sock, queues: 4, targets: { 0: naa.60014054ac780582 } }
                  - { socket: /run/vm2.sock, targets: { 0: naa.60014054ac780582, 7: naa.60014054ac780583 } }

                """)
        #expect(readBack(read.configuration).configuration == read.configuration)
    }

    @Test func emptyConfigurationIsAnEmptyFile() {
        #expect(ConfigurationWriter.yaml(Configuration()) == "")
    }

    @Test(arguments: [
        "/plain", "/with space", "/a: b", "/a, b", "/{x}", "/[x]", "/#x", "/x #y", "/it's", "/a\"b", "/a\\b", "/ünï",
        "/*x",
        "/&x", "/!x", "/%x", "/@x", "/`x", "/|x", "/>x", "/?x", "/trailing ", "/\u{2028}x",
    ])
    func anyPathReadsBack(path: String) {
        var configuration = Configuration()
        configuration.backstores["x"] = BackstoreConfiguration(medium: .file(path: path, size: nil, buffered: false))
        configuration.targets[NAAName(0x3000_0000_0000_0001)] = TargetConfiguration(
            logicalUnits: [0: LogicalUnitSettings(backstore: "x", serial: "#\"'{")])
        configuration.vhostUserFronts = [
            VhostUserFrontConfiguration(socket: path, targets: [0: NAAName(0x3000_0000_0000_0001)])
        ]
        let read = readBack(configuration)
        #expect(read.problems == [])
        #expect(read.configuration == configuration)
    }

    @Test(arguments: ["null", "true", "~x", "1", "0x10", "1e3", "a.b", "_", "no", "1_000", "2026-11-21"])
    func namesThatLookLikeOtherThingsReadBack(name: String) {
        var configuration = Configuration()
        configuration.backstores[name] = BackstoreConfiguration(medium: .ram(size: 512))
        configuration.targets[NAAName(0x3000_0000_0000_0001)] = TargetConfiguration(
            logicalUnits: [0: LogicalUnitSettings(backstore: name)])
        #expect(readBack(configuration).configuration == configuration)
    }

    /// Configurations of random parts, from a seed that is printed if one does not read back.
    @Test func randomConfigurationsReadBack() {
        let seed = UInt64.random(in: 0...(.max))
        var generator = SplitMix(state: seed)
        for _ in 0..<500 {
            let configuration = randomConfiguration(&generator)
            let read = readBack(configuration)
            #expect(read.problems == [] && read.configuration == configuration, "seed \(seed)")
        }
    }
}

/// A small generator with a seed, so that what it led to can be repeated.
struct SplitMix: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9e37_79b9_7f4a_7c15
        var word = state
        word = (word ^ (word >> 30)) &* 0xbf58_476d_1ce4_e5b9
        word = (word ^ (word >> 27)) &* 0x94d0_49bb_1331_11eb
        return word ^ (word >> 31)
    }
}

/// A configuration without errors, of random parts.
func randomConfiguration(_ generator: inout SplitMix) -> Configuration {
    var configuration = Configuration()
    configuration.reactors = .random(in: 1...4, using: &generator)
    configuration.ioEngine = IOEngine.allCases.randomElement(using: &generator)!
    configuration.pollNanoseconds = .random(in: 0...100, using: &generator) * 1000
    configuration.stopTimeoutNanoseconds = .random(in: 0...100, using: &generator) * 1_000_000
    configuration.logLevel = ([nil] + LogLevels.names.map(Optional.some)).randomElement(using: &generator)!
    let target = NAAName(0x6000_0000_0000_0000 + .random(in: 0...0xffff, using: &generator))
    for index in 0..<Int.random(in: 0...5, using: &generator) {
        let name = "b\(index)"
        let size = UInt64.random(in: 1...1000, using: &generator) * 4096
        let buffered = Bool.random(using: &generator)
        let medium: BackstoreConfiguration.Medium
        switch Int.random(in: 0..<4, using: &generator) {
        case 0: medium = .ram(size: size)
        case 1: medium = .file(path: "/f\(index)", size: size, buffered: buffered)
        case 2: medium = .file(path: "/f\(index)", size: nil, buffered: buffered)
        default: medium = .blockDevice(path: "/dev/\(index)", buffered: buffered)
        }
        configuration.backstores[name] = BackstoreConfiguration(
            medium: medium, blockSize: [nil, 512, 4096].randomElement(using: &generator)!,
            readOnly: .random(using: &generator))
        if case .file = medium { configuration.backstores[name]!.isShared = .random(using: &generator) }
        var unit = LogicalUnitSettings(backstore: name, readOnly: .random(using: &generator))
        if Bool.random(using: &generator) { unit.name = NAAName(0x3000_0000_0000_0000 + UInt64(index)) }
        if Bool.random(using: &generator) { unit.serial = "S\(index)" }
        if Bool.random(using: &generator) {
            unit.commandTimeoutNanoseconds = .random(
                in: ConfigurationLimits.commandTimeoutNanoseconds, using: &generator)
        }
        unit.removable = .random(using: &generator)
        unit.onError = LogicalUnitSettings.OnError.allCases.randomElement(using: &generator)!
        if unit.onError == .retry, Bool.random(using: &generator) {
            unit.retryTimeoutNanoseconds = .random(
                in: ConfigurationLimits.retryTimeoutNanoseconds, using: &generator)
        }
        configuration.targets[target, default: TargetConfiguration()].logicalUnits[index * 7] = unit
    }
    if configuration.targets[target] == nil { configuration.targets[target] = TargetConfiguration() }
    for index in 0..<Int.random(in: 0...3, using: &generator) {
        configuration.targets[target]!.portGroups.append(
            PortGroupConfiguration(
                identifier: index * 100 + 1,
                state: PortGroupConfiguration.AccessState.allCases.randomElement(using: &generator)!,
                isPreferred: .random(using: &generator), isExplicit: .random(using: &generator),
                ports: [index * 2 + 1, index * 2 + 2]))
    }
    for index in 0..<Int.random(in: 1...3, using: &generator) {
        configuration.vhostUserFronts.append(
            VhostUserFrontConfiguration(
                socket: "/run/s\(index)", queues: .random(in: 1...8, using: &generator),
                targets: [.random(in: 0...255, using: &generator): target],
                port: configuration.targets[target]!.ports.randomElement(using: &generator)!,
                mode: VhostUserFrontConfiguration.Mode.allCases.randomElement(using: &generator)!,
                isSpread: .random(using: &generator),
                offersConfigurationSpace: .random(using: &generator), offersRingReset: .random(using: &generator)))
    }
    return configuration
}
