/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host's side of the switch: what only the process that owns its memory may do, the baseline's
 * entry, and a port's traffic as a guest would handle it. Not part of what runs in a sub context.
 *
 * This file is also the cffi declaration of these functions, so it holds nothing else.
 */

/* Everything zero, then the geometry, which the caller has checked. No port is enabled. */
void switch_initialise(struct switch_shared *shared, uint32_t ports, uint32_t tx_slots,
		       uint32_t lane_slots, uint32_t frame_limit, uint32_t max_age,
		       uint32_t group_forward_mask, uint64_t hash_seed);

/* Clear the port's bit and forget what was learned behind it. Calls already inside go on. */
void switch_disable_port(struct switch_shared *shared, uint32_t port);
/*
 * The port's vCPU can never run again. If it ended inside the switch: frames that its call had
 * delivered are made visible, and its counters add up again.
 */
void switch_port_left(struct switch_shared *shared, uint8_t *windows, uint64_t window_size,
		      uint32_t port);
/* 0 when no call of the port is inside, else a number that changes when this call ends. */
uint64_t switch_port_inside(const struct switch_shared *shared, uint32_t port);
/*
 * Give the port a window of zeros with its geometry, empty lanes from and to it, and its bit.
 * Its guest must not run yet, and no call of another port may be inside that began before
 * switch_disable_port: such a call could still write frames for the port's previous guest.
 */
void switch_enable_port(struct switch_shared *shared, uint8_t *windows, uint64_t window_size,
			uint32_t port);

/* One epoch on: stations silent for more than max_age epochs are forgotten. */
void switch_tick(struct switch_shared *shared);
/*
 * Bind an address to a port for good, on every VLAN; -1 when its line of the table is full of
 * pinned ones.
 */
int switch_pin(struct switch_shared *shared, uint64_t address, uint32_t port);
/* The table's words for `address`, pinned or learned on any VLAN, are removed. */
void switch_unpin(struct switch_shared *shared, uint64_t address);

/* The baseline: elisa_serve(args[0], args[1], args[2], env), called by the VMM's run loop. */
uint64_t switch_hypercall(void *env, const uint64_t args[6]);

/* What a guest does with its own window. */
void switch_window_put(uint8_t *window, uint32_t slot, const uint8_t *frame, uint32_t length);
/*
 * Take up to `limit` frames of the lane from `source`: bytes to `frames`, one after another, and
 * lengths to `lengths`; how many. `frames` has room for limit * SWITCH_MAX_FRAME bytes. The
 * geometry comes from `shared`, as a window's own description could be forged.
 */
uint32_t switch_window_take(const struct switch_shared *shared, uint8_t *window, uint32_t source,
			    uint8_t *frames, uint32_t *lengths, uint32_t limit);
