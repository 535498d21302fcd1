/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program for several vCPUs. param[n] says what vCPU n does:
 *   0 finish with its number   1 fail an assertion   2 loop for ever   3 touch address 8
 *   4 wait until all vCPUs have arrived   5 wait until two have arrived, then fail a comparison
 *
 * result[n]     an address on the stack of vCPU n
 * result[8 + n] vCPUs of the guest, as vCPU n sees them
 */
#include "runtime.h"

static uint64_t arrived;
static volatile uint64_t wrong_address = 8;

static void wait_for(uint64_t vcpus)
{
	__atomic_add_fetch(&arrived, 1, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&arrived, __ATOMIC_SEQ_CST) < vcpus)
		__asm__ volatile("pause");
}

uint32_t vcpu_main(uint32_t number)
{
	volatile uint64_t here = number;

	boot_info->result[number] = (uint64_t)&here;
	boot_info->result[8 + number] = boot_info->vcpus;
	switch (boot_info->param[number]) {
	case 0:
		return number;
	case 1:
		ASSERT(number == 100);
		return 0;
	case 2:
		for (;;)
			__asm__ volatile("");
	case 3:
		WRITE_ONCE(*(uint32_t *)wrong_address, 1);
		return 0;
	case 4:
		wait_for(boot_info->vcpus);
		return number;
	default:
		wait_for(2);
		ASSERT_EQUAL(number, 100);
		return 0;
	}
}

uint32_t guest_main(void)
{
	return vcpu_main(0);
}
