/* A Multiboot header, and the way from 32-bit code without paging to 64-bit code. */

#define MAGIC 0x1badb002
#define FLAGS 0x3 /* modules in whole pages; the memory's size */

	.section .start, "ax"
	.code32
	.balign 4
	.long MAGIC, FLAGS, -(MAGIC + FLAGS)

	.globl _start
_start:
	mov $stack_end, %esp
	mov %eax, %edi /* main's arguments */
	mov %ebx, %esi
	lgdt table_register
	mov %cr4, %eax
	bts $5, %eax /* PAE */
	mov %eax, %cr4
	mov $level_4, %eax
	mov %eax, %cr3
	mov $0xc0000080, %ecx /* EFER */
	rdmsr
	bts $8, %eax /* LME */
	wrmsr
	mov %cr0, %eax
	bts $31, %eax /* PG */
	mov %eax, %cr0
	ljmp $0x8, $start_64

	.code64
start_64:
	mov $0x10, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	call main
1:	hlt
	jmp 1b

	.section .data
	.balign 16
table:
	.quad 0
	.quad 0x00af9b000000ffff
	.quad 0x00cf93000000ffff
table_end:
table_register:
	.word table_end - table - 1
	.long table

	/* The first GiB, in pages of 2 MiB. */
	.balign 4096
level_2:
	.set page, 0
	.rept 512
	.quad page << 21 | 0x83
	.set page, page + 1
	.endr
level_3:
	.quad level_2 + 3
	.skip 4096 - 8
level_4:
	.quad level_3 + 3
	.skip 4096 - 8

	.section .bss
	.balign 16
	.skip 4096
stack_end:

	.section .note.GNU-stack, "", @progbits
