/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs VMFUNC with every register as it likes, at an address as it likes, so that the next
 * instruction, in whatever context, is the one at `behind`.
 *
 * input     struct leap, in order. The VMM has mapped pages of the guest's own, writable and
 *           executable, around every `behind`; the return page is the guest's own as always
 * result[0] leaps done
 *
 * A leap is over when something arrives at leap_back in the default context: through the jump that
 * the guest leaves at `behind`, as the return address on a stack that `rsp` names, or as the handler
 * of an exception in the table `idt`. The guest's own tables and CR3 are in place again then.
 */
#include "runtime.h"

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, FLAGS, WORDS };

struct leap {
	uint64_t behind;    /* address of the byte behind VMFUNC; 0: call the object instead */
	uint64_t cr3;       /* 0: the guest's own */
	uint64_t idt, gdt;  /* addresses of tables of 4096 bytes; 0: the guest's own */
	uint64_t dr0;       /* address of an instruction to stop at; 0: none */
	uint64_t in[WORDS]; /* rsp 0: a stack that leads back */
	uint64_t out[WORDS];
	uint64_t done;
};

/* Addressed absolutely, so that no register is needed to load and store the others. */
uint64_t leap_in[WORDS], leap_out[WORDS], leap_target, leap_rsp, leap_cr3, leap_own_cr3, leap_stack;
void leap_jump(void);
extern const uint8_t leap_back[];

#define MOVE_ALL(move)                                                                             \
	move("8", "rcx") move("16", "rdx") move("24", "rbx") move("40", "rbp") move("48", "rsi")   \
	move("56", "rdi") move("64", "r8") move("72", "r9") move("80", "r10") move("88", "r11")    \
	move("96", "r12") move("104", "r13") move("112", "r14") move("120", "r15")
#define LOAD(offset, name) "mov leap_in+" offset ", %" name "\n\t"
#define STORE(offset, name) "mov %" name ", leap_out+" offset "\n\t"

__asm__(".text\n"
	"leap_jump:\n\t"
	"push	%rbx\n\tpush	%rbp\n\tpush	%r12\n\tpush	%r13\n\tpush	%r14\n\tpush	%r15\n\t"
	"mov	%rsp, leap_rsp\n\t"
	"pushq	leap_in+128\n\t"
	"popf\n\t" MOVE_ALL(LOAD)
	"mov	leap_cr3, %rax\n\t"
	"mov	leap_in+32, %rsp\n\t"
	"mov	%rax, %cr3\n\t"
	"mov	leap_in, %rax\n\t"
	"jmp	*leap_target\n"
	".globl	leap_back\n"
	"leap_back:\n\t"
	"mov	%rax, leap_out\n\t"
	"mov	%rsp, leap_out+32\n\t"
	"mov	leap_rsp, %rsp\n\t"
	"pushf\n\t"
	"popq	leap_out+128\n\t"
	"cld\n\t" MOVE_ALL(STORE)
	"mov	leap_own_cr3, %rax\n\t"
	"mov	%rax, %cr3\n\t"
	"pop	%r15\n\tpop	%r14\n\tpop	%r13\n\tpop	%r12\n\tpop	%rbp\n\tpop	%rbx\n\t"
	"ret\n");

struct pointer {
	uint16_t limit;
	uint64_t base;
} __attribute__((packed));

static void write_leap(uint64_t behind)
{
	memcpy((void *)(behind - 3), "\x0f\x01\xd4", 3);
	memcpy((void *)behind, "\xff\x25\0\0\0\0", 6); /* jmp *(%rip) */
	*(uint64_t *)(behind + 6) = (uint64_t)leap_back;
}

static void do_leap(struct leap *leap)
{
	struct pointer idt = {0xfff, leap->idt}, gdt = {0xfff, leap->gdt}, own_idt, own_gdt;
	uint64_t dr7 = leap->dr0 ? 1 : 0;

	memcpy(leap_in, leap->in, sizeof(leap_in));
	leap_stack = (uint64_t)leap_back;
	if (!leap_in[RSP])
		leap_in[RSP] = (uint64_t)&leap_stack;
	if (leap->behind)
		write_leap(leap->behind);
	leap_target = leap->behind ? leap->behind - 3 : boot_info->elisa_call;
	__asm__ volatile("mov %%cr3, %0" : "=r"(leap_own_cr3));
	leap_cr3 = leap->cr3 ? leap->cr3 : leap_own_cr3;
	__asm__ volatile("sidt %0\n\tsgdt %1" : "=m"(own_idt), "=m"(own_gdt));
	if (leap->gdt)
		__asm__ volatile("lgdt %0" : : "m"(gdt));
	if (leap->idt)
		__asm__ volatile("lidt %0" : : "m"(idt));
	if (leap->dr0)
		__asm__ volatile("mov %0, %%dr0\n\tmov %1, %%dr7" : : "r"(leap->dr0), "r"(dr7));
	leap_jump();
	if (leap->dr0)
		__asm__ volatile("mov %0, %%dr7" : : "r"(0ull));
	__asm__ volatile("lidt %0\n\tlgdt %1" : : "m"(own_idt), "m"(own_gdt));
	memcpy(leap->out, leap_out, sizeof(leap_out));
}

uint32_t guest_main(void)
{
	struct leap *leap = (struct leap *)boot_info->input;
	uint64_t leaps = boot_info->input_size / sizeof(*leap);

	for (uint64_t n = 0; n < leaps; n++) {
		do_leap(&leap[n]);
		WRITE_ONCE(leap[n].done, 1);
		boot_info->result[0] = n + 1;
	}
	return 0;
}
