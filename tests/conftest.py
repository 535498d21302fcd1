"""Plugins that all tests share, in the order in which pytest imports them."""

pytest_plugins = ["tests.rigs.tiers", "tests.rigs.fixtures"]
