/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An object that takes its time: until the host sets `release`. Meanwhile its caller's first two
 * arguments stay where they are, and an interrupt may come.
 */
#include "elisa_memory.h"
#include "elisa_object.h"

struct slow {
	uint64_t secret;
	uint64_t begun; /* calls */
	uint64_t ended;
	uint64_t release;
	uint64_t turns; /* of the call that is in here */
};

/* Internal: no entry leads to it. At the start of a page, as the vault's. */
__attribute__((noinline, used, aligned(4096))) void vault_copy(uint64_t *to, const uint64_t *from)
{
	WRITE_ONCE(*to, READ_ONCE(*from));
}

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	struct slow *slow = (struct slow *)env->shared;
	uint64_t turns = 0;

	(void)a2;
	WRITE_ONCE(slow->begun, slow->begun + 1);
	while (!READ_ONCE(slow->release)) {
		WRITE_ONCE(slow->turns, ++turns);
		__asm__ volatile("" : : "D"(a0), "S"(a1));
	}
	WRITE_ONCE(slow->ended, slow->ended + 1);
	/* A public word, for the caller to see. */
	vault_copy((uint64_t *)(env->windows + env->id * env->window_size + 8), &slow->turns);
	return turns;
}
