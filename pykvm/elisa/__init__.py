"""Shared objects in sub EPT contexts: building, attaching, calling."""
