/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entry to user mode (CPL 3), return from it, and the code that runs there: calls of an attached
 * object.
 *
 *   void user_run(uint64_t rip, uint64_t rsp);
 *
 * Returns when the code at rip, with the stack at rsp, runs INT $0x80.
 */
	.set	user_code_selector, 0x33	/* user.c fills the descriptor table */
	.set	user_data_selector, 0x2b

	.text
	.globl	user_run
user_run:
	push	%rbx
	push	%rbp
	push	%r12
	push	%r13
	push	%r14
	push	%r15
	pushfq
	mov	%rsp, user_kernel_rsp
	lea	-256(%rsp), %rax
	and	$-16, %rax
	mov	user_task_segment, %rcx
	mov	%rax, 4(%rcx)			# RSP0: where interrupts in user mode push
	push	$user_data_selector
	push	%rsi
	push	$0x202
	push	$user_code_selector
	push	%rdi
	iretq

	.globl	user_return
user_return:					# INT $0x80; interrupts off until the popf
	mov	user_kernel_rsp, %rsp
	popfq
	pop	%r15
	pop	%r14
	pop	%r13
	pop	%r12
	pop	%rbp
	pop	%rbx
	ret

/*
 * One page, mapped for user mode at another address, so no address here may be absolute. rsp points
 * to a struct user_area. The call preserves it, so everything is found through it.
 */
	.set	area_out, 17 * 8
	.set	area_target, 34 * 8
	.set	area_ticks, 35 * 8

	.section .text.user_page, "ax", @progbits
	.balign	4096
	.globl	user_page, user_registers, user_time_call, user_time_empty
user_page:
user_registers:
	pushq	16 * 8(%rsp)
	popfq
	.macro	each_register what
	\what	0, rax
	\what	1, rcx
	\what	2, rdx
	\what	3, rbx
	\what	5, rbp
	\what	6, rsi
	\what	7, rdi
	\what	8, r8
	\what	9, r9
	\what	10, r10
	\what	11, r11
	\what	12, r12
	\what	13, r13
	\what	14, r14
	\what	15, r15
	.endm
	.macro	load_register number, name
	mov	\number * 8(%rsp), %\name
	.endm
	.macro	store_register number, name
	mov	%\name, area_out + \number * 8(%rsp)
	.endm
	each_register load_register
	call	*area_target(%rsp)
	each_register store_register
	mov	%rsp, area_out + 4 * 8(%rsp)
	pushfq
	popq	area_out + 16 * 8(%rsp)		# the address is computed after the pop
	pushq	$0x202				# allow unaligned accesses again
	popfq
	int	$0x80

/* As in crossing.c: time from the call to the instruction that returns, both included. */
	.macro	timed code:vararg
	mov	8(%rsp), %ecx
	lfence
	rdtsc
	mov	%eax, %r12d
	mov	%edx, %r13d
	xor	%edi, %edi
	xor	%esi, %esi
	xor	%edx, %edx
	\code
	lfence
	rdtsc
	shl	$32, %rdx
	or	%rdx, %rax
	shl	$32, %r13
	or	%r13, %r12
	sub	%r12, %rax
	mov	%rax, area_ticks(%rsp)
	int	$0x80
	.endm
user_time_call:
	timed	call *area_target(%rsp)
user_time_empty:
	timed
	.balign	4096, 0xcc

	.section .note.GNU-stack, "", @progbits
