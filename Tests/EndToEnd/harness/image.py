# image: builds the guest's kernel and initial file system from Debian packages.
#
# Owns: .build/guest. Called by: guest. Must not know: what runs in the guest, or what its disks are.

"""The guest: Debian's kernel, unpacked, and an initramfs of this machine's own tools and a shell.

The result is kept under .build/guest, in a directory named after everything that went into it.
"""

import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
SOURCES = os.path.join(ROOT, "Tests", "EndToEnd", "guest")
CACHE = os.path.join(ROOT, ".build", "guest")

# Programs copied from this machine, with the libraries they need. A trailing * takes all that begin so.
PROGRAMS = [
    "/usr/bin/sg_*",
    "/usr/bin/iscsi-test-cu",
    "/usr/bin/fio",
    "/usr/bin/lsscsi",
    "/usr/sbin/mke2fs",
    "/usr/sbin/e2fsck",
    "/usr/sbin/blkdiscard",
    "/usr/sbin/fstrim",
]
LINKS = {"usr/sbin/mkfs.ext4": "mke2fs"}
# Debian packages whose versions decide what the programs above are.
PACKAGES = ["busybox-static", "sg3-utils", "libiscsi-bin", "fio", "lsscsi", "e2fsprogs", "util-linux"]

# In this order; each after what it depends on.
MODULES = [
    "virtio_pci", "virtio_console", "virtio_scsi", "sd_mod", "sg", "crc32c_generic", "crc32c-intel", "ext4",
]


@dataclass(frozen=True)
class Image:
    """Paths of a built guest."""

    kernel: str
    initramfs: str


class ImageError(Exception):
    """The guest cannot be built; the text says why and what to do."""


def build(progress=print) -> Image:
    """The guest for this machine's packages, built if that was not done before."""
    package = _kernel_package()
    directory = os.path.join(CACHE, _key(package))
    image = Image(os.path.join(directory, "kernel"), os.path.join(directory, "initramfs"))
    if os.path.exists(image.kernel) and os.path.exists(image.initramfs):
        return image
    progress(f"Building the guest from {package} and {', '.join(PACKAGES)}")
    shutil.rmtree(CACHE, ignore_errors=True)
    scratch = os.path.join(CACHE, "scratch")
    os.makedirs(scratch)
    tree = _unpack_kernel(package, scratch)
    version = package.removeprefix("linux-image-")
    _write_kernel(os.path.join(tree, "boot", f"vmlinuz-{version}"), os.path.join(scratch, "kernel"))
    _write_initramfs(tree, version, os.path.join(scratch, "initramfs"))
    shutil.rmtree(tree)
    os.rename(scratch, directory)
    return image


def _run(*command: str, cwd: str | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode != 0:
        raise ImageError(f"'{' '.join(command)}' failed with status {result.returncode}:\n{result.stderr.strip()}")
    return result.stdout


def _kernel_package() -> str:
    """The package of the current kernel. The lists of packages are fetched if they have none."""
    for attempt in range(2):
        listing = subprocess.run(
            ["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True).stdout
        found = re.search(r"Depends: (linux-image-[0-9]\S*)", listing)
        if found:
            return found[1]
        if attempt == 0:
            _run("apt-get", "-q", "update")
    raise ImageError("apt knows no linux-image-amd64. Is a Debian mirror configured in /etc/apt?")


def _key(kernel_package: str) -> str:
    """A name for everything that decides how the guest comes out."""
    digest = hashlib.sha256()
    digest.update(kernel_package.encode())
    digest.update(_run("dpkg-query", "-W", *PACKAGES).encode())
    for path in [os.path.join(SOURCES, name) for name in sorted(os.listdir(SOURCES))] + [os.path.abspath(__file__)]:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _unpack_kernel(package: str, scratch: str) -> str:
    """Downloads the kernel's package, which is not to be installed here, and unpacks it."""
    tree = os.path.join(scratch, "package")
    try:
        _run("apt-get", "-q", "download", package, cwd=scratch)
    except ImageError:
        # The lists may name a version that the mirror has replaced since.
        _run("apt-get", "-q", "update")
        _run("apt-get", "-q", "download", package, cwd=scratch)
    archives = [name for name in os.listdir(scratch) if name.endswith(".deb")]
    _run("dpkg-deb", "-x", os.path.join(scratch, archives[0]), tree)
    os.remove(os.path.join(scratch, archives[0]))
    return tree


def _write_kernel(source: str, target: str) -> None:
    """Takes the compressed kernel out of its self-extracting file: emulated, that extraction costs seconds."""
    with open(source, "rb") as file:
        data = file.read()
    start = data.find(b"\xfd7zXZ\x00")
    if start < 0:
        shutil.copyfile(source, target)  # compressed otherwise: it boots too, later
        return
    with open(target, "wb") as file:
        file.write(lzma.LZMADecompressor().decompress(data[start:]))


def _write_initramfs(tree: str, version: str, target: str) -> None:
    archive = _Archive()
    for directory in ["etc", "dev", "proc", "sys", "tmp", "run", "mnt", "root"]:
        archive.directory(directory)
    archive.file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644)
    archive.file("etc/group", b"root:x:0:\n", 0o644)
    archive.copy("etc/mke2fs.conf", "/etc/mke2fs.conf", 0o644)
    for path in _programs():
        archive.copy(path.lstrip("/"), path, 0o755)
        for library in _libraries(path):
            archive.copy(library.lstrip("/"), library, 0o755)
    for name, destination in LINKS.items():
        archive.link(name, destination)
    busybox = shutil.which("busybox") or "/bin/busybox"
    archive.copy("bin/busybox", busybox, 0o755)
    for applet in _run(busybox, "--list").split():
        if not archive.provides(applet):
            archive.link(f"bin/{applet}", "/bin/busybox")
    names = []
    for module in _modules(tree, version):
        name = f"lib/modules/{os.path.basename(module).removesuffix('.xz')}"
        with open(module, "rb") as file:
            data = file.read()
        archive.file(name, lzma.decompress(data) if module.endswith(".xz") else data, 0o644)
        names.append(f"/{name}\n")
    archive.file("modules", "".join(names).encode(), 0o644)
    archive.copy("init", os.path.join(SOURCES, "init"), 0o755)
    archive.copy("bin/agent", os.path.join(SOURCES, "agent"), 0o755)
    with open(target, "wb") as file:
        file.write(archive.finish())


def _programs() -> list[str]:
    found = []
    for pattern in PROGRAMS:
        directory, name = os.path.split(pattern)
        if name.endswith("*"):
            matches = [entry for entry in sorted(os.listdir(directory)) if entry.startswith(name[:-1])]
        else:
            matches = [name] if os.path.exists(pattern) else []
        if not matches:
            raise ImageError(f"{pattern} is missing on this machine; run Scripts/install-packages")
        found += [os.path.join(directory, match) for match in matches]
    return found


def _libraries(program: str) -> list[str]:
    with open(program, "rb") as file:
        if file.read(4) != b"\x7fELF":
            return []
    return re.findall(r"(/\S+) \(0x", _run("ldd", program))


def _modules(tree: str, version: str) -> list[str]:
    """Paths of the modules in an order in which they can be loaded."""
    _run("depmod", "-b", tree, version)
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

    for module in MODULES:
        name = module.replace("-", "_")
        if name in by_name:
            add(by_name[name])
        elif name not in builtin:
            raise ImageError(f"the kernel {version} has no module {module}")
    return [os.path.join(base, path) for path in ordered]


def _module_name(path: str) -> str:
    return re.sub(r"\.ko(\.xz)?$", "", os.path.basename(path)).replace("-", "_")


class _Archive:
    """A cpio archive of the kind "newc", which the kernel unpacks (its Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        self._names: set[str] = set()
        self._number = 0

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
