/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Does what its input says, step by step: calls, VMFUNCs, accesses, privileged instructions.
 *
 * param[0]     1: take interrupts and record them in the samples (events.h), 0: there is no local APIC
 * param[1 + n] steps of vCPU n, for n from 1 on; they are the last ones, vCPU 0 has the rest
 * input        struct step, in order; the guest stores `result`, then 1 in `done`. A step whose
 *              `what` has bit ATTEMPT set may take an exception: `done` is then ATTEMPT_FAULT and
 *              its vector. Only vCPU 0 may have such steps
 * result[0]    steps done by vCPU 0
 * result[1]    events taken
 */
#include "attempt.h"
#include "events.h"
#include "runtime.h"

enum {
	CALL,           /* object with a, b, c */
	VMFUNC,         /* function a, index b */
	MARK,           /* a */
	READ,           /* 8 bytes at a */
	WRITE,          /* b to a */
	CALL_WITH_CR3,  /* as CALL */
	READ_MSR,       /* number a */
	WRITE_MSR,      /* b to number a */
	READ_CONTROL,   /* CR a, for 0 and 4 */
	WRITE_CONTROL,  /* b to CR a */
	CPUID,          /* leaf a, subleaf b: register c, in the order eax, ebx, ecx, edx */
	LOAD_TABLE,     /* register a (enum table): base or selector b, limit c */
	STORE_TABLE,    /* register a: base or selector; its limit if b is 1 */
	INTERRUPTS,     /* a: on (1) or off (0) */
	ARM_TIMER,      /* a ticks from now, vector b; the result is the deadline */
	WAIT,           /* until a events were taken, at most b turns */
	HALT,           /* until a events were taken */
	TIME,           /* of the time stamp counter */
	ATTEMPT = 0x100,
};

#define EVENTS 1024 /* that are recorded */
#define VCPUS 8     /* that may have steps */

enum table { GDT, IDT, LDT, TASK };

struct step {
	uint32_t what;
	uint32_t slot; /* of the gate, for calls */
	uint64_t a, b, c;
	uint64_t cr3; /* for CALL_WITH_CR3; the stack and this program have to be mapped there, too */
	uint64_t result;
	uint64_t done;
};

static uint64_t call_with_cr3(const struct step *step)
{
	uint64_t own, result;

	__asm__ volatile("mov %%cr3, %0" : "=r"(own));
	__asm__ volatile("mov %0, %%cr3" : : "r"(step->cr3) : "memory");
	result = object_call(step->a, step->b, step->c, step->slot);
	__asm__ volatile("mov %0, %%cr3" : : "r"(own) : "memory");
	return result;
}

static uint64_t vmfunc(uint64_t function, uint64_t index)
{
	__asm__ volatile("vmfunc" : : "a"(function), "c"(index) : "memory");
	return 0;
}

static uint64_t read_control(uint64_t number)
{
	uint64_t value;

	ASSERT(number == 0 || number == 4);
	if (number == 0)
		__asm__ volatile("mov %%cr0, %0" : "=r"(value));
	else
		__asm__ volatile("mov %%cr4, %0" : "=r"(value));
	return value;
}

static uint64_t write_control(uint64_t number, uint64_t value)
{
	ASSERT(number == 0 || number == 4);
	if (number == 0)
		__asm__ volatile("mov %0, %%cr0" : : "r"(value) : "memory");
	else
		__asm__ volatile("mov %0, %%cr4" : : "r"(value) : "memory");
	return 0;
}

static uint64_t cpuid(uint64_t leaf, uint64_t subleaf, uint64_t which)
{
	uint32_t registers[4];

	__asm__ volatile("cpuid"
			 : "=a"(registers[0]), "=b"(registers[1]), "=c"(registers[2]),
			   "=d"(registers[3])
			 : "a"((uint32_t)leaf), "c"((uint32_t)subleaf));
	return registers[which % 4];
}

struct table_pointer {
	uint16_t limit;
	uint64_t base;
} __attribute__((packed));

static uint64_t load_table(enum table which, uint64_t value, uint64_t limit)
{
	struct table_pointer pointer = {(uint16_t)limit, value};
	uint16_t selector = (uint16_t)value;

	switch (which) {
	case GDT:
		__asm__ volatile("lgdt %0" : : "m"(pointer));
		break;
	case IDT:
		__asm__ volatile("lidt %0" : : "m"(pointer));
		break;
	case LDT:
		__asm__ volatile("lldt %0" : : "r"(selector));
		break;
	case TASK:
		__asm__ volatile("ltr %0" : : "r"(selector));
		break;
	}
	return 0;
}

static uint64_t store_table(enum table which, uint64_t want_limit)
{
	struct table_pointer pointer = {0, 0};
	uint16_t selector = 0;

	switch (which) {
	case GDT:
		__asm__ volatile("sgdt %0" : "=m"(pointer));
		break;
	case IDT:
		__asm__ volatile("sidt %0" : "=m"(pointer));
		break;
	case LDT:
		__asm__ volatile("sldt %0" : "=r"(selector));
		return selector;
	case TASK:
		__asm__ volatile("str %0" : "=r"(selector));
		return selector;
	}
	return want_limit ? pointer.limit : pointer.base;
}

static uint64_t arm_timer(uint64_t ticks, uint64_t vector)
{
	uint64_t deadline = time_stamp() + ticks;

	events_arm_timer(deadline, (uint8_t)vector);
	return deadline;
}

/* Returns the turns that were left. */
static uint64_t wait_for_events(uint64_t count, uint64_t turns)
{
	while (turns && events_taken() < count)
		turns--;
	return turns;
}

static uint64_t halt(uint64_t count)
{
	while (events_taken() < count) {
		__asm__ volatile("cli" : : : "memory");
		if (events_taken() < count)
			__asm__ volatile("sti\n\thlt" : : : "memory");
		else
			__asm__ volatile("sti" : : : "memory");
	}
	return 0;
}

static uint64_t do_step(const void *argument)
{
	const struct step *step = argument;
	uint64_t a = step->a, b = step->b, c = step->c;

	switch (step->what % ATTEMPT) {
	case CALL:
		return object_call(a, b, c, step->slot);
	case VMFUNC:
		return vmfunc(a, b);
	case MARK:
		mark((uint32_t)a);
		return 0;
	case READ:
		return *(volatile uint64_t *)a;
	case WRITE:
		*(volatile uint64_t *)a = b;
		return 0;
	case CALL_WITH_CR3:
		return call_with_cr3(step);
	case READ_MSR:
		return read_msr((uint32_t)a);
	case WRITE_MSR:
		write_msr((uint32_t)a, b);
		return 0;
	case READ_CONTROL:
		return read_control(a);
	case WRITE_CONTROL:
		return write_control(a, b);
	case CPUID:
		return cpuid(a, b, c);
	case LOAD_TABLE:
		return load_table((enum table)a, b, c);
	case STORE_TABLE:
		return store_table((enum table)a, b);
	case INTERRUPTS:
		if (a)
			__asm__ volatile("sti" : : : "memory");
		else
			__asm__ volatile("cli" : : : "memory");
		return 0;
	case ARM_TIMER:
		return arm_timer(a, b);
	case WAIT:
		return wait_for_events(a, b);
	case HALT:
		return halt(a);
	case TIME:
		return time_stamp();
	default:
		fail(__FILE__, __LINE__, "a known step", step->what, 0);
	}
}

/* Returns the number of the first step of a vCPU, or behind the last step of the vCPU before. */
static uint64_t first_step(uint32_t vcpu)
{
	uint64_t first = boot_info->input_size / sizeof(struct step);

	for (uint32_t later = vcpu; later < VCPUS; later++)
		first -= later ? boot_info->param[1 + later] : 0;
	return vcpu ? first : 0;
}

static void do_steps(uint32_t vcpu)
{
	struct step *step = (struct step *)boot_info->input;
	uint64_t first = first_step(vcpu), end = first_step(vcpu + 1);

	for (uint64_t n = first; n < end; n++) {
		uint64_t result = 0, done = 1;

		if (step[n].what & ATTEMPT) {
			done = attempt(do_step, &step[n], &result);
			done = done ? done : 1;
		} else {
			result = do_step(&step[n]);
		}
		step[n].result = result;
		WRITE_ONCE(step[n].done, done);
		if (!vcpu)
			boot_info->result[0] = n + 1;
	}
}

uint32_t vcpu_main(uint32_t number)
{
	do_steps(number);
	return 0;
}

uint32_t guest_main(void)
{
	ASSERT(EVENTS * sizeof(struct event) <= boot_info->samples_size);
	if (boot_info->param[0])
		events_open((struct event *)boot_info->samples, EVENTS);
	do_steps(0);
	return 0;
}
