/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An object that works for as long as its caller or the host lets it: until the host sets `release`,
 * or for a0 turns. Returns the turns made. The host reads where it is.
 */
#include "elisa_object.h"

struct spin {
	uint64_t begun; /* calls */
	uint64_t ended;
	uint64_t release;
	uint64_t turns; /* of the call that is in here */
};

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	volatile struct spin *spin = (volatile struct spin *)env->shared;
	uint64_t turns = 0;

	(void)a1;
	(void)a2;
	spin->begun = spin->begun + 1;
	while (turns < a0 && !spin->release) {
		turns++;
		spin->turns = turns;
	}
	spin->ended = spin->ended + 1;
	return turns;
}
