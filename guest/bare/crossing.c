/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Time empty calls, one at a time: the cost of getting there and back.
 *
 * param[0]  calls of each way
 * param[1]  bit n: do way n (below)
 * param[2]  hypercall number of way 3
 * samples   for each way that is done, in order, as many 64-bit time differences as calls. All ways
 *           share the instructions around the call. So the difference to way 0 is the cost of the
 *           call, from the call (or vmcall) instruction to the one that returns, both included.
 * marks     2n before way n, 2n + 1 after it
 * result[0] ways done, as in param[1]
 */
#include "runtime.h"

enum way { WAY_EMPTY, WAY_VMFUNC, WAY_VMCALL_KERNEL, WAY_VMCALL_USER, WAY_DIRECT, WAYS };

/*
 * rax holds the hypercall number; rcx the gate slot, or the environment of a direct call (a
 * hypercall ignores it); r14 the function to call. The first time stamp is kept in r12 and r13,
 * which every call preserves.
 */
#define TIMED(name, code)                                                                          \
	static __attribute__((noinline)) uint64_t name(uint64_t number, uint64_t rcx,              \
						       uint64_t target)                            \
	{                                                                                          \
		register uint64_t r14 __asm__("r14") = target;                                     \
		uint64_t cycles;                                                                   \
                                                                                                   \
		__asm__ volatile("mov	%[number], %%r15\n\t"                                      \
				 "lfence\n\t"                                                      \
				 "rdtsc\n\t"                                                       \
				 "mov	%%eax, %%r12d\n\t"                                         \
				 "mov	%%edx, %%r13d\n\t"                                         \
				 "mov	%%r15, %%rax\n\t"                                          \
				 "xor	%%edi, %%edi\n\t"                                          \
				 "xor	%%esi, %%esi\n\t"                                          \
				 "xor	%%edx, %%edx\n\t" code "lfence\n\t"                        \
				 "rdtsc\n\t"                                                       \
				 "shl	$32, %%rdx\n\t"                                            \
				 "or	%%rdx, %%rax\n\t"                                          \
				 "shl	$32, %%r13\n\t"                                            \
				 "or	%%r13, %%r12\n\t"                                          \
				 "sub	%%r12, %%rax\n\t"                                          \
				 : "=&a"(cycles), "+c"(rcx), "+r"(r14)                             \
				 : [number] "b"(number)                                            \
				 : "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",    \
				   "r15", "memory", "cc");                                         \
		return cycles;                                                                     \
	}

TIMED(time_empty, "")
TIMED(time_call, "call	*%%r14\n\t")
TIMED(time_vmcall, "vmcall\n\t")

uint32_t guest_main(void)
{
	static uint64_t (*const timed[WAYS])(uint64_t, uint64_t, uint64_t) = {
		time_empty, time_call, time_vmcall, time_vmcall, time_call,
	};
	const uint64_t number[WAYS] = {
		[WAY_VMCALL_KERNEL] = KVM_HC_ELISA_NULL,
		[WAY_VMCALL_USER] = boot_info->param[2],
	};
	const uint64_t rcx[WAYS] = {
		[WAY_VMFUNC] = boot_info->attachment[0].gate_slot,
		[WAY_DIRECT] = (uint64_t)&boot_info->direct,
	};
	const uint64_t target[WAYS] = {
		[WAY_VMFUNC] = boot_info->elisa_call,
		[WAY_DIRECT] = (uint64_t)elisa_serve,
	};
	uint64_t calls = boot_info->param[0];
	uint64_t *sample = (uint64_t *)boot_info->samples;
	uint64_t done = 0;

	ASSERT(calls * WAYS * sizeof(*sample) <= boot_info->samples_size);
	ASSERT(!(boot_info->param[1] & 1 << WAY_VMFUNC) || rcx[WAY_VMFUNC]);
	touch_for_writing(boot_info->samples, calls * WAYS * sizeof(*sample));
	for (uint32_t way = 0; way < WAYS; way++) {
		if (!(boot_info->param[1] >> way & 1))
			continue;
		for (int i = 0; i < 4; i++) /* load and cache what is needed on first use */
			timed[way](number[way], rcx[way], target[way]);
		mark(2 * way);
		for (uint64_t i = 0; i < calls; i++)
			*sample++ = timed[way](number[way], rcx[way], target[way]);
		mark(2 * way + 1);
		done |= 1u << way;
	}
	boot_info->result[0] = done;
	return 0;
}
