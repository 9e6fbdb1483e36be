/*
 * scsi_unit_state.h: the seam between a logical unit and what keeps its state over power loss: saved mode pages,
 * persistent reservations, identifying information.
 *
 * Who implements it: whoever creates logical units and can keep bytes: the daemon by a file (Backstores, StateFile), an
 * embedder by what it has. A logical unit without one keeps nothing, and tells its initiators so.
 * Who calls it: the logical unit, and nobody else.
 *
 * Rules
 *  - One thread, as in scsi_backstore.h: `save` is called and `done` is called on the reactor thread that owns the
 *    logical unit.
 *  - `save` never calls `done` before it returns, and never blocks. `done` is called exactly once for each `save`.
 *  - One at a time: there is no second `save` before `done` of the first.
 *  - The bytes belong to the store until `done`; the logical unit does not change them in between.
 *  - All or nothing: after a kill or a power loss at any moment, the next life of the unit finds either these bytes or
 *    those of the save before, whole. After `done` with error 0 it finds these.
 *  - After `done` with an error it may find either. The unit goes on with the state it had before and says so in its
 *    next save.
 *  - The bytes are the logical unit's own: a store does not look into them.
 *
 * The bytes that were last saved are given to the next life of the unit when it is created.
 *
 * Compatibility: structures begin with their size as the filler saw it; fields are appended and never moved.
 */
#ifndef SCSI_UNIT_STATE_H
#define SCSI_UNIT_STATE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SCSI_UNIT_STATE_ABI_VERSION 1u

/* `error` is 0 or a positive errno value. ENOSPC and EDQUOT are told to the initiator as a lack of resources. */
typedef void (*scsi_unit_state_done)(void *token, int32_t error);

struct scsi_unit_state_operations {
    uint32_t struct_size;
    uint32_t abi_version;
    /* Replaces what was saved before by `length` bytes, at most 1 MiB. */
    void (*save)(void *store, const uint8_t *bytes, uint64_t length, void *token, scsi_unit_state_done done);
};

#ifdef __cplusplus
}
#endif
#endif
