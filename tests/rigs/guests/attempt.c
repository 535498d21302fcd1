/* SPDX-License-Identifier: Apache-2.0 */
#include "attempt.h"

#include "runtime.h"

/* Where a fault leads; 0: there is no attempt, and an exception is the end. */
uint64_t attempt_rsp;
_Noreturn void attempt_failed(uint64_t status);

__asm__(".text\n"
	".globl	attempt\n"
	"attempt:\n\t" /* rdi function, rsi argument, rdx where its result goes */
	"push	%rbx\n\tpush	%rbp\n\tpush	%r12\n\tpush	%r13\n\tpush	%r14\n\tpush	%r15\n\t"
	"pushf\n\t"
	"mov	%rsp, attempt_rsp\n\t"
	"push	%rdx\n\t"
	"sub	$8, %rsp\n\t" /* a multiple of 16 for the call */
	"mov	%rdi, %rax\n\t"
	"mov	%rsi, %rdi\n\t"
	"call	*%rax\n\t"
	"add	$8, %rsp\n\t"
	"pop	%rdx\n\t"
	"mov	%rax, (%rdx)\n\t"
	"xor	%edi, %edi\n"
	"attempt_failed:\n\t"
	"mov	attempt_rsp, %rsp\n\t"
	"movq	$0, attempt_rsp\n\t"
	"mov	%edi, %eax\n\t"
	"popf\n\t"
	"pop	%r15\n\tpop	%r14\n\tpop	%r13\n\tpop	%r12\n\tpop	%rbp\n\tpop	%rbx\n\t"
	"ret\n");

void on_exception(const struct exception_frame *frame)
{
	if (attempt_rsp)
		attempt_failed(ATTEMPT_FAULT | frame->vector);
}
