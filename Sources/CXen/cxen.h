/*
 * cxen.h: what Swift cannot import from Xen's headers: the ring macros of a vscsiif ring page, and the unions of a
 * grant copy. Static inline functions and no state.
 */
#ifndef CXEN_H
#define CXEN_H

/* Without an interface version ring.h takes the barriers of the legacy interface. */
#ifndef __XEN_INTERFACE_VERSION__
#define __XEN_INTERFACE_VERSION__ 0x00040e00
#endif
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <poll.h>
#include <xenevtchn.h>
#include <xengnttab.h>
#include <xen/grant_table.h>
#include <xen/io/ring.h>
#include <xen/io/vscsiif.h>

/* Requests, and responses, that one ring page holds. */
static inline uint32_t cxen_ring_size(void) { return __CONST_RING_SIZE(vscsiif, VSCSIIF_PAGE_SIZE); }

/* The ring page. The other end may change every byte of it at any time: each function loads or stores a field once. */
static inline uint32_t cxen_request_producer(const void *page) {
    return __atomic_load_n(&((const struct vscsiif_sring *)page)->req_prod, __ATOMIC_ACQUIRE);
}
static inline uint32_t cxen_response_producer(const void *page) {
    return __atomic_load_n(&((const struct vscsiif_sring *)page)->rsp_prod, __ATOMIC_ACQUIRE);
}
static inline uint32_t cxen_response_event(const void *page) {
    return __atomic_load_n(&((const struct vscsiif_sring *)page)->rsp_event, __ATOMIC_RELAXED);
}
static inline void cxen_set_response_producer(void *page, uint32_t index) {
    __atomic_store_n(&((struct vscsiif_sring *)page)->rsp_prod, index, __ATOMIC_RELEASE);
}
static inline void cxen_set_request_event(void *page, uint32_t index) {
    __atomic_store_n(&((struct vscsiif_sring *)page)->req_event, index, __ATOMIC_RELAXED);
}
static inline void cxen_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Copies a request out of the ring. The barrier keeps the compiler from reading the shared bytes a second time. */
static inline void cxen_copy_request(const void *page, uint32_t index, struct vscsiif_request *request) {
    const struct vscsiif_sring *ring = (const struct vscsiif_sring *)page;
    memcpy(request, &ring->ring[index & (cxen_ring_size() - 1)].req, sizeof *request);
    __asm__ volatile("" ::: "memory");
}
static inline void cxen_write_response(void *page, uint32_t index, const struct vscsiif_response *response) {
    struct vscsiif_sring *ring = (struct vscsiif_sring *)page;
    memcpy(&ring->ring[index & (cxen_ring_size() - 1)].rsp, response, sizeof *response);
}

/* The front end's side of a ring page, for tests and for a front end in userspace. */
static inline void cxen_init_shared_ring(void *page) {
    struct vscsiif_sring *ring = (struct vscsiif_sring *)page;
    SHARED_RING_INIT(ring);
}
static inline void cxen_write_request(void *page, uint32_t index, const struct vscsiif_request *request) {
    struct vscsiif_sring *ring = (struct vscsiif_sring *)page;
    memcpy(&ring->ring[index & (cxen_ring_size() - 1)].req, request, sizeof *request);
}
static inline void cxen_set_request_producer(void *page, uint32_t index) {
    __atomic_store_n(&((struct vscsiif_sring *)page)->req_prod, index, __ATOMIC_RELEASE);
}
static inline uint32_t cxen_request_event(const void *page) {
    return __atomic_load_n(&((const struct vscsiif_sring *)page)->req_event, __ATOMIC_RELAXED);
}
static inline void cxen_set_response_event(void *page, uint32_t index) {
    __atomic_store_n(&((struct vscsiif_sring *)page)->rsp_event, index, __ATOMIC_RELAXED);
}
static inline void cxen_copy_response(const void *page, uint32_t index, struct vscsiif_response *response) {
    const struct vscsiif_sring *ring = (const struct vscsiif_sring *)page;
    memcpy(response, &ring->ring[index & (cxen_ring_size() - 1)].rsp, sizeof *response);
    __asm__ volatile("" ::: "memory");
}

/* Fields of a record that must be complete in memory whenever the process may be killed: stores in program order. */
static inline uint32_t cxen_load32(const void *p) { return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE); }
static inline void cxen_store32(void *p, uint32_t value) {
    __asm__ volatile("" ::: "memory");
    __atomic_store_n((uint32_t *)p, value, __ATOMIC_RELEASE);
    __asm__ volatile("" ::: "memory");
}

/* One copy between a granted page of `domain` and our own memory. */
static inline void cxen_fill_copy(xengnttab_grant_copy_segment_t *copy, bool to_guest, uint16_t domain,
                                  uint32_t reference, uint16_t offset, uint16_t length, void *local) {
    memset(copy, 0, sizeof *copy);
    copy->len = length;
    copy->flags = to_guest ? GNTCOPY_dest_gref : GNTCOPY_source_gref;
    union xengnttab_copy_ptr *guest = to_guest ? &copy->dest : &copy->source;
    union xengnttab_copy_ptr *own = to_guest ? &copy->source : &copy->dest;
    guest->foreign.ref = reference;
    guest->foreign.offset = offset;
    guest->foreign.domid = domain;
    own->virt = local;
}
static inline bool cxen_copy_is_to_guest(const xengnttab_grant_copy_segment_t *copy) {
    return copy->flags & GNTCOPY_dest_gref;
}
static inline uint32_t cxen_copy_reference(const xengnttab_grant_copy_segment_t *copy) {
    return cxen_copy_is_to_guest(copy) ? copy->dest.foreign.ref : copy->source.foreign.ref;
}
static inline uint16_t cxen_copy_offset(const xengnttab_grant_copy_segment_t *copy) {
    return cxen_copy_is_to_guest(copy) ? copy->dest.foreign.offset : copy->source.foreign.offset;
}
static inline uint16_t cxen_copy_domain(const xengnttab_grant_copy_segment_t *copy) {
    return cxen_copy_is_to_guest(copy) ? copy->dest.foreign.domid : copy->source.foreign.domid;
}
static inline void *cxen_copy_local(const xengnttab_grant_copy_segment_t *copy) {
    return cxen_copy_is_to_guest(copy) ? copy->source.virt : copy->dest.virt;
}

#endif
