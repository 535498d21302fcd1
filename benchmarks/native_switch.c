/* SPDX-License-Identifier: Apache-2.0 */
/* The measured loop of native_switch.py, in C, so that no Python is measured. */
#include <time.h>

#include "elisa_memory.h"
#include "elisa_object.h"
#include "switch.h"

static uint64_t nanoseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/*
 * Send `burst` frames, and let the receiver give all slots of its lane back without looking at
 * them; `calls` times. Return the nanoseconds for all of it, or 0 if a frame was not delivered.
 */
uint64_t native_switch_measure(const struct elisa_env *env, uint32_t receiver, uint32_t burst,
			       uint32_t calls)
{
	struct switch_window *window =
		(struct switch_window *)(env->windows + receiver * env->window_size);
	struct switch_lane_control *lane = &window->lane[env->id];
	uint32_t slots = ((struct switch_shared *)env->shared)->tx_slots;
	uint32_t before = lane->head;
	uint64_t start = nanoseconds(), took;

	for (uint32_t call = 0; call < calls; call++) {
		elisa_serve(SWITCH_SEND(env->id, 0), (call * burst) % slots, burst, env);
		STORE_RELEASE(lane->tail, LOAD_ACQUIRE(lane->head));
	}
	took = nanoseconds() - start;
	return lane->head - before == burst * calls ? took : 0;
}
