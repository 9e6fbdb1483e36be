// ConfigurationReaderTests: what each key takes, and what is said, with file, line and key, when it is given anything
// else. Must not know: what is on this machine.

import Testing

@testable import targetd

/// A configuration without errors, for tests to vary.
let goodConfiguration = """
    reactors: 2
    io-engine: libaio
    poll: 50us
    stop-timeout: 30s
    log-level: debug
    backstores:
      root:    { type: file, path: /srv/vm1.img, size: 10GiB, block-size: 4096, buffered: true }
      scratch: { type: ram, size: 1GiB }
      disk:    { type: block-device, path: /dev/sdz, read-only: true }
    targets:
      naa.60014054ac780582:
        luns:
          0: root
          1: { backstore: scratch, read-only: true, name: naa.3000000000000001, serial: S1, command-timeout: 90s, removable: true, on-error: retry, retry-timeout: 5s }
      naa.60014054ac780583:
        luns: { 255: disk }
    vhost-user-scsi:
      - { socket: /run/vm1.sock, queues: 4, targets: { 0: naa.60014054ac780582 } }
      - socket: /run/vm2.sock
        targets: { 0: naa.60014054ac780582, 7: naa.60014054AC780583 }
    """

/// Reads a configuration and applies the rules that do not look at the machine; the problems as a person sees them.
func problems(_ yaml: String) -> [String] {
    let read = ConfigurationReader.read(yaml, name: "f.yaml")
    let all = read.problems.isEmpty ? ConfigurationRules.check(read.configuration, source: read.source) : read.problems
    return all.map { $0.rendered(source: "f.yaml") }
}

/// The good configuration with one text in it replaced.
func good(with old: String, replacedBy new: String) -> String {
    precondition(goodConfiguration.contains(old), "the good configuration has no \(old)")
    return goodConfiguration.replacing(old, with: new)
}

// A table: what is replaced in the good configuration, by what, and the problem that is then reported.
// swift-format-ignore-start
private let mistakes: [(old: String, new: String, problem: String)] = [
    // The control socket
    (
        "log-level: debug", "control: { mode: 0660 }",
        "f.yaml:5: error: control: has no socket: add socket: and the absolute path of the socket to make"
    ),
    (
        "log-level: debug", "control: { socket: c }",
        "f.yaml:5: error: control.socket: \"c\" is not an absolute path: begin it with /"
    ),
    (
        "log-level: debug", "control: { socket: /c, mode: 0888 }",
        "f.yaml:5: error: control.mode: cannot be \"0888\": write octal permission bits, such as 0660"
    ),
    (
        "log-level: debug", "control: { socket: /c, mode: 01777 }",
        "f.yaml:5: error: control.mode: cannot be \"01777\": write octal permission bits, such as 0660"
    ),
    (
        "log-level: debug", "control: { socket: /c, metrics: localhost:80 }",
        "f.yaml:5: error: control.metrics: cannot be \"localhost:80\": write a numeric address and a port, such as 127.0.0.1:9464 or [::1]:9464"
    ),
    (
        "log-level: debug", "control: { socket: /c, metrics: 127.0.0.1:0 }",
        "f.yaml:5: error: control.metrics: cannot be \"127.0.0.1:0\": write a numeric address and a port, such as 127.0.0.1:9464 or [::1]:9464"
    ),
    (
        "log-level: debug", "control: { socket: /c, metrics: \"::1:80\" }",
        "f.yaml:5: error: control.metrics: cannot be \"::1:80\": write a numeric address and a port, such as 127.0.0.1:9464 or [::1]:9464"
    ),
    (
        "log-level: debug", "control: { socket: /run/vm2.sock }",
        "f.yaml:19: error: vhost-user-scsi[1].socket: /run/vm2.sock is already the control socket"
    ),
    // Unknown keys, at each level
    (
        "reactors: 2", "reactor: 2",
        "f.yaml:1: error: reactor: is not a key here: did you mean reactors? allowed: reactors, io-engine, poll, stop-timeout, log-level, state-directory, control, backstores, targets, vhost-user-scsi, xen"
    ),
    (
        "buffered: true", "bufered: true",
        "f.yaml:7: error: backstores.root.bufered: is not a key of type file here: did you mean buffered? allowed: type, block-size, read-only, path, size, buffered, shared"
    ),
    (
        "size: 1GiB", "size: 1GiB, path: /x",
        "f.yaml:8: error: backstores.scratch.path: is not a key of type ram here: allowed: type, block-size, read-only, size"
    ),
    (
        "path: /dev/sdz", "path: /dev/sdz, size: 1GiB",
        "f.yaml:9: error: backstores.disk.size: is not a key of type block-device here: allowed: type, block-size, read-only, path, buffered"
    ),
    (
        "serial: S1", "Serial: S1",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1.Serial: is not a key here: did you mean serial? allowed: backstore, read-only, name, serial, command-timeout, removable, on-error, retry-timeout, limits"
    ),
    (
        "queues: 4", "qeues: 4",
        "f.yaml:18: error: vhost-user-scsi[0].qeues: is not a key here: did you mean queues? allowed: socket, mode, queues, targets, port, limits, spread, config-space, ring-reset, drain-timeout"
    ),
    (
        "queues: 4", "drain-timeout: 99ms",
        "f.yaml:18: error: vhost-user-scsi[0].drain-timeout: \"99ms\" is out of range: write a time from 100ms to 10min"
    ),
    (
        "    luns: { 255: disk }", "    lun: { 255: disk }",
        "f.yaml:16: error: targets.naa.60014054ac780583.lun: is not a key here: did you mean luns? allowed: luns, port-groups"
    ),
    // Port groups
    (
        "    luns: { 255: disk }", "    port-groups: { id: 1 }",
        "f.yaml:16: error: targets.naa.60014054ac780583.port-groups: takes a list: write each group as - { id: 1, state: standby, ports: [1] }"
    ),
    (
        "    luns: { 255: disk }", "    port-groups: [ { ports: [1] } ]",
        "f.yaml:16: error: targets.naa.60014054ac780583.port-groups[0]: has no id: add id: and the number of the group, such as 1"
    ),
    (
        "    luns: { 255: disk }", "    port-groups: [ { id: 1 } ]",
        "f.yaml:16: error: targets.naa.60014054ac780583.port-groups[0]: has no ports: add ports: such as [1]"
    ),
    (
        "    luns: { 255: disk }", "    port-groups: [ { id: 0, ports: [1] } ]",
        "f.yaml:16: error: targets.naa.60014054ac780583.port-groups[0].id: cannot be \"0\": write a whole number from 1 to 65535"
    ),
    (
        "    luns: { 255: disk }", "    port-groups: [ { id: 1, ports: 1 } ]",
        "f.yaml:16: error: targets.naa.60014054ac780583.port-groups[0].ports: takes a list of whole numbers, such as [1]"
    ),
    (
        "    luns: { 255: disk }", "    port-groups: [ { id: 1, ports: [1, 65536] } ]",
        "f.yaml:16: error: targets.naa.60014054ac780583.port-groups[0].ports: cannot have \"65536\": write whole numbers from 1 to 65535"
    ),
    (
        "    luns: { 255: disk }", "    port-groups: [ { id: 1, ports: [1], state: offline } ]",
        "f.yaml:16: error: targets.naa.60014054ac780583.port-groups[0].state: cannot be \"offline\": allowed: active/optimized, active/non-optimized, standby, unavailable, transitioning"
    ),
    (
        "    luns: { 255: disk }",
        "    luns: { 255: disk }\n    port-groups: [ { id: 4, ports: [1] }, { id: 4, ports: [2] } ]",
        "f.yaml:17: error: targets.naa.60014054ac780583.port-groups[1].id: 4 is already the number of targets.naa.60014054ac780583.port-groups[0]"
    ),
    (
        "    luns: { 255: disk }",
        "    luns: { 255: disk }\n    port-groups: [ { id: 4, ports: [1] }, { id: 5, ports: [2, 1] } ]",
        "f.yaml:17: error: targets.naa.60014054ac780583.port-groups[1].ports: port 1 is already in group 4: a port is in one group"
    ),
    (
        "    luns: { 255: disk }",
        "    luns: { 255: disk }\n    port-groups: [ { id: 4, ports: [7, 2] } ]",
        "f.yaml:21: error: vhost-user-scsi[1].targets.7: naa.60014054ac780583 has no port 1: it has 2, 7; add it to one of the port-groups: of the target"
    ),
    (
        "    luns: { 255: disk }",
        "    luns: { 255: disk }\n    port-groups: [ { id: 1, ports: [\((1...65).map(String.init).joined(separator: ", "))] } ]",
        "f.yaml:17: error: targets.naa.60014054ac780583.port-groups: have too many ports: at most 64 in all"
    ),
    (
        "    luns: { 255: disk }",
        "    luns: { 255: disk }\n    port-groups: [\((1...17).map { "{ id: \($0), ports: [\($0)] }" }.joined(separator: ", "))]",
        "f.yaml:17: error: targets.naa.60014054ac780583.port-groups: are too many: at most 16"
    ),
    (
        "queues: 4", "port: 3",
        "f.yaml:18: error: vhost-user-scsi[0].targets.0: naa.60014054ac780582 has no port 3: it has 1, 2; add it to one of the port-groups: of the target"
    ),
    (
        "queues: 4", "port: 0",
        "f.yaml:18: error: vhost-user-scsi[0].port: cannot be \"0\": write a whole number from 1 to 65535"
    ),
    // Numbers
    (
        "reactors: 2", "reactors: 0",
        "f.yaml:1: error: reactors: cannot be \"0\": write a whole number from 1 to 64"
    ),
    (
        "reactors: 2", "reactors: 65",
        "f.yaml:1: error: reactors: cannot be \"65\": write a whole number from 1 to 64"
    ),
    (
        "reactors: 2", "reactors: two",
        "f.yaml:1: error: reactors: cannot be \"two\": write a whole number from 1 to 64"
    ),
    (
        "reactors: 2", "reactors: 1.5",
        "f.yaml:1: error: reactors: cannot be \"1.5\": write a whole number from 1 to 64"
    ),
    (
        "reactors: 2", "reactors: [2]",
        "f.yaml:1: error: reactors: takes a single value"
    ),
    (
        "reactors: 2", "reactors:",
        "f.yaml:1: error: reactors: has no value"
    ),
    (
        "queues: 4", "queues: 127",
        "f.yaml:18: error: vhost-user-scsi[0].queues: cannot be \"127\": write a whole number from 1 to 126"
    ),
    // Choices
    (
        "io-engine: libaio", "io-engine: libaoi",
        "f.yaml:2: error: io-engine: cannot be \"libaoi\": did you mean libaio? allowed: automatic, io_uring, libaio"
    ),
    (
        "log-level: debug", "log-level: loud",
        "f.yaml:5: error: log-level: cannot be \"loud\": allowed: trace, debug, info, notice, warning, error, critical"
    ),
    (
        "block-size: 4096", "block-size: 520",
        "f.yaml:7: error: backstores.root.block-size: cannot be \"520\": allowed: 512, 4096"
    ),
    (
        "buffered: true", "buffered: yes",
        "f.yaml:7: error: backstores.root.buffered: cannot be \"yes\": allowed: true, false"
    ),
    (
        "type: ram", "type: rma",
        "f.yaml:8: error: backstores.scratch.type: cannot be \"rma\": did you mean ram? allowed: ram, file, block-device"
    ),
    (
        "type: ram, ", "",
        "f.yaml:8: error: backstores.scratch: has no type: add type: ram, file or block-device"
    ),
    // Times
    (
        "poll: 50us", "poll: 50",
        "f.yaml:3: error: poll: \"50\" is not a time: write a whole number and a unit: ns, us, ms, s, min or h, such as 10s"
    ),
    (
        "poll: 50us", "poll: 2s",
        "f.yaml:3: error: poll: \"2s\" is out of range: write a time from 0s to 1s"
    ),
    (
        "stop-timeout: 30s", "stop-timeout: 11min",
        "f.yaml:4: error: stop-timeout: \"11min\" is out of range: write a time from 0s to 10min"
    ),
    // Sizes
    (
        "size: 1GiB", "size: 1G",
        "f.yaml:8: error: backstores.scratch.size: \"1G\" does not say which unit is meant: write 1GiB (powers of 1024) or 1GB (powers of 1000)"
    ),
    (
        "size: 1GiB", "size: big",
        "f.yaml:8: error: backstores.scratch.size: \"big\" is not a size: write a whole number and a unit: B, KiB, MiB, GiB, TiB or PiB (powers of 1024), or kB, MB, GB, TB or PB (powers of 1000), such as 10GiB"
    ),
    (
        ", size: 1GiB }", " }",
        "f.yaml:8: error: backstores.scratch: has no size: memory has no size of its own: add size:, such as size: 1GiB"
    ),
    (
        "size: 1GiB", "size: 0",
        "f.yaml:8: error: backstores.scratch.size: cannot be 0: write at least one logical block of 512 bytes"
    ),
    (
        "size: 1GiB", "size: 33TiB",
        "f.yaml:8: error: backstores.scratch.size: cannot be 33TiB: the most is 32TiB"
    ),
    (
        "size: 10GiB", "size: 4097PiB",
        "f.yaml:7: error: backstores.root.size: cannot be 4097PiB: the most is 4096PiB"
    ),
    (
        "size: 1GiB", "size: 1000",
        "f.yaml:8: error: backstores.scratch.size: 1000B is not a multiple of the logical block of 512 bytes"
    ),
    (
        "size: 10GiB", "size: 2560",
        "f.yaml:7: error: backstores.root.size: 2560B is not a multiple of the logical block of 4096 bytes"
    ),
    // Paths
    (
        "path: /srv/vm1.img", "path: vm1.img",
        "f.yaml:7: error: backstores.root.path: \"vm1.img\" is not an absolute path: begin it with /"
    ),
    (
        "path: /srv/vm1.img, ", "",
        "f.yaml:7: error: backstores.root: has no path: add path: and the absolute path of the medium"
    ),
    (
        "path: /srv/vm1.img", "path: \"/srv/a\\nb\"",
        "f.yaml:7: error: backstores.root.path: has a control character in its value"
    ),
    (
        "path: /dev/sdz", "path: /srv/vm1.img",
        "f.yaml:7: error: backstores.root.path: is already the medium of backstore disk: two would overwrite each other"
    ),
    (
        "socket: /run/vm1.sock", "socket: vm1.sock",
        "f.yaml:18: error: vhost-user-scsi[0].socket: \"vm1.sock\" is not an absolute path: begin it with /"
    ),
    (
        "{ socket: /run/vm1.sock, ", "{ ",
        "f.yaml:18: error: vhost-user-scsi[0]: has no socket: add socket: and the absolute path of the socket to make"
    ),
    (
        "/run/vm2.sock", "/run/vm1.sock",
        "f.yaml:19: error: vhost-user-scsi[1].socket: /run/vm1.sock is already the socket of vhost-user-scsi[0]"
    ),
    // Names
    (
        "  scratch: {", "  a/b: {",
        "f.yaml:8: error: backstores.a/b: \"a/b\" cannot be a name: write 1 to 64 letters, digits, dots, dashes and underscores, the first of them no dot or dash"
    ),
    (
        "  scratch: {", "  ..: {",
        "f.yaml:8: error: backstores...: \"..\" cannot be a name: write 1 to 64 letters, digits, dots, dashes and underscores, the first of them no dot or dash"
    ),
    (
        "  naa.60014054ac780583:", "  naa.60014054ac78058:",
        "f.yaml:15: error: targets.naa.60014054ac78058: \"naa.60014054ac78058\" is not an NAA name: write naa. and 16 hexadecimal digits, such as naa.60014054ac780582"
    ),
    (
        "  naa.60014054ac780583:", "  naa.10014054ac780583:",
        "f.yaml:15: error: targets.naa.10014054ac780583: \"naa.10014054ac780583\" is an NAA name of a kind that has no place here: the first digit can be 2, 3, 5, 6, such as naa.60014054ac780582"
    ),
    (
        "  naa.60014054ac780583:", "  naa.60014054AC780582:",
        "f.yaml:11: error: targets.naa.60014054ac780582: is defined twice: the case of its digits makes no difference"
    ),
    (
        "name: naa.3000000000000001", "name: naa.6000000000000001",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1.name: \"naa.6000000000000001\" is an NAA name of a kind that has no place here: the first digit can be 2, 3, 5"
    ),
    (
        "serial: S1", "serial: \"S 1\"",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1.serial: \"S 1\" cannot be a serial number: write 1 to 64 printable ASCII characters without spaces"
    ),
    // Logical units
    (
        "removable: true", "removable: yes",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1.removable: cannot be \"yes\": allowed: true, false"
    ),
    (
        "on-error: retry", "on-error: retyr",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1.on-error: cannot be \"retyr\": did you mean retry? allowed: report, stop, retry"
    ),
    (
        "on-error: retry", "on-error: stop",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1.retry-timeout: means nothing here: remove it, or add on-error: retry"
    ),
    (
        "retry-timeout: 5s", "retry-timeout: 1h",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1.retry-timeout: \"1h\" is out of range: write a time from 100ms to 10min"
    ),
    (
        "command-timeout: 90s", "command-timeout: 999ms",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1.command-timeout: \"999ms\" is out of range: write a time from 1s to 1h"
    ),
    (
        "command-timeout: 90s", "command-timeout: 90",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1.command-timeout: \"90\" is not a time: write a whole number and a unit: ns, us, ms, s, min or h, such as 10s"
    ),
    (
        "      0: root", "      16384: root",
        "f.yaml:13: error: targets.naa.60014054ac780582.luns.16384: \"16384\" is not a logical unit number: write a whole number from 0 to 16383"
    ),
    (
        "      0: root", "      -1: root",
        "f.yaml:13: error: targets.naa.60014054ac780582.luns.-1: \"-1\" is not a logical unit number: write a whole number from 0 to 16383"
    ),
    (
        "      0: root", "      01: root",
        "f.yaml:13: error: targets.naa.60014054ac780582.luns.01: \"01\" is not a logical unit number: write a whole number from 0 to 16383"
    ),
    (
        "      0: root", "      1: root",
        "f.yaml:13: error: 1: is given twice in the same place: remove one"
    ),
    (
        "      0: root", "      \"1\": root",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1: is given twice"
    ),
    (
        "      0: root", "      0: roto",
        "f.yaml:13: error: targets.naa.60014054ac780582.luns.0: there is no backstore roto: did you mean root? defined under backstores: disk, root, scratch"
    ),
    (
        "{ backstore: scratch, ", "{ ",
        "f.yaml:14: error: targets.naa.60014054ac780582.luns.1: has no backstore: add backstore: and the name of a backstore"
    ),
    (
        "{ 255: disk }", "{ 255: root }",
        "f.yaml:16: error: targets.naa.60014054ac780583.luns.255: backstore root is already LUN 0 of naa.60014054ac780582: a backstore has one logical unit; to reach it through more sockets, name its target at each of them"
    ),
    (
        "{ 255: disk }", "{ 255: { backstore: disk, name: naa.3000000000000001 } }",
        "f.yaml:16: error: targets.naa.60014054ac780583.luns.255.name: naa.3000000000000001 is already the name of LUN 1 of naa.60014054ac780582: a guest would take the two for one disk"
    ),
    (
        "{ 255: disk }", "[ disk ]",
        "f.yaml:16: error: targets.naa.60014054ac780583.luns: takes backstores by logical unit number, such as { 0: root }"
    ),
    // Sockets
    (
        "targets: { 0: naa.60014054ac780582 } }", "targets: { 256: naa.60014054ac780582 } }",
        "f.yaml:18: error: vhost-user-scsi[0].targets.256: \"256\" is not a virtio-scsi target number: write a whole number from 0 to 255"
    ),
    (
        "targets: { 0: naa.60014054ac780582 } }", "targets: { 0: naa.60014054ac780584 } }",
        "f.yaml:18: error: vhost-user-scsi[0].targets.0: there is no target naa.60014054ac780584: did you mean naa.60014054ac780582? defined under targets: naa.60014054ac780582, naa.60014054ac780583"
    ),
    (
        ", targets: { 0: naa.60014054ac780582 } }", " }",
        "f.yaml:18: error: vhost-user-scsi[0]: has no targets: add targets: such as { 0: naa.60014054ac780582 }"
    ),
    (
        "targets: { 0: naa.60014054ac780582 } }", "targets: {} }",
        "f.yaml:18: error: vhost-user-scsi[0].targets: names no target: add one, such as { 0: naa.60014054ac780582 }"
    ),
    (
        "7: naa.60014054AC780583", "7: naa.60014054ac780582",
        "f.yaml:20: error: vhost-user-scsi[1].targets.7: naa.60014054ac780582 is already target number 0 of this socket"
    ),
    // Shapes
    (
        "root:    { type: file, path: /srv/vm1.img, size: 10GiB, block-size: 4096, buffered: true }", "root: file",
        "f.yaml:7: error: backstores.root: takes keys and values"
    ),
    (
        "io-engine: libaio", "<<: { io-engine: libaio }",
        "f.yaml:2: error: <<: is not a key here: allowed: reactors, io-engine, poll, stop-timeout, log-level, state-directory, control, backstores, targets, vhost-user-scsi, xen"
    ),
]
// swift-format-ignore-end

@Suite struct ConfigurationReaderTests {
    @Test func everyKeyIsRead() throws {
        let read = ConfigurationReader.read(goodConfiguration, name: "f.yaml")
        #expect(read.problems == [])
        let first = NAAName(0x6001_4054_ac78_0582)
        let second = NAAName(0x6001_4054_ac78_0583)
        let expected = Configuration(
            reactors: 2, ioEngine: .libaio, pollNanoseconds: 50_000, stopTimeoutNanoseconds: 30_000_000_000,
            logLevel: "debug",
            backstores: [
                "root": BackstoreConfiguration(
                    medium: .file(path: "/srv/vm1.img", size: 10 << 30, buffered: true), blockSize: 4096),
                "scratch": BackstoreConfiguration(medium: .ram(size: 1 << 30)),
                "disk": BackstoreConfiguration(medium: .blockDevice(path: "/dev/sdz", buffered: false), readOnly: true),
            ],
            targets: [
                first: TargetConfiguration(logicalUnits: [
                    0: LogicalUnitSettings(backstore: "root"),
                    1: LogicalUnitSettings(
                        backstore: "scratch", readOnly: true, name: NAAName(0x3000_0000_0000_0001), serial: "S1",
                        commandTimeoutNanoseconds: 90_000_000_000, removable: true, onError: .retry,
                        retryTimeoutNanoseconds: 5_000_000_000),
                ]),
                second: TargetConfiguration(logicalUnits: [255: LogicalUnitSettings(backstore: "disk")]),
            ],
            vhostUserFronts: [
                VhostUserFrontConfiguration(socket: "/run/vm1.sock", queues: 4, targets: [0: first]),
                VhostUserFrontConfiguration(socket: "/run/vm2.sock", queues: 1, targets: [0: first, 7: second]),
            ])
        #expect(read.configuration == expected)
        #expect(problems(goodConfiguration) == [])
    }

    @Test func whatASocketOffersAndWhoMakesItIsRead() {
        let keys = "mode: client, spread: true, config-space: true, ring-reset: true, drain-timeout: 250ms"
        let read = ConfigurationReader.read(
            goodConfiguration.replacing("queues: 4", with: keys), name: "f.yaml")
        #expect(read.problems.isEmpty)
        let front = read.configuration.vhostUserFronts.first
        #expect(front?.mode == .client)
        #expect(front?.isSpread == true)
        #expect(front?.offersConfigurationSpace == true)
        #expect(front?.offersRingReset == true)
        #expect(front?.drainTimeoutNanoseconds == 250_000_000)
        #expect(
            ConfigurationWriter.yaml(read.configuration)
                .contains("spread: true, config-space: true, ring-reset: true, drain-timeout: 250ms"))
    }

    @Test(arguments: ["127.0.0.1:9464", "[::1]:1", "0.0.0.0:65535"])
    func controlSocketIsReadAndWritten(metrics: String) throws {
        let text = "control: { socket: /c, mode: 0620, group: kvm, metrics: \"\(metrics)\" }\n"
        let read = ConfigurationReader.read(text, name: "f.yaml")
        #expect(read.problems == [])
        let control = try #require(read.configuration.control)
        #expect((control.socket, control.mode, control.group) == ("/c", 0o620, "kvm"))
        #expect(control.metrics?.text == metrics)
        #expect(ConfigurationWriter.yaml(read.configuration) == text)
    }

    @Test func groupThatDoesNotExistIsAnError() {
        let read = ConfigurationReader.read("control: { socket: /c, group: \"no such group\" }", name: "f.yaml")
        let found = EnvironmentRules.check(read.configuration, source: read.source)
        #expect(found.map(\.key) == ["control.group"])
    }

    @Test func keysThatAreNotGivenHaveTheirDefaults() {
        let read = ConfigurationReader.read("backstores: { a: { type: ram, size: 512 } }", name: "f.yaml")
        #expect(read.problems == [])
        #expect(read.configuration.reactors == 1)
        #expect(read.configuration.ioEngine == .automatic)
        #expect(read.configuration.pollNanoseconds == 20_000)
        #expect(read.configuration.stopTimeoutNanoseconds == 10_000_000_000)
        #expect(read.configuration.logLevel == nil)
        #expect(read.configuration.backstores["a"] == BackstoreConfiguration(medium: .ram(size: 512)))
    }

    @Test(arguments: mistakes)
    func mistakeIsReportedWithFileLineKeyAndWhatIsAllowed(old: String, new: String, problem: String) {
        let found = problems(good(with: old, replacedBy: new))
        #expect(found.first == problem)
    }

    @Test func allProblemsOfAFileAreReportedAtOnce() {
        let found = problems(
            """
            reactors: 0
            backstores:
              a: { type: ram }
              b: { type: disk }
              c: { type: file, size: 1X, path: c }
            targets:
              bad: { luns: { 0: a } }
            vhost-user-scsi:
              - { queues: 0 }
              - 7
            """)
        let lines = found.map { String($0.prefix { $0 != " " }) }
        #expect(
            lines.sorted()
                == [
                    "f.yaml:1:", "f.yaml:3:", "f.yaml:4:", "f.yaml:5:", "f.yaml:5:", "f.yaml:7:", "f.yaml:9:",
                    "f.yaml:9:", "f.yaml:9:", "f.yaml:10:",
                ].sorted())
    }

    @Test(arguments: [
        ("a: [1", 2), ("a: b: c", 1), ("a: 1\n  b: 2", 2), ("x: \"abc", 1), ("a: 1\n---\nb: 2", 2), ("\tx: 1", 1),
        ("a: *b", 1),
    ])
    func whatIsNotYAMLIsReportedWithItsLine(yaml: String, line: Int) {
        let found = problems(yaml)
        #expect(found.count == 1)
        #expect(found.first?.hasPrefix("f.yaml:\(line): error: ") == true, "\(found)")
    }

    @Test(arguments: [
        "", "\n", "# nothing yet\n", "{}", "backstores:\ntargets:\nvhost-user-scsi:\n", "vhost-user-scsi: []",
    ])
    func configurationWithoutSocketsIsAnError(yaml: String) {
        #expect(problems(yaml) == ["f.yaml: error: no guest can attach: add a socket under vhost-user-scsi:, or xen:"])
    }

    @Test(arguments: ["[]", "- a", "7", "text"])
    func rootThatIsNoMappingIsAnError(yaml: String) {
        let found = problems(yaml)
        #expect(found.count == 1)
        #expect(found.first?.hasPrefix("f.yaml: error: takes keys and values: reactors, ") == true, "\(found)")
    }

    @Test func socketPathMayHaveAsManyBytesAsTheKernelTakes() {
        let longest = "/" + String(repeating: "s", count: 106)
        #expect(problems(good(with: "/run/vm1.sock", replacedBy: longest)) == [])
        #expect(
            problems(good(with: "/run/vm1.sock", replacedBy: longest + "s")) == [
                "f.yaml:18: error: vhost-user-scsi[0].socket: is 108 bytes long: the path of a socket has at most 107"
            ])
    }

    @Test func longestNameIsAllowedAndOneCharacterMoreIsNot() {
        let longest = String(repeating: "n", count: 64)
        #expect(problems(goodConfiguration.replacing("scratch", with: longest)) == [])
        #expect(problems(goodConfiguration.replacing("scratch", with: longest + "n")).count == 1)
    }

    @Test func whatNothingUsesIsAWarning() {
        let found = problems(
            """
            backstores:
              a: { type: ram, size: 1MiB }
              b: { type: ram, size: 1MiB }
            targets:
              naa.60014054ac780582: { luns: { 0: a } }
              naa.60014054ac780583: {}
            vhost-user-scsi:
              - { socket: /run/a.sock, targets: { 0: naa.60014054ac780582 } }
            """)
        #expect(
            found == [
                "f.yaml:6: warning: targets.naa.60014054ac780583: has no logical units: its initiators find nothing",
                "f.yaml:3: warning: backstores.b: is not a logical unit of any target",
                "f.yaml:6: warning: targets.naa.60014054ac780583: cannot be reached: no socket names it",
            ])
    }

    @Test func userOfAPartThatCouldNotBeReadIsNotBlamed() {
        let yaml = good(with: "type: ram", replacedBy: "type: rma")
        let read = ConfigurationReader.read(yaml, name: "f.yaml")
        #expect(ConfigurationRules.check(read.configuration, source: read.source) == [])
    }

    @Test func aliasesAreCopies() {
        let found = ConfigurationReader.read(
            """
            backstores:
              a: &medium { type: ram, size: 1MiB }
              b: *medium
            """, name: "f.yaml")
        #expect(found.problems == [])
        #expect(found.configuration.backstores["a"] == found.configuration.backstores["b"])
    }

    @Test func unitHasANameAndASerialNumberOfItsOwnUnlessGiven() throws {
        let read = ConfigurationReader.read(goodConfiguration, name: "f.yaml").configuration
        let name = NAAName(0x6001_4054_ac78_0582)
        let units = try #require(read.targets[name]?.logicalUnits)
        let derived = NAAName.derived(from: "logical unit", "naa.60014054ac780582", "root")
        #expect(units[0]?.effectiveName(target: name) == derived)
        #expect(units[0]?.effectiveSerial(target: name) == derived.hexadecimal)
        #expect(units[1]?.effectiveName(target: name).value == 0x3000_0000_0000_0001)
        #expect(units[1]?.effectiveSerial(target: name) == "S1")
    }
}
