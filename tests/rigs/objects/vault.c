/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An object with something to lose. Its shared memory begins with a secret and the word that opens
 * it; both are the VMM's to write. Who knows the word finds the secret in its window.
 *
 *   a0 KNOCK: counts the call, returns the count
 *   a0 OPEN:  a1 is the word; a2 the place in the window, in bytes
 *   a0 NOTE:  keeps the number a2 in place a1 of a table that the object has for its guests
 *   a0 POST:  keeps the first a1 bytes of the caller's window
 */
#include "elisa_memory.h"
#include "elisa_nospec.h"
#include "elisa_object.h"

enum { KNOCK, OPEN, NOTE, POST };

#define NOTES 512

struct vault {
	uint64_t secret;
	uint64_t knocks;
	uint64_t unused[4];
	uint64_t word;
	uint64_t margin;
	uint8_t letter[24];
};

static uint64_t vault_notes[NOTES] __attribute__((aligned(4096)));

/*
 * What guests want to run with arguments of their own: no entry leads to it but through a check. At
 * the start of a page, because a guest that chooses the page behind a GVA chooses no offset in it.
 */
__attribute__((noinline, used, aligned(4096))) void vault_copy(uint64_t *to, const uint64_t *from)
{
	WRITE_ONCE(*to, READ_ONCE(*from));
}

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	struct vault *vault = (struct vault *)env->shared;
	uint64_t window = env->windows + env->id * env->window_size;

	switch (a0) {
	case KNOCK:
		return __atomic_add_fetch(&vault->knocks, 1, __ATOMIC_RELAXED);
	case OPEN:
		if (a1 != READ_ONCE(vault->word))
			return ELISA_ERROR(ELISA_EPERM);
		/* A name for what lies behind the check. */
		__asm__ volatile(".globl vault_opened\nvault_opened:");
		if (a2 > env->window_size - sizeof(vault->secret))
			return ELISA_ERROR(ELISA_EINVAL);
		a2 = elisa_index_nospec(a2, env->window_size - sizeof(vault->secret) + 1);
		vault_copy((uint64_t *)(window + a2), &vault->secret);
		return 0;
	case NOTE:
		if (a1 >= NOTES)
			return ELISA_ERROR(ELISA_EINVAL);
		a1 = elisa_mask_nospec(a1, NOTES);
		WRITE_ONCE(vault_notes[a1], a2);
		return 0;
	case POST:
		if (a1 > sizeof(vault->letter))
			return ELISA_ERROR(ELISA_EINVAL);
		a1 = elisa_index_nospec(a1, sizeof(vault->letter) + 1);
		memcpy(vault->letter, (const void *)window, a1);
		return 0;
	default:
		return ELISA_ERROR(ELISA_EINVAL);
	}
}
