/* SPDX-License-Identifier: Apache-2.0 */
#include "events.h"

#include "runtime.h"

static struct event *events;
static uint64_t events_room;
static uint64_t taken;

/*
 * Stubs, 16 bytes apart: one for the NMI, then one for each vector from 32 up. None of these events
 * pushes an error code. The counter is read before anything that takes time.
 */
extern const uint8_t event_stubs[][16];

__asm__(".text\n\t"
	".balign	16\n"
	"event_stubs:\n\t"
	"push	$2\n\t"
	"jmp	event_entry\n\t"
	".set	event_vector, 32\n\t"
	".rept	224\n\t"
	".balign	16\n\t"
	"push	$event_vector\n\t"
	"jmp	event_entry\n\t"
	".set	event_vector, event_vector + 1\n\t"
	".endr\n"
	"event_entry:\n\t"
	"push	%rax\n\tpush	%rdx\n\t"
	"rdtsc\n\t"
	"push	%rcx\n\tpush	%rsi\n\tpush	%rdi\n\tpush	%rbp\n\t"
	"push	%r8\n\tpush	%r9\n\tpush	%r10\n\tpush	%r11\n\t"
	"cld\n\t"
	"shl	$32, %rdx\n\t"
	"lea	(%rax,%rdx), %rsi\n\t"
	"lea	80(%rsp), %rdi\n\t" /* vector, rip, cs, rflags, rsp, ss */
	"mov	%rsp, %rbp\n\t"
	"and	$-16, %rsp\n\t"
	"call	event_record\n\t"
	"mov	%rbp, %rsp\n\t"
	"pop	%r11\n\tpop	%r10\n\tpop	%r9\n\tpop	%r8\n\t"
	"pop	%rbp\n\tpop	%rdi\n\tpop	%rsi\n\tpop	%rcx\n\t"
	"pop	%rdx\n\tpop	%rax\n\t"
	"add	$8, %rsp\n\t"
	"iretq\n");

void event_record(const uint64_t *frame, uint64_t time)
{
	uint64_t number = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);

	events[number % events_room] = (struct event){
		.vector = frame[0],
		.time = time,
		.rip = frame[1],
		.rflags = frame[3],
		.rsp = frame[4],
	};
	boot_info->result[1] = number + 1;
	if (frame[0] != NMI_VECTOR && frame[0] != SPURIOUS_VECTOR)
		write_msr(MSR_X2APIC_EOI, 0);
}

void events_open(struct event *log, uint64_t room)
{
	touch_for_writing((uint64_t)log, room * sizeof(*log));
	events = log;
	events_room = room;
	interrupt_handler(NMI_VECTOR, event_stubs[0]);
	for (uint32_t vector = 32; vector < 256; vector++)
		interrupt_handler((uint8_t)vector, event_stubs[vector - 31]);
	write_msr(MSR_APIC_BASE, read_msr(MSR_APIC_BASE) | APIC_BASE_X2APIC);
	write_msr(MSR_X2APIC_SPURIOUS, APIC_SPURIOUS_ENABLE | SPURIOUS_VECTOR);
}

uint64_t events_taken(void)
{
	return READ_ONCE(taken);
}

void events_arm_timer(uint64_t deadline, uint8_t vector)
{
	write_msr(MSR_X2APIC_LVT_TIMER, APIC_TIMER_TSC_DEADLINE | vector);
	/* SDM vol. 3A 11.5.4.1: the mode has to be set before the deadline. */
	__asm__ volatile("mfence" : : : "memory");
	write_msr(MSR_TSC_DEADLINE, deadline);
}

/*
 * Entry of a second vCPU. The VMM starts it with the value for the interrupt command register in
 * rdi; it sends that one interrupt and finishes.
 */
__asm__(".text\n\t"
	".globl	second_start\n"
	"second_start:\n\t"
	"mov	$0x1b, %ecx\n\t" /* MSR_APIC_BASE */
	"rdmsr\n\t"
	"or	$0xc00, %eax\n\t" /* APIC_BASE_X2APIC */
	"wrmsr\n\t"
	"mov	$0x830, %ecx\n\t" /* interrupt command register */
	"mov	%edi, %eax\n\t"
	"mov	%rdi, %rdx\n\t"
	"shr	$32, %rdx\n\t"
	"wrmsr\n"
	"second_done:\n\t"
	"xor	%eax, %eax\n\t"
	"out	%eax, $0xf0\n\t" /* GUEST_FINISH_PORT */
	"jmp	second_done\n");
