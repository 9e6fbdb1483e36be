# initramfs: what an emulated machine boots from, made of Debian packages and of this machine's own programs.
#
# Owns: nothing that stays. Called by: image, xen/xenimage. Must not know: what machine it is for.

"""Debian's kernel and packages, unpacked but not installed, and archives that a kernel takes as first file system."""

import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


class ImageError(Exception):
    """A machine's image cannot be built; the text says why and what to do."""


def run(*command: str, cwd: str | None = None, environment: dict[str, str] | None = None) -> str:
    """What a command prints."""
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if result.returncode != 0:
        raise ImageError(f"'{' '.join(command)}' failed with status {result.returncode}:\n{result.stderr.strip()}")
    return result.stdout


# Debian packages, downloaded.


def kernel_package() -> str:
    """The package of the current kernel. The lists of packages are fetched if they have none."""
    for attempt in range(2):
        listing = subprocess.run(
            ["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True).stdout
        found = re.search(r"Depends: (linux-image-[0-9]\S*)", listing)
        if found:
            return found[1]
        if attempt == 0:
            run("apt-get", "-q", "update")
    raise ImageError("apt knows no linux-image-amd64. Is a Debian mirror configured in /etc/apt?")


def key(kernel: str, packages: list[str], sources: list[str]) -> str:
    """A name for everything that decides how an image comes out: packages by their versions, files by their content."""
    digest = hashlib.sha256()
    digest.update(kernel.encode())
    digest.update(run("dpkg-query", "-W", *packages).encode())
    for path in [*sources, os.path.abspath(__file__)]:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:16]


def unpack(packages: list[str], tree: str, scratch: str) -> None:
    """Downloads packages into `scratch`, which are not to be installed here, and unpacks them into `tree`."""
    try:
        run("apt-get", "-q", "download", *packages, cwd=scratch)
    except ImageError:
        # The lists may name a version that the mirror has replaced since.
        run("apt-get", "-q", "update")
        run("apt-get", "-q", "download", *packages, cwd=scratch)
    for name in sorted(os.listdir(scratch)):
        if name.endswith(".deb"):
            run("dpkg-deb", "-x", os.path.join(scratch, name), tree)
            os.remove(os.path.join(scratch, name))


def unpacked_kernel(source: str) -> bytes | None:
    """The kernel out of its self-extracting file: emulated, that extraction costs seconds. None: it is not in xz."""
    with open(source, "rb") as file:
        data = file.read()
    start = data.find(b"\xfd7zXZ\x00")
    return None if start < 0 else lzma.LZMADecompressor().decompress(data[start:])


# This machine's programs.


def expand(patterns: list[str]) -> list[str]:
    """Paths of programs. A trailing * takes all that begin so."""
    found = []
    for pattern in patterns:
        directory, name = os.path.split(pattern)
        if name.endswith("*"):
            matches = [entry for entry in sorted(os.listdir(directory)) if entry.startswith(name[:-1])]
        else:
            matches = [name] if os.path.exists(pattern) else []
        if not matches:
            raise ImageError(f"{pattern} is missing on this machine; run Scripts/install-packages")
        found += [os.path.join(directory, entry) for entry in matches]
    return found


def libraries(program: str, environment: dict[str, str] | None = None) -> list[str]:
    """The shared libraries of a program."""
    with open(program, "rb") as file:
        if file.read(4) != b"\x7fELF":
            return []
    return re.findall(r"(/\S+) \(0x", run("ldd", program, environment=environment))


# Kernel modules.


def modules(tree: str, version: str, wanted: list[str]) -> list[str]:
    """Paths of modules, and of those that they need, in an order in which they can be loaded."""
    run("depmod", "-b", tree, version)
    base = os.path.join(tree, "lib", "modules", version)
    depends: dict[str, list[str]] = {}
    with open(os.path.join(base, "modules.dep")) as file:
        for line in file:
            path, _, rest = line.partition(":")
            depends[path] = rest.split()
    with open(os.path.join(base, "modules.builtin")) as file:
        builtin = {_module_name(line.strip()) for line in file}
    by_name = {_module_name(path): path for path in depends}
    ordered: list[str] = []

    def add(path: str) -> None:
        if path not in ordered:
            for needed in depends[path]:
                add(needed)
            ordered.append(path)

    for module in wanted:
        name = module.replace("-", "_")
        if name in by_name:
            add(by_name[name])
        elif name not in builtin:
            raise ImageError(f"the kernel {version} has no module {module}")
    return [os.path.join(base, path) for path in ordered]


def _module_name(path: str) -> str:
    return re.sub(r"\.ko(\.xz)?$", "", os.path.basename(path)).replace("-", "_")


class Archive:
    """A cpio archive of the kind "newc", which the kernel unpacks (its Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        self._names: set[str] = set()
        self._number = 0

    def skeleton(self, init: str, *directories: str) -> None:
        """What each file system has: directories, users, and `init` as its first program."""
        for directory in ["etc", "dev", "proc", "sys", "tmp", "run", "mnt", "root", *directories]:
            self.directory(directory)
        self.file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644)
        self.file("etc/group", b"root:x:0:\n", 0o644)
        self.copy("etc/mke2fs.conf", "/etc/mke2fs.conf", 0o644)
        self.copy("init", init, 0o755)

    def programs(self, patterns: list[str]) -> None:
        """Adds programs of this machine with the libraries they need, and for all other commands busybox."""
        for path in expand(patterns):
            self.copy(path.lstrip("/"), path, 0o755)
            for library in libraries(path):
                self.copy(library.lstrip("/"), library, 0o755)
        self.link("usr/sbin/mkfs.ext4", "mke2fs")
        busybox = shutil.which("busybox") or "/bin/busybox"
        self.copy("bin/busybox", busybox, 0o755)
        for applet in run(busybox, "--list").split():
            if not self.provides(applet):
                self.link(f"bin/{applet}", "/bin/busybox")

    def modules(self, paths: list[str], listing: str = "modules") -> None:
        """Adds kernel modules, unpacked; the file `listing` names them in their order."""
        names = []
        for path in paths:
            name = f"lib/modules/{os.path.basename(path).removesuffix('.xz')}"
            with open(path, "rb") as file:
                data = file.read()
            self.file(name, lzma.decompress(data) if path.endswith(".xz") else data, 0o644)
            names.append(f"/{name}\n")
        self.file(listing, "".join(names).encode(), 0o644)

    def provides(self, command: str) -> bool:
        """Whether a program of this name is there already."""
        return any(f"{directory}/{command}" in self._names for directory in ["usr/bin", "usr/sbin", "bin", "sbin"])

    def directory(self, name: str) -> None:
        if name and name not in self._names:
            self.directory(os.path.dirname(name))
            self._add(name, 0o040755, b"")

    def file(self, name: str, data: bytes, mode: int) -> None:
        if name not in self._names:
            self.directory(os.path.dirname(name))
            self._add(name, 0o100000 | mode, data)

    def copy(self, name: str, source: str, mode: int) -> None:
        with open(source, "rb") as file:
            self.file(name, file.read(), mode)

    def link(self, name: str, destination: str) -> None:
        if name not in self._names:
            self.directory(os.path.dirname(name))
            self._add(name, 0o120777, destination.encode())

    def finish(self) -> bytes:
        self._add("TRAILER!!!", 0, b"")
        return self._bytes.getvalue()

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._names.add(name)
        self._number += 1
        encoded = name.encode() + b"\0"
        fields = [self._number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0]
        self._bytes.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        self._pad()
        self._bytes.write(data)
        self._pad()

    def _pad(self) -> None:
        self._bytes.write(b"\0" * (-self._bytes.tell() % 4))
