# newer_qemu: the QEMU of Debian's backports, for what this release's own cannot do.
#
# Owns: .build/qemu. Called by: groups. Must not know: what it is for.

"""A QEMU that is unpacked and not installed, beside the one of the system."""

import os
import shutil
import subprocess

from . import image
from .targets import NotPossible

DIRECTORY = os.path.join(image.ROOT, ".build", "qemu")
PACKAGES = ["qemu-system-x86", "qemu-system-common", "qemu-system-data"]
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SECONDS = 300


def emulator() -> list[str]:
    """The program, with the options that it needs there; it is downloaded if that was not done before."""
    tree = os.path.join(DIRECTORY, "tree")
    if not os.path.isdir(tree):
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        try:
            _unpack(os.path.join(DIRECTORY, "scratch"))
        except (OSError, subprocess.SubprocessError) as error:
            shutil.rmtree(DIRECTORY, ignore_errors=True)
            raise NotPossible(f"no QEMU of Debian's backports can be had: {error}") from None
        os.rename(os.path.join(DIRECTORY, "scratch", "tree"), tree)
        shutil.rmtree(os.path.join(DIRECTORY, "scratch"))
    program = [os.path.join(tree, "usr", "bin", "qemu-system-x86_64"), "-L", os.path.join(tree, "usr", "share", "qemu"),
               "-L", "/usr/share/seabios", "-L", "/usr/share/qemu"]  # fmt: skip
    # Its libraries are those of this machine, if they are the ones it was built for.
    started = subprocess.run([*program, "--version"], capture_output=True, text=True)
    if started.returncode != 0:
        raise NotPossible(f"the QEMU of Debian's backports does not start here: {started.stderr.strip()}")
    return program


def _unpack(scratch: str) -> None:
    """Asks apt with lists of its own, so that nothing of this machine's configuration changes."""
    with open("/etc/os-release") as file:
        release = dict(line.strip().split("=", 1) for line in file if "=" in line)
    if release.get("ID") != "debian":
        raise OSError("this machine is no Debian")
    suite = f"{release['VERSION_CODENAME']}-backports"
    for name in ["lists/partial", "cache/archives/partial"]:
        os.makedirs(os.path.join(scratch, name))
    sources = os.path.join(scratch, "sources.list")
    with open(sources, "w") as file:
        file.write(f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {suite} main\n")
    options = ["-q", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null",
               "-o", f"Dir::State::lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache",
               "-o", "APT::Sandbox::User=root"]  # fmt: skip
    _run("apt-get", *options, "update", cwd=scratch)
    _run("apt-get", *options, "download", *(f"{name}/{suite}" for name in PACKAGES), cwd=scratch)
    for name in sorted(os.listdir(scratch)):
        if name.endswith(".deb"):
            _run("dpkg-deb", "-x", name, "tree", cwd=scratch)


def _run(*command: str, cwd: str) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise OSError(f"{command[0]}: {last}")
