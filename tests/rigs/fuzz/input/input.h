/* SPDX-License-Identifier: Apache-2.0 */
/* The input of a fuzzer, taken in parts, and the check of what must hold. */
#ifndef INPUT_H
#define INPUT_H

#include <stddef.h>
#include <stdint.h>

#define REQUIRE(condition) ((condition) ? (void)0 : broken(__FILE__, __LINE__, #condition))
_Noreturn void broken(const char *file, int line, const char *condition);

extern size_t input_left;

void set_input(const uint8_t *data, size_t size);
/* The next bytes of the input; zeros behind its end. */
void take(void *to, size_t bytes);
/* The same as a number, little endian, of at most 8 bytes. */
uint64_t take_number(size_t bytes);

#endif
