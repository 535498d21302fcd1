"""Running machines by their names: a directory and a socket for each, and what is asked of them.

A machine's socket is its user's alone. A request is a line of JSON, an object with a `command`; the
answer is a line of JSON too, an object with `result`, or with `problem` and `next_step`.
"""
