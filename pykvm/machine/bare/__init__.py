"""Bare-metal guests: one program on one vCPU, no firmware, no kernel."""
