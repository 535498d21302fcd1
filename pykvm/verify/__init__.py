"""Verification that the built pages of the crossing keep the invariants I1, I2 and I3.

``docs/gate-proof.md`` states the claims, their assumptions, and what is not modelled.

- `gate`: the gate page, entered at each of its bytes with any registers (I2). Start there.
- `sub`: the start of the sub entry page, and the return from the object's function.
- `roots`: what the processor can reach in a context, whatever CR3 names (I3).
- `crosscheck`: the same pages in an independent emulator, from random states.
- `decode`, `state`, `semantics`, `explore`: the symbolic execution underneath.

Needs the packages of the optional dependency ``verify``.
"""
