"""Programs that run inside the emulated host; nothing outside imports them."""
