# harness: what runs guests and reports cases. Called by: groups, run.py. Must not know: any case.

"""The real-guest harness: a small Linux in QEMU, what serves its disks, and a runner that reports each case."""
