/*
 * clinux.h: what Swift cannot import from Linux's and the C library's headers: atomic accesses to shared memory,
 * io_uring and libaio, file descriptors in messages. Static inline functions and no state.
 */
#ifndef CLINUX_H
#define CLINUX_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

/* Swift's own Glibc module has been built without _GNU_SOURCE, with which fd_set has a member of another name. Two
 * definitions of one type are an error wherever both modules are read whole, as the indexer of a first build does. */
#include <features.h>
#pragma push_macro("__USE_XOPEN")
#undef __USE_XOPEN
#include <sys/select.h>
#pragma pop_macro("__USE_XOPEN")

#include "clinux_io.h"
#include "clinux_peer.h"
#include "../CIOVector/io_vector.h"

#include <liburing.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <libaio.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <scsi/sg.h>
#include <linux/fs.h>
#include <linux/falloc.h>
#include <linux/vhost_types.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ring.h>
#include <linux/virtio_scsi.h>

/* Shared memory: one load or store each, never repeated or torn by the compiler. */
static inline uint16_t clinux_load16_relaxed(const void *p) {
    return __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED);
}
static inline uint16_t clinux_load16_acquire(const void *p) {
    return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE);
}
static inline uint32_t clinux_load32_relaxed(const void *p) {
    return __atomic_load_n((const uint32_t *)p, __ATOMIC_RELAXED);
}
static inline uint64_t clinux_load64_relaxed(const void *p) {
    return __atomic_load_n((const uint64_t *)p, __ATOMIC_RELAXED);
}
static inline void clinux_store16_relaxed(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELAXED); }
static inline void clinux_store16_release(void *p, uint16_t v) { __atomic_store_n((uint16_t *)p, v, __ATOMIC_RELEASE); }
static inline void clinux_store32_relaxed(void *p, uint32_t v) { __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELAXED); }
static inline void clinux_store64_relaxed(void *p, uint64_t v) {
    __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELAXED);
}
static inline void clinux_store64_release(void *p, uint64_t v) { __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE); }
static inline uint8_t clinux_load8_relaxed(const void *p) {
    return __atomic_load_n((const uint8_t *)p, __ATOMIC_RELAXED);
}
static inline void clinux_store8_release(void *p, uint8_t v) { __atomic_store_n((uint8_t *)p, v, __ATOMIC_RELEASE); }
static inline void clinux_or8(void *p, uint8_t v) { __atomic_fetch_or((uint8_t *)p, v, __ATOMIC_SEQ_CST); }
static inline void clinux_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* One message from a Unix socket with the file descriptors that came with it, all close-on-exec. Returns what recvmsg
 * returns; `*count` is the number of descriptors received. Descriptors beyond `capacity` are closed by the kernel. */
static inline ssize_t clinux_receive(int socket, void *bytes, size_t length, int *descriptors, int capacity,
                                     int *count) {
    union { char bytes[CMSG_SPACE(sizeof(int) * 32)]; struct cmsghdr align; } control;
    struct iovec vector = { .iov_base = bytes, .iov_len = length };
    struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1, .msg_control = control.bytes,
                              .msg_controllen = CMSG_SPACE(sizeof(int) * (capacity < 32 ? capacity : 32)) };
    *count = 0;
    ssize_t received = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (received < 0) return received;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
        int n = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (int i = 0; i < n && *count < capacity; i++) descriptors[(*count)++] = ((int *)(void *)CMSG_DATA(c))[i];
    }
    return received;
}

/* Sends bytes, with at most one file descriptor (-1: none), without SIGPIPE. Returns what sendmsg returns. */
static inline ssize_t clinux_send(int socket, const void *bytes, size_t length, int descriptor) {
    union { char bytes[CMSG_SPACE(sizeof(int))]; struct cmsghdr align; } control;
    struct iovec vector = { .iov_base = (void *)bytes, .iov_len = length };
    struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1 };
    if (descriptor >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_LEN(sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        *(int *)(void *)CMSG_DATA(c) = descriptor;
    }
    return sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Sends bytes if that is possible without waiting, whatever the flags of the socket, which its other end shares. */
static inline ssize_t clinux_send_now(int socket, const void *bytes, size_t length) {
    return send(socket, bytes, length, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Adds 1 to an eventfd. Its flags are shared with the process that sent it, which may fill the counter and clear
 * O_NONBLOCK: one that cannot take it now is left alone, for its owner has not even read what was said before. */
static inline int clinux_signal(int eventfd) {
    struct pollfd entry = { .fd = eventfd, .events = POLLOUT };
    if (poll(&entry, 1, 0) != 1 || !(entry.revents & POLLOUT)) return -1;
    const uint64_t one = 1;
    return write(eventfd, &one, sizeof one) == sizeof one ? 0 : -1;
}

/* A socket's option at the level of sockets, or -1. */
static inline int clinux_socket_option(int descriptor, int option) {
    int value = 0;
    socklen_t length = sizeof value;
    return getsockopt(descriptor, SOL_SOCKET, option, &value, &length) == 0 ? value : -1;
}

/* Whether a descriptor is an eventfd; where /proc is not mounted, whatever has no file type is taken for one. */
static inline int clinux_is_eventfd(int descriptor) {
    static const char eventfd_name[] = "anon_inode:[eventfd]";
    char path[32], name[sizeof eventfd_name];
    snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(path, name, sizeof name);
    if (length >= 0) return length == sizeof name - 1 && memcmp(name, eventfd_name, sizeof name - 1) == 0;
    struct stat status;
    return fstat(descriptor, &status) == 0 && (status.st_mode & S_IFMT) == 0;
}

/* mmap reports failure by an address, which Swift cannot name: here it is NULL. */
static inline void *clinux_map_shared(size_t length, int descriptor) {
    void *address = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, descriptor, 0);
    return address == MAP_FAILED ? NULL : address;
}

/* accept4 without the peer's address: glibc's transparent union is not for Swift. */
static inline int clinux_accept(int socket) { return accept4(socket, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK); }

#endif
