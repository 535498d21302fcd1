#include "serial.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Registers, by offset; with LCR_DLAB the first two hold the divisor. */
enum { DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR };

#define IER_RECEIVED	0x01
#define IER_SENT	0x02
#define IER_LINE	0x04
#define IER_MODEM	0x08
#define IIR_NONE	0x01
#define IIR_SENT	0x02
#define IIR_RECEIVED	0x04
#define IIR_FIFO	0xc0
#define FCR_ENABLE	0x01
#define FCR_CLEAR_IN	0x02
#define LCR_DLAB	0x80
#define MCR_DTR		0x01
#define MCR_RTS		0x02
#define MCR_OUT1	0x04
#define MCR_OUT2	0x08
#define MCR_LOOP	0x10
#define LSR_READY	0x01
#define LSR_OVERRUN	0x02
#define LSR_EMPTY	0x60	/* holding and shift register */
#define MSR_CTS		0x10
#define MSR_DSR		0x20
#define MSR_RI		0x40
#define MSR_DCD		0x80

#define TAIL_SIZE	65536

struct serial {
	pthread_mutex_t lock;	/* between vCPUs, and whoever feeds or reads the tail */
	int output;
	int watchers[SERIAL_WATCHERS];	/* sockets; -1: none */
	int interrupt;
	int stopping;		/* set without the lock */
	uint8_t ier, fcr, lcr, mcr, scr, overrun;
	uint16_t divisor;
	int sent;		/* the interrupt of an empty holding register is pending */
	size_t in_first, in_count;
	size_t tail_next, tail_count;
	uint8_t in[SERIAL_INPUT];
	uint8_t tail[TAIL_SIZE];
};

struct serial *serial_new(int output, int interrupt)
{
	struct serial *serial = calloc(1, sizeof(*serial));

	if (!serial)
		return NULL;
	pthread_mutex_init(&serial->lock, NULL);
	serial->output = output;
	for (int i = 0; i < SERIAL_WATCHERS; i++)
		serial->watchers[i] = -1;
	serial->interrupt = interrupt;
	serial->divisor = 1;	/* 115200 baud */
	return serial;
}

void serial_free(struct serial *serial)
{
	free(serial);	/* its lock owns no memory */
}

void serial_stop(struct serial *serial)
{
	__atomic_store_n(&serial->stopping, 1, __ATOMIC_RELEASE);
}

static void write_out(struct serial *serial, const uint8_t *data, size_t size)
{
	while (size && serial->output >= 0) {
		ssize_t n = write(serial->output, data, size);
		struct pollfd wait = { .fd = serial->output, .events = POLLOUT };

		if (n > 0) {
			data += n;
			size -= n;
		} else if (n < 0 && (errno == EAGAIN || errno == EINTR) &&
			   __atomic_load_n(&serial->stopping, __ATOMIC_ACQUIRE)) {
			return;
		} else if (n < 0 && errno == EAGAIN) {
			poll(&wait, 1, -1);	/* a signal ends it too */
		} else if (n < 0 && errno != EINTR) {
			serial->output = -1;	/* nobody reads any more */
		}
	}
}

int serial_watch(struct serial *serial, int socket)
{
	int result = -ENOSPC;

	pthread_mutex_lock(&serial->lock);
	for (int i = 0; i < SERIAL_WATCHERS && result; i++) {
		if (serial->watchers[i] < 0) {
			serial->watchers[i] = socket;
			result = 0;
		}
	}
	pthread_mutex_unlock(&serial->lock);
	return result;
}

void serial_unwatch(struct serial *serial, int socket)
{
	pthread_mutex_lock(&serial->lock);
	for (int i = 0; i < SERIAL_WATCHERS; i++)
		if (serial->watchers[i] == socket)
			serial->watchers[i] = -1;
	pthread_mutex_unlock(&serial->lock);
}

static void tell_watchers(struct serial *serial, const uint8_t *data, size_t size)
{
	for (int i = 0; i < SERIAL_WATCHERS; i++)
		if (serial->watchers[i] >= 0)
			send(serial->watchers[i], data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void keep(struct serial *serial, uint8_t byte)
{
	serial->tail[serial->tail_next] = byte;
	serial->tail_next = (serial->tail_next + 1) % TAIL_SIZE;
	if (serial->tail_count < TAIL_SIZE)
		serial->tail_count++;
}

static uint8_t pending(const struct serial *serial)
{
	if (serial->overrun && (serial->ier & IER_LINE))
		return 0x06;
	if (serial->in_count && (serial->ier & IER_RECEIVED))
		return IIR_RECEIVED;
	if (serial->sent && (serial->ier & IER_SENT))
		return IIR_SENT;
	return IIR_NONE;
}

/* The line is edge-triggered: one pulse whenever there is something new to tell. */
static void raise_interrupt(struct serial *serial)
{
	const uint64_t one = 1;

	if (serial->interrupt < 0 || pending(serial) == IIR_NONE)
		return;
	while (write(serial->interrupt, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

static void put_in(struct serial *serial, uint8_t byte)
{
	if (serial->in_count == SERIAL_INPUT) {
		serial->overrun = LSR_OVERRUN;
		return;
	}
	serial->in[(serial->in_first + serial->in_count++) % SERIAL_INPUT] = byte;
}

static void transmit(struct serial *serial, const uint8_t *data, size_t size)
{
	if (serial->mcr & MCR_LOOP) {
		for (size_t i = 0; i < size; i++)
			put_in(serial, data[i]);
	} else {
		for (size_t i = 0; i < size; i++)
			keep(serial, data[i]);
		tell_watchers(serial, data, size);
		write_out(serial, data, size);
	}
	serial->sent = 1;
	raise_interrupt(serial);
}

static uint8_t modem_status(const struct serial *serial)
{
	uint8_t mcr = serial->mcr;

	if (!(mcr & MCR_LOOP))
		return MSR_CTS | MSR_DSR | MSR_DCD;
	return (mcr & MCR_RTS ? MSR_CTS : 0) | (mcr & MCR_DTR ? MSR_DSR : 0) |
	       (mcr & MCR_OUT1 ? MSR_RI : 0) | (mcr & MCR_OUT2 ? MSR_DCD : 0);
}

static uint8_t read_register(struct serial *serial, unsigned int at)
{
	uint8_t value;

	switch (at) {
	case DATA:
		if (serial->lcr & LCR_DLAB)
			return serial->divisor & 0xff;
		if (!serial->in_count)
			return 0;
		value = serial->in[serial->in_first];
		serial->in_first = (serial->in_first + 1) % SERIAL_INPUT;
		serial->in_count--;
		return value;
	case IER:
		return serial->lcr & LCR_DLAB ? serial->divisor >> 8 : serial->ier;
	case IIR_FCR:
		value = pending(serial);
		if (value == IIR_SENT)
			serial->sent = 0;
		return value | (serial->fcr & FCR_ENABLE ? IIR_FIFO : 0);
	case LCR:
		return serial->lcr;
	case MCR:
		return serial->mcr;
	case LSR:
		value = LSR_EMPTY | serial->overrun | (serial->in_count ? LSR_READY : 0);
		serial->overrun = 0;
		return value;
	case MSR:
		return modem_status(serial);
	default:
		return serial->scr;
	}
}

static void write_register(struct serial *serial, unsigned int at, uint8_t value)
{
	switch (at) {
	case DATA:
		if (serial->lcr & LCR_DLAB)
			serial->divisor = (serial->divisor & 0xff00) | value;
		else
			transmit(serial, &value, 1);
		break;
	case IER:
		if (serial->lcr & LCR_DLAB) {
			serial->divisor = (serial->divisor & 0xff) | value << 8;
			break;
		}
		/* Enabling it tells at once that the holding register is empty. */
		if (value & ~serial->ier & IER_SENT)
			serial->sent = 1;
		serial->ier = value & 0x0f;
		raise_interrupt(serial);
		break;
	case IIR_FCR:
		serial->fcr = value;
		if (value & FCR_CLEAR_IN)
			serial->in_count = 0;
		break;
	case LCR:
		serial->lcr = value;
		break;
	case MCR:
		serial->mcr = value & 0x1f;
		break;
	case SCR:
		serial->scr = value;
		break;
	default:
		break;	/* LSR and MSR are written by factories alone */
	}
}

size_t serial_feed(struct serial *serial, const char *data, size_t size)
{
	size_t n;

	pthread_mutex_lock(&serial->lock);
	n = SERIAL_INPUT - serial->in_count < size ? SERIAL_INPUT - serial->in_count : size;
	/* A driver that starts throws away what it finds: wait until it listens. */
	if (!(serial->ier & IER_RECEIVED))
		n = 0;
	for (size_t i = 0; i < n; i++)
		put_in(serial, (uint8_t)data[i]);
	raise_interrupt(serial);
	pthread_mutex_unlock(&serial->lock);
	return n;
}

size_t serial_tail(struct serial *serial, char *out, size_t size)
{
	size_t n, first;

	pthread_mutex_lock(&serial->lock);
	n = serial->tail_count < size ? serial->tail_count : size;
	first = (serial->tail_next + TAIL_SIZE - n) % TAIL_SIZE;
	for (size_t i = 0; i < n; i++)
		out[i] = (char)serial->tail[(first + i) % TAIL_SIZE];
	pthread_mutex_unlock(&serial->lock);
	return n;
}

void serial_save(struct serial *serial, struct serial_state *state)
{
	memset(state, 0, sizeof(*state));
	pthread_mutex_lock(&serial->lock);
	state->ier = serial->ier;
	state->fcr = serial->fcr;
	state->lcr = serial->lcr;
	state->mcr = serial->mcr;
	state->scr = serial->scr;
	state->overrun = serial->overrun;
	state->sent = serial->sent;
	state->divisor = serial->divisor;
	state->count = serial->in_count;
	for (size_t i = 0; i < serial->in_count; i++)
		state->input[i] = serial->in[(serial->in_first + i) % SERIAL_INPUT];
	pthread_mutex_unlock(&serial->lock);
}

int serial_restore(struct serial *serial, const struct serial_state *state)
{
	if (state->count > SERIAL_INPUT || (state->ier & ~0x0f) || (state->mcr & ~0x1f) ||
	    (state->overrun & ~LSR_OVERRUN) || state->sent > 1)
		return -1;
	pthread_mutex_lock(&serial->lock);
	serial->ier = state->ier;
	serial->fcr = state->fcr;
	serial->lcr = state->lcr;
	serial->mcr = state->mcr;
	serial->scr = state->scr;
	serial->overrun = state->overrun;
	serial->sent = state->sent;
	serial->divisor = state->divisor;
	serial->in_first = 0;
	serial->in_count = state->count;
	memcpy(serial->in, state->input, state->count);
	raise_interrupt(serial);
	pthread_mutex_unlock(&serial->lock);
	return 0;
}

int serial_access(void *context, const struct pykvm_access *access)
{
	struct serial *serial = context;
	unsigned int at = access->offset;

	pthread_mutex_lock(&serial->lock);
	if (access->size == 1 && at == DATA && access->is_write && !(serial->lcr & LCR_DLAB)) {
		transmit(serial, access->data, access->count);	/* OUTS writes a line at a time */
	} else {
		/* A wider access is one of each register, as on an 8-bit bus. */
		for (size_t i = 0; i < (size_t)access->size * access->count; i++) {
			unsigned int place = (at + i % access->size) % SERIAL_PORTS;

			if (access->is_write)
				write_register(serial, place, access->data[i]);
			else
				access->data[i] = read_register(serial, place);
		}
	}
	pthread_mutex_unlock(&serial->lock);
	return 1;
}
