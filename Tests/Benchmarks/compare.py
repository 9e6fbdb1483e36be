# compare: targetd, qemu-storage-daemon and fio, on the same media, in alternating runs.
#
# Owns: the rows of the comparison and how they are measured. Called by: Scripts/benchmark, Scripts/run_tests.py (a
# smoke run). Must not know: how the contestants work.

"""Measures I/O per second, latency, processor time and memory, and prints one table.

Contestants: targetd and qemu-storage-daemon (vhost-user-blk), both driven by our load generator; and fio, which uses
the file itself, without any target. targetd is measured twice: on split rings, as qemu-storage-daemon, and on packed
ones. "ram" is targetd's medium in memory; qemu-storage-daemon has a file in /dev/shm.

Each round measures every row with every contestant, one after the other, so that what else happens on the machine
hits them alike. The table shows, of each row and contestant, the round with the median of I/O per second. Targets run
on one processor, the load generator on another.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [os.path.join(ROOT, "Tests", "EndToEnd")]

from harness import processes, report, targets  # noqa: E402

GENERATOR = os.path.join(ROOT, ".build", "release", "vhost-user-load")
MIB = 1 << 20
SERVERS = ["targetd", "qemu-storage-daemon"]
PACKED = "targetd, packed rings"
BLOCK = 4096


@dataclass(frozen=True)
class Row:
    """One load on one medium."""

    medium: str  # ram, file
    operation: str  # read, write
    depth: int

    @property
    def title(self) -> str:
        return f"{self.medium} random {self.operation} depth {self.depth}"


ROWS = [
    Row(medium, operation, depth)
    for medium in ["ram", "file"] for operation in ["read", "write"] for depth in [1, 32, 128]
]  # fmt: skip


@dataclass
class Sample:
    """One measurement."""

    iops: float
    median_microseconds: float
    p99_microseconds: float
    processor_microseconds: float  # of the target (of fio: of all it does), for each I/O


class BenchmarkError(Exception):
    """A contestant failed; the text shows what it said."""


class Contestants:
    """The running targets. Use as a context manager."""

    def __init__(self, directory: str, mebibytes: int) -> None:
        self.directory = directory
        self.file = os.path.join(directory, "medium.img")
        self.memory_file = os.path.join("/dev/shm", f"targetd-benchmark-{os.getpid()}.img")
        self.mebibytes = mebibytes
        self.daemons: dict[tuple[str, str], subprocess.Popen] = {}

    def __enter__(self) -> "Contestants":
        try:
            self._fill()
            for name in SERVERS:
                for medium in ["ram", "file"]:
                    self._start(name, medium)
            # A sparse medium answers reads of what was never written without its memory.
            drive(self.socket("targetd", "ram"), "scsi", Row("ram", "write", 32), 2, self.daemons["targetd", "ram"].pid,
                  pattern="sequential", block=128 * 1024)  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for child in self.daemons.values():
            processes.stop(child)
        for path in [self.memory_file, self.file]:
            if os.path.exists(path):
                os.remove(path)

    def names(self, row: Row) -> list[str]:
        return [SERVERS[0], PACKED, *SERVERS[1:]] + (["fio"] if row.medium == "file" else [])

    def socket(self, name: str, medium: str) -> str:
        return os.path.join(self.directory, f"{name}-{medium}.sock")

    def measure(self, name: str, row: Row, seconds: float) -> Sample:
        if name == "fio":
            return fio(self.file, row, seconds)
        server = "targetd" if name == PACKED else name
        protocol = "scsi" if server == "targetd" else "blk"
        return drive(self.socket(server, row.medium), protocol, row, seconds, self.daemons[server, row.medium].pid,
                     more=["--packed"] * (name == PACKED))  # fmt: skip

    def resident(self, name: str) -> float:
        """MB of memory that the target of the file has for itself: without what it shares with its guest."""
        with open(f"/proc/{self.daemons[name, 'file'].pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return sum(int(fields[field].split()[0]) for field in ["RssAnon", "RssFile"]) / 1000

    def idle_ticks(self, name: str, seconds: float) -> int:
        """Processor time, in ticks of 10 ms, that a target takes without any I/O."""
        before = self._ticks(name)
        time.sleep(seconds)
        return self._ticks(name) - before

    def _ticks(self, name: str) -> int:
        with open(f"/proc/{self.daemons[name, 'file'].pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def _fill(self) -> None:
        chunk = os.urandom(MIB)
        for path in [self.file, self.memory_file]:
            with open(path, "wb") as file:
                for _ in range(self.mebibytes):
                    file.write(chunk)
                os.fsync(file.fileno())

    def _start(self, name: str, medium: str) -> None:
        """Starts a target of one medium."""
        socket = self.socket(name, medium)
        if name == "targetd":
            what = ["--ram", f"{self.mebibytes}MiB"] if medium == "ram" else ["--file", self.file]
            command = [targets.Daemon.executable, *what, "--vhost-user", socket]
        else:
            path, direct = (self.memory_file, "off") if medium == "ram" else (self.file, "on")
            # locking=off: targetd has the same file open; they never use it at the same time.
            command = [
                "qemu-storage-daemon",
                "--blockdev",
                f"driver=file,node-name=disk,filename={path},locking=off,cache.direct={direct},aio=io_uring",
                "--export",
                f"type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}",
            ]  # fmt: skip
        log = os.path.join(self.directory, f"{name}-{medium}.log")
        child = processes.start(pinned(command, 1), log)
        self.daemons[name, medium] = child
        targets.wait_until(lambda: os.path.exists(socket), child, log, f"{name} makes {socket}")


def pinned(command: list[str], processor: int) -> list[str]:
    """The command, kept on one processor if there are several."""
    if (os.cpu_count() or 1) < 2:
        return command
    return ["taskset", "--cpu-list", str(processor), *command]


def output_of(command: list[str], seconds: float) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    if result.returncode != 0:
        said = (result.stdout + result.stderr)[-2000:]
        raise BenchmarkError(f"'{' '.join(command)}' ended with status {result.returncode}:\n{said}")
    return result.stdout


def drive(socket: str, protocol: str, row: Row, seconds: float, pid: int, pattern="random", block=BLOCK,
          more=()) -> Sample:  # fmt: skip
    """Runs the load generator on a socket."""
    answer = json.loads(output_of(pinned([
        GENERATOR, "--socket", socket, "--protocol", protocol, "--queues", "1", "--depth", str(row.depth),
        "--block-size", str(block), "--pattern", pattern, "--operation", row.operation,
        "--runtime", str(seconds), "--pid", str(pid), "--json", *more,
    ], 0), seconds))  # fmt: skip
    return Sample(
        answer["iops"], answer["latencyMicroseconds"]["p50"], answer["latencyMicroseconds"]["p99"],
        answer["targetProcessorMicrosecondsPerOperation"])  # fmt: skip


def fio(path: str, row: Row, seconds: float) -> Sample:
    """Runs fio on the file itself."""
    answer = json.loads(output_of(pinned([
        "fio", "--name=yardstick", f"--filename={path}", f"--rw=rand{row.operation}", f"--bs={BLOCK}",
        f"--iodepth={row.depth}", "--direct=1", "--ioengine=io_uring", "--time_based", f"--runtime={seconds}",
        "--output-format=json",
    ], 1), seconds))["jobs"][0]  # fmt: skip
    side = answer[row.operation]
    latency = side["clat_ns"]["percentile"]
    busy = (answer["usr_cpu"] + answer["sys_cpu"]) / 100 * side["runtime"] * 1000
    return Sample(
        side["iops"], latency["50.000000"] / 1000, latency["99.000000"] / 1000, busy / max(1, side["total_ios"]))


def compare(rows: list[Row], rounds: int, seconds: float, mebibytes: int, directory: str, progress=print) -> str:
    """Measures, and returns the table."""
    samples: dict[tuple[Row, str], list[Sample]] = {}
    with Contestants(directory, mebibytes) as contestants:
        for number in range(rounds):
            for row in rows:
                for name in contestants.names(row):
                    sample = contestants.measure(name, row, seconds)
                    samples.setdefault((row, name), []).append(sample)
                    progress(f"round {number + 1}: {row.title}: {name}: {sample.iops:,.0f} I/O per second")
        resident = {name: contestants.resident(name) for name in SERVERS}
        idle = {name: contestants.idle_ticks(name, 2) for name in SERVERS}
    lines = table(samples)
    for name in SERVERS:
        lines.append(
            f"{name}: {resident[name]:.0f} MB of its own resident; {idle[name]} ticks of 10 ms in 2 s of idling")
    return "\n".join(lines)


def table(samples: dict[tuple[Row, str], list[Sample]]) -> list[str]:
    """The medians, each row with its ratio to the best peer of that row."""
    chosen = {key: median(found) for key, found in samples.items()}
    lines = [f"{'':30}{'':22}{'IOPS':>11}{'p50 us':>9}{'p99 us':>9}{'CPU us/IO':>11}{'targetd is':>22}"]
    for (row, name), sample in chosen.items():
        ours = chosen[(row, "targetd")]
        ratio = "" if name == "targetd" else f"{ours.iops / max(1, sample.iops):.2f} of this"
        title = row.title if name == "targetd" else ""
        lines.append(
            f"{title:30}{name:22}{sample.iops:>11,.0f}{sample.median_microseconds:>9.1f}{sample.p99_microseconds:>9.1f}"
            f"{sample.processor_microseconds:>11.2f}{ratio:>22}")
    return lines


def median(found: list[Sample]) -> Sample:
    """The sample whose I/O per second are the (lower) median."""
    middle = statistics.median_low([sample.iops for sample in found])
    return next(sample for sample in found if sample.iops == middle)


class Smoke(report.Group):
    """That the benchmark runs at all; its numbers mean nothing on a busy machine."""

    title = "The benchmark"

    @report.case("every contestant answers a short load")
    def short(self):
        directory = tempfile.mkdtemp(prefix="targetd-benchmark-", dir="/var/tmp")
        try:
            rows = [Row("ram", "read", 32), Row("file", "write", 32)]
            return compare(rows, rounds=1, seconds=1, mebibytes=64, directory=directory, progress=lambda text: None)
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each row is measured (3)")
    parser.add_argument("--seconds", type=int, default=5, help="how long each measurement takes (5)")
    parser.add_argument("--size", type=int, default=1024, metavar="MiB", help="the size of the media (1024)")
    parser.add_argument("--directory", default="/var/tmp", help="where the file is made (/var/tmp)")
    parser.add_argument("--row", default="", help="only the rows with this in their titles: ram random read")
    options = parser.parse_args()
    rows = [row for row in ROWS if options.row in row.title]
    if not rows:
        parser.error(f"no row is called so; there are: {', '.join(row.title for row in ROWS)}")
    processes.clean_up_on_exit()
    built = ["swift", "build", "-c", "release"]
    if subprocess.run(built, cwd=ROOT).returncode != 0:
        return 1
    directory = tempfile.mkdtemp(prefix="targetd-benchmark-", dir=options.directory)
    try:
        print(compare(rows, options.rounds, options.seconds, options.size, directory))
    except (BenchmarkError, targets.TargetError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
