"""Edits for the controls; each one removes one rule from a trusted source."""

from pykvm.elisa.protections import Protection
from tests.rigs.attacks.weak_contexts import Edit

# guest/crossing: gate.S and sub.S.
NO_CLD: Edit = (r"^\tcld\b.*$", "\tnop")
NO_STACK: Edit = (r"^\tlea\tstack \+ ELISA_STACK_SIZE - 16\(%rip\), %rsp.*$", "")

# The vault.
NO_BOUND: Edit = (
    r"^\t\tif \(a1 >= NOTES\)\n\t\t\treturn .*;\n\t\ta1 = elisa_mask_nospec\(.*;$",
    "",
)
_KNOCK = r"return __atomic_add_fetch\(&vault->knocks, 1, __ATOMIC_RELAXED\);"
BY_GS: Edit = (_KNOCK, r'__asm__("mov %%gs:0, %0" : "=r"(a1)); return a1;')
BY_SSE: Edit = (  # the lower half, as an integer
    _KNOCK,
    r'__asm__("cvtsi2sdq %1, %%xmm0; cvtsi2sdq %2, %%xmm1; divsd %%xmm1, %%xmm0; '
    r'cvtsd2siq %%xmm0, %0" : "=r"(a1) : "r"(1ull), "r"(2ull)); return a1;',
)
UNCHECKED = frozenset({Protection.CODE_CHECK})
"""Protections to leave out so that the toolchain accepts objects that use GS or SSE."""

# The faulty object, which then writes to an address that its caller chooses.
WRITES: Edit = (r"\(void\)READ_ONCE\(\*\(uint64_t \*\)a2\);", "WRITE_ONCE(*(uint64_t *)a2, 0);")
