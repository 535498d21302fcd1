/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sub entry page: in the sub context, at ELISA_SUB_ENTRY_OFFSET, linked with the object's code. The
 * gate's last VMFUNC enters it at its first byte, and nothing else enters it. So the instructions
 * after the gate's check have always run: DF is clear and speculation is fenced. rdi, rsi and rdx
 * hold the guest's arguments; everything else, rsp included, is as the guest left it.
 *
 * There are two builds: for callers in kernel mode, and with ELISA_USER for those in user mode
 * (CPL 3).
 *
 * Guest state that could affect the object's code, and why it does not (T14):
 * - RFLAGS.DF: the gate clears it.
 * - RFLAGS.AC: for callers in kernel mode STAC sets it, to open the window (user pages of this
 *   context) to code under SMAP. In user mode, with CR0.AM, it would make unaligned accesses fault,
 *   so POPFQ clears it; CLAC is for kernel mode. Every other flag stays as it is, so that a task
 *   with IOPL 3 keeps its IF. On the return AC is clear.
 * - RFLAGS.TF, DR7: a trap needs an IDT, which this context does not map, so the vCPU stops (I8).
 * - RFLAGS.NT, RF, IOPL: they matter to IRET, to breakpoints, and to IN, OUT and POPF. Objects
 *   contain none of these.
 * - rsp: replaced. The guest's is saved and restored, and not used in between.
 * - MXCSR, x87 and vector registers, CR0.TS: objects use general registers only. The compiler is
 *   told so, and the toolchain refuses other instructions (pykvm/elisa/object_code.py).
 * - FS and GS bases: the toolchain refuses instructions with these prefixes. The other bases are
 *   zero in 64-bit mode.
 *
 * State that the guest finds after the return (T15): the result in rax and rdx; rbx, rbp, rsp and
 * r12 to r15 as it left them, by the ABI; all other general registers cleared; arithmetic flags as
 * after an XOR. Vector, x87, segment and debug registers are never written here, so they hold
 * nothing of the object's. Caches and predictors are not cleared. Where the processor lets a guest
 * read its buffers (T38), a build with ELISA_BUFFER_CLEARING clears them with VERW, which does so
 * with a null selector too: that finds no descriptor, so nothing is read from the guest's tables.
 * Nothing after it touches memory.
 *
 * Speculation (T23). The call of the object is direct, its code has no indirect jump or call (the
 * toolchain refuses them), and each return has its call in this context. So training branch targets
 * or the return stack misleads nothing here, unless calls nest deeper than the return stack (16 on
 * older processors). Checking bounds is up to the object: see elisa_nospec.h.
 *
 * ELISA_NO_SLOT_CLEARING, ELISA_NO_WINDOW_ACCESS, ELISA_NO_FLAG_CLEARING and
 * ELISA_NO_REGISTER_CLEARING are for measurements and for controls of tests
 * (pykvm/elisa/protections.py).
 */
	.section .elisa.sub, "ax", @progbits
elisa_sub_page:
	.set	transient, elisa_sub_page + ELISA_LIST_OFFSET - ELISA_SUB_ENTRY_OFFSET + 8
	.set	env, elisa_sub_page + ELISA_ENV_OFFSET - ELISA_SUB_ENTRY_OFFSET
	.set	stack, elisa_sub_page + ELISA_STACK_OFFSET - ELISA_SUB_ENTRY_OFFSET
	.set	rflags_ac, 1 << 18

	.globl	elisa_sub
	.type	elisa_sub, @function
elisa_sub:
#ifndef ELISA_NO_SLOT_CLEARING
	movq	$0, transient(%rip)		# I1, before anything else: close the way in
#endif
	mov	%rsp, stack + ELISA_STACK_SIZE - 16(%rip)	# the guest's stack is not mapped
	lea	stack + ELISA_STACK_SIZE - 16(%rip), %rsp	# 16-byte aligned for the call
#ifdef ELISA_USER
#ifndef ELISA_NO_FLAG_CLEARING
	pushfq
	andl	$~rflags_ac, (%rsp)		# the other flags are the guest's
	popfq
#endif
#elif !defined(ELISA_NO_WINDOW_ACCESS)
	stac					# windows and shared memory are user pages here
#endif
	lea	env(%rip), %rcx			# 4th argument of elisa_serve; 3 are in place
	jmp	serve				# the last VMFUNC has to end the page

/* Bytes that a build leaves out: `serve` then starts nearer to the end. */
#ifdef ELISA_NO_REGISTER_CLEARING
	.set	clearing, 0
#else
	.set	clearing, 16
#endif
#if defined(ELISA_USER) || defined(ELISA_NO_WINDOW_ACCESS)
	.set	closing, 0
#else
	.set	closing, 3
#endif
#ifdef ELISA_BUFFER_CLEARING
	.set	flushing, 7
	.p2align 1, 0xcc
null_selector:
	.short	0
#else
	.set	flushing, 0
#endif
	.org	0x1000 - 16 - closing - clearing - flushing, 0xcc
serve:
	call	elisa_serve
	pop	%rsp				# the guest's, saved at the top of the stack
#if !defined(ELISA_USER) && !defined(ELISA_NO_WINDOW_ACCESS)
	clac					# the guest gets AC clear, even if it had set it
#endif
#ifdef ELISA_BUFFER_CLEARING
	verw	null_selector(%rip)		# T38
#endif
	mov	%rax, %rdx			# the result: VMFUNC takes rax and rcx
	xor	%eax, %eax			# VM function 0; T15: nothing of the object's leaks
	xor	%ecx, %ecx			# slot 0, the default context
#ifndef ELISA_NO_REGISTER_CLEARING
	xor	%esi, %esi			# T15
	xor	%edi, %edi			# T15
	xor	%r8d, %r8d			# T15: the gate left the sub EPTP here
	xor	%r9d, %r9d			# T15
	xor	%r10d, %r10d			# T15
	xor	%r11d, %r11d			# T15; the arithmetic flags are those of this xor
#endif
	vmfunc					# execution continues on the return page
	.org	0x1000				# an error unless that VMFUNC ends the page
	.size	elisa_sub, . - elisa_sub
