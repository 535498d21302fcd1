/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Entry page: default context, the guest's own memory, at ELISA_ENTRY_OFFSET of the crossing area.
 * Nothing here is trusted; a guest may as well run VMFUNC anywhere else.
 *
 *   uint64_t elisa_call(uint64_t a0, uint64_t a1, uint64_t a2, uint32_t gate_slot);
 *
 * System V ABI: rdi, rsi, rdx, ecx; the result comes back in rax on the return page. Callee-saved
 * registers and rsp come back unchanged, the other general registers cleared.
 */
	.section .elisa.entry, "ax", @progbits
elisa_entry_page:
	.org	0xffb, 0xcc
	.globl	elisa_call
	.type	elisa_call, @function
elisa_call:
	xor	%eax, %eax	# VM function 0: EPTP switching; ecx already names the gate's slot
	vmfunc			# goes on at the next page, which is the gate page in that context
	.size	elisa_call, . - elisa_call
