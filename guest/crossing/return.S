/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Return page: in the default context, in the guest's own memory, at ELISA_RETURN_OFFSET. After the
 * sub context's last VMFUNC execution continues here, with the result in rdx, because VMFUNC takes
 * rax and rcx.
 */
	.section .elisa.return, "ax", @progbits
elisa_return_page:
	mov	%rdx, %rax	# the System V ABI returns results in rax
	ret			# to the caller of elisa_call: rsp is as it was there
	.org	0x1000, 0xcc
