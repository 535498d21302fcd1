/* SPDX-License-Identifier: Apache-2.0 */
/*
 * First process of a guest that runs one command: loads modules, mounts a root file system with a
 * writable overlay, runs the command there, tells its status, and switches the machine off.
 *
 * What to do is in /settings, one `key=value` after the other, each ended by a zero byte. The guest's
 * streams are virtio console ports of these names; see pykvm/machine/linux/command.py.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST_WORDS	4096
#define SETTINGS_SIZE	(4 << 20)
#define MOST_INTERFACES	32
#define PATIENCE	30	/* seconds for a device to appear */

static struct {
	char *words[MOST_WORDS + 1];		/* the command */
	char *environment[MOST_WORDS + 1];
	unsigned int words_count, environment_count;
	char *root;	/* type:source of the root file system */
	char *overlay;	/* mount options of what is written; none: read-only */
	char *directory, *name;
	char *interfaces[MOST_INTERFACES], *resolvers[MOST_INTERFACES];
	unsigned int interfaces_count, resolvers_count;
	bool terminal;
} wanted;

static int status_port = -1;

/* ------------------------------------------------------------------ the end */

/* Tell the host in a line, and switch off. The port takes it all before write() returns. */
static _Noreturn void end(const char *format, ...)
{
	char line[512];
	va_list more;
	int size;

	va_start(more, format);
	size = vsnprintf(line, sizeof(line), format, more);
	va_end(more);
	if (size >= (int)sizeof(line))
		size = sizeof(line) - 1;
	if (status_port < 0 || write(status_port, line, (size_t)size) != size)
		dprintf(2, "pykvm: %s", line);
	sync();
	reboot(RB_POWER_OFF);
	_exit(1);
}

static _Noreturn void fail(const char *what, const char *which)
{
	end("failed %s %s: %s\n", what, which, strerror(errno));
}

static void must_mount(const char *source, const char *to, const char *type, unsigned long flags,
		       const char *options)
{
	mkdir(to, 0755);
	if (mount(source, to, type, flags, options))
		fail("mount of", to);
}

/* ----------------------------------------------------------------- settings */

static void take(char *key, char *value)
{
	if (!strcmp(key, "word") && wanted.words_count < MOST_WORDS)
		wanted.words[wanted.words_count++] = value;
	else if (!strcmp(key, "environment") && wanted.environment_count < MOST_WORDS)
		wanted.environment[wanted.environment_count++] = value;
	else if (!strcmp(key, "interface") && wanted.interfaces_count < MOST_INTERFACES)
		wanted.interfaces[wanted.interfaces_count++] = value;
	else if (!strcmp(key, "resolver") && wanted.resolvers_count < MOST_INTERFACES)
		wanted.resolvers[wanted.resolvers_count++] = value;
	else if (!strcmp(key, "root"))
		wanted.root = value;
	else if (!strcmp(key, "overlay"))
		wanted.overlay = value;
	else if (!strcmp(key, "directory"))
		wanted.directory = value;
	else if (!strcmp(key, "name"))
		wanted.name = value;
	else if (!strcmp(key, "terminal"))
		wanted.terminal = *value == '1';
}

static void read_settings(void)
{
	static char text[SETTINGS_SIZE];
	int file = open("/settings", O_RDONLY | O_CLOEXEC);
	ssize_t size = 0, n;

	if (file < 0)
		fail("opening", "/settings");
	while ((n = read(file, text + size, sizeof(text) - 1 - (size_t)size)) > 0)
		size += n;
	close(file);
	for (char *at = text; at < text + size; at += strlen(at) + 1) {
		char *value = strchr(at, '=');

		if (value) {
			*value = 0;
			take(at, value + 1);
			at = value + 1;
		}
	}
}

/* ------------------------------------------------------------------ modules */

static int is_module(const struct dirent *entry)
{
	return entry->d_name[0] != '.';
}

/* Their names begin with their place in the order. */
static void load_modules(void)
{
	struct dirent **names;
	int count = scandir("/modules", &names, is_module, alphasort);

	for (int i = 0; i < count; i++) {
		char path[300];
		int file;

		snprintf(path, sizeof(path), "/modules/%s", names[i]->d_name);
		file = open(path, O_RDONLY | O_CLOEXEC);
		if (file < 0 || (syscall(SYS_finit_module, file, "", 0) && errno != EEXIST))
			fail("loading", names[i]->d_name);
		close(file);
		unlink(path);
		free(names[i]);
	}
	if (count >= 0)
		free(names);
}

/* ------------------------------------------------------------------ streams */

static void pause_a_moment(void)
{
	nanosleep(&(struct timespec){ .tv_nsec = 2000000 }, NULL);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Find the port of a name; the host has opened its end before it tells the name. */
static bool find_port(const char *name, char *path, size_t size)
{
	DIR *ports = opendir("/sys/class/virtio-ports");
	struct dirent *entry;
	bool found = false;

	while (ports && !found && (entry = readdir(ports))) {
		char file[300], text[64] = "";
		int descriptor;

		snprintf(file, sizeof(file), "/sys/class/virtio-ports/%s/name", entry->d_name);
		descriptor = open(file, O_RDONLY | O_CLOEXEC);
		if (descriptor < 0)
			continue;
		if (read(descriptor, text, sizeof(text) - 1) < 0)
			text[0] = 0;
		close(descriptor);
		text[strcspn(text, "\n")] = 0;
		found = !strcmp(text, name);
		if (found)
			snprintf(path, size, "/dev/%s", entry->d_name);
	}
	if (ports)
		closedir(ports);
	return found;
}

static int open_port(const char *name, int flags)
{
	double until = now() + PATIENCE;
	char path[300];

	do {
		if (find_port(name, path, sizeof(path))) {
			int port = open(path, flags | O_CLOEXEC);

			if (port >= 0)
				return port;
		}
		pause_a_moment();
	} while (now() < until);
	errno = ENODEV;
	fail("waiting for the port", name);
}

static void attach_streams(void)
{
	int in, out, error;

	if (wanted.terminal) {
		double until = now() + PATIENCE;

		setsid();
		while ((in = open("/dev/hvc0", O_RDWR)) < 0 && now() < until)
			pause_a_moment();
		if (in < 0)
			fail("opening", "/dev/hvc0");
		ioctl(in, TIOCSCTTY, 1);
		out = error = in;
	} else {
		in = open_port("stdin", O_RDONLY);
		out = open_port("stdout", O_WRONLY);
		error = open_port("stderr", O_WRONLY);
	}
	if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(error, 2) < 0)
		fail("using", "the console's ports");
}

/* --------------------------------------------------------------------- root */

static void wait_for(const char *path)
{
	double until = now() + PATIENCE;

	while (access(path, F_OK) && now() < until)
		pause_a_moment();
}

/* root is type:source, as virtiofs:root or ext4:/dev/vda. */
static void mount_root(void)
{
	const char *lower = wanted.overlay ? "/lower" : "/root";
	char *source = strchr(wanted.root, ':');

	if (!source) {
		errno = EINVAL;
		fail("root file system", wanted.root);
	}
	*source++ = 0;
	if (*source == '/')
		wait_for(source);
	must_mount(source, lower, wanted.root, wanted.overlay ? MS_RDONLY : 0, "");
	if (wanted.overlay) {
		must_mount("pykvm", "/upper", "tmpfs", 0, wanted.overlay);
		mkdir("/upper/data", 0755);
		mkdir("/upper/work", 0755);
		must_mount("pykvm", "/root", "overlay", 0,
			   "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work");
	}
}

static void move_into_root(void)
{
	static const char *const kept[] = { "dev", "proc", "sys" };
	static const char *const links[][2] = {
		{ "/proc/self/fd", "/dev/fd" },
		{ "/proc/self/fd/0", "/dev/stdin" },
		{ "/proc/self/fd/1", "/dev/stdout" },
		{ "/proc/self/fd/2", "/dev/stderr" },
	};

	for (unsigned int i = 0; i < sizeof(kept) / sizeof(kept[0]); i++) {
		char from[16], to[32];

		snprintf(from, sizeof(from), "/%s", kept[i]);
		snprintf(to, sizeof(to), "/root/%s", kept[i]);
		mkdir(to, 0755);
		if (mount(from, to, NULL, MS_MOVE, NULL))
			fail("mount of", to);
	}
	if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
		fail("entering", "the root file system");
	must_mount("pykvm", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755");
	must_mount("pykvm", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	must_mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "ptmxmode=666,mode=620");
	must_mount("pykvm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
	for (unsigned int i = 0; i < sizeof(links) / sizeof(links[0]); i++)
		if (symlink(links[i][0], links[i][1]) && errno != EEXIST)
			fail("linking", links[i][1]);
}

/* ------------------------------------------------------------------ command */

static _Noreturn void run_command(void)
{
	attach_streams();
	if (chdir(wanted.directory ? wanted.directory : "/") && chdir("/"))
		fail("entering", "/");
	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	environ = wanted.environment;
	execvp(wanted.words[0], wanted.words);
	dprintf(2, "pykvm: %s: %s\n", wanted.words[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

/* ------------------------------------------------------------------ network */

static void control(int s, unsigned long request, void *argument, const char *what)
{
	if (ioctl(s, request, argument))
		fail("network", what);
}

static void set_address(int s, unsigned long request, struct ifreq *interface, const char *text)
{
	struct sockaddr_in address = { .sin_family = AF_INET };

	if (inet_pton(AF_INET, text, &address.sin_addr) != 1) {
		errno = EINVAL;
		fail("network", text);
	}
	memcpy(&interface->ifr_addr, &address, sizeof(address));
	control(s, request, interface, text);
}

/* text: name, address, mask and perhaps gateway. */
static void configure(int s, char *text)
{
	char *name = strsep(&text, " "), *address = strsep(&text, " ");
	char *mask = strsep(&text, " ");
	double until = now() + PATIENCE;
	struct ifreq interface = { 0 };

	if (!name || !address || !mask) {
		errno = EINVAL;
		fail("network", "interface");
	}
	snprintf(interface.ifr_name, sizeof(interface.ifr_name), "%s", name);
	while (ioctl(s, SIOCGIFFLAGS, &interface) && now() < until)
		pause_a_moment();	/* its driver is still at work */
	set_address(s, SIOCSIFADDR, &interface, address);
	set_address(s, SIOCSIFNETMASK, &interface, mask);
	control(s, SIOCGIFFLAGS, &interface, name);
	interface.ifr_flags |= IFF_UP;
	control(s, SIOCSIFFLAGS, &interface, name);
	if (text) {
		struct rtentry route = { .rt_flags = RTF_UP | RTF_GATEWAY, .rt_dev = name };
		struct sockaddr_in any = { .sin_family = AF_INET }, gateway = any;

		inet_pton(AF_INET, text, &gateway.sin_addr);
		memcpy(&route.rt_dst, &any, sizeof(any));
		memcpy(&route.rt_genmask, &any, sizeof(any));
		memcpy(&route.rt_gateway, &gateway, sizeof(gateway));
		control(s, SIOCADDRT, &route, text);
	}
}

/* In the overlay; a root file system without one keeps its own. */
static void write_resolvers(void)
{
	FILE *file;

	if (!wanted.resolvers_count || !wanted.overlay)
		return;
	unlink("/etc/resolv.conf");	/* often a link to where nothing is here */
	file = fopen("/etc/resolv.conf", "w");
	for (unsigned int i = 0; file && i < wanted.resolvers_count; i++)
		fprintf(file, "nameserver %s\n", wanted.resolvers[i]);
	if (!file || fclose(file))
		fail("writing", "/etc/resolv.conf");
}

static void set_up_network(void)
{
	struct ifreq loopback = { .ifr_name = "lo", .ifr_flags = IFF_UP };
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (s < 0)
		return;	/* a kernel without networks */
	control(s, SIOCSIFFLAGS, &loopback, "lo");
	for (unsigned int i = 0; i < wanted.interfaces_count; i++)
		configure(s, wanted.interfaces[i]);
	close(s);
	write_resolvers();
}

int main(void)
{
	int status;
	pid_t command, ended;

	/* Before any device is there, whoever reads the serial console sees what goes wrong. */
	must_mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=755");
	must_mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
	must_mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
	read_settings();
	load_modules();
	status_port = open_port("status", O_WRONLY);
	if (!wanted.root || !wanted.words_count) {
		errno = EINVAL;
		fail("reading", "/settings");
	}
	mount_root();
	move_into_root();
	if (wanted.name)
		sethostname(wanted.name, strlen(wanted.name));
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	set_up_network();
	command = fork();
	if (command < 0)
		fail("starting", wanted.words[0]);
	if (!command)
		run_command();
	do {	/* orphans too come to the first process */
		ended = waitpid(-1, &status, 0);
	} while (ended != command && (ended > 0 || errno == EINTR));
	if (WIFSIGNALED(status))
		end("signal %d\n", WTERMSIG(status));
	end("exit %d\n", WEXITSTATUS(status));
}
