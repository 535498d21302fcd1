/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Return page: default context, the guest's own memory, at ELISA_RETURN_OFFSET. The last VMFUNC of
 * the sub context goes on here, with the result in rdx because VMFUNC needs rax and rcx.
 */
	.section .elisa.return, "ax", @progbits
elisa_return_page:
	mov	%rdx, %rax	# where the System V ABI has a function's result
	ret			# to the caller of elisa_call: rsp is what it was there
	.org	0x1000, 0xcc
