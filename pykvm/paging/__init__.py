"""Page tables as pure data: entries, one builder, one walker, the Anywhere Page Table.

- `entries`: EPT entries, x86 entries and EPTPs as named bit ranges.
- `tables`: maps ranges; the levels, the entry type and the allocator are parameters.
- `walk`: reads tables back, either one set of tables or guest tables through an EPT.
- `anywhere_page_table`: fills the empty entries of an EPT with the Anywhere Page Table.
- `reach`: lists everything that a walk from a given CR3 can reach.

Nothing here needs ``/dev/kvm``. Section numbers are those of the Intel Software Developer's Manual
(SDM) as of 2023.
"""
