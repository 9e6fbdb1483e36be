# service: targetd as a service: its unit file, the schema of its file, many disks, the shell.
#
# Owns: these cases. Called by: run.py. Must not know: guests.

"""What surrounds the daemon. No guest is booted."""

import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import tempfile
import time

from harness import image, processes, python_packages, targets
from harness.report import Group, Skipped, case, require

CONTROL = os.path.join(os.path.dirname(targets.Daemon.executable), "targetctl")
SOCKETS, UNITS = 50, 4  # of each socket

GOOD = {
    "control": {"socket": "/run/c", "mode": "0660", "group": "root", "metrics": "127.0.0.1:9464"},
    "poll": "50us", "stop-timeout": "5s", "log-level": "debug", "io-engine": "automatic", "reactors": 2,
    "backstores": {"a": {"type": "ram", "size": "1GiB", "block-size": 4096}, "b": {"type": "ram", "size": 1048576}},
    "targets": {"naa.6001405000000001": {"luns": {"0": "a", "1": {
        "backstore": "b", "read-only": True, "serial": "X1",
        "limits": {"iops": 100, "bandwidth": "1MiB", "burst": "2s"}}}}},
    "vhost-user-scsi": [
        {"socket": "/tmp/s", "queues": 4, "targets": {"0": "naa.6001405000000001"}},
        {"socket": "/tmp/t", "mode": "client", "spread": True, "config-space": True, "ring-reset": True,
         "drain-timeout": "250ms",
         "targets": {"0": "naa.6001405000000001"}}],
}  # fmt: skip

# What is wrong by its form alone: where, and the value there.
FAULTS = [
    (["colour"], 1), (["reactors"], 0), (["reactors"], 65), (["io-engine"], "fast"), (["poll"], "soon"),
    (["control", "socket"], "relative"), (["control", "colour"], 1), (["backstores", "a", "type"], "tape"),
    (["backstores", "a", "size"], "10G"), (["backstores", "a", "path"], "/x"),
    (["backstores", "a", "block-size"], 1000),
    (["targets", "naa.6001405000000001", "luns", "0"], {}), (["targets", "naa.6001405000000001", "luns", "01"], "a"),
    (["targets", "naa.6001405000000001", "luns", "1", "limits", "iops"], 0),
    (["targets", "naa.6001405000000001", "luns", "1", "limits", "colour"], 0),
    (["vhost-user-scsi", 0, "queues"], 127), (["vhost-user-scsi", 0, "socket"], "s"),
    (["vhost-user-scsi", 0, "mode"], "both"), (["vhost-user-scsi", 0, "spread"], "wide"),
    (["vhost-user-scsi", 0, "ring-reset"], 1), (["vhost-user-scsi", 0, "drain-timeout"], "soon"),
    (["backstores", "a", "shared"], True),
    (["vhost-user-scsi", 0, "colour"], 1), (["xen"], {"colour": 1}),
]  # fmt: skip


class Service(Group):
    """One directory for all cases."""

    title = "targetd as a service"

    def __init__(self, kind: type[targets.Target]) -> None:
        self.kind = kind
        self.directory = ""

    def prepare(self) -> None:
        if not self.kind.is_ours:
            raise Skipped("not on the reference: it is about our daemon")
        self.directory = tempfile.mkdtemp(prefix="targetd-test-")

    def finish(self) -> None:
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)

    @case("systemd finds nothing wrong with the unit file")
    def unit(self):
        if not shutil.which("systemd-analyze"):
            raise Skipped("this machine has no systemd-analyze (Debian: systemd)")
        with open(os.path.join(image.ROOT, "Packaging", "targetd.service")) as file:
            text = file.read()
        require("Type=notify" in text and "WatchdogSec=" in text and "ExecReload=" in text, text)
        # The daemon is not installed here.
        with open(self._path("targetd.service"), "w") as file:
            file.write(text.replace("/usr/bin/targetd", targets.Daemon.executable))
        result = self._run("systemd-analyze", "verify", "--man=no", self._path("targetd.service"))
        complaints = [line for line in (result.stdout + result.stderr).splitlines() if "targetd.service" in line]
        require(result.returncode == 0 and not complaints, result.stdout + result.stderr)

    @case("the schema and --check say the same of good files and of bad ones")
    def schema(self):
        try:
            jsonschema = python_packages.module("jsonschema", "4.17.3", with_dependencies=True)
        except targets.NotPossible as error:
            raise Skipped(str(error)) from None
        with open(os.path.join(image.ROOT, "Docs", "configuration.schema.json")) as file:
            schema = json.load(file)
        jsonschema.Draft7Validator.check_schema(schema)
        validator = jsonschema.Draft7Validator(schema)
        problems = [error.message for error in validator.iter_errors(GOOD)]
        require(not problems and self._check(GOOD) == 0, f"the good file: {problems}")
        for place, value in FAULTS:
            bad = json.loads(json.dumps(GOOD))
            at = bad
            for step in place[:-1]:
                at = at[step]
            at[place[-1]] = value
            name = ".".join(map(str, place))
            require(not validator.is_valid(bad), f"the schema takes {name}: {value!r}")
            require(self._check(bad) == 78, f"--check takes {name}: {value!r}")
        return f"{len(FAULTS)} bad files"

    def _check(self, document: dict) -> int:
        # JSON is a part of YAML.
        with open(self._path("check.yaml"), "w") as file:
            json.dump(document, file)
        return self._run(targets.Daemon.executable, "--check", self._path("check.yaml")).returncode

    @case("completions for three shells are generated and know the commands")
    def completions(self):
        for shell in ["bash", "zsh", "fish"]:
            result = self._run(CONTROL, "--generate-completion-script", shell)
            require(result.returncode == 0, result.stderr)
            for word in ["status", "top", "limit", "freeze", "trace", "events"]:
                require(word in result.stdout, f"{shell}: no {word}")

    @case("200 logical units on 50 sockets start, and a change of one line touches nothing else")
    def many(self):
        path, log, control = self._path("many.yaml"), self._path("log"), self._path("control")
        lines = [f"control: {{ socket: {control} }}", "backstores:"]
        names = [(socket, unit) for socket in range(SOCKETS) for unit in range(UNITS)]
        lines += [f"  m{socket}x{unit}: {{ type: ram, size: 1GiB }}" for socket, unit in names]
        lines += ["targets:"]
        for socket in range(SOCKETS):
            luns = ", ".join(f"{unit}: m{socket}x{unit}" for unit in range(UNITS))
            lines.append(f"  naa.60014050000000{socket:02x}: {{ luns: {{ {luns} }} }}")
        lines += ["vhost-user-scsi:"]
        for socket in range(SOCKETS):
            name = f"naa.60014050000000{socket:02x}"
            lines.append(f"  - {{ socket: {self._path(f's{socket}')}, targets: {{ 0: {name} }} }}")
        empty = self._resident(["--ram", "1GiB", "--vhost-user", self._path("one")], self._path("one"))
        with open(path, "w") as file:
            file.write("\n".join(lines) + "\n")
        begin = time.monotonic()
        daemon = processes.start([targets.Daemon.executable, "--config", path], log)
        try:
            targets.wait_until(lambda: os.path.exists(control), daemon, log, "everything is served")
            seconds, work = time.monotonic() - begin, self._processor_seconds(daemon.pid)
            status = self._answer("status", "--json")
            require(len(status["fronts"]) == SOCKETS, f"{len(status['fronts'])} sockets")
            require(sum(len(t["luns"]) for t in status["targets"]) == SOCKETS * UNITS, "logical units are missing")
            resident = self._rss(daemon.pid)
            before = {f["socket"]: f["connections"] for f in status["fronts"]}
            changed = [line.replace("{ 0: m7x0,", "{ 0: { backstore: m7x0, read-only: true },") for line in lines]
            with open(path, "w") as file:
                file.write("\n".join(changed) + "\n")
            done = self._answer("apply", path, "--json")
            wanted = ["~ target naa.6001405000000007 LUN 0 read-only: true"]
            require(done["changes"] == wanted, f"{done['changes']}")
            after = self._answer("status", "--json")
            require(before == {f["socket"]: f["connections"] for f in after["fronts"]}, "sockets were touched")
            each = (resident - empty) / (SOCKETS * UNITS - 1) / 1024
            return (f"served after {seconds:.2f} s, of which {work:.2f} s of processor time; {resident >> 10} KiB "
                    f"resident, {each:.0f} KiB for each logical unit")  # fmt: skip
        finally:
            processes.stop(daemon, 60)

    @case("the description of the back-end is what programs that look for back-ends expect")
    def description(self):
        with open(os.path.join(image.ROOT, "Docs", "50-targetd-vhost-user-scsi.json")) as file:
            found = json.load(file)
        # QEMU's docs/interop/vhost-user.json: VHostUserBackend.
        require(set(found) <= {"description", "type", "features", "tags", "binary"}, f"unknown keys: {found}")
        require(os.path.isabs(found["binary"]) and os.path.basename(found["binary"]) == "targetd", f"{found}")
        capabilities = json.loads(self._run(targets.Daemon.executable, "--print-capabilities").stdout)
        require(set(capabilities) == {"type", "features"}, f"{capabilities}")
        require(capabilities["type"] == found["type"] == "scsi", f"{capabilities}, {found}")
        require(set(found.get("features", [])) <= set(capabilities["features"]), f"{capabilities}, {found}")

    @case("a front-end for which there is no file descriptor is refused, and the next one is served")
    def descriptors(self):
        path, log = self._path("few"), self._path("log.few")
        daemon = processes.start([targets.Daemon.executable, "--ram", "1MiB", "--vhost-user", path], log)
        try:
            targets.wait_until(lambda: os.path.exists(path), daemon, log, "one disk is served")
            used = {int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd")}
            first_free = next(number for number in range(len(used) + 1) if number not in used)
            before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (first_free, before[1]))
            with socket.socket(socket.AF_UNIX) as refused:
                refused.settimeout(60)
                refused.connect(path)
                require(refused.recv(1) == b"", "a connection without a descriptor was not closed")
            targets.wait_until(
                lambda: "no file descriptors left" in processes.tail(log), daemon, log, "the refusal is said")
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
            with socket.socket(socket.AF_UNIX) as served:
                served.settimeout(60)
                served.connect(path)
                # GET_FEATURES, version 1.
                served.sendall(struct.pack("<III", 1, 1, 0))
                require(len(served.recv(20)) == 20, "the next front-end is not served")
        finally:
            processes.stop(daemon, 60)

    def _answer(self, *arguments: str) -> dict:
        result = self._run(CONTROL, *arguments, "--socket", self._path("control"))
        require(result.returncode == 0, result.stderr)
        return json.loads(result.stdout)

    def _resident(self, arguments: list[str], socket: str) -> int:
        daemon = processes.start([targets.Daemon.executable, *arguments], self._path("log.one"))
        try:
            targets.wait_until(lambda: os.path.exists(socket), daemon, self._path("log.one"), "one disk is served")
            return self._rss(daemon.pid)
        finally:
            processes.stop(daemon, 60)

    @staticmethod
    def _processor_seconds(process: int) -> float:
        """What its threads have worked, which a busy machine does not make longer."""
        with open(f"/proc/{process}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _rss(process: int) -> int:
        with open(f"/proc/{process}/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS:"))
