/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entry page: in the default context, in the guest's own memory, at ELISA_ENTRY_OFFSET of the
 * crossing area. It is not trusted: a guest may run VMFUNC anywhere else just as well.
 *
 *   uint64_t elisa_call(uint64_t a0, uint64_t a1, uint64_t a2, uint32_t gate_slot);
 *
 * System V ABI: arguments in rdi, rsi, rdx and ecx, the result in rax. Callee-saved registers and
 * rsp come back unchanged, all other general registers cleared.
 */
	.section .elisa.entry, "ax", @progbits
elisa_entry_page:
	.org	0xffb, 0xcc
	.globl	elisa_call
	.type	elisa_call, @function
elisa_call:
	xor	%eax, %eax	# VM function 0: EPTP switching; ecx already names the gate's slot
	vmfunc			# execution continues on the gate page
	.size	elisa_call, . - elisa_call
