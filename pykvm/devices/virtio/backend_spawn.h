/*
 * Start of a vhost-user back end in a process of its own, confined before it runs.
 *
 * cffi reads this header too, so outside the marked parts it holds plain declarations only.
 */
#ifndef PYKVM_BACKEND_SPAWN_H
#define PYKVM_BACKEND_SPAWN_H

/* The new process's descriptor of the socket on which it listens. */
#define BACKEND_LISTENER	3

/* Every file system is read-only to it, whatever is mounted on it; needs root or a user namespace. */
#define BACKEND_READ_ONLY	1
/* It is root of a user namespace that has this user alone, and setgroups() does nothing there. */
#define BACKEND_USER_NAMESPACE	2

/*
 * Start argv[0] with a listening socket, and with messages as its stdout and stderr. It gains no
 * privileges by what it executes, and is sent SIGTERM when the calling *thread* ends. What fails
 * before argv[0] runs is written to messages, and the exit status is 127.
 *
 * Returns its process ID, or -errno.
 */
int backend_spawn(char **argv, int listener, int messages, int flags);

#endif
