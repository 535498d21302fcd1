/* SPDX-License-Identifier: Apache-2.0 */
/* An object that reads and writes at odd addresses, as C on x86 may: of shared memory and window. */
#include "elisa_memory.h"
#include "elisa_object.h"

typedef uint64_t word __attribute__((aligned(1), may_alias));

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	word *sum = (word *)(env->shared + 3);
	word *window = (word *)(env->windows + env->id * env->window_size + 5);

	(void)a1;
	(void)a2;
	WRITE_ONCE(*sum, READ_ONCE(*sum) + a0);
	WRITE_ONCE(*window, *sum);
	return *sum;
}
