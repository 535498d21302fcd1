/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gate page: gate context, at ELISA_GATE_OFFSET. The only executable page that a guest can reach
 * with VMFUNC, so a guest enters it at any byte, with any registers but two: VMFUNC itself needed
 * EAX = 0 and ECX = the slot of a gate. Wherever it enters, what follows is the one official sub
 * entry with the official EPTP, or a stop that the VMM sees (invariant I2).
 *
 * Why that holds:
 * - Only two instructions here write memory, both into the transient slot and nowhere else: their
 *   address is RIP-relative, the register content does not matter. No byte in between starts an
 *   instruction that writes, whatever the registers: in this context the whole EPTP list is
 *   writable, so an `add %al, (%rax)` (two zero bytes, as in every short displacement) would let
 *   the guest make up an EPTP. Hence the list and the data page lie where all displacements read
 *   CC CC xx xx (int3), and the other instructions are chosen for their inner bytes as well.
 * - On entry the slot is zero (I1). Whoever skips the store runs the last VMFUNC with an empty slot
 *   (ECX = 1), or with the slot of a gate, where no page follows this one: both stop.
 * - After the store, every path runs through the comparison of what the slot holds with the data
 *   page, in these instructions and no others, as all ways to decode the store end with it.
 * - The jump at the top goes where r8 says; before the store that is one more way to enter at any
 *   byte, as no other page is executable here.
 * - A stop is int3, an invalid opcode, a fetch from an absent page or a VMFUNC that exits: this
 *   context maps no memory of the guest that could hold an IDT. A stop may find the slot filled;
 *   the vCPU never leaves the context then, as every exit from it goes to the VMM (KVM_EXIT_ELISA).
 * tests/guest/test_gate.py decodes from every byte and holds these rules against the result;
 * `make verify-gate` follows every path from every byte (docs/gate-proof.md).
 *
 * Speculation (T23). The jump at the top is indirect, so a guest may train it: to any byte of this
 * page, as no other is mapped executable here, which is what a guest can do without speculation
 * too. Whatever path the processor guesses, the sub context lies behind the fence, which waits for
 * the comparison. Not covered: a processor whose VMFUNC itself runs ahead of a fence before it.
 *
 * ELISA_NO_GATE_BARRIER and ELISA_NO_GATE_CHECK are for measurements and for controls of tests
 * (pykvm/elisa/protections.py): without the check, a guest enters whatever EPTP it likes.
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
	.set	near, elisa_gate_page - 8	# so that the bytes of `official - near` read no memory

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
	mov	data(%rip), %r8		# the official sub EPTP: not rax, whose low half stays 0
	mov	%r8, transient(%rip)	# the way into the sub context is open from here on
#ifndef ELISA_NO_GATE_CHECK
	mov	transient(%rip), %r8	# what it really holds: the guest may have entered at the store
	cmp	data(%rip), %r8		# the official EPTP and no other?
	jne	mismatch		# rel8 is CC
#endif
	lea	1(%rax), %ecx		# transient slot; with EAX = 0, as without that VMFUNC exits
	cld				# for the object's code; and 01 FC writes no memory, 01 0F would
#ifndef ELISA_NO_GATE_BARRIER
	.byte	0x0f, 0xae, 0xea	# lfence, no speculation past the check: EA is invalid, E8 a call
#endif
	vmfunc				# goes on at the sub entry page
	.org	0x1000			# an error if that VMFUNC does not end the page
