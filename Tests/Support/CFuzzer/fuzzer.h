/*
 * fuzzer.h: the door into libFuzzer, which the compiler links with -sanitize=fuzzer, and what the fuzzers need of Linux
 * to be a hostile peer and to see what is left behind.
 */
#ifndef FUZZER_H
#define FUZZER_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include "../../../Sources/CLinux/clinux.h"

#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>

/* Runs libFuzzer with the process's arguments; `test` is called with each input, and returns 0. */
int LLVMFuzzerRunDriver(int *count, char ***arguments, int (*test)(const uint8_t *data, size_t size));

/* Memory to share, of which can be told whether it is mapped. */
static inline int fuzzer_memory(size_t size) {
    int descriptor = memfd_create("fuzzer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    return descriptor >= 0 && ftruncate(descriptor, (off_t)size) == 0 ? descriptor : -1;
}

/*
 * Address space that nobody may touch, right behind where the next mapping of this many bytes will lie. The kernel puts
 * a mapping into the highest hole that has room; holes above ours are filled, and stay so.
 */
static inline void *fuzzer_guard(size_t size, size_t mapping) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *hole = mmap(NULL, mapping + size, PROT_NONE, flags, -1, 0);
    if (hole == MAP_FAILED || munmap(hole, mapping) != 0) return NULL;
    for (;;) {
        void *next = mmap(NULL, mapping, PROT_NONE, flags, -1, 0);
        if (next == MAP_FAILED) return NULL;
        if (next == hole) return munmap(hole, mapping) == 0 ? hole + mapping : NULL;
    }
}

/* Whether anybody has a writable mapping of that memory; to be asked once, for it cannot be mapped any more. */
static inline int fuzzer_is_mapped(int descriptor) { return fcntl(descriptor, F_ADD_SEALS, F_SEAL_WRITE) != 0; }

/* Which of the first 128 file descriptors are open, a bit each. */
static inline void fuzzer_descriptors(uint64_t open[2]) {
    open[0] = open[1] = 0;
    for (int descriptor = 0; descriptor < 128; descriptor++)
        if (fcntl(descriptor, F_GETFD) >= 0) open[descriptor / 64] |= UINT64_C(1) << descriptor % 64;
}

/* Sends bytes with up to 40 file descriptors, if that is possible at once. */
static inline ssize_t fuzzer_send(int socket, const void *bytes, size_t length, const int *descriptors, int count) {
    union { char bytes[CMSG_SPACE(sizeof(int) * 40)]; struct cmsghdr align; } control;
    struct iovec vector = { .iov_base = (void *)bytes, .iov_len = length };
    struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1 };
    if (count > 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
        memcpy(CMSG_DATA(c), descriptors, sizeof(int) * (size_t)count);
    }
    return sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static inline int fuzzer_socket_pair(int sockets[2]) {
    return socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sockets);
}

#endif
