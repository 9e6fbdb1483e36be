# xenmachine: a machine with Xen in QEMU: boots, runs one script in dom0, and ends.
#
# Owns: the QEMU process and its files. Called by: groups/xen. Must not know: what the script does.

"""Boots Xen and a PV dom0 under QEMU's emulation; KVM does not run Xen everywhere, and the emulation takes seconds."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass

from xen import xenimage
from harness import processes
from harness.initramfs import Archive, libraries

XEN_ARGUMENTS = (
    "com1=115200,8n1 console=com1 loglvl=warning guest_loglvl=warning dom0_mem={dom0}M,max:{dom0}M dom0_max_vcpus=1"
    " noreboot=no sched=credit2 spec-ctrl=no xpti=no pv-l1tf=no smt=0 watchdog=0"
)
LINUX_ARGUMENTS = (
    "console=hvc0 earlyprintk=xen rdinit=/init panic=5 mitigations=off random.trust_cpu=on tsc=unstable clocksource=xen"
    " nokaslr"
)
CPU = "qemu64,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,+rdtscp"


@dataclass
class Outcome:
    """How a run ended."""

    # What the script printed.
    output: str
    # Its exit status; None if the machine did not get that far.
    status: int | None
    # What Xen and dom0's kernel printed.
    console: str
    seconds: float


def run(script: str, files: dict[str, str], seconds: float, domu: bool = False, texts: dict[str, str] | None = None,
        progress=None, counted: bool = False) -> Outcome:
    """Runs a shell script in dom0.

    `counted`: the clock counts instructions, eight nanoseconds for each, and jumps while there are none: what the
    machine measures, and what it waits for, does not depend on what else is done here.

    `files` are copied from this machine, with their libraries: path in dom0 → path here. `texts` are files by content.
    """
    made = xenimage.build()
    directory = tempfile.mkdtemp(prefix="targetd-xen-")
    try:
        initrd = os.path.join(directory, "initrd")
        _write_initrd(initrd, made, domu, script, files, texts or {})
        memory, dom0 = (2816, 1280) if domu else (1100, 768)
        return _boot(made, initrd, directory, seconds, memory, dom0, progress, counted)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write_initrd(path: str, made: xenimage.XenImage, domu: bool, script: str, files: dict[str, str],
                  texts: dict[str, str]) -> None:
    contents = Archive()
    contents.file("script", script.encode(), 0o755)
    for name, text in texts.items():
        contents.file(name.lstrip("/"), text.encode(), 0o755)
    for name, source in files.items():
        contents.copy(name.lstrip("/"), source, 0o755)
        for library in libraries(source):
            contents.copy(library.lstrip("/"), library, 0o755)
    with open(path, "wb") as target:
        for part in [made.dom0] + ([made.domu] if domu else []):
            with open(part, "rb") as source:
                shutil.copyfileobj(source, target)
        target.write(contents.finish())


def _boot(made: xenimage.XenImage, initrd: str, directory: str, seconds: float, memory: int, dom0: int,
          progress, counted: bool) -> Outcome:
    console = os.path.join(directory, "console")
    result = os.path.join(directory, "result")
    linux = LINUX_ARGUMENTS.replace(",", ",,")
    clock = ["-accel", "tcg,thread=single", "-icount", "shift=3,sleep=off,align=off"] if counted else [
        "-accel", "tcg,thread=multi"]  # fmt: skip
    command = [
        "qemu-system-x86_64", "-machine", "q35", *clock, "-cpu", CPU, "-m", str(memory),
        "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none", "-kernel",
        made.hypervisor,
        "-append", XEN_ARGUMENTS.format(dom0=dom0), "-initrd", f"{made.kernel} {linux},{initrd}", "-serial",
        f"file:{console}", "-serial", f"file:{result}",
    ]
    begin = time.monotonic()
    process = processes.start(command, os.path.join(directory, "qemu"))
    printed = 0
    while process.poll() is None and time.monotonic() - begin < seconds:
        time.sleep(0.2)
        if progress:
            text = _read(result)
            complete = text.rfind("\n") + 1
            for line in text[printed:complete].splitlines():
                progress(line)
            printed = max(printed, complete)
    processes.kill(process)
    text = _read(result)
    if progress:
        for line in text[printed:].splitlines():
            progress(line)
    status = re.search(r"^@@status (\d+)$", text, re.MULTILINE)
    output = re.sub(r"^@@status \d+\n?", "", text, flags=re.MULTILINE)
    qemu = _read(os.path.join(directory, "qemu"))
    return Outcome(output, int(status[1]) if status else None, _read(console) + qemu, time.monotonic() - begin)


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace").replace("\r", "")
    except FileNotFoundError:
        return ""


def missing() -> str | None:
    """What this machine lacks for running Xen; None if nothing."""
    if not shutil.which("qemu-system-x86_64"):
        return "qemu-system-x86_64 is not installed"
    known = subprocess.run(["apt-cache", "show", xenimage.PACKAGES[0]], capture_output=True)
    return None if known.returncode == 0 else f"apt knows no package {xenimage.PACKAGES[0]}"
