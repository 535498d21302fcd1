/* SPDX-License-Identifier: Apache-2.0 */
/* An object that does what its caller says, however wrong: for tests of what stops it. */
#include "elisa_object.h"

enum { HELLO, READ, WRITE, RUN, LOOP, CPUID, VMCALL };

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	uint32_t eax = 0, ebx, ecx = 0, edx;

	switch (a0) {
	case HELLO:
		return 1000 + env->id;
	case READ:
		return *(volatile uint64_t *)a1;
	case WRITE:
		*(volatile uint64_t *)a1 = a2;
		return 0;
	case RUN:
		return ((uint64_t(*)(void))a1)();
	case LOOP:
		*(volatile uint64_t *)env->shared = 1;
		while (*(volatile uint64_t *)env->shared == 1)
			;
		return *(volatile uint64_t *)env->shared;
	case CPUID:
		__asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
		return ebx;
	case VMCALL:
		__asm__ volatile("vmcall" : "+a"(eax) : : "memory");
		return eax;
	default:
		return ELISA_ERROR(ELISA_EINVAL);
	}
}
