# xen: a machine with Xen in QEMU. Called by: groups/xen. Must not know: cases.
