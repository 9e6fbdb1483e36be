#!/usr/bin/env python3
# xen: targetd beside the kernel's own xen-scsiback with LIO, for a guest of Xen in QEMU.
#
# Owns: the table. Called by: people. Must not know: how Xen is booted, how disks are served.

"""Boots Xen in QEMU; a PV guest measures two disks in memory in turns: targetd's, and xen-scsiback's with LIO.

Build before: swift build -c release. The machine's clock counts instructions, so that what else runs here changes
nothing: seconds are not this machine's, and only the relation of two lines means anything.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPTS = os.path.join(ROOT, "Tests", "EndToEnd", "xen")
sys.path.insert(0, os.path.dirname(SCRIPTS))

from harness import processes  # noqa: E402
from xen import xenmachine  # noqa: E402


def text(*path: str) -> str:
    with open(os.path.join(SCRIPTS, *path)) as file:
        return file.read()


@dataclass(frozen=True)
class Row:
    """One measurement."""

    server: str
    operation: str
    size: str
    per_second: float
    # Microseconds of dom0's processor for each I/O.
    cost: float


def measure(rounds: int, seconds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as directory:
        programs = {}
        for name in ["targetd", "targetctl"]:
            path = os.path.join(directory, name)
            subprocess.run(["strip", "-o", path, os.path.join(ROOT, ".build", "release", name)], check=True)
            programs[f"/usr/bin/{name}"] = path
        settings = f"ROUNDS={rounds} SECONDS_PER_ROW={seconds}\n"
        texts = {"/library.sh": text("dom0", "library.sh"), "/guests.sh": text("dom0", "guests.sh"),
                 "/guest-load.sh": settings + text("domu", "load.sh")}
        outcome = xenmachine.run(
            settings + text("dom0", "benchmark.sh"), programs, seconds=3600, domu=True, texts=texts, counted=True,
            progress=lambda line: print(line, flush=True))
    if outcome.status != 0:
        sys.exit(f"the run failed:\n{outcome.console[-3000:]}")
    return rows(outcome.output)


def grants() -> None:
    """What copying and mapping pages costs dom0 (decision 0009)."""
    with tempfile.TemporaryDirectory() as directory:
        program = os.path.join(directory, "xen-grants")
        source = os.path.join(ROOT, "Tests", "Benchmarks", "xen-grants.c")
        subprocess.run(["cc", "-O2", "-D__XEN_INTERFACE_VERSION__=0x00040e00", "-o", program, source, "-lxengnttab"],
                       check=True)  # fmt: skip
        outcome = xenmachine.run("xen-grants\n", {"/usr/bin/xen-grants": program}, seconds=1800, counted=True)
    print(outcome.output if outcome.status == 0 else outcome.console[-3000:])


def rows(output: str) -> list[Row]:
    """What dom0 uses while nobody does anything, in the same round, is no cost of I/O."""
    made = []
    idle = 0.0
    for server, operation, size, kibibytes, milliseconds, processor in re.findall(
            r"^@@row (\w+) (\w+) (\w+) (\d+) (\d+) (\S+)$", output, re.MULTILINE):
        if operation == "idle":
            idle = float(processor)
            continue
        count = max(1, int(kibibytes) // int(size.removesuffix("k")))
        made.append(Row(server, operation, size, count / int(milliseconds) * 1000,
                        max(0.0, float(processor) - idle) / count * 1e6))  # fmt: skip
    return made


def ratio(mine: list[float], other: list[float]) -> str:
    """Of each pair of neighbours, which the machine's other work has slowed alike: the median, least and greatest."""
    found = sorted(a / b for a, b in zip(mine, other) if b > 0)
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})" if found else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each measures every row on both disks")
    parser.add_argument("--seconds", type=int, default=3, help="seconds of each row")
    parser.add_argument("--grants", action="store_true", help="measure grant copies beside mappings instead")
    options = parser.parse_args()
    lack = xenmachine.missing()
    if lack:
        sys.exit(f"Xen cannot be run here: {lack}")
    processes.clean_up_on_exit()
    if options.grants:
        grants()
        return 0
    found = measure(options.rounds, options.seconds)
    print("\n| row | targetd, I/O per second | LIO | ratio of pairs "
          "| dom0 us for each I/O: targetd | LIO | ratio of pairs |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for operation, size in [("read", "4k"), ("write", "4k"), ("read", "256k"), ("write", "256k")]:
        chosen = {server: [row for row in found if (row.server, row.operation, row.size) == (server, operation, size)]
                  for server in ["targetd", "lio"]}  # fmt: skip
        speed = {server: [row.per_second for row in found] for server, found in chosen.items()}
        cost = {server: [row.cost for row in found] for server, found in chosen.items()}
        print(f"| {operation} {size} "
              f"| {statistics.median(speed['targetd']):.0f} | {statistics.median(speed['lio']):.0f}"
              f" | {ratio(speed['targetd'], speed['lio'])} | {statistics.median(cost['targetd']):.0f}"
              f" | {statistics.median(cost['lio']):.0f} | {ratio(cost['targetd'], cost['lio'])} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
