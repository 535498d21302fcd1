/* SPDX-License-Identifier: Apache-2.0 */
/* A local APIC in x2APIC mode, and a log of every interrupt and NMI that is taken. */
#ifndef EVENTS_H
#define EVENTS_H

#include <stdint.h>

/* MSRs of the local APIC (SDM vol. 3A, table 11-6) and of its timer. */
#define MSR_APIC_BASE 0x1b
#define MSR_TSC_DEADLINE 0x6e0
#define MSR_X2APIC_EOI 0x80b
#define MSR_X2APIC_SPURIOUS 0x80f
#define MSR_X2APIC_LVT_TIMER 0x832

#define APIC_BASE_X2APIC (3u << 10)
#define APIC_SPURIOUS_ENABLE (1u << 8)
#define APIC_TIMER_TSC_DEADLINE (2u << 17)

#define NMI_VECTOR 2
#define SPURIOUS_VECTOR 255

/* One event, as the handler found it. */
struct event {
	uint64_t vector;
	uint64_t time; /* time-stamp counter in the handler's first instructions */
	uint64_t rip;  /* of the instruction before which it was taken */
	uint64_t rflags;
	uint64_t rsp;
	uint64_t reserved;
};

/*
 * Start to take interrupts: all vectors from 32 up and the NMI are logged in `log`, a ring of
 * `room` events, and acknowledged. The VMM must have given the vCPU a local APIC.
 */
void events_open(struct event *log, uint64_t room);

/* Return the number of events so far. */
uint64_t events_taken(void);

/* Let the timer raise `vector` when the time-stamp counter reaches `deadline`. */
void events_arm_timer(uint64_t deadline, uint8_t vector);

static inline uint64_t read_msr(uint32_t index)
{
	uint32_t low, high;

	__asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
	return (uint64_t)high << 32 | low;
}

static inline void write_msr(uint32_t index, uint64_t value)
{
	__asm__ volatile("wrmsr"
			 :
			 : "c"(index), "a"((uint32_t)value), "d"((uint32_t)(value >> 32))
			 : "memory");
}

#endif
