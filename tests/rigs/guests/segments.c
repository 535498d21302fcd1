/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs VMFUNC from code segments other than the kernel's: in compatibility mode (32-bit code in
 * long mode) and at CPL 3, in each of their combinations.
 *
 * input     struct jump, in order. The VMM has mapped a page of the guest's own that ends or goes on
 *           with VMFUNC and INT $0x80 wherever a jump goes, for the privilege level that it goes to
 * result[0] jumps that came back
 *
 * A jump is over at INT $0x80, wherever that comes from, or at an invalid opcode.
 */
#include "descriptors.h"
#include "runtime.h"

struct jump {
	uint64_t target; /* address of VMFUNC */
	uint64_t slot;
	uint64_t code, data; /* selectors: enum below */
	uint64_t rsp;
	uint64_t result; /* RAX at INT $0x80 */
	uint64_t done;
	uint64_t faulted; /* 1 at an invalid opcode */
	uint64_t rip;     /* its address */
	uint64_t left;    /* all registers but RSP, one over the other */
};

/* 0x08 to 0x18 are the VMM's: 64-bit code, data, and the TSS. tests/rigs/attacks/segments.py knows these. */
enum { NARROW_CODE = 0x28, USER_NARROW_CODE = 0x33, USER_DATA = 0x3b, USER_CODE = 0x43 };

static uint64_t descriptors[] = {
	[NARROW_CODE / 8] = 0x00cf9b000000ffff,
	[USER_NARROW_CODE / 8] = 0x00cffb000000ffff,
	[USER_DATA / 8] = 0x00cff3000000ffff,
	[USER_CODE / 8] = 0x00affb000000ffff,
};

/* Addressed absolutely: all registers but RSP belong to what runs next. */
uint64_t segments_task, segments_rsp, segments_result;
uint64_t segments_faulted, segments_rip, segments_left;
void segments_jump(const struct jump *jump);
void segments_return(void);
void segments_invalid(void);

__asm__(".text\n"
	"segments_jump:\n\t"
	"push	%rbx\n\tpush	%rbp\n\tpush	%r12\n\tpush	%r13\n\tpush	%r14\n\tpush	%r15\n\t"
	"pushf\n\t"
	"mov	%rsp, segments_rsp\n\t"
	"lea	-256(%rsp), %rax\n\t"
	"and	$-16, %rax\n\t"
	"mov	segments_task, %rcx\n\t"
	"mov	%rax, 4(%rcx)\n\t" /* RSP0: where INT at CPL 3 pushes */
	"push	24(%rdi)\n\t"
	"push	32(%rdi)\n\t"
	"push	$0x202\n\t"
	"push	16(%rdi)\n\t"
	"push	(%rdi)\n\t"
	"mov	8(%rdi), %rcx\n\t"
	"xor	%eax, %eax\n\t"
	"xor	%edx, %edx\n\t"
	"xor	%ebx, %ebx\n\t"
	"xor	%ebp, %ebp\n\t"
	"xor	%esi, %esi\n\t"
	"xor	%edi, %edi\n\t"
	"iretq\n"
	"segments_invalid:\n\t"
	"or	%rax, %rbx\n\tor	%rcx, %rbx\n\tor	%rdx, %rbx\n\tor	%rbp, %rbx\n\t"
	"or	%rsi, %rbx\n\tor	%rdi, %rbx\n\tor	%r8, %rbx\n\tor	%r9, %rbx\n\t"
	"or	%r10, %rbx\n\tor	%r11, %rbx\n\tor	%r12, %rbx\n\tor	%r13, %rbx\n\t"
	"or	%r14, %rbx\n\tor	%r15, %rbx\n\t"
	"mov	%rbx, segments_left\n\t"
	"pop	segments_rip\n\t"
	"movq	$1, segments_faulted\n"
	"segments_return:\n\t" /* interrupts off until the popf */
	"mov	segments_rsp, %rsp\n\t"
	"mov	%rax, segments_result\n\t"
	"popf\n\t"
	"pop	%r15\n\tpop	%r14\n\tpop	%r13\n\tpop	%r12\n\tpop	%rbp\n\tpop	%rbx\n\t"
	"ret\n");

uint32_t guest_main(void)
{
	struct jump *jump = (struct jump *)boot_info->input;
	uint64_t jumps = boot_info->input_size / sizeof(*jump);

	segments_task = load_descriptors(descriptors, sizeof(descriptors) / sizeof(*descriptors),
					 segments_return);
	interrupt_handler(6, segments_invalid);
	for (uint64_t n = 0; n < jumps; n++) {
		segments_faulted = 0;
		segments_jump(&jump[n]);
		jump[n].result = segments_result;
		jump[n].faulted = segments_faulted;
		jump[n].rip = segments_rip;
		jump[n].left = segments_left;
		WRITE_ONCE(jump[n].done, 1);
		boot_info->result[0] = n + 1;
	}
	return 0;
}
