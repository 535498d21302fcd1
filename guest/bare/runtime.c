/* SPDX-License-Identifier: Apache-2.0 */
/* Runtime of bare-metal guests: printing, stopping, assertions and exceptions. */
#include "runtime.h"

struct boot_info *boot_info;

static inline void out32(uint16_t port, uint32_t value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

void print_bytes(const void *bytes, uint64_t count)
{
	__asm__ volatile("rep outsb"
			 : "+S"(bytes), "+c"(count)
			 : "d"((uint16_t)GUEST_CONSOLE_PORT)
			 : "memory");
}

void print(const char *text)
{
	uint64_t count = 0;

	while (text[count])
		count++;
	print_bytes(text, count);
}

static void print_in_base(uint64_t number, uint32_t base)
{
	char digits[20];
	char *first = digits + sizeof(digits);

	do {
		*--first = "0123456789abcdef"[number % base];
		number /= base;
	} while (number);
	print_bytes(first, (uint64_t)(digits + sizeof(digits) - first));
}

void print_number(uint64_t number)
{
	print_in_base(number, 10);
}

void print_hex(uint64_t number)
{
	print("0x");
	print_in_base(number, 16);
}

void mark(uint32_t value)
{
	out32(GUEST_MARK_PORT, value);
}

_Noreturn void finish(uint32_t status)
{
	for (;;) /* a VMM that runs the guest again gets the same exit */
		out32(GUEST_FINISH_PORT, status);
}

void touch(uint64_t start, uint64_t bytes)
{
	for (uint64_t at = start; at < start + bytes; at += 4096)
		(void)*(const volatile uint8_t *)at;
}

void touch_for_writing(uint64_t start, uint64_t bytes)
{
	for (uint64_t at = start; at < start + bytes; at += 4096)
		*(volatile uint8_t *)at = 0;
}

/* The VMM reads the failure on this vCPU's stack, because another vCPU may fail meanwhile. */
static _Noreturn void report(const struct boot_failure *failure)
{
	uint64_t address = (uint64_t)failure;

	boot_info->failure = *failure;
	for (;;)
		out32(GUEST_FAILURE_PORT, address <= UINT32_MAX ? (uint32_t)address : 0);
}

_Noreturn void fail(const char *file, uint32_t line, const char *expression, uint64_t left,
		    uint64_t right)
{
	struct boot_failure failure = {
		.file = (uint64_t)file,
		.line = line,
		.expression = (uint64_t)expression,
		.left = left,
		.right = right,
	};

	report(&failure);
}

/* -------------------------------------------------------------- exceptions */

extern const uint8_t exception_stubs[32][16];

/* On a page of its own, which tests map at other addresses too. */
struct interrupt_gate {
	uint16_t offset_low, selector;
	uint8_t stack, type;
	uint16_t offset_middle;
	uint32_t offset_high, reserved;
} __attribute__((packed)) interrupt_table[256] __attribute__((aligned(4096)));

__attribute__((weak)) void on_exception(const struct exception_frame *frame)
{
	(void)frame;
}

_Noreturn void runtime_exception(const struct exception_frame *frame)
{
	struct boot_failure failure = {
		.left = frame->vector,
		.right = frame->error,
		.rip = frame->rip,
	};

	on_exception(frame);
	__asm__ volatile("mov %%cr2, %0" : "=r"(failure.cr2));
	report(&failure);
}

void interrupt_handler(uint8_t vector, const void *handler)
{
	uint64_t address = (uint64_t)handler;
	uint16_t code_segment;

	__asm__("mov %%cs, %0" : "=r"(code_segment));
	interrupt_table[vector] = (struct interrupt_gate){
		.offset_low = (uint16_t)address,
		.offset_middle = (uint16_t)(address >> 16),
		.offset_high = (uint32_t)(address >> 32),
		.selector = code_segment,
		.type = 0x8e, /* present, 64-bit interrupt gate */
	};
}

static void set_exception_handlers(void)
{
	for (uint32_t vector = 0; vector < 32; vector++)
		interrupt_handler((uint8_t)vector, exception_stubs[vector]);
}

static void load_interrupt_table(void)
{
	struct {
		uint16_t limit;
		uint64_t base;
	} __attribute__((packed)) pointer = {sizeof(interrupt_table) - 1,
					     (uint64_t)interrupt_table};

	__asm__ volatile("lidt %0" : : "m"(pointer));
}

/* The first access to a page exits. That must not happen in what a program measures. */
static void touch_program(void)
{
	extern const uint8_t _start[], image_end[];
	uint64_t crossing = boot_info->elisa_call & ~0xfffull;

	touch((uint64_t)_start, (uint64_t)(image_end - _start));
	if (crossing) {
		touch(crossing, 1);
		touch(crossing + ELISA_RETURN_OFFSET, 1);
	}
}

__attribute__((weak)) uint32_t vcpu_main(uint32_t number)
{
	(void)number;
	return 0;
}

static uint32_t prepared; /* by vCPU 0, for all */

_Noreturn void runtime_main(struct boot_info *info, uint32_t number)
{
	if (number) {
		while (!__atomic_load_n(&prepared, __ATOMIC_ACQUIRE))
			__asm__ volatile("pause");
		load_interrupt_table();
		finish(vcpu_main(number));
	}
	boot_info = info;
	set_exception_handlers();
	load_interrupt_table();
	ASSERT_EQUAL(info->magic, BOOT_INFO_MAGIC);
	touch_program();
	__atomic_store_n(&prepared, 1, __ATOMIC_RELEASE);
	finish(guest_main());
}
