# multipath: a guest with two paths, in two target port groups, to each of two disks.
#
# Owns: these cases. Called by: run.py. Must not know: how the daemon keeps states.

"""Asymmetric logical unit access: what scsi_dh_alua and dm-multipath make of the states, and of their changes."""

import json
import re
import time

from harness.report import Skipped, case, require
from harness.targets import Disk

from .guests import GuestGroup
from .operator import ManagedDaemon, Operator

# By the number of the target: the first is changed by the operator alone, the second by the guest as well.
IMPLICIT, EXPLICIT = (f"naa.600140500000{0:02x}{target:02x}" for target in (0, 1))
SWAPS = 4
COMMANDS = 100  # that come through a path before the next swap
WAIT_SECONDS = 240


class AsymmetricDaemon(ManagedDaemon):
    """Our daemon with two port groups: the first socket is port 1, the second port 2."""

    def _yaml(self) -> str:
        text = super()._yaml()
        for name, explicit in ((IMPLICIT, "false"), (EXPLICIT, "true")):
            groups = (f"    port-groups:\n"
                      f"      - {{ id: 1, preferred: true, explicit: {explicit}, ports: [1] }}\n"
                      f"      - {{ id: 2, state: standby, explicit: {explicit}, ports: [2] }}\n")  # fmt: skip
            text = text.replace(f"  {name}:\n", f"  {name}:\n{groups}")
        return text.replace(f"socket: {self.socket(1)},", f"socket: {self.socket(1)}, port: 2,")


class Multipath(GuestGroup):
    """Two disks, each with a path through each group."""

    title = "Asymmetric access: two paths in two port groups"
    ordered = True
    queues = [1, 1]
    disks = [
        Disk("implicit", "file", 64, lun=0, also=(1,)), Disk("explicit", "ram", 64, lun=0, target=1, also=(1,)),
    ]  # fmt: skip

    control = Operator.control
    seen = Operator.seen

    def __init__(self, kind) -> None:
        super().__init__(AsymmetricDaemon if kind.is_ours else kind)

    def prepare(self) -> None:
        if not self.kind.is_ours:
            raise Skipped("not on the reference: scsi-hd has no asymmetric access")
        super().prepare()
        self.guest.check("while read -r module; do insmod $module 2> /dev/null; done < /modules.multipath; true")
        for device in self.devices.values():
            self.guest.check(f"echo alua > /sys/block/{device.block[5:]}/device/dh_state")

    def _attribute(self, path: str, name: str) -> str:
        return f"/sys/block/{self.device(path).block[5:]}/device/{name}"

    def _number(self, path: str) -> str:
        """The device number of a path."""
        return self.guest.check(f"cat /sys/block/{self.device(path).block[5:]}/dev").strip()

    def _expect(self, disk: str, first: str, second: str) -> None:
        """Waits until scsi_dh_alua has these states for the two paths; each command makes it look."""
        for path, state in ((disk, first), (f"{disk}@1", second)):
            attribute = self._attribute(path, "access_state")
            self.seen(
                f"sg_turs {self.device(path).generic} > /dev/null 2>&1;"
                f" cat {attribute}; test \"$(cat {attribute})\" = {state}",
                f"the access state of {path} is {state}")  # fmt: skip

    def _groups(self, path: str) -> list[tuple[str, str]]:
        """Group and state as sg_rtpg shows them through a path."""
        output = self.guest.check(f"sg_rtpg -d {self.device(path).generic}")
        return re.findall(
            r"target port group id : (0x\w+) , Pref=\d, Rtpg_fmt=\d\s+target port group asymmetric access state :"
            r" 0x\w+ \(([^)]*)\)", output)  # fmt: skip

    def _commands(self) -> list[int]:
        """What has come through the two sockets."""
        fronts = json.loads(self.control("list", "fronts", "--json"))
        return [front["commands"] for front in sorted(fronts, key=lambda front: front["port"])]

    @case("scsi_dh_alua shows access states and the preference of both paths")
    def states(self):
        for disk in ("implicit", "explicit"):
            self._expect(disk, "active/optimized", "standby")
            preferred = [self.guest.check(f"cat {self._attribute(path, 'preferred_path')}").strip()
                         for path in (disk, f"{disk}@1")]  # fmt: skip
            require(preferred == ["1", "0"], f"preferred_path of {disk}: {preferred}")

    @case("sg_rtpg says the same through both paths, and page 83h names the group of each")
    def report(self):
        reports = [self.guest.check(f"sg_rtpg -d -e {self.device(path).generic}")
                   for path in ("explicit", "explicit@1")]  # fmt: skip
        require(reports[0] == reports[1], f"{reports[0]}\n{reports[1]}")
        groups = self._groups("explicit")
        require(groups == [("0x1", "active/optimized"), ("0x2", "standby")], f"{groups}: {reports[0]}")
        for path, group in (("explicit", "0x1"), ("explicit@1", "0x2")):
            page = self.guest.check(f"sg_vpd -p di {self.device(path).generic}")
            require(f"Target port group: {group}" in page, page)
        sizes = [self.guest.check(f"cat /sys/block/{self.device(path).block[5:]}/size")
                 for path in ("explicit", "explicit@1")]  # fmt: skip
        require(sizes[0] == sizes[1], f"the sizes of the two paths: {sizes}")

    @case("an operator sets each state, and the guest follows")
    def operator_sets(self):
        for state in ("active/non-optimized", "unavailable", "transitioning", "standby"):
            self.control("port-group", "set", IMPLICIT, "2", state)
            self._expect("implicit", "active/optimized", state)
        require("standby" in self.control("port-group"), "targetctl does not show the state")

    @case("sg_stpg sets the states of explicit groups, and not of others")
    def guest_sets(self):
        generic = self.device("explicit").generic
        self.guest.check(f"sg_stpg --tp=1,2 --state=0,1 {generic}")
        groups = self._groups("explicit@1")
        require([state for _, state in groups] == ["active/optimized", "active/non optimized"], f"{groups}")
        self._expect("explicit", "active/optimized", "active/non-optimized")
        self.guest.check(f"sg_stpg --tp=1,2 --state=0,2 {generic}")
        self._expect("explicit", "active/optimized", "standby")
        refused = self.guest.run(f"sg_stpg --tp=2 --state=0 {self.device('implicit').generic}")
        require("Illegal request" in refused.output, f"the operator's group was set:\n{refused.output}")
        groups = self._groups("implicit")
        require([state for _, state in groups] == ["active/optimized", "standby"], f"{groups}")
        require("set by a guest" in open(self.target.log).read(), "the log does not tell of it")

    def _map(self, disk: str) -> str:
        """Makes a multipath device over the two paths of a disk, the first of them to be used first."""
        size = self.guest.check(f"cat /sys/block/{self.device(disk).block[5:]}/size").strip()
        paths = [self._number(path) for path in (disk, f"{disk}@1")]
        groups = " ".join(f"round-robin 0 1 1 {path} 1" for path in paths)
        self.guest.check(
            f"echo '0 {size} multipath 1 queue_if_no_path 1 alua 2 1 {groups}' |"
            f" dmsetup create {disk} --noudevsync --noudevrules && dmsetup mknodes && test -e /dev/mapper/{disk}")
        return f"/dev/mapper/{disk}"

    @case("the guest takes a standby path over by SET TARGET PORT GROUPS when it switches to it")
    def takes_over(self):
        device = self._map("explicit")
        read = f"dd if={device} of=/dev/null bs=64k count=16 iflag=direct"
        self.guest.check(read)
        self.guest.check("dmsetup message explicit 0 switch_group 2")
        self.guest.check(read)
        groups = self._groups("explicit")
        require(groups[1] == ("0x2", "active/optimized"), f"{groups}\n{self.guest.run('dmesg | tail -20').output}")
        status = json.loads(self.control("status", "--json"))
        (target,) = [target for target in status["targets"] if target["name"] == EXPLICIT]
        codes = [group["status-code"] for group in target["port-groups"]]
        require(codes[1] == "explicit", f"{target['port-groups']}")
        require("state: standby" in self.control("save"), "save tells of what a guest has set")
        self.guest.check("dmsetup remove explicit --noudevsync")

    @case("fio verifies over dm-multipath while the operator swaps the groups: no error, and the I/O moves")
    def swaps(self):
        device = self._map("implicit")
        numbers = {1: self._number("implicit"), 2: self._number("implicit@1")}
        self.guest.check(
            f"(fio --name=swap --filename={device} --size=16M --rw=randwrite --bs=4k --direct=1 --iodepth=8"
            " --ioengine=libaio --verify=crc32c --verify_backlog=64 --verify_fatal=1 --loops=1000000"
            " > /run/swap.log 2>&1; echo $? > /run/swap.status) & true")  # fmt: skip
        self._moves_to(1)
        for swap in range(SWAPS):
            there, away = (2, 1) if swap % 2 == 0 else (1, 2)
            self.control("port-group", "set", IMPLICIT, str(there), "active/optimized")
            self.control("port-group", "set", IMPLICIT, str(away), "standby")
            self._moves_to(there)
            # What multipathd would do when it finds that the path answers.
            self.guest.check(f"dmsetup message implicit 0 reinstate_path {numbers[away]}")
            require(self.guest.run("test -e /run/swap.status").status != 0, self.guest.run("cat /run/swap.log").output)
        self.guest.check("kill -INT $(pidof fio); while [ ! -e /run/swap.status ]; do usleep 50000; done", seconds=600)
        log = self.guest.run("cat /run/swap.log").output
        require("err= 0" in log and "verify:" not in log, log)
        errors = self.guest.run("dmesg | grep -E 'I/O error.* dev dm-'").output
        require(errors == "", errors)
        self.guest.check("dmsetup remove implicit --noudevsync")

    def _moves_to(self, group: int) -> None:
        """Waits until commands come through the path of a group, and hardly any through the other."""
        limit = time.monotonic() + WAIT_SECONDS
        while True:
            before = self._commands()
            while sum(self._commands()) - sum(before) < COMMANDS:
                require(time.monotonic() < limit, f"no I/O:\n{self.guest.run('dmesg | tail -20').output}")
                time.sleep(0.1)
            moved = [now - then for now, then in zip(self._commands(), before)]
            if moved[group - 1] >= COMMANDS and moved[2 - group] * 10 < moved[group - 1]:
                return
            require(time.monotonic() < limit, f"the I/O has not moved to group {group}: {moved}")
