"""The form of an error's message."""


def one_line(error: BaseException) -> str:
    """The message: one line that starts in lower case (macros and paths aside), what to do next
    behind a colon."""
    message = str(error)
    first = message.split(maxsplit=1)[0]
    assert "\n" not in message
    assert first[0].islower() or first.startswith(("KVM_", "/"))
    assert ": " in message
    return message
