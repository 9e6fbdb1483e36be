# restart: what a guest wrote survives the target.
#
# Owns: these cases. Called by: run.py. Must not know: how the disks are served.

"""The target is stopped under a guest that writes, started again, and a new guest finds its data."""

from harness.report import case, require
from harness.targets import Disk

from .guests import GuestGroup


class Restart(GuestGroup):
    """Cases that build on each other: each leaves the target in the state that the next one needs."""

    title = "What a guest wrote is there after the target was stopped and started again"
    ordered = True
    disks = [Disk("kept", "file", 256, lun=0), Disk("block", "block", 256, lun=1)]

    def names(self) -> list[str]:
        """The disks that this machine can have."""
        return list(self.devices)

    @case("files are written and synchronized, and a load goes on")
    def write(self):
        for name, device in self.devices.items():
            self.guest.check(
                f"set -e; mkfs.ext4 -q -F {device.block}; mkdir -p /mnt/{name}\n"
                f"mount -t ext4 {device.block} /mnt/{name}; cd /mnt/{name}\n"
                "for number in 1 2 3 4; do dd if=/dev/urandom of=kept$number bs=1M count=4 2>/dev/null; done\n"
                "sha256sum kept* > sums; sync",
                seconds=120)  # fmt: skip
            self.guest.check(
                f"fio --name=load --directory=/mnt/{name} --size=32M --rw=randwrite --bs=4k --direct=1 --iodepth=16"
                f" --ioengine=libaio --fdatasync=64 --time_based --runtime=600 > /run/load.{name} 2>&1 &\n"
                f"statistics=/sys/block/$(basename {device.block})/stat; before=$(cat $statistics)\n"
                'while [ "$before" = "$(cat $statistics)" ]; do usleep 10000; done')

    @case("the target ends while the guest writes, by itself, with its sockets removed")
    def stop(self):
        if self.target.is_ours:
            self.target.stop()
        self.guest.close()

    @case("a new guest on the restarted target finds the disks")
    def start(self):
        self.target.start()
        self.boot()

    @case("the file systems recover, and every synchronized file is as it was written")
    def compare(self):
        for name, device in self.devices.items():
            replayed = self.guest.run(f"e2fsck -f -p {device.block}")
            require(replayed.status in (0, 1), f"{name}: e2fsck needs more than the journal:\n{replayed.output}")
            self.guest.check(
                f"set -e; mkdir -p /mnt/{name}; mount -t ext4 {device.block} /mnt/{name}; cd /mnt/{name}\n"
                f"sha256sum -c sums; cd /; umount /mnt/{name}; e2fsck -f -n {device.block}")
        for name, why in self.impossible.items():
            return f"without the disk '{name}': {why}"

    @case("the target can be stopped and started under a guest that does nothing")
    def stop_idle(self):
        self.ours_only("QEMU is the target there")
        self.target.stop()
        self.guest.close()
        self.target.start()
        self.boot()
        for name, device in self.devices.items():
            self.guest.check(f"e2fsck -f -n {device.block}")
