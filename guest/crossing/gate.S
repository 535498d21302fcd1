/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gate page: in the gate context, at ELISA_GATE_OFFSET. It is the only executable page that a
 * guest can reach with VMFUNC. A guest can enter it at any byte, with any registers but two: VMFUNC
 * requires EAX = 0 and ECX = the slot of a gate. Every entry ends in the one official sub entry
 * with the official EPTP, or in a stop that the VMM sees (invariant I2).
 *
 * Why that holds:
 * - Only two instructions here write memory, both into the transient slot. Their address is
 *   RIP-relative, so no register can redirect them. No byte in between starts an instruction that
 *   writes, whatever the registers hold. That matters because the whole EPTP list is writable in
 *   this context: with `add %al, (%rax)` (two zero bytes, as in every short displacement) the guest
 *   could forge an EPTP. Hence the list and the data page lie where all displacements read
 *   CC CC xx xx (int3), and the other instructions are chosen for their inner bytes as well.
 * - On entry the slot is zero (I1). A guest that skips the store reaches the last VMFUNC with an
 *   empty slot (ECX = 1), or with the slot of a gate, where no page follows this one. Both stop.
 * - After the store, every path runs through the comparison of the slot with the data page, in
 *   these instructions and no others: every way to decode the store ends where it ends.
 * - The jump at the top goes where r8 says. Before the store this is one more way to enter at any
 *   byte, because no other page is executable here.
 * - A stop is an int3, an invalid opcode, a fetch from an absent page or a VMFUNC that exits. This
 *   context maps no memory of the guest that could hold an IDT. The slot may be filled at a stop,
 *   but then the vCPU never leaves the context: every exit goes to the VMM (KVM_EXIT_ELISA).
 * tests/guest/test_gate.py decodes the page from every byte and checks these rules on the result;
 * `make verify-gate` follows every path from every byte (docs/gate-proof.md).
 *
 * Speculation (T23). The jump at the top is indirect, so a guest may train it, but only to a byte
 * of this page, because no other page is executable here; and a guest can enter at any byte without
 * speculation too. Whatever path the processor predicts, the sub context is behind the fence, which
 * waits for the comparison. Not covered: a processor whose VMFUNC runs ahead of a preceding fence.
 *
 * ELISA_NO_GATE_BARRIER and ELISA_NO_GATE_CHECK are for measurements and for controls of tests
 * (pykvm/elisa/protections.py). Without the check, a guest can enter any EPTP that it likes.
 */
#ifdef ELISA_NO_GATE_BARRIER
	.set	left_out_barrier, 3
#else
	.set	left_out_barrier, 0
#endif
#ifdef ELISA_NO_GATE_CHECK
	.set	left_out_check, 16
#else
	.set	left_out_check, 0
#endif
	.section .elisa.gate, "ax", @progbits
elisa_gate_page:
	.set	data, elisa_gate_page + ELISA_GATE_DATA_OFFSET - ELISA_GATE_OFFSET
	.set	transient, elisa_gate_page + ELISA_GATE_LIST_OFFSET - ELISA_GATE_OFFSET + 8
	.set	near, elisa_gate_page - 8	# the bytes of `official - near` then read no memory

	/* The last VMFUNC has to end the page; a direct jump there would hold zero bytes. */
	lea	near(%rip), %r8			# 2 MiB aligned area: ends in 0x0ff8
	add	$(official - near), %r8w	# no carry; a mov's constant would be a load from (%rdi)
	jmp	*%r8				# to official

#ifndef ELISA_NO_GATE_CHECK
	.org	0xfc2 + left_out_barrier, 0xcc
mismatch:
	andq	$0, transient(%rip)	# empty whatever the registers hold; then int3
#endif

	.org	0xfd8 + left_out_barrier + left_out_check, 0xcc
official:
	mov	data(%rip), %r8		# the official sub EPTP; not in rax: EAX has to stay 0
	mov	%r8, transient(%rip)	# from here on the way into the sub context is open
#ifndef ELISA_NO_GATE_CHECK
	mov	transient(%rip), %r8	# what the slot holds: the guest may enter at the store
	cmp	data(%rip), %r8		# is it the official EPTP?
	jne	mismatch		# rel8 is CC
#endif
	lea	1(%rax), %ecx		# the transient slot: EAX is 0, or VMFUNC exits
	cld				# for the object's code; 01 FC writes no memory, 01 0F would
#ifndef ELISA_NO_GATE_BARRIER
	.byte	0x0f, 0xae, 0xea	# lfence, no speculation past here: EA is invalid, E8 a call
#endif
	vmfunc				# execution continues on the sub entry page
	.org	0x1000			# an error unless that VMFUNC ends the page
