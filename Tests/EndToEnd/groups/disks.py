# disks: a guest's own drivers and tools on every kind of disk.
#
# Owns: these cases. Called by: run.py. Must not know: how the disks are served.

"""Media of each kind, one and several request queues, addresses near, far and absent."""

import hashlib
import os
import re
import time

from harness.report import case, require
from harness.targets import MIB, Disk

from .guests import Device, GuestGroup

# Disks that take data, and what is special about each.
DATA = {
    "ram": "RAM",
    "file": "a file",
    "block": "a block device",
    "queues-ram": "RAM, two queues",
    "queues-file": "a file, two queues",
}


class Disks(GuestGroup):
    """Everything that needs no particular preparation shares this guest."""

    title = "A Linux guest finds and uses its disks"
    queues = [1, 2]
    disks = [
        Disk("ram", "ram", 256, lun=0),
        Disk("file", "file", 256, lun=1),
        Disk("block", "block", 256, lun=2),
        Disk("locked", "file", 16, lun=3, read_only=True),
        Disk("far", "ram", 16, lun=300),  # beyond peripheral device addressing
        Disk("queues-ram", "ram", 256, lun=0, hba=1, target=7),
        Disk("queues-file", "file", 256, lun=1, hba=1, target=7),
    ]

    def prepare_media(self) -> None:
        locked = next(disk for disk in self.disks if disk.read_only)
        with open(self.target.medium(locked), "wb") as file:
            file.write(b"read me!" * (locked.mebibytes * MIB // 8))

    def cases(self):
        found = super().cases()
        last = found.pop()  # the kernel's log is looked at in the end
        for name, what in DATA.items():
            found += [
                (f"ext4 on {what}: what was written is there after a remount, fstrim gives space back, fsck is content",
                 lambda name=name: self._file_system(self.device(name))),
                (f"fio on {what}: random writes are verified by their checksums",
                 lambda name=name: self._verified_writes(self.device(name))),
                (f"a LUN reset under load on {what} costs no I/O error",
                 lambda name=name: self._reset_under_load(self.device(name))),
            ]  # fmt: skip
        return found + [last]

    def _all(self, command: str) -> dict[str, str]:
        """The output of a command on each disk; {sg} and {sd} stand for its names."""
        return {
            name: self.guest.check(command.format(sg=device.generic, sd=device.block))
            for name, device in self.devices.items()
        }

    @case("sg_turs: every disk is ready")
    def ready(self):
        self._all("sg_turs {sg}")

    @case("sg_inq: every disk is a direct access block device")
    def inquiry(self):
        for name, output in self._all("sg_inq {sg}").items():
            require("PQual=0" in output and "PDT=0" in output, f"{name}:\n{output}")
            if self.target.is_ours:
                require("Vendor identification: TARGETD" in output, f"{name}:\n{output}")

    @case("sg_vpd -a: every page of vital product data can be read")
    def vital_product_data(self):
        for name, output in self._all("sg_vpd -a {sg}").items():
            for page in ["Supported VPD pages", "Device Identification", "Block limits VPD"]:
                require(page in output, f"{name}: no '{page}':\n{output}")
        if not self.target.is_ours:
            return
        for name, output in self._all("sg_vpd {sg}").items():
            for page in ["Unit serial number", "Extended inquiry data", "Block device characteristics",
                         "Logical block provisioning"]:  # fmt: skip
                require(page.lower() in output.lower(), f"{name}: no '{page}':\n{output}")

    @case("sg_vpd: every disk has an identity of its own")
    def identity(self):
        self.ours_only("it is given no identities here")
        identities = self._all("sg_vpd -p di {sg}")
        require(len(set(identities.values())) == len(identities), f"two disks are the same:\n{identities}")

    @case("sg_opcodes: the supported commands and task management functions are reported")
    def operation_codes(self):
        self.ours_only("scsi-hd has no REPORT SUPPORTED OPERATION CODES")
        for name, output in self._all("sg_opcodes {sg}").items():
            for command in ["Read(10)", "Read(16)", "Write(10)", "Write(16)", "Unmap", "Report luns", "Inquiry",
                            "Test Unit Ready", "Synchronize cache(10)", "Write same(16)"]:  # fmt: skip
                require(command.lower() in output.lower(), f"{name}: no '{command}':\n{output}")
        for name, output in self._all("sg_opcodes --tmf {sg}").items():
            require(re.search("abort task", output, re.I) and re.search("logical unit reset", output, re.I),
                    f"{name}:\n{output}")  # fmt: skip

    @case("sg_luns: the target reports exactly its units, near and far")
    def report_luns(self):
        for name, output in self._all("sg_luns {sg}").items() if self.target.is_ours else self._luns_of_first():
            disk = self.devices[name].disk
            expected = {
                f"{other.lun if other.lun < 256 else 0x4000 | other.lun:04x}" + "0" * 12
                for other in self.target.disks if (other.hba, other.target) == (disk.hba, disk.target)
            }  # fmt: skip
            reported = set(re.findall(r"^\s+([0-9a-f]{16})\b", output, re.M))
            require(reported == expected, f"{name}: expected {sorted(expected)}:\n{output}")

    def _luns_of_first(self):
        # scsi-hd answers REPORT LUNS at LUN 0 only, against SPC-4 6.33.
        return [("ram", self.guest.check(f"sg_luns {self.devices['ram'].generic}"))]

    @case("sg_readcap: both forms give the size that was asked for")
    def capacity(self):
        for command in ["sg_readcap {sg}", "sg_readcap --long {sg}"]:
            for name, output in self._all(command).items():
                size = self.devices[name].disk.mebibytes * MIB
                require(f"Device size: {size} bytes" in output, f"{name}: not {size} bytes:\n{output}")

    @case("sg_modes: all mode pages by both commands")
    def mode_pages(self):
        for command in ["sg_modes -a {sg}", "sg_modes -a --six {sg}"]:
            for name, output in self._all(command).items():
                require("Caching" in output, f"{name}: no caching page:\n{output}")

    @case("the guest's kernel sees a write cache, unmap, and FUA")
    def features(self):
        self.ours_only("scsi-hd's FUA depends on an option of its own")
        queue = "/sys/block/$(basename {sd})/queue"
        files = " ".join(f"{queue}/{file}" for file in ["write_cache", "fua", "discard_max_bytes"])
        for name, output in self._all(f"cat {files}").items():
            cache, fua, discard = output.split("\n")[:3]
            if self.devices[name].disk.kind == "ram":
                require(int(discard) > 0, f"{name}:\n{output}")  # memory has no cache in front of it
            elif not self.devices[name].disk.read_only:
                require(cache == "write back" and fua == "1" and int(discard) > 0, f"{name}:\n{output}")

    @case("a LUN and a target that do not exist stay absent, without an error")
    def absent(self):
        for hba, target, lun in [(0, 0, 9), (0, 0, 299), (0, 5, 0), (0, 255, 0), (1, 0, 0), (1, 7, 2)]:
            self.guest.check(f"echo '0 {target} {lun}' > /sys/class/scsi_host/host{hba}/scan")
        units = self.guest.check("ls -d /sys/bus/scsi/devices/*:*:*:*").split()
        require(len(units) == len(self.devices), f"{len(self.devices)} units are exported, the guest has {units}")
        require(not self.kernel_errors(), self.kernel_errors())

    @case("a read-only disk is read, and refuses a write")
    def read_only(self):
        device = self.device("locked")
        contents = hashlib.md5(b"read me!" * (MIB // 8)).hexdigest()
        read = f"dd if={device.block} bs=1M count=1 iflag=direct | md5sum"
        require(contents in self.guest.check(read), "the disk does not hold what its medium holds")
        refused = self.guest.run(
            f"dd if=/dev/zero bs=512 count=1 | sg_raw -s 512 {device.generic} 2a 00 00 00 00 00 00 00 01 00")
        require(refused.status == 7, f"sg_raw: status {refused.status}, not 7, DATA PROTECT:\n{refused.output}")
        require(contents in self.guest.check(read), "the refused write changed the disk")

    @case("an idle daemon sleeps, and stays under 40 MB")
    def idle(self):
        self.ours_only("it is about our daemon's process")
        # A polling loop would be seen as processor time, a busy timer as switches: over a stretch of quiet, count both.
        before, ticks = self.target.context_switches(), self._ticks()
        time.sleep(3)
        switches, ticks = self.target.context_switches() - before, self._ticks() - ticks
        require(switches <= 30 and ticks <= 3, f"in 3 s without I/O: {switches} switches, {ticks} ticks of 10 ms")
        status = self.target.status()
        own = sum(int(status[field].split()[0]) for field in ["RssAnon", "RssFile"])
        # RAM disks are in RssAnon or RssShmem, by what they are made of; they hold little yet.
        require(own < 40_000, f"{own} kB resident, without memory shared with the guest")
        return f"{switches} context switches, {ticks} ticks of 10 ms in 3 s; {own} kB resident"

    @case("the guest's kernel logged no error")
    def kernel_log(self):
        require(not self.kernel_errors(), self.kernel_errors())

    def _ticks(self) -> int:
        with open(f"/proc/{self.target.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def _file_system(self, device: Device) -> str:
        # Nothing lazy: the guest's kernel would write inode tables while what is freed is counted.
        self.guest.check(
            f"set -e; mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0 {device.block}\n"
            f"mount -t ext4 {device.block} /mnt; cd /mnt\n"
            "for number in 1 2 3 4 5 6; do dd if=/dev/urandom of=data$number bs=1M count=8 2>/dev/null; done\n"
            "mkdir many; for number in $(seq 200); do echo $number > many/$number; done\n"
            "find . -type f | xargs sha256sum > /run/sums; cd /; umount /mnt; echo 3 > /proc/sys/vm/drop_caches",
            seconds=300)  # fmt: skip
        used = self._allocated(device)
        output = self.guest.check(
            f"set -e; mount -t ext4 {device.block} /mnt; cd /mnt; sha256sum -c /run/sums | grep -vc OK$ | grep -x 0\n"
            "rm data1 data2 data3; sync; cd /; fstrim -v /mnt; umount /mnt; e2fsck -f -n "
            f"{device.block}",
            seconds=300)  # fmt: skip
        trimmed = re.search(r"(\d+) bytes\)? trimmed", output)
        require(trimmed and int(trimmed[1]) > 24 * MIB, f"fstrim gave back nothing:\n{output}")
        if used:
            freed = used - self._allocated(device)
            require(freed > 16 * MIB, f"fstrim freed {freed} bytes of the medium's file, not the 24 MiB deleted")
            return f"{trimmed[1]} bytes trimmed, {freed} bytes freed on the host"
        return f"{trimmed[1]} bytes trimmed"

    def _allocated(self, device: Device) -> int:
        """The bytes that the medium's file occupies on the host; 0 for RAM."""
        path = os.path.join(self.directory, f"{device.disk.name}.img")
        if device.disk.kind == "ram":
            return 0
        return os.stat(path).st_blocks * 512

    def _verified_writes(self, device: Device) -> str:
        jobs = self.queues[device.disk.hba]
        output = self.guest.check(
            f"fio --filename={device.block} --direct=1 --ioengine=libaio --rw=randwrite --verify=crc32c --do_verify=1"
            f" --verify_fatal=1 --numjobs={jobs} --cpus_allowed_policy=split --cpus_allowed=0-{jobs - 1}"
            " --group_reporting --offset_increment=64M"
            " --name=small --bs=4k --iodepth=32 --size=24M --name=large --bs=128k --iodepth=4 --size=24M --offset=128M",
            seconds=300)  # fmt: skip
        errors = re.findall(r"err=\s*(\d+)", output)
        require(errors and set(errors) == {"0"}, output)

    def _reset_under_load(self, device: Device) -> str:
        output = self.guest.check(
            f"fio --name=load --filename={device.block} --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite"
            f" --bs=4k --size=16M --loops=1000 --verify=crc32c --verify_fatal=1 --time_based --runtime=6"
            f" > /run/fio.out 2>&1 &\n"
            f"load=$!; done=0; statistics=/sys/block/$(basename {device.block})/stat\n"
            "wait_for_io() { before=$(cat $statistics);"
            ' while [ "$before" = "$(cat $statistics)" ] && kill -0 $load; do usleep 10000; done; }\n'
            "for round in 1 2 3 4 5; do wait_for_io; kill -0 $load || { echo 'the load ended early'; break; }\n"
            f"  sg_reset -N -d {device.generic} || {{ echo 'sg_reset failed'; break; }}; done=$((done + 1)); done\n"
            "wait $load; status=$?; grep -E 'err=|fio:|verify:' /run/fio.out; echo $done resets;"
            " [ $status = 0 ] && [ $done = 5 ]",
            seconds=120)  # fmt: skip
        errors = re.findall(r"err=\s*(\d+)", output)
        require(errors and set(errors) == {"0"}, output)
        require(not self.kernel_errors(), self.kernel_errors())
