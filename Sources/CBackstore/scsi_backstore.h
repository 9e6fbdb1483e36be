/*
 * scsi_backstore.h: the seam between a logical unit and the medium that holds its blocks.
 *
 * Who implements it: every backstore, built in (Sources/Backstores) or written elsewhere.
 * Who calls it: the logical unit, and nobody else.
 *
 * Rules
 *  - One thread. Every function of one backstore is called on the reactor thread that owns its logical unit, and
 *    `complete` is called on that same thread. A backstore that works on other threads posts back first.
 *  - `submit` and `cancel` never call `complete` before they return, and never block.
 *  - A request that was accepted is completed exactly once, cancelled or not. Until then its memory, its segment
 *    array and the memory that the segments name belong to the backstore; afterwards none of it may be touched.
 *  - All or nothing: a request that ends with error 0 has transferred `length` bytes. A backstore retries short
 *    transfers itself and reads zeros for what was never written.
 *  - Data may lie in memory shared with a hostile guest. It may change while it is read: copy it, never interpret it.
 *
 * Compatibility: structures begin with their size as the filler saw it; fields are appended and never moved; a
 * function pointer that a shorter structure does not have counts as absent.
 */
#ifndef SCSI_BACKSTORE_H
#define SCSI_BACKSTORE_H

#include <stddef.h>
#include <stdint.h>
#include "../CIOVector/io_vector.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SCSI_BACKSTORE_ABI_VERSION 1u

/* What a request asks for: scsi_backstore_request.operation. Offsets and lengths are multiples of the logical block
 * size; segments are not: an element may have any address and any length, and only their sum equals `length`. */
enum {
    SCSI_BACKSTORE_READ = 1,         /* medium → segments */
    SCSI_BACKSTORE_WRITE = 2,        /* segments → medium */
    SCSI_BACKSTORE_FLUSH = 3,        /* all writes completed before this request was submitted become stable */
    SCSI_BACKSTORE_DISCARD = 4,      /* deallocate; reads give zeros afterwards if the geometry says so; no segments */
    SCSI_BACKSTORE_WRITE_ZEROES = 5, /* the range reads as zeros afterwards; no segments */
    /* Only if the geometry says CAN_PREFETCH: the range is going to be read. Error 0: it is in memory now, or on its
     * way (IMMEDIATE); ENOBUFS: there is no cache to hold it. No segments. */
    SCSI_BACKSTORE_PREFETCH = 6,
    /* Only if the geometry says CAN_REPORT_EXTENTS: how the range is allocated. The segments are no data: they are one
     * element, an array of scsi_backstore_extent that the caller has zeroed. The backstore fills it from the front, in
     * the order of the medium and without gaps, and may stop before the end of the range, but not before the first
     * element: so it bounds its work. */
    SCSI_BACKSTORE_EXTENTS = 7,
    /* Only if the geometry says CAN_ANCHOR: the range reads as zeros afterwards and has its space, so that writing to
     * it does not end with ENOSPC. No segments. */
    SCSI_BACKSTORE_ANCHOR = 8,
    /* Only if the geometry says CAN_REPORT_SPACE: the space that the medium has and takes. Offset and length are 0; the
     * segments are no data: they are one element, a scsi_backstore_space that the caller has zeroed. */
    SCSI_BACKSTORE_SPACE = 9,
};

/* scsi_backstore_space.flags */
enum {
    SCSI_BACKSTORE_SPACE_SHARED = 1u << 0, /* others may take what is available */
};

struct scsi_backstore_space {
    uint64_t used;      /* bytes that the medium takes where it is kept */
    uint64_t available; /* bytes that it could take there beside those */
    uint32_t flags;
    uint32_t reserved;
};

/* scsi_backstore_extent.state */
enum {
    SCSI_BACKSTORE_MAPPED = 0,      /* has data and space; also what is not known to be anything else */
    SCSI_BACKSTORE_DEALLOCATED = 1, /* has neither */
    SCSI_BACKSTORE_ANCHORED = 2,    /* has space and no data: reads as zeros */
};

/* A stretch of the medium in one state. A logical block of which a part is mapped is mapped. */
struct scsi_backstore_extent {
    uint64_t length; /* bytes, a multiple of logical_block_size; 0 ends the list */
    uint32_t state;
    uint32_t reserved;
};

/* scsi_backstore_request.flags */
enum {
    SCSI_BACKSTORE_FUA = 1u << 0, /* WRITE, WRITE_ZEROES, DISCARD, ANCHOR: stable on the medium before `complete` */
    SCSI_BACKSTORE_MAY_UNMAP = 1u << 1, /* WRITE_ZEROES: deallocating instead of writing is welcome */
    SCSI_BACKSTORE_IMMEDIATE = 1u << 2, /* PREFETCH: complete once it has begun; the rest goes on without the request */
    /* WRITE, within the geometry's atomic_write limits: whatever happens, an error, a cancellation, the loss of power,
     * the medium holds all of the data or none of it. */
    SCSI_BACKSTORE_ATOMIC = 1u << 3,
};

/* scsi_backstore_geometry.capabilities */
enum {
    SCSI_BACKSTORE_WRITABLE = 1u << 0,
    SCSI_BACKSTORE_VOLATILE_CACHE = 1u << 1,  /* completed writes may be lost at power loss until FLUSH or FUA */
    SCSI_BACKSTORE_CAN_DISCARD = 1u << 2,
    SCSI_BACKSTORE_CAN_WRITE_ZEROES = 1u << 3,
    SCSI_BACKSTORE_DISCARD_READS_ZEROS = 1u << 4,
    SCSI_BACKSTORE_ROTATIONAL = 1u << 5,
    SCSI_BACKSTORE_CAN_PREFETCH = 1u << 6,
    SCSI_BACKSTORE_CAN_REPORT_EXTENTS = 1u << 7,
    SCSI_BACKSTORE_CAN_ANCHOR = 1u << 8,
    SCSI_BACKSTORE_CAN_REPORT_SPACE = 1u << 9,
};

/* `scratch` is this large so that a kernel control block fits and submitting needs no allocation. */
#define SCSI_BACKSTORE_SCRATCH_WORDS 24

struct scsi_backstore_request {
    uint32_t struct_size;
    uint8_t operation;
    uint8_t reserved;
    uint16_t flags;
    uint64_t offset; /* bytes */
    uint64_t length; /* bytes */
    const struct iovec *segments;
    uint32_t segment_count;
    uint32_t reserved_2;

    /* The caller's. `error` is 0 or a positive errno value. The ones with a meaning of their own: ENOSPC (no space
     * for a thin medium), EROFS (write protected), ENOMEDIUM, ECANCELED (ended by `cancel`), ETIMEDOUT, EILSEQ
     * (checksum), EREMOTEIO (path to the medium lost), ENODATA or EIO (medium error). */
    void (*complete)(struct scsi_backstore_request *request, int32_t error);
    void *owner;

    /* The backstore's answer beside `error`: the first byte on the medium that could not be transferred, or
     * UINT64_MAX when that is not known. The caller sets UINT64_MAX. */
    uint64_t error_offset;

    /* The backstore's own, from submit to complete. Not initialised by the caller. */
    uint64_t scratch[SCSI_BACKSTORE_SCRATCH_WORDS];
};

/* Bytes from the start of a request to its scratch: how a backstore finds the request from its own state. */
enum { SCSI_BACKSTORE_SCRATCH_OFFSET = offsetof(struct scsi_backstore_request, scratch) };

struct scsi_backstore_geometry {
    uint32_t struct_size;
    uint32_t capabilities;
    uint64_t size;                     /* bytes, a multiple of logical_block_size */
    uint32_t logical_block_size;       /* bytes: 512 or 4096 */
    uint32_t physical_block_size;      /* bytes: logical_block_size × a power of two */
    uint32_t lowest_aligned_offset;    /* bytes: where the first physical block begins */
    uint32_t optimal_transfer_granularity; /* bytes; 0: not reported */
    uint64_t maximum_transfer;         /* bytes in one READ or WRITE; 0: no limit */
    uint64_t optimal_transfer;         /* bytes; 0: not reported */
    uint64_t maximum_discard;          /* bytes in one DISCARD; 0: no limit */
    uint64_t maximum_write_zeroes;     /* bytes in one WRITE_ZEROES; 0: no limit */
    uint32_t discard_granularity;      /* bytes; 0: not reported */
    uint32_t discard_alignment;        /* bytes: offset of the first granule */
    /* What a WRITE with ATOMIC may be; a backstore whose structure ends above has none. */
    uint32_t atomic_write_maximum;     /* bytes; 0: there are no atomic writes */
    uint32_t atomic_write_granularity; /* bytes: the length is a multiple; 0: of a logical block */
    uint32_t atomic_write_alignment;   /* bytes: the offset is a multiple; 0: of a logical block */
};

struct scsi_backstore_operations {
    uint32_t struct_size;
    uint32_t abi_version;
    /* Fills what the caller's struct_size has room for. Asked once, and again after a change was announced. */
    void (*get_geometry)(void *backstore, struct scsi_backstore_geometry *geometry);
    /* 0: accepted, `complete` will be called. EAGAIN: full, try again after one of this backstore's completions. */
    int32_t (*submit)(void *backstore, struct scsi_backstore_request *request);
    /* Advice: end this request soon if that is possible. Its completion still comes, with ECANCELED or otherwise. */
    void (*cancel)(void *backstore, struct scsi_backstore_request *request);
};

#ifdef __cplusplus
}
#endif
#endif
