"""The environment in which git speaks of the repository that its folder is in, and of no other."""

import os

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """Return this process's environment without git's variables.

    GIT_DIR, GIT_WORK_TREE and GIT_INDEX_FILE among them name another repository; a hook of git
    sets them, and so do users.
    """
    return {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
