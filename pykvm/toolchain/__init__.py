"""A compiler for freestanding code, and a reader of its ELF files."""
