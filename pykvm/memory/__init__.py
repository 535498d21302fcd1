"""Guest physical memory."""
