/* A shared object with 64 places for numbers: any guest puts one there, any guest looks. */
#include "elisa_memory.h"
#include "elisa_nospec.h"
#include "elisa_object.h"

#define PLACES 64

enum { PUT, LOOK };

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	uint64_t *places = (uint64_t *)env->shared;

	if (a1 >= PLACES)
		return ELISA_ERROR(ELISA_EINVAL);
	a1 = elisa_mask_nospec(a1, PLACES); /* in bounds even where that branch is mispredicted */
	switch (a0) {
	case PUT:
		WRITE_ONCE(places[a1], a2);
		return 0;
	case LOOK:
		return READ_ONCE(places[a1]);
	default:
		return ELISA_ERROR(ELISA_EINVAL);
	}
}
