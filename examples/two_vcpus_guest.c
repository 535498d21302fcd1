/* A guest whose vCPUs all call the attached object, at the same time. */
#include "runtime.h"

uint32_t vcpu_main(uint32_t number)
{
	uint32_t slot = (uint32_t)boot_info->attachment[0].gate_slot; /* the same on every vCPU */

	for (uint64_t call = 0; call < boot_info->param[0]; call++)
		boot_info->result[number] = object_call(1, 0, 0, slot);
	return 0;
}

uint32_t guest_main(void)
{
	return vcpu_main(0);
}
