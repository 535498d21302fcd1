/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bounds that hold under speculation too (Spectre v1, T23): on a path that the processor takes by
 * misprediction, an index that is out of bounds becomes 0.
 *
 *	uint64_t to = READ_ONCE(*word);
 *
 *	if (to >= env->guests)
 *		return ELISA_ERROR(ELISA_EINVAL);
 *	to = elisa_index_nospec(to, env->guests);
 *
 * If the size is a power of two, `index & (size - 1)` does the same at a lower cost. Use one of
 * them wherever a guest's value decides which address is read, and what was read decides another
 * address. A table that holds nothing of other guests needs neither.
 */
#ifndef ELISA_NOSPEC_H
#define ELISA_NOSPEC_H

#include <stdint.h>

/* Return index if index < size, else 0, without a branch that the compiler could introduce. */
static inline uint64_t elisa_index_nospec(uint64_t index, uint64_t size)
{
	uint64_t mask;

	/* cmp sets the carry if index < size; sbb turns it into all ones, or zeros. */
	__asm__ volatile("cmp	%[size], %[index]\n\t"
			 "sbb	%[mask], %[mask]"
			 : [mask] "=r"(mask)
			 : [index] "r"(index), [size] "rm"(size)
			 : "cc");
	return index & mask;
}

#endif
