"""Build of the cffi extension ``pykvm.sandbox._sandbox``; setup.py names ``ffibuilder``.

Numbers are those of the kernel's headers; the declarations below and `system_calls.py` only name
them. A system call that the headers or the processor lack has the number -1.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
PLACE = "pykvm/sandbox"  # setuptools wants paths below setup.py
SOURCES = ("threads", "kernel_calls")

NUMBERS = """
    AF_UNIX AF_INET AF_INET6 CLONE_THREAD CLONE_VM CLONE_SIGHAND CLONE_FS CLONE_FILES
    CLONE_NEWCGROUP CLONE_NEWIPC CLONE_NEWNET CLONE_NEWNS CLONE_NEWPID CLONE_NEWUSER CLONE_NEWUTS
    PROT_WRITE PROT_EXEC MAP_ANONYMOUS PR_SET_NAME PR_GET_NAME PR_SET_VMA
    O_ACCMODE O_RDONLY O_WRONLY O_RDWR O_CREAT O_TRUNC EPERM ENOSYS
    F_DUPFD F_DUPFD_CLOEXEC F_GETFD F_SETFD F_GETFL F_SETFL F_GETLK F_SETLK F_SETLKW
    F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW F_ADD_SEALS F_GET_SEALS F_GETPIPE_SZ F_SETPIPE_SZ
    FIONBIO FIOCLEX FIONCLEX FIONREAD TCGETS TCSETS TCSETSW TCSETSF TCGETS2 TCSETS2 TCSETSW2
    TCSETSF2 TIOCGWINSZ TIOCOUTQ BLKDISCARD BLKZEROOUT BLKGETSIZE64 BLKSSZGET
    TUNGETFEATURES TUNGETIFF TUNSETOFFLOAD TUNGETVNETHDRSZ TUNSETVNETHDRSZ TUNSETVNETLE
    TUNSETVNETBE TUNSETQUEUE KVMIO VHOST_VIRTIO
    BPF_LD BPF_W BPF_ABS BPF_ALU BPF_AND BPF_K BPF_JMP BPF_JEQ BPF_JGE BPF_JA BPF_RET BPF_MAXINSNS
    SECCOMP_RET_KILL_PROCESS SECCOMP_RET_ERRNO SECCOMP_RET_ALLOW
    SECCOMP_DATA_NUMBER SECCOMP_DATA_ARCH SECCOMP_DATA_ARGS THIS_ARCH X32_BIT
    LANDLOCK_ACCESS_FS_EXECUTE LANDLOCK_ACCESS_FS_WRITE_FILE LANDLOCK_ACCESS_FS_READ_FILE
    LANDLOCK_ACCESS_FS_READ_DIR LANDLOCK_ACCESS_FS_REMOVE_DIR LANDLOCK_ACCESS_FS_REMOVE_FILE
    LANDLOCK_ACCESS_FS_MAKE_CHAR LANDLOCK_ACCESS_FS_MAKE_DIR LANDLOCK_ACCESS_FS_MAKE_REG
    LANDLOCK_ACCESS_FS_MAKE_SOCK LANDLOCK_ACCESS_FS_MAKE_FIFO LANDLOCK_ACCESS_FS_MAKE_BLOCK
    LANDLOCK_ACCESS_FS_MAKE_SYM LANDLOCK_ACCESS_FS_REFER LANDLOCK_ACCESS_FS_TRUNCATE
    LANDLOCK_ACCESS_FS_IOCTL_DEV LANDLOCK_ACCESS_NET_BIND_TCP LANDLOCK_ACCESS_NET_CONNECT_TCP
    LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
"""

# Structs whose names are too common for a macro, and what the headers of Linux 6.1 lack
# (landlock(7): ABI 3, 5, 4 and 6).
INCLUDES = r"""
    #include <errno.h>
    #include <fcntl.h>
    #include <sched.h>
    #include <stddef.h>
    #include <asm/termbits.h>
    #include <linux/audit.h>
    #include <linux/filter.h>
    #include <linux/fs.h>
    #include <linux/if_tun.h>
    #include <linux/kvm.h>
    #include <linux/landlock.h>
    #include <linux/seccomp.h>
    #include <linux/vhost.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/prctl.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include "sandbox.h"

    #define SECCOMP_DATA_NUMBER offsetof(struct seccomp_data, nr)
    #define SECCOMP_DATA_ARCH offsetof(struct seccomp_data, arch)
    #define SECCOMP_DATA_ARGS offsetof(struct seccomp_data, args)
    #ifdef __x86_64__
    #define THIS_ARCH AUDIT_ARCH_X86_64
    #define X32_BIT 0x40000000 /* __X32_SYSCALL_BIT in asm/unistd.h, which is for x32 only */
    #else
    #define THIS_ARCH 0
    #define X32_BIT 0
    #endif

    #ifndef LANDLOCK_ACCESS_FS_TRUNCATE
    #define LANDLOCK_ACCESS_FS_TRUNCATE (1ULL << 14)
    #endif
    #ifndef LANDLOCK_ACCESS_FS_IOCTL_DEV
    #define LANDLOCK_ACCESS_FS_IOCTL_DEV (1ULL << 15)
    #endif
    #ifndef LANDLOCK_ACCESS_NET_BIND_TCP
    #define LANDLOCK_ACCESS_NET_BIND_TCP (1ULL << 0)
    #define LANDLOCK_ACCESS_NET_CONNECT_TCP (1ULL << 1)
    #endif
    #ifndef LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
    #define LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET (1ULL << 0)
    #endif
"""


def _call_names() -> list[str]:
    """Return the macros of all system calls in `system_calls.py`, sorted."""
    tables = runpy.run_path(str(HERE / "system_calls.py"))
    names = {name for table in tables["__all__"] for name in tables[table]}
    return sorted(f"__NR_{name}" for name in names | {"socket", "socketpair"})


def _declarations() -> str:
    header = (HERE / "sandbox.h").read_text()
    header = re.sub(r"/\* not for cffi \{ \*/.*?/\* \} \*/", "", header, flags=re.DOTALL)
    lines = re.sub(r"[ \t]*/\*.*?\*/", "", header, flags=re.DOTALL).splitlines(keepends=True)
    numbers = re.compile(r"#define [A-Z_]+\s+\d+\n")
    kept = [one for one in lines if not one.startswith("#") or numbers.fullmatch(one)]
    names = NUMBERS.split() + _call_names()
    return "".join(kept) + "".join(f"#define {name} ...\n" for name in names)


def _absent_calls() -> str:
    return "".join(f"#ifndef {name}\n#define {name} -1\n#endif\n" for name in _call_names())


ffibuilder = FFI()
ffibuilder.cdef(_declarations())
ffibuilder.set_source(
    "pykvm.sandbox._sandbox",
    INCLUDES + _absent_calls(),
    sources=[f"{PLACE}/{source}.c" for source in SOURCES],
    depends=[f"{PLACE}/sandbox.h"],
    include_dirs=[PLACE],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)
