/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An object with a mistake: it reads where its caller says. The value goes nowhere, so by itself the
 * mistake gives nothing away; but a guest can make the read fault, with registers of its choice.
 */
#include "elisa_memory.h"
#include "elisa_object.h"

/* Internal: no entry leads to it. */
__attribute__((noinline, used, aligned(4096))) void vault_copy(uint64_t *to, const uint64_t *from)
{
	WRITE_ONCE(*to, READ_ONCE(*from));
}

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	(void)a0;
	(void)a1;
	(void)READ_ONCE(*(uint64_t *)a2);
	/* A public word, for the caller to see. */
	vault_copy((uint64_t *)(env->windows + env->id * env->window_size + 8),
		   (uint64_t *)(env->shared + 8));
	return 0;
}
