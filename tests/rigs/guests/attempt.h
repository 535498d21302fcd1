/* SPDX-License-Identifier: Apache-2.0 */
/* Calls that may take an exception, and go on behind it. One at a time, on one processor. */
#ifndef ATTEMPT_H
#define ATTEMPT_H

#include <stdint.h>

#define ATTEMPT_FAULT 0x100u /* or-ed with the vector */

/*
 * Call function(argument) and store what it returns in *result: 0. After an exception: ATTEMPT_FAULT
 * and its vector; the stack, the callee-saved registers and the flags are those of the call.
 */
uint32_t attempt(uint64_t (*function)(const void *), const void *argument, uint64_t *result);

#endif
