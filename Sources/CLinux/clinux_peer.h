/*
 * clinux_peer.h: the front-end's side of vhost-user, for the initiator in Tests: messages with any number of file
 * descriptors. Static inline functions and no state.
 */
#ifndef CLINUX_PEER_H
#define CLINUX_PEER_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <linux/kcmp.h>
#include <linux/virtio_blk.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* File descriptors that one message can carry: the kernel's limit (SCM_MAX_FD). */
#define CLINUX_PEER_DESCRIPTORS 253

/* Sends bytes with file descriptors, without SIGPIPE. Returns what sendmsg returns. */
static inline ssize_t clinux_peer_send(
    int socket, const void *bytes, size_t length, const int *descriptors, int count) {
    union { char bytes[CMSG_SPACE(sizeof(int) * CLINUX_PEER_DESCRIPTORS)]; struct cmsghdr align; } control;
    struct iovec vector = { .iov_base = (void *)bytes, .iov_len = length };
    struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1 };
    if (count > 0) {
        size_t size = sizeof(int) * (size_t)count;
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(size);
        memset(control.bytes, 0, CMSG_SPACE(size));
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(size);
        memcpy(CMSG_DATA(c), descriptors, size);
    }
    return sendmsg(socket, &message, MSG_NOSIGNAL);
}

/* Whether two descriptors of this process share one open file description: 1 or 0, or -1 if the kernel does not say. */
static inline int clinux_peer_same_file(int first, int second) {
    long order = syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, first, second);
    return order < 0 ? -1 : order == 0;
}

#endif
