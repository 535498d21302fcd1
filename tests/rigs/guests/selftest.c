/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Exercises the runtime itself. param[0] says what:
 *   0 print and succeed   1 fail an assertion   2 fail a comparison   3 touch address 0
 *   4 finish with status param[1]   5 mark param[1] times   6 loop for ever   7 use an unknown port
 *   8 call an object by slot 2
 */
#include "runtime.h"

uint32_t guest_main(void)
{
	uint64_t value = boot_info->param[1];

	switch (boot_info->param[0]) {
	case 0:
		print("hello from ");
		print_hex((uint64_t)&guest_main);
		print(", ");
		print_number(18446744073709551615ull);
		print("\n");
		return 0;
	case 1:
		ASSERT(value == 7);
		return 0;
	case 2:
		ASSERT_EQUAL(value, 7);
		return 0;
	case 3:
		WRITE_ONCE(*(uint32_t *)value, 1);
		return 0;
	case 4:
		return (uint32_t)value;
	case 5:
		for (uint32_t i = 0; i < value; i++)
			mark(i);
		return 0;
	case 6:
		for (;;)
			__asm__ volatile("");
	case 8:
		return (uint32_t)object_call(0, 0, 0, 2);
	default:
		__asm__ volatile("outb %0, %1" : : "a"((uint8_t)1), "Nd"((uint16_t)0x123));
		return 0;
	}
}
