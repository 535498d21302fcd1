/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Interface between the VMM and a bare-metal guest: one page at a fixed address, and four I/O
 * ports. pykvm/machine/bare/boot_info.py is the same for Python;
 * tests/machine/bare/test_boot_info.py compares the two with the C compiler.
 */
#ifndef BOOT_INFO_H
#define BOOT_INFO_H

#include <stdint.h>

#include "elisa_object.h"

#define GUEST_CONSOLE_PORT 0xe9 /* bytes to print */
#define GUEST_FINISH_PORT 0xf0  /* 32 bits: the guest is done, with this status */
#define GUEST_FAILURE_PORT 0xf4 /* 32 bits: address of a struct boot_failure, or 0 */
#define GUEST_MARK_PORT 0xf8    /* 32 bits: tells the VMM where the guest is, and goes on */

#define BOOT_INFO_MAGIC 0x304f464e49544f42ull /* "BOTINFO0" */
#define BOOT_ATTACHMENTS 4
#define BOOT_PARAMS 16
#define BOOT_RESULTS 16

/* One attached object. */
struct boot_attachment {
	uint64_t gate_slot;   /* of the EPTP list; 0: not attached with VMFUNC */
	uint64_t window;      /* address of this guest's window, 0 if there is none */
	uint64_t window_size; /* in bytes */
};

/* A failed assertion or an exception. Addresses of strings are the guest's. */
struct boot_failure {
	uint64_t file; /* 0 for an exception */
	uint64_t line;
	uint64_t expression;
	uint64_t left; /* the two sides of a comparison; vector and error code of an exception */
	uint64_t right;
	uint64_t rip; /* of an exception, with CR2 */
	uint64_t cr2;
};

struct boot_info {
	/* Written by the VMM */
	uint64_t magic;
	uint64_t vcpus;      /* of this guest; more may be added later */
	uint64_t elisa_call; /* address of the entry page's function, 0 if nothing is attached */
	struct boot_attachment attachment[BOOT_ATTACHMENTS];
	struct elisa_env direct; /* for calls of an object that is linked into the guest */
	uint64_t input;          /* address of the program's input */
	uint64_t input_size;
	uint64_t log; /* room for received frames */
	uint64_t log_size;
	uint64_t samples; /* room for measurements */
	uint64_t samples_size;
	uint64_t param[BOOT_PARAMS]; /* see the head of each program */
	/* Written by the guest */
	uint64_t result[BOOT_RESULTS];
	struct boot_failure failure; /* of the vCPU that failed last */
};

#endif
