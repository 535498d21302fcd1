/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Access to memory that others change at the same time, and the memory functions that a compiler
 * may call even in freestanding code.
 */
#ifndef ELISA_MEMORY_H
#define ELISA_MEMORY_H

#include <stdint.h>

/*
 * Exactly one load or store of the object's size: the compiler may neither repeat nor invent one.
 * Read every value in a window with READ_ONCE, then check it, then use it.
 */
#define READ_ONCE(object) (*(const volatile __typeof__(object) *)&(object))
#define WRITE_ONCE(object, value) (*(volatile __typeof__(object) *)&(object) = (value))

/* Later accesses stay behind LOAD_ACQUIRE, earlier ones before STORE_RELEASE. */
#define LOAD_ACQUIRE(object) __atomic_load_n(&(object), __ATOMIC_ACQUIRE)
#define STORE_RELEASE(object, value) __atomic_store_n(&(object), (value), __ATOMIC_RELEASE)

#if !__STDC_HOSTED__

/*
 * GCC may turn an assignment or a loop into a call of these three. They are weak, so that every
 * source of an object can include this header. `rep movsb` and `rep stosb` need the direction flag
 * clear, which the gate ensures. They also keep the compiler from recognising the loop, and
 * turning it into a call of the function itself.
 */
__attribute__((weak)) void *memcpy(void *target, const void *source, __SIZE_TYPE__ bytes)
{
	void *start = target;

	__asm__ volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(bytes) : : "memory");
	return start;
}

__attribute__((weak)) void *memset(void *target, int value, __SIZE_TYPE__ bytes)
{
	void *start = target;

	__asm__ volatile("rep stosb" : "+D"(target), "+c"(bytes) : "a"(value) : "memory");
	return start;
}

__attribute__((weak)) void *memmove(void *target, const void *source, __SIZE_TYPE__ bytes)
{
	volatile uint8_t *to = target;
	const volatile uint8_t *from = source;

	if ((uintptr_t)target - (uintptr_t)source >= bytes)
		return memcpy(target, source, bytes);
	while (bytes--)
		to[bytes] = from[bytes];
	return target;
}

#endif /* !__STDC_HOSTED__ */

#endif
