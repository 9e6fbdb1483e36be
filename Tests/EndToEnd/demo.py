# demo: targetd at work, for somebody who sees it for the first time.
#
# Owns nothing. Called by: Scripts/demo. Must not know: the tests.

"""Builds targetd, starts it on a disk in memory, and lets a small Linux guest in QEMU use that disk."""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time

from harness import guest, image, processes, targets

MEBIBYTES = 512

AWAIT_DISK = "count=0; until [ -e /dev/sda ] || [ $count = 600 ]; do usleep 100000; count=$((count + 1)); done"

# What the guest does: (what is said about it, the command). /dev/sda and /dev/sg0 are the only disk it has.
STEPS = [
    ("The guest's kernel has found the disk", "lsscsi -g -s"),
    ("It answers SCSI commands: who are you, how big are you?", "sg_inq /dev/sg0 | grep identification; "
     "sg_readcap /dev/sg0 | grep size"),
    ("An ext4 file system goes onto it", "mkfs.ext4 -q /dev/sda && mount -t ext4 /dev/sda /mnt && df -h /mnt"),
    ("A file of 64 MiB is written, and the disk unmounted",
     "dd if=/dev/urandom of=/mnt/file bs=1M count=64 2>/dev/null && sha256sum /mnt/file | tee /run/sum && umount /mnt"),
    ("Mounted again, from an empty cache, the file is the same",
     "echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/sda /mnt && sha256sum -c /run/sum"),
    ("What is deleted is given back",
     "rm /mnt/file && fstrim -v /mnt && umount /mnt && e2fsck -f -n /dev/sda | tail -1"),
    ("fio writes at random, then verifies every block by its checksum",
     "fio --name=verify --filename=/dev/sda --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bs=4k --size=64M"
     " --verify=crc32c --do_verify=1 --verify_fatal=1 > /run/fio || { cat /run/fio; exit 1; }; "
     "grep -E 'IOPS=|err=' /run/fio"),
    ("A LUN reset in the middle of writing costs nothing",
     "fio --name=load --filename=/dev/sda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=4k --size=16M"
     " --loops=100 --time_based --runtime=3 --verify=crc32c --verify_fatal=1 > /run/fio & "
     "sleep 1; sg_reset -N -d /dev/sg0; status=$?; wait $! && [ $status = 0 ] && grep -E 'err=' /run/fio"),
]  # fmt: skip


class Show:
    """The lines on the terminal."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty()

    def step(self, text: str) -> None:
        print(f"\n\x1b[1m{text}\x1b[0m" if self._colour else f"\n{text}", flush=True)

    def shell(self, prompt: str, text: str) -> None:
        print(f"\x1b[2m{prompt} {text}\x1b[0m" if self._colour else f"{prompt} {text}", flush=True)

    def output(self, text: str) -> None:
        for line in text.rstrip().splitlines():
            print(f"    {line}", flush=True)


def build(show: Show) -> None:
    words = ["swift", "build", "-c", "release", "--product", "targetd"]
    show.step("Building targetd (the first time takes some minutes)")
    show.shell("$", " ".join(words))
    if subprocess.run(words, cwd=image.ROOT).returncode != 0:
        sys.exit("demo: the build failed, see above")


def use(show: Show, machine: guest.Guest) -> None:
    for text, command in STEPS:
        show.step(text)
        show.shell("guest #", command)
        show.output(machine.check(command, seconds=300))


def main() -> int:
    parser = argparse.ArgumentParser(prog="Scripts/demo", description=__doc__)
    parser.parse_args()
    processes.clean_up_on_exit()
    begin = time.monotonic()
    show = Show()
    build(show)
    show.step("Preparing the guest: Debian's kernel and a shell")
    image.build(show.output)
    directory = tempfile.mkdtemp(prefix="targetd-demo-")
    target = targets.Daemon(directory, [targets.Disk("disk", "ram", MEBIBYTES, lun=0)], queues=[2])
    try:
        show.step(f"Starting targetd with a disk of {MEBIBYTES} MiB in memory")
        target.start(["--ram", f"{MEBIBYTES}MiB", "--vhost-user", target.socket(0), "--queues", "2"])
        show.shell("$", " ".join(target.command))
        with open(target.log) as file:
            show.output(file.read())
        show.step("Booting a guest on it (emulated, so this works on any machine)")
        with guest.Guest(directory, target.arguments()) as machine:
            show.output(machine.check("uname -sr; uptime"))
            machine.check(AWAIT_DISK)
            use(show, machine)
            show.step("The guest powers off")
            machine.power_off()
        show.step("targetd is stopped (SIGTERM)")
        target.stop()
        show.output("it ended with status 0, and took its socket with it")
    except (guest.GuestError, guest.CommandFailed, targets.TargetError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    show.step(f"Done in {time.monotonic() - begin:.0f} s. Attach a guest of your own: see Docs/OPERATING.md.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
