/*
 * A Multiboot image as kvm-unit-tests builds them: it says on the serial port what it finds, and
 * ends its machine by isa-debug-exit with the number in its command line's last word. With the word
 * echo in it, it first sends back what it is sent.
 */
#include <stdint.h>

#define COM1		0x3f8
#define EXIT		0xf4
#define FW_SELECTOR	0x510
#define FW_DATA		0x511
#define FW_CPUS		5
#define PCI_ADDRESS	0xcf8
#define PCI_DATA	0xcfc

struct info {
	uint32_t flags, lower, upper, device, line, modules, modules_at, symbols[4];
	uint32_t map_size, map, drives[2], table, loader;
};

struct module {
	uint32_t start, end, line, reserved;
};

struct range {
	uint32_t size;
	uint64_t gpa, length;
	uint32_t kind;
} __attribute__((packed));

static void outb(uint16_t port, uint8_t value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void outw(uint16_t port, uint16_t value)
{
	asm volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static void outl(uint16_t port, uint32_t value)
{
	asm volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t inb(uint16_t port)
{
	uint8_t value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static uint32_t inl(uint16_t port)
{
	uint32_t value;

	asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void say(const char *text)
{
	while (*text) {
		while (!(inb(COM1 + 5) & 0x20))
			;
		outb(COM1, (uint8_t)*text++);
	}
}

static void say_number(const char *what, uint64_t number)
{
	char text[17];
	int at = 16;

	text[at] = 0;
	do {
		text[--at] = "0123456789abcdef"[number & 15];
		number >>= 4;
	} while (number);
	say(what);
	say(text + at);
}

static uint32_t last_number(const char *line)
{
	uint32_t number = 0;

	for (; *line; line++)
		number = *line == ' ' ? 0 : number * 10 + (uint32_t)(*line - '0');
	return number;
}

/* Send back what comes, until a q. */
static void echo(void)
{
	char text[2] = "";

	outb(COM1 + 1, 1);	/* it listens */
	say("listening\n");
	for (;;) {
		while (!(inb(COM1 + 5) & 1))
			;
		text[0] = (char)inb(COM1);
		if (text[0] == 'q')
			return;
		say(text);
	}
}

static int has(const char *line, const char *word)
{
	for (; *line; line++) {
		int at = 0;

		while (word[at] && line[at] == word[at])
			at++;
		if (!word[at])
			return 1;
	}
	return 0;
}

void main(uint32_t magic, const struct info *info)
{
	const char *line = (const char *)(uintptr_t)info->line;

	say_number("magic ", magic);
	say_number("\nflags ", info->flags);
	say("\nline ");
	say(line);
	say("\nloader ");
	say((const char *)(uintptr_t)info->loader);
	say_number("\nlower ", info->lower);
	say_number("\nupper ", info->upper);
	for (uint32_t at = 0; at < info->map_size;) {
		const struct range *range = (void *)(uintptr_t)(info->map + at);

		say_number("\nrange ", range->gpa);
		say_number(" ", range->length);
		say_number(" ", range->kind);
		at += range->size + 4;
	}
	for (uint32_t i = 0; i < info->modules; i++) {
		const struct module *module = (struct module *)(uintptr_t)info->modules_at + i;

		say_number("\nmodule ", module->start & 0xfff);
		say_number(" ", module->end - module->start);
		say(" ");
		say((const char *)(uintptr_t)module->start);
	}
	outw(FW_SELECTOR, FW_CPUS);
	say_number("\ncpus ", inb(FW_DATA));
	outl(PCI_ADDRESS, 0x80000000);
	say_number("\npci ", inl(PCI_DATA));
	say("\n");
	if (has(line, " echo "))
		echo();
	outl(EXIT, last_number(line));
	say("still here\n");
}
