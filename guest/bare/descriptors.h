/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Segments in addition to the VMM's (0x08 to 0x18: 64-bit code, data and the TSS), and INT $0x80 to
 * return from them, from CPL 3 too.
 */
#ifndef DESCRIPTORS_H
#define DESCRIPTORS_H

#include "runtime.h"

#define VMM_DESCRIPTORS 5 /* null, code, data, and the TSS's two */

/*
 * Load a table of `count` descriptors, of which the caller has set those after the VMM's, and let
 * INT $0x80 lead to `back`. Return the address of the TSS, which has RSP0 at offset 4.
 */
static inline uint64_t load_descriptors(uint64_t *descriptors, uint32_t count, void (*back)(void))
{
	extern uint8_t interrupt_table[256][16];
	struct {
		uint16_t limit;
		uint64_t base;
	} __attribute__((packed)) table;

	__asm__ volatile("sgdt %0" : "=m"(table));
	memcpy(descriptors, (const void *)table.base, VMM_DESCRIPTORS * sizeof(*descriptors));
	table.limit = count * sizeof(*descriptors) - 1;
	table.base = (uint64_t)descriptors;
	__asm__ volatile("lgdt %0" : : "m"(table));
	interrupt_handler(0x80, back);
	interrupt_table[0x80][5] = 0xee; /* callable from CPL 3 */
	/* The base: bits 16 to 39 and 56 to 63 of the low half, then the high half. */
	return (descriptors[3] >> 16 & 0xffffff) | (descriptors[3] >> 56 & 0xff) << 24 |
	       descriptors[4] << 32;
}

#endif
