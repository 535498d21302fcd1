/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the fuzzer share: one switch, its windows, the input, the calls under way. */
#ifndef FUZZER_H
#define FUZZER_H

#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>

#include "elisa_memory.h"
#include "elisa_object.h"
#include "input.h"
#include "switch.h"

#include "admin.h"

#define PORTS 5       /* most ports of one run */
#define SLOTS 8       /* most transmit slots, and slots of a lane */
#define HASH_SEED 0x9E3779B97F4A7C15
#define DEPTH 3       /* calls inside each other */
#define OPERATIONS 96 /* of one input */
/* Accesses of a copy: two for each of the bytes that are moved one by one, or for eight. */
#define STRING_MOVE_MOST 600

/* ---------------------------------------------------- machine.c: the switch */

extern struct switch_shared *shared;
extern uint8_t *windows;
extern uint8_t *expected; /* what the windows must hold outside the lanes of calls under way */
extern uint64_t window_size;
extern uint32_t ports, tx_slots, lane_slots, frame_limit, group_forward_mask;

/* A new switch, of a shape that depends on one byte; no port is enabled. */
void make_switch(uint8_t geometry);
struct switch_window *window_of(uint32_t port);
/* A guest writes into its window. */
void poke(uint8_t *at, const void *bytes, size_t count);
/* The host has written it. */
void expect_window(uint32_t port);
bool inside(const uint8_t *at, size_t bytes, const void *start, uint64_t size);

/* ------------------------------------------ accesses.c: calls under way */

struct active {
	uint32_t id;
	uint64_t enabled;   /* as the call has read it */
	uint64_t began;     /* moment */
	uint64_t accesses;  /* of memory, so far */
	uint64_t most;      /* that the call may make */
	uint32_t tail[PORTS]; /* last value read of each receiver's tail */
	uint32_t used[PORTS]; /* the one that the last delivery relied on */
	bool overtaken;     /* something else ran to its end in between */
	uint8_t mode;       /* which accesses ask the input for interference */
	jmp_buf killed;
};

enum { MODE_LOADS = 1, MODE_SHARED = 2, MODE_NESTED = 4 };

extern struct active actives[DEPTH];
extern int depth; /* calls under way */

/* ------------------------------------------------------------ invariants.c */

extern bool touched[PORTS]; /* its guest wrote the window during the outermost call */

/* The counters of a port that is not inside. */
void check_sums(uint32_t id);
/* Of a call that has ended: what is new in the lane is for this receiver, from this sender. */
void check_delivered(const struct active *active, const struct switch_shared *before, uint32_t to);
/* Every byte of every window that no call under way, named by their ports' bits, may write. */
void check_windows(uint64_t callers);

/* --------------------------------------------------------- window_fuzzer.c */

/* One step of a guest or of the host, as the input wants it. */
void operation(void);

#endif
