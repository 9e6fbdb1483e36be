# commands: sg3_utils' tools for what a file system never sends.
#
# Owns: these cases. Called by: run.py. Must not know: how the disks are served.

"""The command set beyond reading and writing, by tools that we did not write, with checked results."""

import re
import time

from harness.report import Skipped, case, require
from harness.targets import Daemon, Disk

from .guests import GuestGroup

# Exit statuses of sg3_utils (its man page): what the device server answered.
NOT_READY, ILLEGAL_REQUEST, UNIT_ATTENTION, INVALID_OPERATION_CODE, MISCOMPARE = 2, 5, 6, 9, 14

# Operation code and service action of what a disk has beyond what `disks` uses.
OPERATIONS = [
    "sg_opcodes -o 0x16 {sg}", "sg_opcodes -o 0x17 {sg}", "sg_opcodes -o 0x1b {sg}", "sg_opcodes -o 0x1c {sg}",
    "sg_opcodes -o 0x1d {sg}", "sg_opcodes -o 0x2e {sg}", "sg_opcodes -o 0x34 {sg}", "sg_opcodes -o 0x37 {sg}",
    "sg_opcodes -o 0x3b,2 {sg}", "sg_opcodes -o 0x3c,2 {sg}", "sg_opcodes -o 0x4c {sg}", "sg_opcodes -o 0x4d {sg}",
    "sg_opcodes -o 0x5e,0 {sg}", "sg_opcodes -o 0x5e,3 {sg}", "sg_opcodes -o 0x5f,0 {sg}", "sg_opcodes -o 0x5f,7 {sg}",
    "sg_opcodes -o 0x51 {sg}", "sg_opcodes -o 0x53 {sg}", "sg_opcodes -o 0x7f,6 {sg}", "sg_opcodes -o 0x7f,7 {sg}",
    "sg_opcodes -o 0x89 {sg}", "sg_opcodes -o 0x8b {sg}", "sg_opcodes -o 0x90 {sg}", "sg_opcodes -o 0x9e,0x12 {sg}",
    "sg_opcodes -o 0xa3,0x5 {sg}", "sg_opcodes -o 0xa3,0xa {sg}", "sg_opcodes -o 0xa3,0xf {sg}",
    "sg_opcodes -o 0xa4,0x6 {sg}", "sg_opcodes -o 0xa4,0xf {sg}", "sg_opcodes -o 0xae {sg}",
]  # fmt: skip


class Commands(GuestGroup):
    """Memory, a file, and a unit whose medium can be taken out."""

    title = "sg3_utils' tools on the command set of a disk"
    queues = [1, 1]
    disks = [
        Disk("ram", "ram", 64, lun=0, also=(1,)),
        Disk("file", "file", 64, lun=1, also=(1,)),
        Disk("cartridge", "ram", 16, lun=2, also=(1,), removable=True),
    ]

    def prepare(self) -> None:
        if self.kind is not Daemon:
            raise Skipped("not on the reference: scsi-hd has few of these commands")
        super().prepare()

    def _tool(self, command: str, *statuses: int, device: str = "ram") -> str:
        """The output of a tool on a disk; {sg} and {sd} stand for its names."""
        names = self.device(device)
        return self.guest.run(command.format(sg=names.generic, sd=names.block)).check(*statuses)

    def _settle(self, device: str) -> None:
        """Takes the unit attention conditions that a case left pending for this path."""
        self._tool("while ! sg_turs {sg} > /dev/null 2>&1; do :; done", device=device)

    @case("sg_opcodes -o: each command is reported with its usage data")
    def operation_codes(self):
        for command in OPERATIONS:
            output = self._tool(command)
            require("supported [conforming" in output, f"{command}:\n{output}")
        output = self._tool("sg_opcodes --rctd {sg}")
        require("timeout" in output.lower(), output)

    @case("sg_compare_and_write: writes on equality, and shows where it differs")
    def compare_and_write(self):
        for device in ("ram", "file"):
            self._tool("dd if=/dev/zero bs=512 count=1 of={sd} oflag=direct seek=40", device=device)
            self.guest.check("{ dd if=/dev/zero bs=512 count=1; yes | dd bs=512 count=1; } > /run/pair 2> /dev/null")
            command = "sg_compare_and_write --in=/run/pair --lba=40 --num=1 {sg}"
            self._tool(command, device=device)
            output = self._tool(command, MISCOMPARE, device=device)
            require("Miscompare at byte offset: 0 " in output, output)

    @case("sg_raw: XPWRITE writes data on zeros, and inverts it back when it comes again as the long form")
    def exclusive_or(self):
        for device in ("ram", "file"):
            self._tool("dd if=/dev/zero bs=512 count=2 of={sd} oflag=direct seek=48", device=device)
            self._tool("yes parity | dd of=/run/data bs=512 count=2 iflag=fullblock", device=device)
            send, read = "sg_raw --send=1024 --infile=/run/data {sg} ", "dd if={sd} bs=512 skip=48 count=2 iflag=direct"
            self._tool(send + "51 00 00 00 00 30 00 00 02 00", device=device)
            self._tool(read + " | cmp - /run/data", device=device)
            self._tool(send + "7f 00 00 00 00 00 00 18 00 06 00 00 " + "00 " * 7 + "30 " + "00 " * 11 + "02",
                       device=device)  # fmt: skip
            self._tool(read + " | cmp -n 1024 - /dev/zero", device=device)

    @case("sg_get_lba_status: a file's holes and extents, before and after an UNMAP")
    def allocation(self):
        for device in ("ram", "file"):
            self._tool("yes | dd of={sd} bs=1M seek=8 count=1 oflag=direct iflag=fullblock", device=device)
            state = "sg_get_lba_status --brief --brief --lba=16384 {sg}"
            require(self._tool(state, device=device).strip() == "0", f"{device}: what was written is not mapped")
            self._tool("sg_unmap --lba=16384 --num=2048 --force {sg} || sg_unmap --lba=16384 --num=2048 {sg}",
                       device=device)  # fmt: skip
            require(self._tool(state, device=device).strip() == "1", f"{device}: not deallocated by UNMAP")
            output = self._tool("sg_get_lba_status --maxlen=4096 {sg}", device=device)
            require("mapped" in output and "deallocated" in output, output)

    @case("sg_write_x: WRITE ATOMIC where the medium is atomic, refused where it is not")
    def atomic(self):
        limit = "sg_vpd -p bl {sg} | grep -i 'maximum atomic transfer length:'"
        for device in ("ram", "file"):
            blocks = int(re.search(r": *(\d+)", self._tool(limit, device=device))[1])
            self._tool("yes atomic | dd of=/run/data bs=512 count=8 iflag=fullblock", device=device)
            command = "sg_write_x --atomic=0 --in=/run/data --lba=96 --num=8 {sg}"
            if blocks == 0:
                self._tool(command, ILLEGAL_REQUEST, INVALID_OPERATION_CODE, device=device)
                continue
            self._tool(command, *([0] if blocks >= 8 else [ILLEGAL_REQUEST]), device=device)
            if blocks >= 8:
                self._tool("dd if={sd} bs=512 skip=96 count=8 iflag=direct | cmp - /run/data", device=device)

    @case("sg_verify, sg_write_verify, sg_write_same, sg_sync, sg_seek: each form ends as it must")
    def media_access(self):
        self.guest.check("yes verify | dd of=/run/data bs=512 count=8 iflag=fullblock; tr v V < /run/data > /run/other")
        for device in ("ram", "file"):
            self._tool("sg_write_verify --lba=128 --num=8 --in=/run/data {sg}", device=device)
            self._tool("sg_write_verify --16 --bytchk=1 --lba=128 --num=8 --in=/run/data {sg}", device=device)
            self._tool("sg_verify --lba=128 --count=8 --ndo=4096 --in=/run/data {sg}", device=device)
            self._tool("sg_verify --16 --lba=128 --count=8 --ndo=4096 --quiet --in=/run/other {sg}", MISCOMPARE,
                       device=device)  # fmt: skip
            self._tool("sg_write_same --16 --lba=128 --num=8 --ndob {sg}", device=device)
            self._tool("sg_verify --lba=128 --count=8 --ndo=512 --ebytchk=3 --0 {sg}", device=device)
            self._tool("sg_sync --immed {sg}; sg_sync --16 --lba=128 --count=8 {sg}", device=device)
            self._tool("sg_seek --pre-fetch --lba=0 --num-blocks=64 {sg}", 0, 25, device=device)
            self._tool("sg_seek --pre-fetch --10 --immed --lba=0 --num-blocks=64 {sg}", 0, 25, device=device)

    @case("sg_logs: pages and subpages are listed, decoded, and count what was done")
    def logs(self):
        listed = self._tool("sg_logs --list --list {sg}")
        for page in ["0x00", "0x02", "0x03", "0x05", "0x0c", "0x0d", "0x0e", "0x15", "0x18", "0x19", "0x2f"]:
            require(page in listed, f"no page {page}:\n{listed}")
        self._tool("sg_logs --All {sg}")

        def reads() -> int:
            output = self._tool("sg_logs --page=0x19 {sg}")
            return int(re.search(r"number of read commands = (\d+)", output)[1])

        before = reads()
        self._tool("dd if={sd} bs=4096 count=7 iflag=direct of=/dev/null")
        require(reads() - before == 7, f"7 reads, and the page counts {reads() - before}")

    @case("sg_modes, sg_wr_mode: current, default and saved values; a saved one survives a reset")
    def modes(self):
        for control in range(4):
            output = self._tool(f"sg_modes -a -a --control={control} {{sg}}")
            for page in ["Caching", "Control", "Power condition", "Informational exceptions control"]:
                require(page in output, output)
        # Byte 2 bit 2 of the control page is D_SENSE (SPC-4 7.5.8).
        original = self._page("0xa", 0)
        wanted = original[:2] + [original[2] ^ 0x04] + original[3:]
        text = ",".join(f"{byte & 0x3F if index == 0 else byte:x}" for index, byte in enumerate(wanted))
        self._tool(f"sg_wr_mode --page=a --save --contents={text} {{sg}}")
        require(self._page("0xa", 3)[2] == wanted[2], "D_SENSE was not saved")
        self._tool("sg_reset -N -d {sg}")
        self._settle("ram")
        require(self._page("0xa", 0)[2] == wanted[2], "the saved D_SENSE is not the current one after a reset")
        text = ",".join(f"{byte & 0x3F if index == 0 else byte:x}" for index, byte in enumerate(original))
        self._tool(f"sg_wr_mode --page=a --save --contents={text} {{sg}}")
        self._settle("ram@1")

    def _page(self, page: str, control: int) -> list[int]:
        """A mode page's bytes."""
        output = self._tool(f"sg_modes --dbd --page={page} --control={control} -R {{sg}}")
        data = [int(word, 16) for word in output.split()]
        return data[8:] if len(data) > 12 else data

    @case("sg_rtpg: one target port group with all ports, active")
    def port_groups(self):
        for device in ("ram", "ram@1"):
            output = self._tool("sg_rtpg --decode {sg}", device=device)
            require("active/optimized" in output, output)
            require("target port count : 02" in output, f"not all ports:\n{output}")
            self._tool("sg_rtpg --extended {sg}", device=device)

    @case("sg_ident: information is kept for each unit, and seen through every path")
    def identifying_information(self):
        self._tool("printf 'rack 7, slot 3' | sg_ident --set {sg}")
        self._settle("ram@1")
        require("rack 7, slot 3" in self._tool("sg_ident --ascii {sg}", device="ram@1"), "not seen on the other path")
        require("rack" not in self._tool("sg_ident --ascii {sg}", device="file"), "seen on another unit")
        self._tool("sg_ident --clear {sg}")
        require("rack" not in self._tool("sg_ident --ascii {sg}"), "not cleared")

    @case("sg_timestamp: can be set, and goes on")
    def timestamp(self):
        self._tool("sg_timestamp --seconds=1700000000 {sg}")
        self._settle("ram@1")
        first = int(self._tool("sg_timestamp --srep {sg}").split()[-1])
        require(1_700_000_000 <= first < 1_700_000_600, f"set to 1700000000, reported {first}")
        time.sleep(1.1)
        second = int(self._tool("sg_timestamp --srep {sg}", device="ram@1").split()[-1])
        require(first < second < first + 600, f"{first}, and a second later {second}")

    @case("sg_write_buffer, sg_read_buffer, sg_senddiag: the echo comes back, the self-test passes")
    def diagnostics(self):
        self.guest.check("yes echo | dd of=/run/data bs=256 count=1")
        self._tool("sg_write_buffer --mode=0xa --in=/run/data {sg}")
        # sg_read_buffer 1.46 sends an allocation length of zero in these modes, whatever --length says.
        read = "sg_raw --binary --request=256 {sg} 3c %s 00 00 00 00 00 01 00 00 2> /dev/null | cmp - /run/data"
        self._tool(read % "0a")
        self._tool("sg_write_buffer --mode=2 --id=0 --in=/run/data {sg}")
        self._tool(read % "02")
        self._tool("sg_read_buffer --mode=3 {sg}")
        self._tool("sg_senddiag --test {sg}")
        require("0x0" in self._tool("sg_senddiag --list {sg}"), "page 0 is not listed")

    @case("sg_prevent, sg_start: a medium is kept while removal is prevented, ejected, missed and loaded")
    def removable(self):
        require(re.search(r"RMB=1|\[removable", self._tool("sg_inq {sg}", device="cartridge")), "not removable")
        self._tool("sg_prevent --prevent=1 {sg}", device="cartridge")
        output = self._tool("sg_start --eject {sg}", ILLEGAL_REQUEST, device="cartridge@1")
        self._tool("sg_prevent --allow {sg}", device="cartridge")
        self._tool("sg_start --eject {sg}", device="cartridge@1")
        self._tool("sg_turs {sg}", NOT_READY, UNIT_ATTENTION, device="cartridge")
        self._tool("sg_turs {sg}", NOT_READY, device="cartridge")
        self._tool("sg_start --load {sg}", device="cartridge")
        self._tool("sg_turs {sg}", UNIT_ATTENTION, device="cartridge@1")
        self._tool("sg_turs {sg}", device="cartridge@1")
        self._settle("cartridge")
        return output.strip().splitlines()[0]

    @case("sg_start: stopped, started, idle and standby, as REQUEST SENSE tells")
    def power(self):
        self._tool("sg_start --stop {sg}")
        self._tool("sg_turs {sg}", NOT_READY, device="ram@1")
        self._tool("sg_start --start {sg}")
        self._tool("sg_turs {sg}", device="ram@1")
        for condition, said in ((2, "idle"), (3, "standby")):
            self._tool(f"sg_start --pc={condition} {{sg}}")
            output = self._tool("sg_requests {sg} 2>&1", 0, 2, 6)
            require(said in output.lower(), f"not {said}:\n{output}")
        self._tool("sg_start --pc=1 {sg}")
        self._tool("dd if={sd} bs=4096 count=1 iflag=direct of=/dev/null")

    @case("the guest's kernel logged no error that was not provoked")
    def kernel_log(self):
        found = self.guest.run("dmesg | grep -E 'WARNING:|BUG:|Call Trace|blocked for more'").output
        require(not found, found)
