/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A counter that several guests add to: a0 is the amount. Returns the new value and leaves it in
 * the first 8 bytes of the caller's window as well, where the guest reads it without a call.
 *
 * One atomic addition, so a vCPU that stops in the middle of a call holds nobody up. The counter
 * is never read out of a window: a guest can write whatever it likes there.
 */
#include "elisa_memory.h"
#include "elisa_object.h"

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	uint64_t *counter = (uint64_t *)env->shared;
	uint64_t *window = (uint64_t *)(env->windows + env->id * env->window_size);
	uint64_t value = __atomic_add_fetch(counter, a0, __ATOMIC_RELAXED);

	(void)a1;
	(void)a2;
	WRITE_ONCE(*window, value);
	return value;
}
