# xen: disks for guests of the Xen hypervisor: the daemon in dom0, Linux's xen-scsifront in dom0 and in PV guests.
#
# Owns: these cases, each of them one script in dom0 (xen/dom0). Called by: run.py. Must not know: how Xen is booted.

"""Real Xen, real xenstored, real grants and event channels, in QEMU; each script prints its checks as they are made."""

import os
import re
import shutil
import subprocess
import tempfile

from harness import targets
from harness.initramfs import libraries
from harness.report import Group, Skipped, case, require
from xen import xenmachine

from . import conformance

SCRIPTS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "xen")
SECONDS = 1800
# SBC-4 5.13: PRE-FETCH ends with CONDITION MET if the medium has a cache and the blocks are in it, as on this file.
# libiscsi takes every status of SG_IO but GOOD and CHECK CONDITION for an error.
CONDITION_MET = ["Prefetch10.Simple", "Prefetch10.Flags", "Prefetch16.Simple", "Prefetch16.Flags"]


def text(*path: str) -> str:
    with open(os.path.join(SCRIPTS, *path)) as file:
        return file.read()


class Xen(Group):
    """Each case boots a machine of its own."""

    title = "Xen guests"

    def __init__(self, kind: type[targets.Target]) -> None:
        self.kind = kind
        self.directory = ""

    def prepare(self) -> None:
        if not self.kind.is_ours:
            raise Skipped("not on the reference: QEMU serves no Xen guests")
        lack = xenmachine.missing()
        if lack:
            raise Skipped(f"XEN IS NOT TESTED HERE: {lack}")
        self.directory = tempfile.mkdtemp(prefix="targetd-xen-programs-")

    def finish(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _programs(self) -> dict[str, str]:
        """The daemon and its tools without what only debuggers need: the machine has little memory."""
        build = os.path.dirname(self.kind.executable)
        found = {}
        for name in ["targetd", "targetctl", "scsi-command"]:
            path = os.path.join(self.directory, name)
            if not os.path.exists(path):
                subprocess.run(["strip", "-o", path, os.path.join(build, name)], check=True)
            found[f"/usr/bin/{name}"] = path
        return found

    def _run(self, script: str, guests: list[str], texts: dict[str, str] | None = None) -> str:
        programs = self._programs()
        needed = "".join(f"{name}: {library}\n" for name, path in programs.items() for library in libraries(path))
        files = {"/library.sh": text("dom0", "library.sh"), "/guests.sh": text("dom0", "guests.sh"),
                 "/libraries": needed, **(texts or {})}  # fmt: skip
        for guest in guests:
            files[f"/guest-{guest}.sh"] = text("domu", f"{guest}.sh")
        outcome = xenmachine.run(
            text("dom0", f"{script}.sh"), programs, seconds=SECONDS, domu=bool(guests), texts=files, counted=True,
            progress=lambda line: print(f"       {line}", flush=True))
        passed = len(re.findall("^ok ", outcome.output, re.MULTILINE))
        if outcome.status is None:
            print(outcome.console[-6000:])
        require(outcome.status is not None, f"the machine did not come to its end in {outcome.seconds:.0f} s")
        failed = re.findall("^not ok (.*)", outcome.output, re.MULTILINE)
        require(outcome.status == 0, f"{', '.join(failed) or 'the script failed'}; see above")
        require(passed > 0, "the script has checked nothing")
        return f"{passed} checks"

    @case("front and back end in dom0: disks, hot add and remove, reset, conformance, daemons killed under load")
    def loopback(self) -> str:
        excepted = "\n".join([*conformance.read_exceptions(), *CONDITION_MET]) + "\n"
        return self._run("loopback", [], {"/before": text("dom0", "before.sh"), "/excepted": excepted})

    @case("PV guests: several vhosts, daemons killed under load, destroy and re-create, save and restore")
    def guest(self) -> str:
        return self._run("guest", ["first", "second", "third", "fourth"])

    @case("xenstored dies under a disk in use, and comes back empty")
    def xenstored(self) -> str:
        return self._run("xenstored", [])

    @case("one disk for a PV guest and a vhost-user front-end: unit attentions, reservations, COMPARE AND WRITE")
    def both(self) -> str:
        return self._run("both", ["commands"])

    @case("a driver domain: targetd in one PV guest serves another, dies under load, outlives its guest")
    def driver(self) -> str:
        return self._run("driver", ["commands", "driven"])
