# xenimage: builds what a Xen machine boots from, out of Debian packages: hypervisor, kernel, dom0, domU.
#
# Owns: .build/xen. Called by: xenmachine. Must not know: what runs in the machine.

"""Xen, a Linux kernel for dom0 and guests, and their initial file systems.

Nothing is installed: packages are downloaded and unpacked. The result is kept under .build/xen, in a directory named
after everything that went into it.
"""

import gzip
import hashlib
import lzma
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from harness import image

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(image.ROOT, ".build", "xen")

XEN = "4.17"
PACKAGES = [
    f"xen-hypervisor-{XEN}-amd64", f"xen-utils-{XEN}", "xenstore-utils", "libxenstore4", f"libxenmisc{XEN}",
    "libxencall1", "libxendevicemodel1", "libxenevtchn1", "libxenforeignmemory1", "libxengnttab1", "libxenhypfs1",
    "libxentoolcore1",
    "libxentoollog1", "libyajl2",
]
# Programs of this machine, beside those of the KVM guest's image.
PROGRAMS = ["/usr/bin/sg_*", "/usr/bin/iscsi-test-cu", "/usr/bin/fio", "/usr/bin/lsscsi", "/usr/sbin/mke2fs",
            "/usr/sbin/e2fsck"]
DOMU_PROGRAMS = ["/usr/bin/sg_inq", "/usr/bin/sg_luns", "/usr/bin/sg_reset", "/usr/bin/sg_readcap", "/usr/bin/sg_vpd",
                 "/usr/bin/fio", "/usr/bin/lsscsi", "/usr/sbin/mke2fs", "/usr/sbin/e2fsck"]

DOM0_MODULES = ["xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs", "sd_mod", "sg", "crc32c_generic",
                "crc32c-intel", "ext4", "xen-scsifront", "virtio_pci", "virtio_blk"]
# Loaded only where the kernel's own back end is measured: it takes every backend/vscsi device.
SCSIBACK_MODULES = ["configfs", "target_core_mod", "xen-scsiback"]
DOMU_MODULES = ["sd_mod", "sg", "crc32c_generic", "crc32c-intel", "ext4", "xen-scsifront"]


@dataclass(frozen=True)
class XenImage:
    """Paths of what a machine boots from."""

    hypervisor: str
    kernel: str
    dom0: str
    # The kernel and the initial file system of a guest, in dom0's /domu.
    domu: str


def build(progress=print) -> XenImage:
    """The image for this machine's packages, built if that was not done before."""
    kernel_package = image._kernel_package()
    directory = os.path.join(CACHE, _key(kernel_package))
    result = XenImage(*(os.path.join(directory, name) for name in ["xen", "kernel", "dom0", "domu"]))
    if all(os.path.exists(path) for path in vars(result).values()):
        return result
    progress(f"Building the Xen image from {kernel_package} and Xen {XEN}")
    shutil.rmtree(CACHE, ignore_errors=True)
    scratch = os.path.join(CACHE, "scratch")
    tree = os.path.join(scratch, "packages")
    os.makedirs(tree)
    _unpack([kernel_package, *PACKAGES], tree, scratch)
    version = kernel_package.removeprefix("linux-image-")
    with gzip.open(os.path.join(tree, "boot", f"xen-{XEN}-amd64.gz")) as source:
        _write(os.path.join(scratch, "xen"), source.read())
    _write_kernel(os.path.join(tree, "boot", f"vmlinuz-{version}"), os.path.join(scratch, "kernel"))
    image._run("depmod", "-b", tree, version)
    domu = _domu(tree, version)
    _write(os.path.join(scratch, "dom0"), _dom0(tree, version))
    _write(os.path.join(scratch, "domu"), _guest_files(os.path.join(scratch, "kernel"), domu))
    shutil.rmtree(tree)
    os.rename(scratch, directory)
    return result


def archive(files: dict[str, bytes], mode: int = 0o755) -> bytes:
    """A cpio archive of these files."""
    made = image._Archive()
    for name, data in files.items():
        made.file(name, data, mode)
    return made.finish()


def libraries(program: str) -> list[str]:
    """The shared libraries of a program of this machine."""
    return image._libraries(program)


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _key(kernel_package: str) -> str:
    digest = hashlib.sha256()
    digest.update(kernel_package.encode())
    digest.update(image._run("dpkg-query", "-W", *image.PACKAGES).encode())
    for directory, _, names in sorted(os.walk(HERE)):
        for name in sorted(names):
            if name in ["xenimage.py", "init"]:
                with open(os.path.join(directory, name), "rb") as file:
                    digest.update(file.read())
    return digest.hexdigest()[:16]


def _unpack(packages: list[str], tree: str, scratch: str) -> None:
    for attempt in range(2):
        try:
            image._run("apt-get", "-q", "download", *packages, cwd=scratch)
            break
        except image.ImageError:
            if attempt == 1:
                raise
            image._run("apt-get", "-q", "update")
    for name in sorted(os.listdir(scratch)):
        if name.endswith(".deb"):
            image._run("dpkg-deb", "-x", os.path.join(scratch, name), tree)
            os.remove(os.path.join(scratch, name))


def _write_kernel(source: str, target: str) -> None:
    """Xen and libxl take the kernel as it is when unpacked: emulated, unpacking it costs seconds."""
    with open(source, "rb") as file:
        data = file.read()
    start = data.find(b"\xfd7zXZ\x00")
    if start < 0:
        raise image.ImageError(f"{source} is not compressed by xz; teach xenimage.py how it is")
    _write(target, lzma.LZMADecompressor().decompress(data[start:]))
    subprocess.run(["strip", "--strip-debug", target], check=False)


def _skeleton(init: str) -> image._Archive:
    made = image._Archive()
    for directory in ["etc", "dev", "proc", "sys", "tmp", "run", "mnt", "root", "var/log/xen/console", "var/lib/xen",
                      "var/lib/xenstored", "etc/xen/scripts"]:
        made.directory(directory)
    made.link("var/run", "/run")
    made.link("var/lock", "/run")
    made.file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n", 0o644)
    made.file("etc/group", b"root:x:0:\n", 0o644)
    made.copy("etc/mke2fs.conf", "/etc/mke2fs.conf", 0o644)
    made.copy("init", init, 0o755)
    return made


def _finish(made: image._Archive, programs: list[str]) -> bytes:
    for path in _expand(programs):
        made.copy(path.lstrip("/"), path, 0o755)
        for library in libraries(path):
            made.copy(library.lstrip("/"), library, 0o755)
    made.link("usr/sbin/mkfs.ext4", "mke2fs")
    busybox = shutil.which("busybox") or "/bin/busybox"
    made.copy("bin/busybox", busybox, 0o755)
    for applet in image._run(busybox, "--list").split():
        if not made.provides(applet):
            made.link(f"bin/{applet}", "/bin/busybox")
    return made.finish()


def _expand(programs: list[str]) -> list[str]:
    found = []
    for pattern in programs:
        directory, name = os.path.split(pattern)
        stem = name.removesuffix("*")
        matches = [entry for entry in sorted(os.listdir(directory))
                   if entry == name or name.endswith("*") and entry.startswith(stem)]
        if not matches:
            raise image.ImageError(f"{pattern} is missing on this machine; run Scripts/install-packages")
        found += [os.path.join(directory, match) for match in matches]
    return found


def _add_modules(made: image._Archive, tree: str, version: str, wanted: list[str], listing: str) -> None:
    """Adds modules with what they need; `listing` names them in an order in which they can be loaded."""
    base = os.path.join(tree, "lib", "modules", version)
    depends: dict[str, list[str]] = {}
    with open(os.path.join(base, "modules.dep")) as file:
        for line in file:
            path, _, rest = line.partition(":")
            depends[path] = rest.split()
    by_name = {_module_name(path): path for path in depends}
    with open(os.path.join(base, "modules.builtin")) as file:
        builtin = {_module_name(line.strip()) for line in file}
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
            raise image.ImageError(f"the kernel {version} has no module {module}")
    names = []
    for path in ordered:
        name = f"lib/modules/{os.path.basename(path).removesuffix('.xz')}"
        with open(os.path.join(base, path), "rb") as file:
            data = file.read()
        made.file(name, lzma.decompress(data) if path.endswith(".xz") else data, 0o644)
        names.append(f"/{name}\n")
    made.file(listing, "".join(names).encode(), 0o644)


def _module_name(path: str) -> str:
    return re.sub(r"\.ko(\.xz)?$", "", os.path.basename(path)).replace("-", "_")


def _dom0(tree: str, version: str) -> bytes:
    made = _skeleton(os.path.join(HERE, "dom0", "init"))
    _add_modules(made, tree, version, DOM0_MODULES, "modules")
    _add_modules(made, tree, version, SCSIBACK_MODULES, "modules.scsiback")
    made.file("etc/xen/xl.conf", b'autoballoon="off"\nclaim_mode=0\n', 0o644)
    tools = os.path.join(tree, "usr", "lib", f"xen-{XEN}", "bin")
    os.environ["LD_LIBRARY_PATH"] = os.path.join(tree, "usr", "lib", "x86_64-linux-gnu")
    try:
        for name in ["xl", "xenstored", "xenconsoled", "xen-init-dom0", "xen-shadow-stub"]:
            _add_tool(made, tree, os.path.join(tools, name), f"usr/sbin/{name}")
        for name in ["xenstore-read", "xenstore-write", "xenstore-ls", "xenstore-rm", "xenstore-chmod",
                     "xenstore-watch", "xenstore-list", "xenstore-exists"]:
            _add_tool(made, tree, os.path.join(tree, "usr", "bin", name), f"usr/bin/{name}")
        made.directory(f"usr/lib/xen-{XEN}/bin")
    finally:
        del os.environ["LD_LIBRARY_PATH"]
    return _finish(made, PROGRAMS)


def _add_tool(made: image._Archive, tree: str, path: str, name: str) -> None:
    if not os.path.exists(path):
        return
    # Debian makes one program serve as several, by links.
    made.copy(name, os.path.realpath(path), 0o755)
    for library in libraries(path):
        made.copy("usr/lib/x86_64-linux-gnu/" + os.path.basename(library) if library.startswith(tree)
                  else library.lstrip("/"), library, 0o755)


def _domu(tree: str, version: str) -> bytes:
    made = _skeleton(os.path.join(HERE, "domu", "init"))
    _add_modules(made, tree, version, DOMU_MODULES, "modules")
    return _finish(made, DOMU_PROGRAMS)


def _guest_files(kernel: str, initramfs: bytes) -> bytes:
    made = image._Archive()
    made.copy("domu/kernel", kernel, 0o644)
    made.file("domu/initramfs", initramfs, 0o644)
    return made.finish()
