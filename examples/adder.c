/* A shared object: one sum, to which every guest that it is attached to may add. */
#include "elisa_object.h"

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	uint64_t *sum = (uint64_t *)env->shared; /* no guest can reach it, only this code */

	return __atomic_add_fetch(sum, a0 + a1 + a2, __ATOMIC_RELAXED);
}
