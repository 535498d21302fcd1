/* SPDX-License-Identifier: Apache-2.0 */
/* Runtime of bare-metal guest programs, each of which defines guest_main. */
#ifndef RUNTIME_H
#define RUNTIME_H

#include <stdbool.h>
#include <stdint.h>

#include "boot_info.h"
#include "elisa_memory.h"
#include "elisa_object.h"

#define KVM_HC_ELISA_NULL 0x4500 /* kvm_elisa.h */
#define KVM_HC_ELISA_USER 0x4510

extern struct boot_info *boot_info;

/* The program, on vCPU 0; its result becomes the status. */
uint32_t guest_main(void);

/*
 * The same on the other vCPUs, from 1 on. A program for several vCPUs defines it; otherwise they
 * finish at once, with status 0. They begin when vCPU 0 has prepared the guest for all.
 */
uint32_t vcpu_main(uint32_t number);

/* Print to the VMM's console, in one exit for each piece. */
void print_bytes(const void *bytes, uint64_t count);
void print(const char *text);
void print_number(uint64_t number);
void print_hex(uint64_t number);

/* Stop for good; 0 is success. */
_Noreturn void finish(uint32_t status);

/* Pass `value` to the VMM and go on; at this exit it may read KVM's statistics. */
void mark(uint32_t value);

/*
 * Access every page of a range. The first access to a page causes an EPT violation, which would
 * otherwise be counted among the exits of what is measured. touch_for_writing zeroes one byte of
 * each page; use it for memory that holds nothing yet.
 */
void touch(uint64_t start, uint64_t bytes);
void touch_for_writing(uint64_t start, uint64_t bytes);

_Noreturn void fail(const char *file, uint32_t line, const char *expression, uint64_t left,
		    uint64_t right);

/* As pushed by the processor and the stubs in start.S. */
struct exception_frame {
	uint64_t vector, error, rip, cs, rflags, rsp, ss;
};

/* A program may define this; it returns for exceptions that it does not handle. */
void on_exception(const struct exception_frame *frame);

/* Set the handler of a vector; it is entered with interrupts off. */
void interrupt_handler(uint8_t vector, const void *handler);

/* Report file, line and the condition to the VMM, and stop. */
#define ASSERT(condition)                                                                          \
	do {                                                                                       \
		if (!(condition))                                                                  \
			fail(__FILE__, __LINE__, #condition, 0, 0);                                \
	} while (0)

/* Like ASSERT, and report both values. */
#define ASSERT_EQUAL(actual, expected)                                                             \
	do {                                                                                       \
		uint64_t left_ = (uint64_t)(actual), right_ = (uint64_t)(expected);                \
		if (left_ != right_)                                                               \
			fail(__FILE__, __LINE__, #actual " == " #expected, left_, right_);         \
	} while (0)

/* Read the time-stamp counter after all earlier instructions. */
static inline uint64_t time_stamp(void)
{
	uint32_t low, high;

	__asm__ volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

/* KVM's hypercall convention (Linux Documentation/virt/kvm/x86/hypercalls.rst). */
static inline uint64_t hypercall(uint64_t number, uint64_t a0, uint64_t a1, uint64_t a2)
{
	uint64_t result;

	__asm__ volatile("vmcall"
			 : "=a"(result)
			 : "a"(number), "b"(a0), "c"(a1), "d"(a2)
			 : "memory");
	return result;
}

/* Call an attached object through its gate. */
static inline uint64_t object_call(uint64_t a0, uint64_t a1, uint64_t a2, uint32_t gate_slot)
{
	uint64_t (*call)(uint64_t, uint64_t, uint64_t, uint32_t) =
		(uint64_t(*)(uint64_t, uint64_t, uint64_t, uint32_t))boot_info->elisa_call;

	return call(a0, a1, a2, gate_slot);
}

#endif
