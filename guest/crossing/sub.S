/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sub entry page: sub context, at ELISA_SUB_ENTRY_OFFSET, linked with the object's code. Entered at
 * its first byte only, by the gate's last VMFUNC, so the gate's instructions after its check
 * have always run: DF is clear and speculation has been fenced. rdi, rsi, rdx hold the guest's
 * arguments; everything else, rsp included, is whatever the guest left there.
 *
 * Two builds: for callers in kernel mode, and with ELISA_USER for callers in user mode (CPL 3).
 *
 * What of the guest's state the object's code could notice, and why it does not (T14):
 * - RFLAGS.DF: cleared by the gate. RFLAGS.AC: in kernel mode it opens the window (user pages of
 *   this context) to code under SMAP, and STAC sets it; in user mode, with CR0.AM, it would make
 *   unaligned accesses fault, so it is cleared, by POPFQ, as CLAC is for kernel mode. Every other
 *   flag stays as it is, so that a task with IOPL 3 keeps its IF. On the return AC is clear.
 * - RFLAGS.TF, DR7: a trap ends in an IDT that this context does not map, so the vCPU stops (I8).
 *   RFLAGS.NT matters to IRET only, RF to breakpoints, IOPL to IN, OUT and POPF; objects hold none.
 * - rsp: replaced; the guest's is saved and restored unread, odd or not.
 * - MXCSR, x87 and vector registers, CR0.TS: objects use general registers only. The compiler is
 *   told so, and the toolchain refuses other instructions (pykvm/elisa/object_code.py).
 * - FS and GS bases: no instruction with these prefixes; the toolchain refuses them. The other
 *   bases are zero in 64-bit mode.
 *
 * What the guest finds on the return (T15): the result in rax and rdx; rbx, rbp, rsp, r12 to r15 as
 * it left them, by the ABI; all other general registers cleared, arithmetic flags as of an XOR. Vector,
 * x87, segment and debug registers are its own throughout, as nothing here writes them, so
 * nothing of the object's can be in them. Caches and predictors are not cleaned.
 *
 * Speculation (T23): the call of the object is direct, its code holds no indirect jump or call
 * (the toolchain refuses them), and each return has its call in this context; so a guest that trains
 * branch targets or the return stack finds nothing here to mislead, until calls nest deeper than the
 * return stack (16 on older processors). Bounds checks are the object's: elisa_index_nospec.
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
	movq	$0, transient(%rip)		# I1, before anything else: the way in is closed again
#endif
	mov	%rsp, stack + ELISA_STACK_SIZE - 16(%rip)	# private memory; the guest's is not mapped
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
	lea	env(%rip), %rcx			# 4th argument of elisa_serve; the first 3 are in place
	jmp	serve				# so that the last VMFUNC can end the page

/* Instructions are counted from the end: those that a build leaves out shift the rest. */
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
	.org	0x1000 - 16 - closing - clearing, 0xcc
serve:
	call	elisa_serve
	pop	%rsp				# the guest's, from where it was saved
#if !defined(ELISA_USER) && !defined(ELISA_NO_WINDOW_ACCESS)
	clac					# AC comes back clear, also if the guest had it set
#endif
	mov	%rax, %rdx			# the result: VMFUNC needs rax and rcx
	xor	%eax, %eax			# VM function 0, and T15: nothing of the object's leaks
	xor	%ecx, %ecx			# slot 0, the default context
#ifndef ELISA_NO_REGISTER_CLEARING
	xor	%esi, %esi			# T15
	xor	%edi, %edi			# T15
	xor	%r8d, %r8d			# T15: the gate left the sub EPTP here
	xor	%r9d, %r9d			# T15
	xor	%r10d, %r10d			# T15
	xor	%r11d, %r11d			# T15; flags too are those of this xor
#endif
	vmfunc					# goes on at the return page
	.org	0x1000				# an error if that VMFUNC does not end the page
	.size	elisa_sub, . - elisa_sub
