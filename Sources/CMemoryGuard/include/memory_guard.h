/*
 * memory_guard.h: keeps the process alive when memory that a front-end shared goes away.
 *
 * A mapping of a file that somebody makes shorter has no memory behind its end: touching it raises SIGBUS, which ends
 * the process and with it every other guest's disks. Inside a guarded range the handler puts a page of zeros in the
 * place of the one that is gone and lets the access go on; elsewhere SIGBUS is what it always was.
 *
 * Who calls it: the virtio front, for each region that it maps. The handler is installed with the first range, and the
 * threads that touch guarded memory must not block SIGBUS.
 */
#ifndef MEMORY_GUARD_H
#define MEMORY_GUARD_H

#include <stddef.h>
#include <stdint.h>

/* Guards a range. Returns 0, or -1 if there are too many ranges or the handler cannot be installed. */
int memory_guard_add(void *address, size_t length);

/* Ends it; before the range is unmapped. */
void memory_guard_remove(void *address);

/* How many pages were replaced since the process began. */
uint64_t memory_guard_replacements(void);

#endif
