/* SPDX-License-Identifier: Apache-2.0 */
/* An object that works for a0 turns of equal length, and returns their number. */
#include "elisa_object.h"

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	uint64_t turns = 0;

	(void)a1;
	(void)a2;
	(void)env;
	while (turns < a0) {
		turns++;
		__asm__ volatile("" : "+r"(turns)); /* or the compiler would know the result */
	}
	return turns;
}
