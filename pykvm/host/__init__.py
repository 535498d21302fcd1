"""The machine that pykvm runs on: processor, distribution, packages, users of KVM, checkout."""
