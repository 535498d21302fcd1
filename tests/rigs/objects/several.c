/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An object that several vCPUs enter, which stay inside until the host sets `release`.
 *
 *   a0 WHO:     returns the environment: id << 32 | vcpus << 16 | vcpu
 *   a0 STAY:    fills words on its stack with a1, waits unless a2 is set, returns how many changed
 *   a0 ADD:     adds a1 to the sum as if nobody else did
 *   a0 ADD_OWN: adds a1 to the calling vCPU's own sum
 */
#include "elisa_memory.h"
#include "elisa_object.h"

enum { WHO, STAY, ADD, ADD_OWN };

#define WORDS 256
#define VCPUS 8

struct several {
	uint64_t inside; /* vCPUs that wait */
	uint64_t release;
	uint64_t sum;
	uint64_t unused;
	uint64_t own[];
};

static void wait(struct several *several)
{
	__atomic_add_fetch(&several->inside, 1, __ATOMIC_SEQ_CST);
	while (!READ_ONCE(several->release))
		__asm__ volatile("pause");
	__atomic_sub_fetch(&several->inside, 1, __ATOMIC_SEQ_CST);
}

static uint64_t stay(struct several *several, uint64_t word, uint64_t leave)
{
	volatile uint64_t words[WORDS];
	uint64_t changed = 0;

	for (uint32_t n = 0; n < WORDS; n++)
		words[n] = word;
	if (!leave)
		wait(several);
	for (uint32_t n = 0; n < WORDS; n++)
		changed += words[n] != word;
	return changed;
}

uint64_t elisa_serve(uint64_t a0, uint64_t a1, uint64_t a2, const struct elisa_env *env)
{
	struct several *several = (struct several *)env->shared;
	uint64_t *own = &several->own[env->id * VCPUS + env->vcpu];
	uint64_t value;

	switch (a0) {
	case WHO:
		return (uint64_t)env->id << 32 | env->vcpus << 16 | env->vcpu;
	case STAY:
		return stay(several, a1, a2);
	case ADD:
		value = READ_ONCE(several->sum);
		wait(several);
		WRITE_ONCE(several->sum, value + a1);
		return value + a1;
	case ADD_OWN:
		value = READ_ONCE(*own);
		wait(several);
		WRITE_ONCE(*own, value + a1);
		return value + a1;
	default:
		return ELISA_ERROR(ELISA_EINVAL);
	}
}
