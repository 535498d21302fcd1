"""The machine pykvm runs on: what it can do, its KVM modules, the cache of built parts."""
