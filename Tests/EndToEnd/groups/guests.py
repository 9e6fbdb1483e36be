# guests: what the groups that boot a guest have in common.
#
# Owns: the scratch directory, the target and the guest of one group. Called by: the groups.
# Must not know: any single case.

"""A group with a target and a guest on it."""

import os
import shutil
import tempfile
from dataclasses import dataclass

from harness import report, targets
from harness.guest import Guest

DISKS_SECONDS = 120


@dataclass(frozen=True)
class Device:
    """A disk as the guest sees it."""

    disk: targets.Disk
    block: str  # /dev/sda
    generic: str  # /dev/sg0


class GuestGroup(report.Group):
    """Prepares a target with these disks, and a guest in which all of them have appeared."""

    disks: list[targets.Disk] = []
    queues = [1]
    front = ""  # more keys of each socket
    general = ""  # more lines of the daemon's file

    def __init__(self, kind: type[targets.Target]) -> None:
        self.kind = kind
        self.target: targets.Target | None = None
        self.guest: Guest | None = None
        self.devices: dict[str, Device] = {}
        self.impossible: dict[str, str] = {}  # disks this machine cannot have, and why

    def prepare(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="targetd-test-")
        self.target = self.kind(
            self.directory, list(self.disks), self.queues, front=self.front, general=self.general)
        for disk in self.disks:
            try:
                self.target.medium(disk)
            except targets.NotPossible as error:
                self.target.disks.remove(disk)
                self.impossible[disk.name] = str(error)
        self.prepare_media()
        self.target.start()
        self.boot()

    def prepare_media(self) -> None:
        """Before the target starts: contents that its media are to have."""

    def boot(self) -> None:
        """Boots a guest and waits for its disks."""
        self.guest = Guest(self.directory, self.target.arguments(), processors=max(2, *self.queues))
        self.devices = self._find_devices()

    def finish(self) -> None:
        try:
            if self.guest:
                self.guest.close()
            if self.target:
                self.target.stop()
        finally:
            if self.target:
                self.target.release()
                shutil.rmtree(self.directory, ignore_errors=True)

    def device(self, name: str) -> Device:
        """The disk, or the path, of this name in the guest; skips the case where this machine cannot have it."""
        disk = name.partition("@")[0]
        if disk in self.impossible:
            raise report.Skipped(self.impossible[disk])
        return self.devices[name]

    def ours_only(self, why: str) -> None:
        """Skips the rest of the case on the reference target."""
        if not self.target.is_ours:
            raise report.Skipped(f"not on the reference: {why}")

    def kernel_errors(self) -> str:
        """The lines of the guest's kernel log that tell of trouble with a disk."""
        pattern = "I/O error|critical|Sense Key|Add. Sense|WARNING:|BUG:|Call Trace|blocked for more|EXT4-fs error"
        return self.guest.run(f"dmesg | grep -E '{pattern}'").output

    def _find_devices(self) -> dict[str, Device]:
        paths = [(disk, name, address) for disk in self.target.disks for name, address in disk.paths.items()]
        wanted = " ".join(address for _, _, address in paths)
        # The kernel finds disks in threads of its own: wait for each.
        listing = self.guest.check(
            f"for unit in {wanted}; do\n"
            "  directory=/sys/bus/scsi/devices/$unit\n"
            f"  count=0; while [ $count -lt {DISKS_SECONDS * 20} ]; do\n"
            "    [ -d $directory/block ] && [ -d $directory/scsi_generic ] && break\n"
            "    usleep 50000; count=$((count + 1))\n"
            "  done\n"
            "  echo $unit /dev/$(ls $directory/block) /dev/$(ls $directory/scsi_generic)\n"
            "done",
            seconds=DISKS_SECONDS * (len(paths) + 1))
        found = {unit: names for unit, *names in (line.split() for line in listing.splitlines())}
        devices = {}
        for disk, name, address in paths:
            names = found.get(address, [])
            if len(names) != 2 or "/dev/" in names:
                shown = self.guest.run("lsscsi -g; dmesg | tail -20").output
                raise report.Failed(f"the guest does not find the disk '{name}' at {address}:\n{shown}")
            devices[name] = Device(disk, *names)
        return devices
