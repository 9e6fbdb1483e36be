# itself: the harness is shown to see failures; a harness that cannot fail proves nothing.
#
# Owns: these cases. Called by: run.py. Must not know: targetd.

"""Planted failures: in what the suite prints, in a group of cases, in a guest."""

import contextlib
import io
import os
import shutil
import tempfile

from harness import cunit, guest, report, targets
from harness.report import Group, case, require

from . import conformance

SUITE = """\
Suite: Read6
  Test: Simple ...passed
  Test: BeyondEol ...    [FAILED] READ6 successful but should have failed
FAILED
    1. test_read6_beyond_eol.c:35  - CU_ASSERT_NOT_EQUAL(ret,0)
Suite: NoMedia
  Test: NoMediaSBC ...    [SKIPPED] Media is not removable.
passed
Suite: Write16
  Test: Simple ..."""

PRINTED = """\
targetd serves 1 socket(s).

To attach a guest, add to QEMU:
    -object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem \\
    -chardev socket,id=targetd0,path='/run/a disk.sock' \\
    -device vhost-user-scsi-pci,chardev=targetd0,num_queues=4
"""


class Planted(Group):
    """A group in which one case fails, one is skipped, one passes."""

    title = "planted"

    def __init__(self, broken: bool) -> None:
        self.broken = broken
        self.finished = False

    def prepare(self) -> None:
        require(not self.broken, "planted")

    def finish(self) -> None:
        self.finished = True

    @case("fails")
    def fails(self):
        require(False, "planted")

    @case("is skipped")
    def is_skipped(self):
        raise report.Skipped("planted")

    @case("passes")
    def passes(self):
        return "seen"


class Itself(Group):
    """Cases about the harness; the last ones boot a guest without a disk."""

    title = "The harness itself sees failures"

    def __init__(self, kind: type[targets.Target]) -> None:
        self.machine: guest.Guest | None = None

    def prepare(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="targetd-test-")

    def finish(self) -> None:
        if self.machine:
            self.machine.close()
        shutil.rmtree(self.directory)

    @case("in the suite's output, skipped is not passed, and a test without an end has failed")
    def suite(self):
        outcomes = {test.name: test.outcome for test in cunit.parse(SUITE)}
        expected = {"Read6.Simple": "passed", "Read6.BeyondEol": "failed", "NoMedia.NoMediaSBC": "skipped",
                    "Write16.Simple": "failed"}  # fmt: skip
        require(outcomes == expected, str(outcomes))

    @case("an exception for the suite without a clause of a standard is refused")
    def exceptions(self):
        path = os.path.join(self.directory, "exceptions.txt")
        for line, good in [("A.B | SBC-4 5.40.1 | it compares nothing", True), ("A.B | everybody fails it | -", False),
                           ("A.B", False)]:  # fmt: skip
            with open(path, "w") as file:
                file.write(f"# comment\n\n{line}\n")
            try:
                conformance.read_exceptions(path=path)
                accepted = True
            except report.Failed:
                accepted = False
            require(accepted == good, f"'{line}': {accepted}")

    @case("the arguments that targetd prints are found, on whatever lines they stand")
    def arguments(self):
        found = targets.printed_arguments(PRINTED)
        require(found == ["-chardev", "socket,id=targetd0,path=/run/a disk.sock",
                          "-device", "vhost-user-scsi-pci,chardev=targetd0,num_queues=4"], str(found))  # fmt: skip

    @case("a case that fails is counted, and a preparation that fails is every case's failure")
    def counting(self):
        for broken, expected in [(False, (1, 1, 1)), (True, (0, 3, 0))]:
            group, results = Planted(broken), report.Report()
            with contextlib.redirect_stdout(io.StringIO()):
                results.run(group, {"fails", "is skipped", "passes"})
                good = results.summary()
            counts = tuple(results.count(kind) for kind in ["passed", "failed", "skipped"])
            require(counts == expected and not good and group.finished, f"{counts}, {good}, {group.finished}")

    @case("a command that fails in the guest, and one that never ends, are told apart")
    def commands(self):
        self.machine = guest.Guest(self.directory, [])
        failed = self.machine.run("echo seen; exit 3")
        require(failed.status == 3 and failed.output == "seen\n", str(failed))
        endless = self.machine.run("echo begun; while true; do :; done", seconds=1)
        require(endless.status == 137 and endless.output.startswith("begun\n"), str(endless))
        try:
            endless.check()
        except guest.CommandFailed as error:
            require("took too long" in str(error), str(error))
        else:
            raise report.Failed("a killed command passed")

    @case("a guest that dies is an error with the end of its console")
    def death(self):
        if not self.machine:
            raise report.Failed("there is no guest")
        self.machine.check("echo last words > /dev/console")
        try:
            self.machine.run("echo b > /proc/sysrq-trigger; sleep 1000", seconds=1000)
        except guest.GuestError as error:
            require("last words" in str(error), str(error))
        else:
            raise report.Failed("a dead guest answered")
