# operator: a day in the life of somebody who runs targetd, with a guest that works meanwhile.
#
# Owns: these cases. Called by: run.py. Must not know: how the daemon does what it is asked for.

"""Everything through targetctl, as a person would, while a Linux guest uses its disks."""

import json
import os
import re
import signal
import subprocess
import time

from harness import newer_qemu, processes, prometheus, targets
from harness.report import Skipped, case, require
from harness.targets import Disk

from .guests import GuestGroup

CONTROL = os.path.join(os.path.dirname(targets.Daemon.executable), "targetctl")
NAME = "naa.6001405000000000"
SEEN_SECONDS = 60


class ManagedDaemon(targets.Daemon):
    """Our daemon with a control socket."""

    is_ours = True

    @property
    def control(self) -> str:
        return os.path.join(self.directory, "control")

    def _yaml(self) -> str:
        return f"control: {{ socket: {self.control} }}\n" + super()._yaml()


class Operator(GuestGroup):
    """Cases that build on each other: each is an hour of the day."""

    title = "A day in an operator's life"
    ordered = True
    disks = [Disk("root", "file", 256, lun=0), Disk("data", "ram", 64, lun=1)]

    def __init__(self, kind: type[targets.Target]) -> None:
        super().__init__(ManagedDaemon if kind.is_ours else kind)

    def prepare(self) -> None:
        if not self.kind.is_ours:
            raise Skipped("not on the reference: it is about our daemon")
        self.without_reconnection = None
        try:
            # vhost-user-scsi of Debian 12's own QEMU (7.2) does not connect again.
            self.emulator = newer_qemu.emulator()
        except targets.NotPossible as error:
            self.without_reconnection = str(error)
        super().prepare()

    def arguments(self) -> list[str]:
        found = super().arguments()
        if self.emulator:
            found = [word + ",reconnect-ms=100" if word.startswith("socket,id=targetd") else word for word in found]
        return found

    def control(self, *arguments: str, status: int = 0) -> str:
        """What targetctl prints; it must end with this status."""
        result = subprocess.run(
            [CONTROL, *arguments, "--socket", self.target.control], capture_output=True, text=True, timeout=120)
        said = f"{result.stdout}{result.stderr}"
        require(result.returncode == status, f"targetctl {' '.join(arguments)}: status {result.returncode}:\n{said}")
        return result.stdout + result.stderr

    def seen(self, script: str, what: str) -> str:
        """Waits until a command in the guest succeeds: what the daemon has told it takes effect on its own time."""
        limit = time.monotonic() + SEEN_SECONDS
        while (result := self.guest.run(script)).status != 0:
            require(time.monotonic() < limit, f"waited {SEEN_SECONDS} s until {what}; it says:\n{result.output}")
        return result.output.strip()

    def load(self, runtime: int, name: str, size: str = "64M") -> str:
        """A command of the guest that reads at random."""
        return (f"fio --name={name} --filename={self.devices['root'].block} --size={size} --rw=randread --bs=4k"
                f" --direct=1 --iodepth=8 --ioengine=libaio --time_based --runtime={runtime}")  # fmt: skip

    @property
    def text(self) -> str:
        with open(self.target.configuration) as file:
            return file.read()

    @case("the file is free of errors, and what runs is what it says")
    def check(self):
        result = subprocess.run(
            [targets.Daemon.executable, "--check", self.target.configuration], capture_output=True, text=True)
        # The files that the daemon has made since are there, which is no error.
        require(result.returncode == 0, f"--check: {result.stdout}{result.stderr}")
        self.control("diff", self.target.configuration)
        require("connected" in self.control("status"), "status does not show the guest")

    @case("a logical unit is added while fio runs, and the guest finds it")
    def add(self):
        self.guest.check(f"{self.load(600, 'day')} > /run/fio.log 2>&1 & echo $! > /run/fio.pid")
        self.control("add", "backstore", "extra", "--ram", "32MiB")
        self.control("add", "lun", NAME, "5", "extra")
        size = self.seen("cat /sys/bus/scsi/devices/0:0:0:5/block/*/size", "the new disk is there")
        require(int(size) == 32 << 11, f"the new disk has {size} sectors")
        self.guest.check("kill -0 $(cat /run/fio.pid)")

    @case("a disk is made longer under the load, and the guest follows")
    def resize(self):
        self.control("resize", "root", "384MiB")
        disk = os.path.basename(self.devices["root"].block)
        self.seen(f"test $(cat /sys/block/{disk}/size) = {384 << 11}", "the disk has its new size")
        self.guest.check("kill -0 $(cat /run/fio.pid)")

    @case("a limit of operations holds")
    def limit(self):
        self.control("limit", "lun", NAME, "0", "--iops", "100", "--burst", "0s")
        shown = json.loads(self.control("top", "--once", "--interval", "3", "--json"))
        (unit,) = [unit for unit in shown["units"] if unit["lun"] == 0]
        # One more than the rate may lie in any stretch of time, and what the clock of a turn rounds.
        most = 100 * shown["seconds"] * 1.02 + 2
        made = unit["reads"] * shown["seconds"]
        require(0 < made <= most, f"{made:.0f} reads in {shown['seconds']:.2f} s, {most:.0f} are allowed")
        tasks = json.loads(self.control("tasks", "--json"))
        require(any(task.get("waits-for") == "quota" for task in tasks), f"nobody waits for the limit: {tasks}")
        self.control("limit", "lun", NAME, "0")
        return f"{made / shown['seconds']:.0f} reads in a second"

    @case("a frozen unit keeps its commands until it is thawed or the machine is paused, and none fails")
    def freeze(self):
        self.control("freeze", NAME, "0")
        limit = time.monotonic() + SEEN_SECONDS
        while not (tasks := [t for t in json.loads(self.control("tasks", "--json")) if t.get("waits-for") == "thaw"]):
            require(time.monotonic() < limit, "no command waits at the frozen unit")
        # QEMU answers when all queues have stopped: nothing waits for the thaw then.
        self.guest.monitor("stop")
        left = [task for task in json.loads(self.control("tasks", "--json")) if task["lun"] == 0]
        require(not left, f"the machine stands still, and its commands are not answered: {left}")
        self.guest.monitor("cont")
        self.control("thaw", NAME, "0")
        oldest = min(task["tag"] for task in tasks)
        limit = time.monotonic() + SEEN_SECONDS
        while any(t.get("waits-for") == "thaw" for t in json.loads(self.control("tasks", "--json"))):
            require(time.monotonic() < limit, f"commands such as {oldest} still wait")
        self.guest.check("kill -0 $(cat /run/fio.pid)")
        return f"{len(tasks)} commands waited"

    @case("a trace shows the commands of the guest")
    def trace(self):
        self.control("trace", NAME, "1", "--on", "--entries", "64")
        self.guest.check(f"dd if={self.devices['data'].block} of=/dev/null bs=4096 count=1 skip=1234 iflag=direct")
        trace = json.loads(self.control("trace", NAME, "1", "--json"))
        # 1234 blocks of 4096 bytes are 9872 of 512, which is 2690h.
        wanted = [entry for entry in trace["entries"] if entry["cdb"].startswith("280000002690")]
        require(len(wanted) == 1 and wanted[0]["status"] == "good" and wanted[0]["bytes"] == 4096, f"{trace}")
        self.control("trace", NAME, "1", "--off")

    @case("a logical unit is removed, and the guest lets it go")
    def remove(self):
        self.control("remove", "lun", NAME, "5")
        self.control("remove", "backstore", "extra")
        self.seen("test ! -e /sys/bus/scsi/devices/0:0:0:5", "the disk is gone")

    @case("an edited file is applied by the smallest set of changes")
    def apply(self):
        text = self.text.replace("backstores:\n", "backstores:\n  more: { type: ram, size: 16MiB }\n", 1)
        text = text.replace("      1: data\n", "      1: data\n      7: more\n", 1)
        text = text.replace("size: 256MiB", "size: 384MiB", 1)  # it was made longer
        with open(self.target.configuration, "w") as file:
            file.write(text)
        wanted = ["+ backstore more", f"+ target {NAME} LUN 7"]
        require(self.control("diff", self.target.configuration, status=1).splitlines() == wanted, "diff")
        require(self.control("apply", self.target.configuration).splitlines() == wanted, "apply")
        self.seen("test -e /sys/bus/scsi/devices/0:0:0:7", "the disk of the file is there")
        self.guest.check("kill -0 $(cat /run/fio.pid)")

    @case("a broken file is refused with its line, by targetctl and at a reload, and nothing changes")
    def broken(self):
        before, good = self.control("save"), self.text
        with open(self.target.configuration, "w") as file:
            file.write(good.replace("      7: more\n", "      7: lost\n", 1))
        said = self.control("apply", self.target.configuration, status=78)
        require(re.search(r"line \d+: error: .*there is no backstore lost", said), said)
        os.kill(self.target.process.pid, signal.SIGHUP)

        def refused() -> bool:
            with open(self.target.log) as file:
                return "configuration not applied" in file.read()

        targets.wait_until(refused, self.target.process, self.target.log, "the reload is refused")
        require(self.control("save") == before, "something changed")
        with open(self.target.configuration, "w") as file:
            file.write(good)
        self.guest.check("kill -0 $(cat /run/fio.pid)")

    @case("Prometheus' own reader reads the metrics, and they tell of the day")
    def metrics(self):
        try:
            found = prometheus.samples(self.control("metrics"))
        except targets.NotPossible as error:
            raise Skipped(str(error)) from None
        wanted = {"lun": "0", "operation": "read", "status": "good"}
        reads = [s.value for s in found["targetd_initiator_commands_total"] if wanted.items() <= s.labels.items()]
        require(sum(reads) > 0, "no reads were counted")
        require(any(s.value for s in found["targetd_lun_latency_seconds_sum"]), "commands took no time")

    @case("fio ends without an error")
    def load_ends(self):
        self.guest.check(
            "kill -INT $(cat /run/fio.pid); while kill -0 $(cat /run/fio.pid) 2>/dev/null; do usleep 50000; done")
        said = self.guest.check("cat /run/fio.log")
        require("err= 0" in said, said)

    @case("killed under a load and started again, the daemon serves on: the same guest sees a pause and no error")
    def killed_under_load(self):
        if self.without_reconnection:
            raise Skipped(f"this QEMU does not connect again, and {self.without_reconnection}")
        block = self.devices["root"].block
        boot = self.guest.check("cat /proc/sys/kernel/random/boot_id")
        # Each block carries its own check, and is read again as soon as 256 are written.
        self.guest.check(
            f"fio --name=night --filename={block} --offset=128M --size=32M --rw=randwrite --bs=4k --direct=1"
            " --iodepth=8 --ioengine=libaio --verify=crc32c --verify_fatal=1 --verify_backlog=256 --time_based"
            " --runtime=600 > /run/night.log 2>&1 & echo $! > /run/night.pid")
        for _ in range(3):
            self.under_load()
            processes.kill(self.target.process)
            self.target.start(["--config", self.target.configuration])
        self.under_load()
        self.guest.check(
            "kill -INT $(cat /run/night.pid); while kill -0 $(cat /run/night.pid) 2>/dev/null; do usleep 50000; done")
        said = self.guest.check("cat /run/night.log")
        require("err= 0" in said, said)
        require(self.guest.check("cat /proc/sys/kernel/random/boot_id") == boot, "this is another guest")
        errors = self.kernel_errors()
        require("I/O error" not in errors, errors)
        self.control("diff", self.target.configuration)
        return "killed three times"

    def under_load(self) -> None:
        """Waits until the guest has written in this run of the daemon."""
        limit = time.monotonic() + SEEN_SECONDS
        while True:
            status = json.loads(self.control("status", "--json"))
            if any(unit["lun"] == 0 and unit["writes"] > 100 for unit in status["targets"][0]["luns"]):
                return
            require(time.monotonic() < limit, f"the guest does not write: {status}")

    @case("killed and started again, the daemon serves a new guest what the file says, with the data")
    def killed(self):
        self.guest.check(
            f"dd if=/dev/urandom of=/run/kept bs=1M count=8 2>/dev/null"
            f" && dd if=/run/kept of={self.devices['root'].block} bs=1M oflag=direct conv=fsync 2>/dev/null")
        digest = self.guest.check("sha256sum < /run/kept").split()[0]
        processes.kill(self.target.process)
        self.guest.close()
        self.target.start(["--config", self.target.configuration])
        self.boot()
        again = self.guest.check(
            f"dd if={self.devices['root'].block} bs=1M count=8 iflag=direct 2>/dev/null | sha256sum")
        require(again.split()[0] == digest, "the data is other than before")
        self.seen("test -e /sys/bus/scsi/devices/0:0:0:7", "the disk of the applied file is there")
        self.control("diff", self.target.configuration)
