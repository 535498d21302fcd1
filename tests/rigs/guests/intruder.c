/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs VMFUNC(0, index) at an address of its choice, with registers of its choice, so that it
 * arrives in the gate page at any byte. First and last it makes an honest call.
 *
 * param[0]  slot for the VMFUNC, the gate's own if 0
 * param[1]  address behind the VMFUNC
 * param[2]  what rax, rbx, rdx, rsi, rdi, rbp, rsp and r8 to r15 hold (EAX aside); 0: the address
 *           of a stack that leads back, so that an intrusion that is a call like any other returns
 * param[3]  EAX of the VMFUNC
 * result[0] 1 when the first honest call was made, 2 when the intrusion came back, 3 at the end
 *
 * The VMM has mapped pages of this guest, writable and executable, around param[1].
 */
#include "runtime.h"

uint64_t intruder_rsp;
void intruder_jump(uint64_t target, uint64_t value, uint64_t slot, uint64_t function);

__asm__(".text\n"
	"intruder_jump:\n\t" /* rdi target, rsi value, rdx slot, rcx function */
	"push	%rbx\n\tpush	%rbp\n\tpush	%r12\n\tpush	%r13\n\tpush	%r14\n\tpush	%r15\n\t"
	"mov	%rsp, intruder_rsp\n\t"
	"mov	%rdi, intruder_target\n\t"
	"mov	%rsi, %rax\n\t"
	"shr	$32, %rax\n\t"
	"shl	$32, %rax\n\t"
	"or	%rcx, %rax\n\t"
	"mov	%rdx, %rcx\n\t"
	"mov	%rsi, %rbx\n\tmov	%rsi, %rdx\n\tmov	%rsi, %rdi\n\tmov	%rsi, %rbp\n\t"
	"mov	%rsi, %r8\n\tmov	%rsi, %r9\n\tmov	%rsi, %r10\n\tmov	%rsi, %r11\n\t"
	"mov	%rsi, %r12\n\tmov	%rsi, %r13\n\tmov	%rsi, %r14\n\tmov	%rsi, %r15\n\t"
	"mov	%rsi, %rsp\n\t"
	"jmp	*intruder_target\n"
	/* Where the guest's own pages send it, should it come back to its default context. */
	".globl	intruder_back\n"
	"intruder_back:\n\t"
	"mov	intruder_rsp, %rsp\n\t"
	"cld\n\t"
	"pop	%r15\n\tpop	%r14\n\tpop	%r13\n\tpop	%r12\n\tpop	%rbp\n\tpop	%rbx\n\t"
	"ret\n");
uint64_t intruder_target, intruder_stack;
extern const uint8_t intruder_back[];

static void write_jump_back(uint64_t from, uint64_t to)
{
	/* nop up to the end, where the jump stands: wherever it arrives, it gets there */
	memset((void *)from, 0x90, to - from);
	memcpy((void *)(to - 14), "\xff\x25\0\0\0\0", 6); /* jmp *(%rip) */
	*(uint64_t *)(to - 8) = (uint64_t)intruder_back;
}

uint32_t guest_main(void)
{
	uint64_t slot = boot_info->attachment[0].gate_slot, behind = boot_info->param[1];
	uint64_t gate = (boot_info->elisa_call & ~0xfffull) + 0x1000;

	object_call(1, 0, 0, (uint32_t)slot);
	boot_info->result[0] = 1;
	write_jump_back(gate, gate + 0x2000); /* this guest's own pages at the gate's and sub's place */
	memcpy((void *)(behind - 3), "\x0f\x01\xd4", 3);
	intruder_stack = (uint64_t)intruder_back;
	intruder_jump(behind - 3,
		      boot_info->param[2] ? boot_info->param[2] : (uint64_t)&intruder_stack,
		      boot_info->param[0] ? boot_info->param[0] : slot, boot_info->param[3]);
	boot_info->result[0] = 2;
	object_call(1, 0, 0, (uint32_t)slot);
	boot_info->result[0] = 3;
	return 0;
}
