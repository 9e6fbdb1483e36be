"""The real-guest harness: a small Linux in QEMU, what serves its disks, and a runner that reports each case."""
