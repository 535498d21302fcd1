/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Call an attached object from user mode (CPL 3), with unusual values in every register and flag,
 * and time empty calls.
 *
 * param[0]  calls with unusual registers
 * param[1]  timed calls
 * param[2]  user address of the page `user_page` (user_mode.S)
 * param[3]  user address of the page that boot_info.input names, which this program may write
 * param[4]  bit 0: set CR0.AM, and RFLAGS.AC for the calls with unusual registers; bit 1: odd rsp
 * param[5]  first argument of the calls with unusual registers
 * param[6]  address of elisa_call; boot_info's is 0, because this kernel may not access user pages
 * samples   param[1] time differences of nothing, then as many of calls
 * result[0] calls with unusual registers that came back
 * result[1] result of the last of them
 */
#include "descriptors.h"
#include "runtime.h"

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, FLAGS, WORDS };

#define DIRECTION_FLAG 0x400ull
#define NESTED_TASK_FLAG 0x4000ull
#define ALIGNMENT_FLAG 0x40000ull
#define CR0_ALIGNMENT_MASK 0x40000ull

/* user_mode.S knows the offsets. */
struct user_area {
	uint64_t in[WORDS];
	uint64_t out[WORDS];
	uint64_t target;
	uint64_t ticks;
};

#define STACK_BYTES 2048 /* below the area, in the same page */

extern const uint8_t user_page[], user_registers[], user_time_call[], user_time_empty[];
void user_run(uint64_t rip, uint64_t rsp);
void user_return(void);

uint64_t user_kernel_rsp, user_task_segment;

/* The VMM's descriptors, then data and code for CPL 3. */
static uint64_t descriptors[VMM_DESCRIPTORS + 2] = {
	[VMM_DESCRIPTORS] = 0x00cff3000000ffff,
	[VMM_DESCRIPTORS + 1] = 0x00affb000000ffff,
};

static void check_alignment(void)
{
	uint64_t cr0;

	__asm__ volatile("mov %%cr0, %0" : "=r"(cr0));
	__asm__ volatile("mov %0, %%cr0" : : "r"(cr0 | CR0_ALIGNMENT_MASK));
}

static void call_oddly(struct user_area *area, uint64_t code, uint64_t rsp, uint64_t flags)
{
	static const uint8_t cleared[] = {RCX, RSI, RDI, R8, R9, R10, R11};
	static const uint8_t kept[] = {RBX, RBP, R12, R13, R14, R15};

	for (uint64_t call = 1; call <= boot_info->param[0]; call++) {
		for (int i = 0; i < WORDS; i++)
			area->in[i] = 0x0123456789abcdefull * (uint64_t)(i + 1) * call;
		area->in[RDI] = boot_info->param[5];
		area->in[RCX] = boot_info->attachment[0].gate_slot;
		area->in[FLAGS] = 0x202 | DIRECTION_FLAG | NESTED_TASK_FLAG | flags;
		user_run(code, rsp);
		boot_info->result[0] = call;
		boot_info->result[1] = area->out[RAX];
		ASSERT_EQUAL(area->out[RDX], area->out[RAX]);
		ASSERT_EQUAL(area->out[RSP], rsp);
		/* AC and DF are clear, NT and IF unchanged. */
		ASSERT_EQUAL(area->out[FLAGS] & (ALIGNMENT_FLAG | DIRECTION_FLAG), 0);
		ASSERT_EQUAL(area->out[FLAGS] & (NESTED_TASK_FLAG | 0x200), NESTED_TASK_FLAG | 0x200);
		for (uint32_t i = 0; i < sizeof(cleared); i++)
			ASSERT_EQUAL(area->out[cleared[i]], 0);
		for (uint32_t i = 0; i < sizeof(kept); i++)
			ASSERT_EQUAL(area->out[kept[i]], area->in[kept[i]]);
	}
}

uint32_t guest_main(void)
{
	uint64_t odd = boot_info->param[4] >> 1 & 1;
	uint64_t calls = boot_info->param[1], *sample = (uint64_t *)boot_info->samples;
	/* The area has two addresses: the kernel's, and one for user mode. */
	struct user_area *area = (struct user_area *)(boot_info->input + STACK_BYTES + odd);
	uint64_t rsp = boot_info->param[3] + STACK_BYTES + odd;
	uint64_t code = boot_info->param[2] - (uint64_t)user_page;

	ASSERT(2 * calls * sizeof(*sample) <= boot_info->samples_size);
	touch_for_writing(boot_info->samples, 2 * calls * sizeof(*sample));
	user_task_segment = load_descriptors(descriptors, VMM_DESCRIPTORS + 2, user_return);
	if (boot_info->param[4] & 1)
		check_alignment();
	area->target = boot_info->param[6];
	call_oddly(area, code + (uint64_t)user_registers, rsp,
		   boot_info->param[4] & 1 ? ALIGNMENT_FLAG : 0);
	area->in[RCX] = boot_info->attachment[0].gate_slot;
	for (uint64_t call = 0; call < calls; call++) {
		user_run(code + (uint64_t)user_time_empty, rsp);
		sample[call] = area->ticks;
		user_run(code + (uint64_t)user_time_call, rsp);
		sample[calls + call] = area->ticks;
	}
	return 0;
}
