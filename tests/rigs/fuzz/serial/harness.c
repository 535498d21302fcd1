/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fuzzes the registers of the serial port: any access of a guest's to its eight ports, string
 * instructions too, while its user types and looks at what it has written.
 *
 * A model of what a 16550A's driver relies on runs beside it: bytes arrive in order and once, the
 * line status tells whether there are any, an interrupt is raised only for what was enabled and
 * tells its cause, and what the guest sends is what comes out, but for the loop.
 */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "input.h"
#include "serial.h"

enum { DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR };

#define IN_SIZE		4096	/* bytes that wait for the guest, at most */
#define OUT_SIZE	(1 << 20)
#define TAIL_SIZE	65536

static struct serial *serial;
static int output, interrupt;
static uint8_t in[IN_SIZE], out[OUT_SIZE], said[OUT_SIZE];
static size_t in_count, out_count, tail_from; /* of what was sent, the tail has what followed */
static uint8_t ier, lcr, mcr, scr;
static uint16_t divisor;
static bool overrun, sent;

static uint8_t cause(void)
{
	if (overrun && (ier & 4))
		return 6;
	if (in_count && (ier & 1))
		return 4;
	return sent && (ier & 2) ? 2 : 1;
}

static void check_interrupt(bool news)
{
	eventfd_t count = 0;

	if (eventfd_read(interrupt, &count))
		count = 0;
	/* Only what is enabled interrupts, and news always do. */
	REQUIRE(!count || cause() != 1 || !news);
	REQUIRE(count || !news || cause() == 1);
}

static void arrive(uint8_t byte)
{
	if (in_count == IN_SIZE)
		overrun = true;
	else
		in[in_count++] = byte;
}

static void model_write(unsigned int at, uint8_t value)
{
	bool latch = lcr & 0x80;

	if (at == DATA && latch) {
		divisor = (divisor & 0xff00) | value;
	} else if (at == DATA) {
		if (mcr & 0x10)
			arrive(value);
		else if (out_count < OUT_SIZE)
			out[out_count++] = value;
		sent = true;
	} else if (at == IER && latch) {
		divisor = (divisor & 0xff) | value << 8;
	} else if (at == IER) {
		sent |= value & 2 && !(ier & 2);
		ier = value & 0xf;
	} else if (at == IIR_FCR) {
		in_count = value & 2 ? 0 : in_count;
	} else if (at == LCR) {
		lcr = value;
	} else if (at == MCR) {
		mcr = value & 0x1f;
	} else if (at == SCR) {
		scr = value;
	}
}

static void check_read(unsigned int at, uint8_t value)
{
	bool latch = lcr & 0x80;
	uint8_t was;

	switch (at) {
	case DATA:
		if (latch) {
			REQUIRE(value == (divisor & 0xff));
		} else if (in_count) {
			REQUIRE(value == in[0]);
			memmove(in, in + 1, --in_count);
		} else {
			REQUIRE(!value);
		}
		break;
	case IER:
		REQUIRE(value == (latch ? divisor >> 8 : ier));
		break;
	case IIR_FCR:
		was = cause();
		REQUIRE((value & 0x3f) == was);
		sent = sent && was != 2;
		break;
	case LCR:
		REQUIRE(value == lcr);
		break;
	case MCR:
		REQUIRE(value == mcr);
		break;
	case LSR:
		REQUIRE((value & 1) == (in_count ? 1 : 0));
		REQUIRE((value & 2) == (overrun ? 2 : 0));
		REQUIRE((value & 0x60) == 0x60); /* a driver may always send */
		overrun = false;
		break;
	case MSR:
		REQUIRE(!(value & 0xf));
		REQUIRE(mcr & 0x10 || (value & 0xf0) == 0xb0);
		break;
	case SCR:
		REQUIRE(value == scr);
		break;
	}
}

static void access_ports(bool write)
{
	unsigned int offset = (uint32_t)take_number(1) % SERIAL_PORTS, size = 1U << (uint32_t)take_number(1) % 3;
	unsigned int count = (uint32_t)take_number(1) % 8 == 7 ? (uint32_t)take_number(2) % (4096 / size) + 1 : 1;
	/* As long as the access, so that the sanitizer sees each byte beyond. */
	uint8_t *data = malloc((size_t)size * count);
	struct pykvm_access access = {
		.offset = offset, .size = size, .count = count, .is_write = write, .data = data,
	};
	uint8_t first = (uint32_t)take_number(1);

	for (size_t i = 0; i < (size_t)size * count; i++)
		data[i] = i < 4 ? (i ? (uint32_t)take_number(1) : first) : (uint8_t)(first + i);
	REQUIRE(serial_access(serial, &access) == 1);
	for (size_t i = 0; i < (size_t)size * count; i++) {
		if (write)
			model_write((offset + i % size) % SERIAL_PORTS, data[i]);
		else
			check_read((offset + i % size) % SERIAL_PORTS, data[i]);
	}
	check_interrupt(write && size == 1 && offset == DATA && !(lcr & 0x80));
	free(data);
}

static void feed(void)
{
	size_t size = (uint32_t)take_number(2) % 5000, room = IN_SIZE - in_count, taken;
	char *data = malloc(size ? size : 1);
	uint8_t first = (uint32_t)take_number(1);

	for (size_t i = 0; i < size; i++)
		data[i] = (char)(first + i);
	taken = serial_feed(serial, data, size);
	REQUIRE(taken == (ier & 1 ? (size < room ? size : room) : 0));
	for (size_t i = 0; i < taken; i++)
		arrive((uint8_t)data[i]);
	check_interrupt(taken);
	free(data);
}

static void look(void)
{
	size_t size = (uint32_t)take_number(3) % (TAIL_SIZE + 100), kept = out_count - tail_from;
	char *data = malloc(size ? size : 1);
	size_t found = serial_tail(serial, data, size);

	kept = kept < TAIL_SIZE ? kept : TAIL_SIZE;
	REQUIRE(found == (kept < size ? kept : size));
	REQUIRE(!memcmp(data, out + out_count - found, found));
	free(data);
}

/* A snapshot: a new port with the same state goes on in place of this one; its tail is empty. */
static void move(void)
{
	struct serial_state state, again;
	struct serial *other = serial_new(output, interrupt);

	serial_save(serial, &state);
	REQUIRE(!serial_restore(other, &state));
	serial_save(other, &again);
	REQUIRE(!memcmp(&state, &again, sizeof(state)));
	REQUIRE(state.count == in_count && !memcmp(state.input, in, in_count));
	check_interrupt(cause() != 1);
	serial_free(serial);
	serial = other;
	tail_from = out_count;
}

/* A snapshot with any content is refused, or one that a guest can go on with. */
static void move_any(void)
{
	struct serial_state state = { 0 };
	struct serial *other = serial_new(-1, -1);
	uint8_t value;
	struct pykvm_access access = { .size = 1, .count = 1, .data = &value };

	for (size_t i = 0; i < 24; i++)
		((uint8_t *)&state)[i] = (uint32_t)take_number(1);
	if (!serial_restore(other, &state)) {
		for (access.offset = 0; access.offset < SERIAL_PORTS; access.offset++)
			serial_access(other, &access);
		serial_save(other, &state);
		REQUIRE(state.count <= SERIAL_INPUT);
	}
	serial_free(other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t said_count;

	set_input(data, size);
	in_count = out_count = tail_from = 0;
	ier = lcr = mcr = scr = 0;
	divisor = 1;
	overrun = sent = false;
	output = memfd_create("output", MFD_CLOEXEC);
	interrupt = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	serial = serial_new(output, interrupt);
	while (input_left && out_count < OUT_SIZE - 8192) {
		switch ((uint32_t)take_number(1) % 8) {
		case 0: case 1: case 2:
			access_ports(true);
			break;
		case 3: case 4: case 5:
			access_ports(false);
			break;
		case 6:
			feed();
			break;
		case 7:
			switch ((uint32_t)take_number(1) % 4) {
			case 0:
				move();
				break;
			case 1:
				move_any();
				break;
			default:
				look();
			}
			break;
		}
	}
	if (size % 7 == 1)
		serial_stop(serial);
	said_count = (size_t)lseek(output, 0, SEEK_END);
	REQUIRE(said_count == out_count);
	REQUIRE(pread(output, said, said_count, 0) == (ssize_t)said_count);
	REQUIRE(!memcmp(said, out, out_count));
	serial_free(serial);
	close(interrupt);
	close(output);
	return 0;
}
