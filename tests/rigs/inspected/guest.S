/*
 * A guest that counts, for tests of inspection. Each vCPU runs it with its number in RDI, and a
 * stack of its own.
 */
	.section .text.start, "ax"
	.globl	_start, counting, count, stored
_start:
	xor	%ebx, %ebx
counting:
	call	count
	jmp	counting
count:
	inc	%rbx
	mov	%rbx, counters(, %rdi, 8)
stored:
	ret

/* Breakpoints of the guest's own, which its handler counts. */
	.globl	trapping, own_int3, behind_int3
trapping:
own_int3:
	int3
behind_int3:
	jmp	trapping

	.globl	on_breakpoint
on_breakpoint:
	incq	traps
	iretq

/* No interrupt ever comes. */
	.globl	dead
dead:
	cli
	hlt
	jmp	dead

/* Output to port 0x10, a byte each time. */
	.globl	printing
printing:
	mov	%bl, %al
	out	%al, $0x10
	inc	%rbx
	jmp	printing

/* As much output as the first serial port takes. */
	.globl	printing_serially
printing_serially:
	mov	$0x3f8, %edx
	mov	$0x400, %ecx
	lea	block, %esi
	rep outsb
	jmp	printing_serially

	.data
	.balign	64
	.globl	counters, traps, block
counters:
	.quad	0, 0
traps:
	.quad	0
	.balign	64
block:
	.skip	64
