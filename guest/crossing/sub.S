/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sub entry page: sub context, at ELISA_SUB_ENTRY_OFFSET, linked with the object's code. Entered at
 * its first byte only, by the gate's last VMFUNC, so the gate's instructions after its check
 * have always run: DF is clear and speculation has been fenced. rdi, rsi, rdx hold the guest's
 * arguments; everything else, rsp included, is whatever the guest left there.
 */
	.section .elisa.sub, "ax", @progbits
elisa_sub_page:
	.set	transient, elisa_sub_page + ELISA_LIST_OFFSET - ELISA_SUB_ENTRY_OFFSET + 8
	.set	env, elisa_sub_page + ELISA_ENV_OFFSET - ELISA_SUB_ENTRY_OFFSET
	.set	stack, elisa_sub_page + ELISA_STACK_OFFSET - ELISA_SUB_ENTRY_OFFSET

	.globl	elisa_sub
	.type	elisa_sub, @function
elisa_sub:
	movq	$0, transient(%rip)		# I1, before anything else: the way in is closed again
	mov	%rsp, stack + ELISA_STACK_SIZE - 16(%rip)	# private memory; the guest's is not mapped
	lea	stack + ELISA_STACK_SIZE - 16(%rip), %rsp	# 16-byte aligned for the call
	lea	env(%rip), %rcx			# 4th argument of elisa_serve; the first 3 are in place
	jmp	serve				# so that the last VMFUNC can end the page

	.org	0xfe0, 0xcc
serve:
	call	elisa_serve
	pop	%rsp				# the guest's, from where it was saved
	mov	%rax, %rdx			# the result: VMFUNC needs rax and rcx
	xor	%eax, %eax			# VM function 0, and T15: nothing of the object's leaks
	xor	%ecx, %ecx			# slot 0, the default context
	xor	%esi, %esi			# T15
	xor	%edi, %edi			# T15
	xor	%r8d, %r8d			# T15: the gate left the sub EPTP here
	xor	%r9d, %r9d			# T15
	xor	%r10d, %r10d			# T15
	xor	%r11d, %r11d			# T15; flags too are those of this xor
	vmfunc					# goes on at the return page
	.org	0x1000				# an error if that VMFUNC does not end the page
	.size	elisa_sub, . - elisa_sub
