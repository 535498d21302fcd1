"""System calls of a confined process, by what is done with them.

The tables are names only: numbers come from ``<sys/syscall.h>`` through the C compiler when the
extension is built (`build_sandbox.py` reads this file), -1 where the headers or the processor lack
one. A call that no table has is refused with EPERM.

Sources: man-pages section 2; Linux arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ABSENT", "ALLOWED", "CHANGES_FILES", "CHECKED", "IO_URING", "KILLED", "SOCKETS"]

ALLOWED: Final = (
    # ---- memory: mmap and mprotect are in CHECKED ----------------------------------------------
    *("brk", "madvise", "mincore", "mremap", "msync", "munmap", "membarrier", "memfd_create"),
    # ---- threads and locks of the C library ----------------------------------------------------
    *("futex", "futex_wait", "futex_waitv", "futex_wake", "futex_requeue"),
    *("get_robust_list", "set_robust_list", "set_tid_address", "rseq", "getcpu"),
    *("sched_yield", "sched_getaffinity", "sched_getscheduler", "sched_getparam"),
    *("exit", "exit_group"),
    # ---- descriptors that are open -------------------------------------------------------------
    *("read", "readv", "pread64", "preadv", "preadv2"),
    *("write", "writev", "pwrite64", "pwritev", "pwritev2"),
    *("lseek", "close", "close_range", "dup", "dup2", "dup3", "flock"),
    *("fsync", "fdatasync", "sync_file_range", "ftruncate", "fallocate", "fadvise64"),
    *("copy_file_range", "sendfile", "splice", "tee", "readahead"),
    # ---- new ones that lead nowhere ------------------------------------------------------------
    *("pipe", "pipe2", "eventfd2", "signalfd4", "epoll_create", "epoll_create1"),
    *("timerfd_create", "timerfd_settime", "timerfd_gettime"),
    # ---- waiting -------------------------------------------------------------------------------
    *("poll", "ppoll", "select", "pselect6", "epoll_ctl", "epoll_wait"),
    *("epoll_pwait", "epoll_pwait2", "nanosleep", "clock_nanosleep", "pause", "wait4", "waitid"),
    # ---- files, as far as Landlock lets: openat is in CHECKED ----------------------------------
    *("fstat", "newfstatat", "stat", "lstat", "statx", "statfs", "fstatfs"),
    *("access", "faccessat", "faccessat2", "readlink", "readlinkat"),
    *("getcwd", "getdents64", "umask"),
    # ---- sockets that are open -----------------------------------------------------------------
    *("accept", "accept4", "recvfrom", "recvmsg", "recvmmsg", "sendmsg", "sendmmsg"),
    *("shutdown", "getsockopt", "setsockopt", "getsockname", "getpeername"),
    # ---- signals: those to other processes are in CHECKED --------------------------------------
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigpending", "rt_sigsuspend"),
    *("rt_sigtimedwait", "sigaltstack", "restart_syscall"),
    # A descriptor of a process is its right: none can be made (pidfd_open).
    "pidfd_send_signal",
    *("alarm", "getitimer", "setitimer"),
    # ---- what one may know ---------------------------------------------------------------------
    *("clock_getres", "clock_gettime", "gettimeofday", "time", "times", "getrandom"),
    *("getpid", "getppid", "gettid", "getpgid", "getpgrp", "getsid", "getpriority"),
    *("getuid", "geteuid", "getresuid", "getgid", "getegid", "getresgid", "getgroups"),
    *("capget", "getrusage", "getrlimit", "sysinfo", "uname"),
)
"""Calls that are harmless with any arguments."""

CHECKED: Final = (
    *("clone", "fcntl", "ioctl", "kill", "mmap", "mprotect", "openat", "prctl", "prlimit64"),
    *("sched_setaffinity", "sendto", "tgkill"),
)
"""Calls that depend on their arguments; `pykvm.sandbox.policy` says how."""

CHANGES_FILES: Final = (
    *("mkdir", "mkdirat", "rename", "renameat", "renameat2", "rmdir", "unlink", "unlinkat"),
)
"""Calls that are allowed where there is a directory to write to. Landlock knows about them all.

It knows nothing of chmod, chown, setxattr and utimensat, which are refused therefore.
"""

SOCKETS: Final = ("bind", "connect", "listen")
"""Calls that are allowed where sockets of some family may be made."""

IO_URING: Final = ("io_uring_enter", "io_uring_register", "io_uring_setup")
"""Calls that are allowed where io_uring is wanted. The filter does not see what rings do."""

ABSENT: Final = ("clone3", "openat2", "fchmodat2")
"""Calls that end with ENOSYS: their arguments are in memory, and the C library has another way."""

KILLED: Final = (
    # ---- another program in this process, or this process in another one -----------------------
    *("execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd"),
    *("process_madvise", "process_mrelease", "userfaultfd", "modify_ldt", "iopl", "ioperm"),
    # ---- another view of the system ------------------------------------------------------------
    *("chroot", "mount", "mount_setattr", "move_mount", "open_tree", "fsconfig", "fsmount"),
    *("fsopen", "fspick", "pivot_root", "umount2", "setns", "unshare", "open_by_handle_at"),
    # ---- the kernel ----------------------------------------------------------------------------
    *("bpf", "delete_module", "finit_module", "init_module", "kexec_file_load", "kexec_load"),
    *("perf_event_open", "reboot", "swapoff", "swapon", "acct", "quotactl", "quotactl_fd"),
    *("add_key", "keyctl", "request_key", "clock_settime", "settimeofday", "syslog"),
    # ---- another user --------------------------------------------------------------------------
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups"),
    *("setfsuid", "setfsgid"),
)
"""Calls for which a monitor has no use: whoever makes one has taken it over, and it ends.

What Python's own modules may try on the way to something else (fork, socket, chmod) is refused
instead, so that a mistake of ours is an error with a name.
"""
