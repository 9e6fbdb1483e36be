# targets: what serves the guest's disks: our daemon, or QEMU's own virtio-scsi to check the cases themselves on a peer.
#
# Owns: the daemon's process, its configuration, its media. Called by: groups, the demonstration.
# Must not know: cases, or how a guest is booted.

"""Disks as a case describes them, and the two targets that can serve them."""

import os
import re
import shlex
import subprocess
import time
from dataclasses import dataclass, field

from . import image, processes

MIB = 1 << 20
START_SECONDS = 60
STOP_SECONDS = 60


class TargetError(Exception):
    """The target did not start, or did not end as it must."""


class NotPossible(Exception):
    """This machine, or this target, cannot do what the case needs; the text says why. The case is skipped, loudly."""


@dataclass(frozen=True)
class Disk:
    """One logical unit as a group of cases wants it."""

    name: str
    kind: str  # ram, file, block
    mebibytes: int
    lun: int
    hba: int = 0
    target: int = 0
    read_only: bool = False
    also: tuple[int, ...] = ()  # other HBAs through which the same target is served: more I_T nexuses to the unit
    removable: bool = False
    shared: bool = False  # a file that a second daemon opens as well
    on_error: str = ""  # what on-error: says: report, stop, retry
    space: int = 0  # MiB of a file system of the medium's own; 0: it lies where everything lies

    @property
    def address(self) -> str:
        """Where the guest finds the unit on its first path."""
        return self.address_through(self.hba)

    def address_through(self, hba: int) -> str:
        """The name of the unit in the guest's /sys/bus/scsi/devices: host, channel, target, LUN.

        Linux keeps the address method's bits of a LUN above 255: number 300 is 412Ch (SAM-6 4.7.7.3).
        """
        return f"{hba}:0:{self.target}:{self.lun if self.lun < 256 else 0x4000 | self.lun}"

    @property
    def paths(self) -> dict[str, str]:
        """The addresses of all its paths, by the name that a group calls each: the disk's own, or name@hba."""
        return {self.name: self.address} | {f"{self.name}@{hba}": self.address_through(hba) for hba in self.also}


@dataclass
class LoopDevice:
    """A block device of this machine over a sparse file."""

    path: str
    backing: str

    @staticmethod
    def create(backing: str, mebibytes: int) -> "LoopDevice":
        with open(backing, "wb") as file:
            file.truncate(mebibytes * MIB)
        result = subprocess.run(
            ["losetup", "--find", "--show", backing], capture_output=True, text=True)
        if result.returncode != 0:
            raise NotPossible(f"this machine has no loop devices for us (losetup: {result.stderr.strip()})")
        return LoopDevice(result.stdout.strip(), backing)

    def remove(self) -> None:
        subprocess.run(["losetup", "--detach", self.path], check=True)


@dataclass
class SmallFileSystem:
    """A file system of this machine with little space, for the medium of one disk."""

    path: str
    mebibytes: int

    @staticmethod
    def create(path: str, mebibytes: int) -> "SmallFileSystem":
        with open(f"{path}.ext4", "wb") as file:
            file.truncate(mebibytes * MIB)
        os.mkdir(path)
        for command in (["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", f"{path}.ext4"],
                        ["mount", "-o", "loop", f"{path}.ext4", path]):  # fmt: skip
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise NotPossible(f"this machine mounts no file system for us ({command[0]}: {result.stderr.strip()})")
        return SmallFileSystem(path, mebibytes)

    @property
    def free(self) -> int:
        """MiB that are left."""
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_bsize // MIB

    @property
    def ballast(self) -> str:
        return os.path.join(self.path, "ballast")

    def leave(self, mebibytes: int) -> None:
        """Takes all space but this."""
        with open(self.ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, (self.free - mebibytes) * MIB)

    def give_back(self) -> None:
        """Gives the space back that `leave` has taken."""
        os.remove(self.ballast)

    def remove(self) -> None:
        subprocess.run(["umount", self.path], check=True)


@dataclass
class Target:
    """What the two targets have in common: disks, and a directory for their files."""

    directory: str
    disks: list[Disk]
    queues: list[int]  # request queues of each HBA
    front: str = ""  # more keys of each socket
    general: str = ""  # more lines of the file
    loops: dict[str, LoopDevice] = field(default_factory=dict)
    spaces: dict[str, SmallFileSystem] = field(default_factory=dict)

    def medium(self, disk: Disk) -> str:
        """The path of what holds a disk's data; made if it is not there."""
        path = os.path.join(self.directory, f"{disk.name}.img")
        if disk.space:
            if disk.name not in self.spaces:
                place = os.path.join(self.directory, disk.name)
                self.spaces[disk.name] = SmallFileSystem.create(place, disk.space)
            return os.path.join(self.spaces[disk.name].path, "medium.img")
        if disk.kind != "block":
            return path
        if disk.name not in self.loops:
            self.loops[disk.name] = LoopDevice.create(path, disk.mebibytes)
        return self.loops[disk.name].path

    def release(self) -> None:
        """Gives the machine's resources back. The disks' data is gone with the directory."""
        while self.loops:
            self.loops.popitem()[1].remove()
        while self.spaces:
            self.spaces.popitem()[1].remove()


class Reference(Target):
    """QEMU's own virtio-scsi-pci and scsi-hd: a peer on which the cases must hold as well."""

    is_ours = False

    def start(self) -> None:
        for disk in self.disks:
            path = self.medium(disk)
            if disk.kind != "block" and not os.path.exists(path):
                with open(path, "wb") as file:
                    file.truncate(disk.mebibytes * MIB)

    def arguments(self) -> list[str]:
        """QEMU's arguments that attach the disks."""
        found = []
        for index, queues in enumerate(self.queues):
            found += ["-device", f"virtio-scsi-pci,id=hba{index},num_queues={queues}"]
        for disk in self.disks:
            kind = "host_device" if disk.kind == "block" else "file"
            read_only = "on" if disk.read_only else "off"
            found += [
                "-blockdev", f"raw,node-name={disk.name},discard=unmap,read-only={read_only},"
                f"file.driver={kind},file.filename={self.medium(disk)}",
                "-device", f"scsi-hd,bus=hba{disk.hba}.0,scsi-id={disk.target},lun={disk.lun},drive={disk.name},"
                f"share-rw=on",
            ]  # fmt: skip
        return found

    def stop(self) -> None:
        """Nothing runs but the guest."""


class Daemon(Target):
    """Our daemon, given a configuration file and attached by the very arguments that it prints."""

    is_ours = True
    executable = os.path.join(image.ROOT, ".build", os.environ.get("TARGETD_BUILD", "release"), "targetd")
    command: list[str] = []
    process: subprocess.Popen | None = None
    runs = 0

    @property
    def log(self) -> str:
        """What this run of the daemon printed."""
        return os.path.join(self.directory, f"targetd-{self.runs}.log")

    @property
    def configuration(self) -> str:
        return os.path.join(self.directory, "targetd.yaml")

    @property
    def is_client(self) -> bool:
        """Whether the guests make the sockets."""
        return "mode: client" in self.front

    def socket(self, hba: int) -> str:
        return os.path.join(self.directory, f"hba{hba}.sock")

    def start(self, options: list[str] | None = None) -> None:
        """Starts the daemon, with a configuration file for the disks or with these options.

        Returns when every socket is there and its arguments are printed.
        """
        if not os.path.exists(self.executable):
            raise TargetError(f"{self.executable} is not there; build it: swift build -c release --product targetd")
        if options is None:
            with open(self.configuration, "w") as file:
                file.write(self._yaml())
        self.command = [self.executable, *(options or ["--config", self.configuration])]
        self.runs += 1
        self.process = processes.start(self.command, self.log)
        sockets = [self.socket(hba) for hba in range(len(self.queues))]

        def served() -> bool:
            found = self.arguments()
            return all(
                (os.path.exists(path) or self.is_client) and any(path in word for word in found) for path in sockets)

        wait_until(served, self.process, self.log, f"targetd serves {', '.join(sockets)} and prints how to attach them")

    def arguments(self) -> list[str]:
        """The arguments for the disks that the daemon printed, without those for the machine's memory."""
        with open(self.log) as file:
            return printed_arguments(file.read())

    def stop(self) -> None:
        """Stops the daemon by SIGTERM; it must end by itself, with status 0, and take its sockets with it."""
        if self.process is None:
            return
        child, self.process = self.process, None
        if child.poll() is not None:
            raise TargetError(f"targetd ended on its own with status {child.returncode}:\n{processes.tail(self.log)}")
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            processes.kill(child)
            raise TargetError(
                f"targetd did not end in {STOP_SECONDS} s after SIGTERM:\n{processes.tail(self.log)}") from None
        processes.stop(child)
        if child.returncode != 0:
            raise TargetError(f"targetd ended with status {child.returncode}:\n{processes.tail(self.log)}")
        left = [hba for hba in range(len(self.queues)) if os.path.exists(self.socket(hba))]
        if left and not self.is_client:
            raise TargetError(f"targetd ended and left {self.socket(left[0])} behind")

    def kill(self) -> None:
        """Ends the daemon as a crash would: by SIGKILL."""
        assert self.process is not None
        child, self.process = self.process, None
        processes.kill(child)

    def status(self) -> dict[str, str]:
        """The lines of the daemon's /proc/PID/status."""
        assert self.process is not None
        with open(f"/proc/{self.process.pid}/status") as file:
            return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}

    def context_switches(self) -> int:
        """How often the daemon's threads went to sleep or were put aside, since they began."""
        assert self.process is not None
        total = 0
        for thread in os.listdir(f"/proc/{self.process.pid}/task"):
            with open(f"/proc/{self.process.pid}/task/{thread}/status") as file:
                total += sum(int(count) for count in re.findall(r"ctxt_switches:\s*(\d+)", file.read()))
        return total

    def _yaml(self) -> str:
        """The configuration file, in the shape that a user would write."""
        lines = [f"state-directory: {os.path.join(self.directory, 'state')}", *self.general.splitlines(), "backstores:"]
        for disk in self.disks:
            if disk.kind == "ram":
                what = f"type: ram, size: {disk.mebibytes}MiB"
            elif disk.kind == "file":
                what = f"type: file, path: {self.medium(disk)}, size: {disk.mebibytes}MiB"
                what += ", shared: true" * disk.shared
            else:
                what = f"type: block-device, path: {self.medium(disk)}"
            lines.append(f"  {disk.name}: {{ {what} }}")
        lines.append("targets:")
        names = {}
        served: dict[int, dict[int, str]] = {hba: {} for hba in range(len(self.queues))}
        for disk in self.disks:
            key = (disk.hba, disk.target)
            if key in names:
                continue
            names[key] = f"naa.600140500000{disk.hba:02x}{disk.target:02x}"
            for hba in (disk.hba, *disk.also):
                served[hba][disk.target] = names[key]
            lines += [f"  {names[key]}:", "    luns:"]
            for unit in (unit for unit in self.disks if (unit.hba, unit.target) == key):
                lines.append(f"      {unit.lun}: {self._unit(unit)}")
        lines.append("vhost-user-scsi:")
        for hba, queues in enumerate(self.queues):
            targets = ", ".join(f"{target}: {name}" for target, name in served[hba].items())
            socket = self.socket(hba)
            lines.append(f"  - {{ socket: {socket}, queues: {queues}, targets: {{ {targets} }}{self.front} }}")
        return "\n".join(lines) + "\n"

    @staticmethod
    def _unit(disk: Disk) -> str:
        """The value of a LUN in the configuration file."""
        options = ["read-only: true"] * disk.read_only + ["removable: true"] * disk.removable
        if disk.on_error:
            options.append(f"on-error: {disk.on_error}" + ", retry-timeout: 10min" * (disk.on_error == "retry"))
        return f"{{ {', '.join([f'backstore: {disk.name}', *options])} }}" if options else disk.name


def wait_until(reached, child: subprocess.Popen, log: str, what: str) -> None:
    """Waits until `reached` says so, as long as the process lives."""
    limit = time.monotonic() + START_SECONDS
    while not reached():
        if child.poll() is not None:
            raise TargetError(f"waited until {what}; it ended with status {child.returncode}:\n{processes.tail(log)}")
        if time.monotonic() > limit:
            raise TargetError(f"waited {START_SECONDS} s until {what}; it printed:\n{processes.tail(log)}")
        time.sleep(0.02)


def printed_arguments(text: str) -> list[str]:
    """The -chardev and -device arguments in what the daemon printed, whatever lines they stand on."""
    words: list[str] = []
    for line in text.replace("\\\n", " ").splitlines():
        if "-chardev" in line or "-device" in line:
            words += shlex.split(line)
    found = []
    for option, value in zip(words, words[1:]):
        if option in ("-chardev", "-device"):
            found += [option, value]
    return found
