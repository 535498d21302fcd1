/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bounds that hold for speculation as well (Spectre v1, T23): an index from a guest that passed a
 * check is 0 on every path that the processor only guessed.
 *
 *	uint64_t to = READ_ONCE(*word);
 *
 *	if (to >= env->guests)
 *		return ELISA_ERROR(ELISA_EINVAL);
 *	to = elisa_index_nospec(to, env->guests);
 *
 * Where the size is a power of two, `index & (size - 1)` does the same and costs less. Needed
 * wherever memory is read at an address that a guest's value decides, and what was read decides
 * another address; a table of one object's own that holds nothing of other guests needs none.
 */
#ifndef ELISA_NOSPEC_H
#define ELISA_NOSPEC_H

#include <stdint.h>

/* index where index < size, else 0; no branch, and no way for the compiler to make one. */
static inline uint64_t elisa_index_nospec(uint64_t index, uint64_t size)
{
	uint64_t mask;

	/* Carry where index is below size; subtracting it from itself with borrow spreads it. */
	__asm__ volatile("cmp	%[size], %[index]\n\t"
			 "sbb	%[mask], %[mask]"
			 : [mask] "=r"(mask)
			 : [index] "r"(index), [size] "rm"(size)
			 : "cc");
	return index & mask;
}

#endif
