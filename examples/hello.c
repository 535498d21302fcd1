/* The smallest guest: prints, and returns a status. */
#include "runtime.h"

uint32_t guest_main(void)
{
	print("hello from a guest\n");
	return 0;
}
