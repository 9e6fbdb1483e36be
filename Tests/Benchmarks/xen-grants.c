/*
 * xen-grants: what it costs to move the pages of a request by grant copy and by mapping them, in dom0.
 *
 * Grants pages of this domain to itself. Prints, for each number of pages, the least nanoseconds of 200 rounds of: one
 * grant copy hypercall for all of them; mapping all of them, reading one byte of each cache line, and unmapping them.
 * Decision 0009 uses it, by xen.py --grants, where an instruction is eight nanoseconds. By hand:
 *     cc -O2 -D__XEN_INTERFACE_VERSION__=0x00040e00 -o xen-grants xen-grants.c -lxengnttab
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <xengnttab.h>

enum { PAGES = 128, ROUNDS = 200, BYTES = 4096 };

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e9 + time.tv_nsec;
}

int main(void) {
    uint32_t references[PAGES];
    xengnttab_handle *grants = xengnttab_open(NULL, 0);
    xengntshr_handle *shares = xengntshr_open(NULL, 0);
    if (!grants || !shares || !xengntshr_share_pages(shares, 0, PAGES, references, 1)) {
        perror("xen-grants: is this dom0, with xen-gntdev and xen-gntalloc?");
        return 1;
    }
    char *local = aligned_alloc(BYTES, PAGES * BYTES);
    memset(local, 1, PAGES * BYTES);
    uint64_t sum = 0;
    printf("pages copy_ns map_ns\n");
    for (int pages = 1; pages <= PAGES; pages *= 2) {
        xengnttab_grant_copy_segment_t copies[PAGES];
        double copy = 1e18, map = 1e18;
        for (int round = 0; round < ROUNDS; round++) {
            double start = now();
            memset(copies, 0, sizeof copies[0] * pages);
            for (int page = 0; page < pages; page++) {
                copies[page].source.foreign.ref = references[page];
                copies[page].dest.virt = local + page * BYTES;
                copies[page].len = BYTES;
                copies[page].flags = GNTCOPY_source_gref;
            }
            if (xengnttab_grant_copy(grants, pages, copies)) return perror("copy"), 1;
            if (now() - start < copy) copy = now() - start;
        }
        for (int round = 0; round < ROUNDS; round++) {
            double start = now();
            char *mapped = xengnttab_map_domain_grant_refs(grants, pages, 0, references, PROT_READ);
            if (!mapped) return perror("map"), 1;
            for (int byte = 0; byte < pages * BYTES; byte += 64) sum += mapped[byte];
            xengnttab_unmap(grants, mapped, pages);
            if (now() - start < map) map = now() - start;
        }
        printf("%d %.0f %.0f\n", pages, copy, map);
        fflush(stdout);
    }
    return sum == 1;
}
