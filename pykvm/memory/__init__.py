"""Guest physical memory (`guest_memory`) and the named addresses inside it (`layout`)."""
