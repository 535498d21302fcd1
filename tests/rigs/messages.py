"""The form of an error's message."""


def one_line(error: BaseException) -> str:
    """The message: one line, not capitalised (macros aside), with what to do behind a colon."""
    message = str(error)
    first = message.split(maxsplit=1)[0]
    assert "\n" not in message
    assert not first[0].isupper() or first.startswith("KVM_")
    assert ": " in message
    return message
