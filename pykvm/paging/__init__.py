"""Page tables as pure data: entries, one builder, one walker, the Anywhere Page Table.

- `entries`: EPT entries, x86 entries and EPTPs as named bit ranges.
- `tables`: `PageTables`, which maps ranges; levels, entry type and allocator are its parameters.
- `walk`: reads tables back, one set of tables or guest tables and EPT combined.
- `apt`: fills what is empty with the Anywhere Page Table.
- `reach`: everything that a walk from a given CR3 can reach.

Nothing here needs `/dev/kvm`. Section numbers are those of the Intel Software Developer's Manual
(SDM) as of 2023.
"""
