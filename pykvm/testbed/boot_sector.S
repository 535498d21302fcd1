# SPDX-License-Identifier: Apache-2.0
# Boot sector of the testbed's boot disk: reads the images that its table lists from the disk
# straight to their places in memory, then enters the kernel in 64-bit mode.
#
# Why not GRUB and a bzImage: decompressing the kernel and reading it through the firmware cost
# 2.4 billion of the 3 billion instructions of a boot. Here both are gone.
#
# At `table`, filled in by boot_disk.py (little endian words of 32 bits):
#     address, first sector, sectors      once per image
#     0, 0, 0
#     address of the boot parameters, entry point, CR3, CR4
# Entry state: 64-bit mode, the kernel's pages mapped where they lie, rsi = boot parameters (Linux
# arch/x86/kernel/head_64.S, startup_64; Documentation/arch/x86/boot.rst, 64-bit boot protocol).
# With CR4.LA57 and tables of five levels the kernel stays with five.

	.set ATA_DATA, 0x1f0
	.set ATA_COUNT, 0x1f2
	.set ATA_STATUS, 0x1f7
	.set ATA_CONTROL, 0x3f6
	.set READ_SECTORS, 0x20
	.set BUSY_OR_REQUEST, 0x88
	.set REQUEST, 0x08
	.set SMI_COMMAND, 0xb2		# of the emulated PIIX4
	.set ACPI_ENABLE, 0xf1
	.set EFER, 0xc0000080
	.set LONG_MODE_ENABLE, 0x100
	.set PAGING, 0x80000000

	.code16
	.globl _start
_start:
	cli
	xor	%ax, %ax
	mov	%ax, %ds
	in	$0x92, %al		# A20 through the fast gate
	or	$2, %al
	out	%al, $0x92
	lgdtl	gdt_pointer
	mov	%cr0, %eax
	or	$1, %al
	mov	%eax, %cr0
	ljmpl	$8, $protected

	.code32
protected:
	mov	$16, %ax
	mov	%ax, %ds
	mov	%ax, %es
	mov	%ax, %ss
	mov	$0x7c00, %esp
	cld
	mov	$ATA_CONTROL, %dx
	mov	$2, %al			# no interrupts from the disk
	out	%al, %dx
	mov	$table, %esi

next_image:
	mov	(%esi), %edi
	mov	4(%esi), %ebx		# next sector
	mov	8(%esi), %ebp		# sectors left
	add	$12, %esi
	test	%edi, %edi
	jz	enter_kernel

next_run:				# at most 128 sectors a command
	test	%ebp, %ebp
	jz	next_image
	mov	$128, %ecx
	cmp	%ebp, %ecx
	jbe	1f
	mov	%ebp, %ecx
1:	sub	%ecx, %ebp
	mov	$ATA_COUNT, %dx
	mov	%cl, %al
	out	%al, %dx
	mov	%ebx, %eax		# LBA, three bytes and a nibble
	inc	%dx
	out	%al, %dx
	shr	$8, %eax
	inc	%dx
	out	%al, %dx
	shr	$8, %eax
	inc	%dx
	out	%al, %dx
	shr	$8, %eax
	or	$0xe0, %al		# LBA mode, drive 0
	inc	%dx
	out	%al, %dx
	mov	$READ_SECTORS, %al
	inc	%dx
	out	%al, %dx
	add	%ecx, %ebx
	push	%ecx

next_sector:
	mov	$ATA_STATUS, %dx
2:	in	%dx, %al
	and	$BUSY_OR_REQUEST, %al
	cmp	$REQUEST, %al
	jne	2b
	mov	$ATA_DATA, %dx
	mov	$128, %ecx
	rep insl
	decl	(%esp)
	jnz	next_sector
	pop	%ecx
	jmp	next_run

enter_kernel:
	mov	$ACPI_ENABLE, %al	# Linux need not any more: Bochs 3.0 returns from no SMI with LA57
	out	%al, $SMI_COMMAND
	mov	8(%esi), %eax
	mov	%eax, %cr3
	mov	12(%esi), %eax
	mov	%eax, %cr4
	mov	$EFER, %ecx
	rdmsr
	or	$LONG_MODE_ENABLE, %eax
	wrmsr
	mov	%cr0, %eax
	or	$PAGING, %eax
	mov	%eax, %cr0
	mov	4(%esi), %eax
	mov	(%esi), %esi
	ljmp	$24, $long_mode

	.code64
long_mode:
	mov	%eax, %eax		# the upper halves are undefined after the change of mode
	mov	%esi, %esi
	jmp	*%rax

	.balign	8
gdt:	.quad	0
	.quad	0x00cf9a000000ffff	# code, 4 GiB
	.quad	0x00cf92000000ffff	# data, 4 GiB
	.quad	0x00af9a000000ffff	# 64-bit code
gdt_pointer:
	.word	31
	.long	gdt
	.org	0x180			# TABLE in boot_disk.py
table:
	.org	510
	.word	0xaa55
