"""The plugins that all tests share. pytest imports them in this order."""

pytest_plugins = ["tests.rigs.tiers", "tests.rigs.fixtures"]
