/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Does what its input says, step by step: calls, VMFUNCs, accesses, a CR3 of its own.
 *
 * input     struct step, in order; the guest stores `result`, then 1 in `done`
 * result[0] steps done
 */
#include "runtime.h"

enum { CALL, VMFUNC, MARK, READ, WRITE, CALL_WITH_CR3 };

struct step {
	uint32_t what;
	uint32_t slot; /* of the gate, for calls */
	uint64_t a, b, c;
	uint64_t cr3; /* for CALL_WITH_CR3; the stack and this program have to be mapped there, too */
	uint64_t result;
	uint64_t done;
};

static uint64_t call_with_cr3(const struct step *step)
{
	uint64_t own, result;

	__asm__ volatile("mov %%cr3, %0" : "=r"(own));
	__asm__ volatile("mov %0, %%cr3" : : "r"(step->cr3) : "memory");
	result = object_call(step->a, step->b, step->c, step->slot);
	__asm__ volatile("mov %0, %%cr3" : : "r"(own) : "memory");
	return result;
}

static uint64_t vmfunc(uint64_t function, uint64_t index)
{
	__asm__ volatile("vmfunc" : : "a"(function), "c"(index) : "memory");
	return 0;
}

static uint64_t do_step(const struct step *step)
{
	switch (step->what) {
	case CALL:
		return object_call(step->a, step->b, step->c, step->slot);
	case VMFUNC:
		return vmfunc(step->a, step->b);
	case MARK:
		mark((uint32_t)step->a);
		return 0;
	case READ:
		return *(volatile uint64_t *)step->a;
	case WRITE:
		*(volatile uint64_t *)step->a = step->b;
		return 0;
	case CALL_WITH_CR3:
		return call_with_cr3(step);
	default:
		fail(__FILE__, __LINE__, "a known step", step->what, 0);
	}
}

uint32_t guest_main(void)
{
	struct step *step = (struct step *)boot_info->input;
	uint64_t steps = boot_info->input_size / sizeof(*step);

	for (uint64_t n = 0; n < steps; n++) {
		uint64_t result = do_step(&step[n]);

		step[n].result = result;
		WRITE_ONCE(step[n].done, 1);
		boot_info->result[0] = n + 1;
	}
	return 0;
}
