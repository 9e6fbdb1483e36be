# image: builds the guest's kernel and initial file system from Debian packages.
#
# Owns: .build/guest. Called by: guest. Must not know: what runs in the guest, or what its disks are.

"""The guest: Debian's kernel, unpacked, and an initramfs of this machine's own tools and a shell.

The result is kept under .build/guest, in a directory named after everything that went into it.
"""

import os
import shutil
from dataclasses import dataclass

from . import initramfs
from .initramfs import ROOT, ImageError  # noqa: F401

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
    "/usr/sbin/dmsetup",
]
# Debian packages whose versions decide what the programs above are.
PACKAGES = ["busybox-static", "sg3-utils", "libiscsi-bin", "fio", "lsscsi", "e2fsprogs", "util-linux", "dmsetup"]

# In this order; each after what it depends on.
MODULES = [
    "virtio_pci", "virtio_console", "virtio_scsi", "sd_mod", "sg", "crc32c_generic", "crc32c-intel", "ext4",
]
# Listed in the guest's /modules.multipath, for the group that wants them.
MULTIPATH_MODULES = ["scsi_dh_alua", "dm-multipath", "dm-round-robin"]


@dataclass(frozen=True)
class Image:
    """Paths of a built guest."""

    kernel: str
    initramfs: str


def build(progress=print) -> Image:
    """The guest for this machine's packages, built if that was not done before."""
    package = initramfs.kernel_package()
    sources = [os.path.join(SOURCES, name) for name in sorted(os.listdir(SOURCES))] + [os.path.abspath(__file__)]
    directory = os.path.join(CACHE, initramfs.key(package, PACKAGES, sources))
    image = Image(os.path.join(directory, "kernel"), os.path.join(directory, "initramfs"))
    if os.path.exists(image.kernel) and os.path.exists(image.initramfs):
        return image
    progress(f"Building the guest from {package} and {', '.join(PACKAGES)}")
    shutil.rmtree(CACHE, ignore_errors=True)
    scratch = os.path.join(CACHE, "scratch")
    tree = os.path.join(scratch, "package")
    os.makedirs(scratch)
    initramfs.unpack([package], tree, scratch)
    version = package.removeprefix("linux-image-")
    _write_kernel(os.path.join(tree, "boot", f"vmlinuz-{version}"), os.path.join(scratch, "kernel"))
    _write_initramfs(tree, version, os.path.join(scratch, "initramfs"))
    shutil.rmtree(tree)
    os.rename(scratch, directory)
    return image


def _write_kernel(source: str, target: str) -> None:
    data = initramfs.unpacked_kernel(source)
    if data is None:
        shutil.copyfile(source, target)  # compressed otherwise: it boots too, later
        return
    with open(target, "wb") as file:
        file.write(data)


def _write_initramfs(tree: str, version: str, target: str) -> None:
    archive = initramfs.Archive()
    archive.skeleton(os.path.join(SOURCES, "init"))
    archive.copy("bin/agent", os.path.join(SOURCES, "agent"), 0o755)
    archive.programs(PROGRAMS)
    archive.modules(initramfs.modules(tree, version, MODULES))
    archive.modules(initramfs.modules(tree, version, MULTIPATH_MODULES), "modules.multipath")
    with open(target, "wb") as file:
        file.write(archive.finish())
