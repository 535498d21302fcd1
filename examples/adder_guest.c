/* A guest that calls the attached object: adds 1, 2 and 3 as often as param[0] says. */
#include "runtime.h"

uint32_t guest_main(void)
{
	uint32_t slot = (uint32_t)boot_info->attachment[0].gate_slot;

	for (uint64_t call = 0; call < boot_info->param[0]; call++)
		boot_info->result[0] = object_call(1, 2, 3, slot); /* three VMFUNCs, no VM exit */
	return 0;
}
