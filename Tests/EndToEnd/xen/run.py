#!/usr/bin/env python3
# run: runs the Xen end-to-end scripts.
#
# Owns nothing. Called by: Scripts/run_tests.py, and a developer. Must not know: any check.

"""Boots Xen in QEMU and lets Linux's xen-scsifront use disks that our front serves in dom0."""

import argparse
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import xenmachine  # noqa: E402
from harness import image, processes  # noqa: E402

# Script in dom0: the scripts of its guests.
SCRIPTS: dict[str, list[str]] = {"loopback": [], "guest": ["first", "second", "third"]}


def build() -> str:
    """Builds the test's back end for a machine without Swift's libraries."""
    words = ["swift", "build", "-c", "release", "--product", "xen-target", "--static-swift-stdlib"]
    subprocess.run(words, cwd=image.ROOT, check=True, stdout=subprocess.DEVNULL)
    return os.path.join(image.ROOT, ".build", "release", "xen-target")


def text(*path: str) -> str:
    with open(os.path.join(HERE, *path)) as file:
        return file.read()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", nargs="*", help="which scripts; all if none is named")
    parser.add_argument("--console", action="store_true", help="print what Xen and dom0's kernel print")
    options = parser.parse_args()
    lack = xenmachine.missing()
    if lack:
        print(f"SKIPPED: the Xen end-to-end tests did not run: {lack}", file=sys.stderr)
        return 0
    processes.clean_up_on_exit()
    program = build()
    failed = False
    for name in options.script or SCRIPTS:
        print(f"# {name}", flush=True)
        texts = {"/library.sh": text("dom0", "library.sh")}
        for guest in SCRIPTS[name]:
            texts[f"/guest-{guest}.sh"] = text("domu", f"{guest}.sh")
        outcome = xenmachine.run(
            text("dom0", f"{name}.sh"), {"/usr/bin/xen-target": program}, seconds=900, domu=bool(SCRIPTS[name]),
            texts=texts, progress=lambda line: print(line, flush=True))
        if outcome.status != 0:
            failed = True
            print(f"# {name} failed with status {outcome.status}", flush=True)
        if options.console or outcome.status is None:
            print(outcome.console)
        print(f"# {name}: {outcome.seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
