# fullmedium: the file system below a thin disk is full, and then has space again.
#
# Owns: these cases. Called by: run.py. Must not know: how the disks are served.

"""A guest writes to its own file system until the host has no space for the disk, with each error policy."""

import json
import subprocess
import time

from harness.report import Skipped, case, require
from harness.targets import Disk

from .guests import GuestGroup
from .operator import CONTROL, NAME, ManagedDaemon

PIECES = 24  # MiB that the guest wants to write
LEFT = 14  # MiB that the host has for them, and for what the guest's file system writes itself
SEEN_SECONDS = 900

# Writes files of one MiB, each stable before the next, and notes the sums of those that it was told are stable.
WRITER = f"""
piece=0
while [ $piece -lt {PIECES} ]; do
    yes "piece $piece" | dd of=/mnt/%s/$piece bs=1M count=1 iflag=fullblock conv=fsync 2> /run/%s.said || break
    (cd /mnt/%s; sha256sum $piece) >> /run/%s.sums
    piece=$((piece + 1))
done
echo $piece > /run/%s.end
"""


class FullMedium(GuestGroup):
    """One disk for each policy, each with a host's file system of its own."""

    title = "A guest's file system on a host's full file system"
    disks = [
        Disk("report", "file", 128, lun=0, space=96, on_error="report"),
        Disk("stop", "file", 128, lun=1, space=96, on_error="stop"),
        Disk("retry", "file", 128, lun=2, space=96, on_error="retry"),
    ]

    def __init__(self, kind) -> None:
        super().__init__(ManagedDaemon if kind.is_ours else kind)

    def prepare(self) -> None:
        if not self.kind.is_ours:
            raise Skipped("not on the reference: it has no error policies for this")
        super().prepare()

    def control(self, *arguments: str) -> str:
        """What targetctl prints; it must succeed."""
        result = subprocess.run(
            [CONTROL, *arguments, "--socket", self.target.control], capture_output=True, text=True, timeout=120)
        require(result.returncode == 0, f"targetctl {' '.join(arguments)}:\n{result.stdout}{result.stderr}")
        return result.stdout

    def _start(self, name: str):
        """Makes a file system on the disk, takes the host's space away but for some, and starts to write."""
        device = self.device(name).block
        space = self.target.spaces[name]
        # A command that waits is not to be given up by the guest.
        self.guest.check(
            f"echo 900 > /sys/block/{device.removeprefix('/dev/')}/device/timeout\n"
            f"set -e; mkfs.ext4 -q -F {device}; mkdir -p /mnt/{name}; mount -t ext4 {device} /mnt/{name}; sync")
        space.leave(LEFT)
        self.guest.check(
            f"cat > /run/{name}.sh <<'END'\n{WRITER.replace('%s', name)}END\n"
            f"sh /run/{name}.sh > /dev/null 2>&1 &")
        return space

    def _wait(self, reached, what: str) -> None:
        limit = time.monotonic() + SEEN_SECONDS
        while not reached():
            require(time.monotonic() < limit, f"waited {SEEN_SECONDS} s until {what}")
            time.sleep(0.2)

    def _ended(self, name: str) -> int:
        """How many pieces the guest was told are stable, once its writer has ended."""
        self._wait(lambda: self.guest.run(f"test -s /run/{name}.end").status == 0, "the guest's writer ends")
        return int(self.guest.check(f"cat /run/{name}.end"))

    def _waits(self, lun: int) -> bool:
        """Whether a command of the guest waits for its medium."""
        tasks = json.loads(self.control("tasks", "--json"))
        return any(task["lun"] == lun and task.get("waits-for") in ("thaw", "recovery") for task in tasks)

    def _intact(self, name: str, pieces: int, *, replayed: bool) -> None:
        """Everything that the guest was told is stable is there, and its file system is free of errors."""
        device = self.device(name).block
        self.guest.check(f"cd /; umount /mnt/{name}; echo 3 > /proc/sys/vm/drop_caches", seconds=300)
        if replayed:
            # What the guest was told had failed is undone by the journal, as after a crash: 1 is "errors corrected".
            self.guest.run(f"e2fsck -f -y {device}").check(0, 1)
        self.guest.check(f"e2fsck -f -n {device}")
        self.guest.check(
            f"set -e; mount -t ext4 {device} /mnt/{name}; cd /mnt/{name}\n"
            f"test $(wc -l < /run/{name}.sums) = {pieces}; sha256sum -c /run/{name}.sums > /dev/null\n"
            f"cd /; umount /mnt/{name}", seconds=300)  # fmt: skip

    @case("report: the guest is told that there is no space, loses nothing that was stable, and writes again later")
    def report(self):
        space = self._start("report")
        pieces = self._ended("report")
        require(0 < pieces < PIECES, f"{pieces} of {PIECES} pieces were written with {LEFT} MiB of space")
        said = self.guest.check("cat /run/report.said; dmesg | grep -i -E 'space allocation|thin' | tail -3")
        require("No space left" in said or "I/O error" in said or "allocation" in said, said)
        space.give_back()
        self._intact("report", pieces, replayed=True)
        device = self.device("report").block
        self.guest.check(
            f"set -e; mount -t ext4 {device} /mnt/report\n"
            "yes again | dd of=/mnt/report/again bs=1M count=8 iflag=fullblock conv=fsync\n"
            f"umount /mnt/report; e2fsck -f -n {device}", seconds=300)  # fmt: skip
        return f"{pieces} of {PIECES} MiB were written before the host was full"

    @case("stop: the disk is frozen, and when there is space and it is thawed the guest goes on and saw no error")
    def stop(self):
        space = self._start("stop")
        self._wait(lambda: self._waits(1), "the disk is frozen")
        require(space.free == 0, f"frozen with {space.free} MiB of space")
        require(self.guest.run("test -s /run/stop.end").status != 0, "the writer has ended")
        space.give_back()
        self.control("thaw", NAME, "1")
        require(self._ended("stop") == PIECES, self.guest.run("cat /run/stop.said").output)
        self._intact("stop", PIECES, replayed=False)

    @case("retry: when there is space again the guest goes on by itself and saw no error")
    def retry(self):
        space = self._start("retry")
        self._wait(lambda: self._waits(2), "a command waits for space")
        require(self.guest.run("test -s /run/retry.end").status != 0, "the writer has ended")
        space.give_back()
        require(self._ended("retry") == PIECES, self.guest.run("cat /run/retry.said").output)
        self._intact("retry", PIECES, replayed=False)

    @case("the guest's kernel logged no error but that of the disk that reports")
    def kernel_log(self):
        names = [name for name in ("stop", "retry") if name in self.devices]
        others = "|".join(self.devices[name].block.removeprefix("/dev/") for name in names)
        if not others:
            raise Skipped(next(iter(self.impossible.values())))
        found = self.guest.run(f"dmesg | grep -E 'error|Sense Key|WARNING:|BUG:|blocked for more' | grep -E '{others}'")
        require(not found.output, found.output)
