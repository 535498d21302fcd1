/* SPDX-License-Identifier: Apache-2.0 */
#include "input.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void broken(const char *file, int line, const char *condition)
{
	const char *name = strrchr(file, '/');

	fprintf(stderr, "%s:%d: invariant broken: %s\n", name ? name + 1 : file, line, condition);
	abort();
}

static const uint8_t *input;
size_t input_left;

void set_input(const uint8_t *data, size_t size)
{
	input = data;
	input_left = size;
}

void take(void *to, size_t bytes)
{
	size_t there = bytes < input_left ? bytes : input_left;

	memset(to, 0, bytes);
	memcpy(to, input, there);
	input += there;
	input_left -= there;
}

uint64_t take_number(size_t bytes)
{
	uint64_t number = 0;

	take(&number, bytes);
	return number;
}
