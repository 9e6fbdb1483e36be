/*
 * scsi_target.h: the seam between the SCSI target core and a front (the SCSI transport protocol, SAM-6 clause 4.6).
 *
 * Who implements it: every front, built in (Sources/VirtioFront, Sources/XenFront) or an embedder's own.
 * Who calls it: the core's task engine.
 *
 * Rules
 *  - A task belongs to the front while it is free, and to the core from the moment it was handed to the target until
 *    `complete_task` is called for it, which happens exactly once per task, always on the reactor thread that owns the
 *    front. In between, the command, the segment arrays and the memory that the segments name may not be changed by
 *    the front.
 *  - The core never touches any of it again after `complete_task` was called.
 *  - `complete_task` may be called before the call that handed the task over has returned.
 *  - A task management function completes after every task that it ended has been completed.
 *  - A front that must stop at once what may take long gets its commands back by SCSI_SUSPEND_TASKS.
 *
 * Compatibility: structures begin with their size as the filler saw it; fields are appended and never moved.
 */
#ifndef SCSI_TARGET_H
#define SCSI_TARGET_H

#include <stdint.h>
#include "../CIOVector/io_vector.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SCSI_TARGET_ABI_VERSION 1u
#define SCSI_CDB_CAPACITY 32u   /* bytes: the longest variable length CDB that the core takes */
#define SCSI_SENSE_CAPACITY 252u /* bytes: SPC-6 4.4.1, the most that a device server returns */

/* scsi_command.attribute: SAM-6 table 32 */
enum {
    SCSI_TASK_ATTRIBUTE_SIMPLE = 0,
    SCSI_TASK_ATTRIBUTE_ORDERED = 1,
    SCSI_TASK_ATTRIBUTE_HEAD_OF_QUEUE = 2,
    SCSI_TASK_ATTRIBUTE_ACA = 3,
};

/* scsi_command.flags */
enum {
    /* The command was handed to a target before, which then died or whose front lost its connection: it may have been
     * carried out, wholly or in part. One whose repetition would not do the same is refused for that. */
    SCSI_COMMAND_REPEATED = 1,
};

/* What the front fills before it hands a task over. */
struct scsi_command {
    uint8_t lun[8];          /* SAM-6 4.7: the logical unit number as on the wire */
    uint64_t tag;            /* command identifier, unique among the nexus's commands in flight */
    uint64_t cookie;         /* the front's own; the core does not read it */
    uint8_t cdb[SCSI_CDB_CAPACITY];
    uint8_t cdb_length;      /* bytes that the initiator sent, or the transport's fixed size; at most 32 */
    uint8_t attribute;
    uint8_t priority;        /* 0: not given */
    uint8_t flags;
    uint32_t timeout_milliseconds; /* the transport's deadline for the command; 0: none */
    /* Buffers of the initiator, of any alignment, length and number. `_length` is the sum of the elements.
     * The core may shorten a list in place when the command needs less than it offers. */
    struct iovec *data_out;
    struct iovec *data_in;
    uint32_t data_out_count;
    uint32_t data_in_count;
    uint64_t data_out_length; /* bytes */
    uint64_t data_in_length;  /* bytes */
    uint8_t group;            /* the front's own: which commands SCSI_SUSPEND_TASKS takes back together */
    uint8_t reserved[7];
};

/* scsi_response.service_response: SAM-6 5.1, and what the transports here want to tell apart below it. */
enum {
    SCSI_SERVICE_COMMAND_COMPLETE = 0,   /* status is valid */
    SCSI_SERVICE_ABORTED = 1,            /* ended by a task management function of the same nexus: no status */
    SCSI_SERVICE_RESET = 2,              /* ended by a reset: no status */
    SCSI_SERVICE_OVERRUN = 3,            /* the CDB asks for more data than the buffers hold; nothing was done */
    SCSI_SERVICE_TARGET_FAILURE = 4,     /* the target could not take the command */
    /* Not carried out, or not to its end, because of SCSI_SUSPEND_TASKS: hand it in again, here or to another target of
     * the same medium, as it was received. Only a front that suspends tasks sees it. */
    SCSI_SERVICE_SUSPENDED = 5,
};

/* What the core fills before complete_task. */
struct scsi_response {
    uint8_t service_response;
    uint8_t status;               /* SAM-6 table 29 */
    uint16_t status_qualifier;
    uint32_t reserved;
    uint64_t data_out_residual;   /* bytes of data_out that were not used */
    uint64_t data_in_residual;    /* bytes of data_in that were not filled */
};

/* Service responses of a task management function: SAM-6 7.1 */
enum {
    SCSI_FUNCTION_COMPLETE = 0,
    SCSI_FUNCTION_SUCCEEDED = 1,
    SCSI_FUNCTION_REJECTED = 2,
    SCSI_FUNCTION_INCORRECT_LOGICAL_UNIT_NUMBER = 3,
};

/* scsi_task_management_request.function: SAM-6 clause 7 */
enum {
    SCSI_ABORT_TASK = 1,
    SCSI_ABORT_TASK_SET = 2,
    SCSI_CLEAR_ACA = 3,
    SCSI_CLEAR_TASK_SET = 4,
    SCSI_I_T_NEXUS_RESET = 5,
    SCSI_LOGICAL_UNIT_RESET = 6,
    SCSI_QUERY_TASK = 7,
    SCSI_QUERY_TASK_SET = 8,
    SCSI_QUERY_ASYNCHRONOUS_EVENT = 9,
    SCSI_TARGET_RESET = 10,
    /* No function of SAM's, and none that an initiator can ask for: the front stops a part of itself and takes the
     * commands back. Each task of the nexus that has `group` is completed soon:
     *  - with SCSI_SERVICE_SUSPENDED if it can be carried out from its beginning later. The initiator does not learn of
     *    that: no status, no unit attention condition. If the medium has it, the core asks for its cancellation, and
     *    completes the task when the medium has let go of its memory. The front fills the command anew for the next
     *    time: the segment lists may have been shortened.
     *  - with its response if it has come to its end all the same, or if it must not be carried out twice. One that an
     *    ACA condition keeps from ending is completed, too.
     *  - as aborted or reset if another function ends it.
     * FUNCTION COMPLETE follows when the last of them was completed; FUNCTION REJECTED if the same is under way for the
     * group already. What the front hands in of the group until then is not meant, and passes what comes back later: a
     * front whose commands have an order hands in nothing. `lun` and `tag` are not looked at. What the front hands in
     * again is a new command in every respect; a front whose commands have an order hands them in in that order. A core
     * that does not know the function answers FUNCTION REJECTED and lets the commands end. */
    SCSI_SUSPEND_TASKS = 128,
};

struct scsi_task_management_request {
    uint32_t struct_size;
    uint8_t function;
    uint8_t group;    /* SCSI_SUSPEND_TASKS: scsi_command.group of the tasks */
    uint8_t reserved[2];
    uint8_t lun[8];
    uint64_t tag;     /* of the task that ABORT TASK and QUERY TASK name */
    uint64_t cookie;  /* the front's own, given back */
};

/* scsi_target_event.kind */
enum {
    SCSI_EVENT_LOGICAL_UNIT_ADDED = 1,
    SCSI_EVENT_LOGICAL_UNIT_REMOVED = 2,
    SCSI_EVENT_PARAMETERS_CHANGED = 3,  /* a unit attention with this additional sense code became pending */
    SCSI_EVENT_EVENTS_MISSED = 4,       /* events were lost on the way: look at everything; no LUN, no code */
    SCSI_EVENT_HARD_RESET = 5,          /* the unit was reset with its target, which no initiator had asked for */
};

struct scsi_target_event {
    uint32_t struct_size;
    uint8_t kind;
    uint8_t additional_sense_code;
    uint8_t additional_sense_code_qualifier;
    uint8_t reserved;
    uint8_t lun[8];
};

/* The public head of a task. Its memory comes from a task pool of the core; a front never copies it. */
struct scsi_task {
    struct scsi_command command;
    struct scsi_response response;
};

struct scsi_target_port_operations {
    uint32_t struct_size;
    uint32_t abi_version;
    void (*complete_task)(void *port, struct scsi_task *task);
    /* `additional_response` is SAM-6's Additional Response Information of QUERY ASYNCHRONOUS EVENT (7.10) if that was
     * answered FUNCTION SUCCEEDED, else 0: bits 23-16 its byte 0 (UADE DEPTH, SENSE KEY), 15-8 ADDITIONAL SENSE CODE,
     * 7-0 its qualifier. */
    void (*complete_task_management)(void *port, uint64_t cookie, uint8_t service_response,
                                     uint32_t additional_response);
    void (*report_event)(void *port, const struct scsi_target_event *event);
};

#ifdef __cplusplus
}
#endif
#endif
