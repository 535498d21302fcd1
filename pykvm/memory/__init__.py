"""Guest physical memory: files, regions, and how much of it may be pinned."""
