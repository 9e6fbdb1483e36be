/*
 * clinux_io.h: asynchronous I/O and block devices, for Reactor and Backstores: what is a macro, a variadic function or
 * an access to a ring shared with the kernel. Static inline functions and no state. Must not know: SCSI, Swift.
 */
#ifndef CLINUX_IO_H
#define CLINUX_IO_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

/* fd_set's member has another name under _GNU_SOURCE. Swift's own module of the C library is made without it, and the
 * two definitions must be the same. */
#include <features.h>
#ifdef __USE_XOPEN
#undef __USE_XOPEN
#include <sys/select.h>
#define __USE_XOPEN 1
#endif

#include <errno.h>
#include <fcntl.h>
#include <libaio.h>
#include <liburing.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/stat.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

/* One completion, copied out of whichever ring it stood in. */
struct clinux_completion {
    uint64_t data;
    int64_t result;
    uint32_t flags;
};

/* io_uring ------------------------------------------------------------------------------------------------------- */

/* Whether the kernel holds completions back until the ring is entered. */
static inline int clinux_ring_wants_enter(const struct io_uring *ring) {
    return (__atomic_load_n(ring->sq.kflags, __ATOMIC_RELAXED) & (IORING_SQ_CQ_OVERFLOW | IORING_SQ_TASKRUN)) != 0;
}

/* Starts a ring that was created disabled, with the calling thread as its one submitter: 0 or a negative errno value.
 * (liburing 2.3's own function is missing from the library's exported symbols.) */
static inline int clinux_ring_enable(struct io_uring *ring) {
    long result = syscall(SYS_io_uring_register, ring->ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0);
    return result < 0 ? -errno : (int)result;
}

/* Takes the next completion; 0 if there is none. */
static inline int clinux_ring_next(struct io_uring *ring, struct clinux_completion *completion) {
    unsigned head = *ring->cq.khead;
    if (head == __atomic_load_n(ring->cq.ktail, __ATOMIC_ACQUIRE)) return 0;
    const struct io_uring_cqe *entry = &ring->cq.cqes[head & ring->cq.ring_mask];
    completion->data = entry->user_data;
    completion->result = entry->res;
    completion->flags = entry->flags;
    __atomic_store_n(ring->cq.khead, head + 1, __ATOMIC_RELEASE);
    return 1;
}

/* libaio --------------------------------------------------------------------------------------------------------- */

/* The completion ring that io_setup maps into the process (linux/aio.c). It stands in no published header, but its
 * layout has been the same since Linux 2.5, carries a magic number for exactly this use, and saves a system call a
 * turn. */
struct clinux_aio_ring {
    uint32_t id;
    uint32_t nr;
    uint32_t head;
    uint32_t tail;
    uint32_t magic;
    uint32_t compat_features;
    uint32_t incompat_features;
    uint32_t header_length;
    struct io_event events[];
};
#define CLINUX_AIO_RING_MAGIC 0xa10a10a1u

static inline int clinux_aio_is_mapped(io_context_t context) {
    const struct clinux_aio_ring *ring = (const struct clinux_aio_ring *)context;
    return ring->magic == CLINUX_AIO_RING_MAGIC && ring->incompat_features == 0;
}

/* Takes the next completion; 0 if there is none. Only for a ring that is mapped. */
static inline int clinux_aio_next(io_context_t context, struct clinux_completion *completion) {
    struct clinux_aio_ring *ring = (struct clinux_aio_ring *)context;
    uint32_t head = __atomic_load_n(&ring->head, __ATOMIC_RELAXED);
    if (head == __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE)) return 0;
    const struct io_event *event = (const struct io_event *)((const char *)ring + ring->header_length) + head;
    completion->data = (uint64_t)(uintptr_t)event->data;
    completion->result = (int64_t)event->res;
    completion->flags = 0;
    __atomic_store_n(&ring->head, (head + 1) % ring->nr, __ATOMIC_RELEASE);
    return 1;
}

static inline void clinux_aio_prepare(struct iocb *block, int opcode, int descriptor, const struct iovec *segments,
                                      int count, uint64_t offset, int rw_flags, int eventfd, void *data) {
    memset(block, 0, sizeof *block);
    block->data = data;
    block->aio_fildes = descriptor;
    block->aio_lio_opcode = (short)opcode;
    block->aio_rw_flags = rw_flags;
    block->u.c.buf = (void *)segments;
    block->u.c.nbytes = (unsigned long)count;
    block->u.c.offset = (long long)offset;
    io_set_eventfd(block, eventfd);
}

static inline void *clinux_aio_data(const struct iocb *block) { return block->data; }

/* Files and block devices ---------------------------------------------------------------------------------------- */

/* What O_DIRECT asks of memory addresses and of offsets and lengths, in bytes; -1 if the kernel does not say. Zeros if
 * the file does not support O_DIRECT. */
static inline int clinux_direct_alignment(int descriptor, uint32_t *memory, uint32_t *offset) {
#ifdef STATX_DIOALIGN
    struct statx status;
    memset(&status, 0, sizeof status);
    if (syscall(SYS_statx, descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) != 0) return -1;
    if ((status.stx_mask & STATX_DIOALIGN) == 0) return -1;
    *memory = status.stx_dio_mem_align;
    *offset = status.stx_dio_offset_align;
    return 0;
#else
    (void)descriptor; (void)memory; (void)offset;
    return -1;
#endif
}

static inline int clinux_block_size(int descriptor, uint64_t *bytes) {
    return ioctl(descriptor, BLKGETSIZE64, bytes);
}
static inline int clinux_block_logical(int descriptor, int32_t *bytes) { return ioctl(descriptor, BLKSSZGET, bytes); }
static inline int clinux_block_physical(int descriptor, uint32_t *bytes) {
    return ioctl(descriptor, BLKPBSZGET, bytes);
}
static inline int clinux_block_alignment_offset(int descriptor, int32_t *bytes) {
    return ioctl(descriptor, BLKALIGNOFF, bytes);
}
static inline int clinux_block_minimum_io(int descriptor, uint32_t *bytes) {
    return ioctl(descriptor, BLKIOMIN, bytes);
}
static inline int clinux_block_optimal_io(int descriptor, uint32_t *bytes) {
    return ioctl(descriptor, BLKIOOPT, bytes);
}
static inline int clinux_block_read_only(int descriptor, int32_t *flag) { return ioctl(descriptor, BLKROGET, flag); }
static inline int clinux_block_discard(int descriptor, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return ioctl(descriptor, BLKDISCARD, range);
}
static inline int clinux_block_zero(int descriptor, uint64_t offset, uint64_t length) {
    uint64_t range[2] = {offset, length};
    return ioctl(descriptor, BLKZEROOUT, range);
}

/* Atomic writes came with Linux 6.11, after the headers that are installed where this is built: the bits and the places
 * of the fields are those of include/uapi/linux/stat.h and fs.h, and never change. */
#define CLINUX_RWF_ATOMIC 0x40
#define CLINUX_STATX_WRITE_ATOMIC 0x10000u
#define CLINUX_STATX_ATOMIC_WRITE_UNIT_MAX 0xac

/* The longest write that the kernel, the file system and the device make atomic: a power of two of bytes, at offsets
 * that are multiples of it. 0 if there is none. */
static inline uint32_t clinux_atomic_write_maximum(int descriptor) {
    union { struct statx status; unsigned char bytes[256]; } answer;
    uint32_t maximum = 0;
    memset(&answer, 0, sizeof answer);
    if (syscall(SYS_statx, descriptor, "", AT_EMPTY_PATH, CLINUX_STATX_WRITE_ATOMIC, &answer.status) != 0) return 0;
    if ((answer.status.stx_mask & CLINUX_STATX_WRITE_ATOMIC) == 0) return 0;
    memcpy(&maximum, answer.bytes + CLINUX_STATX_ATOMIC_WRITE_UNIT_MAX, sizeof maximum);
    return maximum;
}

/* Extents of a file that clinux_file_extents reads at once. */
#define CLINUX_FILE_EXTENTS 256u

/* The extents of a file that overlap a range, in order; what they leave out is holes. Returns their number, at most
 * CLINUX_FILE_EXTENTS, or a negative errno value. With `extents` NULL: whether the file system knows them at all. */
static inline int clinux_file_extents(int descriptor, uint64_t offset, uint64_t length, int synchronize,
                                      struct fiemap_extent *extents) {
    union {
        struct fiemap map;
        unsigned char bytes[sizeof(struct fiemap) + CLINUX_FILE_EXTENTS * sizeof(struct fiemap_extent)];
    } request;
    memset(&request.map, 0, sizeof request.map);
    request.map.fm_start = offset;
    request.map.fm_length = length;
    request.map.fm_flags = synchronize ? FIEMAP_FLAG_SYNC : 0;
    request.map.fm_extent_count = extents ? CLINUX_FILE_EXTENTS : 0;
    if (ioctl(descriptor, FS_IOC_FIEMAP, &request) != 0) return -errno;
    if (extents == NULL) return 0;
    memcpy(extents, request.bytes + sizeof(struct fiemap), request.map.fm_mapped_extents * sizeof *extents);
    return (int)request.map.fm_mapped_extents;
}

/* Asks for a range to be read into the page cache: 0 or a negative errno value. */
static inline int clinux_will_need(int descriptor, uint64_t offset, uint64_t length) {
    return -posix_fadvise(descriptor, (off_t)offset, (off_t)length, POSIX_FADV_WILLNEED);
}

static inline uint32_t clinux_device_major(uint64_t device) { return major(device); }
static inline uint32_t clinux_device_minor(uint64_t device) { return minor(device); }

/* Loop devices, for tests. */
static inline int clinux_loop_get_free(int control, int32_t *number) {
    *number = ioctl(control, LOOP_CTL_GET_FREE);
    return *number < 0 ? -1 : 0;
}
static inline int clinux_loop_configure(int device, int file, uint32_t block_size, int read_only) {
    struct loop_config configuration;
    memset(&configuration, 0, sizeof configuration);
    configuration.fd = (uint32_t)file;
    configuration.block_size = block_size;
    configuration.info.lo_flags = read_only ? LO_FLAGS_READ_ONLY : 0;
    return ioctl(device, LOOP_CONFIGURE, &configuration);
}
static inline int clinux_loop_clear(int device) { return ioctl(device, LOOP_CLR_FD, 0); }

/* A lock on the whole file, shared or exclusive, that belongs to the open file description: it is seen by other
 * processes, by other descriptors of this one, and through NFS. */
static inline int clinux_lock(int descriptor, int shared) {
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = shared ? F_RDLCK : F_WRLCK;
    lock.l_whence = SEEK_SET;
    return fcntl(descriptor, F_OFD_SETLK, &lock);
}

/* openat is variadic. The name is one in the directory itself: no link is followed, nothing is waited for. */
static inline int clinux_open_at(int directory, const char *name) {
    return openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
}
static inline int clinux_create_at(int directory, const char *name, unsigned mode) {
    return openat(directory, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
}

#endif
