/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Calls the counter object with every register and flag odd, and looks at what comes back.
 *
 * param[0]  calls
 * result[0] last value of the counter
 */
#include "events.h"
#include "runtime.h"

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, FLAGS, WORDS };

#define DIRECTION_FLAG 0x400ull
#define NESTED_TASK_FLAG 0x4000ull
#define ALIGNMENT_FLAG 0x40000ull
#define MSR_FS_BASE 0xc0000100
#define MSR_GS_BASE 0xc0000101
#define AMOUNT 5

/* Addressed absolutely, so that no register is needed to load and store the others. */
uint64_t registers_in[WORDS], registers_out[WORDS], registers_target, registers_rsp;
void registers_call(void);

#define MOVE_ALL(move)                                                                             \
	move("0", "rax") move("8", "rcx") move("16", "rdx") move("24", "rbx") move("40", "rbp")    \
	move("48", "rsi") move("56", "rdi") move("64", "r8") move("72", "r9") move("80", "r10")    \
	move("88", "r11") move("96", "r12") move("104", "r13") move("112", "r14") move("120", "r15")
#define LOAD(offset, name) "mov registers_in+" offset ", %" name "\n\t"
#define STORE(offset, name) "mov %" name ", registers_out+" offset "\n\t"

__asm__(".text\n"
	"registers_call:\n\t"
	"push	%rbx\n\tpush	%rbp\n\tpush	%r12\n\tpush	%r13\n\tpush	%r14\n\tpush	%r15\n\t"
	"mov	%rsp, registers_rsp\n\t"
	"pushq	registers_in+128\n\t"
	"popf\n\t" MOVE_ALL(LOAD)
	"call	*registers_target\n\t" MOVE_ALL(STORE)
	"mov	%rsp, registers_out+32\n\t"
	"pushf\n\t"
	"popq	registers_out+128\n\t"
	"pushq	$0x202\n\t"
	"popf\n\t"
	"mov	registers_rsp, %rsp\n\t"
	"pop	%r15\n\tpop	%r14\n\tpop	%r13\n\tpop	%r12\n\tpop	%rbp\n\tpop	%rbx\n\t"
	"ret\n");

uint32_t guest_main(void)
{
	static const uint8_t cleared[] = {RCX, RSI, RDI, R8, R9, R10, R11};
	static const uint8_t kept[] = {RBX, RBP, R12, R13, R14, R15};
	const struct boot_attachment *attachment = &boot_info->attachment[0];
	uint64_t last = 0;

	registers_target = boot_info->elisa_call;
	for (uint64_t call = 1; call <= boot_info->param[0]; call++) {
		for (int i = 0; i < WORDS; i++)
			registers_in[i] = 0x0123456789abcdefull * (uint64_t)(i + 1) * call;
		registers_in[RDI] = AMOUNT;
		registers_in[RCX] = attachment->gate_slot;
		/* Interrupts stay on. AC in kernel mode: SMAP does not hold for this caller. */
		registers_in[FLAGS] = 0x202 | DIRECTION_FLAG | NESTED_TASK_FLAG |
				      (call & 1 ? ALIGNMENT_FLAG : 0);
		write_msr(MSR_FS_BASE, 0x0000123456789abdull + call);
		write_msr(MSR_GS_BASE, 0xffff923456789abdull + call);
		registers_call();
		last = registers_out[RAX];
		ASSERT(last >= AMOUNT * call);
		ASSERT_EQUAL(*(volatile uint64_t *)attachment->window, last);
		ASSERT_EQUAL(registers_out[RDX], last); /* how the result crosses */
		ASSERT_EQUAL(registers_out[RSP], registers_rsp);
		ASSERT_EQUAL(registers_out[FLAGS] & (DIRECTION_FLAG | ALIGNMENT_FLAG), 0);
		ASSERT_EQUAL(registers_out[FLAGS] & NESTED_TASK_FLAG, NESTED_TASK_FLAG);
		ASSERT_EQUAL(read_msr(MSR_FS_BASE), 0x0000123456789abdull + call);
		ASSERT_EQUAL(read_msr(MSR_GS_BASE), 0xffff923456789abdull + call);
		for (uint32_t i = 0; i < sizeof(cleared); i++)
			ASSERT_EQUAL(registers_out[cleared[i]], 0);
		for (uint32_t i = 0; i < sizeof(kept); i++)
			ASSERT_EQUAL(registers_out[kept[i]], registers_in[kept[i]]);
	}
	boot_info->result[0] = last;
	return 0;
}
