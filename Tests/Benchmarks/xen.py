#!/usr/bin/env python3
# xen: targetd beside the kernel's own xen-scsiback with LIO, for a guest of Xen in QEMU.
#
# Owns: the table. Called by: people. Must not know: how Xen is booted, how disks are served.

"""Boots Xen in QEMU; a PV guest measures a disk in memory that targetd and xen-scsiback serve in turns.

Build before: swift build -c release. Everything is emulated, so only the relation of two lines means anything.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SCRIPTS = os.path.join(ROOT, "Tests", "EndToEnd", "xen")
sys.path.insert(0, os.path.dirname(SCRIPTS))

from harness import processes  # noqa: E402
from xen import xenmachine  # noqa: E402


def text(*path: str) -> str:
    with open(os.path.join(SCRIPTS, *path)) as file:
        return file.read()


def measure(turns: int, seconds: int) -> list[tuple[str, str, str, int, float, float]]:
    """(server, operation, bytes, I/Os, seconds, dom0's processor seconds) for each row of each turn."""
    with tempfile.TemporaryDirectory() as directory:
        programs = {}
        for name in ["targetd", "targetctl"]:
            path = os.path.join(directory, name)
            subprocess.run(["strip", "-o", path, os.path.join(ROOT, ".build", "release", name)], check=True)
            programs[f"/usr/bin/{name}"] = path
        texts = {"/library.sh": text("dom0", "library.sh"),
                 "/guest-load.sh": f"SECONDS_PER_ROW={seconds}\n" + text("domu", "load.sh")}  # fmt: skip
        outcome = xenmachine.run(
            f"TURNS={turns} SECONDS_PER_ROW={seconds}\n" + text("dom0", "benchmark.sh"), programs,
            seconds=3600, domu=True, texts=texts,
            progress=lambda line: print(line, flush=True))
    if outcome.status != 0:
        sys.exit(f"the run failed:\n{outcome.console[-3000:]}")
    found = re.findall(r"^@@row (\w+) (\w+) (\w+) (\d+) (\d+) (\S+)$", outcome.output, re.MULTILINE)
    rows = []
    for server, operation, size, kibibytes, milliseconds, processor in found:
        count = int(kibibytes) // int(size.removesuffix("k"))
        rows.append((server, operation, size, count, int(milliseconds) / 1000, float(processor)))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3, help="turns of each server")
    parser.add_argument("--seconds", type=int, default=4, help="seconds of each row")
    options = parser.parse_args()
    lack = xenmachine.missing()
    if lack:
        sys.exit(f"Xen cannot be run here: {lack}")
    processes.clean_up_on_exit()
    rows = measure(options.turns, options.seconds)
    print("\n| row | targetd I/O/s | LIO I/O/s | ratio | targetd dom0 us per I/O | LIO dom0 us per I/O | ratio |")
    print("|---|---|---|---|---|---|---|")
    for operation, size in [("read", "4k"), ("write", "4k"), ("read", "256k"), ("write", "256k")]:
        chosen = {server: [row for row in rows if row[:3] == (server, operation, size)]
                  for server in ["targetd", "lio"]}  # fmt: skip
        speed = {s: statistics.median(r[3] / r[4] for r in found) for s, found in chosen.items()}
        cost = {s: statistics.median(r[5] / max(1, r[3]) * 1e6 for r in found) for s, found in chosen.items()}
        print(f"| {operation} {size} | {speed['targetd']:.0f} | {speed['lio']:.0f}"
              f" | {speed['targetd'] / speed['lio']:.2f} "
              f"| {cost['targetd']:.0f} | {cost['lio']:.0f} | {cost['targetd'] / cost['lio']:.2f} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
