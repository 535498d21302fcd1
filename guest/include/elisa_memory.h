/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Access to memory that somebody else changes at the same time, and the memory functions that a
 * compiler may call even in freestanding code.
 */
#ifndef ELISA_MEMORY_H
#define ELISA_MEMORY_H

#include <stdint.h>

/*
 * Exactly one load or store of the object's own size: the compiler may neither repeat a load nor
 * invent one. Every value out of a window is read with READ_ONCE, then checked, then used.
 */
#define READ_ONCE(object) (*(const volatile __typeof__(object) *)&(object))
#define WRITE_ONCE(object, value) (*(volatile __typeof__(object) *)&(object) = (value))

/* Loads after LOAD_ACQUIRE and stores before STORE_RELEASE stay on their side of it. */
#define LOAD_ACQUIRE(object) __atomic_load_n(&(object), __ATOMIC_ACQUIRE)
#define STORE_RELEASE(object, value) __atomic_store_n(&(object), (value), __ATOMIC_RELEASE)

#if !__STDC_HOSTED__

/*
 * GCC may turn an assignment or a loop into a call of these three. Weak, so that every source of
 * an object can include this header. `rep movsb` and `rep stosb` rely on a clear direction flag,
 * which the sub entry establishes; they also keep the compiler from recognising its own idiom
 * here and calling the function from inside itself.
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
