// XenConfigurationTests: what `xen:` takes, what follows from it for the rest of the file, and when the Xen front
// starts and stops. Must not know: Xen.

import ControlAPI
import Logging
import Testing

@testable import targetctl
@testable import targetd

@Suite struct XenConfigurationTests {
    private static let target = NAAName(0x6001_4054_ac78_0582)

    private func yaml(_ xen: String) -> String {
        """
        backstores: { a: { type: ram, size: 1MiB } }
        targets: { naa.60014054ac780582: { luns: { 0: a } } }
        \(xen)
        """
    }

    private func configuration(_ xen: String) -> Configuration {
        ConfigurationReader.read(yaml(xen), name: "f.yaml").configuration
    }

    @Test(arguments: [
        ("xen:", XenConfiguration()),
        ("xen: {}", XenConfiguration()),
        ("xen: { enabled: auto }", XenConfiguration()),
        ("xen: { enabled: true }", XenConfiguration(enabled: .always)),
        (
            "xen: { enabled: false, records: /run/x, host-devices: false, port: 9, staging: 32MiB }",
            XenConfiguration(enabled: .never, records: "/run/x", hostDevices: false, port: 9, staging: 32 << 20)
        ),
    ])
    func everyKeyIsReadAndWritten(_ xen: String, _ wanted: XenConfiguration) {
        let read = ConfigurationReader.read(yaml(xen), name: "f.yaml")
        #expect(read.problems == [])
        #expect(read.configuration.xen == wanted)
        let again = ConfigurationReader.read(ConfigurationWriter.yaml(read.configuration), name: "f.yaml")
        #expect(again.problems == [])
        #expect(again.configuration == read.configuration)
    }

    @Test(arguments: [
        ("xen: { enabled: yes }", "xen.enabled: cannot be \"yes\": allowed: auto, true, false"),
        ("xen: { staging: 1MiB }", "xen.staging: cannot be 1MiB: write a size from 16MiB to 1GiB"),
        ("xen: { staging: 2GiB }", "xen.staging: cannot be 2GiB: write a size from 16MiB to 1GiB"),
        ("xen: { records: run }", "xen.records: \"run\" is not an absolute path: begin it with /"),
        (
            "xen: { record: /run }",
            "xen.record: is not a key here: did you mean records? allowed: enabled, records, host-devices, port, staging"
        ),
        ("xen: { port: 0 }", "xen.port: cannot be \"0\": write a whole number from 1 to 65535"),
        ("xen: true", "xen: takes keys and values: enabled, records, host-devices, port, staging"),
    ])
    func mistakesAreExplained(_ xen: String, _ problem: String) {
        #expect(problems(yaml(xen)) == ["f.yaml:3: error: \(problem)"])
    }

    @Test(arguments: [
        ("xen: { port: 3 }", "luns: { 0: a }, port-groups: [ { id: 1, ports: [3] } ]", nil),
        ("xen: { enabled: false, port: 9 }", "luns: { 0: a }", nil),
        ("xen: { port: 3 }", "luns: { 0: a }", "3: it has 1, 2"),
        ("xen:", "luns: { 0: a }, port-groups: [ { id: 1, ports: [3] } ]", "2: it has 3"),
    ])
    func portOfXenGuestsIsOneOfEachTarget(_ xen: String, _ target: String, _ problem: String?) {
        let found = problems(yaml(xen).replacing("luns: { 0: a }", with: target)).filter { $0.contains("xen.port") }
        let rest = "; add it to one of the port-groups: of the target"
        let expected = problem.map { "f.yaml:3: error: xen.port: naa.60014054ac780582 has no port \($0)\(rest)" }
        #expect(found == (expected.map { [$0] } ?? []))
    }

    @Test func xenGuestsReachTargetsWithoutSockets() {
        #expect(problems(yaml("xen:")) == [])
        #expect(
            problems(yaml("xen: { enabled: false }")) == [
                "f.yaml:2: warning: targets.naa.60014054ac780582: cannot be reached: no socket names it",
                "f.yaml: error: no guest can attach: add a socket under vhost-user-scsi:, or xen:",
            ])
    }

    @Test func frontIsStartedLastAndStoppedFirst() {
        let without = configuration("xen: { enabled: false }")
        let with = configuration("xen:")
        var nothing = without
        (nothing.backstores, nothing.targets) = ([:], [:])
        let start = Plan(from: nothing, placement: Placement(), to: with)
        #expect(
            start.changes == [
                .addBackstore("a"), .addTarget(Self.target), .addLogicalUnit(0, target: Self.target), .startXen,
            ])
        let stop = Plan(from: with, placement: start.placement, to: nothing)
        #expect(
            stop.changes == [
                .stopXen, .removeLogicalUnit(0, target: Self.target), .removeTarget(Self.target), .removeBackstore("a"),
            ])
    }

    @Test func otherSettingsAreANewStartAndTheSameAreNone() {
        let before = configuration("xen: { enabled: true }")
        let placement = Placement(before)
        #expect(Plan(from: before, placement: placement, to: before).changes == [])
        let after = configuration("xen: { enabled: true, staging: 32MiB }")
        #expect(Plan(from: before, placement: placement, to: after).changes == [.stopXen, .startXen])
        #expect(Change.stopXen.inverse == .startXen && Change.startXen.inverse == .stopXen)
    }

    @Test func statusIsShownWithWhatIsWaitedFor() {
        var status = XenStatus(waitsFor: "xenstored", vhosts: [])
        #expect(Text.xen(status) == "Xen guests are not served: xenstored\n")
        var vhost = XenVhostStatus(
            domain: 3, vhost: 0, backendState: "connected", frontendState: "connected",
            devices: [
                XenDeviceStatus(
                    name: "dev-0", physicalDevice: "naa.60014054ac780582:0", virtualDevice: "0:0:0:0",
                    state: "connected")
            ])
        (vhost.reactor, vhost.commands) = (0, 17)
        status = XenStatus(waitsFor: nil, vhosts: [vhost])
        #expect(
            Text.xen(status) == """
                DOMAIN  VHOST  BACK END   FRONT END  REACTOR  COMMANDS  DEVICES
                     3      0  connected  connected        0        17  0:0:0:0=naa.60014054ac780582:0
                """)
    }
}
