"""Code with masked indices, in assembly, so that no compiler's choice decides what is tried.

Each of these bodies starts with an index in rdi that was just masked, the guest's own value in rsi,
and the environment in rcx. A pair is the body of `elisa_serve` and that of the function ``f``.
"""

from pathlib import Path
from typing import Final

from pykvm.elisa.trusted_images import SubImage, build_object

_ASSEMBLY: Final = """
	.macro	mark
	.byte	0x3e
	.endm
	.macro	use index=%rdx
	mov	(%rcx,\\index,8), %rax
	.endm
	.macro	frame
	sub	$64, %rsp
	.endm
	.macro	unframe
	add	$64, %rsp
	.endm
	.bss
	.balign	8
place:	.skip	64
	.text
	.globl	elisa_serve
	.type	elisa_serve, @function
elisa_serve:
	{first}
	and	$63, %rdi
	{body}
	ret
	.type	f, @function
f:	{callee}
	ret
"""


def assembled(directory: Path, body: str, callee: str = "", *, first: str = "mark") -> SubImage:
    """Build an object; without `first` the index in rdi is masked, and not marked."""
    source = directory / "object.S"
    text = _ASSEMBLY.format(first=first, body=body, callee=callee)
    source.write_text(text.replace(";", "\n"))
    return build_object([source])


THROUGH_MEMORY: Final = {
    "pushed and popped": "push %rdi; pop %rdx; use",
    "stored and loaded": "frame; mov %rdi, 8(%rsp); mov 8(%rsp), %rdx; use; unframe",
    "used to store": "frame; mov %rdi, 8(%rsp); mov 8(%rsp), %rdx; mov %rsi, (%rcx,%rdx); unframe",
    "used as a base": "frame; mov %rdi, 8(%rsp); mov 8(%rsp), %rdx; mov 16(%rdx), %rax; unframe",
    "used by a comparison": (
        "frame; mov %rdi, (%rsp); mov (%rsp), %rdx; cmp %rsi, (%rcx,%rdx); unframe"
    ),
    "used to prefetch": "push %rdi; pop %rdx; prefetcht0 (%rcx,%rdx)",
    "used to push": "push %rdi; pop %rdx; push (%rcx,%rdx); pop %rax",
    "used to pop": "push %rdi; pop %rdx; push %rsi; pop (%rcx,%rdx)",
    "used as a bit's number": "push %rdi; pop %rdx; bts %rdx, (%rcx)",
    "used as a bit's number, to look": "push %rdi; pop %rdx; bt %rdx, (%rcx)",
    "added from memory": (
        "frame; mov %rdi, 8(%rsp); mov %rsi, %rdx; add 8(%rsp), %rdx; use; unframe"
    ),
    "32 bits": "frame; mov %edi, 8(%rsp); mov 8(%rsp), %edx; use; unframe",
    "16 bits": "frame; mov %di, 8(%rsp); movzwl 8(%rsp), %edx; use; unframe",
    "8 bits": "frame; mov %dil, 8(%rsp); movsbq 8(%rsp), %rdx; use; unframe",
    "32 bits of 64": "frame; mov %rdi, 8(%rsp); movslq 12(%rsp), %rdx; use; unframe",
    "64 bits around 32": "frame; mov %edi, 12(%rsp); mov 8(%rsp), %rdx; use; unframe",
    "what is left of it": (
        "frame; mov %rdi, 8(%rsp); movb $0, 8(%rsp); movb $0, 15(%rsp); mov 8(%rsp), %rdx; use; "
        "unframe"
    ),
    "by a frame pointer": (
        "push %rbp; mov %rsp, %rbp; sub $16, %rsp; mov %rdi, -8(%rbp); mov 8(%rsp), %rdx; "
        "leave; use"
    ),
    "after a leave": "push %rdi; push %rbp; mov %rsp, %rbp; sub $16, %rsp; leave; pop %rdx; use",
    "on an aligned stack": (
        "mov %rsp, %r10; and $-64, %rsp; mov %rdi, -8(%rsp); lea -16(%rsp), %r8; "
        "mov 8(%r8), %rdx; mov %r10, %rsp; use"
    ),
    "after a pointer moved": (
        "frame; mov %rsp, %r8; inc %r8; mov %rdi, 7(%r8); dec %r8; mov 8(%r8), %rdx; "
        "sub $8, %r8; use; unframe"
    ),
    "by an index that is a constant": (
        "frame; mov $8, %eax; mov %rdi, (%rsp,%rax,2); mov 16(%rsp), %rdx; use; unframe"
    ),
    "in static memory": "mov %rdi, 8+place(%rip); lea place(%rip), %r8; mov 8(%r8), %rdx; use",
    "in shared memory": "mov (%rcx), %r8; mov %rdi, 8(%r8); mov (%rcx), %r9; mov 8(%r9), %rdx; use",
    "in an array of shared memory": (
        "mov (%rcx), %r8; lea (%r8,%rsi,8), %r9; mov %rdi, 8(%r9); lea 8(%r8), %r10; "
        "mov (%r10,%rsi,8), %rdx; use"
    ),
    "at a sum": (
        "mov (%rcx), %r8; mov %r8, %r9; add %rsi, %r9; mov %rdi, (%r9); mov (%rsi,%r8), %rdx; use"
    ),
    "exchanged": "frame; mov %rdi, %rdx; xchg %rdx, (%rsp); xchg (%rsp), %rdx; use; unframe",
    "exchanged and added": (
        "frame; movq $0, (%rsp); lock xadd %rdi, (%rsp); mov (%rsp), %rdx; use; unframe"
    ),
    "what an addition returns": (
        "frame; mov %rdi, (%rsp); xor %edx, %edx; lock xadd %rdx, (%rsp); use; unframe"
    ),
    "compared and exchanged": (
        "frame; movq $0, (%rsp); xor %eax, %eax; lock cmpxchg %rdi, (%rsp); mov (%rsp), %rdx; "
        "use; unframe"
    ),
    "what an exchange finds": (
        "frame; mov %rdi, (%rsp); lock cmpxchg %rsi, (%rsp); mov %rax, %rdx; use; unframe"
    ),
    "two words exchanged": (
        "frame; mov %rcx, %r8; mov %rdi, %rcx; lock cmpxchg16b 16(%rsp); mov 24(%rsp), %rdx; "
        "mov %r8, %rcx; use; unframe"
    ),
    "what finds two words": "frame; mov %rdi, 24(%rsp); lock cmpxchg16b 16(%rsp); use; unframe",
    "two halves exchanged": (
        "frame; mov %rdi, %rbx; lock cmpxchg8b 16(%rsp); mov 16(%rsp), %edx; use; unframe"
    ),
    "copied by a string move": (
        "frame; mov %rdi, 8(%rsp); lea 8(%rsp), %rsi; lea 32(%rsp), %rdi; movsq; "
        "mov 32(%rsp), %rdx; use; unframe"
    ),
    "copied by several": (
        "frame; mov %rdi, 16(%rsp); mov %rcx, %r8; lea 8(%rsp), %rsi; lea 32(%rsp), %rdi; "
        "mov $2, %ecx; rep movsq; mov 40(%rsp), %rdx; mov %r8, %rcx; use; unframe"
    ),
    "copied in part": (
        "frame; mov %rdi, 8(%rsp); lea 9(%rsp), %rsi; lea 32(%rsp), %rdi; movsb; "
        "mov 32(%rsp), %dl; use; unframe"
    ),
    "copied, as many as the guest says": (
        "frame; mov %rdi, 16(%rsp); mov %rcx, %r8; mov %rsi, %rcx; lea 8(%rsp), %rsi; "
        "lea 32(%rsp), %rdi; rep movsb; mov 40(%rsp), %rdx; mov %r8, %rcx; use; unframe"
    ),
    "stored by a string store": (
        "frame; mov %rdi, %rax; mov %rcx, %r8; mov %rsi, %rcx; mov %rsp, %rdi; rep stosq; "
        "mov 24(%rsp), %rdx; mov %r8, %rcx; use; unframe"
    ),
    "loaded by a string load": (
        "frame; mov %rdi, (%rsp); mov %rsp, %rsi; lodsq; mov %rax, %rdx; use; unframe"
    ),
    "two loads by a moving pointer": (
        "frame; mov %rdi, 8(%rsp); mov %rsp, %rsi; lodsq; lodsq; mov %rax, %rdx; use; unframe"
    ),
    "a string's source": "push %rdi; pop %rsi; mov %rsp, %rdi; sub $64, %rdi; movsq",
    "a string's target": "push %rdi; pop %rdi; stosq",
    "a string that is searched": "push %rdi; pop %rdi; mov %rsi, %rcx; repne scasb",
    "a string's length": (
        "push %rdi; pop %rcx; mov %rsp, %rdi; sub $64, %rdi; xor %eax, %eax; rep stosb"
    ),
    "through two places": (
        "frame; mov %rdi, (%rsp); mov (%rsp), %rdx; lfence; mov %rdx, 8(%rsp); "
        "mov 8(%rsp), %rdx; use; unframe"
    ),
    "again after a barrier": (
        "frame; mov %rdi, (%rsp); lfence; mov (%rsp), %rdx; mov %rdx, (%rsp); mov (%rsp), %rdx; "
        "use; unframe"
    ),
    "with a barrier too early": "frame; lfence; mov %rdi, (%rsp); mov (%rsp), %rdx; use; unframe",
    "with other fences": "frame; mov %rdi, (%rsp); mfence; sfence; mov (%rsp), %rdx; use; unframe",
    "on one path": (
        "frame; test %rsi, %rsi; je 1f; mov %rdi, 8(%rsp); 1: mov 8(%rsp), %rdx; use; unframe"
    ),
    "loaded on one path": (
        "frame; mov %rdi, 8(%rsp); mov %rdi, %rdx; test %rsi, %rsi; je 1f; mov 8(%rsp), %rdx; "
        "1: use; unframe"
    ),
    "with a barrier on one path": (
        "frame; mov %rdi, 8(%rsp); test %rsi, %rsi; je 1f; lfence; 1: mov 8(%rsp), %rdx; use; "
        "unframe"
    ),
    "on the path of a hint": (
        "frame; mov %rdi, 8(%rsp); test %rsi, %rsi; .byte 0x3e; je 1f; ud2; "
        "1: mov 8(%rsp), %rdx; use; unframe"
    ),
    "in a loop": (
        "frame; movq $0, 8(%rsp); 1: mov 8(%rsp), %rdx; use; mov %rdi, 8(%rsp); sub $1, %rsi; "
        "jne 1b; unframe"
    ),
    "in the second turn of a loop": (
        "frame; xor %edx, %edx; xor %r8d, %r8d; 1: mov %r8, %rdx; use; mov 8(%rsp), %r8; "
        "mov %rdi, 8(%rsp); dec %rsi; jne 1b; unframe"
    ),
    "by a pointer that moves in a loop": (
        "frame; mov %rsp, %r8; 1: mov %rdi, 8(%r8); mov 8(%r8), %rdx; add $8, %r8; "
        "cmp %rsi, %r8; jb 1b; use; unframe"
    ),
    "behind jumps": (
        "frame; mov %rdi, 8(%rsp); jmp 2f; 1: mov 8(%rsp), %rdx; jmp 3f; 2: jmp 1b; 3: use; unframe"
    ),
}
"""Refused: the index is used as it comes back from memory."""

THROUGH_CALLS: Final = {
    "saved by a callee": (
        "mov %rdi, %rbx; call f; mov %rbx, %rdx; use",
        "push %rbx; xor %ebx, %ebx; pop %rbx",
    ),
    "spilled around a call": (
        "push %rdi; call f; pop %rdx; use",
        "nop",
    ),
    "stored by a callee into its caller's frame": (
        "frame; lea 8(%rsp), %rsi; call f; mov 8(%rsp), %rdx; use; unframe",
        "mov %rdi, (%rsi)",
    ),
    "returned by a callee that spills": (
        "call f; mov %rax, %rdx; use",
        "push %rdi; pop %rax",
    ),
    "handed to a callee": (
        "push %rdi; pop %rdx; call f",
        "use",
    ),
    "handed on the stack": (
        "push %rdi; call f; pop %rdi",
        "mov 8(%rsp), %rdx; use",
    ),
    "a pointer to it handed on": (
        "frame; mov %rdi, (%rsp); mov %rsp, 8(%rsp); call f; unframe",
        "mov 16(%rsp), %rax; mov (%rax), %rdx; use",
    ),
    "in a function that is jumped to": (
        "push %rdi; pop %rdx; test %rsi, %rsi; jne f",
        "use",
    ),
    "in the second of two calls": (
        "call f; push %rdi; pop %rdx; call f",
        "test %rdx, %rdx; je 1f; use; 1:",
    ),
    "after one of two returns": (
        "call f; mov %rax, %rdx; use",
        "push %rdi; xor %eax, %eax; test %rsi, %rsi; jne 1f; pop %rax; ret; 1: pop %rdx",
    ),
}
"""Refused: so it is, across a call."""

BOUNDS: Final = {
    "a mask": "push %rsi; pop %rdx; mark; and %rdx, %rdi; mov (%rcx,%rdi), %rax",
    "a mask computed from it": "push %rsi; pop %rdx; sub $1, %rdx; mark; and %rdx, %rdi",
    "a mask in memory": "frame; mov %rsi, 8(%rsp); mark; and 8(%rsp), %rdi; unframe",
    "a size": "push %rsi; pop %rdx; mark; cmp %rdx, %rdi; sbb %rax, %rax; mark; and %rax, %rdi",
    "a size in memory": "frame; mov %rsi, 8(%rsp); mark; cmp 8(%rsp), %rdi; unframe",
}
"""Refused: what bounds an index comes back from memory."""

KEPT: Final = {
    "used at once": "use %rdi",
    "moved and computed with": (
        "lea 3(,%rdi,8), %rdx; mov %rdx, %rax; add %rax, %rcx; mov (%rcx), %eax"
    ),
    "spilled, and a barrier before the load": (
        "frame; mov %rdi, 8(%rsp); lfence; mov 8(%rsp), %rdx; use; unframe"
    ),
    "spilled, and a barrier before the use": (
        "frame; mov %rdi, 8(%rsp); mov 8(%rsp), %rdx; lfence; use; unframe"
    ),
    "spilled, and masked again": "push %rdi; pop %rdx; mark; and $63, %rdx; use",
    "masked again by a register": "push %rdi; pop %rdx; mov $63, %eax; mark; and %rax, %rdx; use",
    "stored as data": "mov (%rcx), %r8; mov %rdi, 8(%r8); mov (%r8), %rdx; use",
    "returned through memory": "push %rdi; pop %rax",
    "compared through memory": "push %rdi; pop %rdx; cmp %rdx, %rsi; sete %al",
    "loaded by an address of its own": "push %rdi; pop %rdx; lea (%rcx,%rdx), %rax; nopw (%rdx)",
    "overwritten before the load": (
        "frame; mov %rdi, 8(%rsp); mov %rsi, 8(%rsp); mov 8(%rsp), %rdx; use; unframe"
    ),
    "overwritten by a string store": (
        "frame; mov %rdi, 8(%rsp); mov %rcx, %r8; mov %rsp, %rdi; xor %eax, %eax; mov $8, %ecx; "
        "rep stosq; mov 8(%rsp), %rdx; mov %r8, %rcx; use; unframe"
    ),
    "overwritten by a string move": (
        "frame; mov %rdi, 8(%rsp); mov %rsi, 16(%rsp); mov %rcx, %r8; lea 16(%rsp), %rsi; "
        "lea 8(%rsp), %rdi; mov $1, %ecx; rep movsq; mov 8(%rsp), %rdx; mov %r8, %rcx; use; "
        "unframe"
    ),
    "next to what is loaded": "frame; mov %edi, 8(%rsp); mov 12(%rsp), %edx; use; unframe",
    "in another place": (
        "frame; mov %rdi, 8(%rsp); mov %rsi, 16(%rsp); mov 16(%rsp), %rdx; use; unframe"
    ),
    "replaced in its register": "push %rdi; pop %rdx; mov %rsi, %rdx; use",
    "on a path that ends": "push %rdi; pop %rdx; test %rsi, %rsi; je 1f; ud2; 1: int3; use",
    "another register spilled": "push %rsi; pop %rdx; use",
    "in a loop": "1: use %rdi; add $1, %rdi; cmp %rsi, %rdi; jb 1b",
    "before an endless loop": "push %rdi; pop %rdx; 1: pause; jmp 1b",
    "before a search": "push %rdi; pop %rax; mov %rsp, %rdi; mov $8, %ecx; repne scasb",
    "before a comparison of strings": "push %rdi; pop %rax; mov %rsp, %rdi; mov %rsp, %rsi; cmpsb",
}
"""Taken."""

KEPT_BY_CALLS: Final = {
    "a callee that saves other registers": (
        "call f; use %rdi",
        "push %rbx; xor %ebx, %ebx; pop %rbx",
    ),
    "not used after it was saved": (
        "mov %rdi, %rbx; call f; xor %ebx, %ebx; mov %rsi, %rdx; use",
        "push %rbx; pop %rbx",
    ),
    "one call with it, one without": (
        "push %rbx; mov %rdi, %rbx; call f; mov %rsi, %rbx; call f; mov %rbx, %rdx; use; pop %rbx",
        "push %rbx; xor %ebx, %ebx; pop %rbx",
    ),
    "a callee with a barrier": (
        "mov %rdi, %rbx; call f; mov %rbx, %rdx; use",
        "push %rbx; lfence; pop %rbx",
    ),
    "a callee that does not return": (
        "push %rdi; pop %rdx; call f; use",
        "1: pause; jmp 1b",
    ),
    "a frame that was left": (
        "call f; call g; mov %rax, %rdx; use",
        "push %rdi; pop %rax; ret; g: sub $8, %rsp; mov (%rsp), %rax; add $8, %rsp",
    ),
}
"""Taken, with calls."""

DERIVED: Final = (
    *("mov %rdi, %rdx", "mov %edi, %edx", "movzbl %dil, %edx", "movslq %edi, %rdx"),
    *("lea 5(%rdi), %rdx", "lea (%rsi,%rdi,8), %rdx", "lea (,%rdi,4), %edx", "mov %dil, %dl"),
    *("add %rdi, %rdx", "sub %rdi, %rdx", "adc %rdi, %rdx", "sbb %rdi, %rdx", "or %rdi, %rdx"),
    *("xor %rdi, %rdx", "and %rdi, %rdx", "imul %rdi, %rdx", "imul $24, %rdi, %rdx"),
    *("mov %rdi, %rdx; neg %rdx", "mov %rdi, %rdx; not %rdx", "mov %rdi, %rdx; bswap %rdx"),
    *("mov %rdi, %rdx; inc %rdx", "mov %rdi, %rdx; dec %edx", "mov %rdi, %rdx; shl $3, %rdx"),
    *("mov %rdi, %rdx; shr %rdx", "mov %rdi, %rdx; mov %rsi, %rcx; sar %cl, %edx"),
    *("mov %rdi, %rcx; shl %cl, %rdx", "shld $3, %rdi, %rdx", "shrd $3, %rdi, %rdx"),
    *("mov %rdi, %rdx; rol $3, %rdx", "bsf %rdi, %rdx", "bsr %rdi, %rdx", "popcnt %rdi, %rdx"),
    *("tzcnt %rdi, %rdx", "lzcnt %rdi, %rdx", "crc32b %dil, %edx", "bts %rdi, %rdx"),
    *("mov %rdi, %rdx; btr $3, %rdx", "mov %rdi, %rdx; btc $3, %rdx", "xchg %rdi, %rdx"),
    *("xadd %rdi, %rdx", "cmove %rdi, %rdx", "mov %rdi, %rdx; cmove %rsi, %rdx"),
    *("cmpxchg %rdi, %rdx", "mul %rdi", "mov %rdi, %rax; mul %rsi", "mov %rdi, %rax; cqto"),
    *("xor %edx, %edx; mov %rdi, %rax; div %rsi", "imul %dil; mov %rax, %rdx"),
    *("mov %edi, %eax; cltq; mov %rax, %rdx", "mov %edi, %eax; cwtl; mov %eax, %edx"),
    *("mov %edi, %eax; cltd", "mov %edi, %eax; mov %ah, %dl", "mov %rdi, %rdx; sete %dl"),
    *("mov %rdi, %rdx; mov %sil, %dl", "mov %rdi, %rdx; add $-8, %rdx; sub $0x1000, %rdx"),
)
"""Instructions that leave a value in rdx which depends on rdi."""

FRESH: Final = (
    *("xor %edx, %edx", "sub %rdx, %rdx", "sbb %rdx, %rdx", "mov $5, %edx", "mov %rsi, %rdx"),
    *("mov (%rcx), %rdx", "mov (%rcx,%rdi,8), %rdx", "lea 8(%rsp), %rdx", "movabs $9, %rdx"),
    *("xor %edx, %edx; cmp %rsi, %rdi; setb %dl", "pop %rdx; push %rdx", "movbe 8(%rcx), %rdx"),
)
"""Instructions that leave a value in rdx which does not."""

EVERY: Final = (
    *("mov %rsi, %rax", "movabs $1, %rax", "movabs 0x1000, %eax", "lea 1(%rsi), %eax"),
    *("cmpxchg8b (%rcx)", "cmpxchg16b (%rcx)", "movbe %rax, (%rcx)", "push $1; pop %rax"),
    *("addb $1, (%rcx)", "orw $1, (%rcx)", "notl (%rcx)", "negq (%rcx)", "incl (%rcx)"),
    *("divb (%rcx)", "idivq (%rcx)", "mulw (%rcx)", "imul (%rcx), %eax", "rclq (%rcx)"),
    *("rcr %cl, %eax", "ror $3, %al", "sal %rax", "shldl %cl, %eax, (%rcx)", "btsl $3, (%rcx)"),
    *("btr %eax, (%rcx)", "cbtw", "cwtd", "cmovnp %rsi, %rax", "cmovge (%rcx), %eax"),
    *("setno (%rcx)", "setle %al", "movsb", "movsw", "rep stosl", "stosw", "lodsb", "lodsl"),
    *("cmpsq", "scasw", "repe cmpsl", "cld", "nop", "nopl (%rax)"),
    "push %rbp; mov %rsp, %rbp; leave",
    *("mfence", "sfence", "pause", "prefetchw (%rcx)", "endbr64", "clc; stc; cmc", "ud2", "int3"),
    *("movsbw (%rcx), %ax", "mov %ah, %bh", "xchg %al, (%rcx)", "mov %ds:(%rax), %rax"),
    *("mov (,%rax,8), %rax", "mov 0x1000, %rax", "test $1, %al", ".byte 0x48, 0x8b, 4, 0x20"),
    *("xchg %rax, %rsi", "xadd %al, (%rcx)", "cmpxchg %eax, (%rcx)", "bswap %eax", "lfence"),
)
"""Forms of the instructions that objects may hold; the bytes are `mov (%rax,%riz,1), %rax`."""
