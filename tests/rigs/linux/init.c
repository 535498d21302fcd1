/* SPDX-License-Identifier: Apache-2.0 */
/*
 * First process of a Linux guest in tests, without a C library: says how many processors there are,
 * then does what the words behind "--" on the kernel's command line say, one after the other.
 */
#include <stdint.h>

enum { READ = 0, WRITE = 1, EXIT = 60, REBOOT = 169, GETAFFINITY = 204,
       GETTIME = 228 };

static long call(long number, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return result;
}

static unsigned int length(const char *text)
{
	unsigned int n = 0;

	while (text[n])
		n++;
	return n;
}

static int same(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

static void say(const char *text)
{
	call(WRITE, 1, (long)text, length(text), 0);
}

static void say_number(unsigned int number)
{
	char digits[] = { '0' + number / 10 % 10, '0' + number % 10, 0 };

	say(digits);
}

static void say_time(void)
{
	char digits[] = "0000000000 seconds\n";
	long now[2] = { 0 };	/* a struct timespec */

	call(GETTIME, 0, (long)now, 0, 0);	/* CLOCK_REALTIME */
	for (int i = 9; i >= 0; i--, now[0] /= 10)
		digits[i] = '0' + now[0] % 10;
	say("init: ");
	say(digits);
}

/* Says fifty numbers, with work in between. */
static void say_numbers(void)
{
	for (unsigned int number = 0; number < 50; number++) {
		say("init: number ");
		say_number(number);
		say("\n");
		for (volatile unsigned int turn = 0; turn < 1000000; turn++)
			;
	}
}

static void restart(long how)
{
	call(REBOOT, (long)0xfee1dead, 672274793, how, 0);
}

__attribute__((used)) void begin(const long *stack)
{
	long count = stack[0];
	char *const *words = (char *const *)(stack + 1);
	uint64_t processors[16] = { 0 };
	char line[80];
	unsigned int n = 0;

	call(GETAFFINITY, 0, sizeof(processors), (long)processors, 0);
	for (int i = 0; i < 16; i++)
		for (uint64_t left = processors[i]; left; left &= left - 1)
			n++;
	say("init: ");
	say_number(n);
	say(" processors\n");
	for (long i = 1; i < count; i++) {
		if (same(words[i], "echo")) {
			long got = call(READ, 0, (long)line, sizeof(line) - 1, 0);

			line[got > 0 ? got : 0] = 0;
			say("init: got ");
			say(line);
		} else if (same(words[i], "count")) {
			say_numbers();
		} else if (same(words[i], "time")) {
			say_time();
		} else if (same(words[i], "poweroff")) {
			restart(0x4321fedc);
		} else if (same(words[i], "reboot")) {
			restart(0x01234567);
		}
	}
	say("init: ends\n");
	call(EXIT, 3, 0, 0, 0);
}

__asm__(".globl _start\n"
	"_start:\n\t"
	"mov	%rsp, %rdi\n\t"
	"and	$-16, %rsp\n\t"
	"call	begin\n");
