#include "debug_console.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct debug_console {
	pthread_mutex_t lock;	/* between vCPUs that write, and whoever reads */
	size_t size;
	size_t used;
	uint64_t dropped;
	char buffer[];
};

struct debug_console *debug_console_new(size_t size)
{
	struct debug_console *console = calloc(1, sizeof(*console) + size);

	if (!console)
		return NULL;
	pthread_mutex_init(&console->lock, NULL);
	console->size = size;
	return console;
}

void debug_console_free(struct debug_console *console)
{
	free(console);	/* its lock owns no memory */
}

size_t debug_console_read(struct debug_console *console, char *out, size_t size)
{
	size_t n;

	pthread_mutex_lock(&console->lock);
	n = console->used < size ? console->used : size;
	memcpy(out, console->buffer, n);
	memmove(console->buffer, console->buffer + n, console->used - n);
	console->used -= n;
	pthread_mutex_unlock(&console->lock);
	return n;
}

uint64_t debug_console_dropped(struct debug_console *console)
{
	uint64_t dropped;

	pthread_mutex_lock(&console->lock);
	dropped = console->dropped;
	pthread_mutex_unlock(&console->lock);
	return dropped;
}

int debug_console_access(void *context, const struct pykvm_access *access)
{
	struct debug_console *console = context;
	size_t size = (size_t)access->size * access->count;
	size_t room, n;

	if (!access->is_write)
		return 0;
	pthread_mutex_lock(&console->lock);
	room = console->size - console->used;
	n = size < room ? size : room;
	memcpy(console->buffer + console->used, access->data, n);
	console->used += n;
	console->dropped += size - n;
	pthread_mutex_unlock(&console->lock);
	return 1;
}
