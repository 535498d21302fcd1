"""Shows that the built pages of the crossing keep the invariants I1, I2 and I3.

What is claimed, under which assumptions, and what is not modelled: docs/gate-proof.md.

- `gate`: the gate page, entered at each of its bytes with any registers (I2). Start there.
- `sub`: the start of the sub entry page, and the way back from the object's function.
- `roots`: what the processor can reach in a context, whatever CR3 names (I3).
- `crosscheck`: the same pages in an independent emulator, from random states.
- `decode`, `state`, `semantics`, `explore`: the symbolic execution underneath.

Needs the packages of the optional dependencies `verify`.
"""
