"""Edits that take one rule out of a trusted source, for the controls."""

from pykvm.elisa.protections import Protection
from tests.rigs.attacks.weak_contexts import Edit

# Of guest/crossing: the gate, and the sub entry.
NO_CLD: Edit = (r"^\tcld\b.*$", "\tnop")
NO_STACK: Edit = (r"^\tlea\tstack \+ ELISA_STACK_SIZE - 16\(%rip\), %rsp.*$", "")

# Of the vault.
NO_BOUND: Edit = (r"^\t\tif \(a1 >= NOTES\)\n\t\t\treturn .*;$", "")
_KNOCK = r"return __atomic_add_fetch\(&vault->knocks, 1, __ATOMIC_RELAXED\);"
BY_GS: Edit = (_KNOCK, r'__asm__("mov %%gs:0, %0" : "=r"(a1)); return a1;')
BY_SSE: Edit = (  # one half, as an integer
    _KNOCK,
    r'__asm__("cvtsi2sdq %1, %%xmm0; cvtsi2sdq %2, %%xmm1; divsd %%xmm1, %%xmm0; '
    r'cvtsd2siq %%xmm0, %0" : "=r"(a1) : "r"(1ull), "r"(2ull)); return a1;',
)
UNCHECKED = frozenset({Protection.CODE_CHECK})
"""Without it, the toolchain takes objects that use GS or SSE."""

# Of the faulty object, which then writes where its caller says.
WRITES: Edit = (r"\(void\)READ_ONCE\(\*\(uint64_t \*\)a2\);", "WRITE_ONCE(*(uint64_t *)a2, 0);")
