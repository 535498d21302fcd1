/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bounds that hold under speculation too (Spectre v1, T23): on a path that the processor takes by
 * misprediction, an index that is out of bounds becomes one that is in bounds.
 *
 *	uint64_t to = READ_ONCE(*word);
 *
 *	if (to >= env->guests)
 *		return ELISA_ERROR(ELISA_EINVAL);
 *	to = elisa_index_nospec(to, env->guests);
 *
 * Use one of them wherever a guest's value decides which address is accessed, next to the access.
 * Where the index is used again after a call, bound it again: that costs less than keeping it.
 *
 * A bounded index has to stay in a register (T39). In memory it is not safe: a load may run ahead
 * of the store before it (speculative store bypass), and get what lay there earlier, perhaps the
 * guest's. The guest owns SPEC_CTRL, so nothing else forbids that. Hence the instruction that bounds
 * the index carries a DS prefix, which 64-bit mode ignores, as a mark. The toolchain finds it,
 * follows the index from there, and refuses an object in which it is stored, loaded again and used
 * as an address (pykvm/elisa/masked_indices.py). Where it has to lie in memory, a call of
 * elisa_barrier_nospec between the store and the use makes it safe.
 */
#ifndef ELISA_NOSPEC_H
#define ELISA_NOSPEC_H

#include <stdint.h>

#define ELISA_NOSPEC_MARK ".byte 0x3e\n\t" /* DS prefix of the next instruction */

/* Return index if index < size, else 0, without a branch that the compiler could introduce. */
static inline uint64_t elisa_index_nospec(uint64_t index, uint64_t size)
{
	uint64_t mask;

	/* cmp sets the carry if index < size; sbb turns it into all ones, or zeros. */
	__asm__ volatile(ELISA_NOSPEC_MARK "cmp	%[size], %[index]\n\t"
			 "sbb	%[mask], %[mask]\n\t"
			 ELISA_NOSPEC_MARK "and	%[mask], %[index]"
			 : [mask] "=&r"(mask), [index] "+r"(index)
			 : [size] "rm"(size)
			 : "cc");
	return index;
}

/* Return index modulo size, a power of two. One instruction if the size is a constant. */
static inline uint64_t elisa_mask_nospec(uint64_t index, uint64_t size)
{
	__asm__ volatile(ELISA_NOSPEC_MARK "and	%[mask], %[index]"
			 : [index] "+r"(index)
			 : [mask] "re"(size - 1)
			 : "cc");
	return index;
}

/* Let no instruction behind it begin before all those ahead of it are done (SDM vol. 2A, LFENCE). */
static inline void elisa_barrier_nospec(void)
{
	__asm__ volatile("lfence" : : : "memory");
}

#endif
