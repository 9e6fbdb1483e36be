# virtio: the device as a Linux guest has it: ring formats, hot-plug, resets, migration.
#
# Owns: these cases. Called by: run.py. Must not know: how the disks are served.

"""Packed rings with 1, 2 and 8 queues, hot-plug of units, the driver, the device and memory, reboot, migration."""

import os
import signal
import subprocess
import time

from harness import processes
from harness.guest import BOOT_SECONDS, Guest
from harness.report import case, require
from harness.targets import Daemon, Disk, LoopDevice

from .guests import GuestGroup

HOTPLUG_BIT, VERSION_1_BIT, PACKED_BIT = 1, 32, 34
VERIFY = (
    "fio --name=verify --filename={block} --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=4k --size=8M"
    " --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal > /run/fio.{name} 2>&1"
    " || {{ cat /run/fio.{name}; exit 1; }}"
)


class VirtioGuest(Guest):
    """A guest that may reboot, whose devices sit behind ports that allow hot-plug, and that has room for memory."""

    extra: list[str] = []

    def _command(self, devices: list[str], processors: int) -> list[str]:
        words = [word for word in super()._command(devices, processors) if word != "-no-reboot"]
        words[words.index("-m") + 1] += ",slots=16,maxmem=4G"
        return words + self.extra

    def reboot(self) -> None:
        """Resets the machine, and waits for the agent of the next boot."""
        self.monitor("system_reset")
        self._line(BOOT_SECONDS)


class VirtioGroup(GuestGroup):
    """A guest whose HBAs have properties of their own."""

    properties = ""

    def hba_arguments(self) -> list[str]:
        found = []
        for number, word in enumerate(self.target.arguments()):
            if word.startswith("vhost-user-scsi-pci"):
                port = f"port{number}"
                found[-1:] = ["-device", f"pcie-root-port,id={port},chassis={number + 1}", "-device"]
                word += f",id=hba{number},bus={port}{self.properties}"
            found.append(word)
        return found

    def boot(self) -> None:
        self.ours_only("these are cases of vhost-user")
        self.guest = VirtioGuest(self.directory, self.hba_arguments(), processors=max(2, *self.queues))
        self.devices = self._find_devices()

    def verify(self, name: str) -> None:
        self.guest.check(VERIFY.format(block=self.device(name).block, name=name), seconds=300)

    def wait(self, condition: str, what: str, seconds: int = 120) -> None:
        """Waits in the guest until a shell condition holds."""
        result = self.guest.run(
            f"count=0; until {condition}; do usleep 50000; count=$((count + 1));"
            f" [ $count -lt {seconds * 20} ] || exit 1; done",
            seconds=seconds + 60)
        require(result.status == 0, f"{what} did not happen:\n{self.guest.run('lsscsi; dmesg | tail -20').output}")


class PackedRings(VirtioGroup):
    title = "A Linux guest on packed rings"
    properties = ",packed=on"
    queues = [1, 2, 8]
    disks = [Disk(f"hba{hba}", "ram", 16, lun=0, hba=hba) for hba in range(3)]

    @case("the driver has accepted packed rings, and each HBA has its queues")
    def negotiated(self):
        features = self.guest.check(
            "for device in /sys/bus/virtio/drivers/virtio_scsi/virtio*; do cat $device/features; done").split()
        require(len(features) == 3 and all(bits[PACKED_BIT] == "1" for bits in features), f"features: {features}")
        for hba, queues in enumerate(self.queues):
            found = int(self.guest.check(f"ls /sys/block/$(basename {self.devices[f'hba{hba}'].block})/mq | wc -l"))
            require(found == queues, f"HBA {hba} has {found} hardware queues of {queues}")

    @case("random writes are verified on all of them at once")
    def verified(self):
        commands = [VERIFY.format(block=self.devices[disk.name].block, name=disk.name) for disk in self.disks]
        jobs = " ".join(f"( {command} ) & jobs=\"$jobs $!\";" for command in commands)
        self.guest.check(f"jobs=; {jobs} for job in $jobs; do wait $job || exit 1; done", seconds=600)
        require(not self.kernel_errors(), self.kernel_errors())


class LegacyDevice(VirtioGroup):
    """What virtio was before 1.0: no VERSION_1, one contiguous ring, addressed by its page."""

    title = "A guest with a driver of before virtio 1.0"
    properties = ",disable-modern=on,disable-legacy=off"
    queues = [2]
    disks = [Disk("ram", "ram", 16, lun=0), Disk("file", "file", 16, lun=1)]

    @case("the driver has not accepted VERSION_1")
    def negotiated(self):
        (bits,) = self.guest.check(
            "for device in /sys/bus/virtio/drivers/virtio_scsi/virtio*; do cat $device/features; done").split()
        require(bits[VERSION_1_BIT] == "0" and bits[HOTPLUG_BIT] == "1", f"features: {bits}")

    @case("random writes are verified, and resets are answered")
    def verified(self):
        for disk in self.disks:
            self.verify(disk.name)
            self.guest.check(f"sg_reset -N -d {self.device(disk.name).generic}")
        require(not self.kernel_errors(), self.kernel_errors())


class HotPlug(VirtioGroup):
    """Cases that build on each other."""

    title = "Units, drivers, devices and memory come and go under a Linux guest"
    ordered = True
    queues = [2]
    disks = [Disk("first", "ram", 16, lun=0), Disk("file", "file", 64, lun=1)]

    def apply(self) -> None:
        """Has the daemon read its file again, with the disks as they are now."""
        with open(self.target.configuration, "w") as file:
            file.write(self.target._yaml())
        self.target.process.send_signal(signal.SIGHUP)

    @case("a unit that is added appears without a rescan, and works")
    def add(self):
        self.target.disks.append(Disk("late", "ram", 16, lun=300))
        self.apply()
        self.wait("[ -d /sys/bus/scsi/devices/0:0:0:16684/block ]", "the unit's appearance")
        self.devices = self._find_devices()
        self.verify("late")

    @case("a target that is added appears without a rescan, with its units")
    def add_target(self):
        self.target.disks += [Disk("other0", "ram", 16, lun=0, target=7), Disk("other1", "ram", 16, lun=5, target=7)]
        self.apply()
        self.wait(
            "[ -d /sys/bus/scsi/devices/0:0:7:0/block -a -d /sys/bus/scsi/devices/0:0:7:5/block ]",
            "the appearance of both units")

    @case("a unit and a target that are removed disappear without a rescan")
    def remove(self):
        self.target.disks[:] = [disk for disk in self.target.disks if disk.target == 0 and disk.name != "late"]
        self.apply()
        self.wait(
            "! ls -d /sys/bus/scsi/devices/0:0:0:16684 /sys/bus/scsi/devices/0:0:7:* > /dev/null 2>&1",
            "the units' end")
        self.devices = self._find_devices()

    @case("a resize is seen at once")
    def resize(self):
        block = os.path.basename(self.devices["file"].block)
        self.target.disks[:] = [
            Disk("file", "file", 96, lun=1) if disk.name == "file" else disk for disk in self.target.disks]
        self.apply()
        self.wait(f"[ $(cat /sys/block/{block}/size) = {96 * 2048} ]", "the new capacity")

    @case("the driver is unbound and bound, and the units are back")
    def rebind(self):
        self.guest.check(
            "set -e; cd /sys/bus/virtio/drivers/virtio_scsi; device=$(ls -d virtio*)\n"
            "echo $device > unbind; [ ! -e $device ]; echo $device > bind")
        self.wait("[ $(ls -d /sys/bus/scsi/devices/*:0:0:1/block | wc -l) = 1 ]", "the units' return")
        block = self.guest.check("echo /dev/$(ls /sys/bus/scsi/devices/*:0:0:0/block)").strip()
        self.guest.check(VERIFY.format(block=block, name="rebound"), seconds=300)

    @case("the device is unplugged and plugged again, and the units are back")
    def replug(self):
        device = self.guest.check(
            "basename $(dirname $(readlink -f /sys/bus/virtio/drivers/virtio_scsi/virtio*))").strip()
        words = next(word for word in self.hba_arguments() if word.startswith("vhost-user-scsi-pci"))
        properties = dict(pair.split("=", 1) for pair in words.split(",")[1:])
        self.guest.monitor("device_del", id=properties["id"])
        self.wait(f"[ ! -e /sys/bus/pci/devices/{device} ]", "the device's end")
        numbers = {name: int(value) if value.isdigit() else value for name, value in properties.items()}
        limit = time.monotonic() + 30
        while True:
            try:
                self.guest.monitor("device_add", driver="vhost-user-scsi-pci", **numbers)
                break
            except Exception:
                # QEMU finishes the removal after the guest has.
                if time.monotonic() > limit:
                    raise
                time.sleep(0.2)
        self.wait("[ $(ls -d /sys/bus/scsi/devices/*:0:0:1/block | wc -l) = 1 ]", "the units' return")

    @case("memory is plugged beyond eight regions while the disk works")
    def memory(self):
        block = self.guest.check("echo /dev/$(ls /sys/bus/scsi/devices/*:0:0:0/block)").strip()
        for number in range(12):
            self.guest.monitor(
                "object-add", **{"qom-type": "memory-backend-memfd", "id": f"more{number}", "size": 128 << 20,
                                 "share": True})
            self.guest.monitor("device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"more{number}")
        self.guest.check(VERIFY.format(block=block, name="memory"), seconds=300)

    @case("the guest reboots, and the units are back")
    def reboot(self):
        self.guest.reboot()
        self.wait("[ $(ls -d /sys/bus/scsi/devices/*:0:0:1/block | wc -l) = 1 ]", "the units' return")
        block = self.guest.check("echo /dev/$(ls /sys/bus/scsi/devices/*:0:0:0/block)").strip()
        self.guest.check(VERIFY.format(block=block, name="rebooted"), seconds=300)


class ManyUnits(VirtioGroup):
    title = "A target with 500 units"
    queues = [2]
    disks = [Disk(f"unit{lun}", "ram", 1, lun=lun) for lun in range(500)]

    @case("the guest has found them all, and the last one works")
    def found(self):
        require(len(self.devices) == 500, f"{len(self.devices)} units were found")
        block = self.devices["unit499"].block
        self.guest.check(
            f"dd if=/dev/urandom of={block} bs=64k count=16 oflag=direct && dd if={block} of=/dev/null bs=64k")


class Migration(VirtioGroup):
    title = "A guest moves to another daemon over the same file"
    queues = [2]
    disks = [Disk("shared", "file", 64, lun=0, shared=True)]

    def finish(self) -> None:
        for thing in [getattr(self, "second_guest", None)]:
            if thing is not None:
                thing.close()
        if getattr(self, "second", None) is not None:
            self.second.stop()
            self.second.release()
        super().finish()

    def share(self) -> None:
        """Gives the second daemon the medium of the first."""
        # The very same file, under a name in the second daemon's directory.
        os.link(os.path.join(self.directory, "shared.img"), os.path.join(self.second.directory, "shared.img"))

    @case("fio with verification goes on while the guest moves")
    def move(self):
        block = self.devices["shared"].block
        self.guest.check(
            f"fio --name=moving --filename={block} --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=4k"
            " --verify=crc32c --verify_fatal=1 --do_verify=1 --size=32M --time_based --runtime=40"
            " > /run/moving 2>&1 &\n"
            f"statistics=/sys/block/$(basename {block})/stat; before=$(cat $statistics)\n"
            'while [ "$before" = "$(cat $statistics)" ]; do usleep 10000; done')
        other = os.path.join(self.directory, "second")
        os.mkdir(other)
        self.second = Daemon(other, list(self.disks), self.queues)
        self.share()
        self.second.start()
        first, self.target = self.target, self.second
        incoming = os.path.join(other, "incoming.sock")
        guest = VirtioGuest.__new__(VirtioGuest)
        guest.extra, guest._emulator = ["-incoming", f"unix:{incoming}"], self.guest._emulator
        arguments = self.hba_arguments()
        self.target = first
        self.second_guest = guest
        guest.directory, guest.console, guest.log = other, f"{other}/console.log", f"{other}/qemu.log"
        guest._agent_path, guest._monitor_path = f"{other}/agent.sock", f"{other}/monitor.sock"
        guest._agent, guest._received = None, b""
        guest.process = processes.start(guest._command(arguments, 2), guest.log)
        guest._agent = guest._connect(guest._agent_path, BOOT_SECONDS)
        limit = time.monotonic() + 60
        while not os.path.exists(incoming):
            require(time.monotonic() < limit, "the second QEMU does not wait for the guest")
            time.sleep(0.05)
        self.guest.monitor("migrate", uri=f"unix:{incoming}")
        limit = time.monotonic() + 300
        while (state := self.guest.monitor("query-migrate"))["status"] not in ("completed", "failed"):
            require(time.monotonic() < limit, f"the migration did not end: {state}")
            time.sleep(0.5)
        require(state["status"] == "completed", f"the migration failed: {state}")
        self.guest, old = guest, self.guest
        self.second_guest = old
        result = self.guest.check(
            "wait; until ! pidof fio > /dev/null; do usleep 100000; done; cat /run/moving", seconds=300)
        require("err= 0" in result, f"fio found something:\n{result}")
        require(not self.kernel_errors(), self.kernel_errors())


class MigrationOverBlockDevices(Migration):
    """Each daemon has a block device of its own over the same file."""

    title = "A guest moves to another daemon over block devices of the same storage"
    disks = [Disk("shared", "block", 64, lun=0)]

    def share(self) -> None:
        image = os.path.join(self.directory, "shared.img")
        attached = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=True)
        self.second.loops["shared"] = LoopDevice(attached.stdout.strip(), image)


class ClientMode(VirtioGroup):
    """QEMU listens, and the daemon connects."""

    title = "The daemon connects to the guests' sockets"
    ordered = True
    queues = [2]
    front = ", mode: client"
    disks = [Disk("disk", "ram", 16, lun=0)]

    @case("the daemon was there first, and the guest's disk works")
    def first(self):
        require("server=on" in " ".join(self.target.arguments()), f"printed: {self.target.arguments()}")
        self.verify("disk")

    @case("the next guest is served when it comes, without a word to the daemon")
    def second(self):
        block = self.device("disk").block
        self.guest.check(f"printf 'what the first wrote' | dd of={block} bs=512 conv=sync oflag=direct")
        self.guest.close()
        self.boot()
        block = self.device("disk").block
        found = self.guest.check(f"dd if={block} bs=512 count=1 iflag=direct | tr -d '\\0'")
        require("what the first wrote" in found, f"the disk holds {found!r}")
        self.verify("disk")
        require(not self.kernel_errors(), self.kernel_errors())


class SpreadQueues(VirtioGroup):
    """Cases that build on each other. Two targets, so each of the two reactors owns one."""

    title = "A guest whose queues are dealt out over two reactors"
    ordered = True
    queues = [4]
    properties = ",packed=on"
    front = ", spread: true"
    general = "reactors: 2"
    disks = [
        Disk("here", "file", 64, lun=0), Disk("there", "ram", 64, lun=0, target=1), Disk("also", "ram", 16, lun=3),
    ]  # fmt: skip

    @case("random writes are verified on all disks at once, through all queues")
    def verified(self):
        commands = [command.partition(" > ") for command in
                    (VERIFY.format(block=self.devices[disk.name].block, name=disk.name) for disk in self.disks)]
        more = " --numjobs=2 --size=4M --offset_increment=4M --cpus_allowed_policy=split --cpus_allowed=0-3"
        jobs = " ".join(f"( {first}{more}{mark}{rest} ) & jobs=\"$jobs $!\";" for first, mark, rest in commands)
        self.guest.check(f"jobs=; {jobs} for job in $jobs; do wait $job || exit 1; done", seconds=600)
        require(not self.kernel_errors(), self.kernel_errors())

    @case("resets under load lose nothing")
    def resets(self):
        device = self.device("there")
        self.guest.check(
            f"fio --name=load --filename={device.block} --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite"
            " --bs=4k --size=16M --loops=1000 --verify=crc32c --verify_fatal=1 --time_based --runtime=8"
            " --minimal > /run/load 2>&1 &\n"
            f"load=$!; statistics=/sys/block/$(basename {device.block})/stat\n"
            "for round in 1 2 3 4 5 6 7 8; do before=$(cat $statistics);"
            ' while [ "$before" = "$(cat $statistics)" ]; do kill -0 $load || exit 1; usleep 10000; done\n'
            f"  sg_reset -N -d {device.generic} || exit 1; done\n"
            "wait $load || { cat /run/load; exit 1; }", seconds=240)
        require(not self.kernel_errors(), self.kernel_errors())

    @case("a target that is added to it appears, and one that is removed disappears")
    def plug(self):
        self.target.disks.append(Disk("late", "ram", 16, lun=0, target=9))
        with open(self.target.configuration, "w") as file:
            file.write(self.target._yaml())
        self.target.process.send_signal(signal.SIGHUP)
        self.wait("[ -d /sys/bus/scsi/devices/0:0:9:0/block ]", "the target's appearance")
        self.devices = self._find_devices()
        self.verify("late")
        self.target.disks[:] = [disk for disk in self.target.disks if disk.target != 1]
        with open(self.target.configuration, "w") as file:
            file.write(self.target._yaml())
        self.target.process.send_signal(signal.SIGHUP)
        self.wait("[ ! -d /sys/bus/scsi/devices/0:0:1:0 ]", "the target's end")
        self.devices = self._find_devices()
        self.verify("here")

    @case("the guest reboots, and the units are back")
    def reboot(self):
        self.guest.reboot()
        self.wait("[ $(ls -d /sys/bus/scsi/devices/*:0:0:0/block | wc -l) = 1 ]", "the units' return")
        block = self.guest.check("echo /dev/$(ls /sys/bus/scsi/devices/*:0:0:0/block)").strip()
        self.guest.check(VERIFY.format(block=block, name="rebooted"), seconds=300)
