/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A counter to which several guests add, with several vCPUs each; a0 is the amount. It returns the
 * new value, and stores it in the caller's window too, where the guest can read it without a call:
 * vCPU n finds its own last answer in the n-th 8 bytes. Declare it with as many vCPUs as are wanted
 * (SharedObject.vcpus), up to one for each 8 bytes of the window.
 *
 * The addition is one atomic instruction, so a vCPU that stops in the middle of a call delays
 * nobody, and it does not matter who else adds. Each answer has one writer, its vCPU. The counter
 * is never read from a window, where a guest can write anything.
 */
#include "elisa_memory.h"
#include "elisa_object.h"

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	uint64_t *counter = (uint64_t *)env->shared;
	uint64_t *answers = (uint64_t *)(env->windows + env->id * env->window_size);
	uint64_t value = __atomic_add_fetch(counter, a0, __ATOMIC_RELAXED);

	(void)a1;
	(void)a2;
	WRITE_ONCE(answers[env->vcpu], value);
	return value;
}
