# reservations: persistent reservations of two I_T nexuses, by sg_persist.
#
# Owns: these cases. Called by: run.py. Must not know: how the disks are served.

"""Two paths of a guest to one unit are two I_T nexuses: what one reserves is a conflict for the other."""

from harness.report import Skipped, case, require
from harness.targets import Daemon, Disk

from .guests import GuestGroup

UNIT_ATTENTION, RESERVATION_CONFLICT = 6, 24  # exit statuses of sg3_utils

# SPC-6 table 68 and 5.13.1: what a registered nexus that does not hold the reservation may do, by type.
READS_OF_OTHERS = {1: True, 3: False, 5: True, 6: True, 7: True, 8: True}
WRITES_OF_OTHERS = {1: False, 3: False, 5: True, 6: True, 7: True, 8: True}
# The same for a nexus that is not registered.
READS_OF_STRANGERS = {1: True, 3: False, 5: True, 6: False, 7: True, 8: False}

READ = "sg_raw -r 512 {sg} 28 00 00 00 00 00 00 00 01 00"
WRITE = "dd if=/dev/zero bs=512 count=1 2> /dev/null | sg_raw -s 512 {sg} 2a 00 00 00 00 00 00 00 01 00"


class Reservations(GuestGroup):
    """Each case leaves no registration behind, but for the last ones, which kill the target."""

    title = "Persistent reservations, seen from two paths"
    ordered = True
    queues = [1, 1]
    disks = [Disk("shared", "file", 64, lun=0, also=(1,))]

    def prepare(self) -> None:
        if self.kind is not Daemon:
            raise Skipped("not on the reference: scsi-hd has no persistent reservations")
        super().prepare()
        self._settle()

    def _on(self, path: str, command: str, *statuses: int) -> str:
        """The output of a tool on one of the two paths: 'shared' or 'shared@1'."""
        return self.guest.run(command.format(sg=self.device(path).generic)).check(*statuses)

    def _out(self, path: str, options: str, *statuses: int) -> str:
        return self._on(path, f"sg_persist --no-inquiry --out {options} {{sg}}", *statuses)

    def _in(self, path: str, options: str) -> str:
        return self._on(path, f"sg_persist --no-inquiry --in {options} {{sg}}")

    def _settle(self) -> None:
        """Takes the pending unit attention conditions of both paths."""
        for path in ("shared", "shared@1"):
            self._on(path, "until sg_turs {sg} > /dev/null 2>&1; do :; done")

    def _register_both(self) -> None:
        self._out("shared", "--register --param-sark=a1")
        self._out("shared@1", "--register --param-sark=b1")

    @case("sg_persist: two paths register, and read each other's keys and full status")
    def register(self):
        self._register_both()
        keys = self._in("shared", "--read-keys")
        require("0xa1" in keys and "0xb1" in keys, keys)
        status = self._in("shared@1", "--read-full-status")
        require(status.count("Transport Id") >= 2 or status.lower().count("transportid") >= 2, status)
        self._in("shared", "--report-capabilities")
        self._out("shared", "--clear --param-rk=a1")
        require("NO registered" in self._in("shared", "--read-keys"), "keys are left after CLEAR")
        self._settle()

    @case("each type of reservation: what the holder, a registrant and a stranger may do")
    def types(self):
        for kind in READS_OF_OTHERS:
            self._register_both()
            self._out("shared", f"--reserve --param-rk=a1 --prout-type={kind}")
            require("scope: LU_SCOPE" in self._in("shared@1", "--read-reservation"), f"type {kind}")
            for path, read, write in [
                ("shared", True, True), ("shared@1", READS_OF_OTHERS[kind], WRITES_OF_OTHERS[kind]),
            ]:  # fmt: skip
                self._on(path, READ, 0 if read else RESERVATION_CONFLICT)
                self._on(path, WRITE, 0 if write else RESERVATION_CONFLICT)
            self._out("shared@1", "--register --param-rk=b1 --param-sark=0")
            self._settle()
            self._on("shared@1", READ, 0 if READS_OF_STRANGERS[kind] else RESERVATION_CONFLICT)
            self._on("shared@1", WRITE, RESERVATION_CONFLICT)
            self._on("shared@1", "sg_turs {sg}")
            self._out("shared@1", f"--reserve --param-rk=b1 --prout-type={kind}", RESERVATION_CONFLICT)
            self._out("shared", f"--release --param-rk=a1 --prout-type={kind}")
            self._out("shared", "--clear --param-rk=a1")
            self._settle()

    @case("PREEMPT takes the reservation over; the other path is told")
    def preempt(self):
        self._register_both()
        self._out("shared", "--reserve --param-rk=a1 --prout-type=3")
        self._out("shared@1", "--preempt --param-rk=b1 --param-sark=a1 --prout-type=3")
        self._on("shared", "sg_turs {sg}", UNIT_ATTENTION)
        self._on("shared", READ, RESERVATION_CONFLICT)
        self._on("shared@1", WRITE)
        require("0xa1" not in self._in("shared", "--read-keys"), "the preempted key is still registered")
        self._out("shared@1", "--clear --param-rk=b1")
        self._settle()

    @case("RESERVE and RELEASE (6), and their conflict with registrations")
    def legacy(self):
        self._on("shared", "sg_raw {sg} 16 00 00 00 00 00")
        self._on("shared@1", READ, RESERVATION_CONFLICT)
        self._on("shared@1", "sg_raw {sg} 17 00 00 00 00 00")  # not the holder's: GOOD, and nothing is released
        self._on("shared@1", READ, RESERVATION_CONFLICT)
        self._on("shared", "sg_raw {sg} 17 00 00 00 00 00")
        self._on("shared@1", READ)
        self._register_both()
        self._out("shared@1", "--register --param-rk=b1 --param-sark=0")
        self._on("shared@1", "sg_raw {sg} 16 00 00 00 00 00", RESERVATION_CONFLICT)
        self._out("shared", "--clear --param-rk=a1")
        self._settle()

    @case("a reservation with APTPL is there after the target was killed and started again; one without is gone")
    def persist(self):
        self._register_both()
        self._out("shared", "--register --param-rk=a1 --param-sark=a2 --param-aptpl")
        self._out("shared", "--reserve --param-rk=a2 --prout-type=3")
        self._restart()
        keys = self._in("shared", "--read-keys")
        require("0xa2" in keys and "0xb1" in keys, keys)
        self._on("shared", WRITE)
        self._on("shared@1", READ, RESERVATION_CONFLICT)
        self._out("shared", "--register --param-rk=a2 --param-sark=a3")  # APTPL zero: not kept any more
        self._restart()
        require("NO registered" in self._in("shared", "--read-keys"), "registrations without APTPL survived")
        self._on("shared@1", WRITE)

    def _restart(self) -> None:
        self.target.kill()
        self.guest.close()
        self.target.start()
        self.boot()
        self._settle()
