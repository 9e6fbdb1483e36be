// memory_guard: the table of guarded ranges and the SIGBUS handler that reads it.
//
// Owns: both. Called by: VirtioFront. Must not know: what the memory is.

#define _GNU_SOURCE
#include "memory_guard.h"

#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

// More than one process serves: 64 guests with 512 regions each would be 32768, but a guest has a handful.
#define RANGES 8192

// A slot is free while its address is 0. The length is written before the address, so that the handler, which may run
// on another thread, never sees an address with a length that is not its own.
static struct {
    _Atomic uintptr_t address;
    _Atomic size_t length;
} ranges[RANGES];

static _Atomic uint64_t replacements;
static struct sigaction previous;
static atomic_flag installed = ATOMIC_FLAG_INIT;

static void handle(int number, siginfo_t *information, void *context) {
    uintptr_t fault = (uintptr_t)information->si_addr;
    for (int index = 0; index < RANGES; index++) {
        uintptr_t address = atomic_load_explicit(&ranges[index].address, memory_order_acquire);
        if (!address || fault < address) continue;
        if (fault - address >= atomic_load_explicit(&ranges[index].length, memory_order_relaxed)) continue;
        size_t size = (size_t)sysconf(_SC_PAGESIZE);
        void *page = (void *)(fault & ~(size - 1));
        // A range of huge pages cannot be replaced in part: then the process ends as it would have.
        if (mmap(page, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
            break;
        atomic_fetch_add(&replacements, 1);
        return;
    }
    if ((previous.sa_flags & SA_SIGINFO) && previous.sa_sigaction) {
        previous.sa_sigaction(number, information, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
    } else {
        // Comes back as soon as the access is tried again.
        signal(SIGBUS, SIG_DFL);
    }
}

static int install(void) {
    if (atomic_flag_test_and_set(&installed)) return 0;
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &previous);
}

int memory_guard_add(void *address, size_t length) {
    if (install() != 0) return -1;
    for (int index = 0; index < RANGES; index++) {
        // A reservation, so that two threads do not take the same slot: an address that no fault can lie at or behind.
        uintptr_t expected = 0;
        if (!atomic_compare_exchange_strong(&ranges[index].address, &expected, UINTPTR_MAX)) continue;
        atomic_store_explicit(&ranges[index].length, length, memory_order_relaxed);
        atomic_store_explicit(&ranges[index].address, (uintptr_t)address, memory_order_release);
        return 0;
    }
    return -1;
}

void memory_guard_remove(void *address) {
    for (int index = 0; index < RANGES; index++) {
        uintptr_t expected = (uintptr_t)address;
        if (atomic_compare_exchange_strong(&ranges[index].address, &expected, 0)) return;
    }
}

uint64_t memory_guard_replacements(void) { return atomic_load(&replacements); }
