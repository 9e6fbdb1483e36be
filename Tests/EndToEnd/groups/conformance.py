# conformance: libiscsi's suite on a disk in a guest.
#
# Owns: the rule of what may fail (conformance-exceptions.txt). Called by: run.py.
# Must not know: how the disk is served.

"""Runs `iscsi-test-cu -d -v --test=ALL` on the guest's /dev/sg0 and counts passed, failed and skipped apart."""

import collections
import os
import re

from harness import cunit, image
from harness.report import case, require
from harness.targets import Disk

from .guests import GuestGroup

EXCEPTIONS = os.path.join(image.ROOT, "Tests", "EndToEnd", "conformance-exceptions.txt")
SUITE_SECONDS = 900


def read_exceptions(section: str = "", path: str = EXCEPTIONS) -> dict[str, str]:
    """Tests that may fail, with the clause that shows each of them wrong: those of every run, and of a section."""
    found = {}
    current = ""
    with open(path) as file:
        for number, line in enumerate(file, 1):
            if line.startswith("["):
                current = line.strip()
            if not line.strip() or line[0] in "#[" or current not in ("", section):
                continue
            fields = [field.strip() for field in line.split("|")]
            require(len(fields) == 3 and all(fields) and re.search(r"(SAM|SPC|SBC)-\d\S* \d+\.\d", fields[1]),
                    f"{path}:{number}: write 'Family.Test | SBC-4 5.40 | why'")  # fmt: skip
            found[fields[0]] = fields[1]
    return found


class Conformance(GuestGroup):
    """One run of the suite, then what is to be said about it."""

    title = "libiscsi's conformance suite, iscsi-test-cu"
    ordered = True
    queues = [1, 1]
    disks = [Disk("suite", "ram", 128, lun=0, also=(1,))]
    section = ""  # of the exceptions

    @case("iscsi-test-cu -d -v --test=ALL, on two paths, runs to its end")
    def run(self):
        paths = " ".join(device.generic for device in self.devices.values())
        listed = self.guest.check("iscsi-test-cu --list | grep -c '^ALL[.].*[.]'").strip()
        result = self.guest.run(f"iscsi-test-cu -d -v --test=ALL {paths}", seconds=SUITE_SECONDS)
        self.tests = cunit.parse(result.output)
        self.output = result.output
        require("Run Summary" in result.output and len(self.tests) == int(listed),
                f"{len(self.tests)} of {listed} tests ran, status {result.status}; the output ends\n"
                + "\n".join(result.output.splitlines()[-20:]))  # fmt: skip
        return f"{len(self.tests)} tests"

    @case("no test fails, but for the exceptions that a clause of the standard justifies")
    def judge(self):
        kinds = ["passed", "failed", "skipped"]
        chosen = {kind: [test for test in self.tests if test.outcome == kind] for kind in kinds}
        numbers = ", ".join(f"{len(tests)} {kind}" for kind, tests in chosen.items())
        exceptions = read_exceptions(self.section) if self.target.is_ours else {}
        failed = [test for test in chosen["failed"] if test.name not in exceptions]
        listing = "\n".join(f"{test.name}: {test.reason}" for test in failed)
        if not self.target.is_ours:
            return f"{numbers} (the reference's failures are its own)\n{listing}"
        require(self.tests and not failed, f"{numbers}; not excepted:\n{listing}")
        idle = set(exceptions) - {test.name for test in chosen["failed"]}
        require(not idle, f"these exceptions are not needed any more, remove them: {', '.join(sorted(idle))}")
        return f"{numbers}, of the failed {len(exceptions)} excepted"

    @case("the skipped tests are listed with their reasons")
    def skips(self):
        reasons = collections.defaultdict(list)
        for test in self.tests:
            if test.outcome == "skipped":
                reasons[test.reason].append(test.name)
        return "\n".join(f"{len(names)} x {reason}: {' '.join(names)}" for reason, names in sorted(reasons.items()))

    @case("the guest's kernel logged no error")
    def kernel_log(self):
        require(not self.kernel_errors(), self.kernel_errors())


class SpreadConformance(Conformance):
    """The same through queues of two reactors, so that commands cross between threads."""

    title = "libiscsi's conformance suite on a disk whose queues are dealt out over two reactors"
    queues = [2, 2]
    front = ", spread: true"
    general = "reactors: 2"


class RemovableConformance(Conformance):
    """The same on a unit whose medium the initiator can take out."""

    title = "libiscsi's conformance suite on a unit with a removable medium"
    disks = [Disk("suite", "ram", 128, lun=0, also=(1,), removable=True)]
    section = "[removable]"
