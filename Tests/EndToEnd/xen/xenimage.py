# xenimage: builds what a Xen machine boots from, out of Debian packages: hypervisor, kernel, dom0, domU.
#
# Owns: .build/xen. Called by: xenmachine. Must not know: what runs in the machine.

"""Xen, a Linux kernel for dom0 and guests, and their initial file systems.

Nothing is installed: packages are downloaded and unpacked. The result is kept under .build/xen, in a directory named
after everything that went into it.
"""

import gzip
import os
import shutil
from dataclasses import dataclass

from harness import image, initramfs
from harness.initramfs import Archive, ImageError, libraries, run

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(initramfs.ROOT, ".build", "xen")

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
# Loaded where devices of the host are given to guests.
HOST_DEVICE_MODULES = ["scsi_debug"]
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
    kernel_package = initramfs.kernel_package()
    sources = [os.path.join(HERE, name) for name in ["xenimage.py", "dom0/init", "domu/init"]]
    directory = os.path.join(CACHE, initramfs.key(kernel_package, image.PACKAGES, sources))
    result = XenImage(*(os.path.join(directory, name) for name in ["xen", "kernel", "dom0", "domu"]))
    if all(os.path.exists(path) for path in vars(result).values()):
        return result
    progress(f"Building the Xen image from {kernel_package} and Xen {XEN}")
    shutil.rmtree(CACHE, ignore_errors=True)
    scratch = os.path.join(CACHE, "scratch")
    tree = os.path.join(scratch, "packages")
    os.makedirs(tree)
    initramfs.unpack([kernel_package, *PACKAGES], tree, scratch)
    version = kernel_package.removeprefix("linux-image-")
    with gzip.open(os.path.join(tree, "boot", f"xen-{XEN}-amd64.gz")) as source:
        _write(os.path.join(scratch, "xen"), source.read())
    _write_kernel(os.path.join(tree, "boot", f"vmlinuz-{version}"), os.path.join(scratch, "kernel"))
    _write(os.path.join(scratch, "dom0"), _dom0(tree, version))
    _write(os.path.join(scratch, "domu"), _guest_files(os.path.join(scratch, "kernel"), _domu(tree, version)))
    shutil.rmtree(tree)
    os.rename(scratch, directory)
    return result


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _write_kernel(source: str, target: str) -> None:
    """Xen and libxl take the kernel as it is when unpacked."""
    data = initramfs.unpacked_kernel(source)
    if data is None:
        raise ImageError(f"{source} is not compressed by xz; teach initramfs.py how it is")
    _write(target, data)
    run("strip", "--strip-debug", target)


def _skeleton(init: str) -> Archive:
    made = Archive()
    made.skeleton(init, "var/log/xen/console", "var/lib/xen", "var/lib/xenstored", "etc/xen/scripts")
    made.link("var/run", "/run")
    made.link("var/lock", "/run")
    return made


def _dom0(tree: str, version: str) -> bytes:
    made = _skeleton(os.path.join(HERE, "dom0", "init"))
    made.modules(initramfs.modules(tree, version, DOM0_MODULES))
    made.modules(initramfs.modules(tree, version, HOST_DEVICE_MODULES), "modules.host-device")
    made.modules(initramfs.modules(tree, version, SCSIBACK_MODULES), "modules.scsiback")
    made.file("etc/xen/xl.conf", b'autoballoon="off"\nclaim_mode=0\n', 0o644)
    tools = os.path.join(tree, "usr", "lib", f"xen-{XEN}", "bin")
    for name in ["xl", "xenstored", "xenconsoled", "xen-init-dom0", "xen-shadow-stub", "libxl-save-helper"]:
        _add_tool(made, tree, os.path.join(tools, name), f"usr/sbin/{name}")
    for name in ["xenstore-read", "xenstore-write", "xenstore-ls", "xenstore-rm", "xenstore-exists"]:
        _add_tool(made, tree, os.path.join(tree, "usr", "bin", name), f"usr/bin/{name}")
    # Where libxl looks for its helpers.
    made.link(f"usr/lib/xen-{XEN}/bin/libxl-save-helper", "/usr/sbin/libxl-save-helper")
    made.programs(PROGRAMS)
    return made.finish()


def _add_tool(made: Archive, tree: str, path: str, name: str) -> None:
    if not os.path.exists(path):
        return
    # Debian makes one program serve as several, by links.
    made.copy(name, os.path.realpath(path), 0o755)
    unpacked = {"LD_LIBRARY_PATH": os.path.join(tree, "usr", "lib", "x86_64-linux-gnu")}
    for library in libraries(path, unpacked):
        made.copy("usr/lib/x86_64-linux-gnu/" + os.path.basename(library) if library.startswith(tree)
                  else library.lstrip("/"), library, 0o755)


def _domu(tree: str, version: str) -> bytes:
    made = _skeleton(os.path.join(HERE, "domu", "init"))
    made.modules(initramfs.modules(tree, version, DOMU_MODULES))
    made.programs(DOMU_PROGRAMS)
    return made.finish()


def _guest_files(kernel: str, initial: bytes) -> bytes:
    made = Archive()
    made.copy("domu/kernel", kernel, 0o644)
    made.file("domu/initramfs", initial, 0o644)
    return made.finish()
