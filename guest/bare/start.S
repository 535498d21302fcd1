/* SPDX-License-Identifier: Apache-2.0 */
/*
 * First instructions of a bare-metal guest. The VMM enters here in 64-bit mode with paging on,
 * interrupts enabled (no device raises any), rsp at the top of a stack and rdi at struct boot_info.
 * Each vCPU enters by itself, with a stack of its own and its number in rsi.
 */
	.section .text.start, "ax", @progbits
	.globl	_start
_start:
	xor	%ebp, %ebp		# ends the chain of frames
	call	runtime_main		# never returns
	ud2

/*
 * Exceptions. Each stub pushes an error code where the processor does not (SDM vol. 3A 6.15,
 * table 6-1) and its vector; stubs are 16 bytes apart.
 */
	.globl	exception_stubs
	.balign	16
exception_stubs:
	.set	vector, 0
	.rept	32
	.balign	16
	.if	!((0x60227d00 >> vector) & 1)	# 8, 10 to 14, 17, 21, 29, 30 push one
	push	$0
	.endif
	push	$vector
	jmp	exception
	.set	vector, vector + 1
	.endr

exception:
	mov	%rsp, %rdi		# vector, error code, rip, cs, rflags, rsp, ss
	and	$-16, %rsp
	call	runtime_exception	# never returns

	.section .note.GNU-stack, "", @progbits
